import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_mask.scores import order
from peft_mask.scores.order import lowest, lowest_among, lowest_positions, nth_lowest

NUMBERS = st.sampled_from([-math.inf, -2.0, -1.0, -0.0, 0.0, 1.0, math.inf, math.nan])
VALUES = st.lists(NUMBERS, min_size=1, max_size=30)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@pytest.fixture(params=["on a CPU", "on a device"], autouse=True)
def _way(request, monkeypatch):
    """Both ways have to find the same: what is done on other devices is done on the CPU here."""
    if request.param == "on a device":
        monkeypatch.setattr(order, "is_in_numpy", lambda values: False)


@given(VALUES, DTYPES, st.integers(0, 35), st.sampled_from([math.inf, 0.0, -1.5]))
def test_so_many_of_the_lowest_are_marked_the_first_of_equals_and_none_above_a_bound(values, dtype, count, below):
    numbers = torch.tensor(values, dtype=dtype)
    in_order = sorted((value, i) for i, value in enumerate(values) if value <= below)  # no NaN is
    expected = {i for _, i in in_order[:count]}
    marked = lowest(numbers.view(1, -1), count, below)
    assert marked.shape == (1, len(values))
    assert set(marked.view(-1).nonzero().view(-1).tolist()) == expected
    torch.testing.assert_close(numbers, torch.tensor(values, dtype=dtype), rtol=0, atol=0, equal_nan=True)  # as it was


@given(VALUES, DTYPES, st.integers(0, 35), st.integers(0, 35), st.sampled_from([math.inf, 0.0, -1.5]))
def test_a_count_that_is_not_read_marks_the_same(values, dtype, count, more, below):
    numbers = torch.tensor(values, dtype=dtype).view(1, -1)
    marked = lowest_among(numbers, torch.tensor(count), count + more, below)
    assert torch.equal(marked, lowest(numbers, count, below))


@given(st.data(), DTYPES, st.sampled_from([math.inf, 0.0, -1.5]))
def test_positions_are_those_that_are_marked_in_each_row(data, dtype, below):
    columns = data.draw(st.integers(1, 12))
    rows = data.draw(st.lists(st.lists(NUMBERS, min_size=columns, max_size=columns), min_size=1, max_size=4))
    count = data.draw(st.integers(1, columns))
    more = data.draw(st.integers(count, columns))
    values = torch.tensor(rows, dtype=dtype)
    for number, most in ((count, count), (torch.tensor(count), more)):
        found = lowest_positions(values, number, most, below)
        assert (found.shape, found.dtype) == ((len(rows), most), torch.int64)
        for row, positions in zip(values, found, strict=True):
            expected = lowest(row, count, below).nonzero().view(-1).tolist()
            assert sorted(positions.tolist()) == expected + [columns] * (most - len(expected))


@given(VALUES, DTYPES, st.data())
def test_the_nth_lowest_counts_from_one_and_nan_as_infinity(values, dtype, data):
    n = data.draw(st.integers(1, len(values)))
    found = nth_lowest(torch.tensor(values, dtype=dtype), n)
    assert (found.dtype, found.shape) == (dtype, ())
    assert found.item() == sorted(math.inf if math.isnan(value) else value for value in values)[n - 1]


def test_scores_that_are_trained_are_ordered_without_a_gradient():
    scores = torch.tensor([1.0, -1.0], requires_grad=True)
    assert lowest(scores, 1).tolist() == [False, True]
    assert nth_lowest(scores, 2).item() == 1


def test_it_is_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(lowest, fullgraph=True, backend="eager")
    values = torch.randint(-3, 3, (50,)).float()
    assert torch.equal(compiled(values, 7), lowest(values, 7))


def test_counts_in_a_tensor_are_compiled_once():
    torch._dynamo.reset()
    compiled = torch.compile(lowest_among, fullgraph=True, backend="eager")
    values = torch.randint(-3, 3, (50,)).float()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in range(12):
            assert torch.equal(compiled(values, torch.tensor(count), 11), lowest(values, count))
