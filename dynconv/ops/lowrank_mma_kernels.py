"""The low-rank convolution on NVIDIA tensor cores, in Gluon: 16-bit inputs, W <= 8.

Legend: B batch, T time, D channels, W taps, R rank (padded in z to a multiple of 16), G segments.

A launch handles R of ALL_RANKS ranks, from first_rank on: at most 64 forward and 16 backward. Larger ranks take several
launches; all but the first add to the y or dx that the launches before them rounded to its dtype. Forward, y is `added`
then; this may also be any other tensor of its shape. Backward, ADD is set.
If y_1 and y_2 are given, they are the results of segments 1 and 2, and y is that of segment 0 alone; so are dy_1, dy_2
and dy. With `frequencies`, segments 0 and 1 are queries and keys, and RoPE rotates them.
`positions` is a pointer to each token's index within its document, or the length that all documents have.

The filters and sums stay in registers. A warp owns 16 channels and 16 rows. Row r, slot s stands for time r * RUN + s
of the program's chunk, so the earlier inputs of a slot are the slots before it, in the same thread.
Two properties make the data fit the matrix unit's layouts without moving between threads:
- the order of a matrix product's columns, or of the channels it sums over, is arbitrary, so column c holds channel
  `mma.channel_of(c)`, which makes each thread's four channels adjacent in memory;
- one instruction transposes an 8 x 8 block across a warp, so g = dy * x serves both as the left operand of
  dz = g U^T (summed over channels) and, transposed, of dU^T = g^T z (summed over time).
x, dy, z and positions stream through a ring buffer in shared memory (cp.async). The accumulators of the filters z U
start from the static filter.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from dynconv.ops.fused_pieces import next_rotation, pair_layout, rotate, start_rotation
from dynconv.ops.gluon_pieces import (
    allocate_ring,
    async_load,
    drop_first,
    end_of_documents,
    forget,
    load_history,
    sigmoid,
    through_silu,
)
from dynconv.ops.mma import (
    axis,
    channel_of,
    copy_layout,
    copy_positions,
    find_block,
    load_basis,
    load_before,
    load_generator,
    load_starts,
    mma_layout,
    multiply,
    of_segment,
    own_layout,
    read_layout,
    read_position,
    read_slot,
    renewed,
    right_operands,
    to_channels,
    to_columns,
    transpose,
    transposed_operands,
)


@gluon.jit
def _gradient_of_sum(gradient, xs, generator, basis, starts, W: gl.constexpr, WARPS: gl.constexpr, OWN: gl.constexpr):
    """The gradient with respect to silu's input, from the gradient with respect to its output.

    That input, the convolution's sum for this slot, is recomputed from xs, the slot's W inputs, oldest first.
    """
    inner = gl.zeros([WARPS, 16, 16], gl.float32, OWN)
    for tap in gl.static_range(W):
        filters = to_channels(mma_v2(generator, basis[tap], starts[tap]), WARPS, OWN)
        inner += filters * xs[W - 1 - tap].to(gl.float32)
    return through_silu(gradient, inner)


@gluon.jit(do_not_specialize=["positions", "time", "chunks", "blocks", "RUN"])
def forward_kernel(
    x, z, up, static_w, y, y_1, y_2, frequencies, added, positions,
    time, channels, x_batch, z_batch, chunks, blocks, RUN, first_rank,
    x_time: gl.constexpr, z_time: gl.constexpr, y_time: gl.constexpr, SEGMENTS: gl.constexpr, PAIRS: gl.constexpr,
    ALL_RANKS: gl.constexpr, R: gl.constexpr, W: gl.constexpr,
    RESIDUAL: gl.constexpr, SILU: gl.constexpr,
    SLOTS: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = mma_layout(WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    OWN: gl.constexpr = own_layout(WARPS)
    COPY: gl.constexpr = copy_layout(WARPS)
    READ: gl.constexpr = read_layout(WARPS)
    RANKS: gl.constexpr = 16 if R <= 16 else 32 if R <= 32 else 64  # columns of z in the ring; some are not used
    BLOCKS: gl.constexpr = (R + 15) // 16
    Z_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [1, WARPS], [1, 0])
    LINES: gl.constexpr = gl.SwizzledSharedLayout(vec=16, per_phase=1, max_phase=4, order=[1, 0])
    Z_ROWS: gl.constexpr = gl.SwizzledSharedLayout(8, per_phase=64 // RANKS, max_phase=RANKS // 8, order=[1, 0])
    PLACES: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    PAIR: gl.constexpr = pair_layout(WARPS)
    dtype: gl.constexpr = x.dtype.element_ty
    first, segment, begin, stop = find_block(gl.program_id(0) % blocks, SEGMENTS, 16 * WARPS)
    program = gl.program_id(0) // blocks
    batch = (program // chunks).to(gl.int64)
    start = (program % chunks) * (16 * RUN)
    x += batch * x_batch + start.to(gl.int64) * x_time
    if y_1 is not None:  # the segments' results are tensors of their own
        y = of_segment(y, y_1, y_2, segment) - begin
    if frequencies is not None:
        cosine, sine, step_cosine, step_sine = start_rotation(
            frequencies, first - begin, segment, start, RUN, PAIRS, WARPS, PAIR
        )
    y += (batch * time + start) * y_time
    z += batch * z_batch + start.to(gl.int64) * z_time + segment * ((ALL_RANKS + 15) // 16 * 16) + first_rank
    up += first_rank * (W * channels)

    row = axis(16, 1, OWN) * RUN
    d = first + axis(WARPS, 0, OWN) * 16 + axis(16, 2, OWN)
    d_ok = d < stop
    limit = time - start - row
    copy_row = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, COPY)), 1) * RUN
    copy_d = first + gl.expand_dims(gl.arange(0, 16 * WARPS, gl.SliceLayout(0, COPY)), 0)
    copy_ok = copy_d < stop
    reads = end_of_documents(positions, time) - start
    copy_limit = reads - copy_row
    x_from = copy_row * x_time + copy_d
    z_row = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, Z_COPY)), 1) * RUN
    z_column = gl.expand_dims(gl.arange(0, RANKS, gl.SliceLayout(0, Z_COPY)), 0)
    z_from = z_row * z_time + z_column
    z_limit = gl.where(z_column < 16 * BLOCKS, reads - z_row, 0)
    x_ring = allocate_ring(SLOTS, [STAGES, 16, 16 * WARPS], LINES, dtype)
    z_ring = allocate_ring(SLOTS, [STAGES, 16, RANKS], Z_ROWS, dtype)
    place_ring = allocate_ring(SLOTS, [STAGES, 16], PLACES, gl.int32)
    if added is not None:
        added_ring = allocate_ring(SLOTS, [STAGES, 16, 16 * WARPS], LINES, added.dtype.element_ty)
        added += (batch * time + start) * y_time + copy_row * y_time + copy_d
    for slot in gl.static_range((STAGES - 1) * SLOTS):
        x_ok = (slot < copy_limit) & copy_ok
        async_load(x_ring[slot % SLOTS].index(slot // SLOTS), x + x_from + slot * x_time, mask=x_ok)
        async_load(z_ring[slot % SLOTS].index(slot // SLOTS), z + z_from + slot * z_time, mask=slot < z_limit)
        if added is not None:
            async_load(added_ring[slot % SLOTS].index(slot // SLOTS), added + slot * y_time, mask=x_ok)
        copy_positions(place_ring[slot % SLOTS].index(slot // SLOTS), positions, start, time, slot, RUN, RUN, WARPS)
        if slot % SLOTS == SLOTS - 1:
            async_copy.commit_group()
    xs = load_history(x + row * x_time + d, positions, start, row, reads - row, d_ok, x_time, W)
    basis = ()
    for block in gl.static_range(BLOCKS):
        loaded = load_basis(up, first, channels, 16 * block, R, W, WARPS, OWN, dtype)
        basis = basis + right_operands(loaded, WARPS, RIGHT)
    starts = load_starts(static_w, first, channels, W, WARPS, OWN, MMA)

    out = y + row * y_time + d
    if added is not None:
        added_ahead = added + (STAGES - 1) * SLOTS * y_time
    x_ahead = x + (STAGES - 1) * SLOTS * x_time
    z_ahead = z + (STAGES - 1) * SLOTS * z_time
    for group in range(0, RUN, SLOTS):
        async_copy.wait_group(STAGES - 2)
        ahead = group + (STAGES - 1) * SLOTS
        place = ahead // SLOTS % STAGES
        for slot in gl.static_range(SLOTS):
            inside = (ahead + slot < copy_limit) & copy_ok & (ahead < RUN)
            async_load(x_ring[slot].index(place), x_ahead + x_from + slot * x_time, mask=inside)
            z_inside = (ahead + slot < z_limit) & (ahead < RUN)
            async_load(z_ring[slot].index(place), z_ahead + z_from + slot * z_time, mask=z_inside)
            if added is not None:
                async_load(added_ring[slot].index(place), added_ahead + slot * y_time, mask=inside)
            copy_positions(place_ring[slot].index(place), positions, start, time, ahead + slot, RUN, RUN, WARPS)
        async_copy.commit_group()
        if added is not None:
            added_ahead += SLOTS * y_time
        x_ahead += SLOTS * x_time
        z_ahead += SLOTS * z_time
        place = group // SLOTS % STAGES
        for slot in gl.static_range(SLOTS):
            if positions is not None:
                position = read_position(place_ring[slot].index(place), positions, start, row, limit, group + slot, OWN)
                xs = forget(xs, position, W)
            xs = xs + (read_slot(x_ring[slot].index(place), WARPS, READ, OWN),)
            generators = ()
            for block in gl.static_range(BLOCKS):
                of_ranks = z_ring[slot].index(place).slice(16 * block, 16, 1)
                generators = generators + (load_generator(of_ranks, WARPS, LEFT),)
            result = gl.zeros([WARPS, 16, 16], gl.float32, OWN)
            if RESIDUAL and not SILU:
                result = xs[W - 1].to(gl.float32)
            for tap in gl.static_range(W):
                filters = starts[tap]
                for block in gl.static_range(BLOCKS):
                    filters = mma_v2(generators[block], basis[block * W + tap], filters)
                result += to_channels(filters, WARPS, OWN) * xs[W - 1 - tap].to(gl.float32)
            if SILU:
                result = result * sigmoid(result)
                if RESIDUAL:
                    result += xs[W - 1].to(gl.float32)
            if added is not None:
                result += read_slot(added_ring[slot].index(place), WARPS, READ, OWN).to(gl.float32)
            if frequencies is not None:
                result = rotate(result, cosine, sine, WARPS, PAIR, OWN)
                cosine, sine = next_rotation(cosine, sine, step_cosine, step_sine)
            gl.store(out + slot * y_time, result.to(y.dtype.element_ty), mask=(group + slot < limit) & d_ok)
            xs = drop_first(xs)
        out += SLOTS * y_time


@gluon.jit(do_not_specialize=["positions", "time", "tokens", "chunks", "blocks", "RUN"])
def backward_kernel(
    dy, dy_1, dy_2, x, z, up, static_w, frequencies, dx, dz, dup, dstatic, positions,
    time, channels, tokens, dy_batch, x_batch, z_batch, chunks, blocks, RUN, first_rank,
    dy_time: gl.constexpr, x_time: gl.constexpr, z_time: gl.constexpr, dx_time: gl.constexpr, SEGMENTS: gl.constexpr,
    PAIRS: gl.constexpr, ALL_RANKS: gl.constexpr, R: gl.constexpr, W: gl.constexpr,
    RESIDUAL: gl.constexpr, SILU: gl.constexpr, ADD: gl.constexpr,
    SLOTS: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    MMA: gl.constexpr = mma_layout(WARPS)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    OWN: gl.constexpr = own_layout(WARPS)
    COPY: gl.constexpr = copy_layout(WARPS)
    READ: gl.constexpr = read_layout(WARPS)
    Z_COPY: gl.constexpr = gl.BlockedLayout([1, 8], [16, 2], [1, WARPS], [1, 0])
    SUM: gl.constexpr = gl.BlockedLayout([WARPS, 1, 1], [1, 2, 16], [1, WARPS, 1], [2, 1, 0])
    OUT: gl.constexpr = gl.SliceLayout(0, SUM)
    LINES: gl.constexpr = gl.SwizzledSharedLayout(vec=16, per_phase=1, max_phase=4, order=[1, 0])
    Z_ROWS: gl.constexpr = gl.SwizzledSharedLayout(vec=8, per_phase=4, max_phase=2, order=[1, 0])
    PLACES: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    PAIR: gl.constexpr = pair_layout(WARPS)
    dtype: gl.constexpr = x.dtype.element_ty
    first, segment, begin, stop = find_block(gl.program_id(0) % blocks, SEGMENTS, 16 * WARPS)
    program = gl.program_id(0) // blocks
    batch = (program // chunks).to(gl.int64)
    start = (program % chunks) * (16 * RUN)
    x += batch * x_batch + start.to(gl.int64) * x_time
    if dy_1 is not None:
        dy = of_segment(dy, dy_1, dy_2, segment) - begin
    if frequencies is not None:
        cosine, sine, step_cosine, step_sine = start_rotation(
            frequencies, first - begin, segment, start, RUN, PAIRS, WARPS, PAIR
        )
    dy += batch * dy_batch + start.to(gl.int64) * dy_time
    z += batch * z_batch + start.to(gl.int64) * z_time + segment * ((ALL_RANKS + 15) // 16 * 16) + first_rank
    if dx is not None:
        dx += (batch * time + start + 1 - W) * dx_time  # dx is written W - 1 slots behind the slot that is read
    part = (first - begin) // (16 * WARPS)
    COLUMNS: gl.constexpr = min(ALL_RANKS, 16)
    RANKS: gl.constexpr = COLUMNS * len(SEGMENTS)
    up += first_rank * (W * channels)
    if dz is not None:
        dz += (part.to(gl.int64) * tokens + batch * time + start) * RANKS + segment * COLUMNS
    if dup is not None:
        dup += (program.to(gl.int64) * ALL_RANKS + first_rank) * (W * channels)

    row = axis(16, 1, OWN) * RUN
    d = first + axis(WARPS, 0, OWN) * 16 + axis(16, 2, OWN)
    d_ok = d < stop
    limit = time - start - row
    copy_row = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, COPY)), 1) * RUN
    copy_d = first + gl.expand_dims(gl.arange(0, 16 * WARPS, gl.SliceLayout(0, COPY)), 0)
    copy_ok = copy_d < stop
    reads = end_of_documents(positions, time) - start
    copy_limit = reads - copy_row
    x_from = copy_row * x_time + copy_d
    dy_from = copy_row * dy_time + copy_d
    z_row = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, Z_COPY)), 1) * RUN
    z_column = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, Z_COPY)), 0)
    z_from = z_row * z_time + z_column
    z_limit = reads - z_row + z_column * 0
    x_ring = allocate_ring(SLOTS, [STAGES, 16, 16 * WARPS], LINES, dtype)
    dy_ring = allocate_ring(SLOTS, [STAGES, 16, 16 * WARPS], LINES, dtype)
    z_ring = allocate_ring(SLOTS, [STAGES, 16, 16], Z_ROWS, dtype)
    place_ring = allocate_ring(SLOTS, [STAGES, 16], PLACES, gl.int32)
    end = RUN + W - 1  # the outputs of the W - 1 slots after this run depend on its inputs, too
    for slot in gl.static_range((STAGES - 1) * SLOTS):
        early = (slot < copy_limit) & copy_ok
        async_load(x_ring[slot % SLOTS].index(slot // SLOTS), x + x_from + slot * x_time, mask=early)
        async_load(dy_ring[slot % SLOTS].index(slot // SLOTS), dy + dy_from + slot * dy_time, mask=early)
        async_load(z_ring[slot % SLOTS].index(slot // SLOTS), z + z_from + slot * z_time, mask=slot < z_limit)
        copy_positions(place_ring[slot % SLOTS].index(slot // SLOTS), positions, start, time, slot, RUN, end, WARPS)
        if slot % SLOTS == SLOTS - 1:
            async_copy.commit_group()
    xs = load_history(x + row * x_time + d, positions, start, row, reads - row, d_ok, x_time, W)
    partial = ()
    for _ in gl.static_range(W - 1):
        partial = partial + (gl.zeros([WARPS, 16, 16], gl.float32, OWN),)
    loaded = load_basis(up, first, channels, 0, R, W, WARPS, OWN, dtype)
    basis, basis_t = right_operands(loaded, WARPS, RIGHT), transposed_operands(loaded, WARPS, RIGHT)
    starts = load_starts(static_w, first, channels, W, WARPS, OWN, MMA)
    up_sums = ()
    static_sums = ()
    for _ in gl.static_range(W):
        if dup is not None:
            up_sums = up_sums + (gl.zeros([WARPS, 16, 16], gl.float32, MMA),)
        if dstatic is not None:
            static_sums = static_sums + (gl.zeros([WARPS, 16, 8], gl.float32, MMA),)
    ones = gl.full([WARPS, 16, 8], 1.0, dtype, RIGHT)

    SUMS: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[2, 1, 0])
    dz_shared = allocate_ring(SLOTS, [WARPS, 16, 16], SUMS, gl.float32)
    dz_time = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(1, OUT)), 1) * RUN
    dz_rank = gl.expand_dims(gl.arange(0, 16, gl.SliceLayout(0, OUT)), 0)
    dz_limit = time - start - dz_time
    if dx is not None and ADD:
        reach = gl.minimum(limit + W - 1, RUN)
        earlier = load_before(dx + row * dx_time + d, 0, dx_time, W - 1, reach, d_ok, SLOTS)
    x_ahead = x + (STAGES - 1) * SLOTS * x_time
    dy_ahead = dy + (STAGES - 1) * SLOTS * dy_time
    z_ahead = z + (STAGES - 1) * SLOTS * z_time
    for group in range(0, RUN, SLOTS):
        gl.assume(group >= 0)  # without this, the compiler adds code for remainders of negative numbers
        async_copy.wait_group(STAGES - 2)
        ahead = group + (STAGES - 1) * SLOTS
        place = ahead // SLOTS % STAGES
        for slot in gl.static_range(SLOTS):
            inside = (ahead + slot < copy_limit) & copy_ok & (ahead < end)
            async_load(x_ring[slot].index(place), x_ahead + x_from + slot * x_time, mask=inside)
            async_load(dy_ring[slot].index(place), dy_ahead + dy_from + slot * dy_time, mask=inside)
            z_inside = (ahead + slot < z_limit) & (ahead < end)
            async_load(z_ring[slot].index(place), z_ahead + z_from + slot * z_time, mask=z_inside)
            copy_positions(place_ring[slot].index(place), positions, start, time, ahead + slot, RUN, end, WARPS)
        async_copy.commit_group()
        x_ahead += SLOTS * x_time
        dy_ahead += SLOTS * dy_time
        z_ahead += SLOTS * z_time
        place = group // SLOTS % STAGES
        if dx is not None:
            out = dx + row * dx_time + d
            dx += SLOTS * dx_time
            if ADD:  # load what is added a group ahead, to hide its latency
                before = earlier
                earlier = load_before(out, SLOTS, dx_time, W - 1 - group, reach - group, d_ok, SLOTS)
        for slot in gl.static_range(SLOTS):
            if positions is not None:
                position = read_position(place_ring[slot].index(place), positions, start, row, limit, group + slot, OWN)
                xs = forget(xs, position, W)
            xs = xs + (read_slot(x_ring[slot].index(place), WARPS, READ, OWN),)
            dy_slot = read_slot(dy_ring[slot].index(place), WARPS, READ, OWN)
            gradient = dy_slot.to(gl.float32)
            if frequencies is not None:
                gradient = rotate(gradient, cosine, -sine, WARPS, PAIR, OWN)
                cosine, sine = next_rotation(cosine, sine, step_cosine, step_sine)
                dy_slot = gradient.to(dtype)
            generator = load_generator(z_ring[slot].index(place), WARPS, LEFT)
            generator_right = load_generator(z_ring[slot].index(place), WARPS, RIGHT)
            outer = gradient
            if SILU:
                gradient = _gradient_of_sum(gradient, xs, generator, basis, starts, W, WARPS, OWN)
                dy_slot = gradient.to(dtype)
                generator = renewed(generator, time >> 31, WARPS, LEFT)  # the shift gives 0, as time is positive
            dz_slot = gl.zeros([WARPS, 16, 16], gl.float32, MMA)
            new_up_sums = ()
            new_static_sums = ()
            backs = ()
            for tap in gl.static_range(W):
                g = multiply(dy_slot, xs[W - 1 - tap])
                if dz is not None:
                    dz_slot = mma_v2(to_columns(g, WARPS, LEFT), basis_t[tap], dz_slot)
                g_transposed = transpose(g, WARPS, LEFT)
                if dup is not None:
                    new_up_sums = new_up_sums + (mma_v2(g_transposed, generator_right, up_sums[tap]),)
                if dstatic is not None:
                    new_static_sums = new_static_sums + (mma_v2(g_transposed, ones, static_sums[tap]),)
                filters = to_channels(mma_v2(generator, basis[tap], starts[tap]), WARPS, OWN)
                back = filters * gradient
                if tap > 0:
                    back += partial[W - 1 - tap]
                    if positions is not None:
                        back = gl.where(position >= tap, back, partial[W - 1 - tap])
                elif RESIDUAL:
                    back += outer
                backs = backs + (back,)
            up_sums = new_up_sums
            static_sums = new_static_sums
            if dz is not None:
                dz_shared[slot].store(dz_slot)
            if dx is not None:
                done = (group + slot + 1 - W < limit) & (group + slot >= W - 1) & d_ok
                result = backs[W - 1]
                if ADD:
                    result += before[slot].to(gl.float32)
                gl.store(out + slot * dx_time, result.to(dtype), mask=done)
            # partial[k] is the part summed so far of dx, for the slot that lies W - 1 - k before the next one.
            partial = ()
            for index in gl.static_range(W - 1):
                partial = partial + (backs[W - 2 - index],)
            xs = drop_first(xs)
        if dz is not None:
            for slot in gl.static_range(SLOTS):
                total = gl.sum(dz_shared[slot].load(SUM), 0)
                dz_ok = (group + slot < dz_limit) & (dz_rank < R)
                to = dz + slot * RANKS + dz_time * RANKS + dz_rank
                gl.store(to, total.to(dz.dtype.element_ty), mask=dz_ok)
            dz += SLOTS * RANKS

    # The last W - 1 inputs of this run also enter the first outputs of the next run: add those to their dx.
    async_copy.wait_group(0)
    for slot in gl.static_range(W - 1):
        place = (RUN + slot) // SLOTS % STAGES
        gradient = read_slot(dy_ring[slot % SLOTS].index(place), WARPS, READ, OWN).to(gl.float32)
        if frequencies is not None:
            gradient = rotate(gradient, cosine, -sine, WARPS, PAIR, OWN)
            cosine, sine = next_rotation(cosine, sine, step_cosine, step_sine)
        generator = load_generator(z_ring[slot % SLOTS].index(place), WARPS, LEFT)
        later = ()
        if positions is not None:
            after = read_position(place_ring[slot % SLOTS].index(place), positions, start, row, limit, RUN + slot, OWN)
        if SILU:
            if positions is not None:
                xs = forget(xs, after, W)
            xs = xs + (read_slot(x_ring[slot % SLOTS].index(place), WARPS, READ, OWN),)
            gradient = _gradient_of_sum(gradient, xs, generator, basis, starts, W, WARPS, OWN)
            xs = drop_first(xs)
        for index in gl.static_range(W - 1 - slot):
            filters = to_channels(mma_v2(generator, basis[W - 1 - index], starts[W - 1 - index]), WARPS, OWN)
            back = partial[index] + filters * gradient
            if positions is not None:
                back = gl.where(after >= W - 1 - index, back, partial[index])
            later = later + (back,)
        if dx is not None:
            done = (RUN + slot + 1 - W < limit) & d_ok
            last = later[0]
            if ADD:
                last += gl.load(dx + row * dx_time + d + slot * dx_time, mask=done, other=0.0).to(gl.float32)
            gl.store(dx + row * dx_time + d + slot * dx_time, last.to(dtype), mask=done)
        partial = drop_first(later)

    channel = first + axis(WARPS, 0, MMA) * 16 + channel_of(axis(16, 1, MMA))
    rank = axis(16, 2, MMA)
    zero = axis(8, 2, MMA)
    for tap in gl.static_range(W):
        if dup is not None:
            at = rank * (W * channels) + tap * channels + channel
            gl.store(dup + at, up_sums[tap], mask=(rank < R) & (channel < stop))
        if dstatic is not None:
            at = (program.to(gl.int64) * W + tap) * channels + channel + zero * 0
            gl.store(dstatic + at, static_sums[tap], mask=(zero == 0) & (channel < stop))
