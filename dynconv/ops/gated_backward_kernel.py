"""The backward pass of low-rank convolutions of SwiGLU's two inputs and of SwiGLU itself, in one launch, in Gluon.

SwiGLU's gradients as a launch of its own would read gate and up once more, and write two tensors that the next launch
reads. Here a program computes the convolutions again and goes on from SwiGLU's gradients in registers.

As in `lowrank_mma_kernels`, a warp owns 16 rows, each a run of RUN consecutive time steps (slots). Its 16 channels are
8 of gate and the same 8 of up, so that a thread has both values of a pair. As halves of the matrix unit's 16 columns
they have generators of their own:
- the filters z U and dU = z^T g, whose columns are channels, are products of each half alone;
- dz = g U^T, which sums over channels, takes two taps of 8 channels in one product;
- the static filter's gradient is g summed over time, of both halves in one product; each tap adds to its own columns.

Legend: B batch, T time, D channels of gate and of up, W taps (at most 4), R rank (16 columns of z for each).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from dynconv.ops.gluon_pieces import allocate_ring, async_load, drop_first, load_history, sigmoid
from dynconv.ops.mma import axis, copy_layout, load_generator, mma_layout, multiply
from dynconv.ops.mma_halves import (
    paired,
    read_both,
    read_one,
    side_by_side,
    store_both,
    sum_columns,
    sum_operand,
    total_of,
    transposed,
    unpaired,
    widened,
)


@gluon.jit
def _load_basis(
    up, d, CHANNELS: gl.constexpr, PART: gl.constexpr, R: gl.constexpr, W: gl.constexpr, WARPS: gl.constexpr,
    MMA: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """U of a part as right operands: [WARPS, rank, channel] of each tap; [WARPS, channel, rank], two taps in each."""
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    rank = axis(16, 1, MMA)
    loaded = ()
    basis = ()
    for tap in gl.static_range(W):
        at = up + rank * (W * 2 * CHANNELS) + (2 * tap + PART) * CHANNELS + d
        loaded = loaded + (gl.load(at, mask=(rank < R) & (d < CHANNELS), other=0.0).to(dtype),)
        basis = basis + (gl.convert_layout(transposed(loaded[tap], WARPS).permute([0, 2, 1]), RIGHT),)
    if W % 2 == 1:
        loaded = loaded + (gl.zeros_like(loaded[0]),)
    basis_t = ()
    for pair in gl.static_range((W + 1) // 2):
        both = side_by_side(loaded[2 * pair], loaded[2 * pair + 1], WARPS, MMA)
        basis_t = basis_t + (gl.convert_layout(both.permute([0, 2, 1]), RIGHT),)
    return basis, basis_t


@gluon.jit
def _load_starts(
    static_w, d, zero, CHANNELS: gl.constexpr, PART: gl.constexpr, W: gl.constexpr, WARPS: gl.constexpr,
    MMA: gl.constexpr,
):  # fmt: skip
    """Initial accumulators of the products z U: the taps of the static filter, or zeros without one.

    `zero` is 0, which the compiler cannot know: it would see that all rows are equal, keep one of them, and copy it
    before each product, which wants a register for each.
    """
    place = d + axis(16, 1, MMA) * zero
    starts = ()
    for tap in gl.static_range(W):
        start = gl.zeros([WARPS, 16, 8], gl.float32, MMA)
        if static_w is not None:
            at = static_w + (2 * tap + PART) * CHANNELS + place
            start += gl.load(at, mask=d < CHANNELS, other=0.0).to(gl.float32)
        starts = starts + (start,)
    return starts


@gluon.jit
def _filters(generator, basis, starts):
    """z U and the static filter, for each tap [WARPS, 16 rows, 8 channels]."""
    filters = ()
    for tap in gl.static_range(len(basis)):
        filters = filters + (mma_v2(generator, basis[tap], starts[tap]),)
    return filters


@gluon.jit
def _convolved(xs, filters, RESIDUAL: gl.constexpr, W: gl.constexpr):
    """The convolution at the last of xs, the inputs of W slots, oldest first."""
    result = filters[0] * widened(xs[W - 1])
    if RESIDUAL:
        result += widened(xs[W - 1])
    for tap in gl.static_range(1, W):
        result += filters[tap] * widened(xs[W - 1 - tap])
    return result


@gluon.jit
def _through_swiglu(gradient, gate, raised):
    """The gradients of gate and up from that of silu(gate) * up."""
    share = sigmoid(gate)
    silu = gate * share
    return gradient * raised * (share + silu * (1.0 - share)), gradient * silu


@gluon.jit
def _products(gradient, xs, dtype: gl.constexpr, W: gl.constexpr, WARPS: gl.constexpr):
    """g = gradient * x for each tap, and the same transposed."""
    rounded = gradient.to(dtype)
    products = ()
    turned = ()
    for tap in gl.static_range(W):
        products = products + (multiply(rounded, xs[W - 1 - tap]),)
        turned = turned + (transposed(products[tap], WARPS),)
    return products, turned


@gluon.jit
def _add_to_basis(sums, generator_t, turned, RIGHT: gl.constexpr):
    """`sums` of dU [WARPS, rank, channel], of each tap, with what this slot adds."""
    new_sums = ()
    for tap in gl.static_range(len(sums)):
        g = gl.convert_layout(turned[tap].permute([0, 2, 1]), RIGHT)
        new_sums = new_sums + (mma_v2(generator_t, g, sums[tap]),)
    return new_sums


@gluon.jit
def _of_generator(products, basis_t, W: gl.constexpr, WARPS: gl.constexpr, MMA: gl.constexpr):
    """dz of a part at this slot, of the warp's channels: [WARPS, 16 rows, rank]."""
    dz = gl.zeros([WARPS, 16, 16], gl.float32, MMA)
    for pair in gl.static_range((W + 1) // 2):
        second = products[2 * pair + 1] if 2 * pair + 1 < W else gl.zeros_like(products[2 * pair])
        g = side_by_side(products[2 * pair], second, WARPS, gl.DotOperandLayout(0, MMA, 2))
        dz = mma_v2(g, basis_t[pair], dz)
    return dz


@gluon.jit
def _of_inputs(gradient, filters, partial, RESIDUAL: gl.constexpr, W: gl.constexpr):
    """dx of the slot W - 1 before this one, and what is summed so far of the later ones, the oldest first.

    `partial` is the same before this slot: its number k is of the slot that lies W - 1 - k before this one.
    """
    sums = ()
    for back in gl.static_range(W - 1, -1, -1):
        of_slot = filters[back] * gradient
        if back > 0:
            of_slot += partial[W - 1 - back]
        elif RESIDUAL:
            of_slot += gradient
        sums = sums + (of_slot,)
    return sums[0], drop_first(sums)


@gluon.jit
def _of_last_inputs(gradient, filters, partial, W: gl.constexpr):
    """`partial`, of the last slots of a run, with what a slot after the run adds."""
    sums = ()
    for index in gl.static_range(len(partial)):
        sums = sums + (partial[index] + filters[W - 1 - index] * gradient,)
    return sums


@gluon.jit(do_not_specialize=["time", "tokens", "chunks", "blocks", "RUN"])
def gated_backward_kernel(
    dy, x, z, up, static_w, dx, dz, dup, dstatic,
    time, tokens, dy_batch, x_batch, z_batch, chunks, blocks, RUN,
    dy_time: gl.constexpr, x_time: gl.constexpr, z_time: gl.constexpr, dx_time: gl.constexpr, CHANNELS: gl.constexpr,
    R: gl.constexpr, W: gl.constexpr, RESIDUAL: gl.constexpr,
    SLOTS: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """The gradients of x [B, T, 2*D], z, U and the static filter from dy [B, T, D], that of `gated_kernel`'s result.

    Those of z and U and of the static filter are partial sums, over a program's channels or time. All may be None.
    """
    MMA: gl.constexpr = mma_layout(WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    BLOCK: gl.constexpr = 8 * WARPS  # channels of gate, and of up
    COPY: gl.constexpr = copy_layout(WARPS)
    DY_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [32 // WARPS, WARPS], [WARPS, 1], [1, 0])
    Z_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    SUM: gl.constexpr = gl.BlockedLayout([WARPS, 1, 2], [1, 2, 16], [1, WARPS, 1], [2, 1, 0])
    OUT: gl.constexpr = gl.SliceLayout(0, SUM)
    TOTAL: gl.constexpr = gl.BlockedLayout([1, 1, 2], [1, 8, 4], [WARPS, 1, 1], [2, 1, 0])
    LINES: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=8, order=[1, 0])
    DY_LINES: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=8 // WARPS, max_phase=WARPS, order=[1, 0])
    Z_ROWS: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=2, max_phase=4, order=[1, 0])
    SUMS: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=1, max_phase=4, order=[2, 1, 0])
    COLUMNS: gl.constexpr = 2 * R  # of a row of dz
    dtype: gl.constexpr = x.dtype.element_ty
    first = gl.program_id(0) % blocks * BLOCK
    program = gl.program_id(0) // blocks
    batch = (program // chunks).to(gl.int64)
    start = (program % chunks) * (16 * RUN)
    x += batch * x_batch + start.to(gl.int64) * x_time
    dy += batch * dy_batch + start.to(gl.int64) * dy_time
    z += batch * z_batch + start.to(gl.int64) * z_time
    if dx is not None:
        dx += (batch * time + start + 1 - W) * dx_time  # dx is written W - 1 slots behind the slot that is read
    if dz is not None:
        dz += ((first // BLOCK).to(gl.int64) * tokens + batch * time + start) * COLUMNS

    end = RUN + W - 1  # the outputs of the W - 1 slots after this run depend on its inputs, too
    row = axis(16, 1, MMA) * RUN
    d = first + axis(WARPS, 0, MMA) * 8 + axis(8, 2, MMA)
    d_ok = d < CHANNELS
    limit = time - start - row
    # The limits of copies are 0 for what lies outside of the channels or ranks.
    copy_row = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, COPY)), 1) * RUN
    column = gl.expand_dims(gl.arange(0, 2 * BLOCK, gl.SliceLayout(0, COPY)), 0)
    copy_limit = gl.where(first + column % BLOCK < CHANNELS, gl.minimum(time - start - copy_row, end), 0)
    copy_d = first + column % BLOCK + column // BLOCK * CHANNELS
    x_from = copy_row * x_time + copy_d
    dx_to = copy_row * dx_time + copy_d
    dy_row = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, DY_COPY)), 1) * RUN
    dy_d = first + gl.expand_dims(gl.arange(0, BLOCK, gl.SliceLayout(0, DY_COPY)), 0)
    dy_limit = gl.where(dy_d < CHANNELS, gl.minimum(time - start - dy_row, end), 0)
    dy_from = dy_row * dy_time + dy_d
    z_row = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, Z_COPY)), 1) * RUN
    z_column = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, Z_COPY)), 0)
    z_limit = gl.minimum(time - start - z_row, end) + z_column * 0
    z_from = z_row * z_time + z_column
    x_ring = allocate_ring(SLOTS, [STAGES, 16, 2 * BLOCK], LINES, dtype)
    dy_ring = allocate_ring(SLOTS, [STAGES, 16, BLOCK], DY_LINES, dtype)
    z_ring = allocate_ring(SLOTS, [STAGES, 16, 32], Z_ROWS, dtype)
    for slot in gl.static_range((STAGES - 1) * SLOTS):
        async_load(x_ring[slot % SLOTS].index(slot // SLOTS), x + x_from + slot * x_time, mask=slot < copy_limit)
        async_load(dy_ring[slot % SLOTS].index(slot // SLOTS), dy + dy_from + slot * dy_time, mask=slot < dy_limit)
        async_load(z_ring[slot % SLOTS].index(slot // SLOTS), z + z_from + slot * z_time, mask=slot < z_limit)
        if slot % SLOTS == SLOTS - 1:
            async_copy.commit_group()
    gates = load_history(x + row * x_time + d, None, start, row, limit, d_ok, x_time, W)
    ups = load_history(x + CHANNELS + row * x_time + d, None, start, row, limit, d_ok, x_time, W)
    gates, ups = paired(gates, WARPS), paired(ups, WARPS)
    gate_basis, gate_basis_t = _load_basis(up, d, CHANNELS, 0, R, W, WARPS, MMA, dtype)
    up_basis, up_basis_t = _load_basis(up, d, CHANNELS, 1, R, W, WARPS, MMA, dtype)
    zero = time >> 31  # 0, as time is positive
    gate_starts = _load_starts(static_w, d, zero, CHANNELS, 0, W, WARPS, MMA)
    up_starts = _load_starts(static_w, d, zero, CHANNELS, 1, W, WARPS, MMA)
    gate_partial = ()
    gate_sums = ()
    static_columns = ()
    for tap in gl.static_range(W):
        if tap > 0:
            gate_partial = gate_partial + (gl.zeros([WARPS, 16, 8], gl.float32, MMA),)
        if dup is not None:
            gate_sums = gate_sums + (gl.zeros([WARPS, 16, 8], gl.float32, MMA),)
        static_columns = static_columns + (sum_columns(tap, dtype, WARPS, RIGHT),)
    up_partial, up_sums = gate_partial, gate_sums
    static_sums = gl.zeros([WARPS, 16, 8], gl.float32, MMA)

    dz_shared = allocate_ring(SLOTS, [WARPS, 16, 32], SUMS, gl.float32)
    dx_shared = allocate_ring(SLOTS, [16, 2 * BLOCK], LINES, dtype)
    dz_time = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, OUT)), 1) * RUN
    dz_column = gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, OUT)), 0)
    dz_limit = gl.where(dz_column % 16 < R, time - start - dz_time, 0)
    dz_to = dz_time * COLUMNS + dz_column // 16 * R + dz_column % 16
    x_ahead = x + (STAGES - 1) * SLOTS * x_time
    dy_ahead = dy + (STAGES - 1) * SLOTS * dy_time
    z_ahead = z + (STAGES - 1) * SLOTS * z_time
    for group in range(0, RUN, SLOTS):
        gl.assume(group >= 0)  # without this, the compiler adds code for remainders of negative numbers
        async_copy.wait_group(STAGES - 2)
        place = group // SLOTS % STAGES
        gate_xs, up_xs = unpaired(gates, dtype, WARPS, MMA), unpaired(ups, dtype, WARPS, MMA)
        for slot in gl.static_range(SLOTS):
            gate_x, up_x = read_both(x_ring[slot].index(place), WARPS, MMA)
            gate_xs = gate_xs + (gate_x,)
            up_xs = up_xs + (up_x,)
            gradient = widened(read_one(dy_ring[slot].index(place), WARPS, MMA))
            gate_ranks = z_ring[slot].index(place).slice(0, 16, 1)
            up_ranks = z_ring[slot].index(place).slice(16, 16, 1)
            gate_filters = _filters(load_generator(gate_ranks, WARPS, LEFT), gate_basis, gate_starts)
            up_filters = _filters(load_generator(up_ranks, WARPS, LEFT), up_basis, up_starts)
            gate = _convolved(gate_xs, gate_filters, RESIDUAL, W)
            raised = _convolved(up_xs, up_filters, RESIDUAL, W)
            to_gate, to_up = _through_swiglu(gradient, gate, raised)
            gate_dx, gate_partial = _of_inputs(to_gate, gate_filters, gate_partial, RESIDUAL, W)
            up_dx, up_partial = _of_inputs(to_up, up_filters, up_partial, RESIDUAL, W)
            if dx is not None:
                store_both(dx_shared[slot], gate_dx.to(dtype), up_dx.to(dtype), WARPS)
            gate_g, gate_turned = _products(to_gate, gate_xs, dtype, W, WARPS)
            up_g, up_turned = _products(to_up, up_xs, dtype, W, WARPS)
            if dz is not None:
                gate_dz = _of_generator(gate_g, gate_basis_t, W, WARPS, MMA)
                up_dz = _of_generator(up_g, up_basis_t, W, WARPS, MMA)
                dz_shared[slot].store(side_by_side(gate_dz, up_dz, WARPS, MMA))
            gate_sums = _add_to_basis(
                gate_sums, load_generator(gate_ranks.permute((1, 0)), WARPS, LEFT), gate_turned, RIGHT
            )
            up_sums = _add_to_basis(up_sums, load_generator(up_ranks.permute((1, 0)), WARPS, LEFT), up_turned, RIGHT)
            if dstatic is not None:
                for tap in gl.static_range(W):
                    both = sum_operand(gate_turned[tap], up_turned[tap], WARPS, LEFT)
                    static_sums = mma_v2(both, static_columns[tap], static_sums)
            gate_xs = drop_first(gate_xs)
            up_xs = drop_first(up_xs)
        gates, ups = paired(gate_xs, WARPS), paired(up_xs, WARPS)
        for slot in gl.static_range(SLOTS):
            if dz is not None:
                total = gl.sum(dz_shared[slot].load(SUM), 0).to(dz.dtype.element_ty)
                gl.store(dz + slot * COLUMNS + dz_to, total, mask=group + slot < dz_limit)
            if dx is not None:
                done = (group + slot + 1 - W < copy_limit) & (group + slot >= W - 1)
                gl.store(dx + slot * dx_time + dx_to, dx_shared[slot].load(COPY), mask=done)
        # These copies overwrite the slots of the group before this one. All warps have read those, because after
        # `wait_group` the compiler lets them wait for one another. If the copies came right after that, it would put
        # another barrier between them and the reads of this group, because it does not tell a buffer's slots apart.
        ahead = group + (STAGES - 1) * SLOTS
        place = ahead // SLOTS % STAGES
        for slot in gl.static_range(SLOTS):
            async_load(x_ring[slot].index(place), x_ahead + x_from + slot * x_time, mask=ahead + slot < copy_limit)
            async_load(dy_ring[slot].index(place), dy_ahead + dy_from + slot * dy_time, mask=ahead + slot < dy_limit)
            async_load(z_ring[slot].index(place), z_ahead + z_from + slot * z_time, mask=ahead + slot < z_limit)
        async_copy.commit_group()
        x_ahead += SLOTS * x_time
        dy_ahead += SLOTS * dy_time
        z_ahead += SLOTS * z_time
        if dx is not None:
            dx += SLOTS * dx_time
        if dz is not None:
            dz += SLOTS * COLUMNS

    # The last W - 1 inputs of this run also enter the first outputs of the next run: add those to their dx.
    async_copy.wait_group(0)
    gate_xs, up_xs = unpaired(gates, dtype, WARPS, MMA), unpaired(ups, dtype, WARPS, MMA)
    for slot in gl.static_range(W - 1):
        place = (RUN + slot) // SLOTS % STAGES
        gate_x, up_x = read_both(x_ring[slot % SLOTS].index(place), WARPS, MMA)
        gate_xs = gate_xs + (gate_x,)
        up_xs = up_xs + (up_x,)
        gradient = widened(read_one(dy_ring[slot % SLOTS].index(place), WARPS, MMA))
        gate_ranks = z_ring[slot % SLOTS].index(place).slice(0, 16, 1)
        up_ranks = z_ring[slot % SLOTS].index(place).slice(16, 16, 1)
        gate_filters = _filters(load_generator(gate_ranks, WARPS, LEFT), gate_basis, gate_starts)
        up_filters = _filters(load_generator(up_ranks, WARPS, LEFT), up_basis, up_starts)
        gate = _convolved(gate_xs, gate_filters, RESIDUAL, W)
        raised = _convolved(up_xs, up_filters, RESIDUAL, W)
        to_gate, to_up = _through_swiglu(gradient, gate, raised)
        gate_partial = _of_last_inputs(to_gate, gate_filters, gate_partial, W)
        up_partial = _of_last_inputs(to_up, up_filters, up_partial, W)
        if dx is not None:
            done = (RUN + slot + 1 - W < limit) & d_ok
            at = dx + slot * dx_time + row * dx_time + d
            gl.store(at, gate_partial[0].to(dtype), mask=done)
            gl.store(at + CHANNELS, up_partial[0].to(dtype), mask=done)
        gate_partial = drop_first(gate_partial)
        up_partial = drop_first(up_partial)
        gate_xs = drop_first(gate_xs)
        up_xs = drop_first(up_xs)

    SIZE: gl.constexpr = 2 * W * CHANNELS
    if dup is not None:
        rank = axis(16, 1, MMA)
        to_rank = dup + program.to(gl.int64) * (R * SIZE) + rank * SIZE + d
        for tap in gl.static_range(W):
            gl.store(to_rank + 2 * tap * CHANNELS, gate_sums[tap], mask=(rank < R) & d_ok)
            gl.store(to_rank + (2 * tap + 1) * CHANNELS, up_sums[tap], mask=(rank < R) & d_ok)
    if dstatic is not None:
        total_d = first + axis(WARPS, 0, TOTAL) * 8 + axis(8, 1, TOTAL)
        tap, part = axis(8, 2, TOTAL) % 4, axis(8, 2, TOTAL) // 4
        at = dstatic + program.to(gl.int64) * SIZE + (2 * tap + part) * CHANNELS + total_d
        gl.store(at, total_of(static_sums, WARPS, TOTAL), mask=(tap < W) & (total_d < CHANNELS))
