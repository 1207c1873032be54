"""Dtypes, autocast and gradients that are not finite, on whole models: what is computed, trained and refused."""

import itertools

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_mask import MaskConfig, MaskStatistics, create_mask_optimizer

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BINARIZERS = ["topk", "threshold", "sign", "bernoulli", "n:m"]


def masked_model(binarizer="topk", dtype=torch.float32, **fields):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 3)).to(dtype)
    settings = {"target_modules": ["0", "2"], "binarizer": binarizer, "seed": 0, "init_weights": False}
    settings["candidates"] = 0.5 if binarizer == "topk" else None
    if binarizer == "topk":
        settings["target_sparsity"] = 0.1
    if binarizer in ("threshold", "sign", "bernoulli"):
        settings["init_sparsity"] = 0.1
    if binarizer == "n:m":
        settings["init_weights"] = True
    return get_peft_model(base, MaskConfig(**(settings | fields)))


def scores_of(model):
    return [p for name, p in model.named_parameters() if "peft_mask_scores" in name]


@pytest.mark.parametrize("binarizer", ["topk", "threshold"])  # with candidates, and for all weights
@pytest.mark.parametrize("scores_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("base", "autocast"), [*itertools.product(DTYPES, [None, *DTYPES[1:]])])
def test_every_dtype_and_autocast_compute_what_the_merged_model_does(binarizer, scores_dtype, base, autocast):
    model = masked_model(binarizer, base, scores_dtype=scores_dtype)
    x = torch.randn(6, 24).to(base)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        y = model(x)
        y.float().square().mean().backward()
        model.merge_adapter()
        assert torch.equal(model(x), y)
    assert y.dtype == (autocast or base)
    for scores in scores_of(model):
        assert scores.dtype == scores.grad.dtype == getattr(torch, scores_dtype)
        assert scores.grad.isfinite().all()
        assert scores.grad.any()


@pytest.mark.parametrize("binarizer", BINARIZERS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_gradient_that_is_not_finite_moves_no_mask(binarizer, value):
    model = masked_model(binarizer)
    optimizer = create_mask_optimizer(model)
    statistics = MaskStatistics(model)
    before = [scores.detach().clone() for scores in scores_of(model)]
    x = torch.randn(6, 24)
    x[0, 0] = value
    model(x).sum().backward()
    with pytest.warns(UserWarning, match="the optimizer has skipped the step"):
        optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, scores_of(model), strict=True))
    assert statistics(model)["flip_ratio"] == 0.0


@pytest.mark.parametrize("binarizer", BINARIZERS)
def test_scores_that_another_optimizer_made_nan_are_refused_wherever_they_would_become_a_mask(binarizer, tmp_path):
    model = masked_model(binarizer)
    statistics = MaskStatistics(model)
    optimizer = torch.optim.AdamW(scores_of(model))
    model(torch.full((6, 24), torch.nan)).sum().backward()
    optimizer.step()
    assert all(scores.isnan().all() for scores in scores_of(model))
    before = [layer.base_layer.weight.clone() for layer in (model.base_model.model[0], model.base_model.model[2])]
    with pytest.raises(ValueError, match=r"cannot save the mask of '0': \d+ of \d+ scores are NaN\. Did training"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    for use in (model.merge_adapter, lambda: statistics(model), lambda: model.base_model.model[0].mask("default")):
        with pytest.raises(ValueError, match=r"its scores contain \d+ NaN\. Did training diverge\?"):
            use()
    after = [layer.base_layer.weight for layer in (model.base_model.model[0], model.base_model.model[2])]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
