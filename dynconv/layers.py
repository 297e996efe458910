"""The convolutions as modules, initialised as in the paper: each starts as identity + a random static filter.

Shapes: B batch, T time, D channels of the convolved tensor, G width of the generator's input, W taps.
Source: arXiv 2606.03825, section 2 (initialisation: generator input default linear, generator output zero,
static filter uniform on +-1/sqrt(W)).
"""

import torch
from torch import Tensor, nn

from dynconv.ops import headwise_dynamic_convolution, lowrank_dynamic_convolution, static_convolution


def _static_filter(width: int, channels: int) -> nn.Parameter:
    bound = width**-0.5
    return nn.Parameter(torch.empty(width, channels).uniform_(-bound, bound))


class StaticShortConv(nn.Module):
    """y_t = sum_w filter[w] x_{t-w} (+ x_t): the same filter at every position."""

    def __init__(self, channels: int, width: int = 4, residual: bool = True) -> None:
        super().__init__()
        self.residual = residual
        self.static_filter = _static_filter(width, channels)  # [W, D]

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        generator_input: Tensor | None = None,  # noqa: ARG002 - unused: one call signature for every kind
    ) -> Tensor:  # [B, T, D]
        return static_convolution(x, self.static_filter, self.residual)


class HeadwiseDynamicConv(nn.Module):
    """Each token makes one filter for every `head_size` consecutive channels."""

    def __init__(
        self,
        channels: int,
        generator_width: int,
        width: int = 4,
        head_size: int = 16,
        residual: bool = True,
        static_filter: bool = True,
    ) -> None:
        super().__init__()
        if channels % head_size:
            raise ValueError(f"head_size must divide the channels; got {head_size} and {channels}")
        self.residual = residual
        self.heads = channels // head_size
        self.width = width
        self.generator = nn.Linear(generator_width, self.heads * width, bias=False)
        nn.init.zeros_(self.generator.weight)
        self.static_filter = _static_filter(width, channels) if static_filter else None

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        generator_input: Tensor,  # [B, T, G]
    ) -> Tensor:  # [B, T, D]
        weight = self.generator(generator_input).unflatten(2, (self.heads, self.width))
        return headwise_dynamic_convolution(x, weight, self.static_filter, self.residual)


class LowRankDynamicConv(nn.Module):
    """Each token makes a filter for every channel, through a bottleneck of `rank`."""

    def __init__(
        self,
        channels: int,
        generator_width: int,
        width: int = 4,
        rank: int = 16,
        residual: bool = True,
        static_filter: bool = True,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.down = nn.Linear(generator_width, rank, bias=False)
        self.up = nn.Parameter(torch.zeros(rank, width * channels))  # [R, W*D]
        self.static_filter = _static_filter(width, channels) if static_filter else None

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        generator_input: Tensor,  # [B, T, G]
    ) -> Tensor:  # [B, T, D]
        return lowrank_dynamic_convolution(x, self.down(generator_input), self.up, self.static_filter, self.residual)
