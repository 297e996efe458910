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
def load_slot(pointers, slot, stride: tl.constexpr, limit, ok):
    """Slot `slot` of a tile [ROWS, BD], zero from `limit` [ROWS] on. `pointers` are those of slot 0.

    The stride is a constant, so that the slots of a tile differ by an immediate offset and share one address.
    """
    return tl.load(pointers + slot * stride, mask=(slot < limit)[:, None] & ok[None, :], other=0.0)


@triton.jit
def load_slots(pointers, first: tl.constexpr, last: tl.constexpr, stride: tl.constexpr, start, limit, ok):
    """Slots first..last-1, as a tuple; zero before `start` [ROWS], too."""
    slots = ()
    for slot in tl.static_range(first, last):
        if slot < 0:
            inside = ((slot >= start) & (slot < limit))[:, None] & ok[None, :]
            slots = slots + (tl.load(pointers + slot * stride, mask=inside, other=0.0),)
        else:
            slots = slots + (load_slot(pointers, slot, stride, limit, ok),)
    return slots


@triton.jit
def drop_first(slots, length: tl.constexpr):
    """A tuple of `length` slots without its first."""
    rest = ()
    for index in tl.static_range(1, length):
        rest = rest + (slots[index],)
    return rest


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
    unroll = min(64, power_of_two(max(partial.shape[0] for partial, _ in jobs)))
    block = 4096 // unroll
    arguments: list[Tensor | int] = []
    programs = 0
    for partial, total in jobs:
        programs += ceil_div(total.numel(), block)
        arguments += [partial, total, partial.shape[0], total.numel()]
    for _ in range(3 - len(jobs)):
        arguments += [*jobs[0], 0, 0]
    if programs:
        _sum_kernel[(programs,)](*arguments, BLOCK=block, UNROLL=unroll, num_warps=4)


def ceil_div(number: int, divisor: int) -> int:
    """The quotient, rounded up. Triton's own is callable from kernels too, and costs the host 3 us a call for it."""
    return -(-number // divisor)


def power_of_two(number: int) -> int:
    """The least power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(tensor: Tensor) -> int:
    """How many multiprocessors the tensor's device has; 4 where the interpreter stands in for one."""
    return _multiprocessors(tensor.device) if tensor.is_cuda else 4
