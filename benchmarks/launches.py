"""What a training step gives a GPU to do: kernels launched, and bytes moved, of a mask and of its neighbors.

    python -m benchmarks.launches                  # on a simulated device: counts need no GPU, but a C++ compiler
    python -m benchmarks.launches --device cuda

Every operation is seen on its way to the device. A few stand for several kernels (`KERNELS`); views stand for none.
Bytes are what an operation reads and writes. Elements at single positions move the 32-byte sectors they lie in.
Products count as one launch and no bytes, but for the gradient product of a mask, which a frozen layer does not have.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.harness import report, table
from peft_mask import MaskConfig, create_mask_optimizer

NO_KERNELS = frozenset(
    [
        "view",
        "t",
        "transpose",
        "detach",
        "alias",
        "slice",
        "unsqueeze",
        "squeeze",
        "expand",
        "_unsafe_view",
        "as_strided",
        "_reshape_alias",
        "select",
        "permute",
        "empty",
        "empty_like",
        "empty_strided",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "unbind",
        "unflatten",
        "split",
        "split_with_sizes",
        "_local_scalar_dense",
        "item",
        "narrow",
    ]
)
# of operations that launch several: top-k is CUDA's multi-block radix select over 32 bits, cumsum and nonzero are CUB's
KERNELS = {"topk": 21, "cumsum": 3, "nonzero_static": 3, "sort": 4}
PRODUCTS = {"mm", "addmm", "bmm"}
SECTOR = 32  # bytes
LISTS_AT_A_TIME = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}  # tensors of a multi-tensor kernel, by how many lists it takes
ELEMENTS_AT_A_TIME = 320 * 65536


class Counted(TorchDispatchMode):
    """Counts launches and bytes of what runs on any other device than the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if name not in NO_KERNELS and any(tensor.device.type != "cpu" for tensor in (*tensors, *outs)):
            self.launches[name] += _kernels(name, args, tensors)
            self.bytes[name] += _moved(name, tensors, outs)
        return out


def _kernels(name: str, args: Sequence[Any], tensors: Sequence[torch.Tensor]) -> int:
    if not name.startswith("_foreach"):
        return KERNELS.get(name, 1)
    lists = sum(isinstance(arg, (list, tuple)) and isinstance(arg[0], torch.Tensor) for arg in args)
    count, elements = len(args[0]), sum(tensor.numel() for tensor in args[0])
    return max(math.ceil(count / LISTS_AT_A_TIME[lists]), math.ceil(elements / ELEMENTS_AT_A_TIME))


def _moved(name: str, tensors: Sequence[torch.Tensor], outs: Sequence[torch.Tensor]) -> float:
    read, written = sum(tensor.nbytes for tensor in tensors), sum(tensor.nbytes for tensor in outs)
    if name in PRODUCTS:
        return 0
    if name in ("index_select", "gather", "take"):
        return _touched(tensors[0], tensors[1].numel()) + tensors[1].nbytes + written
    if name in ("index_fill_", "scatter_"):
        return 2 * _touched(tensors[0], tensors[1].numel()) + tensors[1].nbytes
    if name == "topk":  # a pass for each byte of a number, and one that gathers
        return (1 + tensors[0].element_size()) * read + written
    if name in ("copy_", "fill_", "zero_"):
        return (read - tensors[0].nbytes) + tensors[0].nbytes
    return read + written


def _touched(tensor: torch.Tensor, positions: int) -> float:
    """Bytes of the sectors of a tensor that so many positions lie in, if they lie at random."""
    in_a_sector = SECTOR // tensor.element_size()
    return tensor.nbytes * (1 - (1 - min(1.0, positions / tensor.numel())) ** in_a_sector)


