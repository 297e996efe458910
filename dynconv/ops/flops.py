"""FLOP formulas of the operators for torch.utils.flop_counter, from the shapes of their arguments.

A multiply-add counts as two FLOPs. Legend: B batch, T time, D channels, H heads, W taps, R rank.
"""

from collections.abc import Sequence
from typing import Any

_Shape = Sequence[int]


def _products(x: _Shape, z: _Shape | None, weight: _Shape | None, static_w: _Shape | None) -> tuple[int, int]:
    """(FLOPs of applying the filters to x, FLOPs of the product z U that computes low-rank filters)."""
    if z is not None:
        assert weight is not None  # [R, W*D]
        convolution = 2 * x[0] * x[1] * weight[1]
        return convolution, convolution * weight[0]
    shape = static_w if weight is None else weight  # [W, D] or [B, T, H, W]
    assert shape is not None
    return 2 * x[0] * x[1] * x[2] * (shape[0] if weight is None else shape[3]), 0


def forward(x: _Shape, z: _Shape | None, weight: _Shape | None, static_w: _Shape | None, *_: Any, **__: Any) -> int:
    """FLOPs of the forward pass: computing the filters and applying them."""
    return sum(_products(x, z, weight, static_w))


def backward(
    dy: _Shape,  # noqa: ARG001 - has x's shape
    x: _Shape,
    z: _Shape | None,
    weight: _Shape | None,
    static_w: _Shape | None,
    positions: _Shape | None,  # noqa: ARG001
    segments: Sequence[int],  # noqa: ARG001
    residual: bool,  # noqa: ARG001
    silu: bool,
    needs: Sequence[bool],  # whether x, z, weight and static_w want gradients
    **_: Any,
) -> int:
    """FLOPs of the backward pass.

    As many FLOPs as a convolution take: dx, the gradient of the filters, and, with silu, recomputing silu's input.
    As many FLOPs as the product z U take: recomputing the filters, dz and dU.
    """
    convolution, filters = _products(x, z, weight, static_w)
    convolutions = needs[0] + any(needs[1:]) + silu
    return convolution * convolutions + filters * ((needs[0] or silu) + needs[1] + needs[2])
