"""Where a budget switches weights off: the same weights as by the mask, however they are found."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_mask.scores import off, order
from peft_mask.scores.binarize import binarize_topk
from peft_mask.scores.off import off_positions, off_positions_of_all
from peft_mask.tensors.elements import without

SCORES = st.sampled_from([-2.0, -1.0, -0.0, 0.5])


@pytest.fixture(params=["on a CPU", "on a device"])
def way(request, monkeypatch):
    """What is done on other devices is done on the CPU here, and has to find the same."""
    if request.param == "on a device":
        for module in (off, order):
            monkeypatch.setattr(module, "is_in_numpy", lambda values: False)
    return request.param


def masked(weight, scores, positions, zeros):
    """What the mask of a budget makes of a weight, element by element."""
    kept = torch.ones(weight.numel(), dtype=torch.bool)
    kept[slice(None) if positions is None else positions.long()] = binarize_topk(scores.reshape(-1), zeros)
    return torch.where(kept.view(weight.shape), weight, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_where_the_mask_is_off(way, dtype):
    @given(st.data())
    def check(data):
        weight = torch.arange(1.0, 25.0).view(4, 6).t()  # its elements do not lie in order
        count = data.draw(st.sampled_from([5, 24]))
        positions = None if count == 24 else torch.tensor([0, 3, 7, 8, 23], dtype=torch.int32)
        scores = torch.tensor(data.draw(st.lists(SCORES, min_size=count, max_size=count)), dtype=dtype)
        for zeros in (0, 1, 3, count, count + 5):
            found = off_positions(scores, positions, 24, zeros, zeros)
            assert found.dtype == torch.int32
            assert torch.equal(without(weight, found), masked(weight, scores, positions, zeros))
            unread = off_positions(scores, positions, 24, torch.tensor(max(zeros, 1)), count)
            assert torch.equal(without(weight, unread), masked(weight, scores, positions, max(zeros, 1)))

    check()


def test_a_zero_is_positive_and_an_infinite_weight_leaves_none_behind():
    weight = torch.tensor([-1.0, torch.inf, torch.nan, 2.0])
    assert without(weight, torch.tensor([0, 1, 2, 4])).view(torch.int32).tolist() == [0, 0, 0, 0x40000000]


@pytest.mark.parametrize("with_positions", [True, False])
def test_those_of_many_matrices_are_those_of_each(with_positions):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randint(-3, 2, (6,), generator=generator).float() for _ in range(5)]
    scores += [torch.ones(6), torch.full((6,), torch.nan)]  # of which none is off
    positions = [torch.randperm(40, generator=generator)[:6].sort().values.int() for _ in scores]
    every, numel = (positions, 40) if with_positions else ([None] * len(scores), 6)
    for zeros in (1, 4, 6):
        found = off_positions_of_all(scores, every, numel, zeros)
        for own, its_positions, its_scores in zip(found, every, scores, strict=True):
            alone = off_positions(its_scores, its_positions, numel, zeros, zeros)
            assert set(own.tolist()) - {numel} == set(alone.tolist())


def test_where_torch_cannot_count_on_the_device_it_is_counted_on_the_host(monkeypatch):
    values = torch.tensor([[3.0, -1.0, -1.0, -2.0], [1.0, 1.0, 1.0, 1.0]])
    expected = order.lowest_positions(values, 2, 2, 0.0).sort().values
    monkeypatch.setattr(torch, "nonzero_static", lambda *args, **kwargs: (_ for _ in ()).throw(NotImplementedError))
    assert torch.equal(order.lowest_positions(values, 2, 2, 0.0).sort().values, expected)
    assert expected.tolist() == [[1, 3], [4, 4]]
