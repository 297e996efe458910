"""What the kernels share: tiles of interleaved time, and the second launch that adds up partial sums.

A tile is ROWS x SLOTS time steps by a block of channels. Row r, slot s stands for time r * SLOTS + s, so
that a thread which owns a row holds consecutive times: the W - 1 earlier inputs of a slot are other slots of
the same thread, and a causal filter needs neither shared memory nor a second load.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_slots(pointer, rows, row_stride, columns, column_ok, first, last, lowest, highest):
    """Slots first..last-1 of a tile, as a tuple of [ROWS, BD]; times outside lowest..highest-1 read as zero.

    `rows` [ROWS] holds each row's slot 0, relative to `pointer`, as do `lowest` and `highest`.
    """
    slots = ()
    for slot in tl.static_range(first, last):
        time = rows + slot
        ok = ((time >= lowest) & (time < highest))[:, None] & column_ok[None, :]
        offsets = time[:, None] * row_stride + columns[None, :]
        slots = slots + (tl.load(pointer + offsets, mask=ok, other=0.0),)
    return slots


@triton.jit
def load_positions(pointer, rows, last: tl.constexpr, highest):
    """Each time's position in its document for slots 0..last-1, as a tuple of [ROWS]."""
    slots = ()
    for slot in tl.static_range(0, last):
        time = rows + slot
        slots = slots + (tl.load(pointer + time, mask=time < highest, other=0),)
    return slots


@triton.jit
def _sum_block(block, partial, total, parts, size, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, parts, UNROLL):
        part = first + tl.arange(0, UNROLL)
        ok = (part < parts)[:, None] & inside[None, :]
        sums += tl.sum(tl.load(partial + part.to(tl.int64)[:, None] * size + at[None, :], mask=ok, other=0.0), 0)
    tl.store(total + at, sums, mask=inside)


@triton.jit
def _sum_kernel(
    partial_a, total_a, parts_a, size_a,
    partial_b, total_b, parts_b, size_b,
    partial_c, total_c, parts_c, size_c,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    blocks_a = tl.cdiv(size_a, BLOCK)
    blocks_b = tl.cdiv(size_b, BLOCK)
    if program < blocks_a:
        _sum_block(program, partial_a, total_a, parts_a, size_a, BLOCK, UNROLL)
    elif program < blocks_a + blocks_b:
        _sum_block(program - blocks_a, partial_b, total_b, parts_b, size_b, BLOCK, UNROLL)
    else:
        _sum_block(program - blocks_a - blocks_b, partial_c, total_c, parts_c, size_c, BLOCK, UNROLL)


def sum_parts(
    *jobs: tuple[Tensor, Tensor],  # (partial [P, ...] float32 contiguous, total [...])
) -> None:
    """Write each partial's sum over its first dimension into its total: up to three jobs, one launch.

    The order of addition is fixed, so the sums are the same bits every time.
    """
    block = 256
    arguments: list[Tensor | int] = []
    programs = 0
    for partial, total in jobs:
        programs += triton.cdiv(total.numel(), block)
        arguments += [partial, total, partial.shape[0], total.numel()]
    for _ in range(3 - len(jobs)):
        arguments += [*jobs[0], 0, 0]
    if programs:
        _sum_kernel[(programs,)](*arguments, BLOCK=block, UNROLL=8, num_warps=2)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(tensor: Tensor) -> int:
    """How many multiprocessors the tensor's device has; 4 where the interpreter stands in for one."""
    return _multiprocessors(tensor.device) if tensor.is_cuda else 4
