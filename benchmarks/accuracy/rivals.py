"""PEFT's methods of which all-MiniLM-L6-v2 has a setting below 100 kB, each as its documentation and its paper set it.

Rates are those of the papers and of PEFT's examples. What is trained is kept in bfloat16, as anyone would store it, and
scored so.

Source of the settings: PEFT 0.21.2, its documentation, examples and docstrings, which name the papers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from torch.optim import AdamW, Optimizer

from benchmarks.accuracy.optimizers import HEAD_LR, HEAD_NOTE, adamw
from benchmarks.accuracy.sizes import in_head
from benchmarks.accuracy.training import Method

ALL = ("query", "key", "value", "dense")
QV = ("query", "value")
EVERY_LINEAR = r".*encoder.*\.(query|key|value|dense)"  # the same as ALL; (IA)3 wants one kind of name for both lists
RATES = (1e-3, 3e-3, 1e-2, 3e-2)


def built(kind: Callable[..., PeftConfig], settings: dict[str, Any]) -> Callable[[nn.Module, str], nn.Module]:
    def build(model: nn.Module, task_type: str) -> nn.Module:
        own = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
        if "random_loc_seed" in own:  # else PEFT draws the same positions in every run
            own["random_loc_seed"] = torch.initial_seed()
        return get_peft_model(model, kind(task_type=task_type, **own))

    return build


def rival(
    name: str,
    kind: str,
    rates: tuple[float, ...] = RATES,
    optimizer: Callable[[nn.Module, float], Optimizer] = adamw,
    optimizer_note: str = "",
    **settings: Any,
) -> Method:
    told = ", ".join(f"{key}={value!r}" for key, value in settings.items())
    note = f"{kind}({told}), kept in bfloat16; {optimizer_note}{HEAD_NOTE}"
    return Method(name, note, built(getattr(peft, kind), settings), optimizer, rates, dtype=torch.bfloat16)


def vblora_adamw(model: nn.Module, lr: float) -> Optimizer:
    """AdamW with the logits, which choose among the vectors of the bank, at ten times the bank's rate, as published."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: dict[float, list[nn.Parameter]] = {}
    for name, p in trained:
        groups.setdefault(HEAD_LR if in_head(name) else 10 * lr if "logits" in name else lr, []).append(p)
    return AdamW([{"params": own, "lr": rate} for rate, own in groups.items()], weight_decay=0.0)


RIVALS = (
    rival("ia3-all", "IA3Config", target_modules=EVERY_LINEAR, feedforward_modules=r".*layer\.\d+\.output\.dense"),
    rival("c3a-all", "C3AConfig", (3e-2, 1e-1, 3e-1, 1.0), block_size=384, target_modules=ALL),
    rival("c3a-qv", "C3AConfig", (3e-2, 1e-1, 3e-1, 1.0), block_size=384, target_modules=QV),
    rival("road-all", "RoadConfig", variant="road_1", group_size=64, target_modules=ALL),
    rival("unilora-16k", "UniLoraConfig", r=4, theta_d_length=16384, target_modules=ALL, init_theta_d_bound=0.02),
    rival("unilora-33k", "UniLoraConfig", r=4, theta_d_length=33536, target_modules=ALL, init_theta_d_bound=0.02),
    rival(
        "vblora-all",
        "VBLoRAConfig",
        (3e-4, 1e-3, 3e-3, 1e-2),
        vblora_adamw,
        "logits at ten times the rate; ",
        r=4,
        num_vectors=90,
        vector_length=192,
        topk=2,
        target_modules=ALL,
        save_only_topk_weights=True,
    ),
    rival("vera-all", "VeraConfig", r=64, target_modules=ALL, save_projection=False, d_initial=0.1),
    rival("fourierft-qv", "FourierFTConfig", n_frequency=1000, scaling=150.0, target_modules=QV, random_loc_seed=0),
    rival("fourierft-all", "FourierFTConfig", n_frequency=900, scaling=150.0, target_modules=ALL, random_loc_seed=0),
    rival(
        "waveft-all",
        "WaveFTConfig",
        (3e-4, 1e-3, 3e-3, 1e-2),
        n_frequency=900,
        scaling=25.0,
        target_modules=ALL,
        random_loc_seed=0,
    ),
    rival("psoft-qv", "PsoftConfig", (3e-4, 1e-3, 3e-3, 1e-2), r=46, psoft_alpha=46, target_modules=QV),
    rival(
        "supertuning-all",
        "SupertuningConfig",
        (3e-4, 1e-3, 3e-3, 1e-2),
        sparsity=0.997,
        save_precomputed_indices=False,
        target_modules=ALL,
    ),
    rival("lokr-qv", "LoKrConfig", r=4, alpha=4, decompose_factor=4, target_modules=QV),
    rival("miss-qv", "MissConfig", (1e-4, 3e-4, 1e-3, 3e-3), r=1, target_modules=QV),
    rival("miss-mini-all", "MissConfig", r=16, mini_r=16, init_weights="mini", target_modules=ALL),
    rival("ln-tuning", "LNTuningConfig", target_modules=("LayerNorm",)),
    rival("beft-value", "BeftConfig", target_modules=("value",)),
    rival("oft-all", "OFTConfig", (3e-4, 1e-3, 3e-3, 1e-2), oft_block_size=32, block_share=True, target_modules=ALL),
    rival("tinylora-qv", "TinyLoraConfig", r=2, u=64, target_modules=QV, save_projection=False),
    rival("lora-r1-qv", "LoraConfig", r=1, lora_alpha=2, target_modules=QV),
)
