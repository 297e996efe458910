"""The launches of the low-rank convolution of a projection's output: on NVIDIA tensor cores, for 16-bit inputs.

Shapes: B batch, T time, P parts of the channels (such as q, k and v), D channels of a part, W taps, R rank.
"""

from typing import NamedTuple

import triton
from torch import Tensor

from dynconv.ops import gated_backward_kernel, gated_kernels
from dynconv.ops import lowrank_mma as mma
from dynconv.ops import lowrank_mma_kernels as kernels
from dynconv.ops.launch import copied, launch, new
from dynconv.ops.tiles import Place, aligned, new_sums, sum_parts, three


class Tile(NamedTuple):
    """How a program works: on `slots` time steps of each row at once, with `stages` such groups in its ring buffer."""

    slots: int
    stages: int
    longest: int  # largest number of slots in a run


# The fastest of those tried on an H100 (B=8, T=4096, D=1024 and F=2752, Triton 3.6).
FORWARD_TILE = Tile(mma.SLOTS, 3, 24)
BACKWARD_TILE = Tile(2, 4, 160)
GATED_TILE = Tile(2, 4, 64)  # with more slots at once, the registers of both convolutions would spill
# The fastest of those tried on an H200, at the shapes of 300M, 16M and 1M; 8 warps on 2 slots take 9 to 27 % longer.
GATED_BACKWARD_TILE = Tile(1, 8, 160)
GATED_BACKWARD_WARPS = 4
_MAX_RANK, _MAX_WIDTH = 16, 4  # larger ones take several launches, of the unfused kernels
_MAX_PARTS = 3


def fits(joined: Tensor, up: Tensor, channels: int, parts: int) -> bool:
    """Whether these kernels support inputs [B, T, P*D or more] with filters of this basis."""
    taps = up.shape[1] // (parts * channels)
    supported = up.shape[0] <= _MAX_RANK and taps <= _MAX_WIDTH and channels % 16 == 0 and parts <= _MAX_PARTS
    whole = (parts * channels,)  # unlike elsewhere, segments need not be multiples of a program's block
    return supported and mma.fits(joined[..., : parts * channels], up, whole)


def forward(
    x: Tensor,  # [B, T, P*D]
    z: Tensor,  # [B, T, P*R], or P*16 with zeros after each R
    up: Tensor,  # [R, W*P*D]
    static_w: Tensor | None,  # [W, P*D]
    frequencies: Tensor | None,  # [E/2] float32, for RoPE on heads of E channels; only with three parts
    added: Tensor | None,  # [B, T, D], contiguous; only with one part
    parts: int,
    residual: bool,
) -> tuple[Tensor, ...]:  # [B, T, D] each
    """The parts after convolution. With frequencies the first two are rotated; `added` is added to the one part."""
    rank, channels = up.shape[0], x.shape[2] // parts
    x, z = aligned(x), _generated(z, rank, parts)
    added = None if added is None else aligned(added)
    results = tuple(new(x, (*x.shape[:2], channels), x.dtype) for _ in range(parts))
    blocks = parts * triton.cdiv(channels, 16 * mma.FORWARD_WARPS)
    _, cut = mma.cut_apart(x, blocks, at_once=3, longest=FORWARD_TILE.longest)
    launch(
        kernels.forward_kernel,
        blocks * cut.batch * cut.chunks,
        (x, z, up, static_w, *three(results), frequencies, added, None),
        (cut.time, parts * channels, x.stride(0), z.stride(0), cut.chunks, blocks, cut.run, 0),
        {
            "x_time": x.stride(1), "z_time": z.stride(1), "y_time": channels, "SEGMENTS": (channels,) * parts,
            "PAIRS": _pairs(frequencies), "ALL_RANKS": rank, "R": rank, "W": up.shape[1] // x.shape[2],
            "RESIDUAL": residual, "SILU": False,
            "SLOTS": FORWARD_TILE.slots, "STAGES": FORWARD_TILE.stages, "WARPS": mma.FORWARD_WARPS,
        },
        num_warps=mma.FORWARD_WARPS,
    )  # fmt: skip
    return results


