"""The head-wise dynamic convolution in Triton. Legend: B batch, T time, D channels, H heads, W taps.

A tile's channels are HEADS whole heads of D/H channels, padded to HP, a power of two. A token's coefficients
load as one vector, W taps padded to WP, and split in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynconv.ops.tiles import load_positions, load_slots, multiprocessors, sum_parts


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


@triton.jit
def _forward_kernel(
    x, weight, static_w, y, positions,
    time, channels, x_batch, x_time, weight_batch, weight_time, weight_head, tiles, head_size: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, STATIC: tl.constexpr, RESIDUAL: tl.constexpr, PACKED: tl.constexpr,
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
    inputs = load_slots(
        x + batch * x_batch + start.to(tl.int64) * x_time, rows, x_time, d, d_ok,
        1 - W, SLOTS, -start, time - start,
    )  # fmt: skip
    coefficient = tl.arange(0, HEADS * WP)
    coefficient_ok = (head + coefficient // WP < heads) & (coefficient % WP < W)
    filters = load_slots(
        weight + batch * weight_batch + start.to(tl.int64) * weight_time, rows, weight_time,
        (head + coefficient // WP) * weight_head + coefficient % WP, coefficient_ok,
        0, SLOTS, -start, time - start,
    )  # fmt: skip
    if PACKED:
        position = load_positions(positions + start, rows, SLOTS, time - start)
    y += (batch * time + start) * channels
    for slot in tl.static_range(SLOTS):
        taps = _split_taps(filters[slot], ROWS, HEADS, WP)
        if RESIDUAL:
            result = inputs[slot + W - 1].to(tl.float32)
        else:
            result = tl.zeros([ROWS, HEADS * HP], tl.float32)
        for tap in tl.static_range(W):
            values = _per_channel(taps[tap], ROWS, HEADS, HP)
            if STATIC:
                values += tl.load(static_w + tap * channels + d, mask=d_ok, other=0.0).to(tl.float32)[None, :]
            product = values * inputs[slot + W - 1 - tap].to(tl.float32)
            if PACKED:
                product = tl.where((position[slot] >= tap)[:, None], product, 0.0)
            result += product
        ok = (rows + slot < time - start)[:, None] & d_ok[None, :]
        tl.store(y + (rows + slot)[:, None] * channels + d[None, :], result, mask=ok)


@triton.jit
def _backward_kernel(
    dy, x, weight, static_w, dx, dweight, dstatic, positions,
    time, channels, dy_batch, dy_time, x_batch, x_time, weight_batch, weight_time, weight_head, chunks, tiles,
    head_size: tl.constexpr,
    W: tl.constexpr, WP: tl.constexpr, STATIC: tl.constexpr, RESIDUAL: tl.constexpr, PACKED: tl.constexpr,
    ROWS: tl.constexpr, SLOTS: tl.constexpr, HEADS: tl.constexpr, HP: tl.constexpr,
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
    sums = ()
    for _ in tl.static_range(W):
        sums = sums + (tl.zeros([ROWS, HEADS * HP], tl.float32),)
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
        filters = load_slots(
            weight + batch * weight_batch + start.to(tl.int64) * weight_time, rows, weight_time,
            (head + coefficient // WP) * weight_head + coefficient % WP, coefficient_ok,
            0, SLOTS + W - 1, -start, time - start,
        )  # fmt: skip
        if PACKED:
            position = load_positions(positions + start, rows, SLOTS + W - 1, time - start)
        taps = ()
        for slot in tl.static_range(SLOTS + W - 1):
            taps = taps + (_split_taps(filters[slot], ROWS, HEADS, WP),)
        for slot in tl.static_range(SLOTS):
            gradient = grads[slot].to(tl.float32)
            if RESIDUAL:
                result = gradient
            else:
                result = tl.zeros([ROWS, HEADS * HP], tl.float32)
            new_sums = ()
            coefficients = ()
            for tap in tl.static_range(W):
                values = _per_channel(taps[slot + tap][tap], ROWS, HEADS, HP)
                if STATIC:
                    values += tl.load(static_w + tap * channels + d, mask=d_ok, other=0.0).to(tl.float32)[None, :]
                back = values * grads[slot + tap].to(tl.float32)
                product = gradient * inputs[slot + W - 1 - tap].to(tl.float32)
                if PACKED:
                    back = tl.where((position[slot + tap] >= tap)[:, None], back, 0.0)
                    product = tl.where((position[slot] >= tap)[:, None], product, 0.0)
                result += back
                coefficients = coefficients + (_per_head(product, ROWS, HEADS, HP),)
                if STATIC:
                    product += sums[tap]
                new_sums = new_sums + (product,)
            if STATIC:
                sums = new_sums
            for _ in tl.static_range(WP - W):
                coefficients = coefficients + (tl.zeros([ROWS, HEADS], tl.float32),)
            time_ok = (rows + slot < time - start)[:, None]
            token = batch * time + start + (rows + slot)[:, None]
            tl.store(dx + token * channels + d[None, :], result, mask=time_ok & d_ok[None, :])
            flat = _join_taps(coefficients, ROWS, HEADS, WP)
            at = token * heads * W + (head + coefficient // WP)[None, :] * W + (coefficient % WP)[None, :]
            tl.store(dweight + at, flat, mask=time_ok & coefficient_ok[None, :])
    if STATIC:
        for tap in tl.static_range(W):
            at = (program * W + tap).to(tl.int64) * channels + d
            tl.store(dstatic + at, tl.sum(sums[tap], 0), mask=d_ok)


def _tile(head_size: int, heads: int, width: int) -> tuple[int, int, int, int]:
    """(rows, heads, padded head size, padded taps) of a tile: about 1024 elements."""
    padded = triton.next_power_of_2(head_size)
    in_block = min(max(1, 256 // padded), triton.next_power_of_2(heads))
    rows = max(1, 1024 // (in_block * padded))
    return rows, in_block, padded, triton.next_power_of_2(width)


def forward(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [B, T, H, W]
    static_w: Tensor | None,  # [W, D]
    positions: Tensor | None,  # [T] int32: each token's place in its document
    residual: bool,
) -> Tensor:  # [B, T, D]
    """The result, in x's dtype."""
    batch, time, channels = x.shape
    heads, width = weight.shape[2:]
    rows, in_block, padded, taps = _tile(channels // heads, heads, width)
    slots = 4
    tiles = triton.cdiv(time, rows * slots)
    y = x.new_empty(x.shape)
    _forward_kernel[(triton.cdiv(heads, in_block) * batch * tiles,)](
        x, weight, static_w, y, positions,
        time, channels, x.stride(0), x.stride(1), *weight.stride()[:3], tiles, channels // heads,
        W=width, WP=taps, STATIC=static_w is not None, RESIDUAL=residual, PACKED=positions is not None,
        ROWS=rows, SLOTS=slots, HEADS=in_block, HP=padded, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def backward(
    dy: Tensor,  # [B, T, D]
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [B, T, H, W]
    static_w: Tensor | None,  # [W, D]
    positions: Tensor | None,  # [T] int32
    residual: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # [B, T, D], [B, T, H, W], [W, D]
    """The gradients of x, weight and static_w, in their dtypes."""
    batch, time, channels = x.shape
    heads, width = weight.shape[2:]
    rows, in_block, padded, taps = _tile(channels // heads, heads, width)
    slots = 4
    blocks = triton.cdiv(heads, in_block)
    tiles = triton.cdiv(time, rows * slots)
    chunks = min(tiles, triton.cdiv(8 * multiprocessors(x), blocks * batch)) if static_w is not None else tiles
    per_chunk = triton.cdiv(tiles, chunks)
    chunks = triton.cdiv(tiles, per_chunk)
    dx = x.new_empty(x.shape)
    dweight = weight.new_empty(weight.shape)
    partial = None
    if static_w is not None:
        partial = x.new_empty((batch * chunks, width, channels), dtype=torch.float32)
    _backward_kernel[(blocks * batch * chunks,)](
        dy, x, weight, static_w, dx, dweight, partial, positions,
        time, channels, dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), *weight.stride()[:3],
        chunks, per_chunk, channels // heads,
        W=width, WP=taps, STATIC=static_w is not None, RESIDUAL=residual, PACKED=positions is not None,
        ROWS=rows, SLOTS=slots, HEADS=in_block, HP=padded, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    if static_w is None or partial is None:
        return dx, dweight, None
    dstatic = torch.empty_like(static_w)
    sum_parts((partial, dstatic))
    return dx, dweight, dstatic
