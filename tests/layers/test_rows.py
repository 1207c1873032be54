"""Whose the rows of a batch are."""

import asyncio
import threading

import pytest
import torch

from peft_mask.layers.rows import BASE, Rows, forward_rows, in_force, may_be_mixed, rows_for

CPU = torch.device("cpu")
LAYER, OTHER = object(), object()


def test_rows_of_one_adapter_stand_together_and_come_back():
    rows = Rows(["b", BASE, "a", "b", "c", "b"])
    groups = rows.groups(6, {"a", "b"}, 3, CPU)
    assert groups.small == {"a": 1, BASE: 2}  # the layer does not know c
    assert groups.large == {"b": 3}
    assert groups.order.tolist() == [2, 1, 4, 0, 3, 5]
    x = torch.arange(6)
    assert torch.equal(x[groups.order][groups.back], x)
    assert rows.groups(6, {"a", "b"}, 3, CPU) is groups, "found once"


def test_rows_that_stand_together_already_are_not_moved():
    groups = Rows(["b", "a", "a", BASE]).groups(4, {"a", "b"}, torch.inf, CPU)
    assert groups == ({"b": 1, "a": 2, BASE: 1}, {}, None, None)


def test_copies_of_each_row_have_its_adapter():
    rows = Rows(["a", "b"], copies={3})
    assert rows.repeated(6) == ("a", "a", "a", "b", "b", "b")
    assert rows.repeated(2) == ("a", "b")
    with pytest.raises(ValueError, match="same as the number of inputs, but got 2 and 4 respectively"):
        rows.repeated(4)
    with pytest.raises(ValueError, match="but got 0 and 4 respectively"):
        Rows([]).repeated(4)


def test_rows_are_told_to_their_layers_in_their_thread_alone():
    seen = []
    with in_force(rows := Rows(["a"], layers=[LAYER])):
        thread = threading.Thread(target=lambda: seen.append((rows_for(LAYER), may_be_mixed())))
        thread.start()
        thread.join()
        assert rows_for(LAYER) is rows
        assert rows_for(OTHER) is None
    assert seen == [(None, True)]
    assert rows_for(LAYER) is None
    assert not may_be_mixed()


def test_tasks_that_take_turns_in_one_thread_do_not_meet():
    async def task(name):
        with in_force(rows := Rows([name], layers=[LAYER])):
            for _ in range(3):
                await asyncio.sleep(0)
                assert rows_for(LAYER) is rows

    async def both():
        await asyncio.gather(task("a"), task("b"))

    asyncio.run(both())
    assert not may_be_mixed()


def test_forward_rows_computes_each_row_in_the_name_of_its_owner():
    x = torch.arange(8.0).view(4, 2)
    found = forward_rows(x, ["two", "one", "two", BASE], lambda name, rows: rows * {"one": 1, "two": 2, BASE: 0}[name])
    assert torch.equal(found, x * torch.tensor([[2], [1], [2], [0]]))
