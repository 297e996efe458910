"""Short convolutions on the outputs of linear maps (arXiv 2606.03825, section 2), one class for each kind.

A convolution may also stand on the normed input of a part, before its linear maps, as two of the four sites of Canon
layers do (arXiv 2512.17351): such a site is described as a linear map from the input to itself.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, Self

from experiments.parts.base import INPUT_SITES, Fact, LinearMap, Shape


class Convolution(ABC):
    """The interface of every kind, as models and counts use it."""

    kind: ClassVar[str]
    sites: tuple[str, ...]  # names of the linear maps that a convolution follows, or of INPUT_SITES

    @property
    def sequence_group(self) -> int:
        """How many neighbouring sequences of a batch read one another: 1 if each is processed by itself."""
        return 1

    @property
    def reads_part_input(self) -> bool:
        """Whether generators read the normed input of the part, and not the input of the linear map they belong to."""
        return False

    def fitted(self, shape: Shape, maps: Mapping[str, LinearMap]) -> Self:  # noqa: ARG002
        """The same, with settings that are None taken from the shape.

        `maps` are all sites of a layer. Raises ValueError if a setting does not fit them.
        """
        return self

    def widths(self, site: LinearMap, width: int) -> LinearMap:  # noqa: ARG002
        """The channels that the generator reads, and those that are convolved; `width` is that of the model."""
        return site

    @abstractmethod
    def parameters(self, site: LinearMap) -> int:
        """Parameters of one convolution; `site` is what `widths` gives."""

    @abstractmethod
    def forward_flops(self, site: LinearMap) -> dict[str, int]:
        """FLOPs for one token, by operation: "generator" makes the filter, "convolution" applies it."""

    @abstractmethod
    def facts(self, sites: Iterable[str]) -> dict[str, Fact]:
        """The settings that a table may group by. `sites` names all sites of a layer."""


@dataclass(frozen=True)
class NoConvolution(Convolution):
    """No convolution at any site."""

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
    """The settings that all kinds but "none" share."""

    sites: tuple[str, ...]
    width: int = 4  # taps; tap 0 is the current token
    residual: bool = True  # the output is y + conv(y) instead of conv(y)
    activation: Literal["silu"] | None = field(default=None, kw_only=True)  # of conv(y), before y is added
    # Initial static filters: uniform on +-1/sqrt(width), as in the paper and in nn.Conv1d, or zero.
    static_init: Literal["uniform", "zero"] = field(default="uniform", kw_only=True)

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("sites is empty; name some of the model's linear maps")
        if len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites must name each linear map once; got {list(self.sites)}; remove the repetition")
        if self.width < 1:
            raise ValueError(f"width must be at least 1; got {self.width}; raise it")

    def fitted(self, shape: Shape, maps: Mapping[str, LinearMap]) -> Self:  # noqa: ARG002
        # Sites take the order of `maps`: ["v", "k"] and ["k", "v"] are the same model and must have the same run id.
        return replace(self, sites=tuple(site for site in maps if site in self.sites))

    def facts(self, sites: Iterable[str]) -> dict[str, Fact]:
        return {
            "sites": sites_name(self.sites, sites),
            "width": self.width,
            "residual": self.residual,
            "activation": self.activation or "none",
            "static_init": self.static_init,
        }


@dataclass(frozen=True)
class StaticConvolution(_PlacedConvolution):
    """Each channel has a filter, which is the same at every token."""

    kind = "static"

    def parameters(self, site: LinearMap) -> int:
        return self.width * site.outputs

    def forward_flops(self, site: LinearMap) -> dict[str, int]:
        return {"generator": 0, "convolution": 2 * self.width * site.outputs}


@dataclass(frozen=True)
class _DynamicConvolution(_PlacedConvolution):
    """The settings of the kinds whose filters are generated from the input, for each token anew."""

    static_filter: bool = True  # add a filter for each channel that is the same at every token
    # What the generator reads: the input of the linear map itself, or the normed input of the part. They differ for
    # maps such as o and down alone. arXiv 2606.03825 does not say which; "map" gives its number of parameters at 2B.
    generator_input: Literal["map", "part"] = field(default="map", kw_only=True)
    # Initial weights of the generator's last linear map: zero, as in the paper, so that filters start static, or those
    # of nn.Linear.
    generator_init: Literal["zero", "linear"] = field(default="zero", kw_only=True)
    # A control with the same parameters and FLOPs: position t's filter is generated from position t of the other
    # sequence of a pair. Sequences 2i and 2i + 1 of the global batch are a pair, whatever the micro-batches; the
    # partner of an odd batch's last one is padding.
    mismatched: bool = field(default=False, kw_only=True)

    @property
    def sequence_group(self) -> int:
        return 2 if self.mismatched else 1

    @property
    def reads_part_input(self) -> bool:
        return self.generator_input == "part"

    def fitted(self, shape: Shape, maps: Mapping[str, LinearMap]) -> Self:
        if not self.static_filter and self.static_init != "uniform":
            raise ValueError("static_init needs static_filter = true; got false; remove static_init")
        if self.reads_part_input and all(maps[site].of_part_input for site in self.sites):
            raise ValueError(
                f'generator_input = "part" changes nothing at the sites {", ".join(self.sites)}, whose maps read the '
                "part's input already: it would train the same model under another run id; remove it"
            )
        return super().fitted(shape, maps)

    def widths(self, site: LinearMap, width: int) -> LinearMap:
        return LinearMap(width, site.outputs) if self.reads_part_input else site

    def parameters(self, site: LinearMap) -> int:
        return self._generator_parameters(site) + (self.width * site.outputs if self.static_filter else 0)

    def forward_flops(self, site: LinearMap) -> dict[str, int]:
        # Each parameter of the generator takes one multiply-add. Adding the static filter takes one FLOP for each tap.
        applying = (3 if self.static_filter else 2) * self.width * site.outputs
        return {"generator": 2 * self._generator_parameters(site), "convolution": applying}

    @abstractmethod
    def _generator_parameters(self, site: LinearMap) -> int:
        """Parameters of the generator."""

    def facts(self, sites: Iterable[str]) -> dict[str, Fact]:
        own = ("static_filter", "generator_input", "generator_init", "mismatched")
        return {**super().facts(sites), **{name: getattr(self, name) for name in own}}


@dataclass(frozen=True)
class HeadwiseConvolution(_DynamicConvolution):
    """Consecutive channels share a filter, which one linear projection of the input generates."""

    kind = "headwise"

    head_size: int | None = None  # channels that share a filter; None: the ladder's

    def fitted(self, shape: Shape, maps: Mapping[str, LinearMap]) -> Self:
        head_size = shape.head_size if self.head_size is None else self.head_size
        for site in self.sites:
            if head_size < 1 or maps[site].outputs % head_size:
                raise ValueError(
                    f"head_size must divide the {maps[site].outputs} channels of {site!r}; got {head_size}; "
                    "choose another"
                )
        return replace(super().fitted(shape, maps), head_size=head_size)

    def _generator_parameters(self, site: LinearMap) -> int:
        assert self.head_size is not None, "fitted() comes first"
        return site.inputs * self.width * (site.outputs // self.head_size)

    def facts(self, sites: Iterable[str]) -> dict[str, Fact]:
        assert self.head_size is not None, "fitted() comes first"
        return {**super().facts(sites), "head_size": self.head_size}


@dataclass(frozen=True)
class LowRankConvolution(_DynamicConvolution):
    """Each channel has its own filter, which a low-rank projection of the input generates."""

    kind = "lowrank"

    rank: int | None = None  # None: the rank of the size

    def fitted(self, shape: Shape, maps: Mapping[str, LinearMap]) -> Self:
        rank = shape.rank if self.rank is None else self.rank
        if rank < 1:
            raise ValueError(f"rank must be at least 1; got {rank}; raise it")
        return replace(super().fitted(shape, maps), rank=rank)

    def _generator_parameters(self, site: LinearMap) -> int:
        assert self.rank is not None, "fitted() comes first"
        return self.rank * (site.inputs + self.width * site.outputs)

    def facts(self, sites: Iterable[str]) -> dict[str, Fact]:
        assert self.rank is not None, "fitted() comes first"
        return {**super().facts(sites), "rank": self.rank}


def sites_name(chosen: Iterable[str], sites: Iterable[str]) -> str:
    """The chosen sites as one word, in the order of `sites`: "qkv", "all-linear" or "q+gate"."""
    sites, chosen = list(sites), set(chosen)
    if chosen == set(sites) - set(INPUT_SITES):
        return "all-linear"
    named = [site for site in sites if site in chosen]
    separator = "" if all(len(site) == 1 for site in named) else "+"
    return separator.join(named)
