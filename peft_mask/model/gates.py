"""The gate projections of gated feed-forward blocks, `down(act(gate(x)) * up(x))`: what `"gate-projections"` means."""

from __future__ import annotations

from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from peft_mask.model.matching import listed, outermost_modules
from peft_mask.model.names import plain_name
from peft_mask.settings.options import GATES

# as every model of transformers calls them that holds them apart from the up projections; T5's are `wi_0`
_NAMES = ("gate_proj", "wi_0")
_FUSED = ("gate_up_proj", "proj_up_gate", "gate_up_projs")


def gate_projections(model: nn.Module) -> set[str]:
    """Return the names of the modules that are gate projections.

    Raises:
        NoMatchingPeftModuleError: if there is none; it says what else can be named.

    Source: Lu et al. 2026, "The Surprising Effectiveness of Deleting Weights in LLM Post-Training", arXiv 2611.10866.
    """
    names = [plain_name(name) for name, _ in outermost_modules(model)]
    if found := {name for name in names if name.rpartition(".")[2] in _NAMES}:
        return found
    parts = [plain_name(name) for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    if fused := sorted({name for name in parts if name.rpartition(".")[2] in _FUSED}):
        why = (
            f"they are one with the up projections in {listed(fused, 2)}. Mask both: name the module in "
            "target_modules, or the experts' parameter in target_parameters"
        )
    else:
        why = (
            f"none is called {' or '.join(_NAMES)}, and its feed-forward blocks may have no gates. Leave "
            "target_modules out to mask every linear layer, or name others"
        )
    raise NoMatchingPeftModuleError(f'target_modules="{GATES}": {type(model).__name__} has no such modules: {why}.')
