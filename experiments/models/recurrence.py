"""Mixers around a linear recurrence: what Mamba-2 and Gated DeltaNet share. chunks.py defines the recurrence.

Shapes: B batch, T time, D width, H heads, K channels of a key, V channels of a value.
"""

import importlib.util
import math
import re
import sys
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.design.model import ModelConfig
from experiments.models.chunks import chunked
from experiments.models.packing import Documents
from experiments.models.short_convolution import Maps
from experiments.parts.base import Part
from experiments.parts.short_convolution import Convolution


class RecurrentMixer(nn.Module):
    """Base of the mixers around a recurrence. Their input is the normed residual stream."""

    into_residual = ("o",)
    sites: tuple[str, ...]  # of the maps that read the part's input
    lowest_a: float  # see `draw_decay`
    # From the outputs [B, T, channels] of the linear maps at `sites`, and of their convolutions: what `_output` takes
    # besides the recurrence's outputs, and the arguments of `recurrence`.
    _inputs: Callable[..., tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
    # From the outputs [B, T, H, V] of the recurrence, and what was kept for it: the input [B, T, H*V] of the map o.
    _output: Callable[..., Tensor]

    def __init__(self, part: Part, model: ModelConfig, heads: int) -> None:
        super().__init__()
        self.conv = model.conv
        self.maps = Maps(part, model)
        self.by_library = False  # set by `prepare`
        self.log_a = nn.Parameter(torch.empty(heads))  # ln(-A) in Mamba-2's paper: A is negative
        self.dt_bias = nn.Parameter(torch.empty(heads))

    def initialise(self, generator: torch.Generator, std: float, residual_std: float) -> None:  # noqa: ARG002
        draw_decay(self.log_a, self.dt_bias, self.lowest_a, generator)

    def prepare(self, time: int, device: torch.device) -> None:  # noqa: ARG002
        self.by_library = library_trains(device)

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        documents: Documents | None = None,
    ) -> Tensor:  # [B, T, D]
        kept, inputs = self._inputs(*self.maps.apply_to(x, self.sites, x, documents))
        y = recurrence(*inputs, documents=documents, by_library=self.by_library)
        (y,) = self.maps.apply_to(self._output(y, *kept), ("o",), x, documents)
        return y

    def decode(
        self,
        x: Tensor,  # [B, T, D]
        state: dict[str, Tensor],  # "state" [B, H, K, V], and what the convolutions keep
    ) -> Tensor:  # [B, T, D]
        """As `forward`, for inputs that continue a sequence. An empty `state` begins one; it is updated in place."""
        kept, inputs = self._inputs(*self.maps.decode(x, self.sites, x, state))
        y, state["state"] = chunked(*inputs, state=state.get("state"))
        (y,) = self.maps.decode(self._output(y, *kept), ("o",), x, state)
        return y


def recurrence(
    q: Tensor,  # [B, T, H, K], or [B, T, 1, K] if all heads share it
    k: Tensor,  # as q
    v: Tensor,  # [B, T, H, V]
    log_decay: Tensor,  # [B, T, H]: ln a, in float32 or wider
    beta: Tensor | None = None,  # [B, T, H], in (0, 1)
    *,
    documents: Documents | None = None,  # packed ones, each of which begins with a state of zeros
    by_library: bool,  # by the kernels of flash-linear-attention
) -> Tensor:  # [B, T, H, V]
    """The outputs, in the dtype of v."""
    # The library makes a table whose size is the number of chunks of all documents: the host has to wait for that
    # number, and no CUDA graph can hold it.
    if by_library and documents is None:
        return _by_library(q, k, v, log_decay, beta)
    packing = {} if documents is None else {"numbers": documents.numbers}
    return chunked(q, k, v, log_decay, beta, **packing)[0]


def activated(
    conv: Convolution,
    site: str,
    y: Tensor,  # [B, T, channels]: the output of the linear map at the site, and of its convolution
) -> Tensor:  # [B, T, channels]
    """silu(y), as published, unless the convolution at the site has an activation of its own."""
    return y if site in conv.sites and getattr(conv, "activation", None) else F.silu(y)


@torch.no_grad()
def draw_decay(
    log_a: Tensor,  # [H]
    dt_bias: Tensor,  # [H]
    lowest: float,
    generator: torch.Generator,
) -> None:
    """Draw the parameters of a decay exp(-exp(log_a) softplus(dt + dt_bias)) as in the published models.

    exp(log_a) is uniform from `lowest` to 16, and softplus(dt_bias) log-uniform from 0.001 to 0.1.
    """
    nn.init.uniform_(log_a, lowest, 16.0, generator=generator).log_()
    step = nn.init.uniform_(dt_bias, math.log(1e-3), math.log(1e-1), generator=generator).exp_()
    step.copy_(step + (-(-step).expm1()).log())  # the inverse of softplus


@torch.compiler.disable
def _by_library(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.simple_gla import chunk_simple_gla

    heads = v.shape[2]
    q, k = (x.to(v.dtype).expand(-1, -1, heads, -1).contiguous() for x in (q, k))  # its kernels know no shared heads
    y: Tensor
    if beta is None:
        y, _ = chunk_simple_gla(q, k, v.contiguous(), log_decay, scale=1.0)
    else:
        y, _ = chunk_gated_delta_rule(q, k, v.contiguous(), log_decay, beta.to(v.dtype), scale=1.0)
    return y


@cache
def library_trains(device: torch.device) -> bool:
    """Whether to use flash-linear-attention. If it cannot train on a GPU, this says why, once, on standard error."""
    if device.type != "cuda":
        return False
    if problem := library_problem():
        print(f"dynconv: recurrences run by plain matrix products, which is slower; {problem}", file=sys.stderr)
    return problem is None


def library_problem() -> str | None:
    """Why flash-linear-attention cannot train on this GPU, and what to do; None if it can."""
    if importlib.util.find_spec("fla") is None:
        return 'flash-linear-attention is not installed: pip install "dynconv[fla]"'
    import triton

    version = tuple(int(number) for number in re.findall(r"\d+", triton.__version__)[:3])
    # flash-linear-attention refuses these: https://github.com/fla-org/flash-linear-attention/issues/640
    if torch.cuda.get_device_capability()[0] == 9 and (3, 4, 0) <= version < (3, 7, 1):
        return (
            f"Triton {triton.__version__} computes its gradients wrongly on a Hopper GPU: upgrade to torch 2.12.1 or "
            "newer, which bring Triton 3.7.1"
        )
    return None
