"""Functions of the tensor-core kernels, in Gluon: layouts, layout changes that keep data in its thread, and loads.

Tensors are [WARPS, 16 rows, 16 channels or ranks]. Each row is a run of consecutive time steps, as the docstring of
`lowrank_mma_kernels` explains.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dynconv.ops.gluon_pieces import async_load, load_position


@gluon.constexpr_function
def mma_layout(warps):
    """[WARPS, 16 rows, 8 columns]: the layout of the results of mma.sync."""
    return gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[warps, 1, 1], instr_shape=[1, 16, 8])


@gluon.constexpr_function
def own_layout(warps):
    """[WARPS, 16 rows, 16 channels]: a thread holds four channels of rows r and r + 8."""
    warp_bases = [[2**bit, 0, 0] for bit in range(warps.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 0, 2], [0, 8, 0]],
        lane_bases=[[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=warp_bases,
        block_bases=[],
        shape=[warps, 16, 16],
    )


@gluon.constexpr_function
def read_layout(warps):
    """[16 rows, channel]: the same distribution as `own_layout`, with the channels of all warps in one dimension."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0]],
        lane_bases=[[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[0, 16 * 2**bit] for bit in range(warps.bit_length() - 1)],
        block_bases=[],
        shape=[16, 16 * warps],
    )


