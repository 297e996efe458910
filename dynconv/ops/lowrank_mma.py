"""The low-rank convolution on NVIDIA tensor cores: which inputs fit, how the work is cut, and the launches.

Legend: B batch, T time, D channels, W taps, R rank (padded in z to RP, a multiple of 16), G segments.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynconv.ops import lowrank_mma_kernels as kernels
from dynconv.ops.launch import copied, launch, new
from dynconv.ops.tiles import Place, aligned, cheapest_run, multiprocessors, new_like, new_sums, sum_parts

MAX_WIDTH, _MAX_SILU_WIDTH = 8, 6
_TAPS_AT_ONCE = 4  # largest number of taps for which one backward launch has enough registers for all gradients
FORWARD_WARPS, BACKWARD_WARPS = 4, 8
BLOCK = 16 * BACKWARD_WARPS  # channels of a backward program, or of two; segments must be a multiple
_FORWARD_RANKS, _BACKWARD_RANKS = 64, 16  # the most ranks of U in one launch; larger ranks take several launches
_ROWS = 16  # rows of a warp, as in the matrix unit's instruction
# Sequences are joined only if this makes the estimated time at least this many times shorter: when joining did not fill
# the device better, it took 1.13 to 1.20 times as long.
_MIN_JOINING_GAIN = 1.25
SLOTS = 4  # slots of the forward ring; run lengths are multiples of it, and so of the other rings' 2 or 1 slots


def fits(x: Tensor, up: Tensor, segments: tuple[int, ...], silu: bool = False) -> bool:
    """Whether these kernels support the inputs, and silu if asked for. `lowrank` supports all inputs, but not silu."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and up.shape[1] <= MAX_WIDTH * x.shape[2]
        and x.shape[2] % 16 == 0
        # Silu needs the sum over all ranks in one launch, and registers for no more taps.
        and not (silu and (up.shape[0] > _BACKWARD_RANKS or up.shape[1] > _MAX_SILU_WIDTH * x.shape[2]))
        and (len(segments) == 1 or all(width % BLOCK == 0 for width in segments))
    )


