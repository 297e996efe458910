"""The low-rank convolution on NVIDIA tensor cores, in Gluon: 16-bit inputs, R <= 16, W <= 4.

Legend: B batch, T time, D channels, W taps, R rank (padded to 16), G segments.

Everything a thread needs stays in its registers. A warp owns 16 channels and 16 rows; row r, slot s stands for
time r * RUN + s of the program's chunk, so the earlier inputs of a slot are the slots before it, of the same thread.
Two identities make the matrix unit's layouts fit without moving data:
- a product does not care in which order its columns (or summed-over channels) come, so column c holds channel
  `_channel(c)` and each thread's four channels lie side by side in memory;
- the transpose of an 8 x 8 block across a warp is one instruction, so g = dy * x serves both as the left operand of
  dz = g U^T (summed over channels) and, transposed, of dU^T = g^T z (summed over time).
x, dy and z stream through a ring in shared memory (cp.async); the static filter is what the filters' sums start from.
"""

import functools

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from dynconv.ops.tiles import multiprocessors, sum_parts

MAX_RANK = 16
MAX_WIDTH = 4
BLOCK = 128  # channels of a backward program; segments must be a multiple
_FORWARD_WARPS, _BACKWARD_WARPS = 4, 8
_ROWS = 16

# Triton 3.9 renamed it.
_async_load = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def _mma_layout(warps):
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def _own_layout(warps):
    """[WARPS, 16 rows, 16 channels]: a thread holds four channels of rows r and r + 8."""
    warp_bases = [[2**bit, 0, 0] for bit in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [0, 8, 0]],
        lane_bases=[[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=warp_bases,
        block_bases=[],
        shape=[warps, 16, 16],
    )


@gluon.jit
def _axis(size: gl.constexpr, dim: gl.constexpr, layout: gl.constexpr):
    """arange along one of three dimensions, the others of size one."""
    if dim == 0:
        value = gl.expand_dims(gl.arange(0, size, gl.SliceLayout(1, gl.SliceLayout(2, layout))), 1)
        value = gl.expand_dims(value, 2)
    elif dim == 1:
        value = gl.expand_dims(gl.arange(0, size, gl.SliceLayout(0, gl.SliceLayout(2, layout))), 0)
        value = gl.expand_dims(value, 2)
    else:
        value = gl.expand_dims(gl.arange(0, size, gl.SliceLayout(0, gl.SliceLayout(1, layout))), 0)
        value = gl.expand_dims(value, 1)
    return value


@gluon.jit
def _channel(column):
    """The channel, of a warp's 16, that stands in a column of the matrix unit's result."""
    return column % 8 // 2 * 4 + column // 8 * 2 + column % 2


@gluon.jit
def _to_channels(columns, WARPS: gl.constexpr, layout: gl.constexpr):
    """Columns in the matrix unit's order -> channels in memory's; registers are renamed, nothing moves."""
    columns = columns.reshape([WARPS, 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([WARPS, 16, 16])
    return gl.convert_layout(columns, layout)


@gluon.jit
def _to_columns(channels, WARPS: gl.constexpr, layout: gl.constexpr):
    """The inverse."""
    channels = channels.reshape([WARPS, 16, 4, 2, 2]).permute([0, 1, 3, 2, 4]).reshape([WARPS, 16, 16])
    return gl.convert_layout(channels, layout)


@gluon.jit
def _transposed(g, WARPS: gl.constexpr, layout: gl.constexpr):
    """[row, channel] -> [column, row] as a left operand."""
    g = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [g], dtype=g.dtype, is_pure=False, pack=2
    )
    g = g.reshape([WARPS, 2, 8, 4, 2, 2]).permute([0, 4, 2, 1, 3, 5]).reshape([WARPS, 16, 16])
    return gl.convert_layout(g, layout)


@gluon.jit
def _multiply(a, b):
    """The product of 16-bit values, rounded once, two at a time."""
    if a.dtype == gl.bfloat16:
        asm: gl.constexpr = "{ .reg .b32 c; mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, $1, $2, c; }"
    else:
        asm: gl.constexpr = "mul.rn.f16x2 $0, $1, $2;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=2)


@gluon.jit
def _generator(z, WARPS: gl.constexpr, layout: gl.constexpr):
    """One slot's z [row, rank] from shared memory, the same for every warp."""
    value = gl.expand_dims(z.load(gl.SliceLayout(0, layout)), 0)
    return gl.convert_layout(value.broadcast_to([WARPS, 16, 16]), layout)


@gluon.jit
def _ring(SLOTS: gl.constexpr, shape: gl.constexpr, layout: gl.constexpr, dtype: gl.constexpr):
    """Shared memory for groups of SLOTS slots: a buffer each, lest Triton put barriers between their copies."""
    ring = ()
    for _ in gl.static_range(SLOTS):
        ring = ring + (gl.allocate_shared_memory(dtype, shape, layout),)
    return ring


@gluon.jit
def _basis(
    up,
    first,
    channels,
    R: gl.constexpr,
    W: gl.constexpr,
    WARPS: gl.constexpr,
    layout: gl.constexpr,
    dtype: gl.constexpr,
):
    """U's taps [rank, column] as the right operand of filters = z U."""
    rank = _axis(16, 1, layout)
    d = first + _axis(WARPS, 0, layout) * 16 + _channel(_axis(16, 2, layout))
    ok = (rank < R) & (d < channels)
    basis = ()
    for tap in gl.static_range(W):
        basis = basis + (gl.load(up + rank * (W * channels) + tap * channels + d, mask=ok, other=0.0).to(dtype),)
    return basis


@gluon.jit
def _basis_transposed(
    up,
    first,
    channels,
    R: gl.constexpr,
    W: gl.constexpr,
    WARPS: gl.constexpr,
    layout: gl.constexpr,
    dtype: gl.constexpr,
):
    """U's taps [column, rank] as the right operand of dz = g U^T."""
    rank = _axis(16, 2, layout)
    d = first + _axis(WARPS, 0, layout) * 16 + _channel(_axis(16, 1, layout))
    ok = (rank < R) & (d < channels)
    basis = ()
    for tap in gl.static_range(W):
        basis = basis + (gl.load(up + rank * (W * channels) + tap * channels + d, mask=ok, other=0.0).to(dtype),)
    return basis


@gluon.jit
def _starts(
    static_w, first, channels, W: gl.constexpr, STATIC: gl.constexpr, WARPS: gl.constexpr, layout: gl.constexpr
):
    """What the filters' sums start from: the static filter's taps, or zero."""
    d = first + _axis(WARPS, 0, layout) * 16 + _channel(_axis(16, 2, layout))
    starts = ()
    for tap in gl.static_range(W):
        if STATIC:
            value = gl.load(static_w + tap * channels + d, mask=d < channels, other=0.0).to(gl.float32)
            starts = starts + (value.broadcast_to([WARPS, 16, 16]),)
        else:
            starts = starts + (gl.zeros([WARPS, 16, 16], gl.float32, layout),)
    return starts


@gluon.jit
def _segment(first, SEGMENTS: gl.constexpr):
    """The segment a program's first channel lies in, and the segment's own first channel."""
    segment = 0
    begin = 0
    end = 0
    for index in gl.static_range(len(SEGMENTS) - 1):
        end += SEGMENTS[index]
        segment += (first >= end).to(gl.int32)
        begin += (first >= end).to(gl.int32) * SEGMENTS[index]
    return segment, begin


@gluon.jit
def _forward_kernel(
    x, z, up, static_w, y,
    time, channels, x_batch, z_batch, chunks, blocks,
    x_time: gl.constexpr, z_time: gl.constexpr, y_time: gl.constexpr, SEGMENTS: gl.constexpr,
    R: gl.constexpr, W: gl.constexpr, STATIC: gl.constexpr, RESIDUAL: gl.constexpr,
    RUN: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = _mma_layout(WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    OWN: gl.constexpr = _own_layout(WARPS)
    COPY: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 16, 2], [WARPS, 1, 1], [2, 1, 0])
    Z_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [1, WARPS], [1, 0])
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[2, 1, 0])
    Z_ROWS: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=4, max_phase=2, order=[1, 0])
    dtype: gl.constexpr = x.dtype.element_ty
    first = (gl.program_id(0) % blocks) * (16 * WARPS)
    segment, _ = _segment(first, SEGMENTS)
    program = gl.program_id(0) // blocks
    batch = (program // chunks).to(gl.int64)
    start = (program % chunks) * (16 * RUN)
    x += batch * x_batch + start.to(gl.int64) * x_time
    y += (batch * time + start) * y_time
    z += batch * z_batch + start.to(gl.int64) * z_time + segment * 16

    row = _axis(16, 1, OWN) * RUN
    d = first + _axis(WARPS, 0, OWN) * 16 + _axis(16, 2, OWN)
    d_ok = d < channels
    limit = time - start - row
    copy_row = _axis(16, 1, COPY) * RUN
    copy_d = first + _axis(WARPS, 0, COPY) * 16 + _axis(16, 2, COPY)
    copy_ok = copy_d < channels
    copy_limit = time - start - copy_row
    x_from = copy_row * x_time + copy_d
    z_row = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, Z_COPY)), 1) * RUN
    z_column = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, Z_COPY)), 0)
    z_from = z_row * z_time + z_column
    z_limit = time - start - z_row + z_column * 0
    x_ring = _ring(SLOTS, [STAGES, WARPS, 16, 16], ROWS, dtype)
    z_ring = _ring(SLOTS, [STAGES, 16, 16], Z_ROWS, dtype)
    for slot in gl.static_range((STAGES - 1) * SLOTS):
        x_ok = (slot < copy_limit) & copy_ok
        _async_load(x_ring[slot % SLOTS].index(slot // SLOTS), x + x_from + slot * x_time, mask=x_ok)
        _async_load(z_ring[slot % SLOTS].index(slot // SLOTS), z + z_from + slot * z_time, mask=slot < z_limit)
        if slot % SLOTS == SLOTS - 1:
            async_copy.commit_group()
    xs = ()
    for slot in gl.static_range(1 - W, 0):
        ok = (slot >= -start - row) & (slot < limit) & d_ok
        xs = xs + (gl.load(x + row * x_time + d + slot * x_time, mask=ok, other=0.0),)
    basis = _basis(up, first, channels, R, W, WARPS, RIGHT, dtype)
    starts = _starts(static_w, first, channels, W, STATIC, WARPS, MMA)

    x_ahead = x + (STAGES - 1) * SLOTS * x_time
    z_ahead = z + (STAGES - 1) * SLOTS * z_time
    for group in range(0, RUN, SLOTS):
        async_copy.wait_group(STAGES - 2)
        ahead = group + (STAGES - 1) * SLOTS
        place = ahead // SLOTS % STAGES
        for slot in gl.static_range(SLOTS):
            inside = (ahead + slot < copy_limit) & copy_ok & (ahead < RUN)
            _async_load(x_ring[slot].index(place), x_ahead + x_from + slot * x_time, mask=inside)
            z_inside = (ahead + slot < z_limit) & (ahead < RUN)
            _async_load(z_ring[slot].index(place), z_ahead + z_from + slot * z_time, mask=z_inside)
        async_copy.commit_group()
        x_ahead += SLOTS * x_time
        z_ahead += SLOTS * z_time
        place = group // SLOTS % STAGES
        out = y + row * y_time + d
        y += SLOTS * y_time
        for slot in gl.static_range(SLOTS):
            xs = xs + (x_ring[slot].index(place).load(OWN),)
            generator = _generator(z_ring[slot].index(place), WARPS, LEFT)
            if RESIDUAL:
                result = xs[W - 1].to(gl.float32)
            else:
                result = gl.zeros([WARPS, 16, 16], gl.float32, OWN)
            for tap in gl.static_range(W):
                filters = _to_channels(mma_v2(generator, basis[tap], starts[tap]), WARPS, OWN)
                result += filters * xs[W - 1 - tap].to(gl.float32)
            gl.store(out + slot * y_time, result.to(dtype), mask=(group + slot < limit) & d_ok)
            kept = ()
            for index in gl.static_range(W - 1):
                kept = kept + (xs[index + 1],)
            xs = kept


@gluon.jit
def _backward_kernel(
    dy, x, z, up, static_w, dx, dz, dup, dstatic,
    time, channels, tokens, dy_batch, x_batch, z_batch, chunks, blocks,
    dy_time: gl.constexpr, x_time: gl.constexpr, z_time: gl.constexpr, dx_time: gl.constexpr, SEGMENTS: gl.constexpr,
    R: gl.constexpr, W: gl.constexpr, STATIC: gl.constexpr, RESIDUAL: gl.constexpr,
    RUN: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = _mma_layout(WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    OWN: gl.constexpr = _own_layout(WARPS)
    COPY: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 16, 2], [WARPS, 1, 1], [2, 1, 0])
    Z_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [1, WARPS], [1, 0])
    SUM: gl.constexpr = gl.BlockedLayout([WARPS, 1, 1], [1, 2, 16], [1, WARPS, 1], [2, 1, 0])
    OUT: gl.constexpr = gl.SliceLayout(0, SUM)
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[2, 1, 0])
    Z_ROWS: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=4, max_phase=2, order=[1, 0])
    dtype: gl.constexpr = x.dtype.element_ty
    first = (gl.program_id(0) % blocks) * (16 * WARPS)
    segment, begin = _segment(first, SEGMENTS)
    program = gl.program_id(0) // blocks
    batch = (program // chunks).to(gl.int64)
    start = (program % chunks) * (16 * RUN)
    x += batch * x_batch + start.to(gl.int64) * x_time
    dy += batch * dy_batch + start.to(gl.int64) * dy_time
    z += batch * z_batch + start.to(gl.int64) * z_time + segment * 16
    dx += (batch * time + start) * dx_time
    part = (first - begin) // (16 * WARPS)
    RANKS: gl.constexpr = R * len(SEGMENTS)
    dz += (part.to(gl.int64) * tokens + batch * time + start) * RANKS + segment * R

    row = _axis(16, 1, OWN) * RUN
    d = first + _axis(WARPS, 0, OWN) * 16 + _axis(16, 2, OWN)
    d_ok = d < channels
    limit = time - start - row
    copy_row = _axis(16, 1, COPY) * RUN
    copy_d = first + _axis(WARPS, 0, COPY) * 16 + _axis(16, 2, COPY)
    copy_ok = copy_d < channels
    copy_limit = time - start - copy_row
    x_from = copy_row * x_time + copy_d
    dy_from = copy_row * dy_time + copy_d
    z_row = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, Z_COPY)), 1) * RUN
    z_column = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, Z_COPY)), 0)
    z_from = z_row * z_time + z_column
    z_limit = time - start - z_row + z_column * 0
    x_ring = _ring(SLOTS, [STAGES, WARPS, 16, 16], ROWS, dtype)
    dy_ring = _ring(SLOTS, [STAGES, WARPS, 16, 16], ROWS, dtype)
    z_ring = _ring(SLOTS, [STAGES, 16, 16], Z_ROWS, dtype)
    for slot in gl.static_range((STAGES - 1) * SLOTS):
        early = (slot < copy_limit) & copy_ok
        _async_load(x_ring[slot % SLOTS].index(slot // SLOTS), x + x_from + slot * x_time, mask=early)
        _async_load(dy_ring[slot % SLOTS].index(slot // SLOTS), dy + dy_from + slot * dy_time, mask=early)
        _async_load(z_ring[slot % SLOTS].index(slot // SLOTS), z + z_from + slot * z_time, mask=slot < z_limit)
        if slot % SLOTS == SLOTS - 1:
            async_copy.commit_group()
    xs = ()
    partial = ()
    for slot in gl.static_range(1 - W, 0):
        ok = (slot >= -start - row) & (slot < limit) & d_ok
        xs = xs + (gl.load(x + row * x_time + d + slot * x_time, mask=ok, other=0.0),)
        partial = partial + (gl.zeros([WARPS, 16, 16], gl.float32, OWN),)
    basis = _basis(up, first, channels, R, W, WARPS, RIGHT, dtype)
    basis_t = _basis_transposed(up, first, channels, R, W, WARPS, RIGHT, dtype)
    starts = _starts(static_w, first, channels, W, STATIC, WARPS, MMA)
    up_sums = ()
    static_sums = ()
    for _ in gl.static_range(W):
        up_sums = up_sums + (gl.zeros([WARPS, 16, 16], gl.float32, MMA),)
        static_sums = static_sums + (gl.zeros([WARPS, 16, 8], gl.float32, MMA),)
    ones = gl.full([WARPS, 16, 8], 1.0, dtype, RIGHT)

    dz_shared = _ring(SLOTS, [WARPS, 16, 16], ROWS, gl.float32)
    dz_time = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, OUT)), 1) * RUN
    dz_rank = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, OUT)), 0)
    dz_limit = time - start - dz_time
    x_ahead = x + (STAGES - 1) * SLOTS * x_time
    dy_ahead = dy + (STAGES - 1) * SLOTS * dy_time
    z_ahead = z + (STAGES - 1) * SLOTS * z_time
    dx += (1 - W) * dx_time
    for group in range(0, RUN, SLOTS):
        async_copy.wait_group(STAGES - 2)
        ahead = group + (STAGES - 1) * SLOTS
        place = ahead // SLOTS % STAGES
        for slot in gl.static_range(SLOTS):
            inside = (ahead + slot < copy_limit) & copy_ok & (ahead < RUN + W - 1)
            _async_load(x_ring[slot].index(place), x_ahead + x_from + slot * x_time, mask=inside)
            _async_load(dy_ring[slot].index(place), dy_ahead + dy_from + slot * dy_time, mask=inside)
            z_inside = (ahead + slot < z_limit) & (ahead < RUN + W - 1)
            _async_load(z_ring[slot].index(place), z_ahead + z_from + slot * z_time, mask=z_inside)
        async_copy.commit_group()
        x_ahead += SLOTS * x_time
        dy_ahead += SLOTS * dy_time
        z_ahead += SLOTS * z_time
        place = group // SLOTS % STAGES
        out = dx + row * dx_time + d
        dx += SLOTS * dx_time
        for slot in gl.static_range(SLOTS):
            xs = xs + (x_ring[slot].index(place).load(OWN),)
            dy_slot = dy_ring[slot].index(place).load(OWN)
            gradient = dy_slot.to(gl.float32)
            generator = _generator(z_ring[slot].index(place), WARPS, LEFT)
            generator_right = _generator(z_ring[slot].index(place), WARPS, RIGHT)
            dz_slot = gl.zeros([WARPS, 16, 16], gl.float32, MMA)
            new_up_sums = ()
            new_static_sums = ()
            backs = ()
            for tap in gl.static_range(W):
                g = _multiply(dy_slot, xs[W - 1 - tap])
                dz_slot = mma_v2(_to_columns(g, WARPS, LEFT), basis_t[tap], dz_slot)
                g_transposed = _transposed(g, WARPS, LEFT)
                new_up_sums = new_up_sums + (mma_v2(g_transposed, generator_right, up_sums[tap]),)
                if STATIC:
                    new_static_sums = new_static_sums + (mma_v2(g_transposed, ones, static_sums[tap]),)
                filters = _to_channels(mma_v2(generator, basis[tap], starts[tap]), WARPS, OWN)
                back = filters * gradient
                if tap > 0:
                    back += partial[W - 1 - tap]
                elif RESIDUAL:
                    back += gradient
                backs = backs + (back,)
            up_sums = new_up_sums
            if STATIC:
                static_sums = new_static_sums
            dz_shared[slot].store(dz_slot)
            done = (group + slot + 1 - W < limit) & (group + slot >= W - 1) & d_ok
            gl.store(out + slot * dx_time, backs[W - 1].to(dtype), mask=done)
            # partial[k]: what this run gave so far to dx of W - 1 - k slots before the next one
            partial = ()
            kept = ()
            for index in gl.static_range(W - 1):
                partial = partial + (backs[W - 2 - index],)
                kept = kept + (xs[index + 1],)
            xs = kept
        for slot in gl.static_range(SLOTS):
            total = gl.sum(dz_shared[slot].load(SUM), 0)
            dz_ok = (group + slot < dz_limit) & (dz_rank < R)
            gl.store(dz + slot * RANKS + dz_time * RANKS + dz_rank, total, mask=dz_ok)
        dz += SLOTS * RANKS

    # the first steps of the next run still give to this run's last dx
    async_copy.wait_group(0)
    for slot in gl.static_range(W - 1):
        place = (RUN + slot) // SLOTS % STAGES
        gradient = dy_ring[slot % SLOTS].index(place).load(OWN).to(gl.float32)
        generator = _generator(z_ring[slot % SLOTS].index(place), WARPS, LEFT)
        later = ()
        for index in gl.static_range(W - 1 - slot):
            filters = _to_channels(mma_v2(generator, basis[W - 1 - index], starts[W - 1 - index]), WARPS, OWN)
            later = later + (partial[index] + filters * gradient,)
        done = (RUN + slot + 1 - W < limit) & d_ok
        gl.store(dx + row * dx_time + d + slot * dx_time, later[0].to(dtype), mask=done)
        partial = ()
        for index in gl.static_range(W - 2 - slot):
            partial = partial + (later[index + 1],)

    channel = first + _axis(WARPS, 0, MMA) * 16 + _channel(_axis(16, 1, MMA))
    rank = _axis(16, 2, MMA)
    zero = _axis(8, 2, MMA)
    for tap in gl.static_range(W):
        at = (program.to(gl.int64) * R + rank) * (W * channels) + tap * channels + channel
        gl.store(dup + at, up_sums[tap], mask=(rank < R) & (channel < channels))
        if STATIC:
            at = (program.to(gl.int64) * W + tap) * channels + channel + zero * 0
            gl.store(dstatic + at, static_sums[tap], mask=(zero == 0) & (channel < channels))


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
        return triton.cdiv(programs_a_chunk * triton.cdiv(time, _ROWS * run), at_once) * (run + 16)

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
    blocks = triton.cdiv(channels, 16 * warps)
    run = _run(time, blocks * batch, 3 * multiprocessors(x), longest=32)
    chunks = triton.cdiv(time, _ROWS * run)
    _forward_kernel[(blocks * batch * chunks,)](
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
    blocks = triton.cdiv(channels, 16 * warps)
    run = _run(time, blocks * batch, multiprocessors(x), longest=128)
    chunks = triton.cdiv(time, _ROWS * run)
    dx = x.new_empty(x.shape)
    dup = up.new_empty(up.shape)
    parts = triton.cdiv(max(segments), 16 * warps)
    new_partial = x.new_zeros if min(segments) != max(segments) else x.new_empty
    dz_partial = new_partial((parts, batch * time, dz.shape[2]), dtype=torch.float32)
    up_partial = x.new_empty((batch * chunks, rank, width * channels), dtype=torch.float32)
    jobs = [(dz_partial, dz), (up_partial, dup)]
    dstatic = static_partial = None
    if static_w is not None:
        dstatic = static_w.new_empty(static_w.shape)
        static_partial = x.new_empty((batch * chunks, width, channels), dtype=torch.float32)
        jobs.append((static_partial, dstatic))
    _backward_kernel[(blocks * batch * chunks,)](
        dy, x, z, up, static_w, dx, dz_partial, up_partial, static_partial,
        time, channels, batch * time, dy.stride(0), x.stride(0), z.stride(0), chunks, blocks,
        dy_time=dy.stride(1), x_time=x.stride(1), z_time=z.stride(1), dx_time=channels, SEGMENTS=segments,
        R=rank, W=width, STATIC=static_w is not None, RESIDUAL=residual,
        RUN=run, SLOTS=2, STAGES=4, WARPS=warps, num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    sum_parts(*jobs)
    return dx, dz, dup, dstatic
