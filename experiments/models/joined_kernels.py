"""RoPE and SwiGLU in Triton, on the outputs of several linear maps side by side in one tensor.

Their gradients are written side by side, too, as the matrix product that computed the outputs wants them.

Shapes: B batch, T time, H heads of queries, K heads of keys and values, E head size (a power of two), F hidden width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS = 64  # of a program of `_rotate`
_UNITS = 256  # of a program of the others: up to eight channels each


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


@triton.jit
def _places(tokens, hidden, stride, result_stride, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    """Offsets of a program's channels in a tensor with rows of `stride`, and in one with rows of `result_stride`.

    Sizes are in units of UNIT channels, which make one access to memory. A program has BLOCK units, in the order in
    which they lie in memory.
    """
    unit = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    token, place = unit // hidden, unit % hidden
    channel = tl.arange(0, UNIT)[None, :]
    joined = ((token * stride + place) * UNIT)[:, None] + channel
    apart = ((token * result_stride + place) * UNIT)[:, None] + channel
    return joined, apart, (token < tokens)[:, None]


@triton.jit
def _swiglu(joined, result, tokens, hidden, start, stride, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    at, into, ok = _places(tokens, hidden, stride, hidden, UNIT, BLOCK)
    gate = tl.load(joined + at, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(joined + start * UNIT + at, mask=ok, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(result + into, y.to(result.dtype.element_ty), mask=ok)


@triton.jit
def _swiglu_backward(
    dresult, joined, djoined, tokens, hidden, start, stride, width, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    at, into, ok = _places(tokens, hidden, stride, width, UNIT, BLOCK)
    _, beside, _ = _places(tokens, hidden, stride, hidden, UNIT, BLOCK)
    gate = tl.load(joined + at, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(joined + start * UNIT + at, mask=ok, other=0.0).to(tl.float32)
    dy = tl.load(dresult + beside, mask=ok, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dtype = djoined.dtype.element_ty
    tl.store(djoined + into, dgate.to(dtype), mask=ok)
    tl.store(djoined + start * UNIT + into, (dy * gate * sigmoid).to(dtype), mask=ok)


def swiglu(
    joined: Tensor,  # [B, T, C]: the gate from channel 0 on, the other factor from channel `start` on
    hidden: int,  # F
    start: int,
) -> Tensor:  # [B, T, F]
    joined = _rows(joined)
    tokens = joined.shape[0] * joined.shape[1]
    result = joined.new_empty(*joined.shape[:2], hidden)
    sizes, unit = _in_units(hidden, start, joined.stride(1))
    grid = (triton.cdiv(tokens * sizes[0], _UNITS),)
    _swiglu[grid](joined, result, tokens, *sizes, UNIT=unit, BLOCK=_UNITS)
    return result


def swiglu_backward(
    dresult: Tensor,  # [B, T, F]
    joined: Tensor,  # [B, T, C]
    start: int,
) -> Tensor:  # [B, T, C], with zeros in channels that are neither factor's
    joined, hidden = _rows(joined), dresult.shape[2]
    tokens = joined.shape[0] * joined.shape[1]
    djoined = torch.empty(joined.shape, dtype=joined.dtype, device=joined.device)
    djoined[..., hidden:start] = 0
    djoined[..., start + hidden :] = 0
    sizes, unit = _in_units(hidden, start, joined.stride(1), joined.shape[2])
    grid = (triton.cdiv(tokens * sizes[0], _UNITS),)
    _swiglu_backward[grid](dresult.contiguous(), joined, djoined, tokens, *sizes, UNIT=unit, BLOCK=_UNITS)
    return djoined


def _in_units(*sizes: int) -> tuple[list[int], int]:
    """The sizes in units of 8 channels, which are one access to memory, if all are whole ones; else as they are.

    Triton sees by itself only multiples of 16.
    """
    unit = 8 if all(size % 8 == 0 for size in sizes) else 1
    return [size // unit for size in sizes], unit


def _rows(joined: Tensor) -> Tensor:
    """The tensor, or a copy if its rows do not lie at equal distances."""
    batch_stride, stride, channel_stride = joined.stride()
    regular = channel_stride == 1 and (len(joined) == 1 or batch_stride == joined.shape[1] * stride)
    return joined if regular else joined.contiguous()
