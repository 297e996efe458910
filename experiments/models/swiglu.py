"""SwiGLU (arXiv 2002.05202) on the linear maps gate, up and down.

Shapes: B batch, T time, D width.
"""

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from experiments.design.model import ModelConfig
from experiments.models.fused import gated
from experiments.models.joined import swiglu_joined
from experiments.models.packing import Documents
from experiments.models.short_convolution import ConvLinear, Maps
from experiments.parts.swiglu import SwiGLU

_GATED = ("gate", "up")


def build(part: SwiGLU, model: ModelConfig) -> nn.Module:
    return SwiGLUModule(part, model)


class SwiGLUModule(nn.Module):
    """down(silu(gate(x)) * up(x)), where x is the normed residual stream."""

    into_residual = ("down",)

    def __init__(self, part: SwiGLU, model: ModelConfig) -> None:
        super().__init__()
        self.maps = Maps(part, model)
        self.adds_stream = False

    def fuse(self, kernels: bool) -> list[str]:
        """Compute convolutions in one kernel with their neighbours, where they fit and there are `kernels`.

        Returns what is one kernel then.
        """
        self.maps.fused = kernels
        self.adds_stream = self.maps.fits(("down",), not self.maps.reads_part_input)
        inner = ["gate, up, SwiGLU"] if self.maps.takes_swiglu(_GATED) else ["gate, up"] * self.maps.fits(_GATED)
        return inner + ["down, residual stream"] * self.adds_stream

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        documents: Documents | None = None,
        stream: Tensor | None = None,  # [B, T, D]
    ) -> Tensor:  # [B, T, D]
        """SwiGLU, added to `stream` if it is given."""
        if documents is None and self.maps.takes_swiglu(_GATED):
            y = gated(*self.maps.weights_and_convolutions(_GATED), x)
            if stream is None:  # else `add_to` takes it with its padding
                y = y[..., : cast(ConvLinear, self.maps["down"]).linear.in_features]
        else:
            outputs = self.maps.outputs(x, _GATED, x, documents)
            gate, up = outputs.apart
            # without padding
            whole = outputs.joined is not None and outputs.joined.shape[-1] == gate.shape[-1] + up.shape[-1]
            y = swiglu_joined(cast(Tensor, outputs.joined)) if whole else F.silu(gate) * up
        if stream is not None:
            return self.maps.add_to(stream, y, "down", x, documents)
        (y,) = self.maps.apply_to(y, ("down",), x, documents)
        return y

    def decode(
        self,
        x: Tensor,  # [B, T, D]
        state: dict[str, Tensor],
    ) -> Tensor:  # [B, T, D]
        """As `forward`, for inputs that continue a sequence. `state` keeps the convolutions' last inputs."""
        gate, up = self.maps.decode(x, ("gate", "up"), x, state)
        (y,) = self.maps.decode(F.silu(gate) * up, ("down",), x, state)
        return y
