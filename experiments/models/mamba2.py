"""Mamba-2 (arXiv 2405.21060, section 7) on the linear maps z, x, b, c, dt and o.

Shapes: B batch, T time, D width, H heads, P channels of a head, N channels of the state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.design.model import ModelConfig
from experiments.models.norm import RMSNorm
from experiments.models.recurrence import activated, draw_decay, recurrence, warn_without_library
from experiments.models.short_convolution import Maps
from experiments.parts.mamba2 import Mamba2


def build(part: Mamba2, model: ModelConfig) -> nn.Module:
    return Mamba2Module(part, model)


class Mamba2Module(nn.Module):
    """The mixer. Its input is the normed residual stream."""

    into_residual = ("o",)

    def __init__(self, part: Mamba2, model: ModelConfig) -> None:
        super().__init__()
        heads, _ = part.sizes()
        self.head_size, self.conv = part.head_size, model.conv
        self.maps = Maps(part, model)
        self.log_a = nn.Parameter(torch.empty(heads))  # ln(-A) in the paper: A is negative
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.ones(heads))  # D in the paper
        self.norm = RMSNorm(heads * part.head_size, eps=model.norm_epsilon)

    def initialise(self, generator: torch.Generator, std: float, residual_std: float) -> None:  # noqa: ARG002
        draw_decay(self.log_a, self.dt_bias, 1.0, generator)

    def prepare(self, time: int, device: torch.device) -> None:  # noqa: ARG002
        warn_without_library(device)

    def forward(
        self,
        x: Tensor,  # [B, T, D]
    ) -> Tensor:  # [B, T, D]
        z, values, keys, queries, dt = self.maps.apply_to(x, ("z", "x", "b", "c", "dt"), x)
        values, keys, queries = (
            activated(self.conv, site, y) for site, y in (("x", values), ("b", keys), ("c", queries))
        )
        v = values.unflatten(2, (-1, self.head_size))  # [B, T, H, P]
        step = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)  # [B, T, H]
        y = recurrence(
            queries[:, :, None], keys[:, :, None], (v * step[..., None]).to(v.dtype), -self.log_a.exp() * step
        )
        y = (y + self.skip[:, None].to(v.dtype) * v).flatten(2)
        (y,) = self.maps.apply_to(self.norm(y * F.silu(z)), ("o",), x)
        return y
