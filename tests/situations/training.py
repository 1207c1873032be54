"""Training with `Trainer`, and what may end it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_mask import MaskStatistics
from tests.situations.methods import Method
from tests.situations.models import classifier, logits
from tests.situations.table import situation

PART = "Training"
ROWS = [{"input_ids": torch.arange(4 + i, 14 + i), "labels": torch.tensor(i % 2)} for i in range(8)]


class Interrupt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt


def adapted(method: Method, adapter_name: str = "default") -> PeftModel:
    more = {} if method.name == "lora" else {"target_sparsity": 0.05, "seed": 1}
    torch.manual_seed(0)
    return get_peft_model(classifier(), method.fresh(task_type="SEQ_CLS", **more), adapter_name=adapter_name)


def trainer_of(
    method: Method, model: nn.Module, folder: Path, more: Sequence[TrainerCallback] = (), **arguments: Any
) -> Trainer:
    quiet = {"logging_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    settings = {"max_steps": 20, "save_strategy": "no", "remove_unused_columns": False, "label_names": ["labels"]}
    return Trainer(
        model,
        TrainingArguments(str(folder), per_device_train_batch_size=2, **quiet | settings | arguments),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        optimizers=(method.optimizer(model), None),
        callbacks=[*method.callbacks(), *more],
    )


@situation(
    PART, "Interrupt a training, train again from the start: the whole adapter is trained", lora="right", mask="right"
)
def interrupted(method: Method, folder: Path) -> bool:
    model = adapted(method)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with contextlib.suppress(KeyboardInterrupt):
        trainer_of(method, model, folder, [Interrupt()]).train()
    again = trainer_of(method, model, folder)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters() if name in trainable}
    again.train()
    after = dict(model.named_parameters())
    trained = len(before) > 0 and not any(torch.equal(before[name], after[name]) for name in before)
    return trained and (method.name == "lora" or MaskStatistics(model)(model)["sparsity"] > 0.04)


@situation(
    PART, "Resume from a checkpoint: what an uninterrupted training gives, to the bit", lora="right", mask="right"
)
def resumed(method: Method, folder: Path) -> bool:
    whole = adapted(method)
    trainer_of(method, whole, folder / "whole", max_steps=6).train()
    half = adapted(method)
    with contextlib.suppress(KeyboardInterrupt):
        trainer_of(
            method, half, folder / "half", [Interrupt()], max_steps=6, save_strategy="steps", save_steps=3
        ).train()
    again = adapted(method)
    trainer_of(method, again, folder / "half", max_steps=6).train(
        resume_from_checkpoint=str(folder / "half/checkpoint-3")
    )
    return torch.equal(logits(again), logits(whole))


@situation(
    PART,
    "`load_best_model_at_end` with an adapter that is not called default: the best or the last model, not a mixture",
    lora="right",
    mask="right",
)
def best_by_another_name(method: Method, folder: Path) -> bool:
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    steps = {"eval_strategy": "steps", "eval_steps": 4, "save_strategy": "steps", "save_steps": 4}
    trainer = trainer_of(method, adapted(method, "task"), folder, **best, **steps)
    trainer.train()
    seen = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    ended = trainer.evaluate()["eval_loss"]
    return any(abs(ended - loss) < 1e-6 for loss in (max(seen), seen[-1]))


@situation(
    PART,
    "`Trainer(torch.compile(model))` saves checkpoints that load",
    lora="refused",
    mask="right",
    lora_refusal="modules_to_save.default.weight",
    slow=True,
)
def compiled_in_trainer(method: Method, folder: Path) -> bool:
    model = adapted(method)
    compiled = torch.compile(model, backend="eager")
    trainer_of(method, compiled, folder, max_steps=2, save_strategy="steps", save_steps=2).train()
    return torch.equal(logits(PeftModel.from_pretrained(classifier(), folder / "checkpoint-2")), logits(model))


@situation(PART, "A batch whose gradients are NaN: the next ones train on", lora="wrong", mask="right")
def nan_in_a_batch(method: Method, folder: Path) -> bool:
    model = adapted(method)
    optimizer = method.optimizer(model)
    inputs = {"input_ids": ROWS[0]["input_ids"].view(1, -1), "labels": torch.tensor([1])}
    for factor in (torch.nan, 1.0):
        (model.train()(**inputs).loss * factor).backward()
        optimizer.step()
        optimizer.zero_grad()
    return bool(logits(model).isfinite().all())


@situation(PART, "Gradient checkpointing: the gradients of a step without it", lora="right", mask="right")
def checkpointed(method: Method, folder: Path) -> bool:
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = adapted(method).train()  # in evaluation nothing is checkpointed
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        called = []
        model.get_submodule("base_model.model.bert.encoder.layer.0.attention").register_forward_hook(
            lambda *_, called=called: called.append(1)
        )
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(input_ids=ROWS[0]["input_ids"].view(1, -1), labels=torch.tensor([1])).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        calls.append(len(called))
    same = all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    return same and len(gradients[0]) > 0 and calls == [1, 2]  # with checkpointing, once more in the backward pass
