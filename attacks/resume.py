"""Kills processes that train, and compares what the next one ends with to a training that nobody stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from attacks.victim import CONFIG, WEIGHTS, quiet
from peft_mask import MaskCallback, MaskConfig, MaskLayer, SparsitySchedule, create_mask_optimizer

STEPS = 12
BUDGET = {"target_sparsity": 0.05}

# what is trained -> fields of MaskConfig that make masks move within so few steps
CASES: dict[str, dict[str, Any]] = {
    "topk": BUDGET,
    "topk, bfloat16": BUDGET | {"scores_dtype": "bfloat16"},
    "topk, rows": {"target_sparsity": 0.1, "structure": "row", "candidates": None},
    "threshold": {"binarizer": "threshold", "init_margin": 0.01},
    "sign": {"binarizer": "sign", "init_margin": 0.01},
    "bernoulli": {"binarizer": "bernoulli", "init_sparsity": 0.499},
    "n:m": {"binarizer": "n:m", "candidates": None},
}


@dataclass
class Outcome:
    """What a training ends with: its tensors, its logs and the hashes of its files."""

    tensors: dict[str, Tensor]
    logs: list[dict[str, Any]]
    best: str | None
    files: dict[str, str]


def differences(one: Outcome, other: Outcome) -> list[str]:
    """Name everything in which two outcomes are not the same to the bit."""
    found = [f"tensor {name}" for name in one.tensors.keys() ^ other.tensors.keys()]
    for name in one.tensors.keys() & other.tensors.keys():
        a, b = one.tensors[name], other.tensors[name]
        if a.dtype != b.dtype or not torch.equal(a, b):
            found.append(f"tensor {name}")
    found += [f"log {i}: {a} {b}" for i, (a, b) in enumerate(zip(one.logs, other.logs, strict=False)) if a != b]
    found += [] if len(one.logs) == len(other.logs) else [f"{len(one.logs)} and {len(other.logs)} logs"]
    found += [] if one.best == other.best else [f"best checkpoints {one.best} and {other.best}"]
    found += [f"file {name}" for name, _ in one.files.items() ^ other.files.items()]
    return sorted(set(found))


def model_to_train(case: str) -> nn.Module:
    """A BERT of two layers with dropout, its weights and head always the same, under the masks of a case."""
    shape = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=60,
        max_position_embeddings=16,
        num_labels=3,
    )
    torch.manual_seed(0)
    return get_peft_model(BertForSequenceClassification(shape), MaskConfig(task_type="SEQ_CLS", seed=0, **CASES[case]))


def rows(count: int) -> list[dict[str, Tensor]]:
    """Sentences of random tokens, with labels."""
    generator = torch.Generator().manual_seed(1)
    ids, labels = torch.randint(3, 64, (count, 8), generator=generator), torch.randint(3, (count,), generator=generator)
    return [{"input_ids": ids[i], "labels": labels[i]} for i in range(count)]


def trainer_of(case: str, folder: Path, callbacks: Iterable[TrainerCallback] = ()) -> Trainer:
    """A Trainer as a script makes it anew each time it is started: schedule, accumulation, best checkpoint and all."""
    model = model_to_train(case)
    grows = SparsitySchedule("cubic", end=0.6) if case.startswith("topk") else None
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "num_train_epochs": 2,  # not max_steps: from its last checkpoint Trainer would take one step more
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "save_total_limit": 2,
        "load_best_model_at_end": True,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=rows(24),
        eval_dataset=rows(4),
        callbacks=[MaskCallback(grows), *callbacks],
        optimizers=(create_mask_optimizer(model, lr=1e-3, mask_lr=5e-3), None),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def last_whole_checkpoint(folder: Path) -> str | None:
    """The latest checkpoint that was written to its end, which is `trainer_state.json`."""
    whole = []
    for state in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json"):
        try:
            whole.append((json.loads(state.read_text())["global_step"], str(state.parent)))
        except ValueError:  # the kill came while it was written
            continue
    return max(whole)[1] if whole else None


def train(case: str, folder: Path, callbacks: Iterable[TrainerCallback] = ()) -> Outcome:
    """Train to the end, from the last whole checkpoint in `folder` if there is one, and say what came of it."""
    with quiet():
        trainer = trainer_of(case, folder, callbacks)
        done = trainer.train(resume_from_checkpoint=last_whole_checkpoint(folder))
        trainer.model.save_pretrained(folder / "final")
    return _outcome(trainer, done, folder)


def _outcome(trainer: Trainer, done: TrainOutput, folder: Path) -> Outcome:
    assert done.global_step == STEPS
    tensors: dict[str, Tensor] = {}
    for name, value in trainer.model.state_dict().items():  # of the best checkpoint
        if "peft_mask_" in name or "modules_to_save" in name:
            tensors[name] = value.detach().clone()
    for name, module in trainer.model.named_modules():
        if isinstance(module, MaskLayer):
            tensors[f"{name}.mask"] = module.packed_mask("default")
    for number, state in trainer.optimizer.state_dict()["state"].items():  # of the last step
        tensors |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
    tensors["learning rates"] = torch.tensor([group["lr"] for group in trainer.optimizer.param_groups])
    logs = []
    for entry in trainer.state.log_history[:-1]:  # the last is Trainer's summary of this process alone, and times
        logs.append({name: value for name, value in entry.items() if not name.endswith(("_runtime", "_per_second"))})
    checkpoints = sorted(folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    files = {
        f"{place.name}/{name}": hashlib.sha256((place / name).read_bytes()).hexdigest()
        for place in [folder / "final", *checkpoints]
        for name in (WEIGHTS, CONFIG)
    }
    best = trainer.state.best_model_checkpoint
    return Outcome(tensors, logs, best and Path(best).name, files)


def in_child(case: str, folder: Path, kill_after: float | None = None) -> bool:
    """Train in a process of its own, whose outcome is a file in `folder`; whether it came to its end.

    It is killed, if at all, so many seconds after its first checkpoint was whole.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.save(vars(train(case, folder)), folder / "outcome.pt")
            status = 0
        finally:
            os._exit(status)
    if kill_after is not None:
        look = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while last_whole_checkpoint(folder) is None and os.waitid(os.P_PID, child, look) is None:
            time.sleep(0.01)
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if status not in (0, signal.SIGKILL):
        raise RuntimeError(f"the training of '{case}' failed")
    return status == 0


