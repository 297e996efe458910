"""Low-rank or static convolutions of SwiGLU's two inputs and SwiGLU itself (arXiv 2002.05202), in Gluon.

A program computes the same channels of gate and up, so that a thread has both of a pair. `lowrank_mma_kernels` explains
how a warp's 16 rows and 16 channels lie in registers; the convolutions are those of its forward kernel. What they give
is not kept: the backward pass computes it again, and so moves as many bytes as SwiGLU's alone would.

Legend: B batch, T time, D channels of gate and of up, W taps, R rank (16 columns of z for each). Without z and U,
filters are static.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from dynconv.ops.gluon_pieces import allocate_ring, async_load, drop_first, load_history, sigmoid
from dynconv.ops.mma import (
    axis,
    copy_layout,
    load_basis,
    load_generator,
    load_starts,
    mma_layout,
    own_layout,
    read_layout,
    read_slot,
    right_operands,
    to_channels,
)


@gluon.jit
def _convolved(
    xs, generator, basis, starts, RESIDUAL: gl.constexpr, W: gl.constexpr, WARPS: gl.constexpr, OWN: gl.constexpr
):
    """The convolution at the last of xs, the inputs of W slots, oldest first."""
    result = gl.zeros([WARPS, 16, 16], gl.float32, OWN)
    if RESIDUAL:
        result = xs[W - 1].to(gl.float32)
    for tap in gl.static_range(W):
        filters = starts[tap]
        if generator is not None:
            filters = mma_v2(generator, basis[tap], filters)
        filters = to_channels(filters, WARPS, OWN)
        result += filters * xs[W - 1 - tap].to(gl.float32)
    return result


@gluon.jit(do_not_specialize=["time", "chunks", "blocks", "RUN"])
def gated_kernel(
    x, z, up, static_w, dy, dgate, draised, y,
    time, x_batch, z_batch, chunks, blocks, RUN,
    x_time: gl.constexpr, z_time: gl.constexpr, dy_time: gl.constexpr, CHANNELS: gl.constexpr, R: gl.constexpr,
    W: gl.constexpr, RESIDUAL: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """y = silu(gate) * up, of gate and up after their convolutions; x [B, T, 2*D] holds them before these.

    With dy, the gradient of y, those of gate and up after their convolutions are computed instead.
    """
    MMA: gl.constexpr = mma_layout(WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    OWN: gl.constexpr = own_layout(WARPS)
    COPY: gl.constexpr = copy_layout(WARPS)
    READ: gl.constexpr = read_layout(WARPS)
    Z_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [1, WARPS], [1, 0])
    LINES: gl.constexpr = gl.SwizzledSharedLayout(vec=16, per_phase=1, max_phase=4, order=[1, 0])
    Z_ROWS: gl.constexpr = gl.SwizzledSharedLayout(8, per_phase=2, max_phase=4, order=[1, 0])
    dtype: gl.constexpr = x.dtype.element_ty
    first = gl.program_id(0) % blocks * (16 * WARPS)
    program = gl.program_id(0) // blocks
    batch = (program // chunks).to(gl.int64)
    start = (program % chunks) * (16 * RUN)
    x += batch * x_batch + start.to(gl.int64) * x_time
    if z is not None:
        z += batch * z_batch + start.to(gl.int64) * z_time
    tokens = (batch * time + start) * CHANNELS
    if dy is not None:
        dy += (batch * time + start) * dy_time
        dgate += tokens
        draised += tokens
    else:
        y += tokens
    row = axis(16, 1, OWN) * RUN
    d = first + axis(WARPS, 0, OWN) * 16 + axis(16, 2, OWN)
    d_ok = d < CHANNELS
    limit = time - start - row
    copy_row = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, COPY)), 1) * RUN
    copy_d = first + gl.expand_dims(gl.arange(0, 16 * WARPS, gl.SliceLayout(0, COPY)), 0)
    copy_ok = copy_d < CHANNELS
    copy_limit = time - start - copy_row
    x_from = copy_row * x_time + copy_d
    z_row = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, Z_COPY)), 1) * RUN
    z_column = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, Z_COPY)), 0)
    z_from = z_row * z_time + z_column
    z_limit = time - start - z_row + z_column * 0
    gate_ring = allocate_ring(SLOTS, [STAGES, 16, 16 * WARPS], LINES, dtype)
    up_ring = allocate_ring(SLOTS, [STAGES, 16, 16 * WARPS], LINES, dtype)
    if z is not None:
        z_ring = allocate_ring(SLOTS, [STAGES, 16, 32], Z_ROWS, dtype)
    if dy is not None:
        dy_ring = allocate_ring(SLOTS, [STAGES, 16, 16 * WARPS], LINES, dtype)
        dy += copy_row * dy_time + copy_d
    for slot in gl.static_range((STAGES - 1) * SLOTS):
        x_ok = (slot < copy_limit) & copy_ok
        async_load(gate_ring[slot % SLOTS].index(slot // SLOTS), x + x_from + slot * x_time, mask=x_ok)
        async_load(up_ring[slot % SLOTS].index(slot // SLOTS), x + CHANNELS + x_from + slot * x_time, mask=x_ok)
        if z is not None:
            async_load(z_ring[slot % SLOTS].index(slot // SLOTS), z + z_from + slot * z_time, mask=slot < z_limit)
        if dy is not None:
            async_load(dy_ring[slot % SLOTS].index(slot // SLOTS), dy + slot * dy_time, mask=x_ok)
        if slot % SLOTS == SLOTS - 1:
            async_copy.commit_group()
    gates = load_history(x + row * x_time + d, None, start, row, limit, d_ok, x_time, W)
    ups = load_history(x + CHANNELS + row * x_time + d, None, start, row, limit, d_ok, x_time, W)
    gate_basis = ()
    up_basis = ()
    if z is not None:
        gate_basis = load_basis(up, first, 2 * CHANNELS, 0, R, W, WARPS, OWN, dtype)
        gate_basis = right_operands(gate_basis, WARPS, RIGHT)
        up_basis = load_basis(up, first + CHANNELS, 2 * CHANNELS, 0, R, W, WARPS, OWN, dtype)
        up_basis = right_operands(up_basis, WARPS, RIGHT)
    gate_starts = load_starts(static_w, first, 2 * CHANNELS, W, WARPS, OWN, MMA)
    up_starts = load_starts(static_w, first + CHANNELS, 2 * CHANNELS, W, WARPS, OWN, MMA)

    out = row * CHANNELS + d
    x_ahead = x + (STAGES - 1) * SLOTS * x_time
    if z is not None:
        z_ahead = z + (STAGES - 1) * SLOTS * z_time
    if dy is not None:
        dy_ahead = dy + (STAGES - 1) * SLOTS * dy_time
    for group in range(0, RUN, SLOTS):
        async_copy.wait_group(STAGES - 2)
        ahead = group + (STAGES - 1) * SLOTS
        place = ahead // SLOTS % STAGES
        for slot in gl.static_range(SLOTS):
            inside = (ahead + slot < copy_limit) & copy_ok & (ahead < RUN)
            async_load(gate_ring[slot].index(place), x_ahead + x_from + slot * x_time, mask=inside)
            async_load(up_ring[slot].index(place), x_ahead + CHANNELS + x_from + slot * x_time, mask=inside)
            if z is not None:
                z_inside = (ahead + slot < z_limit) & (ahead < RUN)
                async_load(z_ring[slot].index(place), z_ahead + z_from + slot * z_time, mask=z_inside)
            if dy is not None:
                async_load(dy_ring[slot].index(place), dy_ahead + slot * dy_time, mask=inside)
        async_copy.commit_group()
        x_ahead += SLOTS * x_time
        if z is not None:
            z_ahead += SLOTS * z_time
        if dy is not None:
            dy_ahead += SLOTS * dy_time
        place = group // SLOTS % STAGES
        for slot in gl.static_range(SLOTS):
            ok = (group + slot < limit) & d_ok
            gates = gates + (read_slot(gate_ring[slot].index(place), WARPS, READ, OWN),)
            ups = ups + (read_slot(up_ring[slot].index(place), WARPS, READ, OWN),)
            gate_z = None
            up_z = None
            if z is not None:
                gate_z = load_generator(z_ring[slot].index(place).slice(0, 16, 1), WARPS, LEFT)
                up_z = load_generator(z_ring[slot].index(place).slice(16, 16, 1), WARPS, LEFT)
            gate = _convolved(gates, gate_z, gate_basis, gate_starts, RESIDUAL, W, WARPS, OWN)
            raised = _convolved(ups, up_z, up_basis, up_starts, RESIDUAL, W, WARPS, OWN)
            share = sigmoid(gate)
            if dy is not None:
                gradient = read_slot(dy_ring[slot].index(place), WARPS, READ, OWN).to(gl.float32)
                to_raised = gradient * gate * share
                to_gate = gradient * raised * share * (1.0 + gate * (1.0 - share))
                gl.store(dgate + out + slot * CHANNELS, to_gate.to(dtype), mask=ok)
                gl.store(draised + out + slot * CHANNELS, to_raised.to(dtype), mask=ok)
            else:
                gl.store(y + out + slot * CHANNELS, (gate * share * raised).to(dtype), mask=ok)
            gates = drop_first(gates)
            ups = drop_first(ups)
        out += SLOTS * CHANNELS
