"""Functions of tensor-core kernels whose warps own the same 8 channels of two parts, such as gate and up, in Gluon.

The two parts are halves of the matrix unit's 16 columns: [WARPS, 16 rows, 8 channels] each, in the layout of its
results. A thread holds two adjacent channels of both, in rows r and r + 8. Changes of layout keep data in its thread.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dynconv.ops.mma import axis


@gluon.constexpr_function
def _read_layout(warps, parts):
    """[16 rows, channel], with the channels of all warps side by side, and so the parts."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [8, 0], [0, 8 * warps]][: parts + 1],
        lane_bases=[[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[0, 8 * 2**bit] for bit in range(warps.bit_length() - 1)],
        block_bases=[],
        shape=[16, 8 * warps * parts],
    )


@gluon.jit
def read_one(slot, WARPS: gl.constexpr, layout: gl.constexpr):
    """Read one slot of a ring buffer of one part: [16 rows, channel] -> [WARPS, 16 rows, 8 channels]."""
    value = slot.load(_read_layout(WARPS, 1)).reshape([16, WARPS, 8]).permute([1, 0, 2])
    return gl.convert_layout(value, layout)


@gluon.jit
def read_both(slot, WARPS: gl.constexpr, layout: gl.constexpr):
    """Read one slot of a ring buffer of both parts: [16 rows, channel] -> [WARPS, 16 rows, 8 channels] each."""
    first, second = gl.split(slot.load(_read_layout(WARPS, 2)).reshape([16, 2, WARPS, 8]).permute([2, 0, 3, 1]))
    return gl.convert_layout(first, layout), gl.convert_layout(second, layout)


@gluon.jit
def store_both(slot, first, second, WARPS: gl.constexpr):
    """The inverse of `read_both`."""
    both = gl.join(first, second).permute([1, 3, 0, 2]).reshape([16, 16 * WARPS])
    slot.store(gl.convert_layout(both, _read_layout(WARPS, 2)))


@gluon.jit
def widened(value):
    """16-bit values in float32. Triton's own conversion of bfloat16 takes three instructions for two values."""
    if value.dtype == gl.bfloat16:
        asm: gl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
        value = gl.inline_asm_elementwise(asm, "=r,=r,r", [value], dtype=gl.float32, is_pure=True, pack=2)
    return value.to(gl.float32)


@gluon.jit
def paired(values, WARPS: gl.constexpr):
    """Each of the 16-bit tensors as numbers [WARPS, 16, 4] of two adjacent values.

    As variables of a loop, the compiler would keep every 16 bits in a register of its own.
    """
    numbers = ()
    for index in gl.static_range(len(values)):
        first, second = gl.split(values[index].to(gl.int16, bitcast=True).reshape([WARPS, 16, 4, 2]))
        numbers = numbers + ((first.to(gl.int32) & 65535) | (second.to(gl.int32) << 16),)
    return numbers


@gluon.jit
def unpaired(numbers, dtype: gl.constexpr, WARPS: gl.constexpr, layout: gl.constexpr):
    """The inverse of `paired`."""
    values = ()
    for index in gl.static_range(len(numbers)):
        both = gl.join(numbers[index].to(gl.int16), (numbers[index] >> 16).to(gl.int16)).reshape([WARPS, 16, 8])
        values = values + (gl.convert_layout(both, layout).to(dtype, bitcast=True),)
    return values


@gluon.jit
def transposed(g, WARPS: gl.constexpr):
    """[WARPS, 16 rows, 8 channels] -> [WARPS, 8 channels, 16 rows]."""
    g = gl.inline_asm_elementwise(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", "=r,r", [g], dtype=g.dtype, is_pure=False, pack=2
    )
    return g.reshape([WARPS, 2, 8, 8]).permute([0, 2, 1, 3]).reshape([WARPS, 8, 16])


@gluon.jit
def side_by_side(first, second, WARPS: gl.constexpr, layout: gl.constexpr):
    """[WARPS, 16 rows, C] twice -> [WARPS, 16 rows, 2 * C]."""
    C: gl.constexpr = first.shape[2]
    return gl.convert_layout(gl.join(first, second).permute([0, 1, 3, 2]).reshape([WARPS, 16, 2 * C]), layout)


@gluon.jit
def sum_operand(first, second, WARPS: gl.constexpr, layout: gl.constexpr):
    """Two results of `transposed` as the left operand [WARPS, 16, 16] of their sum over rows, with `sum_columns`.

    In lines 0 to 7 are the channels of rows 0 to 7, and then 8 to 15: first those of `first`, and then of `second`.
    In this order an operand's registers are those of the right operands that `first` and `second` are elsewhere.
    """
    both = gl.join(first, second).reshape([WARPS, 8, 2, 8, 2]).permute([0, 2, 1, 4, 3]).reshape([WARPS, 16, 16])
    return gl.convert_layout(both, layout)


@gluon.jit
def sum_columns(index, dtype: gl.constexpr, WARPS: gl.constexpr, layout: gl.constexpr):
    """The right operand [WARPS, 16, 8] that adds the sums of `sum_operand` to columns `index` and `index` + 4."""
    into = index + axis(16, 1, layout) // 8 * 4
    chosen = (axis(8, 2, layout) == into) & (axis(WARPS, 0, layout) >= 0)
    return chosen.to(gl.int32).to(dtype)


@gluon.jit
def total_of(sums, WARPS: gl.constexpr, layout: gl.constexpr):
    """What those operands sum up, from [WARPS, 16, 8]: [WARPS, 8 channels, 4 sums of `first`, and 4 of `second`]."""
    return gl.convert_layout(gl.sum(sums.reshape([WARPS, 2, 8, 8]), 1), layout)