def gated(
    x: Tensor,  # [B, T, 2*D]
    z: Tensor | None,  # [B, T, 2*R], or 2*16 with zeros after each R; without it and U, filters are static
    up: Tensor | None,  # [R, W*2*D]
    static_w: Tensor | None,  # [W, 2*D]
    dy: Tensor | None,  # [B, T, D]
    width: int,  # W
    residual: bool,
) -> tuple[Tensor, ...]:  # [B, T, D] each
    """silu of the first part after convolution times the second; or, with its gradient dy, the gradients of these."""
    rank, channels = 0 if up is None else up.shape[0], x.shape[2] // 2
    x, z = aligned(x), None if z is None else _generated(z, rank, 2)
    dy = None if dy is None else _whole(aligned(dy))
    results = tuple(new(x, (*x.shape[:2], channels), x.dtype) for _ in range(1 if dy is None else 2))
    blocks = triton.cdiv(channels, 16 * mma.FORWARD_WARPS)
    # Registers limit the programs of a multiprocessor; static filters take about half as many.
    _, cut = mma.cut_apart(x, blocks, at_once=2 if rank else 3, longest=GATED_TILE.longest)
    launch(
        gated_kernels.gated_kernel,
        blocks * cut.batch * cut.chunks,
        (x, z, up, static_w, dy, *((None, None, *results) if dy is None else (*results, None))),
        (cut.time, x.stride(0), 0 if z is None else z.stride(0), cut.chunks, blocks, cut.run),
        {
            "x_time": x.stride(1), "z_time": 0 if z is None else z.stride(1),
            "dy_time": 0 if dy is None else dy.stride(1), "CHANNELS": channels, "R": rank, "W": width,
            "RESIDUAL": residual,
            "SLOTS": GATED_TILE.slots, "STAGES": GATED_TILE.stages, "WARPS": mma.FORWARD_WARPS,
        },
        num_warps=mma.FORWARD_WARPS,
    )  # fmt: skip
    return results


def backward(
    dys: tuple[Tensor, ...],  # [B, T, D] each
    x: Tensor,  # [B, T, P*D]
    z: Tensor,  # [B, T, P*R], or P*16 with zeros after each R
    up: Tensor,  # [R, W*P*D]
    static_w: Tensor | None,  # [W, P*D]
    frequencies: Tensor | None,  # [E/2] float32
    residual: bool,
    columns: int,  # C: of `joined`, which holds x and then z
    needs: tuple[bool, bool, bool],  # whether `joined`, up and static_w require gradients
) -> tuple[Tensor | None, ...]:  # [B, T, C], [R, W*P*D], [W, P*D]
    """The gradients of `joined`, up and static_w."""
    batch, time, channels = dys[0].shape
    rank, parts = up.shape[0], len(dys)
    dys = tuple(aligned(dy) for dy in dys)
    if any(dy.stride() != dys[0].stride() for dy in dys):
        dys = tuple(copied(dy) for dy in dys)
    given = z.shape[2] // parts  # columns of `joined` for each generator
    x, z = aligned(x), _generated(z, rank, parts)
    in_part = triton.cdiv(channels, mma.BLOCK)
    _, cut = mma.cut_apart(x, parts * in_part, at_once=1, longest=BACKWARD_TILE.longest)
    djoined = new(x, (batch, time, columns), x.dtype) if needs[0] else None
    # Partial sums are in 16 bits, like their total: they are many bytes, and rounding them adds about as much to the
    # error as rounding the total.
    dz_partial = new(x, (in_part, batch, time, parts * rank), x.dtype) if needs[0] else None
    up_partial, dup = new_sums(up if needs[1] else None, cut.batch * cut.chunks)
    static_partial, dstatic = new_sums(static_w if needs[2] else None, cut.batch * cut.chunks)
    launch(
        kernels.backward_kernel,
        parts * in_part * cut.batch * cut.chunks,
        (
            *three(dys), x, z, up, static_w, frequencies,
            djoined, dz_partial, up_partial, static_partial, None,
        ),
        (
            cut.time, parts * channels, batch * time, dys[0].stride(0), x.stride(0), z.stride(0),
            cut.chunks, parts * in_part, cut.run, 0,
        ),
        {
            "dy_time": dys[0].stride(1), "x_time": x.stride(1), "z_time": z.stride(1), "dx_time": columns,
            "SEGMENTS": (channels,) * parts, "PAIRS": _pairs(frequencies), "ALL_RANKS": rank, "R": rank,
            "W": up.shape[1] // x.shape[2], "RESIDUAL": residual, "SILU": False, "ADD": False,
            "SLOTS": BACKWARD_TILE.slots, "STAGES": BACKWARD_TILE.stages, "WARPS": mma.BACKWARD_WARPS,
        },
        num_warps=mma.BACKWARD_WARPS,
    )  # fmt: skip
    first = parts * channels
    place = Place(parts * rank, columns, first, columns - first - parts * given, rank, given - rank)
    sum_parts((dz_partial, djoined), (up_partial, dup), (static_partial, dstatic), place=place)
    return djoined, dup, dstatic


