"""The launches of the low-rank convolution of queries, keys and values with RoPE: on NVIDIA tensor cores, 16-bit.

Shapes: B batch, T time, D channels of the queries, and of the keys, and of the values; W taps, R rank.
"""

import torch
import triton
from torch import Tensor

from dynconv.ops import lowrank_mma as mma
from dynconv.ops import lowrank_mma_kernels as kernels
from dynconv.ops.launch import copied, launch, new
from dynconv.ops.tiles import Place, aligned, new_sums, sum_parts

_MAX_RANK = 16  # larger ranks take several launches


def fits(x: Tensor, up: Tensor, channels: int) -> bool:
    """Whether these kernels support inputs [B, T, 3*D or more] with filters of this basis, and D channels."""
    convolved = x[..., : 3 * channels]
    return up.shape[0] <= _MAX_RANK and channels % mma.BLOCK == 0 and mma.fits(convolved, up, (channels,) * 3)


def forward(
    x: Tensor,  # [B, T, 3*D]
    z: Tensor,  # [B, T, 3*R]
    up: Tensor,  # [R, W*3*D]
    static_w: Tensor | None,  # [W, 3*D]
    frequencies: Tensor,  # [E/2] float32, for heads of E channels
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, D] each
    """Queries and keys after convolution and RoPE, and values after convolution."""
    rank, channels = up.shape[0], x.shape[2] // 3
    x, z = aligned(x), mma.padded(z, rank, x.dtype)
    q, k, v = (new(x, (*x.shape[:2], channels), x.dtype) for _ in range(3))
    blocks = triton.cdiv(3 * channels, 16 * mma.FORWARD_WARPS)
    _, cut = mma.cut_apart(x, blocks, at_once=3, longest=32)
    launch(
        kernels.forward_kernel,
        blocks * cut.batch * cut.chunks,
        (x, z, up, static_w, q, k, v, frequencies, None),
        (cut.time, 3 * channels, x.stride(0), z.stride(0), cut.chunks, blocks, cut.run, 0),
        {
            "x_time": x.stride(1), "z_time": z.stride(1), "y_time": channels, "SEGMENTS": (channels,) * 3,
            "PAIRS": len(frequencies), "ALL_RANKS": rank, "R": rank, "W": up.shape[1] // x.shape[2],
            "RESIDUAL": residual, "SILU": False, "ADD": False,
            "SLOTS": mma.SLOTS, "STAGES": 3, "WARPS": mma.FORWARD_WARPS,
        },
        num_warps=mma.FORWARD_WARPS,
    )  # fmt: skip
    return q, k, v


def backward(
    dq: Tensor,  # [B, T, D]
    dk: Tensor,  # [B, T, D]
    dv: Tensor,  # [B, T, D]
    x: Tensor,  # [B, T, 3*D]
    z: Tensor,  # [B, T, 3*R]
    up: Tensor,  # [R, W*3*D]
    static_w: Tensor | None,  # [W, 3*D]
    frequencies: Tensor,  # [E/2] float32
    residual: bool,
    columns: int,  # C: of `joined`, which holds x and then z
    needs: tuple[bool, bool, bool],  # whether `joined`, up and static_w require gradients
) -> tuple[Tensor | None, ...]:  # [B, T, C], [R, W*3*D], [W, 3*D]
    """The gradients of `joined`, up and static_w."""
    batch, time, channels = dq.shape
    rank = up.shape[0]
    if dq.stride() != dk.stride() or dq.stride() != dv.stride():
        dq, dk, dv = copied(dq), copied(dk), copied(dv)
    dq, dk, dv = (aligned(gradient) for gradient in (dq, dk, dv))
    if dq.stride() != dk.stride() or dq.stride() != dv.stride():  # `aligned` copied some of them
        dq, dk, dv = copied(dq), copied(dk), copied(dv)
    x, z = aligned(x), mma.padded(z, rank, x.dtype)
    blocks = triton.cdiv(3 * channels, mma.BLOCK)
    _, cut = mma.cut_apart(x, blocks, at_once=1, longest=160)
    djoined = new(x, (batch, time, columns), x.dtype) if needs[0] else None
    parts = channels // mma.BLOCK
    dz_partial = new(x, (parts, batch, time, 3 * rank), torch.float32) if needs[0] else None
    up_partial, dup = new_sums(up if needs[1] else None, cut.batch * cut.chunks)
    static_partial, dstatic = new_sums(static_w if needs[2] else None, cut.batch * cut.chunks)
    launch(
        kernels.backward_kernel,
        blocks * cut.batch * cut.chunks,
        (
            dq, dk, dv, x, z, up, static_w, frequencies,
            djoined, dz_partial, up_partial, static_partial, None,
        ),
        (
            cut.time, 3 * channels, batch * time, dq.stride(0), x.stride(0), z.stride(0),
            cut.chunks, blocks, cut.run, 0,
        ),
        {
            "dy_time": dq.stride(1), "x_time": x.stride(1), "z_time": z.stride(1), "dx_time": columns,
            "SEGMENTS": (channels,) * 3, "PAIRS": len(frequencies), "ALL_RANKS": rank, "R": rank,
            "W": up.shape[1] // x.shape[2], "RESIDUAL": residual, "SILU": False, "ADD": False,
            "SLOTS": 2, "STAGES": 4, "WARPS": mma.BACKWARD_WARPS,
        },
        num_warps=mma.BACKWARD_WARPS,
    )  # fmt: skip
    place = Place(3 * rank, columns, 3 * channels, columns - 3 * channels - 3 * rank)
    sum_parts((dz_partial, djoined), (up_partial, dup), (static_partial, dstatic), place=place)
    return djoined, dup, dstatic
