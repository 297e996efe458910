"""The head-wise dynamic convolution in Triton. Legend: B batch, T time, D channels, H heads, W taps.

A tile's channels are HEADS whole heads. Each head's D/H channels are padded to HP, the next power of two. The taps of
all heads of a token are loaded as one vector, with W padded to WP, and split into single taps in registers.
"""

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


@triton.jit
def _split_taps(flat, ROWS: tl.constexpr, HEADS: tl.constexpr, WP: tl.constexpr):
    """[ROWS, HEADS * WP] -> the WP taps, each [ROWS, HEADS]."""
    if WP == 1:
        taps = (flat,)
    elif WP == 2:
        taps = tl.split(flat.reshape(ROWS, HEADS, 2))
    elif WP == 4:
        even, odd = tl.split(flat.reshape(ROWS, HEADS, 2, 2))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        taps = (a, b, c, d)
    else:
        tl.static_assert(WP == 8, "at most 8 taps")
        even, odd = tl.split(flat.reshape(ROWS, HEADS, 2, 2, 2))
        even_low, even_high = tl.split(even)
        odd_low, odd_high = tl.split(odd)
        a, e = tl.split(even_low)
        c, g = tl.split(even_high)
        b, f = tl.split(odd_low)
        d, h = tl.split(odd_high)
        taps = (a, b, c, d, e, f, g, h)
    return taps


@triton.jit
def _join_taps(taps, ROWS: tl.constexpr, HEADS: tl.constexpr, WP: tl.constexpr):
    """The WP taps, each [ROWS, HEADS] -> [ROWS, HEADS * WP]."""
    if WP == 1:
        flat = taps[0]
    elif WP == 2:
        flat = tl.join(taps[0], taps[1])
    elif WP == 4:
        flat = tl.join(tl.join(taps[0], taps[2]), tl.join(taps[1], taps[3]))
    else:
        even = tl.join(tl.join(taps[0], taps[4]), tl.join(taps[2], taps[6]))
        odd = tl.join(tl.join(taps[1], taps[5]), tl.join(taps[3], taps[7]))
        flat = tl.join(even, odd)
    return flat.reshape(ROWS, HEADS * WP)


@triton.jit
def _per_channel(tap, ROWS: tl.constexpr, HEADS: tl.constexpr, HP: tl.constexpr):
    """[ROWS, HEADS] -> [ROWS, HEADS * HP]: every channel gets its head's coefficient, in float32."""
    if HP == 1:
        spread = tap.to(tl.float32)
    else:
        spread = tl.broadcast_to(tap.to(tl.float32)[:, :, None], (ROWS, HEADS, HP)).reshape(ROWS, HEADS * HP)
    return spread


@triton.jit
def _per_head(product, ROWS: tl.constexpr, HEADS: tl.constexpr, HP: tl.constexpr):
    """[ROWS, HEADS * HP] -> [ROWS, HEADS]: the sum over each head's channels."""
    if HP == 1:
        total = product
    else:
        total = tl.sum(product.reshape(ROWS, HEADS, HP), 2)
    return total


