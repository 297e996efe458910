"""Linear maps that a short convolution may follow.

Shapes: B batch, T time.
"""

from collections.abc import Mapping, Sequence
from functools import singledispatch
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynconv import lowrank_dynamic_convolution
from dynconv.layers import HeadwiseDynamicConv, LowRankDynamicConv, StaticShortConv, project_together
from experiments.parts.base import LinearMap
from experiments.parts.short_convolution import (
    Convolution,
    HeadwiseConvolution,
    LowRankConvolution,
    NoConvolution,
    StaticConvolution,
)

ONE_PRODUCT_WIDTH = 512  # maps of wider inputs share no product: it costs a 2B model 1% more time and 4 GiB
# Channels must be a multiple of the first for the low-rank kernels on tensor cores (others take ten times as long), and
# of the second for one launch that takes several maps.
_CHANNEL_MULTIPLE = 16
_SEGMENT_MULTIPLE = 128


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

    def padded_weight(self) -> Tensor:  # [outputs or more, inputs]
        """The weight, with rows of zeros up to a number of channels for which the convolution's kernels are fast."""
        weight = self.linear.weight
        more = -len(weight) % _CHANNEL_MULTIPLE if isinstance(self.conv, LowRankDynamicConv) else 0
        return F.pad(weight, (0, 0, 0, more)) if more else weight

    def convolve(
        self,
        y: Tensor,  # [B, T, outputs]: linear(x), or [B, T, outputs or more], the product of x and `padded_weight`
        x: Tensor,  # [B, T, inputs]
        generated: Tensor | None = None,  # [B, T, columns]: the generator's output for x, if computed already
    ) -> Tensor:  # [B, T, outputs]
        if self.conv is None:
            return y
        if y.shape[-1] == self.linear.out_features:
            return cast(Tensor, self.conv(y, x, generated=generated))
        assert isinstance(self.conv, LowRankDynamicConv)
        assert generated is not None
        return _convolve_together([self.conv], y, generated, [y.shape[-1]])[0]


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

        On a GPU, maps of a narrow input share one matrix product, to save launches. If the input is wide, only the
        generators of all convolutions are computed in the product of the first map that has one.
        """
        maps = {site: cast(ConvLinear, self[site]) for site in sites}
        if not _shares_products(x):
            return [linear(x) for linear in maps.values()]
        dynamic = {s: m.conv for s, m in maps.items() if isinstance(m.conv, HeadwiseDynamicConv | LowRankDynamicConv)}
        sharing = list(maps) if x.shape[-1] <= ONE_PRODUCT_WIDTH else list(dynamic)[:1]
        products: dict[str, Tensor] = {}
        generated: dict[str, Tensor] = {}
        if sharing:
            weights = [maps[site].padded_weight() for site in sharing]
            widths = [len(weight) for weight in weights]
            weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            y, *columns = project_together(weight, list(dynamic.values()), x)
            if sharing == list(dynamic) and _fit_one_launch(list(dynamic.values()), widths):
                convolutions = cast(list[LowRankDynamicConv], list(dynamic.values()))
                return _convolve_together(convolutions, y, torch.cat(columns, -1), widths)
            products = dict(zip(sharing, y.split(widths, -1), strict=True))
            generated = dict(zip(dynamic, columns, strict=True))
        for site, linear in maps.items():
            if site not in products:
                products[site] = F.linear(x, linear.padded_weight())
        return [linear.convolve(products[site], x, generated.get(site)) for site, linear in maps.items()]

    def decode(
        self,
        x: Tensor,  # [B, T, inputs]
        sites: Sequence[str],
        state: dict[str, Tensor],  # of each site with a convolution, the inputs before those of x; updated in place
    ) -> list[Tensor]:  # [B, T, outputs] each
        """As `apply_to`, for inputs that continue a sequence. An empty `state` begins one."""
        outputs = []
        for site in sites:
            linear = cast(ConvLinear, self[site])
            y = linear.linear(x)
            if linear.conv is not None:
                y, state[site] = cast(Any, linear.conv).prefill(y, x, state.get(site))
            outputs.append(y)
        return outputs


def _fit_one_launch(convolutions: Sequence[nn.Module], widths: Sequence[int]) -> bool:
    """Whether one launch of the low-rank kernels can compute these convolutions, `widths` channels each."""
    lowrank = [c for c in convolutions if isinstance(c, LowRankDynamicConv)]
    kinds = [(len(c.up), c.width, c.residual, c.static_filter is None, c.activation) for c in lowrank]
    alike = len(lowrank) == len(convolutions) and all(kind == kinds[0] for kind in kinds)
    return len(convolutions) > 1 and alike and not any(width % _SEGMENT_MULTIPLE for width in widths)


def _convolve_together(
    convolutions: Sequence[LowRankDynamicConv],  # equal in all settings but their channels
    y: Tensor,  # [B, T, sum of widths]
    generated: Tensor,  # [B, T, columns of all generators]
    widths: Sequence[int],  # channels of each in y, including padding
) -> list[Tensor]:  # [B, T, channels] each
    """Apply several convolutions in one launch. Padding channels of y get zero filters, and are removed."""
    first = convolutions[0]
    ups, filters = [], []
    for convolution, width in zip(convolutions, widths, strict=True):
        more = width - convolution.channels
        ups.append(F.pad(convolution.up.unflatten(1, (convolution.width, -1)), (0, more)))  # [R, W, width]
        if convolution.static_filter is not None:
            filters.append(F.pad(convolution.static_filter, (0, more)))
    up, static = torch.cat(ups, 2).flatten(1), torch.cat(filters, 1) if filters else None
    y = lowrank_dynamic_convolution(
        y, generated, up, static, first.residual, activation=first.activation, segments=tuple(widths)
    )
    return [part[..., : c.channels] for c, part in zip(convolutions, y.split(widths, -1), strict=True)]


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
