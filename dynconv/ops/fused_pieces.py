"""Rotations by RoPE in the convolutions' kernels, in Gluon.

A thread owns four adjacent channels, so pairs of adjacent channels are rotated without moving data between threads. It
also owns consecutive times, so the angle's cosine and sine follow from those of the time before by one rotation: they
need neither memory nor special functions. After RUN steps this has an error of about RUN roundings of float32.

The tensor-core kernels keep one angle a pair. In the ring kernels a pair may also be channels i and i + E/2 of a head
of E channels, which lie in two lanes of a warp; so each channel has an angle there, negative for the first of a pair.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from dynconv.ops.mma import axis


@gluon.constexpr_function
def pair_layout(warps):
    """[WARPS, 16 rows, 8 pairs]: the same distribution as `own_layout`, for pairs of adjacent channels."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 0, 1], [0, 8, 0]],
        lane_bases=[[0, 0, 2], [0, 0, 4], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        warp_bases=[[2**bit, 0, 0] for bit in range(warps.bit_length() - 1)],
        block_bases=[],
        shape=[warps, 16, 8],
    )


@gluon.jit
def _cosine_and_sine(angle):
    """The hardware's approximations, whose absolute error is 5e-7 between -pi and pi, after whole turns are taken off.

    2 pi is a float32 and its rest, so that the product with up to a million turns is as exact as the angle.
    """
    turns = gl.floor(angle * 0.15915494309 + 0.5)
    rest = gl.fma(turns, -6.2831854820251465, angle)
    rest = gl.fma(turns, 1.7484556e-7, rest)
    cosine_asm: gl.constexpr = "cos.approx.ftz.f32 $0, $1;"
    sine_asm: gl.constexpr = "sin.approx.ftz.f32 $0, $1;"
    cosine = gl.inline_asm_elementwise(cosine_asm, "=f,f", [rest], dtype=gl.float32, is_pure=True, pack=1)
    sine = gl.inline_asm_elementwise(sine_asm, "=f,f", [rest], dtype=gl.float32, is_pure=True, pack=1)
    return cosine, sine


@gluon.jit
def start_rotation(
    frequencies, first, segment, start, RUN, PAIRS: gl.constexpr, WARPS: gl.constexpr, PAIR: gl.constexpr
):
    """Cosines and sines at each row's first time [WARPS, 16, 8], and those of one time step [WARPS, 1, 8].

    `first` is the program's first channel within its segment. Segments 0 and 1 (queries and keys) are rotated; the
    angle of the others stays zero. PAIRS is the number of pairs of channels in a head.
    """
    pair = first // 2 + axis(WARPS, 0, PAIR) * 8 + axis(8, 2, PAIR)
    frequency = gl.load(frequencies + pair % PAIRS, mask=(pair >= 0) & (segment < 2), other=0.0)
    time = start + axis(16, 1, PAIR) * RUN
    cosine, sine = _cosine_and_sine(time.to(gl.float32) * frequency)
    step_cosine, step_sine = _cosine_and_sine(frequency)
    return cosine, sine, step_cosine, step_sine


@gluon.jit
def next_rotation(cosine, sine, step_cosine, step_sine):
    """The cosines and sines one time step later."""
    return cosine * step_cosine - sine * step_sine, sine * step_cosine + cosine * step_sine


@gluon.jit
def rotate(value, cosine, sine, WARPS: gl.constexpr, PAIR: gl.constexpr, OWN: gl.constexpr):
    """Channels 2 i and 2 i + 1 of [WARPS, 16, 16], rotated as a point of the plane."""
    first, second = gl.split(value.reshape([WARPS, 16, 8, 2]))
    first, second = gl.convert_layout(first, PAIR), gl.convert_layout(second, PAIR)
    rotated = gl.join(first * cosine - second * sine, second * cosine + first * sine)
    return gl.convert_layout(rotated.reshape([WARPS, 16, 16]), OWN)


@gluon.jit
def start_angles(frequencies, channel, segment, start, PAIRS: gl.constexpr, APART: gl.constexpr):
    """Cosines and sines of each channel's angle at the time `start`, and those of one time step.

    `channel` is its number within its segment. Segments 0 and 1 (queries and keys) are rotated; the angle of the others
    stays zero. PAIRS is the number of pairs in a head, whose two channels are APART: 1, or PAIRS.
    """
    pair = channel // 2 % PAIRS if APART == 1 else channel % PAIRS
    frequency = gl.load(frequencies + pair, mask=(channel >= 0) & (segment < 2), other=0.0)
    frequency = gl.where(channel // APART % 2 == 0, -frequency, frequency)
    cosine, sine = _cosine_and_sine(start.to(gl.float32) * frequency)
    step_cosine, step_sine = _cosine_and_sine(frequency)
    return cosine, sine, step_cosine, step_sine


@gluon.constexpr_function
def _shuffle(lanes):
    """The instruction by which two lanes whose numbers differ in the bit `lanes` exchange a value."""
    return f"shfl.sync.bfly.b32 $0, $1, {lanes}, 31, 0xffffffff;"


@gluon.jit
def turned(value, cosine, sine, APART: gl.constexpr, BLOCK: gl.constexpr, OWN: gl.constexpr):
    """The channels [BLOCK], each with the one that lies APART from it rotated as a point of the plane."""
    if APART == 1:
        first, second = gl.split(value.reshape([BLOCK // 2, 2]))
        partner = gl.convert_layout(gl.join(second, first).reshape([BLOCK]), OWN)
    else:
        asm: gl.constexpr = _shuffle(APART // 4)  # a lane owns four channels
        partner = gl.inline_asm_elementwise(asm, "=f,f", [value], dtype=gl.float32, is_pure=False, pack=1)
    return value * cosine + partner * sine
