"""Which tensors have elements in common, seen by their addresses, against what writing into them shows."""

import itertools

import pytest
import torch

from peft_mask.tensors.aliasing import sharing_memory


def ways():
    """Name and two tensors of one storage."""
    table = torch.zeros(12, 8)
    yield "the same", table, table.view(12, 8)
    yield "transposed", table, table.t()
    yield "one inside", table, table[3:5]
    yield "rows that overlap", table[:8], table[4:]
    yield "rows one after another", table[:6], table[6:]
    yield "columns side by side", table[:, :3], table[:, 3:]
    yield "columns that overlap", table[:, :5], table[:, 3:]
    yield "columns of other rows", table[:4, :3], table[6:, 3:]
    yield "a row and a column", table[0], table[:, 0]
    yield "the ends of one dimension", table.view(-1)[:9], table.view(-1)[8:]
    yield "another storage", table, torch.zeros(12, 8)
    yield "a row of one", table[:1], table[1:2]


@pytest.mark.parametrize(("one", "other"), [pytest.param(*pair, id=name) for name, *pair in ways()])
def test_tensors_share_memory_where_writing_to_one_changes_the_other(one, other):
    other.zero_()
    one.fill_(1)
    changed = bool(other.any())
    for pair in itertools.permutations((one, other)):
        groups = sharing_memory(pair)
        assert (len(groups) == 1 and len(groups[0]) == 2) is changed


def test_groups_are_closed_and_leave_out_what_shares_nothing():
    table, alone = torch.zeros(12, 8), torch.zeros(3)
    first, middle, last = table[:5], table[4:8], table[7:]
    groups = sharing_memory([last, alone, first, middle])
    assert [{id(tensor) for tensor in group} for group in groups] == [{id(first), id(middle), id(last)}]


def test_tensors_without_memory_share_none():
    meta = torch.zeros(2, 2, device="meta")
    assert sharing_memory([meta, meta.view(4), torch.zeros(0), torch.zeros(0, 3)]) == []
