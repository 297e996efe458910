"""A mixture of SwiGLU experts, of which a router chooses a few for each token, beside a shared expert.

Sources: the router, arXiv 1701.06538; the shared expert beside many narrow ones, arXiv 2401.06066.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from experiments.parts.base import Fact, LinearMap, Part, Shape

ROW = 8  # grouped matrix products of 16-bit numbers want rows of whole 16 bytes


@dataclass(frozen=True)
class MoE(Part):
    """Linear maps are the shared expert's: gate, up and down. All experts read the normed input and add up.

    No expert has a capacity: every token reaches all experts that the router chose for it.
    """

    kind = "moe"
    takes_documents = True

    experts: int  # routed ones
    top_k: int  # experts chosen for each token
    shared: int = 4  # hidden width of the shared expert, in widths of a routed one
    # Hidden width of a routed expert. None: such that those that a token uses have the size's `ffn` together.
    hidden: int | None = None
    balance_weight: float = 0.01  # of the load-balancing loss; that of arXiv 2101.03961, section 2.2
    router_z_weight: float = 0.001  # of the router's z-loss; that of arXiv 2202.08906, section 4

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k must be 1 to the number of experts; got {self.top_k} of {self.experts}; lower it")
        if self.shared < 1:
            raise ValueError(f"shared must be at least 1; got {self.shared}; raise it")
        for name in ("balance_weight", "router_z_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be at least zero and finite; got {getattr(self, name)}; correct it")

    def fitted(self, shape: Shape) -> Self:
        used = self.top_k + self.shared
        if self.hidden is None and shape.ffn % used:
            raise ValueError(
                f"the size's ffn must be a multiple of top_k + shared = {used}, the expert widths that a token uses; "
                f"got {shape.ffn}; give `hidden`"
            )
        hidden = shape.ffn // used if self.hidden is None else self.hidden
        for name, value in (("hidden", hidden), ("the width of the model", shape.width)):
            if value < 1 or value % ROW:
                raise ValueError(
                    f"{name} must be a multiple of {ROW}, so that rows of experts fill 16 bytes; got {value}; "
                    "choose another"
                )
        return replace(self, hidden=hidden)

    def linear_maps(self, width: int) -> dict[str, LinearMap]:
        hidden = self.shared * self._hidden
        return {
            "gate": LinearMap(width, hidden),
            "up": LinearMap(width, hidden),
            "down": LinearMap(hidden, width, of_part_input=False),
        }

    @property
    def _hidden(self) -> int:
        assert self.hidden is not None, "fitted() comes first"
        return self.hidden

    def _expert_parameters(self, width: int) -> int:
        return 3 * width * self._hidden  # gate, up and down

    def other_parameters(self, width: int) -> int:
        return self.experts * (width + self._expert_parameters(width))  # the router has a row for each expert

    def active_parameters(self, width: int) -> int:
        return self.parameters(width) - (self.experts - self.top_k) * self._expert_parameters(width)

    def other_flops(self, width: int, sequence_length: int) -> dict[str, int]:
        return {
            "router": 2 * sequence_length * width * self.experts,
            "experts": 2 * sequence_length * self.top_k * self._expert_parameters(width),
        }

    def facts(self) -> Mapping[str, Fact]:
        return {"experts": self.experts, "top_k": self.top_k, "hidden": self._hidden, "shared": self.shared}
