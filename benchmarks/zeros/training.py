"""One training, and what it is scored by."""

from __future__ import annotations

import random
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from transformers import AutoModelForCausalLM

from benchmarks.accuracy.sizes import measure
from benchmarks.decoder import adamw, drawn, lora, take_steps
from benchmarks.zeros.candidates import set_candidates
from benchmarks.zeros.data import IGNORED, Data, Rows
from benchmarks.zeros.plan import MODULES, Plan
from peft_mask import MaskConfig, MaskModel, SparsitySchedule, create_mask_optimizer, spend_budget, super_weights
from peft_mask.settings.options import CandidateRule

OWN_RULES = get_args(CandidateRule)
BATCHES_TO_CHOOSE = 8  # whose activations choose candidates


@dataclass(frozen=True)
class Score:
    """How a model does on rows.

    Attributes:
        loss: mean negative log-likelihood of a scored token, in nats.
        right: share of scored tokens that are the most likely ones.
        exact: share of rows in which all scored tokens are; a greedy answer is then this one, up to rounding.
    """

    loss: float
    right: float
    exact: float


@dataclass(frozen=True)
class Setting:
    """What all trainings share: the base model's folder, the data, texts of another kind, the base's own answers."""

    model: str
    data: dict[str, Data]
    other: Rows
    answers: Rows

    def base(self, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype)


def logits_of(model: nn.Module, rows: Rows) -> Tensor:
    """Return what a model says of the token after each, (rows, tokens, vocabulary); products are in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=rows.ids, attention_mask=rows.kept).logits


def loss_of(model: nn.Module, rows: Rows) -> Tensor:
    logits, labels = logits_of(model, rows)[:, :-1], rows.labels[:, 1:]
    scored = labels != IGNORED
    return cross_entropy(logits[scored].float(), labels[scored])


@torch.inference_mode()
def score(model: nn.Module, rows: Rows, size: int = 16) -> Score:
    model.eval()
    loss = right = exact = 0.0
    tokens = 0
    for batch in rows.batches(size):
        logits, labels = logits_of(model, batch)[:, :-1], batch.labels[:, 1:]
        scored = labels != IGNORED
        loss += cross_entropy(logits[scored].float(), labels[scored], reduction="sum").item()
        found = (logits.argmax(-1) == labels) | ~scored
        right += (found & scored).sum().item()
        exact += found.all(1).sum().item()
        tokens += int(scored.sum())
    return Score(loss / tokens, right / tokens, exact / len(rows))


def order(plan: Plan, data: Data) -> list[Rows]:
    """Return the batches of a training: the same for all of one seed and length."""
    train = data.splits["train"]
    return [train[batch] for batch in drawn(len(train), plan.steps * data.batch_size, plan.seed).split(data.batch_size)]


def build(plan: Plan, setting: Setting, batches: list[Rows]) -> tuple[nn.Module, Optimizer]:
    model = setting.base(torch.float32 if plan.method == "full" else torch.bfloat16)  # what is trained is in float32
    if plan.method == "mask":
        targets = MODULES[plan.modules]
        config = MaskConfig(
            task_type="CAUSAL_LM",
            target_modules=None if targets is None else list(targets),
            target_sparsity=plan.sparsity,
            candidates=plan.among,
            candidate_rule=plan.candidates if plan.candidates in OWN_RULES else "magnitude",
            seed=plan.seed,
        )
        model = get_peft_model(model, config)
        if plan.candidates not in OWN_RULES:
            set_candidates(model, plan.candidates, batches[:BATCHES_TO_CHOOSE], partial(logits_of, model))
        if plan.protected:
            cast(MaskModel, model.base_model).protect(super_weights(model, batches[:1], partial(loss_of, model)))
        return model, create_mask_optimizer(model)
    if plan.method == "LoRA":
        model = lora(model)
    return model, adamw(model, plan.rate)


def train(plan: Plan, setting: Setting) -> tuple[nn.Module, dict[str, Any]]:
    """Train once; return the model and the figures of the training."""
    torch.manual_seed(plan.seed)
    random.seed(plan.seed)
    batches = order(plan, setting.data[plan.data])
    model, optimizer = build(plan, setting, batches)
    growth = SparsitySchedule.gentle(plan.sparsity, plan.steps)
    start = time.perf_counter()
    losses = take_steps(
        model, optimizer, batches, loss_of, lambda model, progress: spend_budget(model, growth.share(progress))
    )
    seconds = time.perf_counter() - start
    last = losses[-max(1, plan.steps // 10) :]
    figures: dict[str, Any] = {"seconds": round(seconds, 1), "last_loss": sum(last) / len(last)}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return model, figures | measure(Path(folder))


def figures_of(plan: Plan, setting: Setting) -> dict[str, Any]:
    """Train a plan and score it: on what it has learnt, and on what it may have forgotten."""
    model, figures = (setting.base(), {}) if plan.method == "base" else train(plan, setting)
    data = setting.data[plan.data]
    for name in ("dev", "test"):
        own = score(model, data.splits[name])
        figures |= {name: own.loss, f"{name}_exact": own.exact if data.has_answers else None}
    figures["other"] = score(model, setting.other).loss
    answered = score(model, setting.answers)
    return figures | {"answers_right": answered.right, "answers_exact": answered.exact}
