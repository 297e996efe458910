"""RoPE and SwiGLU on the outputs of several linear maps that one matrix product has put side by side in one tensor.

torch.compile would write the gradients of q, k and v side by side in a kernel that takes seven times as long as its
memory traffic: a sixth of a 16M model's step. SwiGLU's gradients it would write in one that computes both for every
channel and keeps one: 59 instructions a number, so that these take longer than memory does. On a GPU both directions
of either are kernels of ours.

Shapes: B batch, T time, H heads of queries, K heads of keys and values, E head size, F hidden width.
"""

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_ROW_MULTIPLE = 64  # 16-bit values in a cache line, where each token's row should start
Rotation = tuple[Tensor, Tensor]  # cosines and sines of RoPE, [T, E] each


def rotate_joined(
    joined: Tensor,  # [B, T, (H + 2 K) * E]: queries, keys and values
    rotation: Rotation,
    heads: int,  # H
    kv_heads: int,  # K
) -> tuple[Tensor, Tensor, Tensor]:  # [B, H, T, E], [B, K, T, E], [B, K, T, E]
    """Queries and keys after RoPE, and the values."""
    q, k, v = _rotate(joined, *rotation, heads, kv_heads)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def rotate(
    x: Tensor,  # [..., T, E]
    rotation: Rotation,
) -> Tensor:  # [..., T, E]
    """RoPE (arXiv 2104.09864) on pairs of channels i and i + E / 2."""
    cosine, sine = rotation
    first, second = x.chunk(2, dim=-1)
    half = x.shape[-1] // 2
    c, s = cosine[..., :half], sine[..., :half]
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)


def swiglu_joined(
    joined: Tensor,  # [B, T, 2 F]: the gate and the other factor
) -> Tensor:  # [B, T, F]
    """silu(gate) * other, computed in float32 or wider and rounded once."""
    y: Tensor = _swiglu(joined)
    return y


def kernels_fit(head_size: int) -> bool:
    """Whether the kernels take heads of this size."""
    return head_size >= 2 and head_size & (head_size - 1) == 0


def _by_kernels(x: Tensor) -> bool:
    return x.is_cuda and importlib.util.find_spec("triton") is not None


# The values are copied, because an operator's output cannot be a view of its input. Compiled programs rotate in place
# instead: see rotation_in_place.py.
@torch.library.custom_op("experiments::rotate", mutates_args=())
def _rotate(
    joined: Tensor, cosine: Tensor, sine: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, H, E], [B, T, K, E], [B, T, K, E]
    if _by_kernels(joined):
        from experiments.models import joined_kernels

        return joined_kernels.rotate(joined, cosine, sine, heads, kv_heads)
    size = cosine.shape[1]
    parts = joined.split([heads * size, kv_heads * size, kv_heads * size], 2)
    q, k, v = (part.unflatten(2, (-1, size)) for part in parts)
    q, k = (rotate(x.transpose(1, 2), (cosine, sine)).transpose(1, 2).contiguous() for x in (q, k))
    return q, k, v.clone(memory_format=torch.contiguous_format)


@_rotate.register_fake
def _(
    joined: Tensor,
    cosine: Tensor,
    sine: Tensor,  # noqa: ARG001 - the operator's signature
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    size = cosine.shape[1]
    q, k, v = (joined.new_empty(*joined.shape[:2], many, size) for many in (heads, kv_heads, kv_heads))
    return q, k, v


# Any layout is taken as it is: torch.compile pads the rows of products, and would copy them for other operators.
@torch.library.custom_op("experiments::rotate_in_place", mutates_args=("joined",), tags=(torch.Tag.flexible_layout,))
def _rotate_in_place(joined: Tensor, cosine: Tensor, sine: Tensor, heads: int, kv_heads: int) -> None:
    if _by_kernels(joined):
        from experiments.models import joined_kernels

        joined_kernels.rotate_in_place(joined, cosine, sine, heads, kv_heads)
        return
    size = cosine.shape[1]
    for part in joined[..., : (heads + kv_heads) * size].split([heads * size, kv_heads * size], 2):
        x = part.unflatten(2, (-1, size)).transpose(1, 2)
        x.copy_(rotate(x, (cosine, sine)))


@_rotate_in_place.register_fake
def _(joined: Tensor, cosine: Tensor, sine: Tensor, heads: int, kv_heads: int) -> None:
    pass


@torch.library.custom_op("experiments::rotate_backward", mutates_args=())
def _rotate_backward(dq: Tensor, dk: Tensor, dv: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    if _by_kernels(dq):
        from experiments.models import joined_kernels

        return joined_kernels.rotate_backward(dq, dk, dv, cosine, sine)
    dq, dk = (rotate(x.transpose(1, 2), (cosine, -sine)).transpose(1, 2) for x in (dq, dk))
    return torch.cat([dq.flatten(2), dk.flatten(2), dv.flatten(2)], 2)


@_rotate_backward.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:  # noqa: ARG001
    return dq.new_empty(*dq.shape[:2], (dq.shape[2] + dk.shape[2] + dv.shape[2]) * dq.shape[3])


def _save_table(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 - the protocol's signature
    ctx.save_for_backward(*inputs[1:3])


def _rotate_back(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    return _rotate_backward(dq, dk, dv, *ctx.saved_tensors), None, None, None, None


_rotate.register_autograd(_rotate_back, setup_context=_save_table)


# Any layout is taken as it is, as above.
@torch.library.custom_op("experiments::swiglu", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _swiglu(joined: Tensor) -> Tensor:  # [B, T, F], with padded rows
    y = _padded(joined, joined.shape[2] // 2)
    if _by_kernels(joined):
        from experiments.models import joined_kernels

        joined_kernels.swiglu(joined, y)
        return y
    gate, other = joined.to(torch.promote_types(joined.dtype, torch.float32)).chunk(2, 2)
    return y.copy_(F.silu(gate) * other)


@_swiglu.register_fake
def _(joined: Tensor) -> Tensor:
    return _padded(joined, joined.shape[2] // 2)


@torch.library.custom_op("experiments::swiglu_backward", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def _swiglu_backward(dy: Tensor, joined: Tensor) -> Tensor:  # [B, T, 2 F], with padded rows
    djoined = _padded(joined, joined.shape[2])
    if _by_kernels(joined):
        from experiments.models import joined_kernels

        joined_kernels.swiglu_backward(dy, joined, djoined)
        return djoined
    wide = torch.promote_types(joined.dtype, torch.float32)
    gate, other = joined.to(wide).chunk(2, 2)
    dgate = torch.ops.aten.silu_backward(dy.to(wide) * other, gate)
    return djoined.copy_(torch.cat([dgate, dy.to(wide) * F.silu(gate)], 2))


@_swiglu_backward.register_fake
def _(dy: Tensor, joined: Tensor) -> Tensor:  # noqa: ARG001
    return _padded(joined, joined.shape[2])


def _padded(like: Tensor, channels: int) -> Tensor:  # [B, T, channels]
    """An empty tensor of the tokens of `like`, whose rows begin at cache lines."""
    batch, time, _ = like.shape
    stride = -(-channels // _ROW_MULTIPLE) * _ROW_MULTIPLE
    return like.new_empty_strided((batch, time, channels), (time * stride, stride, 1))


def _save_joined(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs)


def _swiglu_back(ctx: Any, dy: Tensor) -> Tensor:
    gradient: Tensor = _swiglu_backward(dy, *ctx.saved_tensors)
    return gradient


_swiglu.register_autograd(_swiglu_back, setup_context=_save_joined)