def outcome_in(folder: Path) -> Outcome:
    """What a child left."""
    return Outcome(**torch.load(folder / "outcome.pt"))


def kill(case: str, kills: int, random: Random) -> list[list[str]]:
    """Kill that many trainings at random moments, and let each be resumed; what then differs."""
    found = []
    with tempfile.TemporaryDirectory() as top:
        whole = Path(top, "whole")
        train(case, Path(top, "first"))  # what is imported on the way is then there in every child
        whole.mkdir()
        began = time.perf_counter()
        in_child(case, whole)
        seconds = time.perf_counter() - began
        for number in range(kills):
            folder = Path(top, str(number))
            folder.mkdir()
            while in_child(case, folder, kill_after=random.uniform(0, seconds)):
                shutil.rmtree(folder)  # it was faster than the kill
                folder.mkdir()
            in_child(case, folder)
            found.append(differences(outcome_in(whole), outcome_in(folder)))
            shutil.rmtree(folder)
    return found


def report(kills: int, seed: int) -> bool:
    """Kill trainings with every binarizer, print what became of them; whether all ended as if nobody had."""
    random, equal = Random(seed), True
    for case in CASES:
        found = kill(case, kills, random)
        same = sum(not differ for differ in found)
        equal &= same == kills
        print(f"{case}: {same} of {kills} killed trainings went on and ended equal to the bit", flush=True)
        for differ in found:
            for line in differ[:5]:
                print(f"  {line}")
    return equal
