"""Scores that are not being trained: what their mask is held to, and what is to be said, until a gradient comes."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rest:
    """What holds of an adapter's scores in a layer until they are trained.

    Attributes:
        zeros: how many weights their mask switches off, where a budget has not been spent; None: what the rule says.
        warning: what to warn of when training goes on.
    """

    zeros: int | None = None
    warning: str | None = None


class Resting:
    """The adapters of a layer that are at rest: trained or saved, and loaded again, before a budget was spent.

    Such a mask stays what it was when it was last evaluated, saved or loaded. The next training has the whole budget,
    whoever runs it: the first gradient that reaches the scores ends the rest.
    """

    def __init__(self) -> None:
        self._rests: dict[str, Rest] = {}

    def zeros(self, adapter_name: str) -> int | None:
        """Return how many weights the mask of an adapter is held to, or None."""
        return self._rests[adapter_name].zeros if adapter_name in self._rests else None

    def begin(self, adapter_name: str, rest: Rest) -> None:
        """Let what is said hold of an adapter, and nothing that was said before."""
        self._rests.pop(adapter_name, None)
        if rest != Rest():
            self._rests[adapter_name] = rest

    def let_go(self, adapter_name: str) -> None:
        """Hold the mask of an adapter no longer, as the number of its zeros was set anew."""
        if adapter_name in self._rests:
            self.begin(adapter_name, Rest(warning=self._rests[adapter_name].warning))

    def until_trained(self, adapter_name: str, scores: torch.Tensor) -> torch.Tensor:
        """Return scores to compute with, whose gradient ends the rest of their adapter."""
        if adapter_name not in self._rests or not (scores.requires_grad and torch.is_grad_enabled()):
            return scores
        if torch.compiler.is_compiling():  # a graph has no place for such a hook; it is compiled to be run often
            self.let_go(adapter_name)
            return scores
        scores = scores.view_as(scores)
        scores.register_hook(lambda _: self._end(adapter_name))
        return scores

    def _end(self, adapter_name: str) -> None:
        if (rest := self._rests.pop(adapter_name, None)) is not None and rest.warning is not None:
            warnings.warn(rest.warning, stacklevel=2)
