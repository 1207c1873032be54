"""What the states of a model tell: vectors of a layer, their picture, and how well a line separates the classes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peft_mask.analysis.adapters import base_of
from peft_mask.analysis.evaluation import Batch

Pooling = Literal["first", "mean"]


@torch.inference_mode()
def pooled_states(model: nn.Module, layer: str, batches: Iterable[Batch], pooling: Pooling = "first") -> Tensor:
    """Compute one vector an example: what a layer puts out, at the first token or on average.

    Args:
        model: any model, with or without adapters; it is put into eval mode.
        layer: name of a module of the base model whose output is states of shape (examples, tokens, width), or a tuple
            that begins with them, such as `"bert.encoder.layer.11"`.
        batches: keyword arguments of the model, with `attention_mask` for the mean; `labels` are left out.
        pooling: `"first"`, the first token ([CLS] of BERT), or `"mean"` over the tokens that are attended to.

    Returns:
        float32 of shape (examples, width) on the CPU, in the order of the batches.

    Raises:
        ValueError: if there is no such layer, or its output is not of that shape, or no such pooling.

    Source: Zhao et al. 2020 look at [CLS] of the top block.
    """
    if pooling not in ("first", "mean"):
        raise ValueError(f"pooling must be 'first' or 'mean', got {pooling!r}.")
    try:
        module = base_of(model).get_submodule(layer)
    except AttributeError:
        raise ValueError(f"the model has no module '{layer}': name one of model.named_modules().") from None
    states: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    model.eval()
    vectors = []
    handle = module.register_forward_hook(keep)
    try:
        for batch in batches:
            states.clear()
            model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
            if len(states) != 1 or states[0].dim() != 3:
                shapes = [tuple(found.shape) for found in states]
                raise ValueError(f"expected '{layer}' to put out (examples, tokens, width) once, got {shapes}.")
            vectors.append(_pool(states[0].float(), batch, pooling).cpu())
    finally:
        handle.remove()
    return torch.cat(vectors)


def principal_components(vectors: Tensor, count: int = 2) -> tuple[Tensor, Tensor]:
    """Project vectors onto the directions in which they differ most.

    Args:
        vectors: (examples, width).
        count: number of directions.

    Returns:
        The projections, (examples, count), and the fraction of the variance in each direction, (count,). A direction
        has the sign in which its largest entry is positive, so that the result is the same everywhere.

    Raises:
        ValueError: if there are not so many directions.

    Example:
        >>> points, shares = principal_components(torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]]), 1)
        >>> points.flatten().tolist(), shares.tolist()
        ([-2.0, 0.0, 2.0], [1.0])
    """
    if not 0 < count <= min(vectors.shape):
        raise ValueError(f"count must be from 1 to {min(vectors.shape)} for vectors of {tuple(vectors.shape)}.")
    centered = vectors.double() - vectors.double().mean(0)
    _, values, directions = torch.linalg.svd(centered, full_matrices=False)
    directions = directions[:count]
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    variances = values.square()
    return (centered @ (directions * largest.sign()).T).float(), (variances[:count] / variances.sum()).float()


def tsne(vectors: Tensor, perplexity: float = 30.0, seed: int = 0) -> Tensor:
    """Place vectors in the plane so that near ones stay near; distances between groups mean little.

    Args:
        vectors: (examples, width), more examples than `perplexity`.
        perplexity: how many neighbors count.
        seed: of the optimization, which starts at the principal components.

    Returns:
        float32 of shape (examples, 2).

    Raises:
        ModuleNotFoundError: if scikit-learn is not installed.

    Source: van der Maaten and Hinton 2008, by scikit-learn.
    """
    from sklearn.manifold import TSNE  # type: ignore[import-untyped]

    placed = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(vectors.numpy())
    return torch.from_numpy(placed).float()


def separability(
    vectors: Tensor, labels: Tensor, held_out: Tensor, held_out_labels: Tensor, weight_decay: float = 1e-2
) -> float:
    """Measure how well a linear classifier of the vectors does on examples it was not fitted to.

    Multinomial logistic regression on vectors that are standardized by the fitted ones: the minimum of the mean
    cross-entropy + `weight_decay` / 2 * |W|^2, found by L-BFGS from zero.

    Args:
        vectors: (examples, width) to fit.
        labels: their classes, int64.
        held_out: (others, width) to score.
        held_out_labels: their classes.
        weight_decay: of the weights, not of the biases.

    Returns:
        The fraction of `held_out` that is classified right.

    Example:
        >>> points, classes = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
        >>> separability(points, classes, torch.tensor([[-3.0], [0.5]]), torch.tensor([0, 1]))
        1.0
    """
    mean, std = vectors.double().mean(0), vectors.double().std(0).clamp_min(1e-6)
    x, y = (vectors.double() - mean) / std, (held_out.double() - mean) / std
    classes = int(max(labels.max(), held_out_labels.max())) + 1
    weight = torch.zeros(classes, x.shape[1], dtype=torch.double, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, labels) + weight_decay / 2 * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return float(((y @ weight.T + bias).argmax(1) == held_out_labels).double().mean())


def _pool(states: Tensor, batch: Batch, pooling: Pooling) -> Tensor:
    if pooling == "first":
        return states[:, 0]
    attended = batch["attention_mask"].to(states).unsqueeze(-1)
    return (states * attended).sum(1) / attended.sum(1)
