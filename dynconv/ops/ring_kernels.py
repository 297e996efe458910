"""The static and head-wise convolutions in Gluon: 16-bit inputs stream through a ring buffer in shared memory.

Legend: B batch, T time, D channels, H heads, W taps (padded in memory to WP, a power of two, where there are heads).
Head sizes are powers of two.

A program computes 128 * WARPS channels of RUN time steps (slots), one step after the other. A lane holds four
neighbouring channels, and the WP coefficients of the head or heads they belong to, so only the sums over a head's
channels need an exchange between lanes. Registers hold the static filter and the sums of its gradient. Asynchronous
copies (cp.async) bring the inputs of later steps into the ring buffer while the current step is computed.

Neighbours that may be computed, too: x and dx are columns of a projection, in which the channels of up to three
segments of equal width lie side by side (SEGMENTS; None: there is one). If y_1 and y_2 are given, they are the results
of segments 1 and 2, and y is that of segment 0 alone; so are dy_1, dy_2 and dy. With `frequencies`, segments 0 and 1
are queries and keys, and RoPE rotates them. `added` is a tensor to add to y, such as the residual stream.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from dynconv.ops.fused_pieces import next_rotation, start_angles, turned
from dynconv.ops.gluon_pieces import (
    allocate_ring,
    async_load,
    drop_first,
    end_of_documents,
    forget,
    load_history,
    load_position,
    load_positions,
    sigmoid,
    through_silu,
)
from dynconv.ops.mma import find_block, of_segment
from dynconv.ops.ring_layouts import (
    channel_layout,
    coefficient_layout,
    copy_layout,
    join_taps,
    per_channel,
    per_head,
    split_taps,
)


@gluon.jit
def _filter(taps, static, tap: gl.constexpr, WARPS: gl.constexpr, HP: gl.constexpr):
    """One tap of a slot's filters [channel]: the dynamic filter, the static one, or their sum if there are both."""
    if len(taps) == 0:
        values = static[tap]
    else:
        values = per_channel(taps[tap], WARPS, HP)
        if len(static) > 0:
            values += static[tap]
    return values


@gluon.jit
def _gradient_of_sum(gradient, xs, filters, W: gl.constexpr):
    """The gradient with respect to silu's input, from the gradient with respect to its output.

    That input, the convolution's sum for this slot, is recomputed from xs, the slot's W inputs, oldest first.
    """
    inner = filters[0] * xs[W - 1].to(gl.float32)
    for tap in gl.static_range(1, W):
        inner += filters[tap] * xs[W - 1 - tap].to(gl.float32)
    return through_silu(gradient, inner)


@gluon.jit
def _filters(taps, static, W: gl.constexpr, WARPS: gl.constexpr, HP: gl.constexpr):
    """All taps of a slot's filters, as a tuple."""
    filters = ()
    for tap in gl.static_range(W):
        filters = filters + (_filter(taps, static, tap, WARPS, HP),)
    return filters


@gluon.jit
def _load_static(static_w, d, channels, W: gl.constexpr):
    """The static filter's taps, each [channel] in float32; an empty tuple if there is no static filter."""
    static = ()
    if static_w is not None:
        for tap in gl.static_range(W):
            value = gl.load(static_w + tap * channels + d, mask=d < channels, other=0.0)
            static = static + (value.to(gl.float32),)
    return static


@gluon.jit
def _find_place(block, channels, SEGMENTS: gl.constexpr, BLOCK: gl.constexpr):
    """A block's first channel, and its segment: which one it is, its own first channel, and its end."""
    if SEGMENTS is None:
        place = (block * BLOCK, 0, 0, channels)
    else:
        place = find_block(block, SEGMENTS, BLOCK)
    return place


