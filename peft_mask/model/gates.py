"""The gate projections of gated feed-forward blocks, `down(act(gate(x)) * up(x))`: what `"gate-projections"` means."""

from __future__ import annotations

import warnings

from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from peft_mask.model.matching import listed, outermost_modules
from peft_mask.model.names import plain_name
from peft_mask.settings.options import GATES

# a gate -> the up projection beside it: a name alone may be an attention's gate, or a router
_PAIRS = {"gate_proj": "up_proj", "wi_0": "wi_1", "w1": "w3"}
_FUSED = ("gate_up_proj", "proj_up_gate")


def gate_projections(model: nn.Module) -> set[str]:
    """Return the names of the modules that are gate projections.

    Where a model holds others in one matrix with the up projections, as stacked experts, a warning says that these are
    left out.

    Raises:
        NoMatchingPeftModuleError: if there is none; it says what else can be named.

    Source: Lu et al. 2026, "The Surprising Effectiveness of Deleting Weights in LLM Post-Training", arXiv 2611.10866.
    """
    names = {plain_name(name) for name, _ in outermost_modules(model)}
    found = set()
    for name in names:
        parent, _, last = name.rpartition(".")
        if last in _PAIRS and f"{parent}.{_PAIRS[last]}".lstrip(".") in names:
            found.add(name)
    parts = [plain_name(name) for name, _ in (*model.named_modules(), *model.named_parameters())]
    fused = sorted({name for name in parts if name.rpartition(".")[2] in _FUSED})
    together = f"one with the up projections in {listed(fused, 2)}"
    way_out = "name the module in target_modules, or the experts' parameter in target_parameters, which masks both"
    if found and fused:
        warnings.warn(
            f'target_modules="{GATES}": some gates of {type(model).__name__} are {together}, and are not masked. To '
            f"mask them, {way_out}.",
            stacklevel=2,
        )
    if found:
        return found
    why = (
        f"its gates are {together}. To mask them, {way_out}"
        if fused
        else "none is called " + " or ".join(_PAIRS) + ", with an up projection beside it. Leave target_modules out to "
        "mask every linear layer, or name others"
    )
    raise NoMatchingPeftModuleError(f'target_modules="{GATES}": {type(model).__name__} has no such modules: {why}.')
