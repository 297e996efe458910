"""The low-rank convolution fused with its neighbours: a projection before; RoPE, SwiGLU or a residual stream after it.

`joined` is the output of one linear map: the channels of P parts (for example queries, keys and values), the outputs of
their generators, and perhaps padding. The kernels read it as it is and, in the backward pass, write the one gradient
that the map needs; otherwise copies lay the parts' gradients and the generators' side by side. RoPE or a sum by
themselves would read and write their tensors once more, forward and backward.

Shapes: B batch, T time, W taps, R rank, P parts, D channels of a part, H heads, E channels of a head, C columns of
`joined`.
RoPE (arXiv 2104.09864) rotates pairs of adjacent channels 2i and 2i + 1 here, as its paper and Meta's Llama have them.
Models that pair channels i and i + E/2, as Hugging Face's Llama does, pass `interleaved` weights and filters of queries
and keys. Attention does not see the order of channels, as long as it is the same for queries and keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from dynconv.ops import functions
from dynconv.ops.checks import check, check_floating
from dynconv.ops.sharded import any_sharded


def has_fused_kernels(device: torch.device) -> bool:
    """Whether there are kernels for tensors of 16 bits on this device; elsewhere the functions here are composed."""
    if not (functions._HAS_TRITON and device.type == "cuda"):
        return False
    from dynconv.ops import fused_operator

    return fused_operator.runs_on(device)


def interleaved(
    tensor: Tensor,  # [..., H*E, ...], where channels i and i + E/2 of a head are a pair
    heads: int,
    dim: int = 0,  # that of the channels; 0 for a linear map's weight, -1 for filters
) -> Tensor:
    """The same channels in an order in which pairs are adjacent: within each head 0, E/2, 1, E/2 + 1, ..."""
    first = dim % tensor.dim()
    return tensor.unflatten(first, (heads, 2, -1)).transpose(first + 1, first + 2).flatten(first, first + 2)


def lowrank_joined_convolution(
    joined: Tensor,  # [B, T, C]: the channels of the parts [P*D], the generators' outputs [P*R], and perhaps padding
    U: Tensor,  # [R, W*P*D]
    static_w: Tensor | None,  # [W, P*D]
    channels: int,  # D
    residual: bool = False,
    *,
    parts: int = 1,  # P
    added: Tensor | None = None,  # [B, T, D], such as the residual stream; only for one part
) -> tuple[Tensor, ...]:  # [B, T, D] for each part
    """`lowrank_dynamic_convolution` of each part; `added` is added to the result.

    Columns after the generators' outputs have gradient zero. Raises ValueError for arguments that do not fit together.
    """
    _check(joined, U, static_w, channels, parts)
    if added is not None:
        if parts > 1:
            raise ValueError(f"added goes with one part; got {parts} parts; add it to the one that is meant")
        check(added, (*joined.shape[:2], channels), "added", "[B, T, D]", joined)
        added = added.to(joined.dtype)
    return _convolve(joined, U, static_w, None, added, channels, parts, residual)


def lowrank_gated_convolution(
    joined: Tensor,  # [B, T, C]: gate and up [D each], the generators' outputs [2*R], and perhaps padding
    U: Tensor,  # [R, W*2*D]
    static_w: Tensor | None,  # [W, 2*D]
    channels: int,  # D
    residual: bool = False,
) -> Tensor:  # [B, T, D]
    """SwiGLU (arXiv 2002.05202): silu(gate) * up, each after `lowrank_dynamic_convolution`.

    Only the result is rounded and kept: the backward pass computes the convolutions again. Columns after the
    generators' outputs have gradient zero. Raises ValueError for arguments that do not fit together.
    """
    _check(joined, U, static_w, channels, 2)
    if _may_launch(joined, U, static_w):
        from dynconv.ops import fused_operator

        if fused_operator.fits(joined, U, channels, 2):
            return fused_operator.convolve_gated(joined, U, static_w, channels, residual)
    gate, up = _composed(joined, U, static_w, None, None, channels, 2, residual)
    return F.silu(gate) * up


def lowrank_rotary_convolution(
    joined: Tensor,  # [B, T, C]: queries, keys and values [D each], the generators' outputs [3*R], and perhaps padding
    U: Tensor,  # [R, W*3*D]
    static_w: Tensor | None,  # [W, 3*D]
    frequencies: Tensor,  # [E/2], float32: radians per token of each pair of channels
    heads: int,  # H
    residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, H, E] each
    """Queries and keys after convolution and RoPE, and values after convolution.

    The convolution is `lowrank_dynamic_convolution` with three segments. The token at time t is rotated by the angles
    t * frequencies. Columns after the generators' outputs have gradient zero. Raises ValueError for arguments that do
    not fit together.
    """
    check_floating(joined, "joined")
    check(frequencies, (None,), "frequencies", "[E/2]", joined)
    channels = 2 * heads * len(frequencies)
    _check(joined, U, static_w, channels, 3)
    results = _convolve(joined, U, static_w, frequencies, None, channels, 3, residual)
    q, k, v = (y.unflatten(2, (heads, -1)) for y in results)
    return q, k, v


def _check(joined: Tensor, up: Tensor, static_w: Tensor | None, channels: int, parts: int) -> None:
    """Raises ValueError for arguments that do not fit together."""
    check_floating(joined, "joined")
    if joined.dim() != 3:
        raise ValueError(f"joined must be [B, T, C]; got {list(joined.shape)}; add or merge dimensions")
    check(up, (None, None), "U", "[R, W*P*D]", joined)
    if channels < 1 or parts < 1 or up.numel() == 0 or up.shape[1] % (parts * channels):
        raise ValueError(
            f"U must be [R, W*P*D] with P = {parts} parts of D = {channels} channels; got {list(up.shape)}; "
            "pass the bases of all parts side by side"
        )
    if static_w is not None:
        check(static_w, (up.shape[1] // (parts * channels), parts * channels), "static_w", "[W, P*D]", joined)
    least = parts * (channels + up.shape[0])
    if joined.shape[2] < least:
        raise ValueError(
            f"joined must have at least P * (D + R) = {least} columns; got {joined.shape[2]}; "
            "pass the parts and the generators' outputs side by side"
        )


def _convolve(
    joined: Tensor,  # [B, T, C]
    up: Tensor,  # [R, W*P*D]
    static_w: Tensor | None,  # [W, P*D]
    frequencies: Tensor | None,  # [E/2]
    added: Tensor | None,  # [B, T, D]
    channels: int,
    parts: int,
    residual: bool,
) -> tuple[Tensor, ...]:  # [B, T, D] each
    """The convolution by the fused kernels if they support the inputs, else composed."""
    if _may_launch(joined, up, static_w, added):
        # Imported here, so that a CPU user pays for neither Triton's import nor the operator's registration.
        from dynconv.ops import fused_operator

        if fused_operator.fits(joined, up, channels, parts):
            return fused_operator.convolve(joined, up, static_w, frequencies, added, channels, parts, residual)
    return _composed(joined, up, static_w, frequencies, added, channels, parts, residual)


def _may_launch(*tensors: Tensor | None) -> bool:
    """Whether there may be kernels for these tensors. Transforms of torch.func and DTensors are left to others."""
    first = tensors[0]
    assert first is not None
    if not (functions._HAS_TRITON and (first.is_cuda or functions._INTERPRET)):
        return False
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return not transformed and forward_ad._current_level < 0 and not any_sharded(tensors)


def _composed(
    joined: Tensor,
    up: Tensor,
    static_w: Tensor | None,
    frequencies: Tensor | None,
    added: Tensor | None,
    channels: int,
    parts: int,
    residual: bool,
) -> tuple[Tensor, ...]:
    """The same from a convolution and what follows it, which round one after the other."""
    x, z = joined[..., : parts * channels], joined[..., parts * channels : parts * (channels + len(up))]
    y = functions.lowrank_dynamic_convolution(x, z, up, static_w, residual, segments=(channels,) * parts)
    results = list(y.split(channels, 2))
    if added is not None:
        results[0] = results[0] + added
    if frequencies is not None:
        angle = torch.arange(x.shape[1], device=x.device, dtype=frequencies.dtype)[:, None] * frequencies
        results[:2] = (_rotated(result, angle) for result in results[:2])
    return tuple(results)


def _rotated(
    x: Tensor,  # [B, T, H*E]
    angle: Tensor,  # [T, E/2]
) -> Tensor:  # [B, T, H*E]
    cosine, sine = angle.cos()[:, None], angle.sin()[:, None]
    first, second = x.unflatten(2, (-1, angle.shape[1], 2)).unbind(-1)  # [B, T, H, E/2] each
    return torch.stack((first * cosine - second * sine, second * cosine + first * sine), -1).flatten(2).to(x.dtype)
