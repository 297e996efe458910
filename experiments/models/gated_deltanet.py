"""Gated DeltaNet (arXiv 2412.06464, section 3) on the linear maps q, k, v, a, b, g and o.

Shapes: B batch, T time, D width, H heads, K channels of a head's keys, V of its values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.design.model import ModelConfig
from experiments.models.norm import RMSNorm
from experiments.models.packing import Documents
from experiments.models.recurrence import activated, chunked, draw_decay, library_trains, recurrence
from experiments.models.short_convolution import Maps
from experiments.parts.gated_deltanet import GatedDeltaNet

IN = ("q", "k", "v", "a", "b", "g")  # sites of the maps that read the part's input
EPSILON = 1e-6  # added to the squared length of keys and queries


def build(part: GatedDeltaNet, model: ModelConfig) -> nn.Module:
    return GatedDeltaNetModule(part, model)


class GatedDeltaNetModule(nn.Module):
    """The mixer. Its input is the normed residual stream."""

    into_residual = ("o",)

    def __init__(self, part: GatedDeltaNet, model: ModelConfig) -> None:
        super().__init__()
        self.key, self.value = part.head_sizes()
        self.conv = model.conv
        self.maps = Maps(part, model)
        self.by_library = False  # set by `prepare`
        self.log_a = nn.Parameter(torch.empty(part.heads))
        self.dt_bias = nn.Parameter(torch.empty(part.heads))
        self.norm = RMSNorm(self.value, eps=model.norm_epsilon)

    def initialise(self, generator: torch.Generator, std: float, residual_std: float) -> None:  # noqa: ARG002
        draw_decay(self.log_a, self.dt_bias, 0.0, generator)

    def prepare(self, time: int, device: torch.device) -> None:  # noqa: ARG002
        self.by_library = library_trains(device)

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        documents: Documents | None = None,
    ) -> Tensor:  # [B, T, D]
        gate, *inputs = self._inputs(*self.maps.apply_to(x, IN, x, documents))
        y = self.norm(recurrence(*inputs, documents=documents, by_library=self.by_library)).flatten(2)
        (y,) = self.maps.apply_to(y * F.silu(gate), ("o",), x, documents)
        return y

    def decode(
        self,
        x: Tensor,  # [B, T, D]
        state: dict[str, Tensor],  # "state" [B, H, K, V], and what the convolutions keep
    ) -> Tensor:  # [B, T, D]
        """As `forward`, for inputs that continue a sequence. An empty `state` begins one; it is updated in place."""
        gate, *inputs = self._inputs(*self.maps.decode(x, IN, x, state))
        y, state["state"] = chunked(*inputs, state=state.get("state"))
        (y,) = self.maps.decode(self.norm(y).flatten(2) * F.silu(gate), ("o",), x, state)
        return y

    def _inputs(
        self,
        q: Tensor,  # these six [B, T, channels]: the outputs of the linear maps and their convolutions
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        gate: Tensor,
    ) -> tuple[Tensor, ...]:  # the gate; q, k, v, ln decay and beta of the recurrence
        q, k, v = (activated(self.conv, site, y) for site, y in (("q", q), ("k", k), ("v", v)))
        q, k = (self._unit(y.unflatten(2, (-1, self.key))) for y in (q, k))  # [B, T, H, K]
        log_decay = -self.log_a.exp() * F.softplus(a.to(self.dt_bias.dtype) + self.dt_bias)
        return gate, q * self.key**-0.5, k, v.unflatten(2, (-1, self.value)), log_decay, b.sigmoid()

    def _unit(
        self,
        x: Tensor,  # [B, T, H, K]
    ) -> Tensor:  # [B, T, H, K]
        """Vectors of length 1, so that the update with beta = 1 replaces exactly what the state holds under a key."""
        wide = x.to(self.dt_bias.dtype)
        return (wide * (wide.square().sum(-1, keepdim=True) + EPSILON).rsqrt()).to(x.dtype)
