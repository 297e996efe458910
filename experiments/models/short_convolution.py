"""Linear maps that a short convolution may follow.

Shapes: B batch, T time.
"""

from collections.abc import Mapping, Sequence
from functools import singledispatch

from torch import Tensor, nn

from dynconv.layers import HeadwiseDynamicConv, LowRankDynamicConv, StaticShortConv, project_together
from experiments.parts.base import LinearMap
from experiments.parts.short_convolution import (
    Convolution,
    HeadwiseConvolution,
    LowRankConvolution,
    NoConvolution,
    StaticConvolution,
)


class ConvLinear(nn.Module):
    """A linear map and, if the configuration names its site, a convolution whose generator reads the map's input."""

    def __init__(self, shape: LinearMap, conv: Convolution) -> None:
        super().__init__()
        self.linear = nn.Linear(shape.inputs, shape.outputs, bias=False)
        self.conv = build(conv, shape)

    def forward(
        self,
        x: Tensor,  # [B, T, inputs]
    ) -> Tensor:  # [B, T, outputs]
        return self.convolve(self.linear(x), x)

    def convolve(
        self,
        y: Tensor,  # [B, T, outputs]: linear(x)
        x: Tensor,  # [B, T, inputs]
        generated: Tensor | None = None,  # [B, T, columns]: the generator's output for x, if computed already
    ) -> Tensor:  # [B, T, outputs]
        return y if self.conv is None else self.conv(y, x, generated=generated)


class Maps(nn.ModuleDict):
    """The linear maps of a part by site. The module of every part has them as `self.maps`."""

    def __init__(self, shapes: Mapping[str, LinearMap], conv: Convolution) -> None:
        none = NoConvolution()
        super().__init__({s: ConvLinear(shape, conv if s in conv.sites else none) for s, shape in shapes.items()})

    def apply_to(
        self,
        x: Tensor,  # [B, T, inputs]
        sites: Sequence[str],
    ) -> list[Tensor]:  # [B, T, outputs] each
        """The outputs of several maps of one input.

        On a GPU one matrix product computes all generators together with the first map that has one, to save launches.
        """
        maps: dict[str, ConvLinear] = {site: self[site] for site in sites}  # type: ignore[misc]  # all are ConvLinear
        dynamic = {s: m for s, m in maps.items() if isinstance(m.conv, HeadwiseDynamicConv | LowRankDynamicConv)}
        if not dynamic or not _shares_products(x):
            return [linear(x) for linear in maps.values()]
        first = next(iter(dynamic))
        y, *made = project_together(dynamic[first].linear.weight, [m.conv for m in dynamic.values()], x)  # type: ignore[misc]
        generated = dict(zip(dynamic, made, strict=True))
        return [m.convolve(y if s == first else m.linear(x), x, generated.get(s)) for s, m in maps.items()]


@singledispatch
def build(conv: Convolution, shape: LinearMap) -> nn.Module | None:  # noqa: ARG001
    """The module of a convolution on the outputs of a linear map."""
    raise TypeError(f"no module is known for {type(conv).__name__}")


@build.register
def _(conv: NoConvolution, shape: LinearMap) -> None:  # noqa: ARG001
    return None


@build.register
def _(conv: StaticConvolution, shape: LinearMap) -> nn.Module:
    return StaticShortConv(shape.outputs, conv.width, conv.residual)


@build.register
def _(conv: HeadwiseConvolution, shape: LinearMap) -> nn.Module:
    assert conv.head_size is not None
    return HeadwiseDynamicConv(
        shape.outputs, shape.inputs, conv.width, conv.head_size, conv.residual, conv.static_filter
    )


@build.register
def _(conv: LowRankConvolution, shape: LinearMap) -> nn.Module:
    assert conv.rank is not None
    return LowRankDynamicConv(shape.outputs, shape.inputs, conv.width, conv.rank, conv.residual, conv.static_filter)


def _shares_products(x: Tensor) -> bool:
    """Whether generators are computed in one product with a map: only on a GPU.

    On a CPU it would change the order of sums, and so the last bits of losses, which are reproduced bit for bit there.
    """
    return x.is_cuda
