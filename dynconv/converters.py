"""Weights and decoding states of other implementations, converted to those of `dynconv.layers` and back.

Every function maps the state dict of one module, without prefixes, to another, and changes no value: converting there
and back gives the same bits. Weights are contiguous, as files (safetensors) and fully_shard want them; a result may
share memory with what was given.

Legend: D channels, W taps, R rank, G width of the generator's input, N sequences. Tap 0 is the current token here;
nn.Conv1d and everything built on it (causal-conv1d, flash-linear-attention, attention-gym) store that tap last.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

# The names of dynconv.layers.LowRankDynamicConv, and those of the module that the paper's authors publish:
# https://github.com/OliverSieberling/dynamic-conv1d, README.md, as of June 2026.
_PAPER_NAMES = {"down.weight": "proj_in.weight", "up": "proj_out", "static_filter": "proj_out_bias"}


def from_conv1d(
    state: Mapping[str, Tensor],  # "weight": [D, 1, W], or [D, W]; optionally "bias": [D]
) -> dict[str, Tensor]:  # "static_filter": [W, D]; "bias": [D] if there was one
    """The weights of a depthwise nn.Conv1d, as StaticShortConv holds them.

    Such are the weights of causal-conv1d, of flash-linear-attention's ShortConvolution and of attention-gym. None of
    them adds its input, so build the module with `residual=False`; and with `bias=True` if there is a bias.
    """
    _check_names(state, required=("weight",), optional=("bias",))
    weight = state["weight"]
    if weight.dim() == 3 and weight.shape[1] == 1:
        weight = weight[:, 0]
    if weight.dim() != 2:
        raise ValueError(
            f"weight must be [D, 1, W] or [D, W]; got {list(weight.shape)}; only depthwise convolutions are converted"
        )
    return {"static_filter": weight.flip(1).t().contiguous()} | _with_bias(state)


def to_conv1d(
    state: Mapping[str, Tensor],  # "static_filter": [W, D]; optionally "bias": [D]
) -> dict[str, Tensor]:  # "weight": [D, 1, W]; "bias": [D] if there was one
    """The inverse of `from_conv1d`, as nn.Conv1d and flash-linear-attention's ShortConvolution load it.

    causal-conv1d and attention-gym take the weight as [D, W]: pass `weight.squeeze(1)`. They do not add the input; for
    a module with `residual=True`, add it to their result.
    """
    _check_names(state, required=("static_filter",), optional=("bias",))
    return {"weight": state["static_filter"].t().flip(1)[:, None].contiguous()} | _with_bias(state)


def from_paper(
    state: Mapping[str, Tensor],  # "proj_in.weight": [R, G], "proj_out": [R, W*D], "proj_out_bias": [W, D]
) -> dict[str, Tensor]:  # "down.weight", "up", "static_filter", of the same shapes
    """The weights of the paper's low-rank module, as LowRankDynamicConv holds them.

    Only the names differ. The head-wise form and all functions take the same tensors in both implementations.
    """
    _check_names(state, required=tuple(_PAPER_NAMES.values()))
    return {ours: state[theirs] for ours, theirs in _PAPER_NAMES.items()}


def to_paper(
    state: Mapping[str, Tensor],  # "down.weight": [R, G], "up": [R, W*D], "static_filter": [W, D]
) -> dict[str, Tensor]:  # "proj_in.weight", "proj_out", "proj_out_bias", of the same shapes
    """The inverse of `from_paper`. The paper's kernels need R + 1 to be a power of two, and add the input."""
    _check_names(state, required=tuple(_PAPER_NAMES))
    return {theirs: state[ours] for ours, theirs in _PAPER_NAMES.items()}


def state_from_channels_first(
    state: Tensor,  # [N, D, L], with L of at least W-1: the last L inputs, the latest last
    width: int,  # W
) -> Tensor:  # [N, W-1, D]
    """The state for `dynconv` from one of causal-conv1d (L is W-1 or more) or flash-linear-attention (L is W)."""
    if state.dim() != 3 or state.shape[2] < width - 1:
        raise ValueError(
            f"state must be [N, D, L] with L of at least W-1 = {width - 1}; got {list(state.shape)}; "
            "pass a state of a convolution of this width"
        )
    return state[:, :, state.shape[2] - (width - 1) :].transpose(1, 2)


def state_to_channels_first(
    state: Tensor,  # [N, W-1, D]
    length: int,  # L: W-1 or more for causal-conv1d, W for flash-linear-attention
) -> Tensor:  # [N, D, L]
    """The inverse of `state_from_channels_first`, with zeros for inputs that lie too far back to be read again."""
    if state.dim() != 3 or length < state.shape[1]:
        raise ValueError(
            f"length must be at least W-1; got {length} for a state {list(state.shape)}; pass that of the other state"
        )
    return F.pad(state.transpose(1, 2), (length - state.shape[1], 0))


def _with_bias(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"bias": state["bias"]} if "bias" in state else {}


def _check_names(state: Mapping[str, Tensor], required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless the state dict has the required names, and no other than these and the optional ones."""
    if not set(required) <= set(state) <= {*required, *optional}:
        wanted = ", ".join(required) + "".join(f" and perhaps {name}" for name in optional)
        raise ValueError(
            f"the state dict must hold {wanted}; got {', '.join(sorted(state)) or 'nothing'}; "
            "pass one module's own, without prefixes"
        )
