"""Convolutions computed in one kernel with their neighbours, where `Execution.fused` asks for it.

The values differ from those of the separate kernels only by rounding, so this is no part of a run's id.

Shapes: B batch, T time, D channels of the queries, H heads, E head size.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dynconv.layers import LowRankDynamicConv
from dynconv.ops import interleaved, lowrank_rotary_convolution
from experiments.models.short_convolution import ConvLinear, Maps, fit_one_launch

_QKV = ("q", "k", "v")
_MAX_WIDTH, _MAX_RANK = 4, 16  # of filters in the fused kernels
_ROW_MULTIPLE = 64  # 16-bit values in a cache line, where each token's row should start


def rotates_convolutions(maps: Maps) -> bool:
    """Whether the convolutions of the sites q, k and v can be computed together with RoPE.

    They must be low-rank and alike, without an activation, read their own sequence, and be of a size that the kernels
    take: composed of other kernels, the same would be slower than what the separate modules do.
    """
    convolutions = [cast(ConvLinear, maps[site]).conv for site in _QKV]
    lowrank = [conv for conv in convolutions if isinstance(conv, LowRankDynamicConv)]
    if len(lowrank) < len(_QKV) or maps.mismatched or lowrank[0].activation is not None:
        return False
    sizes = [conv.channels for conv in lowrank]
    supported = len(set(sizes)) == 1 and lowrank[0].width <= _MAX_WIDTH and len(lowrank[0].up) <= _MAX_RANK
    return supported and fit_one_launch(lowrank, sizes)


def rotated(
    maps: Maps,  # for which `rotates_convolutions`
    x: Tensor,  # [B, T, inputs]
    heads: int,  # H, of queries, and of keys, and of values
    frequencies: Tensor,  # [E/2]
) -> tuple[Tensor, Tensor, Tensor]:  # [B, H, T, E] each
    """Queries and keys after convolution and RoPE, with their channels in another order, and values.

    One product computes all three and their generators' outputs. Its weight has the channels of a pair side by side, as
    the kernel wants them.
    """
    linears = [cast(ConvLinear, maps[site]) for site in _QKV]
    convolutions = [cast(LowRankDynamicConv, linear.conv) for linear in linears]

    def joined(parts: list[Tensor]) -> Tensor:
        """The tensors of q, k and v with channels as last dimension, side by side."""
        q, k = (interleaved(part, heads, -1) for part in parts[:2])
        return torch.cat([q, k, parts[2]], -1)

    weights = [*(interleaved(linear.linear.weight, heads) for linear in linears[:2]), linears[2].linear.weight]
    weights += [conv.down.weight for conv in convolutions]
    padding = -sum(len(weight) for weight in weights) % _ROW_MULTIPLE
    products = F.linear(x, torch.cat([*weights, weights[0].new_zeros(padding, x.shape[-1])]))
    up = joined([conv.up.unflatten(1, (conv.width, -1)) for conv in convolutions]).flatten(1)
    filters = [conv.static_filter for conv in convolutions if conv.static_filter is not None]
    static = joined(cast(list[Tensor], filters)) if filters else None
    residual = convolutions[0].residual
    q, k, v = lowrank_rotary_convolution(products, up, static, frequencies, heads, residual)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
