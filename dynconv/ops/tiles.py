"""Functions that the Triton kernels share: tiles of time steps and channels, and the sum of partial gradients.

A tile is ROWS x SLOTS time steps by a block of BD channels. Row r, slot s stands for time r * SLOTS + s, so a thread
that owns a row holds consecutive times: the W - 1 earlier inputs of a slot are other slots of the same thread, and a
causal filter needs neither shared memory nor a second load of the same input.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynconv.ops.launch import copied, launch, new


@triton.jit
def load_slot(pointers, slot, stride: tl.constexpr, limit, ok):
    """Load one slot of a tile [ROWS, BD]; zeros for slots from the row's `limit` [ROWS] on.

    `pointers` are those of slot 0. The stride is a compile-time constant, so that the loads of all slots share one
    address register and differ only in an immediate offset.
    """
    return tl.load(pointers + slot * stride, mask=(slot < limit)[:, None] & ok[None, :], other=0.0)


@triton.jit
def load_slots(pointers, first: tl.constexpr, last: tl.constexpr, stride: tl.constexpr, start, limit, ok):
    """Load slots first..last-1 as a tuple; zeros for slots before the row's `start` [ROWS] or from its `limit` on."""
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
    """A tuple of `length` slots without its first element."""
    rest = ()
    for index in tl.static_range(1, length):
        rest = rest + (slots[index],)
    return rest


@triton.jit
def load_static(static_w, channels, d, d_ok, W: tl.constexpr):
    """The static filter's taps, each [1, BD] in float32, as a tuple."""
    taps = ()
    for tap in tl.static_range(W):
        value = tl.load(static_w + tap * channels + d, mask=d_ok, other=0.0)
        taps = taps + (value.to(tl.float32)[None, :],)
    return taps


@triton.jit
def load_positions(pointer, rows, last: tl.constexpr, highest):
    """The index within its document of each token in slots 0..last-1, as a tuple of [ROWS]."""
    slots = ()
    for slot in tl.static_range(0, last):
        time = rows + slot
        slots = slots + (tl.load(pointer + time, mask=time < highest, other=0),)
    return slots


@triton.jit
def end_of_documents(positions, time):
    """Where the last document ends: what comes after it is padding, which kernels read as zeros."""
    end = time
    if positions is not None:
        end = time - tl.load(positions + time)
    return end


