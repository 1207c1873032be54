"""The sparse correction as one Triton kernel for all adapters of a batch. Needs triton; `use_triton` imports it.

A program computes some outputs of some tokens of one adapter. Adapters lie in memory of their own, so each program
finds in a table where the tensors of its adapter begin. The table is made of what the host knows, and sent from pinned
memory: nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST = 16  # tokens of one program: of 16 bits they fill a sector, the least that a GPU reads
# What a program takes in a step: outputs, and zeros of each. Nobody has tuned them; registers are known to suffice.
_OUTPUTS, _ZEROS = 16, 16


def correction(
    x: Tensor,
    sizes: Sequence[int],
    pointers: Sequence[Tensor],
    columns: Sequence[Tensor],
    values: Sequence[Tensor],
    places: Sequence[Tensor],
) -> Tensor:
    """The operator `peft_mask::correction`: `x Z^T`, with the Z of its own adapter for each token.

    One launch, and one more that transposes `x` if an adapter has several tokens: those of a column then share what is
    read of it. Sums in float32 at least, rounds once, writes outputs in their order.

    Args:
        x: (tokens, in) tensor, those of one adapter together.
        sizes: how many tokens each of the adapters has; what is left behind them belongs to none.
        pointers: the field of `Zeros` of each adapter, as the next three; int32.
        columns: int32.
        values: of the dtype of `x`.
        places: int32.

    Returns:
        (tokens, out) tensor of the dtype of `x`, zero for tokens of none.

    Raises:
        TypeError: if a tensor has another dtype, or is on another device than `x`: the kernel reads memory as it is.
    """
    for name, tensors, dtype in (
        ("pointers", pointers, torch.int32),
        ("columns", columns, torch.int32),
        ("values", values, x.dtype),
        ("places", places, torch.int32),
    ):
        if found := {(tensor.dtype, tensor.device) for tensor in tensors} - {(dtype, x.device)}:
            raise TypeError(
                f"The Triton kernel of the sparse correction expects {name} of {dtype} on {x.device}, as `zeros_of` "
                f"makes them of a weight there that has the dtype of the input, got {sorted(map(str, found))}."
            )
    outputs = len(places[0])
    y = x.new_empty(len(x), outputs)
    if not len(x):
        return y
    several = min(triton.next_power_of_2(max(1, *sizes)), _MOST)
    addresses = [tuple(map(Tensor.data_ptr, own)) for own in zip(pointers, columns, values, places, strict=True)]
    table = _table(len(x), sizes, addresses, several)
    sent = torch.tensor(table, dtype=torch.int64, device="cpu", pin_memory=x.is_cuda).to(x.device, non_blocking=True)
    if several > 1:
        x = x.t().contiguous().t()
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _kernel[(len(table) * triton.cdiv(outputs, _OUTPUTS),)](
            y, x, sent, outputs, *x.stride(), several, _OUTPUTS, _ZEROS, x.dtype == torch.float64
        )
    return y


def _table(count: int, sizes: Sequence[int], addresses: Sequence[tuple[int, ...]], most: int) -> list[tuple[int, ...]]:
    """Return for at most so many tokens each: the first, the one behind the last, and the addresses of their zeros.

    Those of no adapter are at 0.
    """
    ends = [*accumulate(sizes), count]
    owned = zip([0, *ends], ends, [*addresses, (0, 0, 0, 0)], strict=False)
    return [(first, min(first + most, end), *own) for begin, end, own in owned for first in range(begin, end, most)]


@triton.jit(do_not_specialize=["to_column"])  # else compiled anew for numbers of tokens
def _kernel(
    y,
    x,
    table,
    outputs,
    to_token,
    to_column,
    TOKENS: tl.constexpr,  # noqa: N803, as is usual in Triton for what is compiled in
    OUTPUTS: tl.constexpr,  # noqa: N803
    ZEROS: tl.constexpr,  # noqa: N803
    DOUBLE: tl.constexpr,  # noqa: N803
):
    wide = tl.float64 if DOUBLE else tl.float32
    tiles = tl.cdiv(outputs, OUTPUTS)
    row = table + tl.program_id(0) // tiles * 6
    token = tl.load(row) + tl.arange(0, TOKENS)  # int64
    mine = token < tl.load(row + 1)
    pointers = tl.load(row + 2).to(tl.pointer_type(tl.int32))
    columns = tl.load(row + 3).to(tl.pointer_type(tl.int32))
    values = tl.load(row + 4).to(tl.pointer_type(x.dtype.element_ty))
    places = tl.load(row + 5).to(tl.pointer_type(tl.int32))

    output = tl.program_id(0) % tiles * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < outputs
    owned = inside & (tl.load(row + 2) != 0)
    place = tl.load(places + output, mask=owned, other=0)
    begin = tl.load(pointers + place, mask=owned, other=0)
    end = tl.load(pointers + place + 1, mask=owned, other=0)
    sums = tl.zeros((TOKENS, OUTPUTS), wide)
    for done in range(0, tl.max(end - begin, axis=0), ZEROS):
        zero = begin[:, None] + done + tl.arange(0, ZEROS)[None, :]
        there = zero < end[:, None]
        column = tl.load(columns + zero, mask=there, other=0).to(tl.int64)
        value = tl.load(values + zero, mask=there, other=0).to(wide)
        inputs = x + token[:, None, None] * to_token + column[None, :, :] * to_column
        taken = tl.load(inputs, mask=mine[:, None, None] & there[None, :, :], other=0).to(wide)
        sums += tl.sum(taken * value[None, :, :], axis=2)
    written = mine[:, None] & inside[None, :]
    tl.store(y + token[:, None] * outputs + output[None, :], sums.to(y.dtype.element_ty), mask=written)
