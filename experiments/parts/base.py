"""The interface of a model's parts: what each says about its linear maps, parameters, FLOPs and facts. No torch.

T sequence length, D width of the residual stream.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

# Sites of convolutions on the normed input of a part itself, before its linear maps.
MIXER_INPUT, FFN_INPUT = "mixer_input", "ffn_input"
INPUT_SITES = (MIXER_INPUT, FFN_INPUT)

Fact = str | int | float | bool  # a setting by which a table may group runs


class LinearMap(NamedTuple):
    """The shape of a linear map without bias. Maps are named by their site; a short convolution may follow each."""

    inputs: int
    outputs: int
    of_part_input: bool = True  # whether it maps the normed input of the part, and nothing computed from that

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """The settings of a size that its models' parts take over, unless an arm gives its own."""

    width: int  # D
    heads: int  # of attention
    ffn: int  # hidden width of a feed-forward part
    rank: int  # of a low-rank convolution's generator
    head_size: int  # consecutive channels that share a head-wise filter


@dataclass(frozen=True)
class Part(ABC):
    """The mixer or the feed-forward part of each layer. The model computes `x + part(norm(x))`.

    A subclass is a frozen dataclass of the part's own settings. The function `build` in the file of the same name in
    experiments/models makes its torch module.
    """

    kind: ClassVar[str]  # the name of the part in sweep files
    # Whether the module keeps packed documents apart: models/decoder.py says at `build` how it is told of them.
    takes_documents: ClassVar[bool] = False

    def fitted(self, shape: Shape) -> Self:  # noqa: ARG002  # subclasses use it
        """The same part, with settings that are None taken from the shape. Raises ValueError if one does not fit."""
        return self

    @abstractmethod
    def linear_maps(self, width: int) -> dict[str, LinearMap]:
        """Site -> shape of each linear map, in the order of the module's `Maps`."""

    def other_parameters(self, width: int) -> int:  # noqa: ARG002
        """Parameters outside the linear maps, such as gains of norms."""
        return 0

    def other_flops(self, width: int, sequence_length: int) -> dict[str, int]:  # noqa: ARG002
        """FLOPs of a forward pass over one sequence outside the linear maps, by operation."""
        return {}

    def parameters(self, width: int) -> int:
        return sum(each.parameters for each in self.linear_maps(width).values()) + self.other_parameters(width)

    def active_parameters(self, width: int) -> int:
        """Parameters that one token uses: all, unless a router chooses among experts."""
        return self.parameters(width)

    def forward_flops(self, width: int, sequence_length: int) -> dict[str, int]:
        """FLOPs of a forward pass over one sequence, by operation. A multiply-add counts as two."""
        linear = 2 * sequence_length * sum(each.parameters for each in self.linear_maps(width).values())
        return {"linear": linear, **self.other_flops(width, sequence_length)}

    def facts(self) -> Mapping[str, Fact]:
        """The settings that a table may group by. The model prefixes their names with the part's kind."""
        return {}
