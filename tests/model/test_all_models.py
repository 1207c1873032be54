"""Masks in every type of model that can be made small: they act the same merged and unmerged, and learn where they act.

Some models read weights past their layers, or change what a layer returns in place; here that shows.
"""

import pytest
import torch
from peft import get_peft_model

from peft_mask import MaskConfig, MaskLayer
from tests.small_models import MODEL_TYPES, NotSmallError, outputs, small_model, tensors

# those that read weights, call layers in unusual ways or are used most
CORE = ("bert", "bloom", "deberta", "falcon_mamba", "llama", "mamba", "t5", "vit", "wav2vec2")
FEWEST = 200  # types that the rule for small ones must be good for
checked = set()


def gradients(model, inputs):
    """The names of parameters that the outputs of a model depend on, after a backward pass."""
    losses = [tensor.double().square().sum() for tensor in tensors(outputs(model, inputs)) if tensor.requires_grad]
    torch.autograd.backward(losses)
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def same(first, second):
    return len(first) == len(second) > 0 and all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore")  # of models that no one adapted to the newest torch
@pytest.mark.parametrize(
    "model_type", [name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in MODEL_TYPES]
)
def test_masks_act_the_same_merged_and_unmerged_and_learn_wherever_weights_would(model_type):
    try:
        base, inputs = small_model(model_type)
    except NotSmallError as error:
        pytest.skip(f"cannot be made small by this rule, {error}")
    reached = gradients(base, inputs)
    base.requires_grad_(False)
    with torch.no_grad():
        plain = tensors(outputs(base, inputs))
    fields = {"binarizer": "threshold", "candidates": None}
    try:
        model = get_peft_model(base, MaskConfig(**fields)).eval()
    except ValueError as error:
        pytest.skip(f"refused: {error}")
    layers = {name for name, module in base.named_modules() if isinstance(module, MaskLayer)}
    assert layers
    learning = gradients(base, inputs)
    assert {name for name in layers if f"{name}.peft_mask_scores.default" in learning} == {
        name for name in layers if f"{name}.weight" in reached
    }

    model.add_adapter("random", MaskConfig(**fields, init_weights=False, init_sparsity=0.1, seed=1))
    with torch.no_grad():
        assert same(tensors(outputs(model, inputs)), plain)
        model.set_adapter("random")
        masked = tensors(outputs(model, inputs))
        model.merge_adapter()
        assert same(tensors(outputs(model, inputs)), masked)
        model.unmerge_adapter()
        model.set_adapter("default")
        assert same(tensors(outputs(model, inputs)), plain)
    checked.add(model_type)


@pytest.mark.slow
def test_most_types_of_models_can_be_made_small(request):
    chosen = {
        item.callspec.params["model_type"]
        for item in request.session.items
        if hasattr(item, "callspec") and "model_type" in item.callspec.params
    }
    if chosen < set(MODEL_TYPES):
        pytest.skip("not all types were to be run")
    assert len(checked) >= FEWEST
