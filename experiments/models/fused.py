"""Convolutions computed in one kernel with their neighbours, where `Execution.fused` asks for it.

One matrix product computes all maps of an input and the generators' outputs, and its gradient is written whole. RoPE,
SwiGLU or the sum with the residual stream is part of the kernel. The values differ from those of the separate kernels
only by rounding, so this is no part of a run's id.

Shapes: B batch, T time, P maps of D outputs each, H heads, E head size.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynconv.layers import HeadwiseDynamicConv, LowRankDynamicConv, StaticShortConv
from dynconv.ops import (
    headwise_joined_convolution,
    headwise_rotary_convolution,
    interleaved,
    lowrank_gated_convolution,
    lowrank_joined_convolution,
    lowrank_rotary_convolution,
    static_gated_convolution,
    static_joined_convolution,
    static_rotary_convolution,
)

ShortConv = StaticShortConv | HeadwiseDynamicConv | LowRankDynamicConv
_MAX_PARTS = 3  # of the kernels, as the next lines
_MAX_WIDTH = 4
_MAX_RANK = 16
_CHANNEL_MULTIPLE = 16
_GENERATOR_MULTIPLE = 16  # of the columns of each low-rank generator, which the kernels otherwise pad themselves
_FILTER_HEADS = {2: (4, 8), 4: (4, 8, 16)}  # by width, how many channels may share a head-wise filter
_ROTATED_HEADS = (8, 16, 32, 64, 128)  # head sizes that RoPE rotates after head-wise filters
_ROW_MULTIPLE = 64  # 16-bit values in a cache line, where each token's row should start
Arrange = Callable[[int, Tensor], Tensor]  # (number of the map, tensor with its channels as last dimension) -> the same


def fit(convolutions: Sequence[nn.Module | None], padded: bool = False) -> bool:
    """Whether these convolutions can be computed together, with their generators in the product of their maps.

    They must be alike, have no activation, and be of a size that the kernels take, or of fewer channels if these may be
    `padded`: composed of others, the same would be slower than the separate modules.
    """
    if not 1 <= len(convolutions) <= _MAX_PARTS or not all(isinstance(conv, ShortConv) for conv in convolutions):
        return False
    alike = cast(Sequence[ShortConv], convolutions)
    first = alike[0]
    supported = first.width <= _MAX_WIDTH and (padded or first.channels % _CHANNEL_MULTIPLE == 0)
    if isinstance(first, LowRankDynamicConv):
        supported = supported and len(first.up) <= _MAX_RANK
    if isinstance(first, HeadwiseDynamicConv):
        columns = len(alike) * first.heads * first.width
        sizes = _FILTER_HEADS.get(first.width, ())
        supported = supported and first.channels // first.heads in sizes and columns % _CHANNEL_MULTIPLE == 0
    plain = all(conv.activation is None and conv.bias is None for conv in alike)
    same = all(conv.channels == first.channels and settings(conv) == settings(first) for conv in alike)
    return supported and plain and same


def settings(convolution: ShortConv) -> tuple[object, ...]:
    """What convolutions in one launch must have in common, here or in `short_convolution`."""
    shape: int | None = None
    if isinstance(convolution, LowRankDynamicConv):
        shape = len(convolution.up)  # the rank
    if isinstance(convolution, HeadwiseDynamicConv):
        shape = convolution.channels // convolution.heads
    static = convolution.static_filter is not None
    return type(convolution), convolution.width, convolution.residual, static, convolution.activation, shape


def takes_swiglu(convolutions: Sequence[nn.Module | None]) -> bool:
    """Whether gate and up `fit` and SwiGLU can be part of their kernel. Their channels are padded if need be."""
    return not isinstance(convolutions[0], HeadwiseDynamicConv) and fit(convolutions, padded=True)


def takes_rope(convolutions: Sequence[nn.Module | None], head_size: int) -> bool:
    """Whether RoPE on heads of so many channels can be part of the kernel of convolutions that `fit`."""
    return not isinstance(convolutions[0], HeadwiseDynamicConv) or head_size in _ROTATED_HEADS


def convolved(
    weights: Sequence[Tensor],  # [D, inputs] each, of the maps
    convolutions: Sequence[ShortConv],  # that `fit`
    x: Tensor,  # [B, T, inputs or more]: the result of `gated`, which may be padded, or any other
    added: Tensor | None = None,  # [B, T, D]: the residual stream, to which the one map's output is added
) -> tuple[Tensor, ...]:  # [B, T, D] each
    """The maps' outputs after convolution."""
    joined, first = _product(weights, convolutions, x), convolutions[0]
    static = _static_filters(convolutions, _as_they_are)
    parts = len(weights)
    if isinstance(first, LowRankDynamicConv):
        up = _bases(convolutions, _as_they_are)
        return lowrank_joined_convolution(
            joined, up, static, first.channels, first.residual, parts=parts, added=added, padded=True
        )
    if isinstance(first, HeadwiseDynamicConv):
        own = (first.channels // first.heads, first.width)
        return headwise_joined_convolution(
            joined, static, first.channels, *own, first.residual, parts=parts, added=added
        )
    assert static is not None
    return static_joined_convolution(joined, static, first.channels, first.residual, parts=parts, added=added)


def gated(
    weights: Sequence[Tensor],  # [D, inputs] each, of gate and up
    convolutions: Sequence[ShortConv],  # for which `takes_swiglu`
    x: Tensor,  # [B, T, inputs]
) -> Tensor:  # [B, T, D or more]
    """silu(gate) * up, after their convolutions, with zeros up to a number of channels that the kernels take."""
    first = convolutions[0]
    more = -first.channels % _CHANNEL_MULTIPLE

    def arrange(_: int, filters: Tensor) -> Tensor:
        return _with_zeros(filters, more, -1)

    rows = [row for weight in weights for row in (weight, weight.new_zeros(more, weight.shape[1]))]
    joined, channels = _product(rows, convolutions, x), first.channels + more
    static = _static_filters(convolutions, arrange)
    if isinstance(first, LowRankDynamicConv):
        up = _bases(convolutions, arrange)
        return lowrank_gated_convolution(joined, up, static, channels, first.residual, padded=True)
    assert static is not None
    return static_gated_convolution(joined, static, channels, first.residual)


def rotated(
    weights: Sequence[Tensor],  # [D, inputs] each, of the maps q, k and v
    convolutions: Sequence[ShortConv],  # that `fit` and for which `takes_rope`
    x: Tensor,  # [B, T, inputs]
    heads: int,  # H, of queries, and of keys, and of values
    frequencies: Tensor,  # [E/2]
) -> tuple[Tensor, Tensor, Tensor]:  # [B, H, T, E] each
    """Queries and keys after convolution and RoPE, and values.

    The channels of queries and keys are in another order, as the kernel wants a pair of RoPE side by side: the rows of
    their weights are put into this order. Head-wise filters need their channels side by side instead.
    """
    first = convolutions[0]
    turned = 0 if isinstance(first, HeadwiseDynamicConv) else 2  # maps whose channels change places

    def arrange(part: int, filters: Tensor) -> Tensor:
        return interleaved(filters, heads, -1) if part < turned else filters

    rows = [interleaved(weight, heads) if part < turned else weight for part, weight in enumerate(weights)]
    joined = _product(rows, convolutions, x)
    static = _static_filters(convolutions, arrange)
    if isinstance(first, LowRankDynamicConv):
        up = _bases(convolutions, arrange)
        q, k, v = lowrank_rotary_convolution(joined, up, static, frequencies, heads, first.residual, padded=True)
    elif isinstance(first, HeadwiseDynamicConv):
        own = (first.channels // first.heads, first.width, first.residual)
        q, k, v = headwise_rotary_convolution(joined, static, frequencies, heads, *own, halves=True)
    else:
        assert static is not None
        q, k, v = static_rotary_convolution(joined, static, frequencies, heads, first.residual)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _product(
    weights: Sequence[Tensor],  # [D, inputs] each
    convolutions: Sequence[ShortConv],
    x: Tensor,  # [B, T, inputs or more]
) -> Tensor:  # [B, T, P*D + columns of the generators + padding]
    """The outputs of the maps and of their generators, with zeros up to a whole cache line.

    The outputs of a low-rank generator are followed by zeros, too, as the kernels want them.
    Without the few columns of low-rank generators rows are long enough, and the kernels would not write the zeros.
    Zeros are appended by concatenation because its gradient is a view; that of padding would be a copy.
    """
    width = weights[0].shape[1]
    rows = list(weights)
    generators = [conv.generator_map.weight for conv in convolutions if conv.generator_map is not None]
    if generators:
        lowrank = isinstance(convolutions[0], LowRankDynamicConv)
        stacked = torch.stack(generators)  # torch.compile makes one kernel of at most eight parts side by side
        more = -stacked.shape[1] % _GENERATOR_MULTIPLE if lowrank else 0
        rows.append(_with_zeros(stacked, more, 1).flatten(0, 1))
        if lowrank:
            rows.append(weights[0].new_zeros(-sum(map(len, rows)) % _ROW_MULTIPLE, width))
    return F.linear(x, _with_zeros(torch.cat(rows), x.shape[-1] - width, 1))


def _with_zeros(tensor: Tensor, more: int, dim: int) -> Tensor:
    """The tensor with so many zeros after its own entries in one dimension."""
    if not more:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = more
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _as_they_are(_: int, filters: Tensor) -> Tensor:
    return filters


def _bases(convolutions: Sequence[ShortConv], arrange: Arrange) -> Tensor:  # [R, W*P*D]
    """The bases of low-rank filters, side by side."""
    lowrank = cast(Sequence[LowRankDynamicConv], convolutions)
    bases = [arrange(part, conv.up.unflatten(1, (conv.width, -1))) for part, conv in enumerate(lowrank)]
    return torch.cat(bases, -1).flatten(1)


def _static_filters(convolutions: Sequence[ShortConv], arrange: Arrange) -> Tensor | None:  # [W, P*D]
    """The static filters side by side, if there are any."""
    static = [arrange(n, conv.static_filter) for n, conv in enumerate(convolutions) if conv.static_filter is not None]
    return torch.cat(static, -1) if static else None