@gluon.jit(do_not_specialize=["time", "chunks", "blocks", "RUN"])
def forward_kernel(
    x, weight, static_w, y, y_1, y_2, frequencies, added, positions,
    time, channels, x_batch, weight_batch, chunks, blocks, RUN,
    x_time: gl.constexpr, weight_time: gl.constexpr, y_time: gl.constexpr,
    SEGMENTS: gl.constexpr, PAIRS: gl.constexpr, APART: gl.constexpr,
    HP: gl.constexpr, W: gl.constexpr, WP: gl.constexpr, RESIDUAL: gl.constexpr, SILU: gl.constexpr,
    SLOTS: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    BLOCK: gl.constexpr = 128 * WARPS
    HEADS: gl.constexpr = BLOCK // HP
    COLUMNS: gl.constexpr = HEADS * WP
    OWN: gl.constexpr = channel_layout(WARPS)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    AHEAD: gl.constexpr = (STAGES - 1) * SLOTS
    dtype: gl.constexpr = x.dtype.element_ty
    first, segment, base, stop = _find_place(gl.program_id(0) % blocks, channels, SEGMENTS, BLOCK)
    program = gl.program_id(0) // blocks
    batch = (program // chunks).to(gl.int64)
    start = (program % chunks) * RUN
    limit = time - start
    reach = end_of_documents(positions, time) - start
    d = first + gl.arange(0, BLOCK, OWN)
    d_ok = d < stop
    x_at = x + batch * x_batch + start.to(gl.int64) * x_time + d
    if y_1 is not None:  # the segments' results are tensors of their own
        y = of_segment(y, y_1, y_2, segment) - base
    y_at = y + (batch * time + start) * y_time + d
    if frequencies is not None:
        cosine, sine, step_cosine, step_sine = start_angles(frequencies, d - base, segment, start, PAIRS, APART)
    if added is not None:
        added_at = added + (batch * time + start) * y_time + d
        added_ring = allocate_ring(SLOTS, [STAGES, BLOCK], SHARED, dtype)
    x_ring = allocate_ring(SLOTS, [STAGES, BLOCK], SHARED, dtype)
    if weight is not None:
        FILTER: gl.constexpr = coefficient_layout(WARPS, HP, WP)
        COPY: gl.constexpr = copy_layout(WARPS, COLUMNS)
        column = first // HP * WP + gl.arange(0, COLUMNS, COPY)
        column_ok = column < stop // HP * WP
        weight_at = weight + batch * weight_batch + start.to(gl.int64) * weight_time + column
        weight_ring = allocate_ring(SLOTS, [STAGES, COLUMNS], SHARED, dtype)
    for slot in gl.static_range(AHEAD):
        async_load(x_ring[slot % SLOTS].index(slot // SLOTS), x_at + slot * x_time, mask=(slot < reach) & d_ok)
        if added is not None:
            early = (slot < reach) & d_ok
            async_load(added_ring[slot % SLOTS].index(slot // SLOTS), added_at + slot * y_time, mask=early)
        if weight is not None:
            copied = (slot < reach) & column_ok
            async_load(weight_ring[slot % SLOTS].index(slot // SLOTS), weight_at + slot * weight_time, mask=copied)
        if slot % SLOTS == SLOTS - 1:
            async_copy.commit_group()
    xs = load_history(x_at, positions, start, 0, reach, d_ok, x_time, W)
    static = _load_static(static_w, d, channels, W)
    if positions is not None:
        places = load_positions(positions, start, 0, limit, 0, SLOTS)
    for begin in range(0, RUN, SLOTS * STAGES):
        for stage in gl.static_range(STAGES):
            if positions is not None:  # load them a stage ahead, to hide their latency
                position = places
                places = load_positions(positions, start, 0, limit, begin + (stage + 1) * SLOTS, SLOTS)
            async_copy.wait_group(STAGES - 2)
            for slot in gl.static_range(SLOTS):
                far = AHEAD + stage * SLOTS + slot
                place = (stage + STAGES - 1) % STAGES
                inside = (begin + far < reach) & d_ok & (begin + far < RUN)
                async_load(x_ring[slot].index(place), x_at + far * x_time, mask=inside)
                if added is not None:
                    async_load(added_ring[slot].index(place), added_at + far * y_time, mask=inside)
                if weight is not None:
                    copied = (begin + far < reach) & column_ok & (begin + far < RUN)
                    async_load(weight_ring[slot].index(place), weight_at + far * weight_time, mask=copied)
            async_copy.commit_group()
            for slot in gl.static_range(SLOTS):
                now = stage * SLOTS + slot
                if positions is not None:
                    xs = forget(xs, position[slot], W)
                xs = xs + (x_ring[slot].index(stage).load(OWN),)
                taps = ()
                if weight is not None:
                    taps = split_taps(weight_ring[slot].index(stage).load(FILTER), HEADS, WP)
                result = gl.zeros([BLOCK], gl.float32, OWN)
                if RESIDUAL and not SILU:
                    result = xs[W - 1].to(gl.float32)
                for tap in gl.static_range(W):
                    result += _filter(taps, static, tap, WARPS, HP) * xs[W - 1 - tap].to(gl.float32)
                if SILU:
                    result = result * sigmoid(result)
                    if RESIDUAL:
                        result += xs[W - 1].to(gl.float32)
                if added is not None:
                    result += added_ring[slot].index(stage).load(OWN).to(gl.float32)
                if frequencies is not None:
                    result = turned(result, cosine, sine, APART, BLOCK, OWN)
                    cosine, sine = next_rotation(cosine, sine, step_cosine, step_sine)
                gl.store(y_at + now * y_time, result.to(dtype), mask=(begin + now < limit) & d_ok)
                xs = drop_first(xs)
        x_at += SLOTS * STAGES * x_time
        y_at += SLOTS * STAGES * y_time
        if added is not None:
            added_at += SLOTS * STAGES * y_time
        if weight is not None:
            weight_at += SLOTS * STAGES * weight_time


@gluon.jit(do_not_specialize=["time", "chunks", "blocks", "RUN"])
def backward_kernel(
    dy, dy_1, dy_2, x, weight, static_w, frequencies, dx, dweight, dstatic, positions,
    time, channels, dy_batch, x_batch, weight_batch, chunks, blocks, RUN,
    dy_time: gl.constexpr, x_time: gl.constexpr, weight_time: gl.constexpr, dx_time: gl.constexpr,
    dweight_time: gl.constexpr, dweight_first: gl.constexpr,
    SEGMENTS: gl.constexpr, PAIRS: gl.constexpr, APART: gl.constexpr,
    HP: gl.constexpr, W: gl.constexpr, WP: gl.constexpr, RESIDUAL: gl.constexpr, SILU: gl.constexpr,
    SLOTS: gl.constexpr, STAGES: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    BLOCK: gl.constexpr = 128 * WARPS
    HEADS: gl.constexpr = BLOCK // HP
    COLUMNS: gl.constexpr = HEADS * WP
    OWN: gl.constexpr = channel_layout(WARPS)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    AHEAD: gl.constexpr = (STAGES - 1) * SLOTS
    dtype: gl.constexpr = x.dtype.element_ty
    first, segment, base, stop = _find_place(gl.program_id(0) % blocks, channels, SEGMENTS, BLOCK)
    program = gl.program_id(0) // blocks
    batch = (program // chunks).to(gl.int64)
    start = (program % chunks) * RUN
    limit = time - start
    reach = end_of_documents(positions, time) - start
    d = first + gl.arange(0, BLOCK, OWN)
    d_ok = d < stop
    x_at = x + batch * x_batch + start.to(gl.int64) * x_time + d
    if dy_1 is not None:
        dy = of_segment(dy, dy_1, dy_2, segment) - base
    if frequencies is not None:
        cosine, sine, step_cosine, step_sine = start_angles(frequencies, d - base, segment, start, PAIRS, APART)
    dy_at = dy + batch * dy_batch + start.to(gl.int64) * dy_time + d
    if dx is not None:
        dx_at = dx + (batch * time + start) * dx_time + d
    x_ring = allocate_ring(SLOTS, [STAGES, BLOCK], SHARED, dtype)
    dy_ring = allocate_ring(SLOTS, [STAGES, BLOCK], SHARED, dtype)
    if weight is not None:
        FILTER: gl.constexpr = coefficient_layout(WARPS, HP, WP)
        COPY: gl.constexpr = copy_layout(WARPS, COLUMNS)
        column = first // HP * WP + gl.arange(0, COLUMNS, COPY)
        column_ok = column < stop // HP * WP
        weight_at = weight + batch * weight_batch + start.to(gl.int64) * weight_time + column
        weight_ring = allocate_ring(SLOTS, [STAGES, COLUMNS], SHARED, dtype)
    if dweight is not None:
        filter_column = first // HP * WP + gl.arange(0, COLUMNS, FILTER)
        filter_ok = filter_column < stop // HP * WP
        dweight_at = dweight + (batch * time + start) * dweight_time + dweight_first + filter_column
    for slot in gl.static_range(AHEAD):
        early = (slot < reach) & d_ok
        async_load(x_ring[slot % SLOTS].index(slot // SLOTS), x_at + slot * x_time, mask=early)
        async_load(dy_ring[slot % SLOTS].index(slot // SLOTS), dy_at + slot * dy_time, mask=early)
        if weight is not None:
            copied = (slot < reach) & column_ok
            async_load(weight_ring[slot % SLOTS].index(slot // SLOTS), weight_at + slot * weight_time, mask=copied)
        if slot % SLOTS == SLOTS - 1:
            async_copy.commit_group()
    xs = load_history(x_at, positions, start, 0, reach, d_ok, x_time, W)
    static = _load_static(static_w, d, channels, W)
    partial = ()
    for _ in gl.static_range(W - 1):
        partial = partial + (gl.zeros([BLOCK], gl.float32, OWN),)
    sums = ()
    if dstatic is not None:
        for _ in gl.static_range(W):
            sums = sums + (gl.zeros([BLOCK], gl.float32, OWN),)
    if positions is not None:
        places = load_positions(positions, start, 0, limit, 0, SLOTS)
    for begin in range(0, RUN, SLOTS * STAGES):
        for stage in gl.static_range(STAGES):
            if positions is not None:  # load them a stage ahead, to hide their latency
                position = places
                places = load_positions(positions, start, 0, limit, begin + (stage + 1) * SLOTS, SLOTS)
            async_copy.wait_group(STAGES - 2)
            for slot in gl.static_range(SLOTS):
                far = AHEAD + stage * SLOTS + slot
                place = (stage + STAGES - 1) % STAGES
                inside = (begin + far < reach) & d_ok & (begin + far < RUN + W - 1)
                async_load(x_ring[slot].index(place), x_at + far * x_time, mask=inside)
                async_load(dy_ring[slot].index(place), dy_at + far * dy_time, mask=inside)
                if weight is not None:
                    copied = (begin + far < reach) & column_ok & (begin + far < RUN + W - 1)
                    async_load(weight_ring[slot].index(place), weight_at + far * weight_time, mask=copied)
            async_copy.commit_group()
            for slot in gl.static_range(SLOTS):
                now = stage * SLOTS + slot
                if positions is not None:
                    xs = forget(xs, position[slot], W)
                xs = xs + (x_ring[slot].index(stage).load(OWN),)
                gradient = dy_ring[slot].index(stage).load(OWN).to(gl.float32)
                if frequencies is not None:
                    gradient = turned(gradient, cosine, -sine, APART, BLOCK, OWN)
                    cosine, sine = next_rotation(cosine, sine, step_cosine, step_sine)
                taps = ()
                if weight is not None:
                    taps = split_taps(weight_ring[slot].index(stage).load(FILTER), HEADS, WP)
                filters = _filters(taps, static, W, WARPS, HP)
                outer = gradient
                if SILU:
                    gradient = _gradient_of_sum(gradient, xs, filters, W)
                backs = ()
                coefficients = ()
                new_sums = ()
                for tap in gl.static_range(W):
                    back = filters[tap] * gradient
                    if tap > 0:
                        back += partial[W - 1 - tap]
                        if positions is not None:
                            back = gl.where(position[slot] >= tap, back, partial[W - 1 - tap])
                    elif RESIDUAL:
                        back += outer
                    backs = backs + (back,)
                    product = gradient * xs[W - 1 - tap].to(gl.float32)
                    if dweight is not None:
                        coefficients = coefficients + (per_head(product, WARPS, HP).to(dtype),)
                    if dstatic is not None:
                        new_sums = new_sums + (sums[tap] + product,)
                sums = new_sums
                if dx is not None:
                    done = (begin + now + 1 - W < limit) & (begin + now >= W - 1) & d_ok
                    gl.store(dx_at + (now + 1 - W) * dx_time, backs[W - 1].to(dtype), mask=done)
                if dweight is not None:
                    for _ in gl.static_range(WP - W):
                        coefficients = coefficients + (gl.zeros_like(coefficients[0]),)
                    flat = gl.convert_layout(join_taps(coefficients, HEADS, WP), FILTER)
                    gl.store(dweight_at + now * dweight_time, flat, mask=(begin + now < limit) & filter_ok)
                # partial[k] is the part summed so far of dx, for the slot that lies W - 1 - k before the next one.
                partial = ()
                for index in gl.static_range(W - 1):
                    partial = partial + (backs[W - 2 - index],)
                xs = drop_first(xs)
        x_at += SLOTS * STAGES * x_time
        dy_at += SLOTS * STAGES * dy_time
        if dx is not None:
            dx_at += SLOTS * STAGES * dx_time
        if weight is not None:
            weight_at += SLOTS * STAGES * weight_time
        if dweight is not None:
            dweight_at += SLOTS * STAGES * dweight_time

    # The last W - 1 inputs of this run also enter the first outputs of the next run: add those to their dx.
    async_copy.wait_group(0)
    for slot in gl.static_range(W - 1):
        gradient = dy_ring[slot % SLOTS].index(slot // SLOTS).load(OWN).to(gl.float32)
        if frequencies is not None:
            gradient = turned(gradient, cosine, -sine, APART, BLOCK, OWN)
            cosine, sine = next_rotation(cosine, sine, step_cosine, step_sine)
        taps = ()
        if weight is not None:
            taps = split_taps(weight_ring[slot % SLOTS].index(slot // SLOTS).load(FILTER), HEADS, WP)
        if positions is not None:
            after = load_position(positions, start, 0, limit, RUN + slot)
        filters = _filters(taps, static, W, WARPS, HP)
        if SILU:
            if positions is not None:
                xs = forget(xs, after, W)
            xs = xs + (x_ring[slot % SLOTS].index(slot // SLOTS).load(OWN),)
            gradient = _gradient_of_sum(gradient, xs, filters, W)
            xs = drop_first(xs)
        later = ()
        for index in gl.static_range(W - 1 - slot):
            back = partial[index] + filters[W - 1 - index] * gradient
            if positions is not None:
                back = gl.where(after >= W - 1 - index, back, partial[index])
            later = later + (back,)
        if dx is not None:
            done = (RUN + slot + 1 - W < limit) & d_ok
            gl.store(dx_at + (slot + 1 - W) * dx_time, later[0].to(dtype), mask=done)
        partial = drop_first(later)

    if dstatic is not None:
        for tap in gl.static_range(W):
            gl.store(dstatic + (program.to(gl.int64) * W + tap) * channels + d, sums[tap], mask=d_ok)
