"""Gated DeltaNet, a mixer with a gated delta rule (arXiv 2412.06464, section 3)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from experiments.parts.base import Fact, LinearMap, Part, Shape


@dataclass(frozen=True)
class GatedDeltaNet(Part):
    """Linear maps read the normed input: q, k and v, a the decay, b the strength of updates, and g the output's gate.

    o maps the result back into the residual stream. Published models convolve q, k and v: sites of the arm here.
    """

    kind = "gated_deltanet"
    takes_documents = True

    # Defaults scale arXiv 2606.03825's model of width 1024: 2 heads with keys of 256 and values of 512 channels.
    heads: int = 2
    key: int | None = None  # channels of a head's keys and queries; None: a quarter of the model's width
    value: int | None = None  # channels of a head's values; None: half of the model's width

    def fitted(self, shape: Shape) -> Self:
        key = shape.width // 4 if self.key is None else self.key
        value = shape.width // 2 if self.value is None else self.value
        for name, setting in (("heads", self.heads), ("key", key), ("value", value)):
            if setting < 1:
                raise ValueError(f"{name} must be at least 1; got {setting}; raise it")
        return replace(self, key=key, value=value)

    def head_sizes(self) -> tuple[int, int]:
        """Channels of a head's (key, value). Only for a part that `fitted` returned."""
        assert self.key is not None and self.value is not None, "fitted() comes first"  # noqa: PT018
        return self.key, self.value

    def linear_maps(self, width: int) -> dict[str, LinearMap]:
        keys, values = (self.heads * size for size in self.head_sizes())
        return {
            "q": LinearMap(width, keys),
            "k": LinearMap(width, keys),
            "v": LinearMap(width, values),
            "a": LinearMap(width, self.heads),
            "b": LinearMap(width, self.heads),
            "g": LinearMap(width, values),
            "o": LinearMap(values, width, of_part_input=False),
        }

    def other_parameters(self, width: int) -> int:  # noqa: ARG002
        return 2 * self.heads + self.head_sizes()[1]  # A and the bias of a; gains of the gated norm, which heads share

    def other_flops(self, width: int, sequence_length: int) -> dict[str, int]:  # noqa: ARG002
        """Of the recurrence token by token, whatever a kernel computes.

        These are what the state holds under the key, its update and the read-out; and the decay.
        """
        key, value = self.head_sizes()
        size = self.heads * key * value
        return {"recurrence": 6 * sequence_length * size, "decay": sequence_length * size}

    def facts(self) -> Mapping[str, Fact]:
        key, value = self.head_sizes()
        return {"heads": self.heads, "key": key, "value": value}
