"""Mamba-2 (arXiv 2405.21060, section 7) on the linear maps z, x, b, c, dt and o.

Shapes: B batch, T time, D width, H heads, P channels of a head, N channels of the state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.design.model import ModelConfig
from experiments.models.norm import RMSNorm
from experiments.models.recurrence import RecurrentMixer, activated
from experiments.parts.mamba2 import Mamba2


def build(part: Mamba2, model: ModelConfig) -> nn.Module:
    return Mamba2Module(part, model)


class Mamba2Module(RecurrentMixer):
    sites = ("z", "x", "b", "c", "dt")
    lowest_a = 1.0

    def __init__(self, part: Mamba2, model: ModelConfig) -> None:
        heads, _ = part.sizes()
        super().__init__(part, model, heads)
        self.head_size = part.head_size
        self.skip = nn.Parameter(torch.ones(heads))  # D in the paper
        self.norm = RMSNorm(heads * part.head_size, eps=model.norm_epsilon)

    def _inputs(
        self,
        z: Tensor,  # these five [B, T, channels]: the outputs of the linear maps and their convolutions
        values: Tensor,
        keys: Tensor,
        queries: Tensor,
        dt: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:  # the values [B, T, H, P] and z; q, k, v and ln decay
        values, keys, queries = (
            activated(self.conv, site, y) for site, y in (("x", values), ("b", keys), ("c", queries))
        )
        values = values.unflatten(2, (-1, self.head_size))
        step = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)  # [B, T, H]
        scaled = (values * step[..., None]).to(values.dtype)
        return (values, z), (queries[:, :, None], keys[:, :, None], scaled, -self.log_a.exp() * step)

    def _output(
        self,
        y: Tensor,  # [B, T, H, P]: the outputs of the recurrence
        values: Tensor,  # [B, T, H, P]
        z: Tensor,  # [B, T, H*P]
    ) -> Tensor:  # [B, T, H*P]
        y = y + self.skip[:, None].to(y.dtype) * values
        normed: Tensor = self.norm(y.flatten(2) * F.silu(z))
        return normed
