"""Mamba-2, a state-space mixer (arXiv 2405.21060, section 7), with one group: all heads share B and C."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from experiments.parts.base import Fact, LinearMap, Part, Shape


@dataclass(frozen=True)
class Mamba2(Part):
    """Linear maps read the normed input: x the values, b the keys, c the queries, dt the step sizes and z the gate.

    o maps the result back into the residual stream. Published models convolve x, b and c: sites of the arm here.

    Defaults scale the 64 heads of 19 channels and the state of 216 of arXiv 2606.03825's model of width 1024, where the
    parameters and the state are as many as Gated DeltaNet's.
    """

    kind = "mamba2"
    takes_documents = True

    heads: int | None = None  # None: one for 16 channels of the model
    head_size: int = 19
    state: int | None = None  # channels of b and c; None: 27/128 of the model's width, to the nearest multiple of 8

    def fitted(self, shape: Shape) -> Self:
        heads = max(1, shape.width // 16) if self.heads is None else self.heads
        state = 8 * max(1, round(27 * shape.width / 1024)) if self.state is None else self.state
        for name, value in (("heads", heads), ("head_size", self.head_size), ("state", state)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}; raise it")
        return replace(self, heads=heads, state=state)

    def sizes(self) -> tuple[int, int]:
        """(heads, state). Only for a part that `fitted` returned."""
        assert self.heads is not None and self.state is not None, "fitted() comes first"  # noqa: PT018
        return self.heads, self.state

    def linear_maps(self, width: int) -> dict[str, LinearMap]:
        heads, state = self.sizes()
        inner = heads * self.head_size
        return {
            "z": LinearMap(width, inner),
            "x": LinearMap(width, inner),
            "b": LinearMap(width, state),
            "c": LinearMap(width, state),
            "dt": LinearMap(width, heads),
            "o": LinearMap(inner, width, of_part_input=False),
        }

    def other_parameters(self, width: int) -> int:  # noqa: ARG002
        heads, _ = self.sizes()
        return 3 * heads + heads * self.head_size  # A, D and the bias of dt; gains of the gated norm

    def other_flops(self, width: int, sequence_length: int) -> dict[str, int]:  # noqa: ARG002
        """Of the recurrence token by token, whatever a kernel computes: the update and the read-out, and the decay."""
        heads, state = self.sizes()
        size = heads * self.head_size * state
        return {"recurrence": 4 * sequence_length * size, "decay": sequence_length * size}

    def facts(self) -> Mapping[str, Fact]:
        heads, state = self.sizes()
        return {"heads": heads, "head_size": self.head_size, "state": state}
