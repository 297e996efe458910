"""Gated DeltaNet (arXiv 2412.06464, section 3) on the linear maps q, k, v, a, b, g and o.

Shapes: B batch, T time, D width, H heads, K channels of a head's keys, V of its values.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from experiments.design.model import ModelConfig
from experiments.models.norm import RMSNorm
from experiments.models.recurrence import RecurrentMixer, activated
from experiments.parts.gated_deltanet import GatedDeltaNet

EPSILON = 1e-6  # added to the squared length of keys and queries


def build(part: GatedDeltaNet, model: ModelConfig) -> nn.Module:
    return GatedDeltaNetModule(part, model)


class GatedDeltaNetModule(RecurrentMixer):
    sites = ("q", "k", "v", "a", "b", "g")
    lowest_a = 0.0

    def __init__(self, part: GatedDeltaNet, model: ModelConfig) -> None:
        super().__init__(part, model, part.heads)
        self.key, self.value = part.head_sizes()
        self.norm = RMSNorm(self.value, eps=model.norm_epsilon)

    def _inputs(
        self,
        q: Tensor,  # these six [B, T, channels]: the outputs of the linear maps and their convolutions
        k: Tensor,
        v: Tensor,
        a: Tensor,
        b: Tensor,
        gate: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:  # the gate; q, k, v, ln decay and beta
        q, k, v = (activated(self.conv, site, y) for site, y in (("q", q), ("k", k), ("v", v)))
        q, k = (self._unit(y.unflatten(2, (-1, self.key))) for y in (q, k))  # [B, T, H, K]
        log_decay = -self.log_a.exp() * F.softplus(a.to(self.dt_bias.dtype) + self.dt_bias)
        values = v.unflatten(2, (-1, self.value))
        return (gate,), (q * self.key**-0.5, k, values, log_decay, b.sigmoid())

    def _output(
        self,
        y: Tensor,  # [B, T, H, V]: the outputs of the recurrence
        gate: Tensor,  # [B, T, H*V]
    ) -> Tensor:  # [B, T, H*V]
        normed: Tensor = self.norm(y)
        return normed.flatten(2) * F.silu(gate)

    def _unit(
        self,
        x: Tensor,  # [B, T, H, K]
    ) -> Tensor:  # [B, T, H, K]
        """Vectors of length 1, so that the update with beta = 1 replaces exactly what the state holds under a key."""
        wide = x.to(self.dt_bias.dtype)
        return (wide * (wide.square().sum(-1, keepdim=True) + EPSILON).rsqrt()).to(x.dtype)
