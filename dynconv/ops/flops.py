"""What torch.utils.flop_counter counts of the operators, from the shapes of their arguments.

A multiply-add counts as two. Legend: B batch, T time, D channels, H heads, W taps, R rank.
"""

from collections.abc import Sequence
from typing import Any

_Shape = Sequence[int]


def _products(x: _Shape, z: _Shape | None, weight: _Shape | None, static_w: _Shape | None) -> tuple[int, int]:
    """Of the convolution, and of the low-rank convolution's filters z U."""
    if z is not None:
        assert weight is not None  # [R, W*D]
        convolution = 2 * x[0] * x[1] * weight[1]
        return convolution, convolution * weight[0]
    shape = static_w if weight is None else weight  # [W, D] or [B, T, H, W]
    assert shape is not None
    return 2 * x[0] * x[1] * x[2] * (shape[0] if weight is None else shape[3]), 0


def forward(x: _Shape, z: _Shape | None, weight: _Shape | None, static_w: _Shape | None, *_: Any, **__: Any) -> int:
    """The filters, and their product with the inputs."""
    return sum(_products(x, z, weight, static_w))


def backward(
    dy: _Shape,  # noqa: ARG001 - x's
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
    """Convolutions for dx, for the filters' gradient and for what silu is applied to; the filters again, dz and dU."""
    convolution, filters = _products(x, z, weight, static_w)
    convolutions = needs[0] + any(needs[1:]) + silu
    return convolution * convolutions + filters * ((needs[0] or silu) + needs[1] + needs[2])
