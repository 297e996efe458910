"""What every part of a model says about itself, without torch.

T sequence length, D width of the residual stream.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

Fact = str | int | float | bool


class LinearMap(NamedTuple):
    """The shape of a matrix product without bias. Its name is a site, which a short convolution may follow."""

    inputs: int
    outputs: int

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class Shape:
    """What a rung of a ladder gives to the parts of its models where an arm does not say otherwise."""

    width: int  # D
    heads: int  # of attention
    ffn: int  # hidden width of a feed-forward part
    rank: int  # of a low-rank convolution's generator
    head_size: int  # consecutive channels that share a head-wise filter


@dataclass(frozen=True)
class Part(ABC):
    """One layer's mixer or feed-forward part: `forward(x + part(norm(x)))` around it is the model's.

    A subclass is a frozen dataclass of the part's own settings. Its torch module is `build` in the file of the same
    name in experiments/models.
    """

    kind: ClassVar[str]  # the name in sweep files, in `registry.py`, and of the file in experiments/models

    def fitted(self, shape: Shape) -> Self:  # noqa: ARG002  # for the parts that take something of it
        """The same part with what it leaves open taken from the shape. Raises ValueError where they do not fit."""
        return self

    @abstractmethod
    def linear_maps(self, width: int) -> dict[str, LinearMap]:
        """Site -> shape of each linear map, in the order in which the module holds them."""

    def other_parameters(self, width: int) -> int:  # noqa: ARG002
        """Trained numbers beside the linear maps, such as gains."""
        return 0

    def other_flops(self, width: int, sequence_length: int) -> dict[str, int]:  # noqa: ARG002
        """FLOPs of a forward pass over one sequence beside the linear maps, by what they are spent on."""
        return {}

    def parameters(self, width: int) -> int:
        return sum(each.parameters for each in self.linear_maps(width).values()) + self.other_parameters(width)

    def active_parameters(self, width: int) -> int:
        """Those that one token meets: all, unless a router chooses."""
        return self.parameters(width)

    def forward_flops(self, width: int, sequence_length: int) -> dict[str, int]:
        """FLOPs of a forward pass over one sequence, by what they are spent on. A multiply-add counts as two."""
        linear = 2 * sequence_length * sum(each.parameters for each in self.linear_maps(width).values())
        return {"linear": linear, **self.other_flops(width, sequence_length)}

    def facts(self) -> Mapping[str, Fact]:
        """The settings that a table may group by, without the part's name."""
        return {}
