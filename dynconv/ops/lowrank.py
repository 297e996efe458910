"""The low-rank dynamic convolution in Triton, for any shape and dtype.

Legend: B batch, T time, D channels, W taps, R rank, G segments of the channels, each with its own z.
The filters z U are computed tile by tile in registers and never stored in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from dynconv.ops.launch import launch, new
from dynconv.ops.optional import lowrank_mma as mma
from dynconv.ops.optional import mma_fits
from dynconv.ops.tiles import Place, end_of_documents, multiprocessors, new_like, new_sums, sum_parts


@triton.jit
def _segment(block, SEGMENTS: tl.constexpr, BD: tl.constexpr):
    """The segment a block of channels belongs to, its first channel, and where the segment ends."""
    segment = 0
    first = 0
    end = 0
    base = 0
    before = 0
    for index in tl.static_range(len(SEGMENTS)):
        width = SEGMENTS[index]
        if block >= before:
            segment = index
            first = base + (block - before) * BD
            end = base + width
        before += (width + BD - 1) // BD
        base += width
    return segment, first, end


@triton.jit
def _load_tile(pointer, time_steps, row_stride, columns, columns_ok, lowest, highest):
    ok = ((time_steps >= lowest) & (time_steps < highest))[:, None] & columns_ok[None, :]
    return tl.load(pointer + time_steps[:, None] * row_stride + columns[None, :], mask=ok, other=0.0)


@triton.jit(do_not_specialize=["time", "tiles", "blocks"])
def _forward_kernel(
    x, z, up, static_w, y, positions,
    time, channels, x_batch, x_time, z_batch, z_time, tiles, blocks,
    SEGMENTS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    segment, first, end = _segment(tl.program_id(0) % blocks, SEGMENTS, BD)
    d = first + tl.arange(0, BD)
    d_ok = d < end
    program = tl.program_id(0) // blocks
    batch = (program // tiles).to(tl.int64)
    start = (program % tiles) * BT
    reach = end_of_documents(positions, time) - start
    x += batch * x_batch + start.to(tl.int64) * x_time
    z += batch * z_batch + start.to(tl.int64) * z_time + segment * R
    steps = tl.arange(0, BT)
    r = tl.arange(0, RP)
    dtype: tl.constexpr = x.dtype.element_ty
    generator = _load_tile(z, steps, z_time, r, r < R, -start, reach).to(dtype).to(DOT)
    result = tl.zeros([BT, BD], tl.float32)
    if RESIDUAL:
        result = _load_tile(x, steps, x_time, d, d_ok, -start, reach).to(tl.float32)
    if positions is not None:
        position = tl.load(positions + start + steps, mask=steps < time - start, other=0)
    for tap in tl.static_range(W):
        at = r[:, None] * (W * channels) + tap * channels + d[None, :]
        basis = tl.load(up + at, mask=(r < R)[:, None] & d_ok[None, :], other=0.0).to(dtype).to(DOT)
        filters = tl.dot(generator, basis, input_precision="ieee")
        if static_w is not None:
            filters += tl.load(static_w + tap * channels + d, mask=d_ok, other=0.0).to(tl.float32)[None, :]
        shifted = _load_tile(x, steps - tap, x_time, d, d_ok, -start, reach).to(tl.float32)
        product = filters * shifted
        if positions is not None:
            product = tl.where((position >= tap)[:, None], product, 0.0)
        result += product
    y += (batch * time + start) * channels
    ok = (steps < time - start)[:, None] & d_ok[None, :]
    tl.store(y + steps[:, None] * channels + d[None, :], result, mask=ok)


@triton.jit(do_not_specialize=["time", "rows", "chunks", "tiles", "blocks"])
def _backward_kernel(
    dy, x, z, up, static_w, dx, dz, dup, dstatic, positions,
    time, channels, rows, dy_batch, x_batch, z_batch, chunks, tiles, blocks,
    dy_time: tl.constexpr, x_time: tl.constexpr, z_time: tl.constexpr,
    SEGMENTS: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, W: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) % blocks
    segment, first, end = _segment(block, SEGMENTS, BD)
    part = block
    for index in tl.static_range(len(SEGMENTS)):
        if index < segment:
            part -= (SEGMENTS[index] + BD - 1) // BD
    d = first + tl.arange(0, BD)
    d_ok = d < end
    program = tl.program_id(0) // blocks
    batch = (program // chunks).to(tl.int64)
    chunk = program % chunks
    steps = tl.arange(0, BT)
    r = tl.arange(0, RP)
    dtype: tl.constexpr = x.dtype.element_ty
    end = end_of_documents(positions, time)
    basis = ()
    static = ()
    up_sums = ()
    static_sums = ()
    for tap in tl.static_range(W):
        up_at = r[:, None] * (W * channels) + tap * channels + d[None, :]
        taps = tl.load(up + up_at, mask=(r < R)[:, None] & d_ok[None, :], other=0.0)
        basis = basis + (taps.to(dtype).to(DOT),)
        if static_w is not None:
            static = static + (tl.load(static_w + tap * channels + d, mask=d_ok, other=0.0).to(tl.float32),)
        if dup is not None:
            up_sums = up_sums + (tl.zeros([RP, BD], tl.float32),)
        if dstatic is not None:
            static_sums = static_sums + (tl.zeros([BD], tl.float32),)
    for tile in range(chunk * tiles, chunk * tiles + tiles):
        start = tile * BT
        last = time - start
        reach = end - start
        xs = x + batch * x_batch + start.to(tl.int64) * x_time
        dys = dy + batch * dy_batch + start.to(tl.int64) * dy_time
        zs = z + batch * z_batch + start.to(tl.int64) * z_time + segment * R
        generator = _load_tile(zs, steps, z_time, r, r < R, -start, reach).to(dtype).to(DOT)
        gradient = _load_tile(dys, steps, dy_time, d, d_ok, -start, reach).to(tl.float32)
        result = tl.zeros([BT, BD], tl.float32)
        if RESIDUAL:
            result = gradient
        dgenerator = tl.zeros([BT, RP], tl.float32)
        if positions is not None:
            position = tl.load(positions + start + steps, mask=steps < last, other=0)
        new_up_sums = ()
        new_static_sums = ()
        for tap in tl.static_range(W):
            later_generator = _load_tile(zs, steps + tap, z_time, r, r < R, -start, reach).to(dtype).to(DOT)
            filters = tl.dot(later_generator, basis[tap], input_precision="ieee")
            if static_w is not None:
                filters += static[tap][None, :]
            back = filters * _load_tile(dys, steps + tap, dy_time, d, d_ok, -start, reach).to(tl.float32)
            shifted = _load_tile(xs, steps - tap, x_time, d, d_ok, -start, reach).to(tl.float32)
            product = gradient * shifted
            if positions is not None:
                later = tl.load(positions + start + steps + tap, mask=steps + tap < last, other=0)
                back = tl.where((later >= tap)[:, None], back, 0.0)
                product = tl.where((position >= tap)[:, None], product, 0.0)
            result += back
            rounded = product.to(dtype).to(DOT)
            if dz is not None:
                dgenerator = tl.dot(rounded, tl.trans(basis[tap]), dgenerator, input_precision="ieee")
            if dup is not None:
                dbasis = tl.dot(tl.trans(generator), rounded, up_sums[tap], input_precision="ieee")
                new_up_sums = new_up_sums + (dbasis,)
            if dstatic is not None:
                new_static_sums = new_static_sums + (static_sums[tap] + tl.sum(product, 0),)
        up_sums = new_up_sums
        static_sums = new_static_sums
        token = batch * time + start + steps[:, None]
        ok = (steps < last)[:, None]
        if dx is not None:
            tl.store(dx + token * channels + d[None, :], result, mask=ok & d_ok[None, :])
        if dz is not None:
            at = (part.to(tl.int64) * rows + token) * (len(SEGMENTS) * R) + segment * R + r[None, :]
            tl.store(dz + at, dgenerator, mask=ok & (r < R)[None, :])
    for tap in tl.static_range(W):
        if dup is not None:
            at = (program.to(tl.int64) * R + r[:, None]) * (W * channels) + tap * channels + d[None, :]
            tl.store(dup + at, up_sums[tap], mask=(r < R)[:, None] & d_ok[None, :])
        if dstatic is not None:
            tl.store(dstatic + (program * W + tap).to(tl.int64) * channels + d, static_sums[tap], mask=d_ok)


def _tile(x: Tensor, rank: int, backward: bool) -> tuple[int, int, int]:
    """(time steps, channels, padded rank) of a tile.

    Tiles shrink as the rank grows, because the W bases [R, channels] and, backward, the W sums must fit in registers.
    """
    padded = max(16, triton.next_power_of_2(rank))
    small = backward or padded > 32 or x.dtype == torch.float32
    return 32 if small else 64, 16 if padded > 64 else 32 if small else 64, padded


def _dot_dtype(x: Tensor) -> tl.dtype:
    """The dtype of tl.dot's operands: x's; float32 in Triton's interpreter, whose dot misreads bfloat16 as integers."""
    names = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
    return names[x.dtype] if isinstance(_forward_kernel, JITFunction) else tl.float32


