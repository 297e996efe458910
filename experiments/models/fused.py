"""Low-rank convolutions computed in one kernel with their neighbours, where `Execution.fused` asks for it.

One matrix product computes all maps of an input and the generators' outputs, and its gradient is written whole. RoPE,
SwiGLU or the sum with the residual stream is part of the kernel. The values differ from those of the separate kernels
only by rounding, so this is no part of a run's id.

Shapes: B batch, T time, P maps of D outputs each, H heads, E head size.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynconv.layers import LowRankDynamicConv
from dynconv.ops import (
    interleaved,
    lowrank_gated_convolution,
    lowrank_joined_convolution,
    lowrank_rotary_convolution,
)

_MAX_PARTS = 3  # of the kernels, as the next three
_MAX_WIDTH = 4
_MAX_RANK = 16
_CHANNEL_MULTIPLE = 16
_ROW_MULTIPLE = 64  # 16-bit values in a cache line, where each token's row should start
Arrange = Callable[[int, Tensor], Tensor]  # (number of the map, tensor with its channels as last dimension) -> the same


def fit(convolutions: Sequence[nn.Module | None]) -> bool:
    """Whether these convolutions can be computed together, with their generators in the product of their maps.

    They must be low-rank and alike, have no activation, and be of a size that the kernels take: composed of others, the
    same would be slower than the separate modules.
    """
    lowrank = [conv for conv in convolutions if isinstance(conv, LowRankDynamicConv)]
    if len(lowrank) < len(convolutions) or not 1 <= len(lowrank) <= _MAX_PARTS:
        return False
    first = lowrank[0]
    supported = first.width <= _MAX_WIDTH and len(first.up) <= _MAX_RANK and first.channels % _CHANNEL_MULTIPLE == 0

    def settings(conv: LowRankDynamicConv) -> tuple[object, ...]:
        return conv.channels, conv.width, len(conv.up), conv.residual, conv.static_filter is None

    return supported and all(conv.activation is None and settings(conv) == settings(first) for conv in lowrank)


def convolved(
    weights: Sequence[Tensor],  # [D, inputs] each, of the maps
    convolutions: Sequence[LowRankDynamicConv],  # that `fit`
    x: Tensor,  # [B, T, inputs]
    added: Tensor | None = None,  # [B, T, D]: the residual stream, to which the one map's output is added
) -> tuple[Tensor, ...]:  # [B, T, D] each
    """The maps' outputs after convolution."""
    up, static = _filters(convolutions, lambda _, filters: filters)
    channels, residual = convolutions[0].channels, convolutions[0].residual
    joined = _product(weights, convolutions, x)
    return lowrank_joined_convolution(joined, up, static, channels, residual, parts=len(weights), added=added)


def gated(
    weights: Sequence[Tensor],  # [D, inputs] each, of gate and up
    convolutions: Sequence[LowRankDynamicConv],  # that `fit`
    x: Tensor,  # [B, T, inputs]
) -> Tensor:  # [B, T, D]
    """silu(gate) * up, after their convolutions."""
    up, static = _filters(convolutions, lambda _, filters: filters)
    joined = _product(weights, convolutions, x)
    return lowrank_gated_convolution(joined, up, static, convolutions[0].channels, convolutions[0].residual)


def rotated(
    weights: Sequence[Tensor],  # [D, inputs] each, of the maps q, k and v
    convolutions: Sequence[LowRankDynamicConv],  # that `fit`
    x: Tensor,  # [B, T, inputs]
    heads: int,  # H, of queries, and of keys, and of values
    frequencies: Tensor,  # [E/2]
) -> tuple[Tensor, Tensor, Tensor]:  # [B, H, T, E] each
    """Queries and keys after convolution and RoPE, and values.

    The channels of queries and keys are in another order, as the kernel wants a pair of RoPE side by side: the rows of
    their weights are put into this order.
    """
    up, static = _filters(convolutions, lambda part, filters: interleaved(filters, heads, -1) if part < 2 else filters)
    rows = [interleaved(weight, heads) if part < 2 else weight for part, weight in enumerate(weights)]
    joined = _product(rows, convolutions, x)
    q, k, v = lowrank_rotary_convolution(joined, up, static, frequencies, heads, convolutions[0].residual)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _product(
    weights: Sequence[Tensor],  # [D, inputs] each
    convolutions: Sequence[LowRankDynamicConv],
    x: Tensor,  # [B, T, inputs]
) -> Tensor:  # [B, T, P*D + P*R + padding]
    """The outputs of the maps and of their generators, with zeros up to a whole cache line."""
    weights = [*weights, *(conv.down.weight for conv in convolutions)]
    padding = -sum(len(weight) for weight in weights) % _ROW_MULTIPLE
    return F.linear(x, torch.cat([*weights, weights[0].new_zeros(padding, x.shape[-1])]))


def _filters(
    convolutions: Sequence[LowRankDynamicConv], arrange: Arrange
) -> tuple[Tensor, Tensor | None]:  # [R, W*P*D], [W, P*D]
    """The bases and the static filters of all, side by side."""
    bases = [arrange(part, conv.up.unflatten(1, (conv.width, -1))) for part, conv in enumerate(convolutions)]
    static = [arrange(n, conv.static_filter) for n, conv in enumerate(convolutions) if conv.static_filter is not None]
    return torch.cat(bases, -1).flatten(1), torch.cat(static, -1) if static else None
