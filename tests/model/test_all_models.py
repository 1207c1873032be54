"""Masks in every type of model that can be made small: they act the same merged and unmerged, and learn where they act.

Some models read weights past their layers, or change what a layer returns in place; here that shows.
"""

import pytest
import torch
from peft import get_peft_model

from peft_mask import MaskConfig, MaskLayer
from tests.small_models import MODEL_TYPES, NOT_SMALL, NotSmallError, outputs, small_model, tensors
from tests.versions import PINNED_TRANSFORMERS

# those that read weights, call layers in unusual ways or are used most
CORE = ("bert", "bloom", "deberta", "falcon_mamba", "llama", "mamba", "t5", "vit", "wav2vec2")
REFUSED = dict.fromkeys(("mobilenet_v1", "mobilenet_v2", "mobilevitv2"), "has no linear layer")
FEWEST = 200  # types that the rule for small ones must be good for


def leave_out(model_type, error):
    """Skip a type that a later or older transformers makes another one of; the pinned one is held to the lists."""
    if model_type in CORE or PINNED_TRANSFORMERS:
        raise error
    pytest.skip(f"of this transformers, not the pinned one: {error}")


def gradients(model, inputs):
    """The names of parameters that the outputs of a model depend on, after a backward pass."""
    losses = [tensor.double().square().sum() for tensor in tensors(outputs(model, inputs)) if tensor.requires_grad]
    torch.autograd.backward(losses)
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def same(first, second):
    return len(first) == len(second) > 0 and all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:linear layers of .* that are not masked:UserWarning")  # where they cannot be
@pytest.mark.filterwarnings(r"ignore:::transformers\.models")  # of models that no one adapted to the newest torch
@pytest.mark.parametrize(
    "model_type", [name if name in CORE else pytest.param(name, marks=pytest.mark.slow) for name in MODEL_TYPES]
)
def test_masks_act_the_same_merged_and_unmerged_and_learn_wherever_weights_would(model_type):
    try:
        base, inputs = small_model(model_type)
    except NotSmallError as error:
        if model_type in NOT_SMALL:
            pytest.skip(f"{NOT_SMALL[model_type]} ({error})")
        leave_out(model_type, error)
    reached = gradients(base, inputs)
    base.requires_grad_(False)
    with torch.no_grad():
        plain = tensors(outputs(base, inputs))
    fields = {"binarizer": "threshold", "candidates": None}
    if model_type in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[model_type]):
            get_peft_model(base, MaskConfig(**fields))
        return
    try:
        model = get_peft_model(base, MaskConfig(**fields)).eval()
    except ValueError as error:
        leave_out(model_type, error)
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


@pytest.mark.skipif(not PINNED_TRANSFORMERS, reason="the lists are of the types of the pinned transformers")
def test_the_types_that_are_left_out_are_few_and_none_of_the_core():
    left_out = NOT_SMALL.keys() | REFUSED.keys()
    assert left_out <= set(MODEL_TYPES)
    assert not left_out & set(CORE)
    assert len(set(MODEL_TYPES) - left_out) >= FEWEST