def forward(
    x: Tensor,  # [B, T, D]
    z: Tensor,  # [B, T, G*R]
    up: Tensor,  # [R, W*D]
    static_w: Tensor | None,  # [W, D]
    positions: Tensor | None,  # [T + 1] int32: as in `reference.convolve`
    segments: tuple[int, ...],
    residual: bool,
    silu: bool,  # True only if `mma_fits`
    dtype: torch.dtype,
) -> Tensor:  # [B, T, D]
    """The result in `dtype`: x's dtype, or float32 if the caller is still to apply silu."""
    if mma_fits(x, up, segments, silu):
        return mma.forward(x, z, up, static_w, positions, segments, residual, silu, dtype)
    assert not silu, "silu must be applied by the caller here"
    batch, time, channels = x.shape
    rank = up.shape[0]
    steps, columns, padded = _tile(x, rank, backward=False)
    tiles = triton.cdiv(time, steps)
    blocks = sum(triton.cdiv(width, columns) for width in segments)
    y = new(x, x.shape, dtype)
    launch(
        _forward_kernel,
        blocks * batch * tiles,
        (x, z, up, static_w, y, positions),
        (time, channels, x.stride(0), x.stride(1), z.stride(0), z.stride(1), tiles, blocks),
        {
            "SEGMENTS": segments, "R": rank, "RP": padded, "W": up.shape[1] // channels,
            "RESIDUAL": residual,
            "BT": steps, "BD": columns, "DOT": _dot_dtype(x),
        },
        num_stages=1,
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
    if mma_fits(x, up, segments, silu):
        return mma.backward(dy, x, z, up, static_w, positions, segments, residual, silu, needs)
    assert not silu, "silu must be applied by the caller here"
    batch, time, channels = x.shape
    rank, width = up.shape[0], up.shape[1] // channels
    steps, columns, padded = _tile(x, rank, backward=True)
    tiles = triton.cdiv(time, steps)
    in_segment = [triton.cdiv(length, columns) for length in segments]
    blocks = sum(in_segment)
    chunks = min(tiles, triton.cdiv(4 * multiprocessors(x), blocks * batch))
    per_chunk = triton.cdiv(tiles, chunks)
    chunks = triton.cdiv(tiles, per_chunk)
    dx = new_like(x) if needs[0] else None
    # A segment with fewer blocks of channels than the widest one leaves parts of dz unwritten, so start from zeros.
    uneven = min(in_segment) != max(in_segment)
    dz_partial, dz = new_sums(z if needs[1] else None, max(in_segment), zero=uneven)
    up_partial, dup = new_sums(up if needs[2] else None, batch * chunks)
    static_partial, dstatic = new_sums(static_w if needs[3] else None, batch * chunks)
    launch(
        _backward_kernel,
        blocks * batch * chunks,
        (dy, x, z, up, static_w, dx, dz_partial, up_partial, static_partial, positions),
        (time, channels, batch * time, dy.stride(0), x.stride(0), z.stride(0), chunks, per_chunk, blocks),
        {
            "dy_time": dy.stride(1), "x_time": x.stride(1), "z_time": z.stride(1),
            "SEGMENTS": segments, "R": rank, "RP": padded, "W": width,
            "RESIDUAL": residual,
            "BT": steps, "BD": columns, "DOT": _dot_dtype(x),
        },
        num_stages=1,
    )  # fmt: skip
    sum_parts((dz_partial, dz), (up_partial, dup), (static_partial, dstatic), place=Place(rank, rank, 0))
    return dx, dz, dup, dstatic
