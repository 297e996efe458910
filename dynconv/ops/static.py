"""The static convolution in Triton. Legend: B batch, T time, D channels, W taps."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynconv.ops.tiles import load_positions, load_slots, multiprocessors, sum_parts


@triton.jit
def _forward_kernel(
    x, weight, y, positions,
    time, channels, x_batch, x_time, tiles,
    W: tl.constexpr, RESIDUAL: tl.constexpr, PACKED: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BD)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    d_ok = d < channels
    program = tl.program_id(0) // blocks
    batch = (program // tiles).to(tl.int64)
    start = (program % tiles) * (ROWS * SLOTS)
    rows = tl.arange(0, ROWS) * SLOTS
    inputs = load_slots(
        x + batch * x_batch + start.to(tl.int64) * x_time, rows, x_time, d, d_ok,
        1 - W, SLOTS, -start, time - start,
    )  # fmt: skip
    if PACKED:
        position = load_positions(positions + start, rows, SLOTS, time - start)
    y += (batch * time + start) * channels
    for slot in tl.static_range(SLOTS):
        if RESIDUAL:
            result = inputs[slot + W - 1].to(tl.float32)
        else:
            result = tl.zeros([ROWS, BD], tl.float32)
        for tap in tl.static_range(W):
            taps = tl.load(weight + tap * channels + d, mask=d_ok, other=0.0).to(tl.float32)
            product = taps[None, :] * inputs[slot + W - 1 - tap].to(tl.float32)
            if PACKED:
                product = tl.where((position[slot] >= tap)[:, None], product, 0.0)
            result += product
        ok = (rows + slot < time - start)[:, None] & d_ok[None, :]
        tl.store(y + (rows + slot)[:, None] * channels + d[None, :], result, mask=ok)


@triton.jit
def _backward_kernel(
    dy, x, weight, dx, dweight, positions,
    time, channels, dy_batch, dy_time, x_batch, x_time, chunks, tiles,
    W: tl.constexpr, RESIDUAL: tl.constexpr, PACKED: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BD)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    d_ok = d < channels
    program = tl.program_id(0) // blocks
    batch = (program // chunks).to(tl.int64)
    chunk = program % chunks
    rows = tl.arange(0, ROWS) * SLOTS
    sums = ()
    for _ in tl.static_range(W):
        sums = sums + (tl.zeros([ROWS, BD], tl.float32),)
    for tile in range(chunk * tiles, chunk * tiles + tiles):
        start = tile * (ROWS * SLOTS)
        inputs = load_slots(
            x + batch * x_batch + start.to(tl.int64) * x_time, rows, x_time, d, d_ok,
            1 - W, SLOTS, -start, time - start,
        )  # fmt: skip
        grads = load_slots(
            dy + batch * dy_batch + start.to(tl.int64) * dy_time, rows, dy_time, d, d_ok,
            0, SLOTS + W - 1, -start, time - start,
        )  # fmt: skip
        if PACKED:
            position = load_positions(positions + start, rows, SLOTS + W - 1, time - start)
        for slot in tl.static_range(SLOTS):
            if RESIDUAL:
                result = grads[slot].to(tl.float32)
            else:
                result = tl.zeros([ROWS, BD], tl.float32)
            new_sums = ()
            for tap in tl.static_range(W):
                taps = tl.load(weight + tap * channels + d, mask=d_ok, other=0.0).to(tl.float32)
                back = taps[None, :] * grads[slot + tap].to(tl.float32)
                product = grads[slot].to(tl.float32) * inputs[slot + W - 1 - tap].to(tl.float32)
                if PACKED:
                    back = tl.where((position[slot + tap] >= tap)[:, None], back, 0.0)
                    product = tl.where((position[slot] >= tap)[:, None], product, 0.0)
                result += back
                new_sums = new_sums + (sums[tap] + product,)
            sums = new_sums
            ok = (rows + slot < time - start)[:, None] & d_ok[None, :]
            at = (batch * time + start) * channels + (rows + slot)[:, None] * channels + d[None, :]
            tl.store(dx + at, result, mask=ok)
    for tap in tl.static_range(W):
        at = (program * W + tap).to(tl.int64) * channels + d
        tl.store(dweight + at, tl.sum(sums[tap], 0), mask=d_ok)


def forward(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [W, D]
    positions: Tensor | None,  # [T] int32: each token's place in its document
    residual: bool,
) -> Tensor:  # [B, T, D]
    """The result, in x's dtype."""
    batch, time, channels = x.shape
    y = x.new_empty(x.shape)
    rows, slots, columns = 4, 8, min(256, triton.next_power_of_2(channels))
    tiles = triton.cdiv(time, rows * slots)
    _forward_kernel[(triton.cdiv(channels, columns) * batch * tiles,)](
        x, weight, y, positions, time, channels, x.stride(0), x.stride(1), tiles,
        W=weight.shape[0], RESIDUAL=residual, PACKED=positions is not None,
        ROWS=rows, SLOTS=slots, BD=columns, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor,  # [B, T, D]
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [W, D]
    positions: Tensor | None,  # [T] int32
    residual: bool,
) -> tuple[Tensor, Tensor]:  # [B, T, D], [W, D]
    """The gradients of x and weight, in their dtypes."""
    batch, time, channels = x.shape
    width = weight.shape[0]
    rows, slots, columns = 4, 4, min(256, triton.next_power_of_2(channels))
    blocks = triton.cdiv(channels, columns)
    tiles = triton.cdiv(time, rows * slots)
    chunks = min(tiles, triton.cdiv(8 * multiprocessors(x), blocks * batch))
    per_chunk = triton.cdiv(tiles, chunks)
    chunks = triton.cdiv(tiles, per_chunk)
    dx = x.new_empty(x.shape)
    dweight = torch.empty_like(weight)
    partial = x.new_empty((batch * chunks, width, channels), dtype=torch.float32)
    _backward_kernel[(blocks * batch * chunks,)](
        dy, x, weight, dx, partial, positions,
        time, channels, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), chunks, per_chunk,
        W=width, RESIDUAL=residual, PACKED=positions is not None,
        ROWS=rows, SLOTS=slots, BD=columns, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    sum_parts((partial, dweight))
    return dx, dweight
