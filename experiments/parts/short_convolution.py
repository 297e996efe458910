"""Short convolutions after the linear maps of other parts (arXiv 2606.03825, section 2), one class for each kind.

The generator of a dynamic filter reads the input of the linear map that the convolution follows.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from experiments.parts.base import Fact, LinearMap, Shape


class Convolution(ABC):
    """What the models and the counts ask of any kind."""

    kind: ClassVar[str]
    sites: tuple[str, ...]  # names of the linear maps that one follows

    def fitted(self, shape: Shape, maps: Mapping[str, LinearMap]) -> Self:  # noqa: ARG002
        """With what is left open taken from the shape. Raises ValueError where `maps`, by site, do not fit."""
        return self

    @abstractmethod
    def parameters(self, site: LinearMap) -> int:
        """Of one convolution after the linear map `site`."""

    @abstractmethod
    def forward_flops(self, site: LinearMap) -> dict[str, int]:
        """FLOPs for one token: "generator", the products that make its filter, and "convolution", applying it."""

    @abstractmethod
    def facts(self, sites: Iterable[str]) -> dict[str, Fact]:
        """The settings that a table may group by; `sites` are all linear maps of the model."""


@dataclass(frozen=True)
class NoConvolution(Convolution):
    """The plain model."""

    kind = "none"
    sites = ()

    def parameters(self, site: LinearMap) -> int:  # noqa: ARG002
        return 0

    def forward_flops(self, site: LinearMap) -> dict[str, int]:  # noqa: ARG002
        return {}

    def facts(self, sites: Iterable[str]) -> dict[str, Fact]:  # noqa: ARG002
        return {}


@dataclass(frozen=True)
class _PlacedConvolution(Convolution):
    sites: tuple[str, ...]
    width: int = 4  # taps; tap 0 is the current token
    residual: bool = True  # y + conv(y) instead of conv(y)

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("sites is empty; name some of the model's linear maps")
        if len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites must name each once; got {list(self.sites)}; remove the second")
        if self.width < 1:
            raise ValueError(f"width must be at least 1; got {self.width}")

    def fitted(self, shape: Shape, maps: Mapping[str, LinearMap]) -> Self:  # noqa: ARG002
        # In the model's order, so that ["v", "k"] and ["k", "v"], which are one model, have one run id.
        return replace(self, sites=tuple(site for site in maps if site in self.sites))

    def facts(self, sites: Iterable[str]) -> dict[str, Fact]:
        return {"sites": sites_name(self.sites, sites), "width": self.width, "residual": self.residual}


@dataclass(frozen=True)
class StaticConvolution(_PlacedConvolution):
    """A filter for each channel, the same at every token."""

    kind = "static"

    def parameters(self, site: LinearMap) -> int:
        return self.width * site.outputs

    def forward_flops(self, site: LinearMap) -> dict[str, int]:
        return {"generator": 0, "convolution": 2 * self.width * site.outputs}


@dataclass(frozen=True)
class _DynamicConvolution(_PlacedConvolution):
    static_filter: bool = True  # a filter for each channel beside the one that the token makes

    def parameters(self, site: LinearMap) -> int:
        return self._generator(site) + (self.width * site.outputs if self.static_filter else 0)

    def forward_flops(self, site: LinearMap) -> dict[str, int]:
        """Each parameter of the generator is one multiply-add; adding the static filter is one FLOP a tap."""
        applying = (3 if self.static_filter else 2) * self.width * site.outputs
        return {"generator": 2 * self._generator(site), "convolution": applying}

    @abstractmethod
    def _generator(self, site: LinearMap) -> int:
        """Parameters of what makes the filter."""

    def facts(self, sites: Iterable[str]) -> dict[str, Fact]:
        return {**super().facts(sites), "static_filter": self.static_filter}


@dataclass(frozen=True)
class HeadwiseConvolution(_DynamicConvolution):
    """Consecutive channels share a filter, which one projection of the input makes."""

    kind = "headwise"

    head_size: int | None = None  # channels that share a filter; the rung's where none is given

    def fitted(self, shape: Shape, maps: Mapping[str, LinearMap]) -> Self:
        head_size = shape.head_size if self.head_size is None else self.head_size
        for site in self.sites:
            if head_size < 1 or maps[site].outputs % head_size:
                raise ValueError(
                    f"head_size must divide the {maps[site].outputs} channels of {site!r}; got {head_size}"
                )
        return replace(super().fitted(shape, maps), head_size=head_size)

    def _generator(self, site: LinearMap) -> int:
        assert self.head_size is not None, "fitted() comes first"
        return site.inputs * self.width * (site.outputs // self.head_size)

    def facts(self, sites: Iterable[str]) -> dict[str, Fact]:
        assert self.head_size is not None, "fitted() comes first"
        return {**super().facts(sites), "head_size": self.head_size}


@dataclass(frozen=True)
class LowRankConvolution(_DynamicConvolution):
    """A filter for each channel, made by a projection of the input through a few ranks."""

    kind = "lowrank"

    rank: int | None = None  # the rung's where none is given

    def fitted(self, shape: Shape, maps: Mapping[str, LinearMap]) -> Self:
        rank = shape.rank if self.rank is None else self.rank
        if rank < 1:
            raise ValueError(f"rank must be at least 1; got {rank}")
        return replace(super().fitted(shape, maps), rank=rank)

    def _generator(self, site: LinearMap) -> int:
        assert self.rank is not None, "fitted() comes first"
        return self.rank * (site.inputs + self.width * site.outputs)

    def facts(self, sites: Iterable[str]) -> dict[str, Fact]:
        assert self.rank is not None, "fitted() comes first"
        return {**super().facts(sites), "rank": self.rank}


def sites_name(chosen: Iterable[str], sites: Iterable[str]) -> str:
    """Where the convolutions are, in one word: "qkv", "all-linear", "q+gate"; in the order of the model's sites."""
    sites, chosen = list(sites), set(chosen)
    if chosen == set(sites):
        return "all-linear"
    named = [site for site in sites if site in chosen]
    return ("" if all(len(site) == 1 for site in named) else "+").join(named)