def gated_backward(
    dy: Tensor,  # [B, T, D]
    x: Tensor,  # [B, T, 2*D]
    z: Tensor,  # [B, T, 2*R], or 2*16 with zeros after each R
    up: Tensor,  # [R, W*2*D]
    static_w: Tensor | None,  # [W, 2*D]
    residual: bool,
    columns: int,  # C: of `joined`, which holds x and then z
    needs: tuple[bool, bool, bool],  # whether `joined`, up and static_w require gradients
) -> tuple[Tensor | None, ...]:  # [B, T, C], [R, W*2*D], [W, 2*D]
    """The gradients of `joined`, up and static_w from that of `gated`."""
    batch, time, channels = dy.shape
    rank, given = up.shape[0], z.shape[2] // 2  # columns of `joined` for each generator
    dy, x, z = aligned(dy), aligned(x), _generated(z, rank, 2)
    blocks = triton.cdiv(channels, 8 * GATED_BACKWARD_WARPS)
    _, cut = mma.cut_apart(x, blocks, at_once=8 // GATED_BACKWARD_WARPS, longest=GATED_BACKWARD_TILE.longest)
    djoined = new(x, (batch, time, columns), x.dtype) if needs[0] else None
    dz_partial = new(x, (blocks, batch, time, 2 * rank), x.dtype) if needs[0] else None  # in 16 bits, as in `backward`
    up_partial, dup = new_sums(up if needs[1] else None, cut.batch * cut.chunks)
    static_partial, dstatic = new_sums(static_w if needs[2] else None, cut.batch * cut.chunks)
    launch(
        gated_backward_kernel.gated_backward_kernel,
        blocks * cut.batch * cut.chunks,
        (dy, x, z, up, static_w, djoined, dz_partial, up_partial, static_partial),
        (cut.time, batch * time, dy.stride(0), x.stride(0), z.stride(0), cut.chunks, blocks, cut.run),
        {
            "dy_time": dy.stride(1), "x_time": x.stride(1), "z_time": z.stride(1), "dx_time": columns,
            "CHANNELS": channels, "R": rank, "W": up.shape[1] // x.shape[2], "RESIDUAL": residual,
            "SLOTS": GATED_BACKWARD_TILE.slots, "STAGES": GATED_BACKWARD_TILE.stages, "WARPS": GATED_BACKWARD_WARPS,
        },
        num_warps=GATED_BACKWARD_WARPS,
    )  # fmt: skip
    place = Place(2 * rank, columns, 2 * channels, columns - 2 * (channels + given), rank, given - rank)
    sum_parts((dz_partial, djoined), (up_partial, dup), (static_partial, dstatic), place=place)
    return djoined, dup, dstatic


def _generated(z: Tensor, rank: int, parts: int) -> Tensor:  # [B, T, P*16]
    """The generators' outputs, each padded with zeros to 16 columns, unless they are padded already."""
    return aligned(z) if z.shape[2] == 16 * parts else mma.padded(z, rank, z.dtype)


def _whole(tensor: Tensor) -> Tensor:  # [B, T, ...]
    """The tensor, or a contiguous copy if the rows of all sequences are not equally far apart."""
    batch, time = tensor.shape[:2]
    return tensor if batch == 1 or tensor.stride(0) == time * tensor.stride(1) else copied(tensor)


def _pairs(frequencies: Tensor | None) -> int:
    """The number of pairs of channels in a head that RoPE rotates; 0 without RoPE."""
    return 0 if frequencies is None else len(frequencies)