def llama() -> nn.Module:
    """56 matrices so small that launches alone count."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=32,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        vocab_size=64,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config).train()


def full(model: nn.Module) -> nn.Module:
    return model


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def lora(model: nn.Module) -> nn.Module:
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))


def mask(**fields: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda model: get_peft_model(model, MaskConfig(task_type="CAUSAL_LM", seed=0, **fields))


VARIANTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen": frozen,
    "full fine-tuning": full,
    "LoRA r=8": lora,
    "mask": mask(),
    "mask, bf16 scores": mask(scores_dtype="bfloat16"),
}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer | None:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        return None
    if any("peft_mask_scores" in name for name, _ in model.named_parameters()):
        return create_mask_optimizer(model)
    return torch.optim.AdamW(trained, lr=1e-4, foreach=True)


def counted(model: nn.Module, loss_of: Callable[[], torch.Tensor]) -> dict[str, Counted]:
    """What the parts of a training step do, once all states are made."""
    optimizer = optimizer_of(model)
    for _ in range(2):
        parts = {"forward": Counted(), "backward": Counted(), "step": Counted()}
        with parts["forward"]:
            loss = loss_of()
        with parts["backward"]:
            loss.backward()
        if optimizer is not None:
            with parts["step"]:
                optimizer.step()
                optimizer.zero_grad()
    return parts


def of_llama(variant: str, device: str, checkpointed: bool) -> dict[str, Counted]:
    model: Any = llama().to(device)
    wrapped: Any = VARIANTS[variant](model)
    if checkpointed:
        model.gradient_checkpointing_enable()
    if variant != "full fine-tuning":
        model.enable_input_require_grads()
    ids = torch.arange(1, 9, device=device).unsqueeze(0)
    return counted(wrapped, lambda: wrapped(input_ids=ids, labels=ids).loss)


class Stack(nn.Module):
    """Two matrices of a large model, in bfloat16."""

    def __init__(self, width: int, device: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width, bias=False, device=device).bfloat16() for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x

    checkpointed = False


def of_stack(fields: dict[str, Any] | None, device: str, checkpointed: bool, width: int) -> dict[str, Counted]:
    torch.manual_seed(0)
    stack = Stack(width, device).requires_grad_(False)
    stack.checkpointed = checkpointed
    model = stack if fields is None else get_peft_model(stack, MaskConfig(target_modules="all-linear", **fields))
    x = torch.randn(8, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    return counted(model, lambda: model(x).float().square().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="simulated", help="`simulated`, or a GPU such as `cuda`")
    parser.add_argument("--width", type=int, default=4096, help="of the matrices whose bytes are counted")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args(arguments)
    device, where = args.device, args.device
    if device == "simulated":
        from tests.simulated_device.device import NAME  # registers it

        device, where = NAME, "cpu"
    figures: dict[str, Any] = {}
    rows = []
    for checkpointed in (False, True):
        found = {name: of_llama(name, device, checkpointed) for name in VARIANTS}
        sums = {name: {part: sum(each.launches.values()) for part, each in found[name].items()} for name in found}
        base = sum(sums["frozen"].values())
        for name, parts in sums.items():
            total = sum(parts.values())
            ratio = f"{total / sum(sums['LoRA r=8'].values()):.2f}"
            how = "checkpointed" if checkpointed else ""
            rows.append((name, how, *parts.values(), total, f"{(total - base) / 56:.1f}", ratio))
            figures[f"launches/{name}/{how}"] = parts
    header = ("variant", "", "forward", "backward", "optimizer", "sum", "a matrix, over frozen", "x LoRA")
    body = "Launches of a step of a Llama with 56 matrices.\n\n" + table(header, rows)
    rows = []
    weights = 2 * args.width**2
    for checkpointed in (False, True):
        how = "checkpointed" if checkpointed else ""
        plain = of_stack(None, device, checkpointed, args.width)
        for name, fields in {"mask": {}, "mask, bf16 scores": {"scores_dtype": "bfloat16"}}.items():
            parts = of_stack(fields, device, checkpointed, args.width)
            product = {"forward": 0, "backward": 2 * weights, "step": 0}  # of the gradient, written
            own = {
                part: (sum(parts[part].bytes.values()) - sum(plain[part].bytes.values()) + product[part]) / weights
                for part in parts
            }
            rows.append((name, how, *(f"{value:.1f}" for value in own.values()), f"{sum(own.values()):.1f}"))
            by_kind = {
                part: {kind: round(value / weights, 2) for kind, value in each.bytes.most_common()}
                for part, each in parts.items()
            }
            figures[f"bytes/{name}/{how}"] = {"sums": own, "by_kind": by_kind}
    header = ("variant", "", "forward", "backward", "optimizer", "sum")
    body += (
        f"\n\nBytes a weight of two matrices of {args.width} x {args.width} in bfloat16, over those of frozen layers."
        "\n\n" + table(header, rows)
    )
    report("launches", "Launches and bytes of a training step", body, figures, args.results, where)


if __name__ == "__main__":
    main()