@triton.jit(do_not_specialize=["time", "z_batch", "z_time"])
def _pad_kernel(
    z, out, size, time, z_batch, z_time,
    R: tl.constexpr, SEGMENTS: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rank, segment, token = at % RP, at // RP % SEGMENTS, at // (RP * SEGMENTS)
    source = z + token // time * z_batch + token % time * z_time + segment * R + rank
    value = tl.load(source, mask=(rank < R) & (at < size), other=0.0)
    tl.store(out + at, value, mask=at < size)


def padded(
    z: Tensor,  # [B, T, G*R]
    rank: int,
    dtype: torch.dtype,
) -> Tensor:  # [B, T, G*RP]
    """Each segment's columns, padded with zeros to RP, the next multiple of 16."""
    if rank % 16 == 0:
        return aligned(z if z.dtype == dtype else copied(z, dtype))
    batch, time, ranks = z.shape
    segments, whole = ranks // rank, triton.cdiv(rank, 16) * 16
    result = new(z, (batch, time, segments * whole), dtype)
    size = result.numel()
    launch(
        _pad_kernel,
        triton.cdiv(size, 1024),
        (z, result),
        (size, time, z.stride(0), z.stride(1)),
        {"R": rank, "SEGMENTS": segments, "RP": whole, "BLOCK": 1024},
    )
    return result


class Cut(NamedTuple):
    """How the kernels treat [B, T, ...]: as B sequences, or as one sequence of B documents of length T."""

    batch: int
    time: int
    # The kernels' `positions` argument is the last tensor or the first integer, so one of these tuples is empty:
    positions: tuple[Tensor | None, ...]
    length: tuple[int, ...]
    run: int  # slots of a row
    chunks: int  # number of parts of the time, one for each program


def cut_apart(
    x: Tensor,  # [B, T, ...]
    blocks: int,  # number of blocks of channels
    at_once: int,  # programs that a multiprocessor runs at the same time
    longest: int,  # longest run, in slots
) -> tuple[float, Cut]:
    """(estimated time in slots, how to cut) for treating the input as B sequences without documents."""
    batch, time = x.shape[:2]
    cost, run = cheapest_run(time, _ROWS, blocks * batch, multiprocessors(x), at_once, SLOTS, longest)
    return cost, Cut(batch, time, (None,), (), run, triton.cdiv(time, _ROWS * run))


def _cut(
    inputs: tuple[Tensor, ...],  # each [B, T, ...]
    positions: Tensor | None,  # [T + 1] int32: as in `reference.convolve`
    blocks: int,  # number of blocks of channels
    at_once: int,  # programs that a multiprocessor runs at the same time
    longest: int,  # longest run, in slots
) -> Cut:
    """Choose the faster way: B separate sequences, or all of them joined to one.

    Joining helps sequences that are too short to fill a program, and leaves fewer partial sums. It requires that the
    sequences lie one after the other in memory.
    """
    batch, time = inputs[0].shape[:2]
    cost, apart = cut_apart(inputs[0], blocks, at_once, longest)
    apart = apart._replace(positions=(positions,))
    if positions is not None or any(t.stride(0) != time * t.stride(1) for t in inputs) or batch * time >= 2**31:
        return apart
    cost_joined, run = cheapest_run(batch * time, _ROWS, blocks, multiprocessors(inputs[0]), at_once, SLOTS, longest)
    if cost <= _MIN_JOINING_GAIN * cost_joined:
        return apart
    return Cut(1, batch * time, (), (time,), run, triton.cdiv(batch * time, _ROWS * run))


def forward(
    x: Tensor,  # [B, T, D]
    z: Tensor,  # [B, T, G*R]
    up: Tensor,  # [R, W*D]
    static_w: Tensor | None,  # [W, D]
    positions: Tensor | None,  # [T + 1] int32: as in `reference.convolve`
    segments: tuple[int, ...],
    residual: bool,
    silu: bool,  # True only if it `fits`
    dtype: torch.dtype,
) -> Tensor:  # [B, T, D]
    """The result in `dtype`: x's dtype, or float32 if the caller is still to apply silu."""
    channels, rank = x.shape[2], up.shape[0]
    x = aligned(x)
    y = new(x, x.shape, dtype)
    blocks = triton.cdiv(channels, 16 * FORWARD_WARPS)
    generators = padded(z, rank, x.dtype)
    width = up.shape[1] // channels
    slots, stages, most = (SLOTS, 3, _FORWARD_RANKS) if width <= _TAPS_AT_ONCE else (1, 9, 32)  # registers are short
    for first in range(0, rank, most):
        ranks = min(rank - first, most)
        # Registers limit the programs per multiprocessor. Every program first loads its ranks of U, so more ranks
        # need longer runs.
        at_once, longest = (3, 32) if ranks <= 16 and width <= _TAPS_AT_ONCE else (2, 128)
        cut = _cut((x, generators), positions, blocks, at_once, longest)
        launch(
            kernels.forward_kernel,
            blocks * cut.batch * cut.chunks,
            (x, generators, up, None if first else static_w, y, None, None, None, y if first else None, *cut.positions),
            (*cut.length, cut.time, channels, x.stride(0), generators.stride(0), cut.chunks, blocks, cut.run, first),
            {
                "x_time": x.stride(1), "z_time": generators.stride(1), "y_time": channels, "SEGMENTS": segments,
                "PAIRS": 0,
                "ALL_RANKS": rank, "R": ranks, "W": width,
                "RESIDUAL": residual and first == 0, "SILU": silu,
                "SLOTS": slots, "STAGES": stages, "WARPS": FORWARD_WARPS,
            },
            num_warps=FORWARD_WARPS,
        )  # fmt: skip
    return y


def backward(
    dy: Tensor,  # [B, T, D]
    x: Tensor,  # [B, T, D]
    z: Tensor,  # [B, T, G*R]
    up: Tensor,  # [R, W*D]
    static_w: Tensor | None,  # [W, D]
    positions: Tensor | None,  # [T + 1] int32: as in `reference.convolve`
    segments: tuple[int, ...],
    residual: bool,
    silu: bool,
    needs: tuple[bool, bool, bool, bool],  # whether x, z, up and static_w require gradients
) -> tuple[Tensor | None, ...]:  # [B, T, D], [B, T, G*R], [R, W*D], [W, D]
    """The gradients of x, z, up and static_w, in their dtypes."""
    batch, time, channels = x.shape
    rank, width = up.shape[0], up.shape[1] // channels
    dy, x = aligned(dy), aligned(x)
    block, warps, blocks = BLOCK, BACKWARD_WARPS, triton.cdiv(channels, BLOCK)
    generators = padded(z, rank, x.dtype)
    cut = _cut((dy, x, generators), positions, blocks, at_once=1, longest=160)
    if 4 * blocks * cut.batch * cut.chunks <= 3 * multiprocessors(x):
        # Programs of half the channels, of which a multiprocessor runs two, reach those that would be idle. Where most
        # work, that is slower, because dz has twice as many partial sums.
        block, warps, blocks = BLOCK // 2, BACKWARD_WARPS // 2, triton.cdiv(channels, BLOCK // 2)
    dx = new_like(x) if needs[0] else None
    dz_partial, dz, columns = None, None, min(rank, 16)  # all launches share one dz_partial
    if needs[1]:
        # A segment with fewer blocks of channels than the widest one leaves parts of dz unwritten: start from zeros.
        parts, uneven = triton.cdiv(max(segments), block), min(segments) != max(segments)
        dz_partial = new(z, (parts, batch, time, len(segments) * columns), torch.float32, zero=uneven)
        dz = new_like(z)
    up_partial, dup = new_sums(up if needs[2] else None, cut.batch * cut.chunks)
    static_partial, dstatic = new_sums(static_w if needs[3] else None, cut.batch * cut.chunks)
    # With more than 4 taps, dx gets a launch of its own: what it takes does not fit in the registers beside the rest.
    outputs = [(dx, dz_partial, up_partial, static_partial)]
    if width > _TAPS_AT_ONCE:
        outputs = [(dx, None, None, None), (None, dz_partial, up_partial, static_partial)]
    outputs = [group for group in outputs if any(output is not None for output in group)]
    deep = silu or width > _TAPS_AT_ONCE  # 2 slots then need more registers; the ring must reach W - 1 slots ahead
    for first in range(0, rank, _BACKWARD_RANKS):
        ranks = min(rank - first, _BACKWARD_RANKS)
        for to_x, to_z, to_up, to_static in outputs:
            launch(
                kernels.backward_kernel,
                blocks * cut.batch * cut.chunks,
                (
                    dy, None, None, x, generators, up, None if first else static_w, None,
                    to_x, to_z, to_up, None if first else to_static, *cut.positions,
                ),
                (
                    *cut.length, cut.time, channels, batch * time, dy.stride(0), x.stride(0), generators.stride(0),
                    cut.chunks, blocks, cut.run, first,
                ),
                {
                    "dy_time": dy.stride(1), "x_time": x.stride(1), "z_time": generators.stride(1),
                    "dx_time": channels, "SEGMENTS": segments, "PAIRS": 0, "ALL_RANKS": rank, "R": ranks, "W": width,
                    "RESIDUAL": residual and first == 0, "SILU": silu, "ADD": first > 0,
                    "SLOTS": 1 if deep else 2, "STAGES": 8 if deep else 4, "WARPS": warps,
                },
                num_warps=warps,
            )  # fmt: skip
        others = [(up_partial, dup), (static_partial, dstatic)] if first + ranks == rank else []
        sum_parts((dz_partial, dz), *others, place=Place(columns, rank, first))
    return dx, dz, dup, dstatic
