"""The SwiGLU feed-forward part (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

from dataclasses import dataclass, replace
from typing import Self

from experiments.parts.base import LinearMap, Part, Shape


@dataclass(frozen=True)
class SwiGLU(Part):
    """Three linear maps: gate and up map the normed input, and down maps their product into the residual stream."""

    kind = "swiglu"
    takes_documents = True

    hidden: int | None = None  # width between up and down; None: the `ffn` of the size

    def fitted(self, shape: Shape) -> Self:
        hidden = shape.ffn if self.hidden is None else self.hidden
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1; got {hidden}; raise it")
        return replace(self, hidden=hidden)

    def linear_maps(self, width: int) -> dict[str, LinearMap]:
        assert self.hidden is not None, "fitted() comes first"
        return {
            "gate": LinearMap(width, self.hidden),
            "up": LinearMap(width, self.hidden),
            "down": LinearMap(self.hidden, width, of_part_input=False),
        }