@gluon.constexpr_function
def copy_layout(warps):
    """[16 rows, channel] for copies into a ring buffer: neighbouring lanes together copy whole cache lines."""
    return gl.BlockedLayout([1, 8], [16 // warps, 2 * warps], [warps, 1], [1, 0])


@gluon.jit
def read_slot(slot, WARPS: gl.constexpr, read: gl.constexpr, own: gl.constexpr):
    """Read one slot of a ring buffer: [16 rows, channel] -> [WARPS, 16 rows, 16 channels]."""
    return gl.convert_layout(slot.load(read).reshape([16, WARPS, 16]).permute([1, 0, 2]), own)


@gluon.jit
def axis(size: gl.constexpr, dim: gl.constexpr, layout: gl.constexpr):
    """arange along one of three dimensions; the other two have size one."""
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
def channel_of(column):
    """Which of a warp's 16 channels a column of the matrix unit's result holds."""
    return column % 8 // 2 * 4 + column // 8 * 2 + column % 2


@gluon.jit
def to_channels(columns, WARPS: gl.constexpr, layout: gl.constexpr):
    """Reorder columns of the matrix unit into channels in memory's order. Only registers are renamed; no data moves."""
    columns = columns.reshape([WARPS, 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([WARPS, 16, 16])
    return gl.convert_layout(columns, layout)


@gluon.jit
def to_columns(channels, WARPS: gl.constexpr, layout: gl.constexpr):
    """The inverse of `to_channels`: channels in memory's order -> columns of the matrix unit."""
    return gl.convert_layout(_columns(channels, WARPS), layout)


@gluon.jit
def _columns(channels, WARPS: gl.constexpr):
    """`to_columns`, in a layout of its own."""
    return channels.reshape([WARPS, 16, 4, 2, 2]).permute([0, 1, 3, 2, 4]).reshape([WARPS, 16, 16])


@gluon.jit
def transpose(g, WARPS: gl.constexpr, layout: gl.constexpr):
    """[row, channel] -> [column, row], laid out as the left operand of a matrix product."""
    return gl.convert_layout(_transposed(g, WARPS), layout)


@gluon.jit
def _transposed(g, WARPS: gl.constexpr):
    """`transpose`, in a layout of its own."""
    g = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [g], dtype=g.dtype, is_pure=False, pack=2
    )
    return g.reshape([WARPS, 2, 8, 4, 2, 2]).permute([0, 4, 2, 1, 3, 5]).reshape([WARPS, 16, 16])


@gluon.jit
def multiply(a, b):
    """The elementwise product of 16-bit values, rounded once; one instruction multiplies two pairs."""
    if a.dtype == gl.bfloat16:
        asm: gl.constexpr = "{ .reg .b32 c; mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, $1, $2, c; }"
    else:
        asm: gl.constexpr = "mul.rn.f16x2 $0, $1, $2;"
    return gl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=2)


@gluon.jit
def load_generator(z, WARPS: gl.constexpr, layout: gl.constexpr):
    """Read one slot's z [row, rank] from shared memory; every warp gets the same values."""
    value = gl.expand_dims(z.load(gl.SliceLayout(0, layout)), 0)
    return gl.convert_layout(value.broadcast_to([WARPS, 16, 16]), layout)


@gluon.jit
def renewed(generator, zero, WARPS: gl.constexpr, layout: gl.constexpr):
    """The generator unchanged, as `zero` is 0, but in a way that the compiler cannot know.

    So it computes the filters from it a second time; reusing the first ones would keep them live and spill registers.
    """
    zeros = gl.full([WARPS, 16, 16], zero, gl.int32, layout)
    return gl.inline_asm_elementwise(
        "xor.b32 $0, $1, $2;", "=r,r,r,r", [generator, zeros], dtype=generator.dtype, is_pure=True, pack=2
    )


@gluon.jit
def load_basis(
    up,
    first,
    channels,
    first_rank: gl.constexpr,
    R: gl.constexpr,
    W: gl.constexpr,
    WARPS: gl.constexpr,
    own: gl.constexpr,
    dtype: gl.constexpr,
):
    """16 ranks of U for each tap: [WARPS, 16 ranks, 16 channels]."""
    rank = first_rank + axis(16, 1, own)
    d = first + axis(WARPS, 0, own) * 16 + axis(16, 2, own)
    ok = (rank < R) & (d < channels)
    basis = ()
    for tap in gl.static_range(W):
        basis = basis + (gl.load(up + rank * (W * channels) + tap * channels + d, mask=ok, other=0.0).to(dtype),)
    return basis


@gluon.jit
def right_operands(basis, WARPS: gl.constexpr, layout: gl.constexpr):
    """Each tap's [rank, channel] as the right operand [rank, column] of z U."""
    operands = ()
    for tap in gl.static_range(len(basis)):
        operands = operands + (gl.convert_layout(_transposed(basis[tap], WARPS).permute([0, 2, 1]), layout),)
    return operands


@gluon.jit
def transposed_operands(basis, WARPS: gl.constexpr, layout: gl.constexpr):
    """Each tap's [rank, channel] as the right operand [column, rank] of g U^T."""
    operands = ()
    for tap in gl.static_range(len(basis)):
        operands = operands + (gl.convert_layout(_columns(basis[tap], WARPS).permute([0, 2, 1]), layout),)
    return operands


@gluon.jit
def load_starts(
    static_w, first, channels, W: gl.constexpr, WARPS: gl.constexpr, own: gl.constexpr, layout: gl.constexpr
):
    """Initial accumulators of the products z U: the taps of the static filter, or zeros without one."""
    d = first + axis(WARPS, 0, own) * 16 + axis(16, 2, own)
    starts = ()
    for tap in gl.static_range(W):
        if static_w is not None:
            value = gl.load(static_w + tap * channels + d, mask=d < channels, other=0.0).to(gl.float32)
            starts = starts + (to_columns(value.broadcast_to([WARPS, 16, 16]), WARPS, layout),)
        else:
            starts = starts + (gl.zeros([WARPS, 16, 16], gl.float32, layout),)
    return starts


@gluon.jit
def copy_positions(slot, positions, start, time, step, RUN, end, WARPS: gl.constexpr):
    """Start copying the tokens' indices within their documents into a slot of a ring buffer.

    Nothing is copied if `positions` is a document length, from which `read_position` computes the indices.
    """
    if positions is not None and positions.dtype.is_ptr():
        row = gl.arange(0, 16, gl.BlockedLayout([1], [32], [WARPS], [0])) * RUN
        async_load(slot, positions + start + row + step, mask=(step < time - start - row) & (step < end))


@gluon.jit
def read_position(slot, positions, start, row, limit, step, own: gl.constexpr):
    """The index within its document of each row's token at this slot, [1, 16 rows, 1]."""
    if positions.dtype.is_ptr():
        rows = slot.load(gl.SliceLayout(0, gl.SliceLayout(2, own)))
        place = gl.expand_dims(gl.expand_dims(rows, 0), 2)
    else:
        place = load_position(positions, start, row, limit, step)
    return place


@gluon.jit
def load_before(pointers, first, stride: gl.constexpr, lowest, limit, d_ok, SLOTS: gl.constexpr):
    """Load what earlier launches wrote to SLOTS slots from `first` on; the pointers are those of slot 0."""
    before = ()
    for slot in gl.static_range(first, first + SLOTS):
        ok = (slot >= lowest) & (slot < limit) & d_ok
        before = before + (gl.load(pointers + slot * stride, mask=ok, other=0.0),)
    return before


@gluon.jit
def of_segment(first, second, third, segment):
    """The pointer that belongs to the segment."""
    if segment == 1:
        first = second
    if segment == 2:
        first = third
    return first


@gluon.jit
def find_block(block, SEGMENTS: gl.constexpr, SIZE: gl.constexpr):
    """A block's first channel, and its segment: which one it is, its own first channel, and its end.

    Each segment is divided into blocks of SIZE channels; its last one may be narrower.
    """
    first = block * SIZE
    segment = 0
    begin = 0
    end = SEGMENTS[0]
    earlier = 0
    for index in gl.static_range(len(SEGMENTS) - 1):
        earlier += (SEGMENTS[index] + SIZE - 1) // SIZE
        later = (block >= earlier).to(gl.int32)
        first += later * (SEGMENTS[index] - (SEGMENTS[index] + SIZE - 1) // SIZE * SIZE)
        segment += later
        begin += later * SEGMENTS[index]
        end += later * SEGMENTS[index + 1]
    return first, segment, begin, end
