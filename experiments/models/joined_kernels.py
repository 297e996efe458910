"""RoPE in Triton, on queries, keys and values side by side in one tensor.

Their gradients are written side by side, too, as the matrix product that computed them wants them.

Shapes: B batch, T time, H heads of queries, K heads of keys and values, E head size (a power of two).
"""

import triton
import triton.language as tl
from torch import Tensor

_HEADS = 64  # of one program


@triton.jit
def _rotate(
    joined, q, k, v, cosine, sine, tokens, time, stride,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Forward: q, k and v from `joined`. Backward: `joined` from q, k and v."""
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
        H=heads, K=kv_heads, HALF=size // 2, BACKWARD=False, BLOCK=_HEADS,
    )  # fmt: skip
    return q, k, v


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
        H=heads, K=kv_heads, HALF=size // 2, BACKWARD=True, BLOCK=_HEADS,
    )  # fmt: skip
    return joined


def _rows(joined: Tensor) -> Tensor:
    """The tensor, or a copy if its rows do not lie at equal distances."""
    batch_stride, stride, channel_stride = joined.stride()
    regular = channel_stride == 1 and (len(joined) == 1 or batch_stride == joined.shape[1] * stride)
    return joined if regular else joined.contiguous()
