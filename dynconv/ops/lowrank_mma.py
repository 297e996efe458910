"""The low-rank convolution on NVIDIA tensor cores: which inputs fit, how the work is cut, and the launches.

Legend: B batch, T time, D channels, W taps, R rank (padded to 16), G segments.
"""

import functools

import torch
from torch import Tensor

from dynconv.ops import lowrank_mma_kernels as kernels
from dynconv.ops.tiles import ceil_div, multiprocessors, sum_parts

MAX_RANK = 16
MAX_WIDTH = 4
BLOCK = 128  # channels of a backward program; segments must be a multiple
_FORWARD_WARPS, _BACKWARD_WARPS = 4, 8
_ROWS = 16


def fits(x: Tensor, up: Tensor, segments: tuple[int, ...]) -> bool:
    """Whether these kernels take the inputs; `lowrank` has kernels for any."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and up.shape[0] <= MAX_RANK
        and up.shape[1] <= MAX_WIDTH * x.shape[2]
        and x.shape[2] % 16 == 0
        and (len(segments) == 1 or all(width % BLOCK == 0 for width in segments))
    )


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor, or a copy where its rows do not start at multiples of 16 bytes, which cp.async needs."""
    batch, time = tensor.stride()[:2]
    return tensor if (tensor.data_ptr() | batch * 2 | time * 2) % 32 == 0 else tensor.contiguous()


def _padded(z: Tensor, rank: int, dtype: torch.dtype) -> Tensor:
    """z with each segment's R columns padded to 16."""
    z = z.to(dtype)
    if rank == MAX_RANK:
        return _aligned(z)
    segments = z.unflatten(2, (-1, rank))
    return torch.nn.functional.pad(segments, (0, MAX_RANK - rank)).flatten(2)


@functools.cache
def _run(time: int, programs_a_chunk: int, at_once: int, longest: int) -> int:
    """Slots of a row: long runs load U less often (about 16 slots' worth of time), short ones fill the device."""
    runs = [longest >> halving for halving in range(longest.bit_length() - 3)]

    def cost(run: int) -> int:
        return ceil_div(programs_a_chunk * ceil_div(time, _ROWS * run), at_once) * (run + 16)

    return min(runs, key=cost)


def forward(
    x: Tensor,  # [B, T, D]
    z: Tensor,  # [B, T, G*R]
    up: Tensor,  # [R, W*D]
    static_w: Tensor | None,  # [W, D]
    segments: tuple[int, ...],
    residual: bool,
) -> Tensor:  # [B, T, D]
    """The result, in x's dtype."""
    batch, time, channels = x.shape
    x, z = _aligned(x), _padded(z, up.shape[0], x.dtype)
    y = x.new_empty(x.shape)
    warps = _FORWARD_WARPS
    blocks = ceil_div(channels, 16 * warps)
    run = _run(time, blocks * batch, 3 * multiprocessors(x), longest=32)
    chunks = ceil_div(time, _ROWS * run)
    kernels.forward_kernel[(blocks * batch * chunks,)](
        x, z, up, static_w, y,
        time, channels, x.stride(0), z.stride(0), chunks, blocks,
        x_time=x.stride(1), z_time=z.stride(1), y_time=channels, SEGMENTS=segments,
        R=up.shape[0], W=up.shape[1] // channels, STATIC=static_w is not None, RESIDUAL=residual,
        RUN=run, SLOTS=4, STAGES=3, WARPS=warps, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor,  # [B, T, D]
    x: Tensor,  # [B, T, D]
    z: Tensor,  # [B, T, G*R]
    up: Tensor,  # [R, W*D]
    static_w: Tensor | None,  # [W, D]
    segments: tuple[int, ...],
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # [B, T, D], [B, T, G*R], [R, W*D], [W, D]
    """The gradients of x, z, up and static_w, in their dtypes."""
    batch, time, channels = x.shape
    rank, width = up.shape[0], up.shape[1] // channels
    dz = z.new_empty(z.shape)
    dy, x, z = _aligned(dy), _aligned(x), _padded(z, rank, x.dtype)
    warps = _BACKWARD_WARPS
    blocks = ceil_div(channels, 16 * warps)
    run = _run(time, blocks * batch, multiprocessors(x), longest=128)
    chunks = ceil_div(time, _ROWS * run)
    dx = x.new_empty(x.shape)
    dup = up.new_empty(up.shape)
    parts = ceil_div(max(segments), 16 * warps)
    new_partial = x.new_zeros if min(segments) != max(segments) else x.new_empty
    dz_partial = new_partial((parts, batch * time, dz.shape[2]), dtype=torch.float32)
    up_partial = x.new_empty((batch * chunks, rank, width * channels), dtype=torch.float32)
    jobs = [(dz_partial, dz), (up_partial, dup)]
    dstatic = static_partial = None
    if static_w is not None:
        dstatic = static_w.new_empty(static_w.shape)
        static_partial = x.new_empty((batch * chunks, width, channels), dtype=torch.float32)
        jobs.append((static_partial, dstatic))
    kernels.backward_kernel[(blocks * batch * chunks,)](
        dy, x, z, up, static_w, dx, dz_partial, up_partial, static_partial,
        time, channels, batch * time, dy.stride(0), x.stride(0), z.stride(0), chunks, blocks,
        dy_time=dy.stride(1), x_time=x.stride(1), z_time=z.stride(1), dx_time=channels, SEGMENTS=segments,
        R=rank, W=width, STATIC=static_w is not None, RESIDUAL=residual,
        RUN=run, SLOTS=2, STAGES=4, WARPS=warps, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    sum_parts(*jobs)
    return dx, dz, dup, dstatic
