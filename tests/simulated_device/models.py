"""Models for the scenarios, and how they are trained: tiny ones, without dropout, the same on every device."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from peft_mask import MaskConfig, create_mask_optimizer
from peft_mask.layers.mask_layer import MaskLayer
from tests.tiny_models import tiny_inputs, tiny_model


def base(device: str, family: str = "bert", dtype: torch.dtype = torch.float32) -> nn.Module:
    model = tiny_model(family, "lm" if family in ("llama", "gpt2") else "seq_cls").to(device, dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def config(family: str = "bert", **fields: Any) -> MaskConfig:
    return MaskConfig(task_type="CAUSAL_LM" if family in ("llama", "gpt2") else "SEQ_CLS", seed=0, **fields)


def masked(device: str, family: str = "bert", dtype: torch.dtype = torch.float32, **fields: Any) -> nn.Module:
    return get_peft_model(base(device, family, dtype), config(family, **fields))


def batch(model: nn.Module, device: str, rows: int = 4) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in tiny_inputs(model, rows, labels=True).items()}


def train(
    model: nn.Module,
    device: str,
    optimizer: torch.optim.Optimizer | None = None,
    before: Iterable[Callable[[nn.Module], object]] = (),
    after: Iterable[Callable[[nn.Module], object]] = (),
    autocast: bool = False,
    inputs: torch.Tensor | None = None,
) -> torch.optim.Optimizer:
    """Three steps, on a batch of texts, or on `inputs` with their squared outputs as loss."""
    model.train()
    optimizer = optimizer or create_mask_optimizer(model)
    given = batch(model, device) if inputs is None else {}
    for _ in range(3):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = model(**given).loss if inputs is None else model(inputs).square().mean()
        loss.backward()
        for call in before:
            call(model)
        optimizer.step()
        for call in after:
            call(model)
        optimizer.zero_grad()
    return optimizer


def numbers(device: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)


def layers(model: nn.Module) -> dict[str, MaskLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskLayer)}


def bits(model: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    """The masks of an adapter, of which a scenario must leave some weights off."""
    found = {n: layer.packed_mask(adapter) for n, layer in layers(model).items() if adapter in layer.available_adapters}
    assert any((packed != 255).any() for packed in found.values())
    return found


def on_the_device(state: dict[str, Any], device: str) -> dict[str, Any]:
    """What `torch.load(..., map_location=device)` would read of a state that was saved."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone().to(device), state)
