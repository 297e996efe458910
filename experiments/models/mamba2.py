"""Mamba-2 (arXiv 2405.21060, section 7) on the linear maps z, x, b, c, dt and o.

Shapes: B batch, T time, D width, H heads, P channels of a head, N channels of the state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.design.model import ModelConfig
from experiments.models.norm import RMSNorm
from experiments.models.packing import Documents
from experiments.models.recurrence import activated, chunked, draw_decay, library_trains, recurrence
from experiments.models.short_convolution import Maps
from experiments.parts.mamba2 import Mamba2

IN = ("z", "x", "b", "c", "dt")  # sites of the maps that read the part's input


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
        self.by_library = False  # set by `prepare`
        self.log_a = nn.Parameter(torch.empty(heads))  # ln(-A) in the paper: A is negative
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.skip = nn.Parameter(torch.ones(heads))  # D in the paper
        self.norm = RMSNorm(heads * part.head_size, eps=model.norm_epsilon)

    def initialise(self, generator: torch.Generator, std: float, residual_std: float) -> None:  # noqa: ARG002
        draw_decay(self.log_a, self.dt_bias, 1.0, generator)

    def prepare(self, time: int, device: torch.device) -> None:  # noqa: ARG002
        self.by_library = library_trains(device)

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        documents: Documents | None = None,
    ) -> Tensor:  # [B, T, D]
        z, v, *inputs = self._inputs(*self.maps.apply_to(x, IN, x, documents))
        y = recurrence(*inputs, documents=documents, by_library=self.by_library)
        (y,) = self.maps.apply_to(self._gated(y, v, z), ("o",), x, documents)
        return y

    def decode(
        self,
        x: Tensor,  # [B, T, D]
        state: dict[str, Tensor],  # "state" [B, H, N, P], and what the convolutions keep
    ) -> Tensor:  # [B, T, D]
        """As `forward`, for inputs that continue a sequence. An empty `state` begins one; it is updated in place."""
        z, v, *inputs = self._inputs(*self.maps.decode(x, IN, x, state))
        y, state["state"] = chunked(*inputs, state=state.get("state"))
        (y,) = self.maps.decode(self._gated(y, v, z), ("o",), x, state)
        return y

    def _inputs(
        self,
        z: Tensor,  # these five [B, T, channels]: the outputs of the linear maps and their convolutions
        values: Tensor,
        keys: Tensor,
        queries: Tensor,
        dt: Tensor,
    ) -> tuple[Tensor, ...]:  # z; the values [B, T, H, P]; q, k, v and ln decay of the recurrence
        values, keys, queries = (
            activated(self.conv, site, y) for site, y in (("x", values), ("b", keys), ("c", queries))
        )
        values = values.unflatten(2, (-1, self.head_size))
        step = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)  # [B, T, H]
        scaled = (values * step[..., None]).to(values.dtype)
        return z, values, queries[:, :, None], keys[:, :, None], scaled, -self.log_a.exp() * step

    def _gated(
        self,
        y: Tensor,  # [B, T, H, P]: the outputs of the recurrence
        values: Tensor,  # [B, T, H, P]
        z: Tensor,  # [B, T, H*P]
    ) -> Tensor:  # [B, T, H*P]
        y = y + self.skip[:, None].to(y.dtype) * values
        normed: Tensor = self.norm(y.flatten(2) * F.silu(z))
        return normed
