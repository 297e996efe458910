"""RoPE and SwiGLU in Triton, on the outputs of several linear maps side by side in one tensor.

Their gradients are written side by side, too, as the matrix product that computed them wants them.

Shapes: B batch, T time, H heads of queries, K heads of keys and values, E head size (a power of two), F hidden width.
"""

import triton
import triton.language as tl
from torch import Tensor

_HEADS = 64  # of one program of RoPE
_BLOCK = 1024  # channels of one program of SwiGLU: eight a thread, one access to memory of 16-bit numbers


@triton.jit
def _rotate(
    joined, q, k, v, cosine, sine, tokens, time, stride,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    BACKWARD: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Forward: q, k and v from `joined`, or in its place. Backward: `joined` from q, k and v."""
    part = tl.program_id(1)  # 0: queries, 1: keys, 2: values
    apart = q
    if part == 1:
        apart = k
    if part == 2:
        apart = v
    heads = tl.where(part == 0, H, K)
    column = tl.where(part == 0, 0, H + (part - 1) * K) * (2 * HALF)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    channel = tl.arange(0, HALF)[None, :]
    ok = (index < tokens * heads)[:, None]
    token = index // heads
    beside = joined + token[:, None] * stride + column + (index % heads)[:, None] * (2 * HALF) + channel
    alone = apart + index[:, None] * (2 * HALF) + channel
    angle = (token % time)[:, None] * (2 * HALF) + channel
    c = tl.where(part < 2, tl.load(cosine + angle, mask=ok, other=0.0), 1.0)
    s = tl.where(part < 2, tl.load(sine + angle, mask=ok, other=0.0), 0.0)
    if BACKWARD:
        source, target, s = alone, beside, -s
    elif IN_PLACE:
        source, target = beside, beside
    else:
        source, target = beside, alone
    first = tl.load(source, mask=ok, other=0.0).to(tl.float32)
    second = tl.load(source + HALF, mask=ok, other=0.0).to(tl.float32)
    dtype = joined.dtype.element_ty
    tl.store(target, (first * c - second * s).to(dtype), mask=ok)
    tl.store(target + HALF, (second * c + first * s).to(dtype), mask=ok)


def rotate(
    joined: Tensor,  # [B, T, (H + 2 K) * E]: queries, keys and values
    cosine: Tensor,  # [T, E]
    sine: Tensor,  # [T, E]
    heads: int,  # H
    kv_heads: int,  # K
) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, H, E], [B, T, K, E], [B, T, K, E]: rotated queries and keys, values
    joined = _rows(joined)
    batch, time, _ = joined.shape
    size = cosine.shape[1]
    q, k, v = (joined.new_empty(batch, time, many, size) for many in (heads, kv_heads, kv_heads))
    grid = (triton.cdiv(batch * time * max(heads, kv_heads), _HEADS), 3)
    _rotate[grid](
        joined, q, k, v, cosine, sine, batch * time, time, joined.stride(1),
        H=heads, K=kv_heads, HALF=size // 2, BACKWARD=False, IN_PLACE=False, BLOCK=_HEADS,
    )  # fmt: skip
    return q, k, v


def rotate_in_place(
    joined: Tensor,  # [B, T, (H + 2 K) * E]: queries, keys and values
    cosine: Tensor,  # [T, E]
    sine: Tensor,  # [T, E]
    heads: int,  # H
    kv_heads: int,  # K
) -> None:
    """Rotate queries and keys where they are. Values are not touched."""
    assert _rows(joined) is joined, "a copy would be rotated instead"
    batch, time, _ = joined.shape
    grid = (triton.cdiv(batch * time * max(heads, kv_heads), _HEADS), 2)
    _rotate[grid](
        joined, joined, joined, joined, cosine, sine, batch * time, time, joined.stride(1),
        H=heads, K=kv_heads, HALF=cosine.shape[1] // 2, BACKWARD=False, IN_PLACE=True, BLOCK=_HEADS,
    )  # fmt: skip


def rotate_backward(
    dq: Tensor,  # [B, T, H, E]
    dk: Tensor,  # [B, T, K, E]
    dv: Tensor,  # [B, T, K, E]
    cosine: Tensor,  # [T, E]
    sine: Tensor,  # [T, E]
) -> Tensor:  # [B, T, (H + 2 K) * E]
    batch, time, heads, size = dq.shape
    kv_heads = dk.shape[2]
    joined = dq.new_empty(batch, time, (heads + 2 * kv_heads) * size)
    grid = (triton.cdiv(batch * time * max(heads, kv_heads), _HEADS), 3)
    _rotate[grid](
        joined, dq.contiguous(), dk.contiguous(), dv.contiguous(), cosine, sine, batch * time, time, joined.stride(1),
        H=heads, K=kv_heads, HALF=size // 2, BACKWARD=True, IN_PLACE=False, BLOCK=_HEADS,
    )  # fmt: skip
    return joined


# Sizes are constants of the kernels: divisions by them are then multiplications, and Triton sees that eight
# neighbouring channels are of one token where F is a multiple of eight.
@triton.jit
def _swiglu(joined, y, size, F: tl.constexpr, FROM: tl.constexpr, INTO: tl.constexpr, BLOCK: tl.constexpr):
    """FROM and INTO are the distances of rows in `joined` and in y."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = index < size
    token, channel = (index // F).to(tl.int64), index % F
    at = token * FROM + channel
    gate = tl.load(joined + at, mask=ok, other=0.0).to(tl.float32)
    other = tl.load(joined + F + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + token * INTO + channel, (gate * tl.sigmoid(gate) * other).to(y.dtype.element_ty), mask=ok)


@triton.jit
def _swiglu_backward(
    dy, joined, djoined, size,
    F: tl.constexpr, RESULT: tl.constexpr, FROM: tl.constexpr, INTO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """RESULT, FROM and INTO are the distances of rows in dy, `joined` and `djoined`."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = index < size
    token, channel = (index // F).to(tl.int64), index % F
    at = token * FROM + channel
    gate = tl.load(joined + at, mask=ok, other=0.0).to(tl.float32)
    other = tl.load(joined + F + at, mask=ok, other=0.0).to(tl.float32)
    gradient = tl.load(dy + token * RESULT + channel, mask=ok, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    into = djoined + token * INTO + channel
    dtype = djoined.dtype.element_ty
    tl.store(into, (gradient * other * (sigmoid + silu * (1.0 - sigmoid))).to(dtype), mask=ok)
    tl.store(into + F, (gradient * silu).to(dtype), mask=ok)


def swiglu(
    joined: Tensor,  # [B, T, 2 F]: the gate and the other factor
    y: Tensor,  # [B, T, F]; written
) -> None:
    joined = _rows(joined)
    tokens, hidden = y.shape[0] * y.shape[1], y.shape[2]
    assert tokens * hidden < 2**31, "index would overflow"
    _swiglu[(triton.cdiv(tokens * hidden, _BLOCK),)](
        joined, y, tokens * hidden, F=hidden, FROM=joined.stride(1), INTO=y.stride(1), BLOCK=_BLOCK
    )


def swiglu_backward(
    dy: Tensor,  # [B, T, F]
    joined: Tensor,  # [B, T, 2 F]
    djoined: Tensor,  # [B, T, 2 F]; written
) -> None:
    dy, joined = _rows(dy), _rows(joined)
    tokens, hidden = dy.shape[0] * dy.shape[1], dy.shape[2]
    assert tokens * hidden < 2**31, "index would overflow"
    _swiglu_backward[(triton.cdiv(tokens * hidden, _BLOCK),)](
        dy, joined, djoined, tokens * hidden,
        F=hidden, RESULT=dy.stride(1), FROM=joined.stride(1), INTO=djoined.stride(1), BLOCK=_BLOCK,
    )  # fmt: skip


def _rows(joined: Tensor) -> Tensor:
    """The tensor, or a copy if its rows do not lie at equal distances."""
    batch_stride, stride, channel_stride = joined.stride()
    regular = channel_stride == 1 and (len(joined) == 1 or batch_stride == joined.shape[1] * stride)
    return joined if regular else joined.contiguous()
