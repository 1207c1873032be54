"""Products with a copy of the weight that zeros are written into, against merged weights, to the bit."""

import threading

import pytest
import torch
import torch.nn.functional as F

from peft_mask.layers.patched import Group, can_patch, patched_products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("into", [False, True])
def test_products_are_those_of_merged_weights_and_the_weight_is_as_it_was(dtype, transposed, into):
    torch.manual_seed(0)
    weight = torch.randn(8, 6).to(dtype)
    weight[0, 0] = torch.nan  # off in some masks: there is nothing of it then
    before = weight.clone()
    out, width = (6, 8) if transposed else (8, 6)
    bias = torch.randn(out).to(dtype)
    masks = [torch.rand(8, 6) < 0.7 for _ in range(3)]
    masks[0][0, 0] = masks[1][0, 0] = False
    off = [(~mask).view(-1).nonzero().squeeze(1) for mask in masks]
    inputs = [torch.randn(rows, width).to(dtype) for rows in (2, 3, 1)]
    # the second under two masks at once, the third without a bias
    groups = [
        Group(inputs[0], [off[0]], bias),
        Group(inputs[1], [off[1], off[2]], bias, torch.empty(3, out, dtype=dtype) if into else None),
        Group(inputs[2], [off[2]], None, torch.empty(1, out, dtype=dtype) if into else None),
    ]
    found = list(patched_products(groups, weight, transposed=transposed))
    for (x, _, own, _), mask, y in zip(groups, [masks[0], masks[1] & masks[2], masks[2]], found, strict=True):
        merged = torch.where(mask, weight, 0)
        assert torch.equal(y.nan_to_num(7), F.linear(x, merged.t() if transposed else merged, own).nan_to_num(7))
    assert found[0].isfinite().all()
    assert torch.equal(weight.nan_to_num(7), before.nan_to_num(7))


def test_threads_have_copies_of_their_own():
    weights = [torch.randn(4, 4) for _ in range(2)]
    x, none = torch.randn(2, 4), [torch.arange(4)]
    first = patched_products([Group(x, none, None)] * 2, weights[0])
    got = next(first)
    other = []
    thread = threading.Thread(target=lambda: other.extend(patched_products([Group(x, none, None)], weights[1])))
    thread.start()
    thread.join()
    assert torch.equal(next(first), got)
    assert not torch.equal(other[0], got)


def test_a_copy_made_in_inference_mode_serves_outside_of_it():
    weight, x = torch.randn(64, 64), torch.randn(2, 64)

    def run():
        with torch.inference_mode():
            next(patched_products([Group(x, [torch.arange(3)], None)], weight))
        found.extend(patched_products([Group(x, [torch.arange(3)], None)], weight))

    found = []
    thread = threading.Thread(target=run)  # with no copy yet
    thread.start()
    thread.join()
    assert torch.equal(found[0], F.linear(x, weight.view(-1).index_fill(0, torch.arange(3), 0).view(64, 64)))


def test_what_can_be_patched():
    assert can_patch(torch.nn.Parameter(torch.randn(2, 3)))
    assert not can_patch(torch.randn(2, 3).t())
    assert not can_patch(torch.randn(2, 3, device="meta"))
