"""How the ring kernels distribute channels, heads and the coefficients of their filters over the lanes of a warp.

A lane holds four neighbouring channels, and the W coefficients of the head or heads they belong to. Head sizes and W
are powers of two.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def _bits(number):
    return number.bit_length() - 1


@gluon.constexpr_function
def channel_layout(warps):
    """[channel]: four neighbouring channels per lane."""
    return gl.BlockedLayout([4], [32], [warps], [0])


@gluon.constexpr_function
def head_layout(warps, head_size):
    """[head, channel of the head]: the same distribution as `channel_layout`, with the dimension of channels split."""

    def basis(bit):
        return [0, 2**bit] if 2**bit < head_size else [2**bit // head_size, 0]

    return gl.DistributedLinearLayout(
        reg_bases=[basis(bit) for bit in range(2)],
        lane_bases=[basis(bit) for bit in range(2, 7)],
        warp_bases=[basis(bit) for bit in range(7, 7 + _bits(warps))],
        block_bases=[],
        shape=[128 * warps // head_size, head_size],
    )


@gluon.constexpr_function
def coefficient_layout(warps, head_size, width):
    """[head * W + tap]: each lane holds all taps of the heads of its channels."""

    def basis(bit):
        return [2**bit // head_size * width]

    return gl.DistributedLinearLayout(
        reg_bases=[[2**bit] for bit in range(_bits(width))] + [basis(bit) for bit in range(2) if 2**bit >= head_size],
        lane_bases=[basis(bit) for bit in range(2, 7)],
        warp_bases=[basis(bit) for bit in range(7, 7 + _bits(warps))],
        block_bases=[],
        shape=[128 * warps // head_size * width],
    )


@gluon.constexpr_function
def copy_layout(warps, columns):
    """[head * W + tap] for copies into the ring buffer."""
    return gl.BlockedLayout([min(8, max(2, columns // (32 * warps)))], [32], [warps], [0])


@gluon.jit
def split_taps(flat, HEADS: gl.constexpr, W: gl.constexpr):
    """[HEADS * W] -> the W taps, each [HEADS]."""
    if W == 2:
        taps = gl.split(flat.reshape([HEADS, 2]))
    elif W == 4:
        even, odd = gl.split(flat.reshape([HEADS, 2, 2]))
        a, c = gl.split(even)
        b, d = gl.split(odd)
        taps = (a, b, c, d)
    else:
        gl.static_assert(W == 8, "2, 4 or 8 taps")
        even, odd = gl.split(flat.reshape([HEADS, 2, 2, 2]))
        even_low, even_high = gl.split(even)
        odd_low, odd_high = gl.split(odd)
        a, e = gl.split(even_low)
        c, g = gl.split(even_high)
        b, f = gl.split(odd_low)
        d, h = gl.split(odd_high)
        taps = (a, b, c, d, e, f, g, h)
    return taps


@gluon.jit
def join_taps(taps, HEADS: gl.constexpr, W: gl.constexpr):
    """The inverse of `split_taps`: the W taps, each [HEADS] -> [HEADS * W]."""
    if W == 2:
        flat = gl.join(taps[0], taps[1])
    elif W == 4:
        flat = gl.join(gl.join(taps[0], taps[2]), gl.join(taps[1], taps[3]))
    else:
        gl.static_assert(W == 8, "2, 4 or 8 taps")
        even = gl.join(gl.join(taps[0], taps[4]), gl.join(taps[2], taps[6]))
        odd = gl.join(gl.join(taps[1], taps[5]), gl.join(taps[3], taps[7]))
        flat = gl.join(even, odd)
    return flat.reshape([HEADS * W])


@gluon.jit
def per_channel(tap, WARPS: gl.constexpr, HP: gl.constexpr):
    """[head] -> [channel]: every channel gets its head's coefficient, in float32."""
    HEAD: gl.constexpr = head_layout(WARPS, HP)
    tap = gl.expand_dims(gl.convert_layout(tap.to(gl.float32), gl.SliceLayout(1, HEAD)), 1)
    spread = tap.broadcast_to([128 * WARPS // HP, HP]).reshape([128 * WARPS])
    return gl.convert_layout(spread, channel_layout(WARPS))


@gluon.jit
def per_head(product, WARPS: gl.constexpr, HP: gl.constexpr):
    """[channel] -> [head]: the sum over each head's channels."""
    HEAD: gl.constexpr = head_layout(WARPS, HP)
    return gl.sum(gl.convert_layout(product.reshape([128 * WARPS // HP, HP]), HEAD), 1)
