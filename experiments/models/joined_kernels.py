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
    size = cosine.shape[1]
    q, k, v = (joined.new_empty(*joined.shape[:2], many, size) for many in (heads, kv_heads, kv_heads))
    _launch(_rows(joined), (q, k, v), cosine, sine, joined.shape[1], heads, kv_heads)
    return q, k, v


def rotate_in_place(
    joined: Tensor,  # [B, T, (H + 2 K) * E]: queries, keys and values
    cosine: Tensor,  # [T, E]
    sine: Tensor,  # [T, E]
    heads: int,  # H
    kv_heads: int,  # K
) -> None:
    """Rotate queries and keys where they are. Values are not touched."""
    rows = _rows(joined)
    assert rows.data_ptr() == joined.data_ptr(), "a copy would be rotated instead"
    _launch(rows, None, cosine, sine, joined.shape[1], heads, kv_heads)


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
    apart = (dq.contiguous(), dk.contiguous(), dv.contiguous())
    _launch(joined.flatten(0, 1), apart, cosine, sine, time, heads, kv_heads, backward=True)
    return joined


def _launch(
    rows: Tensor,  # [B * T, (H + 2 K) * E]
    apart: tuple[Tensor, Tensor, Tensor] | None,  # [B, T, H or K, E] each; None: q and k are rotated in `rows`
    cosine: Tensor,  # [T, E]
    sine: Tensor,  # [T, E]
    time: int,  # T
    heads: int,  # H
    kv_heads: int,  # K
    backward: bool = False,
) -> None:
    parts = 2 if apart is None else 3
    _rotate[(triton.cdiv(len(rows) * max(heads, kv_heads), _HEADS), parts)](
        rows, *(apart or (rows, rows, rows)), cosine, sine, len(rows), time, rows.stride(0),
        H=heads, K=kv_heads, HALF=cosine.shape[1] // 2, BACKWARD=backward, IN_PLACE=apart is None, BLOCK=_HEADS,
    )  # fmt: skip


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
    rows = _rows(joined)
    tokens, hidden = y.shape[0] * y.shape[1], y.shape[2]
    assert tokens * hidden < 2**31, "index would overflow"
    _swiglu[(triton.cdiv(tokens * hidden, _BLOCK),)](
        rows, y, tokens * hidden, F=hidden, FROM=rows.stride(0), INTO=y.stride(1), BLOCK=_BLOCK
    )


def swiglu_backward(
    dy: Tensor,  # [B, T, F]
    joined: Tensor,  # [B, T, 2 F]
    djoined: Tensor,  # [B, T, 2 F]; written
) -> None:
    tokens, hidden = dy.shape[0] * dy.shape[1], dy.shape[2]
    gradients, rows = _rows(dy), _rows(joined)
    assert tokens * hidden < 2**31, "index would overflow"
    _swiglu_backward[(triton.cdiv(tokens * hidden, _BLOCK),)](
        gradients, rows, djoined, tokens * hidden,
        F=hidden, RESULT=gradients.stride(0), FROM=rows.stride(0), INTO=djoined.stride(1), BLOCK=_BLOCK,
    )  # fmt: skip


def _rows(
    x: Tensor,  # [B, T, channels]
) -> Tensor:  # [B * T, channels]
    """The rows of all tokens at equal distances: a view if there is one, else a copy."""
    rows = x.flatten(0, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()
