"""One run of a trained method: a lean loop, the same for all of them."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import get_cosine_with_hard_restarts_schedule_with_warmup

from benchmarks.accuracy.model import model_class
from benchmarks.accuracy.sizes import bytes_on_base, in_head, measure
from benchmarks.accuracy.tasks import IGNORED, Rows, Split, Task, load_rows, training_batches
from peft_mask import MaskStatistics


@dataclass(frozen=True)
class Method:
    """A row of the table of methods: how a base model becomes trainable, and the rates among which dev chooses.

    `build(model, task_type)` returns the model to train, `optimizer(model, lr)` its optimizer, `before_step(model,
    progress)` is called before each step, with progress from 0 to 1. `note` says in words what the functions do; it is
    recorded with each result, and a result with another note is refused. What is trained, but for the head, is saved
    and scored in `dtype`. With `widen` dev chooses among more rates while the best is the lowest or the highest.
    """

    name: str
    note: str
    build: Callable[[nn.Module, str], nn.Module]
    optimizer: Callable[[nn.Module, float], Optimizer]
    lrs: tuple[float, ...]
    before_step: Callable[[nn.Module, float], None] = lambda model, progress: None
    dtype: torch.dtype = torch.float32
    widen: bool = True


@dataclass(frozen=True)
class Setting:
    """What all runs of a table share. `model` is a name or folder that transformers loads."""

    data: Path
    model: str
    batch_size: int = 32
    warmup: float = 0.1
    clip: float = 1.0
    dropout: float = 0.0  # off for every method: no budget comes near overfitting (docs/experiments.md, "Dropout")
    cycles: int = 0  # of a cosine, in place of the linear decay
    progress: Callable[[str], None] = field(default=lambda line: None, compare=False)

    def rows(self, task: Task, split: Split) -> Rows:
        return load_rows(task, split, self.model, self.data)

    def schedule(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        if self.cycles:
            return get_cosine_with_hard_restarts_schedule_with_warmup(optimizer, 0, steps, self.cycles)
        return LambdaLR(optimizer, _triangle(steps, self.warmup))

    def as_json(self) -> dict[str, Any]:
        linear = f"linear warm-up over {self.warmup:g} of the steps, then linear decay to 0"
        return {
            "batch_size": self.batch_size,
            "schedule": f"{self.cycles} cycles of a cosine, each from the rate to 0" if self.cycles else linear,
            "gradient_clipping": self.clip,
            "dropout": self.dropout,
            "weight_decay": 0.0,
            "dtype": "float32",
        }


def untrained(task: Task, method: Method, seed: int, setting: Setting) -> nn.Module:
    """The model of a run before its first step; everything random in it comes from `seed`."""
    torch.manual_seed(seed)
    base = model_class(task.task_type, setting.model).from_pretrained(
        setting.model,
        num_labels=len(task.label_names(setting.data)),
        hidden_dropout_prob=setting.dropout,
        attention_probs_dropout_prob=setting.dropout,
    )
    return method.build(base, task.task_type)


def train(
    task: Task,
    method: Method,
    lr: float,
    seed: int,
    steps: int,
    setting: Setting,
    state: Path | None = None,
    watch: Callable[[int, nn.Module], None] = lambda step, model: None,
) -> dict[str, Any]:
    """Trains once, measures the adapter, scores dev; never reads test.

    The trained parameters go to `state`, from which `restored` goes on. `watch` sees the model before the first step,
    as step 0, and after each.
    """
    model: Any = untrained(task, method, seed, setting)  # a PreTrainedModel or a PeftModel
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    statistics = MaskStatistics(model)
    optimizer = method.optimizer(model, lr)
    schedule = setting.schedule(optimizer, steps)
    rows = setting.rows(task, "train")
    losses: list[float] = []
    start = time.perf_counter()
    model.train()
    watch(0, model)
    for indices in training_batches(rows, seed, steps, setting.batch_size):
        method.before_step(model, len(losses) / steps)
        loss = model(**rows.batch(indices)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), setting.clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        watch(len(losses), model)
        if len(losses) % 50 == 0:
            setting.progress(f"step {len(losses)} of {steps}, loss {sum(losses[-50:]) / 50:.3f}")
    seconds = time.perf_counter() - start
    _round(trained, method.dtype)
    figures: dict[str, Any] = {
        "dev": accuracy(model, setting.rows(task, "dev")),
        "loss": sum(losses[-20:]) / len(losses[-20:]),
        "train_seconds": round(seconds, 2),
        "dtype": str(method.dtype).removeprefix("torch."),
        "trained_parameters": sum(p.numel() for p in trained.values()),
        **{name: value for name, value in statistics(model).items() if name == "flip_ratio"},
    }
    if state is not None:
        save_file({name: p.detach().contiguous() for name, p in trained.items()}, state)
    with tempfile.TemporaryDirectory() as folder:
        # A plain model has no adapter: of it, what was trained is saved (full fine-tuning: everything, BitFit: biases).
        tensors = model.state_dict() if isinstance(model, PeftModel) else trained
        model.save_pretrained(folder, state_dict=_kept(tensors, method.dtype))
        figures |= measure(Path(folder))
        if "sparsity" in figures:
            figures["bytes_on_base"] = bytes_on_base(Path(folder), model.unload())
    return figures


def _round(trained: Mapping[str, nn.Parameter], dtype: torch.dtype) -> None:
    """Round what was trained, but for the head, to what is left of it in a file of `dtype`."""
    with torch.no_grad():
        for name, p in trained.items():
            if not in_head(name):
                p.copy_(p.to(dtype))


def _kept(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return tensors for a file of `dtype`; the head stays as it is."""
    if dtype == torch.float32:
        return dict(tensors)
    cast = {name: t.is_floating_point() and not in_head(name) for name, t in tensors.items()}
    return {name: t.to(dtype) if cast[name] else t for name, t in tensors.items()}


def score_test(task: Task, method: Method, seed: int, setting: Setting, state: Path) -> float:
    """The test accuracy of a run, from the parameters that `train` left in `state`."""
    return accuracy(restored(task, method, seed, setting, state), setting.rows(task, "test"))


def restored(task: Task, method: Method, seed: int, setting: Setting, state: Path) -> nn.Module:
    """The model of a run after its last step, from the parameters that `train` left in `state`."""
    model = untrained(task, method, seed, setting)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = load_file(state)
    if values.keys() != parameters.keys():
        raise ValueError(
            f"cannot score '{state.name}': it holds other parameters than {method.name} trains: "
            f"{sorted(values.keys() ^ parameters.keys())[:4]}. Delete it, and the run is trained again."
        )
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(values[name])
    return model


def accuracy(model: nn.Module, rows: Rows, batch_size: int = 64) -> float:
    """The fraction of labels predicted right, out of all labels in the file."""
    model.eval()
    right = 0
    with torch.inference_mode():
        for batch in rows.in_order_of_length(batch_size):
            labels = batch.pop("labels")
            predicted = model(**batch).logits.argmax(-1)
            right += int(((predicted == labels) & (labels != IGNORED)).sum())
    return right / rows.labelled


def _triangle(steps: int, warmup: float) -> Callable[[int], float]:
    rise = max(1, round(warmup * steps))

    def factor(step: int) -> float:
        return (step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise)

    return factor
