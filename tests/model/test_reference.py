"""The adapter "ref" that TRL makes of "default" is the mask as it was then; the trainers are in test_neighbors.py."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_mask import MaskConfig, create_mask_optimizer
from tests.tiny_models import tiny_inputs, tiny_model


def logits(model):
    with torch.no_grad():
        return model.eval()(**tiny_inputs(model)).logits


def as_trl_does(model):
    config = model.peft_config["default"]
    model.add_adapter("ref", config)
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)


def trained(**fields):
    torch.manual_seed(0)
    config = MaskConfig(**({"task_type": "CAUSAL_LM", "target_sparsity": 0.05, "init_weights": False} | fields))
    model = get_peft_model(tiny_model("llama", "lm"), config)
    optimizer = create_mask_optimizer(model, mask_lr=0.1)
    for _ in range(3):
        model.train()(**tiny_inputs(model, labels=True)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"candidates": None, "binarizer": "threshold", "target_sparsity": None},
        {"candidates": None, "binarizer": "bernoulli", "target_sparsity": None, "init_sparsity": 0.2},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": {"embed_tokens": [5, 6]}},
        {"target_bytes": 3000, "target_sparsity": None},
    ],
    ids=str,
)
def test_the_reference_is_the_trained_model_and_stays_so(fields):
    model = trained(**fields)
    start = logits(model)
    grows = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    as_trl_does(model)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == grows
    assert torch.equal(logits(model), start)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    if fields.get("binarizer") is None:
        model.base_model.set_target_sparsity(0.01)
    assert not torch.equal(logits(model), start)
    model.set_adapter("ref")
    assert torch.equal(logits(model), start)
    model.set_adapter("default")
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == grows


@pytest.mark.filterwarnings("ignore:the adapter 'default' holds masks without scores")
@pytest.mark.parametrize("is_trainable", [False, True])
def test_the_reference_of_a_loaded_mask_is_that_mask_and_is_saved_as_it(tmp_path, is_trainable):
    trained().save_pretrained(tmp_path / "one")
    model = PeftModel.from_pretrained(tiny_model("llama", "lm"), tmp_path / "one", is_trainable=is_trainable)
    start = logits(model)
    as_trl_does(model)
    model.set_adapter("ref")
    assert torch.equal(logits(model), start)
    model.save_pretrained(tmp_path / "both")  # as a checkpoint of TRL's
    masks = [
        path.read_bytes() for path in (tmp_path / "one", tmp_path / "both" / "ref") for path in path.glob("*.saf*")
    ]
    assert masks[0] == masks[1]
    model.load_adapter(tmp_path / "both" / "ref", "ref", is_trainable=False)  # as a resume does
    assert torch.equal(logits(model), start)


def test_any_other_adapter_is_new():
    model = trained()
    bare = logits(tiny_model("llama", "lm"))
    model.add_adapter("ref", MaskConfig(task_type="CAUSAL_LM"))
    model.add_adapter("another", model.peft_config["ref"])
    for name in ("ref", "another"):
        model.set_adapter(name)
        assert torch.equal(logits(model), bare)


def test_a_mask_that_was_never_loaded_is_no_reference():
    model = get_peft_model(tiny_model("llama", "lm"), MaskConfig(task_type="CAUSAL_LM", inference_mode=True))
    with pytest.raises(ValueError, match="the adapter 'default' has no mask for"):
        as_trl_does(model)
    assert list(model.peft_config) == ["default"]