@triton.jit
def _sum_rows(
    block, partial, total, parts, rows,
    COLUMNS: tl.constexpr, EACH: tl.constexpr, GAP: tl.constexpr, PADDING: tl.constexpr,
    WIDTH: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Rows of COLUMNS sums, written from column FIRST on into rows of WIDTH.

    GAP zeros are written after EACH of them, and PADDING zeros after the last.
    """
    SPREAD: tl.constexpr = COLUMNS // EACH * (EACH + GAP)
    row = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, LANES)
    source = column  # neighbours, so that a thread loads several at once
    summed = column < SPREAD
    if GAP > 0:
        source = column // (EACH + GAP) * EACH + column % (EACH + GAP)
        summed &= column % (EACH + GAP) < EACH
    pointers = partial + row[:, None] * COLUMNS + source[None, :]
    sums = tl.zeros([ROWS, LANES], tl.float32)
    for begin in range(0, parts, 4):
        values = ()
        for index in tl.static_range(4):
            part = begin + index
            inside = (row < tl.where(part < parts, rows, 0))[:, None] & summed[None, :]
            values = values + (tl.load(pointers + part.to(tl.int64) * rows * COLUMNS, mask=inside, other=0.0),)
        for index in tl.static_range(4):
            sums += values[index].to(tl.float32)
    END: tl.constexpr = min(SPREAD + PADDING, WIDTH - FIRST)
    to = total + row[:, None] * WIDTH + FIRST + column[None, :]
    tl.store(to, sums.to(total.dtype.element_ty), mask=(row < rows)[:, None] & (column < END)[None, :])
    for begin in range(LANES, END, LANES):
        tl.store(to + begin, 0.0, mask=(row < rows)[:, None] & (begin + column < END)[None, :])


@triton.jit
def _sum_block(block, partial, total, parts, size, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    sums = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, parts, UNROLL):
        part = begin + tl.arange(0, UNROLL)
        ok = (part < parts)[:, None] & inside[None, :]
        values = tl.load(partial + part.to(tl.int64)[:, None] * size + at[None, :], mask=ok, other=0.0)
        sums += tl.sum(values.to(tl.float32), 0)
    tl.store(total + at, sums, mask=inside)


@triton.jit(do_not_specialize=[*range(6, 12)])
def _sum_kernel(
    partial_a, total_a, partial_b, total_b, partial_c, total_c,
    parts_a, size_a, parts_b, size_b, parts_c, size_c,
    COLUMNS: tl.constexpr, EACH: tl.constexpr, GAP: tl.constexpr, PADDING: tl.constexpr,
    WIDTH: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
    BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sum three tensors over their first dimension. With COLUMNS, size_a counts rows of so many sums."""
    program = tl.program_id(0)
    blocks_a = tl.cdiv(size_a, ROWS if COLUMNS > 0 else BLOCK)
    blocks_b = tl.cdiv(size_b, BLOCK)
    if program < blocks_a:
        if COLUMNS > 0:
            _sum_rows(
                program, partial_a, total_a, parts_a, size_a,
                COLUMNS, EACH, GAP, PADDING, WIDTH, FIRST, ROWS, LANES,
            )  # fmt: skip
        else:
            _sum_block(program, partial_a, total_a, parts_a, size_a, BLOCK, UNROLL)
    elif program < blocks_a + blocks_b:
        _sum_block(program - blocks_a, partial_b, total_b, parts_b, size_b, BLOCK, UNROLL)
    else:
        _sum_block(program - blocks_a - blocks_b, partial_c, total_c, parts_c, size_c, BLOCK, UNROLL)


def new_like(tensor: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the same shape and dtype."""
    return new(tensor, tensor.shape, tensor.dtype)


def new_sums(
    like: Tensor | None,  # the tensor whose gradient is summed; None if it needs none
    parts: int,  # partial sums that the programs write
    zero: bool = False,  # whether to start from zeros, because programs leave some parts unwritten
) -> tuple[Tensor | None, Tensor | None]:  # [parts, *like.shape] float32; like.shape, like's dtype
    """Allocate the partial sums of a gradient, which programs write, and its total, which `sum_parts` writes."""
    if like is None:
        return None, None
    return new(like, (parts, *like.shape), torch.float32, zero), new_like(like)


_TILE = 4096  # values that a program of `_sum_kernel` loads at once
_LANES = 1024  # columns of all rows of such a program together, if it sums rows


class Place(NamedTuple):
    """Where the rows of a total are written: into rows of another width."""

    columns: int  # number of sums in a row
    width: int  # of the rows into which they are written; columns beyond it are left out
    first: int  # the column that the first sum is written to
    padding: int = 0  # number of zeros to write after the sums
    each: int = 0  # number of sums in a group; 0: all of a row
    gap: int = 0  # number of zeros to write after each group


def sum_parts(
    *sums: tuple[Tensor | None, Tensor | None],  # up to three results of `new_sums`
    place: Place | None = None,  # where the total of the first pair is written
) -> None:
    """Sum each partial tensor over its first dimension into its total, all in one launch.

    The order of addition is fixed, so the results are bitwise reproducible.
    """
    jobs = [(partial, total) for partial, total in sums if partial is not None and total is not None]
    if not jobs:
        return
    columns, width, first, padding, each, gap = place if place and sums[0][0] is not None else Place(0, 1, 0)
    each = each or max(columns, 1)
    spread = max(columns // each * (each + gap), 1)
    lanes = triton.next_power_of_2(max(spread, min(spread + padding, _LANES)))
    # Compile only two kinds: the number of parts depends on T, and different T should share a kernel.
    unroll = 64 if any(partial.shape[0] > 32 for partial, _ in jobs[columns > 0 :]) else 16
    rows, block = max(_LANES // lanes, 1), _TILE // unroll
    tensors: tuple[Tensor, ...] = ()
    sizes: tuple[int, ...] = ()
    programs = 0
    for partial, total in jobs:
        by_rows = columns > 0 and not tensors
        size = partial[0].numel() // (columns if by_rows else 1)
        programs += triton.cdiv(size, rows if by_rows else block)
        tensors += (partial, total)
        sizes += (partial.shape[0], size)
    for _ in range(3 - len(jobs)):
        tensors += jobs[0]
        sizes += (0, 0)
    constants = {
        "COLUMNS": columns, "EACH": each, "GAP": gap, "PADDING": padding, "WIDTH": width, "FIRST": first,
        "ROWS": rows, "LANES": lanes, "BLOCK": block, "UNROLL": unroll,
    }  # fmt: skip
    launch(_sum_kernel, programs, tensors, sizes, constants)


def aligned(tensor: Tensor) -> Tensor:
    """The 16-bit tensor, or a contiguous copy if its rows are not aligned to 16 bytes, as cp.async requires.

    Strides must be multiples of 16 elements, not just of 8, because Triton tracks only their divisibility by 16.
    """
    batch, time = tensor.stride()[:2]
    if tensor.data_ptr() % 16 == 0 and (batch | time) % 16 == 0:
        return tensor
    return copied(tensor)


def three(tensors: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    """The tensor of each segment, as the three arguments of the kernels. With two segments, the third is never used."""
    return (tensors[0], None, None) if len(tensors) == 1 else (*tensors[:2], tensors[-1])


def cheapest_run(
    time: int,
    rows: int,
    programs_a_chunk: int,  # that work on one chunk of time: channel blocks times sequences
    processors: int,  # multiprocessors of the device
    each: int,  # programs that a multiprocessor runs at the same time
    step: int,  # run lengths differ by multiples of this
    longest: int,  # the longest run length to consider
) -> tuple[float, int]:
    """(estimated time of the fastest launch in slots, its run length, which is the number of slots of a row).

    A program's chunk of time is `rows` rows of one run each. Long runs repeat the set-up less often, which costs about
    as much time as 16 slots. Short runs give more programs, which fill the device better. Where the last wave of
    programs leaves multiprocessors partly empty, it takes at least 0.8 of a full wave's time (measured on an H100).
    """

    def cost(run: int) -> float:
        full, rest = divmod(programs_a_chunk * triton.cdiv(time, rows * run), processors * each)
        if rest == 0 or each == 1:
            return (full + (rest > 0)) * (run + 16)
        return (full + max(0.8, rest / (processors * each))) * (run + 16)

    run = min(range(longest, 7, -step), key=cost)
    return cost(run), run


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(tensor: Tensor) -> int:
    """How many multiprocessors the tensor's device has; 4 on the CPU, where Triton's interpreter runs the kernels."""
    return _multiprocessors(tensor.device) if tensor.is_cuda else 4


@functools.cache
def has_async_copies(device: torch.device) -> bool:
    """Whether a GPU has the cp.async and mma.sync that the Gluon kernels use: NVIDIA's from sm_80 on."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def runs_gluon(tensor: Tensor) -> bool:
    """Whether the tensor is on a GPU that has what the Gluon kernels use."""
    return tensor.is_cuda and has_async_copies(tensor.device)
