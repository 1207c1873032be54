"""Optimizers: sign steps for scores beside AdamW for everything else."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from peft_mask.tensors.sharded import absolute_sums, is_flattened, local, sum_over_processes
from peft_mask.training.sign_steps import SignStep, take
from peft_mask.training.uninterrupted import interrupted_afterwards


class SignAdamW(torch.optim.AdamW):
    """AdamW whose parameter groups with `sign=True` take sign steps instead: `p = p - lr * c * sign(gradient)`.

    A score that moves by one step a batch counts for how many batches its weight should go, less for how many it should
    stay. Where only the order of the scores matters (`binarizer="topk"`), nothing else is to be set; and sign steps
    need no state for each score, where Adam keeps two numbers.

    A gradient of a thousandth has a sign, too. So that a training whose loss is gone does not go on voting about
    nothing, the steps of a parameter shrink with its gradients: `c = min(1, 2 sqrt(g / G))`, g being the mean absolute
    gradient, and G the largest g so far. Down to a quarter of G every step counts alike. The state is G, one number
    a parameter.

    Scores of 16 bits are rounded stochastically: a step far below their precision is taken with the probability that
    makes it right on average. The random numbers depend on the number of the step alone, so that they are the same on
    every process and after a resume.

    A step whose gradients are not all finite is no step: nothing changes, of no parameter, and a warning says so. After
    one NaN, AdamW's parameters would be NaN for ever, and a mask has no value for a score that is NaN.

    DeepSpeed ZeRO hands an optimizer a flat piece of all parameters of a group in their place. Where these are one
    matrix, the step is that of the matrix: gradients are summed up over the processes. So a group with `sign=True` must
    hold one matrix there, as those of `create_mask_optimizer` do.

    Args:
        params: parameters or groups, as for AdamW; groups may hold `"sign": True`.
        **kwargs: as for AdamW.

    Source: the sign steps are signSGD (Bernstein et al. 2018); the official code of Zhao et al. 2020 offers it, too.
    Their shrinking is ours (docs/experiments.md).
    """

    _norms_in_backward: tuple[Tensor, ...] = ()  # of gradients that are gone by the time of `step`

    def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(params, *args, **kwargs)
        # With `fused=True` torch's kernel would unscale for itself what a gradient scaler hands it, and sign steps not.
        self._step_supports_amp_scaling = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        graded = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms = absolute_sums([cast(Tensor, p.grad) for p in graded])
        if self._in_pieces():
            norms = sum_over_processes(norms)
        known = self._read(norms)
        if not known.isfinite().all():
            warnings.warn(
                "gradients are NaN or infinite, so the optimizer has skipped the step: no score and no other parameter "
                "has changed. Once or twice do no harm. If the loss stays NaN, look for batches without labels, lower "
                "the learning rate, or train in bfloat16 or float32 in place of float16.",
                stacklevel=2,
            )
            return loss
        with interrupted_afterwards():
            self._step_with(dict(zip(graded, known[len(known) - len(graded) :], strict=True)))
            everything = self.param_groups
            self.param_groups = [group for group in everything if not group.get("sign")]
            try:
                _without_hooks(torch.optim.AdamW.step)(self)
            finally:
                self.param_groups = everything
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group["sizes"] = [p.numel() for p in group["params"]]  # kept with the group, which ZeRO steps one at a time

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # saved before groups had sizes
            group.setdefault("sizes", [p.numel() for p in group["params"]])
            if group.get("sign") or not (group["capturable"] or group["fused"]):
                for own in (self.state.get(p, {}) for p in group["params"]):
                    if "step" in own:  # which is read in each step; of several processes each loads it to its device
                        own["step"] = own["step"].cpu()

    def _voted_on(self) -> Iterator[tuple[int, Tensor, int]]:
        """Yield place of the group, parameter and size of what takes sign steps; of a piece, the size of its matrix."""
        for place, group in enumerate(self.param_groups):
            if group.get("sign"):
                # not strict: ZeRO-3 empties the groups that it does not step
                for parameter, size in zip(group["params"], group["sizes"], strict=False):
                    yield place, parameter, size

    def _in_pieces(self) -> bool:
        """Return whether parameters are pieces of those that were given; refuse pieces that may be of several matrices.

        FSDP2's parameters are none: their size is that of all shards.
        """
        found = False
        for group in self.param_groups:
            params, sizes = group["params"], group["sizes"]
            pieces = [p.numel() for p in params] not in ([], sizes)
            found |= pieces
            if group.get("sign") and ((pieces and len(sizes) > 1) or any(map(is_flattened, params))):
                raise RuntimeError(
                    "cannot take sign steps: the parameters are no longer those that SignAdamW was made for but pieces "
                    "of them, as FSDP1 and DeepSpeed ZeRO make, and the steps depend on the gradients of whole "
                    "matrices. Use DDP or FSDP2 (fsdp_version: 2); under ZeRO, create_mask_optimizer(model), which "
                    "makes a group for each matrix, of which it then knows the pieces."
                )
        return found

    def step_in_backward(self) -> None:
        """Take the sign steps within the backward pass: each as soon as its parameter has a gradient, which is freed.

        No two of these gradients then exist at a time. `step` is left with everything else, such as a task head. Each
        backward pass is a vote, so gradients are not accumulated over several, and clipping no longer meets them, which
        do not need it. Call it once, on the optimizer of one process and without a gradient scaler: gradients are used
        before they are averaged or unscaled.

        A parameter whose gradient is not finite takes no step, nor does `step` then, and warns.

        Raises:
            RuntimeError: if there are several processes.

        Source: PyTorch's tutorial "How to save memory by fusing the optimizer step into the backward pass".
        """
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        if several and (world := torch.distributed.get_world_size()) > 1:
            raise RuntimeError(
                f"cannot step in the backward pass of {world} processes: the gradients of each would be used before "
                "they are averaged. Call optimizer.step() as usual."
            )
        # by the place of their group: loading a state makes new groups
        for index, (place, parameter, _) in enumerate(self._voted_on()):
            parameter.register_post_accumulate_grad_hook(partial(self._step_and_free, place, index))

    def _step_and_free(self, place: int, index: int, parameter: Tensor) -> None:
        (norm,) = absolute_sums([cast(Tensor, parameter.grad)])
        self._norms_in_backward += (norm,)
        with interrupted_afterwards():
            counts, (state,) = self._counts([parameter], (norm / parameter.numel()).view(1))
            take([self._sign_step(parameter, self.param_groups[place]["lr"] * counts[0], state, index)])
            self.state[parameter] = state
            parameter.grad = None

    def _read(self, norms: Sequence[Tensor]) -> Tensor:
        """Return numbers of gradients whose steps were taken since the last call, and these, on the CPU.

        It is the one time in a step that the host waits for the device.
        """
        norms = [*self._norms_in_backward, *norms]
        self._norms_in_backward = ()
        return torch.stack([norm.to(norms[0].device) for norm in norms]).cpu() if norms else torch.empty(0)

    def _step_with(self, norms: Mapping[Tensor, Tensor]) -> None:
        """Take the sign steps of all parameters of which there are the absolute sums of their gradients."""
        alike: dict[torch.dtype, list[tuple[Tensor, float, Tensor, int]]] = defaultdict(list)
        for index, (place, parameter, size) in enumerate(self._voted_on()):
            if parameter in norms:
                rate = float(self.param_groups[place]["lr"])
                alike[parameter.dtype].append((parameter, rate, norms[parameter] / size, index))
        steps: list[SignStep] = []
        after: dict[Tensor, dict[str, Tensor]] = {}
        for voted in alike.values():
            parameters, rates, means, indices = zip(*voted, strict=True)
            counts, states = self._counts(parameters, torch.stack(means))
            sizes = (torch.tensor(rates, dtype=counts.dtype) * counts).tolist()
            steps += [self._sign_step(*each) for each in zip(parameters, sizes, states, indices, strict=True)]
            after |= zip(parameters, states, strict=True)
        take(steps)
        self.state.update(after)  # last: an error before leaves all as it was

    def _sign_step(self, parameter: Tensor, size: float | Tensor, state: dict[str, Tensor], index: int) -> SignStep:
        draw = f"{int(state['step'])}/{index}"  # the same on every process, and after a resume
        return SignStep(local(parameter), local(cast(Tensor, parameter.grad)), size, draw)

    @torch.no_grad()
    def _counts(self, parameters: Sequence[Tensor], means: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return what a step of each parameter counts, c, and the states of the parameters after it.

        Args:
            parameters: those that step, of one dtype.
            means: g of each, its mean absolute gradient, float32 or float64. Of a gradient that is not finite, which
                only steps in the backward pass meet, c is 0, and G stays.

        Returns:
            c, of the dtype of `means`, between 0 and 1, where they are; and the states.
        """
        dtype = parameters[0].dtype  # to which torch casts what it loads
        none = {"step": torch.tensor(0.0), "largest": torch.zeros((), dtype=dtype)}  # AdamW wants a step
        before = [self.state.get(parameter) or none for parameter in parameters]
        finite = means.isfinite()
        largest = torch.stack([state["largest"].to(means.device) for state in before])
        largest = torch.maximum(largest, torch.where(finite, means, 0.0).to(dtype))
        ratio = means / largest.to(means.dtype)
        counts = torch.where(finite, ratio.sqrt().mul_(2.0).nan_to_num_(nan=1.0).clamp_(max=1.0), 0.0)
        after = [
            {"step": state["step"] + 1, "largest": value.clone()} for state, value in zip(before, largest, strict=True)
        ]
        return counts, after


def _without_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return a class's `step` as it was before torch had it call hooks, which our own `step` calls already."""
    return cast(Callable[..., Any], step.__wrapped__) if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]
