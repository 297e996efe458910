"""The convolutions as modules, initialised as in the paper: each starts as identity + a random static filter.

Shapes: B batch, T time, D channels of the convolved tensor, G width of the generator's input, W taps, N sequences.
Source: arXiv 2606.03825, section 2 (initialisation: generator input default linear, generator output zero,
static filter uniform on +-1/sqrt(W)).

Filters and bases carry the hint `optimizer_hint = {"weight_decay": 0.0, "muon": False}`: they are not the weight
matrices those are meant for.
"""

from typing import Any

import torch
from torch import Tensor, nn

from dynconv.ops import headwise_dynamic_convolution, lowrank_dynamic_convolution, static_convolution

OPTIMIZER_HINT = {"weight_decay": 0.0, "muon": False}


def _hinted(parameter: nn.Parameter) -> nn.Parameter:
    parameter.optimizer_hint = OPTIMIZER_HINT  # type: ignore[attr-defined]  # a tensor takes attributes
    return parameter


def _static_filter(width: int, channels: int) -> nn.Parameter:
    bound = width**-0.5
    return _hinted(nn.Parameter(torch.empty(width, channels).uniform_(-bound, bound)))


class _ShortConv(nn.Module):
    """What the modules share: training, prefill and decoding are one convolution with other options."""

    channels: int
    width: int
    residual: bool

    def _convolve(self, x: Tensor, generator_input: Tensor | None, **options: Any) -> Any:
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        generator_input: Tensor | None = None,  # [B, T, G]; the static convolution does without
        cu_seqlens: Tensor | None = None,  # [N + 1]: where packed documents start in T, and T; needs B = 1
    ) -> Tensor:  # [B, T, D]
        y: Tensor = self._convolve(x, generator_input, cu_seqlens=cu_seqlens)
        return y

    def prefill(
        self,
        x: Tensor,  # [B, T, D]
        generator_input: Tensor | None = None,  # [B, T, G]
        state: Tensor | None = None,  # [N, W-1, D]: the inputs before, oldest first; None: none
        cu_seqlens: Tensor | None = None,  # [N + 1]
    ) -> tuple[Tensor, Tensor]:  # [B, T, D], [N, W-1, D]
        """The outputs, and the state that `step` goes on from."""
        options = {"cu_seqlens": cu_seqlens, "initial_state": state, "return_final_state": True}
        y, state = self._convolve(x, generator_input, **options)
        return y, state

    def step(
        self,
        x: Tensor,  # [B, T, D]: one token, or a few to be verified
        generator_input: Tensor | None,  # [B, T, G]
        state: Tensor,  # [B, W-1, D]
    ) -> tuple[Tensor, Tensor]:  # [B, T, D], [B, W-1, D]
        """Decode from a state: the outputs, and the next state."""
        return self.prefill(x, generator_input, state)

    def extra_repr(self) -> str:
        return f"channels={self.channels}, width={self.width}, residual={self.residual}"


class StaticShortConv(_ShortConv):
    """y_t = sum_w filter[w] x_{t-w} (+ x_t): the same filter at every position."""

    def __init__(self, channels: int, width: int = 4, residual: bool = True) -> None:
        super().__init__()
        self.channels, self.width, self.residual = channels, width, residual
        self.static_filter = _static_filter(width, channels)  # [W, D]

    def _convolve(self, x: Tensor, generator_input: Tensor | None, **options: Any) -> Any:  # noqa: ARG002 - the base's
        return static_convolution(x, self.static_filter, self.residual, **options)


class HeadwiseDynamicConv(_ShortConv):
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
        self.channels, self.width, self.residual = channels, width, residual
        self.heads = _heads(channels, head_size)
        self.generator = nn.Linear(generator_width, self.heads * width, bias=False)
        nn.init.zeros_(self.generator.weight)
        self.static_filter = _static_filter(width, channels) if static_filter else None

    def _convolve(self, x: Tensor, generator_input: Tensor | None, **options: Any) -> Any:
        weight = self.generator(generator_input).unflatten(2, (self.heads, self.width))
        return headwise_dynamic_convolution(x, weight, self.static_filter, self.residual, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, heads={self.heads}"


class LowRankDynamicConv(_ShortConv):
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
        self.channels, self.width, self.residual = channels, width, residual
        self.down = nn.Linear(generator_width, rank, bias=False)
        self.up = _hinted(nn.Parameter(torch.zeros(rank, width * channels)))  # [R, W*D]
        self.static_filter = _static_filter(width, channels) if static_filter else None

    def _convolve(self, x: Tensor, generator_input: Tensor | None, **options: Any) -> Any:
        return lowrank_dynamic_convolution(
            x, self.down(generator_input), self.up, self.static_filter, self.residual, **options
        )


class FusedLowRankConv(_ShortConv):
    """The low-rank convolutions of several branches side by side (Q, K and V, say) in one launch.

    The caller's projection makes the generators, too: it has `generator_columns` more columns after the branches',
    with the projection's own initialisation.
    """

    def __init__(
        self,
        branches: tuple[int, ...],  # each branch's channels
        width: int = 4,
        rank: int = 16,
        residual: bool = True,
        static_filter: bool = True,
    ) -> None:
        super().__init__()
        self.channels, self.width, self.residual = sum(branches), width, residual
        self.branches = tuple(branches)
        self.generator_columns = len(branches) * rank
        self.up = _hinted(nn.Parameter(torch.zeros(rank, width * self.channels)))  # [R, W*D]
        self.static_filter = _static_filter(width, self.channels) if static_filter else None

    def _convolve(
        self,
        x: Tensor,  # [B, T, D + generator_columns]: the projection's output
        generator_input: Tensor | None,  # noqa: ARG002 - the generators came with x
        **options: Any,
    ) -> Any:
        x, z = x.split([self.channels, self.generator_columns], 2)
        return lowrank_dynamic_convolution(
            x, z, self.up, self.static_filter, self.residual, segments=self.branches, **options
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, branches={self.branches}"


class FusedHeadwiseConv(_ShortConv):
    """The head-wise convolution whose coefficients are the last `generator_columns` of the caller's projection.

    Branches need nothing more, as heads partition the channels. `init_projection` zeroes the projection's rows.
    """

    def __init__(
        self,
        channels: int,
        width: int = 4,
        head_size: int = 16,
        residual: bool = True,
        static_filter: bool = True,
    ) -> None:
        super().__init__()
        self.channels, self.width, self.residual = channels, width, residual
        self.heads = _heads(channels, head_size)
        self.generator_columns = self.heads * width
        self.static_filter = _static_filter(width, channels) if static_filter else None

    def init_projection(
        self,
        weight: Tensor,  # [D + generator_columns, inputs], as in nn.Linear
    ) -> None:
        """Zero the rows that make the coefficients: the convolution starts as its static filter."""
        with torch.no_grad():
            weight[self.channels :].zero_()

    def _convolve(
        self,
        x: Tensor,  # [B, T, D + generator_columns]: the projection's output
        generator_input: Tensor | None,  # noqa: ARG002 - the coefficients came with x
        **options: Any,
    ) -> Any:
        x, weight = x.split([self.channels, self.generator_columns], 2)
        weight = weight.unflatten(2, (self.heads, self.width))
        return headwise_dynamic_convolution(x, weight, self.static_filter, self.residual, **options)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, heads={self.heads}"


def _heads(channels: int, head_size: int) -> int:
    if channels % head_size:
        raise ValueError(f"head_size must divide the channels; got {head_size} and {channels}")
    return channels // head_size
