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

from dynconv.ops.launch import copied, launch, new


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
def load_static(static_w, channels, d, d_ok, W: tl.constexpr):
    """The static filter's taps, each [1, BD] in float32, as a tuple."""
    taps = ()
    for tap in tl.static_range(W):
        value = tl.load(static_w + tap * channels + d, mask=d_ok, other=0.0)
        taps = taps + (value.to(tl.float32)[None, :],)
    return taps


@triton.jit
def load_positions(pointer, rows, last: tl.constexpr, highest):
    """Each time's position in its document for slots 0..last-1, as a tuple of [ROWS]."""
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
def _sum_block(
    block, partial, total, parts, size, columns, width, first,
    PLACED: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    sums = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, parts, UNROLL):
        part = begin + tl.arange(0, UNROLL)
        ok = (part < parts)[:, None] & inside[None, :]
        sums += tl.sum(tl.load(partial + part.to(tl.int64)[:, None] * size + at[None, :], mask=ok, other=0.0), 0)
    if PLACED:
        inside &= first + at % columns < width
        at = at // columns * width + first + at % columns
    tl.store(total + at, sums, mask=inside)


@triton.jit(do_not_specialize=[*range(6, 15)])
def _sum_kernel(
    partial_a, total_a, partial_b, total_b, partial_c, total_c,
    parts_a, size_a, parts_b, size_b, parts_c, size_c, columns, width, first,
    PLACED: tl.constexpr, BLOCK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    blocks_a = tl.cdiv(size_a, BLOCK)
    blocks_b = tl.cdiv(size_b, BLOCK)
    if program < blocks_a:
        _sum_block(program, partial_a, total_a, parts_a, size_a, columns, width, first, PLACED, BLOCK, UNROLL)
    elif program < blocks_a + blocks_b:
        _sum_block(program - blocks_a, partial_b, total_b, parts_b, size_b, 1, 1, 0, False, BLOCK, UNROLL)
    else:
        _sum_block(program - blocks_a - blocks_b, partial_c, total_c, parts_c, size_c, 1, 1, 0, False, BLOCK, UNROLL)


def new_like(tensor: Tensor) -> Tensor:
    """An uninitialised contiguous tensor of the same shape and dtype."""
    return new(tensor, tensor.shape, tensor.dtype)


def new_sums(
    like: Tensor | None,  # what wants a gradient, if anything does
    parts: int,
    zero: bool = False,  # where programs leave some of the parts out
) -> tuple[Tensor | None, Tensor | None]:  # [parts, *like.shape] float32, like
    """Where programs leave their shares of a gradient, and where `sum_parts` writes it."""
    if like is None:
        return None, None
    return new(like, (parts, *like.shape), torch.float32, zero), new_like(like)


def sum_parts(
    *sums: tuple[Tensor | None, Tensor | None],
    place: tuple[int, int, int] | None = None,  # where the first's columns belong: their number, the total's, and from
) -> None:
    """Write each partial's sum over its first dimension into its total: up to three of `new_sums`, in one launch.

    The order of addition is fixed, so the sums are the same bits every time.
    """
    jobs = [(partial, total) for partial, total in sums if partial is not None and total is not None]
    if not jobs:
        return
    placed = place is not None and sums[0][0] is not None
    unroll = 64 if max((partial for partial, _ in jobs), key=Tensor.numel).shape[0] > 32 else 16
    block = 4096 // unroll
    tensors: tuple[Tensor, ...] = ()
    sizes: tuple[int, ...] = ()
    for partial, total in jobs:
        tensors += (partial, total)
        sizes += (partial.shape[0], partial[0].numel())
    for _ in range(3 - len(jobs)):
        tensors += jobs[0]
        sizes += (0, 0)
    programs = sum(triton.cdiv(size, block) for size in sizes[1::2])
    sizes += place if place is not None else (1, 1, 0)
    launch(_sum_kernel, programs, tensors, sizes, {"PLACED": placed, "BLOCK": block, "UNROLL": unroll})


def aligned(tensor: Tensor) -> Tensor:
    """The 16-bit tensor, or a copy where its rows do not start at multiples of 16 bytes, which cp.async needs.

    Of a stride, Triton knows only whether it is a multiple of 16.
    """
    batch, time = tensor.stride()[:2]
    if tensor.data_ptr() % 16 == 0 and (batch | time) % 16 == 0:
        return tensor
    return copied(tensor)


def cheapest_run(
    time: int,
    rows: int,
    programs_a_chunk: int,
    at_once: int,  # programs that the device runs
    step: int,
    longest: int,
    alone: bool = False,  # whether a program has a multiprocessor to itself
) -> tuple[float, int]:
    """The least time that programs of so many rows take, in slots, and the slots of a row that take it.

    These are a multiple of `step`, from 8 on. Long runs set up less often, which costs about 16 slots' worth of time;
    short ones fill the device. The last programs take some .8 of the others' time where they share a multiprocessor
    with fewer (measured on an H100).
    """

    def cost(run: int) -> float:
        full, rest = divmod(programs_a_chunk * triton.cdiv(time, rows * run), at_once)
        last = 0.0 if rest == 0 else 1.0 if alone else max(0.8, rest / at_once)
        return (full + last) * (run + 16)

    run = min(range(longest, 7, -step), key=cost)
    return cost(run), run


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(tensor: Tensor) -> int:
    """How many multiprocessors the tensor's device has; 4 where the interpreter stands in for one."""
    return _multiprocessors(tensor.device) if tensor.is_cuda else 4


@functools.cache
def _has_async_copies(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def runs_gluon(tensor: Tensor) -> bool:
    """Whether the tensor's device has what the Gluon kernels use, cp.async and mma.sync: NVIDIA's from sm_80 on."""
    return tensor.is_cuda and _has_async_copies(tensor.device)
