"""The low-rank convolution on NVIDIA tensor cores: which inputs fit, how the work is cut, and the launches.

Legend: B batch, T time, D channels, W taps, R rank (padded to 16), G segments.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynconv.ops import lowrank_mma_kernels as kernels
from dynconv.ops.launch import launch
from dynconv.ops.tiles import aligned, ceil_div, multiprocessors, new_like, new_sums, run_length, sum_parts

RANKS = 16  # of one launch
MAX_WIDTH = 4
BLOCK = 128  # channels of a backward program; segments must be a multiple
_FORWARD_WARPS, _BACKWARD_WARPS = 4, 8
_ROWS = 16


def fits(x: Tensor, up: Tensor, segments: tuple[int, ...]) -> bool:
    """Whether these kernels take the inputs; `lowrank` has kernels for any."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and up.shape[1] <= MAX_WIDTH * x.shape[2]
        and x.shape[2] % 16 == 0
        and (len(segments) == 1 or all(width % BLOCK == 0 for width in segments))
    )


@triton.jit
def _pad_kernel(
    z, out, size, time, z_batch, z_time,
    R: tl.constexpr, USED: tl.constexpr, SEGMENTS: tl.constexpr, RP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rank, segment, token = at % RP, at // RP % SEGMENTS, at // (RP * SEGMENTS)
    source = z + token // time * z_batch + token % time * z_time + segment * R + rank
    value = tl.load(source, mask=(rank < USED) & (at < size), other=0.0)
    tl.store(out + at, value, mask=at < size)


def _padded(
    z: Tensor,  # [B, T, G*R]
    rank: int,
    first: int,
    dtype: torch.dtype,
) -> Tensor:  # [B, T, G*16]
    """Of each segment's columns the 16 from `first` on, padded with zeros."""
    if rank == RANKS:
        return aligned(z.to(dtype))
    batch, time, ranks = z.shape
    segments = ranks // rank
    padded = z.new_empty((batch, time, segments * RANKS), dtype=dtype)
    size = padded.numel()
    launch(
        _pad_kernel,
        ceil_div(size, 1024),
        (z[..., first:], padded),
        (size, time, z.stride(0), z.stride(1)),
        {"R": rank, "USED": min(RANKS, rank - first), "SEGMENTS": segments, "RP": RANKS, "BLOCK": 1024},
    )
    return padded


def forward(
    x: Tensor,  # [B, T, D]
    z: Tensor,  # [B, T, G*R]
    up: Tensor,  # [R, W*D]
    static_w: Tensor | None,  # [W, D]
    positions: Tensor | None,  # [T] int32: each token's place in its document
    segments: tuple[int, ...],
    residual: bool,
) -> Tensor:  # [B, T, D]
    """The result, in x's dtype; R is at most `RANKS`."""
    batch, time, channels = x.shape
    rank, width = up.shape[0], up.shape[1] // channels
    x = aligned(x)
    y = new_like(x)
    blocks = ceil_div(channels, 16 * _FORWARD_WARPS)
    run = run_length(time, _ROWS, blocks * batch, 3 * multiprocessors(x), shortest=8, longest=32)
    chunks = ceil_div(time, _ROWS * run)
    padded = _padded(z, rank, 0, x.dtype)
    launch(
        kernels.forward_kernel,
        blocks * batch * chunks,
        (x, padded, up, static_w, y, positions),
        (time, channels, x.stride(0), padded.stride(0), chunks, blocks),
        {
            "x_time": x.stride(1), "z_time": padded.stride(1), "y_time": channels, "SEGMENTS": segments,
            "R": rank, "W": width, "RESIDUAL": residual,
            "RUN": run, "SLOTS": 4, "STAGES": 3, "WARPS": _FORWARD_WARPS,
        },
        num_warps=_FORWARD_WARPS,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor,  # [B, T, D]
    x: Tensor,  # [B, T, D]
    z: Tensor,  # [B, T, G*R]
    up: Tensor,  # [R, W*D]
    static_w: Tensor | None,  # [W, D]
    positions: Tensor | None,  # [T] int32
    segments: tuple[int, ...],
    residual: bool,
    needs: tuple[bool, bool, bool],  # whether z, up and static_w want gradients
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # [B, T, D], [B, T, G*R], [R, W*D], [W, D]
    """The gradients of x, z, up and static_w, in their dtypes."""
    batch, time, channels = x.shape
    rank, width = up.shape[0], up.shape[1] // channels
    dy, x = aligned(dy), aligned(x)
    blocks = ceil_div(channels, 16 * _BACKWARD_WARPS)
    run = run_length(time, _ROWS, blocks * batch, multiprocessors(x), shortest=8, longest=128)
    chunks = ceil_div(time, _ROWS * run)
    dx = new_like(x)
    # segments of fewer blocks than the widest leave parts of dz unwritten
    uneven = min(segments) != max(segments)
    dz_partial, dz = new_sums(z if needs[0] else None, ceil_div(max(segments), 16 * _BACKWARD_WARPS), zero=uneven)
    static_partial, dstatic = new_sums(static_w if needs[2] else None, batch * chunks)
    dup = new_like(up) if needs[1] else None
    for first in range(0, rank, RANKS):
        padded = _padded(z, rank, first, x.dtype)
        basis = up[first : first + RANKS]
        up_partial, _ = new_sums(basis if needs[1] else None, batch * chunks)
        launch(
            kernels.backward_kernel,
            blocks * batch * chunks,
            (
                dy, x, padded, basis, None if first else static_w, dx,
                None if dz_partial is None else dz_partial[..., first:], up_partial,
                None if first else static_partial, positions,
            ),
            (time, channels, batch * time, dy.stride(0), x.stride(0), padded.stride(0), chunks, blocks),
            {
                "dy_time": dy.stride(1), "x_time": x.stride(1), "z_time": padded.stride(1), "dx_time": channels,
                "SEGMENTS": segments, "ALL_RANKS": rank, "R": basis.shape[0], "W": width,
                "RESIDUAL": residual and first == 0, "ADD": first > 0,
                "RUN": run, "SLOTS": 2, "STAGES": 4, "WARPS": _BACKWARD_WARPS,
            },
            num_warps=_BACKWARD_WARPS,
        )  # fmt: skip
        last = first + RANKS >= rank
        sum_parts(
            (up_partial, None if dup is None else dup[first : first + RANKS]),
            (dz_partial if last else None, dz),
            (static_partial if last else None, dstatic),
        )
    return dx, dz, dup, dstatic
