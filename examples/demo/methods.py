"""Mask, LoRA and full fine-tuning: the same `Trainer`, the same seed, steps and order of the data.

The head is new in every method and learns at the same rate in all of them, `HEAD_LR`; the rest learns at a rate that
suits the method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch.optim import AdamW, Optimizer
from transformers import EvalPrediction, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from examples.demo.progress import Peek, Progress
from examples.demo.tasks import BaseModel, Task
from peft_mask import HEAD_LR, MaskCallback, MaskConfig, Masks, create_mask_optimizer
from peft_mask.recipes.script import file_bytes

HEAD = "classifier"  # the module that transformers adds for the task

Setup = tuple[Any, Optimizer, list[TrainerCallback]]


@dataclass(frozen=True)
class Result:
    """One row of the table; `None` where a method has no such figure."""

    method: str
    task: str
    metric: str
    score: float
    trained_parameters: int | None = None
    adapter_bytes: int | None = None
    head_bytes: int | None = None
    sparsity: float | None = None
    bits_per_weight: float | None = None
    seconds: float | None = None


def mask(model: Any) -> Setup:
    model = get_peft_model(model, MaskConfig(task_type="TOKEN_CLS"))
    # the default learning rates; fused, as those of the other methods are
    return model, create_mask_optimizer(model, fused=True), [MaskCallback()]


def lora(model: Any) -> Setup:
    # Left to itself, PEFT counts the head of a tagging model among "all-linear".
    config = LoraConfig(task_type="TOKEN_CLS", r=8, lora_alpha=16, target_modules="all-linear", exclude_modules=[HEAD])
    model = get_peft_model(model, config)
    return model, _adamw(model, lr=1e-3), []


def full(model: Any) -> Setup:
    return model, _adamw(model, lr=3e-4), []


def _adamw(model: Any, lr: float) -> Optimizer:
    trained = [(HEAD in name.split("."), p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for in_head, p in trained if not in_head], "lr": lr},
        {"params": [p for in_head, p in trained if in_head], "lr": HEAD_LR},
    ]
    return AdamW(groups, weight_decay=0.0, fused=True)


METHODS: dict[str, Callable[[Any], Setup]] = {"mask": mask, "LoRA r=8": lora, "full fine-tuning": full}


def train(method: str, task: Task, base: BaseModel, steps: int, folder: Path, peek: Peek | None = None) -> Result:
    """Train one method on one task, save it to `folder`, and score it once on the test sentences.

    `peek` is asked early how well the model does.
    """
    model, optimizer, callbacks = METHODS[method](base.load(task))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        warmup_steps=steps // 10,
        max_grad_norm=1.0,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        seed=base.seed,
        logging_steps=max(1, steps // 4),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        use_cpu=True,
        disable_tqdm=True,
        **_grouped_by_length(),
    )

    def compute_score(prediction: EvalPrediction) -> dict[str, float]:
        return {"score": task.score(prediction.predictions, prediction.label_ids)}

    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=task.train,
        data_collator=base.collator(),
        compute_metrics=compute_score,
        preprocess_logits_for_metrics=lambda logits, _: logits.argmax(-1),
        optimizers=(optimizer, None),  # None: linear decay
        callbacks=[*callbacks, Progress(peek)],
    )
    trainer.remove_callback(PrinterCallback)  # which prints dictionaries
    seconds = trainer.train().metrics["train_runtime"]
    scored = trainer.evaluate(task.test, metric_key_prefix="test")
    model.save_pretrained(folder)
    is_adapter = method != "full fine-tuning"
    adapter_bytes, head_bytes = file_bytes(
        folder / ("adapter_model.safetensors" if is_adapter else "model.safetensors"), head=[HEAD]
    )
    masks = Masks.load(folder) if method == "mask" else None
    return Result(
        method,
        task.name,
        task.metric,
        score=scored["test_score"],
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapter_bytes=adapter_bytes,
        head_bytes=head_bytes,
        sparsity=masks.sparsity if masks else None,
        bits_per_weight=masks.bits_per_weight if masks else None,
        seconds=seconds,
    )


def _grouped_by_length() -> dict[str, Any]:
    """Return the argument that batches sentences of like length, which saves padding: transformers 5 renamed it."""
    if "train_sampling_strategy" in TrainingArguments.__dataclass_fields__:
        return {"train_sampling_strategy": "group_by_length"}
    return {"group_by_length": True}
