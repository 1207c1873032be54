"""Patches held against a model, before anything is written."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_mask.vllm.checkpoint import Checkpoint
from peft_mask.vllm.off import Off
from peft_mask.vllm.patches import check_held, patches_between
from tests.vllm.pretend import Model, write_checkpoint

HEAD = "layer.head.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(root)
    return root


def off(*positions, name=HEAD):
    return Off("adapter", "digest", {name: torch.tensor(positions, dtype=torch.int32)})


def loaded(folder, **options):
    model, checkpoint = Model(**options), Checkpoint(folder)
    names = ("layer.q_proj.weight", "layer.k_proj.weight", HEAD)
    model.load_weights([(name, checkpoint.weight(name)) for name in names])
    return model


positions = st.sets(st.integers(0, 59)).map(sorted)


@given(positions, positions)
def test_a_patch_turns_the_weight_under_one_mask_into_that_under_the_other(folder, old, new):
    checkpoint = Checkpoint(folder)
    weight = checkpoint.weight(HEAD).view(-1)
    under = {str(each): weight.clone().index_fill_(0, torch.tensor(each, dtype=torch.long), 0) for each in (old, new)}
    found = list(patches_between(off(*old), off(*new), checkpoint))
    assert len(found) == (old != new)
    for patch in found:
        assert len(patch.indices) == len({*old} ^ {*new})  # nothing else is touched
        assert torch.equal(under[str(old)][patch.indices], patch.before)
        assert torch.equal(under[str(old)].index_copy(0, patch.indices, patch.after), under[str(new)])


def test_holding_patches_against_a_model_counts_and_changes_nothing(folder):
    model = loaded(folder)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    patches = list(patches_between(Off(), off(1, 5, 23, name="layer.k_proj.weight"), Checkpoint(folder)))
    assert check_held(model, patches) == {"layer.k_proj.weight": 3}
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert torch.zeros(2).copy_(torch.ones(2)).sum() == 2  # copies are copies again


def changed(model):
    model.layer["head"].weight.data[0, 1] += 1


def transposed(model):
    model.transposes = True


@pytest.mark.parametrize(
    ("name", "options", "spoil", "reason"),
    [
        (HEAD, {}, changed, f"'{HEAD}' is not in the model as it is in the base checkpoint: 1 of 2 values"),
        (HEAD, {}, transposed, f"'{HEAD}' cannot be patched in this model, vLLM's loader says: it copies"),
        (HEAD, {"tied": True}, None, f"'{HEAD}' is tied: .*embedding.weight"),
        ("layer.q_proj.weight", {}, lambda model: model.layer.pop("qkv_proj"), "cannot be patched .*qkv_proj"),
    ],
)
def test_a_model_that_does_not_hold_what_it_should_is_refused(folder, name, options, spoil, reason):
    model = loaded(folder, **options)
    if spoil:
        spoil(model)
    patches = list(patches_between(Off(), off(1, 7, name=name), Checkpoint(folder)))
    with pytest.raises(ValueError, match=reason):
        check_held(model, patches)