@triton.jit
def _columns(head, head_size, channels, HEADS: tl.constexpr, HP: tl.constexpr):
    """The channels of a block of heads, and which of them exist."""
    column = tl.arange(0, HEADS * HP)
    if head_size == HP:
        d = head * HP + column
        d_ok = d < channels
    else:
        d = (head + column // HP) * head_size + column % HP
        d_ok = (column % HP < head_size) & (d < channels)
    return d, d_ok


@triton.jit(do_not_specialize=["time", "tiles"])
def _forward_kernel(
    x, weight, static_w, y, positions,
    time, channels, x_batch, weight_batch, tiles,
    x_time: tl.constexpr, weight_time: tl.constexpr, weight_head: tl.constexpr, y_time: tl.constexpr,
    head_size: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr, HP: tl.constexpr,
):  # fmt: skip
    heads = channels // head_size
    blocks = tl.cdiv(heads, HEADS)
    head = (tl.program_id(0) % blocks) * HEADS
    d, d_ok = _columns(head, head_size, channels, HEADS, HP)
    program = tl.program_id(0) // blocks
    batch = (program // tiles).to(tl.int64)
    start = (program % tiles) * (ROWS * SLOTS)
    rows = tl.arange(0, ROWS) * SLOTS
    limit = time - start - rows
    reach = end_of_documents(positions, time) - start - rows
    x += batch * x_batch + start.to(tl.int64) * x_time
    inputs = load_slots(x + rows[:, None] * x_time + d[None, :], 1 - W, SLOTS, x_time, -start - rows, reach, d_ok)
    coefficient = tl.arange(0, HEADS * WP)
    coefficient_ok = (head + coefficient // WP < heads) & (coefficient % WP < W)
    weight_at = (head + coefficient // WP) * weight_head + coefficient % WP
    weight += batch * weight_batch + start.to(tl.int64) * weight_time
    filters = load_slots(
        weight + rows[:, None] * weight_time + weight_at[None, :],
        0, SLOTS, weight_time, -start - rows, reach, coefficient_ok,
    )  # fmt: skip
    if positions is not None:
        position = load_positions(positions + start, rows, SLOTS, time - start)
    static = ()
    if static_w is not None:
        static = load_static(static_w, channels, d, d_ok, W)
    out = y + (batch * time + start) * y_time + rows[:, None] * y_time + d[None, :]
    for slot in tl.static_range(SLOTS):
        taps = _split_taps(filters[slot], ROWS, HEADS, WP)
        if RESIDUAL:
            result = inputs[slot + W - 1].to(tl.float32)
        else:
            result = tl.zeros([ROWS, HEADS * HP], tl.float32)
        for tap in tl.static_range(W):
            values = _per_channel(taps[tap], ROWS, HEADS, HP)
            if static_w is not None:
                values += static[tap]
            product = values * inputs[slot + W - 1 - tap].to(tl.float32)
            if positions is not None:
                product = tl.where((position[slot] >= tap)[:, None], product, 0.0)
            result += product
        tl.store(out + slot * y_time, result, mask=(slot < limit)[:, None] & d_ok[None, :])


@triton.jit(do_not_specialize=["time", "chunks"], do_not_specialize_on_alignment=["tiles"])
def _backward_kernel(
    dy, x, weight, static_w, dx, dweight, dstatic, positions,
    time, channels, dy_batch, x_batch, weight_batch, chunks, tiles,
    dy_time: tl.constexpr, x_time: tl.constexpr, weight_time: tl.constexpr, weight_head: tl.constexpr,
    dx_time: tl.constexpr, head_size: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, AHEAD: tl.constexpr, HEADS: tl.constexpr, HP: tl.constexpr,
):  # fmt: skip
    heads = channels // head_size
    blocks = tl.cdiv(heads, HEADS)
    head = (tl.program_id(0) % blocks) * HEADS
    d, d_ok = _columns(head, head_size, channels, HEADS, HP)
    program = tl.program_id(0) // blocks
    batch = (program // chunks).to(tl.int64)
    chunk = program % chunks
    rows = tl.arange(0, ROWS) * SLOTS
    coefficient = tl.arange(0, HEADS * WP)
    coefficient_ok = (head + coefficient // WP < heads) & (coefficient % WP < W)
    static = ()
    if static_w is not None:
        static = load_static(static_w, channels, d, d_ok, W)
    end = end_of_documents(positions, time)
    HEAD_TAPS: tl.constexpr = dx_time // head_size * W
    sums = ()
    if dstatic is not None:
        for _ in tl.static_range(W):
            sums = sums + (tl.zeros([ROWS, HEADS * HP], tl.float32),)
    for tile in range(chunk * tiles, chunk * tiles + tiles):
        start = tile * (ROWS * SLOTS)
        last = time - start
        limit = last - rows
        reach = end - start - rows
        xs = x + batch * x_batch + start.to(tl.int64) * x_time + rows[:, None] * x_time + d[None, :]
        dys = dy + batch * dy_batch + start.to(tl.int64) * dy_time + rows[:, None] * dy_time + d[None, :]
        weight_at = (head + coefficient // WP) * weight_head + coefficient % WP
        weights = weight + batch * weight_batch + start.to(tl.int64) * weight_time
        weights += rows[:, None] * weight_time + weight_at[None, :]
        if dx is not None:
            out = dx + (batch * time + start) * dx_time + rows[:, None] * dx_time + d[None, :]
        dweight_at = (head + coefficient // WP) * W + coefficient % WP
        if dweight is not None:
            dweights = dweight + (batch * time + start) * HEAD_TAPS
            dweights += rows[:, None] * HEAD_TAPS + dweight_at[None, :]
        inputs = load_slots(xs, 1 - W, AHEAD, x_time, -start - rows, reach, d_ok)
        grads = load_slots(dys, 0, W - 1 + AHEAD, dy_time, -start - rows, reach, d_ok)
        filters = load_slots(weights, 0, W - 1 + AHEAD, weight_time, -start - rows, reach, coefficient_ok)
        if positions is not None:
            position = load_positions(positions + start, rows, SLOTS + W - 1, last)
        for slot in tl.static_range(SLOTS):
            inputs = inputs + (load_slot(xs, slot + AHEAD, x_time, reach, d_ok),)
            grads = grads + (load_slot(dys, slot + W - 1 + AHEAD, dy_time, reach, d_ok),)
            loaded = load_slot(weights, slot + W - 1 + AHEAD, weight_time, reach, coefficient_ok)
            filters = filters + (loaded,)
            gradient = grads[0].to(tl.float32)
            if RESIDUAL:
                result = gradient
            else:
                result = tl.zeros([ROWS, HEADS * HP], tl.float32)
            new_sums = ()
            coefficients = ()
            for tap in tl.static_range(W):
                values = _per_channel(_split_taps(filters[tap], ROWS, HEADS, WP)[tap], ROWS, HEADS, HP)
                if static_w is not None:
                    values += static[tap]
                back = values * grads[tap].to(tl.float32)
                product = gradient * inputs[W - 1 - tap].to(tl.float32)
                if positions is not None:
                    back = tl.where((position[slot + tap] >= tap)[:, None], back, 0.0)
                    product = tl.where((position[slot] >= tap)[:, None], product, 0.0)
                result += back
                coefficients = coefficients + (_per_head(product, ROWS, HEADS, HP),)
                if dstatic is not None:
                    new_sums = new_sums + (sums[tap] + product,)
            sums = new_sums
            inputs = drop_first(inputs, W + AHEAD)
            grads = drop_first(grads, W + AHEAD)
            filters = drop_first(filters, W + AHEAD)
            for _ in tl.static_range(WP - W):
                coefficients = coefficients + (tl.zeros([ROWS, HEADS], tl.float32),)
            time_ok = (slot < limit)[:, None]
            if dx is not None:
                tl.store(out + slot * dx_time, result, mask=time_ok & d_ok[None, :])
            if dweight is not None:
                flat = _join_taps(coefficients, ROWS, HEADS, WP)
                tl.store(dweights + slot * HEAD_TAPS, flat, mask=time_ok & coefficient_ok[None, :])
    if dstatic is not None:
        for tap in tl.static_range(W):
            at = (program * W + tap).to(tl.int64) * channels + d
            tl.store(dstatic + at, tl.sum(sums[tap], 0), mask=d_ok)


def _tile(head_size: int, heads: int, elements: int) -> tuple[int, int, int]:
    """(rows, heads, padded head size) of a tile with about `elements` elements a slot."""
    padded = triton.next_power_of_2(head_size)
    in_block = min(max(1, 256 // padded), triton.next_power_of_2(heads))
    return max(1, elements // (in_block * padded)), in_block, padded


def _by_ring(
    x: Tensor, weight: Tensor, static_w: Tensor | None, positions: Tensor | None, silu: bool, backward: bool
) -> bool:
    """Whether to run the Gluon kernels of `ring`: they must fit, and silu must need them or they must be faster.

    They are faster for packed documents, and with a static filter, in the forward pass from 8 channels a head on. For
    numbers of taps that are no power of two they copy the filters, and so are for silu alone.
    """
    width = weight.shape[3]
    large = static_w is not None and (backward or x.shape[2] >= 8 * weight.shape[2])
    faster = (positions is not None or large) and width & (width - 1) == 0
    return ring_fits(x, weight, width) and (silu or faster)


def _backward_shape(static: bool) -> tuple[int, int, int, int]:
    """(elements of a slot, slots, slots loaded ahead, programs per multiprocessor), with 0 for one program per tile.

    The static filter's gradient sums take registers, so the tile is small, and every program writes such sums, so few
    programs loop over many tiles each. Without a static filter one program per tile will do.
    """
    return (512, 8, 2, 6) if static else (1024, 4, 1, 0)


def forward(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [B, T, H, W]
    static_w: Tensor | None,  # [W, D]
    positions: Tensor | None,  # [T + 1] int32: as in `reference.convolve`
    residual: bool,
    silu: bool,  # True only if `ring_fits`
    dtype: torch.dtype,
) -> Tensor:  # [B, T, D]
    """The result in `dtype`: x's dtype, or float32 if the caller is still to apply silu."""
    if _by_ring(x, weight, static_w, positions, silu, backward=False):
        return ring.forward(x, weight, static_w, positions, weight.shape[3], residual, silu)
    batch, time, channels = x.shape
    heads, width = weight.shape[2:]
    rows, in_block, padded = _tile(channels // heads, heads, elements=512)
    slots = 4
    tiles = triton.cdiv(time, rows * slots)
    y = new(x, x.shape, dtype)
    launch(
        _forward_kernel,
        triton.cdiv(heads, in_block) * batch * tiles,
        (x, weight, static_w, y, positions),
        (time, channels, x.stride(0), weight.stride(0), tiles),
        {
            "x_time": x.stride(1), "weight_time": weight.stride(1), "weight_head": weight.stride(2),
            "y_time": channels, "head_size": channels // heads, "W": width, "WP": triton.next_power_of_2(width),
            "RESIDUAL": residual,
            "ROWS": rows, "SLOTS": slots, "HEADS": in_block, "HP": padded,
        },
    )  # fmt: skip
    return y


def backward(
    dy: Tensor,  # [B, T, D]
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [B, T, H, W]
    static_w: Tensor | None,  # [W, D]
    positions: Tensor | None,  # [T + 1] int32: as in `reference.convolve`
    residual: bool,
    silu: bool,
    needs: tuple[bool, bool, bool],  # whether x, weight and static_w require gradients
) -> tuple[Tensor | None, ...]:  # [B, T, D], [B, T, H, W], [W, D]
    """The gradients of x, weight and static_w, in their dtypes."""
    if _by_ring(x, weight, static_w, positions, silu, backward=True):
        return ring.backward(dy, x, weight, static_w, positions, weight.shape[3], residual, silu, needs)
    batch, time, channels = x.shape
    heads, width = weight.shape[2:]
    elements, slots, ahead, at_once = _backward_shape(static_w is not None)
    rows, in_block, padded = _tile(channels // heads, heads, elements)
    blocks = triton.cdiv(heads, in_block)
    tiles = triton.cdiv(time, rows * slots)
    chunks = tiles
    if at_once:
        chunks = min(tiles, triton.cdiv(at_once * multiprocessors(x), blocks * batch))
    per_chunk = triton.cdiv(tiles, chunks)
    chunks = triton.cdiv(tiles, per_chunk)
    dx = new_like(x) if needs[0] else None
    dweight = new_like(weight) if needs[1] else None
    partial, dstatic = new_sums(static_w if needs[2] else None, batch * chunks)
    launch(
        _backward_kernel,
        blocks * batch * chunks,
        (dy, x, weight, static_w, dx, dweight, partial, positions),
        (time, channels, dy.stride(0), x.stride(0), weight.stride(0), chunks, per_chunk),
        {
            "dy_time": dy.stride(1), "x_time": x.stride(1),
            "weight_time": weight.stride(1), "weight_head": weight.stride(2),
            "dx_time": channels, "head_size": channels // heads, "W": width, "WP": triton.next_power_of_2(width),
            "RESIDUAL": residual,
            "ROWS": rows, "SLOTS": slots, "AHEAD": ahead, "HEADS": in_block, "HP": padded,
        },
    )  # fmt: skip
    sum_parts((partial, dstatic))
    return dx, dweight, dstatic
