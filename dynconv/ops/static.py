"""The static convolution in Triton. Legend: B batch, T time, D channels, W taps."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynconv.ops.launch import launch, new
from dynconv.ops.optional import ring, ring_fits
from dynconv.ops.tiles import (
    drop_first,
    end_of_documents,
    load_positions,
    load_slot,
    load_slots,
    load_static,
    multiprocessors,
    new_like,
    new_sums,
    sum_parts,
)


@triton.jit(do_not_specialize=["time", "tiles"])
def _forward_kernel(
    x, weight, y, positions,
    time, channels, x_batch, tiles, x_time: tl.constexpr, y_time: tl.constexpr,
    W: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BD)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    d_ok = d < channels
    program = tl.program_id(0) // blocks
    batch = (program // tiles).to(tl.int64)
    start = (program % tiles) * (ROWS * SLOTS)
    rows = tl.arange(0, ROWS) * SLOTS
    limit = time - start - rows
    reach = end_of_documents(positions, time) - start - rows
    x += batch * x_batch + start.to(tl.int64) * x_time
    inputs = load_slots(x + rows[:, None] * x_time + d[None, :], 1 - W, SLOTS, x_time, -start - rows, reach, d_ok)
    if positions is not None:
        position = load_positions(positions + start, rows, SLOTS, time - start)
    taps = load_static(weight, channels, d, d_ok, W)
    out = y + (batch * time + start) * y_time + rows[:, None] * y_time + d[None, :]
    for slot in tl.static_range(SLOTS):
        if RESIDUAL:
            result = inputs[slot + W - 1].to(tl.float32)
        else:
            result = tl.zeros([ROWS, BD], tl.float32)
        for tap in tl.static_range(W):
            product = taps[tap] * inputs[slot + W - 1 - tap].to(tl.float32)
            if positions is not None:
                product = tl.where((position[slot] >= tap)[:, None], product, 0.0)
            result += product
        tl.store(out + slot * y_time, result, mask=(slot < limit)[:, None] & d_ok[None, :])


@triton.jit(do_not_specialize=["time", "chunks", "tiles"])
def _backward_kernel(
    dy, x, weight, dx, dweight, positions,
    time, channels, dy_batch, x_batch, chunks, tiles,
    dy_time: tl.constexpr, x_time: tl.constexpr, dx_time: tl.constexpr,
    W: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, AHEAD: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BD)
    d = (tl.program_id(0) % blocks) * BD + tl.arange(0, BD)
    d_ok = d < channels
    program = tl.program_id(0) // blocks
    batch = (program // chunks).to(tl.int64)
    chunk = program % chunks
    rows = tl.arange(0, ROWS) * SLOTS
    taps = load_static(weight, channels, d, d_ok, W)
    end = end_of_documents(positions, time)
    sums = ()
    if dweight is not None:
        for _ in tl.static_range(W):
            sums = sums + (tl.zeros([ROWS, BD], tl.float32),)
    for tile in range(chunk * tiles, chunk * tiles + tiles):
        start = tile * (ROWS * SLOTS)
        last = time - start
        limit = last - rows
        reach = end - start - rows
        xs = x + batch * x_batch + start.to(tl.int64) * x_time + rows[:, None] * x_time + d[None, :]
        dys = dy + batch * dy_batch + start.to(tl.int64) * dy_time + rows[:, None] * dy_time + d[None, :]
        if dx is not None:
            out = dx + (batch * time + start) * dx_time + rows[:, None] * dx_time + d[None, :]
        inputs = load_slots(xs, 1 - W, AHEAD, x_time, -start - rows, reach, d_ok)
        grads = load_slots(dys, 0, W - 1 + AHEAD, dy_time, -start - rows, reach, d_ok)
        if positions is not None:
            position = load_positions(positions + start, rows, SLOTS + W - 1, last)
        for slot in tl.static_range(SLOTS):
            inputs = inputs + (load_slot(xs, slot + AHEAD, x_time, reach, d_ok),)
            grads = grads + (load_slot(dys, slot + W - 1 + AHEAD, dy_time, reach, d_ok),)
            gradient = grads[0].to(tl.float32)
            if RESIDUAL:
                result = gradient
            else:
                result = tl.zeros([ROWS, BD], tl.float32)
            new_sums = ()
            for tap in tl.static_range(W):
                back = taps[tap] * grads[tap].to(tl.float32)
                product = gradient * inputs[W - 1 - tap].to(tl.float32)
                if positions is not None:
                    back = tl.where((position[slot + tap] >= tap)[:, None], back, 0.0)
                    product = tl.where((position[slot] >= tap)[:, None], product, 0.0)
                result += back
                if dweight is not None:
                    new_sums = new_sums + (sums[tap] + product,)
            sums = new_sums
            if dx is not None:
                tl.store(out + slot * dx_time, result, mask=(slot < limit)[:, None] & d_ok[None, :])
            inputs = drop_first(inputs, W + AHEAD)
            grads = drop_first(grads, W + AHEAD)
    if dweight is not None:
        for tap in tl.static_range(W):
            at = (program * W + tap).to(tl.int64) * channels + d
            tl.store(dweight + at, tl.sum(sums[tap], 0), mask=d_ok)


def forward(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [W, D]
    positions: Tensor | None,  # [T + 1] int32: as in `reference.convolve`
    residual: bool,
    silu: bool,  # True only if `ring_fits`
    dtype: torch.dtype,
) -> Tensor:  # [B, T, D]
    """The result in `dtype`: x's dtype, or float32 if the caller is still to apply silu."""
    if ring_fits(x, None, weight.shape[0]) and (silu or positions is not None):
        return ring.forward(x, None, weight, positions, weight.shape[0], residual, silu)
    batch, time, channels = x.shape
    y = new(x, x.shape, dtype)
    slots, columns = 8, min(256, max(16, triton.next_power_of_2(channels)))
    programs = triton.cdiv(channels, columns) * batch * triton.cdiv(time, 2 * slots)
    rows = 1 if programs < 8 * multiprocessors(x) else 2  # more programs, where they would not fill the device
    tiles = triton.cdiv(time, rows * slots)
    launch(
        _forward_kernel,
        triton.cdiv(channels, columns) * batch * tiles,
        (x, weight, y, positions),
        (time, channels, x.stride(0), tiles),
        {
            "x_time": x.stride(1), "y_time": channels,
            "W": weight.shape[0], "RESIDUAL": residual,
            "ROWS": rows, "SLOTS": slots, "BD": columns,
        },
    )  # fmt: skip
    return y


