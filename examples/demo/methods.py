"""Mask, LoRA and full fine-tuning: the same `Trainer`, the same seed, steps and order of the data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch.optim import AdamW, Optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from examples.demo.tasks import BaseModel, Task
from examples.text_classification import accuracy, file_bytes
from peft_mask import MaskCallback, MaskConfig, Masks, create_mask_optimizer

Setup = tuple[Any, Optimizer, list[TrainerCallback]]


@dataclass(frozen=True)
class Result:
    """One row of the table; `None` where a method has no such figure."""

    method: str
    task: str
    accuracy: float
    trained_parameters: int | None = None
    adapter_bytes: int | None = None
    head_bytes: int | None = None
    sparsity: float | None = None
    bits_per_weight: float | None = None
    seconds: float | None = None


def mask(model: Any) -> Setup:
    model = get_peft_model(model, MaskConfig(task_type="SEQ_CLS"))
    # the default learning rates; fused, as Trainer's own optimizer is and those of the other methods are
    return model, create_mask_optimizer(model, fused=True), [MaskCallback()]


def lora(model: Any) -> Setup:
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(model, config)
    return model, _adamw(model, lr=1e-3), []


def full(model: Any) -> Setup:
    return model, _adamw(model, lr=3e-4), []


def _adamw(model: Any, lr: float) -> Optimizer:
    return AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0, fused=True)


METHODS: dict[str, Callable[[Any], Setup]] = {"mask": mask, "LoRA r=8": lora, "full fine-tuning": full}


def train(method: str, task: Task, base: BaseModel, steps: int, folder: Path) -> Result:
    """Train one method on one task, save it to `folder`, and score it once on the test rows."""
    model, optimizer, callbacks = METHODS[method](base.load(task))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=64,
        seed=base.seed,
        logging_steps=max(1, steps // 4),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=task.train,
        data_collator=base.collator(),
        compute_metrics=accuracy,
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )
    seconds = trainer.train().metrics["train_runtime"]
    scored = trainer.evaluate(task.test, metric_key_prefix="test")
    model.save_pretrained(folder)
    is_adapter = method != "full fine-tuning"
    adapter_bytes, head_bytes = file_bytes(
        folder / ("adapter_model.safetensors" if is_adapter else "model.safetensors"), head=["classifier"]
    )
    masks = Masks.load(folder) if method == "mask" else None
    return Result(
        method,
        task.name,
        accuracy=scored["test_accuracy"],
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        adapter_bytes=adapter_bytes,
        head_bytes=head_bytes,
        sparsity=masks.sparsity if masks else None,
        bits_per_weight=masks.bits_per_weight if masks else None,
        seconds=seconds,
    )
