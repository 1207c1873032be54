"""The principal weights of a matrix, and candidates beside them."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_mask import MaskConfig, MaskLayer, Masks, create_mask_optimizer
from peft_mask.scores.candidates import choose_candidates
from peft_mask.scores.principal import low_rank, principal
from tests.tiny_models import tiny_inputs, tiny_model

OFF_PRINCIPAL = MaskConfig(candidate_rule="off-principal", candidates=0.1)


def test_a_low_rank_approximation_is_that_of_the_whole_decomposition_and_draws_nothing_of_torchs_generator():
    weight = torch.randn(12, 3) @ torch.randn(3, 20)
    state = torch.get_rng_state()
    torch.testing.assert_close(low_rank(weight, rank=3), weight)
    torch.testing.assert_close(low_rank(weight.view(12, 4, 5), rank=64).flatten(1), weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_of_a_stack_each_matrix_is_approximated_alone():
    stack = torch.randn(4, 50, 40)
    each = torch.stack([low_rank(matrix) for matrix in stack])
    torch.testing.assert_close(low_rank(stack), each, atol=0.2, rtol=0.0)  # other directions are drawn
    assert (stack - low_rank(stack)).norm() < 0.3 * stack.norm() < (stack - low_rank(stack, rank=2)).norm() * 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_are_the_largest_weights_beside_the_principal_ones(dtype):
    weight = torch.randn(64, 60)
    weight[:, :6] += 50  # what a low-rank approximation rests on
    weight = weight.to(dtype)
    chosen = choose_candidates(weight, OFF_PRINCIPAL, "layer").long()
    count, sizes = len(chosen), weight.float().abs().flatten()
    largest = principal(weight, count)
    assert count == round(0.1 * weight.numel())
    assert not torch.isin(chosen, largest).any()
    left = sizes.index_fill(0, torch.cat([chosen, largest]), 0.0)
    assert left.max() <= sizes[chosen].min()
    assert torch.equal(chosen, chosen.unique()), "ascending"
    assert not torch.equal(chosen, choose_candidates(weight, MaskConfig(candidates=0.1), "layer").long())


def test_weights_of_a_loaded_mask_stay_candidates_and_all_of_them_can_be():
    weight = torch.randn(64, 60)
    most = principal(weight, 384)[:10]
    assert torch.isin(most, choose_candidates(weight, OFF_PRINCIPAL, "layer", include=most).long()).all()
    whole = MaskConfig(candidate_rule="off-principal", candidates=1.0)
    assert len(choose_candidates(weight, whole, "layer")) == weight.numel()


def test_a_vector_has_no_principal_weights():
    vector = torch.randn(50)
    assert set(choose_candidates(vector, OFF_PRINCIPAL, "bias").tolist()) == set(vector.abs().topk(5).indices.tolist())


def test_weights_that_are_not_finite_are_no_error():
    weight = torch.randn(64, 60)
    plain = choose_candidates(weight.index_fill(1, torch.tensor([3]), 0.0), OFF_PRINCIPAL, "layer")
    assert torch.equal(choose_candidates(weight.index_fill(1, torch.tensor([3]), torch.nan), OFF_PRINCIPAL, "l"), plain)


def test_a_mask_of_off_principal_candidates_is_trained_saved_and_gone_on_with(tmp_path):
    torch.manual_seed(0)
    base = tiny_model("llama", "lm")
    config = MaskConfig(task_type="CAUSAL_LM", candidate_rule="off-principal", target_sparsity=0.02)
    model = get_peft_model(base, config)
    before = {name: layer.positions("default") for name, layer in model.named_modules() if isinstance(layer, MaskLayer)}
    optimizer = create_mask_optimizer(model)
    inputs = tiny_inputs(model, labels=True)
    for _ in range(2):
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    model.eval()
    expected = model(**inputs).logits
    assert 0.015 < Masks.load(tmp_path).sparsity <= 0.02
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="holds masks without scores"):
        again = PeftModel.from_pretrained(tiny_model("llama", "lm"), tmp_path, is_trainable=True)
    assert torch.equal(again.eval()(**inputs).logits, expected)
    for name, layer in again.named_modules():
        if isinstance(layer, MaskLayer):
            zeros = (~layer.mask("default")).flatten().nonzero().squeeze(1)
            assert torch.isin(zeros, layer.positions("default").long()).all()
            assert torch.isin(zeros, before[name].long()).all()