def backward(
    dy: Tensor,  # [B, T, D]
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [W, D]
    positions: Tensor | None,  # [T + 1] int32: as in `reference.convolve`
    residual: bool,
    silu: bool,
    needs: tuple[bool, bool],  # whether x and weight require gradients
) -> tuple[Tensor | None, Tensor | None]:  # [B, T, D], [W, D]
    """The gradients of x and weight, in their dtypes."""
    if ring_fits(x, None, weight.shape[0]):
        wanted = (needs[0], False, needs[1])
        dx, _, dweight = ring.backward(dy, x, None, weight, positions, weight.shape[0], residual, silu, wanted)
        return dx, dweight
    batch, time, channels = x.shape
    width = weight.shape[0]
    rows, slots, columns = 2, 16, min(256, max(16, triton.next_power_of_2(channels)))
    blocks = triton.cdiv(channels, columns)
    tiles = triton.cdiv(time, rows * slots)
    chunks = min(tiles, triton.cdiv(4 * multiprocessors(x), blocks * batch))
    per_chunk = triton.cdiv(tiles, chunks)
    chunks = triton.cdiv(tiles, per_chunk)
    dx = new_like(x) if needs[0] else None
    partial, dweight = new_sums(weight if needs[1] else None, batch * chunks)
    launch(
        _backward_kernel,
        blocks * batch * chunks,
        (dy, x, weight, dx, partial, positions),
        (time, channels, dy.stride(0), x.stride(0), chunks, per_chunk),
        {
            "dy_time": dy.stride(1), "x_time": x.stride(1), "dx_time": channels,
            "W": width, "RESIDUAL": residual,
            "ROWS": rows, "SLOTS": slots, "AHEAD": 2, "BD": columns,
        },
    )  # fmt: skip
    sum_parts((partial, dweight))
    return dx, dweight
