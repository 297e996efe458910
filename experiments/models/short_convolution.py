"""Linear maps that a short convolution may follow.

Shapes: B batch, T time.
"""

from collections.abc import Sequence
from functools import partial, singledispatch
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynconv import headwise_dynamic_convolution, lowrank_dynamic_convolution, static_convolution
from dynconv.layers import HeadwiseDynamicConv, LowRankDynamicConv, StaticShortConv, project_together
from experiments.design.model import ModelConfig
from experiments.models import fused
from experiments.models.fused import ShortConv
from experiments.models.packing import Documents, apart
from experiments.parts.base import LinearMap, Part
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
    """A linear map and, if the configuration names its site, a convolution."""

    def __init__(self, shape: LinearMap, conv: Convolution, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(shape.inputs, shape.outputs, bias=False)
        self.conv = build(conv, conv.widths(shape, width))

    def forward(
        self,
        x: Tensor,  # [B, T, inputs]
        generator_input: Tensor,  # [B, T, G]
        documents: Documents | None,
    ) -> Tensor:  # [B, T, outputs]
        y: Tensor = self.linear(x)
        return y if self.conv is None else apart(self.conv, documents, y, generator_input)

    def padded_weight(self) -> Tensor:  # [outputs or more, inputs]
        """The weight, with rows of zeros up to a number of channels for which the convolution's kernels are fast."""
        weight = self.linear.weight
        more = -len(weight) % _CHANNEL_MULTIPLE if isinstance(self.conv, LowRankDynamicConv) else 0
        return F.pad(weight, (0, 0, 0, more)) if more else weight

    def convolve(
        self,
        y: Tensor,  # [B, T, outputs or more], the product of x and `padded_weight`
        generated: Tensor | None,  # [B, T, columns]: the generator's output; None if there is no generator
        documents: Documents | None,
    ) -> Tensor:  # [B, T, outputs]
        if self.conv is None:
            return y
        conv = cast(ShortConv, self.conv)
        if y.shape[-1] == self.linear.out_features:
            return apart(partial(_from_generated, conv), documents, y, generated)
        return apart(partial(_convolve_together, [conv], [y.shape[-1]]), documents, y, generated)[..., : conv.channels]


class Outputs(NamedTuple):
    """The outputs of several maps."""

    apart: list[Tensor]  # [B, T, outputs] each
    joined: Tensor | None = None  # [B, T, their sum or more]: the same side by side, each perhaps with padding


class Maps(nn.ModuleDict):
    """The linear maps of a part by site. The module of every part has them as `self.maps`."""

    def __init__(self, part: Part, model: ModelConfig) -> None:
        conv, none = model.conv, NoConvolution()
        shapes = part.linear_maps(model.width)
        super().__init__(
            {s: ConvLinear(shape, conv if s in conv.sites else none, model.width) for s, shape in shapes.items()}
        )
        self._mismatched = conv.sequence_group > 1
        self.in_one_product = False  # all of them, even if their input is wide
        self.fused = False  # convolutions are computed together with their neighbours, where they fit
        self.reads_part_input = conv.reads_part_input

    def apply_to(
        self,
        x: Tensor,  # [B, T, inputs]
        sites: Sequence[str],
        part_input: Tensor,  # [B, T, D]: the normed input of the part, from which generators may have to read
        documents: Documents | None = None,
    ) -> list[Tensor]:  # [B, T, outputs] each
        """The outputs of several maps of one input."""
        return self.outputs(x, sites, part_input, documents).apart

    def outputs(
        self,
        x: Tensor,  # [B, T, inputs]
        sites: Sequence[str],
        part_input: Tensor,  # [B, T, D]
        documents: Documents | None = None,
    ) -> Outputs:
        """The outputs of several maps of one input, perhaps side by side in one tensor.

        On a GPU, maps of a narrow input share one matrix product, to save launches. If the input is wide, only the
        generators of all convolutions are computed in the product of the first map that has one.
        """
        maps = {site: cast(ConvLinear, self[site]) for site in sites}
        read = part_input if self.reads_part_input else x  # by the generators
        if documents is None and self.fits(sites, read is x):
            return Outputs(list(fused.convolved(*self.weights_and_convolutions(sites), x)))
        if not _shares_products(x):
            read = partners(read) if self._mismatched else read
            return Outputs([linear(x, read, documents) for linear in maps.values()])
        dynamic = {s: m.conv for s, m in maps.items() if isinstance(m.conv, HeadwiseDynamicConv | LowRankDynamicConv)}
        joined = dynamic if read is x else {}  # whose generators are part of the product
        narrow = x.shape[-1] <= ONE_PRODUCT_WIDTH or self.in_one_product
        sharing = list(maps) if narrow else list(joined)[:1]
        weights = [maps[site].padded_weight() for site in sharing]
        widths = [len(weight) for weight in weights]
        products: dict[str, Tensor] = {}
        generated = {site: conv.generator_map(read) for site, conv in dynamic.items() if site not in joined}
        if sharing:
            weight = weights[0] if len(weights) == 1 else torch.cat(weights)
            y, *columns = project_together(weight, list(joined.values()), x) if joined else [F.linear(x, weight)]
            products = dict(zip(sharing, y.split(widths, -1), strict=True))
            generated |= dict(zip(joined, columns, strict=True))
        if self._mismatched:
            generated = {site: partners(made) for site, made in generated.items()}  # A generator maps token by token.
        convolved = {site: cast(ShortConv, linear.conv) for site, linear in maps.items() if linear.conv is not None}
        if sharing == list(maps) and not convolved:
            return Outputs(list(products.values()), y)
        if sharing == list(convolved) and _fit_one_launch(list(convolved.values()), widths):
            columns = [generated[site] for site in dynamic]
            generators = torch.cat(columns, -1) if columns else None
            together = partial(_convolve_together, list(convolved.values()), widths)
            y = apart(together, documents, y, generators)
            parts = zip(convolved.values(), y.split(widths, -1), strict=True)
            return Outputs([part[..., : conv.channels] for conv, part in parts], y)
        for site, linear in maps.items():
            if site not in products:
                products[site] = F.linear(x, linear.padded_weight())
        each = [linear.convolve(products[site], generated.get(site), documents) for site, linear in maps.items()]
        return Outputs(each)

    def add_to(
        self,
        stream: Tensor,  # [B, T, outputs]
        x: Tensor,  # [B, T, inputs or more], those beyond `inputs` being zeros
        site: str,
        part_input: Tensor,  # [B, T, D]
        documents: Documents | None = None,
    ) -> Tensor:  # [B, T, outputs]
        """The sum of the residual stream and the output of a map."""
        if documents is None and self.fits((site,), not self.reads_part_input):
            return fused.convolved(*self.weights_and_convolutions((site,)), x, stream)[0]
        return stream + self.apply_to(x, (site,), part_input, documents)[0]

    def fits(self, sites: Sequence[str], reads_input: bool = True) -> bool:
        """Whether the convolutions of these sites are computed in one kernel with their neighbours.

        `reads_input` says whether their generators read the input of the maps.
        """
        convolutions = [cast(ConvLinear, self[site]).conv for site in sites]
        return self.fused and reads_input and not self._mismatched and fused.fit(convolutions)

    def takes_swiglu(self, sites: Sequence[str]) -> bool:
        """Whether SwiGLU is part of the kernel of these sites' convolutions."""
        convolutions = [cast(ConvLinear, self[site]).conv for site in sites]
        return self.fused and not self._mismatched and fused.takes_swiglu(convolutions)

    def takes_rope(self, sites: Sequence[str], head_size: int) -> bool:
        """Whether RoPE on heads of so many channels is part of the kernel of these sites' convolutions."""
        return self.fits(sites) and fused.takes_rope(self.weights_and_convolutions(sites)[1], head_size)

    def weights_and_convolutions(self, sites: Sequence[str]) -> tuple[list[Tensor], list[ShortConv]]:
        """What the functions of `fused` take first. The sites must have convolutions."""
        linears = [cast(ConvLinear, self[site]) for site in sites]
        return [one.linear.weight for one in linears], [cast(ShortConv, one.conv) for one in linears]

    def decode(
        self,
        x: Tensor,  # [B, T, inputs]
        sites: Sequence[str],
        part_input: Tensor,  # [B, T, D]
        state: dict[str, Tensor],  # of each site with a convolution, the inputs before those of x; updated in place
    ) -> list[Tensor]:  # [B, T, outputs] each
        """As `apply_to`, for inputs that continue a sequence. An empty `state` begins one."""
        read = part_input if self.reads_part_input else x  # by the generators
        outputs = []
        for site in sites:
            linear = cast(ConvLinear, self[site])
            y = linear.linear(x)
            if linear.conv is not None:
                y, state[site] = cast(Any, linear.conv).prefill(y, read, state.get(site))
            outputs.append(y)
        return outputs


class InputConvolution(nn.Module):
    """A convolution on the normed input of a part, which its generator reads, too."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.conv = build(model.conv, LinearMap(model.width, model.width))
        self.mismatched = model.conv.sequence_group > 1

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        documents: Documents | None = None,
    ) -> Tensor:  # [B, T, D]
        assert self.conv is not None
        return apart(self.conv, documents, x, partners(x) if self.mismatched else x)

    def decode(
        self,
        x: Tensor,  # [B, T, D]
        state: dict[str, Tensor],
    ) -> Tensor:  # [B, T, D]
        y, state["input"] = cast(Any, self.conv).prefill(x, x, state.get("input"))
        return cast(Tensor, y)


def partners(
    x: Tensor,  # [B, ...] with B even
) -> Tensor:  # [B, ...]
    """In place of each sequence the other one of its pair: sequences 2i and 2i + 1 change places."""
    return x.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)


def _fit_one_launch(convolutions: Sequence[ShortConv], widths: Sequence[int]) -> bool:
    """Whether one launch can compute these convolutions, `widths` channels each: they must be alike but for those."""
    lowrank = any(isinstance(convolution, LowRankDynamicConv) for convolution in convolutions)
    fitting = not (lowrank and any(width % _SEGMENT_MULTIPLE for width in widths))
    kinds = [fused.settings(convolution) for convolution in convolutions]
    return len(convolutions) > 1 and fitting and all(kind == kinds[0] for kind in kinds)


def _convolve_together(
    convolutions: Sequence[ShortConv],  # equal in all settings but their channels
    widths: Sequence[int],  # channels of each in y, including padding
    y: Tensor,  # [B, T, sum of widths]
    generated: Tensor | None,  # [B, T, columns of all generators]; None for static convolutions
    cu_seqlens: Tensor | None = None,
) -> Tensor:  # as y
    """Apply several convolutions in one launch. Padding channels of y get zero filters."""
    first = convolutions[0]
    padding = [width - convolution.channels for convolution, width in zip(convolutions, widths, strict=True)]
    filters = [c.static_filter for c in convolutions if c.static_filter is not None]
    static = torch.cat([F.pad(f, (0, more)) for f, more in zip(filters, padding, strict=True)], 1) if filters else None
    options: dict[str, Any] = {
        "residual": first.residual,
        "activation": first.activation,
        "cu_seqlens": cu_seqlens,
    }
    if isinstance(first, LowRankDynamicConv):
        assert generated is not None
        lowrank = cast(Sequence[LowRankDynamicConv], convolutions)
        bases = [c.up.unflatten(1, (c.width, -1)) for c in lowrank]  # [R, W, channels] each
        up = torch.cat([F.pad(base, (0, more)) for base, more in zip(bases, padding, strict=True)], 2).flatten(1)
        return lowrank_dynamic_convolution(y, generated, up, static, segments=tuple(widths), **options)
    if isinstance(first, HeadwiseDynamicConv):
        assert generated is not None
        return headwise_dynamic_convolution(y, generated.unflatten(2, (-1, first.width)), static, **options)
    assert static is not None
    return static_convolution(y, static, **options)


def _from_generated(conv: ShortConv, y: Tensor, generated: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    return cast(Tensor, conv(y, generated=generated, cu_seqlens=cu_seqlens))


@singledispatch
def build(conv: Convolution, shape: LinearMap) -> nn.Module | None:  # noqa: ARG001
    """The module of a convolution on the outputs of a linear map."""
    raise TypeError(f"no module is known for {type(conv).__name__}")


@build.register
def _(conv: NoConvolution, shape: LinearMap) -> None:  # noqa: ARG001
    return None


@build.register
def _(conv: StaticConvolution, shape: LinearMap) -> nn.Module:
    module = StaticShortConv(shape.outputs, conv.width, conv.residual, activation=conv.activation)
    return _static_filter_initialised(module, conv)


@build.register
def _(conv: HeadwiseConvolution, shape: LinearMap) -> nn.Module:
    assert conv.head_size is not None
    settings = (conv.width, conv.head_size, conv.residual, conv.static_filter)
    module = HeadwiseDynamicConv(shape.outputs, shape.inputs, *settings, activation=conv.activation)
    if conv.generator_init == "linear":
        nn.init.uniform_(module.generator.weight, -(shape.inputs**-0.5), shape.inputs**-0.5)
    return _static_filter_initialised(module, conv)


@build.register
def _(conv: LowRankConvolution, shape: LinearMap) -> nn.Module:
    assert conv.rank is not None
    settings = (conv.width, conv.rank, conv.residual, conv.static_filter)
    module = LowRankDynamicConv(shape.outputs, shape.inputs, *settings, activation=conv.activation)
    if conv.generator_init == "linear":
        nn.init.uniform_(module.up, -(conv.rank**-0.5), conv.rank**-0.5)
    return _static_filter_initialised(module, conv)


def _static_filter_initialised(
    module: StaticShortConv | HeadwiseDynamicConv | LowRankDynamicConv,
    conv: StaticConvolution | HeadwiseConvolution | LowRankConvolution,
) -> nn.Module:
    """The module, whose static filter already has the uniform distribution, with the initial filter that is wanted."""
    if conv.static_init == "zero" and module.static_filter is not None:
        nn.init.zeros_(module.static_filter)
    return module


def _shares_products(x: Tensor) -> bool:
    """Whether generators are computed in one product with a map: only on a GPU.

    On a CPU it would change the order of sums, and so the last bits of losses, which are reproduced bit for bit there.
    """
    return x.is_cuda
