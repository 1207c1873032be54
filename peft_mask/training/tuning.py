"""Training the weights that a mask keeps: a merged model is trained on, and its zeros stay zeros."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from peft_mask.format.mask_file import weight_of
from peft_mask.format.masks import Masks


def hold_zeros(model: nn.Module, masks: Masks) -> list[RemovableHandle]:
    """Train a merged model on under its fixed mask: weights that are off get no gradient, and so stay +0.0.

        W is 0 where M is, and dL/dW := dL/dW * M

    What is computed, and every gradient, are those of W * M with W in training. Optimizers that move each weight by its
    own gradient, momentum and weight decay leave zeros alone: AdamW, SGD, Adafactor and sign steps do. Whoever resumes
    calls this again on the model loaded from the checkpoint.

    Args:
        model: the model that `merge_and_unload` returned, or that was saved of it, with gradients asked for where it
            is to be trained (`model.requires_grad_()`; merging leaves all weights frozen).
        masks: the masks that were merged.

    Returns:
        The handles of the hooks, one a masked weight in training; `remove()` ends the hold.

    Raises:
        ValueError: if the masks are not for this model, a weight is not zero where its mask is off, or no masked weight
            is in training.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from peft_mask import Masks, hold_zeros
        >>> model, masks = nn.Sequential(nn.Linear(2, 1)), Masks({"0": torch.tensor([[True, False]])})
        >>> _ = model[0].weight.data[0, 1].zero_()  # what merging does
        >>> handles = hold_zeros(model, masks)
        >>> model(torch.ones(2)).backward()
        >>> model[0].weight.grad
        tensor([[1., 0.]])

    Source: official code of Zhao et al. 2020, `--do_tuning_on_MS`, which trains W of `W * M`; the scores are frozen.
    """
    held = []
    for name, mask in masks.items():
        weight = weight_of(name, model, mask.shape)
        off = (~mask).reshape(-1).nonzero().squeeze(1)
        if moved := int(weight.detach().reshape(-1)[off.to(weight.device)].count_nonzero()):
            raise ValueError(
                f"cannot hold the zeros of '{name}': {moved} of the {len(off)} weights that its mask switches off are "
                "not zero. Merge the adapter first: PeftModel.from_pretrained(base, path).merge_and_unload()."
            )
        if weight.requires_grad:
            held.append((weight, off))
    if not held:
        raise ValueError("no masked weight is in training: call model.requires_grad_() after merging.")
    return [weight.register_hook(_without(off)) for weight, off in held]


def _without(off: Tensor) -> Callable[[Tensor], Tensor]:
    def hook(grad: Tensor) -> Tensor:
        nonlocal off
        off = off.to(grad.device)  # the model may have moved since
        return grad.reshape(-1).index_fill(0, off, 0).view_as(grad)

    return hook
