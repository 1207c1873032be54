import pytest
import torch

from tests.tiny_models import FAMILIES, NUM_LABELS, tiny_heads, tiny_inputs, tiny_model

CASES = [(family, head) for family in FAMILIES for head in tiny_heads(family)]


def test_every_promised_family_has_a_base_model_and_a_classifier():
    assert len(FAMILIES) == 17
    assert all({"base", "seq_cls"} <= set(tiny_heads(family)) for family in FAMILIES)


@pytest.mark.parametrize(("family", "head"), CASES)
def test_runs_forward_and_gives_finite_numbers(family, head):
    model = tiny_model(family, head)
    with torch.no_grad():
        outputs = model(**tiny_inputs(model))
    tensors = [value for value in outputs.values() if isinstance(value, torch.Tensor)]
    assert tensors
    assert all(tensor.isfinite().all() for tensor in tensors)
    if head == "seq_cls":
        assert outputs.logits.shape == (2, NUM_LABELS)


@pytest.mark.parametrize(("family", "head"), [case for case in CASES if case[1] != "base"])
def test_labels_give_a_loss_that_reaches_the_weights(family, head):
    model = tiny_model(family, head).train()
    model(**tiny_inputs(model, labels=True)).loss.backward()
    weights = [p for n, p in model.named_parameters() if n.endswith("weight") and p.ndim == 2 and p.grad is not None]
    assert any(p.grad.abs().max() > 0 for p in weights)


def test_the_same_seed_gives_the_same_model_and_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    first, again, other = tiny_model("bert"), tiny_model("bert"), tiny_model("bert", seed=1)
    assert torch.equal(state, torch.get_rng_state())
    key = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(first.state_dict()[key], again.state_dict()[key])
    assert not torch.equal(first.state_dict()[key], other.state_dict()[key])


def test_a_missing_head_is_named():
    with pytest.raises(ValueError, match="no 'lm' head for 'vit'"):
        tiny_model("vit", "lm")


def test_labels_for_a_base_model_are_refused():
    with pytest.raises(ValueError, match="BertModel has no head and takes no labels"):
        tiny_inputs(tiny_model("bert", "base"), labels=True)
