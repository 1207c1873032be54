import pytest
import torch
from torch import nn

from peft_mask.training.cards import SHORTEST, longest, quantize_shapes, usable


def test_of_a_card_a_gibibyte_and_a_twentieth_are_set_aside():
    assert usable(80) == 75 * 2**30


@pytest.mark.parametrize("row", [0, SHORTEST, 7 * SHORTEST, 4096])
def test_the_longest_row_is_that_which_just_fits(row):
    def needs(tokens):
        return 1000 + 10 * tokens

    assert longest(needs(row) + 5, needs, 4096) == row


def test_a_model_for_short_rows_takes_its_longest_or_none():
    assert longest(100, lambda tokens: 100, 64) == 64
    assert longest(100, lambda tokens: 101, 64) == 0


def test_memory_that_does_not_grow_in_step_with_tokens_is_refused():
    with pytest.raises(ValueError, match="does not grow in step with its tokens"):
        longest(1e12, lambda tokens: tokens**2 * 1000, 4096)


def test_linear_layers_of_the_backbone_alone_are_in_four_bits():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    with torch.device("meta"):
        model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)), "head": nn.Linear(4, 2)})
    quantize_shapes(model["body"])
    assert type(model["body"][0]) is bnb.nn.Linear4bit
    assert model["body"][0].bias is not None
    assert type(model["head"]) is nn.Linear
