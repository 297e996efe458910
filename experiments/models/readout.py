"""Reads all targets of a sequence from its last token: the decoder of the compression task.

Shapes: B batch, T time, D width. Source: arXiv 2403.17844, section 3, whose code decodes with two linear maps and
sinusoidal positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.models.norm import RMSNorm

SLOWEST = 10_000.0  # the longest period of the positions, over 2 pi (Vaswani et al. 2017, arXiv 1706.03762)


class LastTokenReadout(nn.Module):
    """Two linear maps, each after a norm and before a GELU, of the last token's state plus the position to decode.

    Nothing else of the sequence reaches the outputs, so the blocks must have gathered it all in the last token.
    """

    def __init__(self, width: int, norm_epsilon: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(width, eps=norm_epsilon) for _ in range(2))
        self.maps = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(
        self,
        x: Tensor,  # [B, T, D]
    ) -> Tensor:  # [B, T, D]
        y = x[:, -1:] + positions(x.shape[1], x.shape[2], x.device).to(x.dtype)
        for norm, linear in zip(self.norms, self.maps, strict=True):
            y = F.gelu(linear(norm(y)))
        return y


def positions(time: int, width: int, device: torch.device) -> Tensor:  # [T, D]
    """Sines and cosines of each position at periods from 2 pi to 2 pi times SLOWEST (arXiv 1706.03762, section 3.5)."""
    half = -(-width // 2)
    rates = SLOWEST ** (-torch.arange(half, device=device, dtype=torch.float32) / max(1, half - 1))
    angles = torch.arange(time, device=device, dtype=torch.float32)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
