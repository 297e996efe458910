"""Convolutions fused with their neighbours: a projection before; RoPE, SwiGLU or a residual stream after them.

`joined` is the output of one linear map: the channels of P parts (for example queries, keys and values), the outputs of
their generators, and perhaps padding, whose gradient is zero. The kernels read it as it is and, in the backward pass,
write the one gradient that the map needs; otherwise copies lay the parts' gradients and the generators' side by side.
RoPE or a sum by themselves would read and write their tensors once more, forward and backward. What the kernels do not
support is composed of a convolution and what follows it.

Shapes: B batch, T time, W taps, R rank, P parts, D channels of a part, H heads, E channels of a head, C columns of
`joined`. Filters are those of `lowrank_dynamic_convolution` with a segment for each part, of `static_convolution`, or
of `headwise_dynamic_convolution`, here one for each `head_size` channels and token.
RoPE (arXiv 2104.09864) rotates the token at time t by the angles t * frequencies: pairs of adjacent channels 2i and
2i + 1, as its paper and Meta's Llama have them. Models that pair channels i and i + E/2, as Hugging Face's Llama does,
pass `interleaved` weights and filters of queries and keys; attention does not see the order of channels, as long as it
is the same for queries and keys. That would tear the channels of a head-wise filter apart, so functions whose kernels
can do it rotate these pairs themselves with `halves`.
All functions raise ValueError for arguments that do not fit together.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from dynconv.ops import functions
from dynconv.ops.checks import check, check_flags, check_floating, check_sizes, kind_of, shown
from dynconv.ops.sharded import any_sharded


def has_fused_kernels(device: torch.device) -> bool:
    """Whether there are fused kernels for 16-bit tensors on this device. Elsewhere the functions here are composed of
    separate operations."""
    if not (functions._HAS_TRITON and device.type == "cuda"):
        return False
    from dynconv.ops import fused_operator

    return fused_operator.runs_on(device)


def interleaved(
    tensor: Tensor,  # [..., H*E, ...], where channels i and i + E/2 of a head are a pair
    heads: int,
    dim: int = 0,  # the dimension of channels: 0 for a linear map's weight, -1 for filters
) -> Tensor:
    """The channels reordered so that pairs are adjacent: within each head 0, E/2, 1, E/2 + 1, ...

    Raises ValueError if the dimension does not consist of so many heads of an even number of channels.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"tensor must be a tensor; got {kind_of(tensor)}; mind the order of the arguments")
    check_sizes(heads=heads)
    if not isinstance(dim, int) or not -tensor.dim() <= dim < tensor.dim():
        raise ValueError(f"dim must be one of {tensor.dim()} dimensions; got {shown(dim)}; pass that of the channels")
    first = dim % tensor.dim()
    if tensor.shape[first] % (2 * heads):
        raise ValueError(
            f"dim {dim} must hold {heads} heads of an even number of channels; got {tensor.shape[first]} channels; "
            "pass the tensor's own number of heads"
        )
    return tensor.unflatten(first, (heads, 2, -1)).transpose(first + 1, first + 2).flatten(first, first + 2)


class _Filters(NamedTuple):
    """The tensors and sizes that define the filters, in addition to the generators' columns of `joined`."""

    up: Tensor | None  # [R, W*P*D], of low-rank filters
    static_w: Tensor | None  # [W, P*D]
    width: int  # W
    head_size: int = 0  # channels of P*D that share a head-wise filter, whose W taps are columns; 0: there is none
    padded: bool = False  # each generator's R columns are followed by zeros up to a multiple of 16

    def columns(self, channels: int) -> int:
        """The number of columns of `joined` that the filters of `channels` channels take."""
        if self.up is not None:
            return len(self.up) + (-len(self.up) % 16 if self.padded else 0)
        return channels // self.head_size * self.width if self.head_size else 0


def lowrank_joined_convolution(
    joined: Tensor,  # [B, T, C]: the channels of the parts [P*D], the generators' outputs [P*R], and perhaps padding
    U: Tensor,  # [R, W*P*D]
    static_w: Tensor | None,  # [W, P*D]
    channels: int,  # D
    residual: bool = False,
    *,
    parts: int = 1,  # P
    added: Tensor | None = None,  # [B, T, D], such as the residual stream; only for one part
    padded: bool = False,
) -> tuple[Tensor, ...]:  # [B, T, D] for each part
    """`lowrank_dynamic_convolution` of each part; `added` is added to the result.

    If `padded`, the R outputs of each generator are followed by zeros up to a multiple of 16, as the kernels want them.
    """
    filters = _lowrank(joined, U, static_w, channels, parts, padded)
    return _joined(joined, filters, channels, residual, parts, added)


def static_joined_convolution(
    joined: Tensor,  # [B, T, C]: the channels of the parts [P*D], and perhaps padding
    static_w: Tensor,  # [W, P*D]
    channels: int,  # D
    residual: bool = False,
    *,
    parts: int = 1,  # P
    added: Tensor | None = None,  # [B, T, D]; only for one part
) -> tuple[Tensor, ...]:  # [B, T, D] for each part
    """`static_convolution` of each part; `added` is added to the result."""
    return _joined(joined, _static(joined, static_w, channels, parts), channels, residual, parts, added)


def headwise_joined_convolution(
    joined: Tensor,  # [B, T, C]: the channels of the parts [P*D], their filters [P*D/head_size * W], perhaps padding
    static_w: Tensor | None,  # [W, P*D]
    channels: int,  # D
    head_size: int,
    width: int,  # W
    residual: bool = False,
    *,
    parts: int = 1,  # P
    added: Tensor | None = None,  # [B, T, D]; only for one part
) -> tuple[Tensor, ...]:  # [B, T, D] for each part
    """`headwise_dynamic_convolution` of each part; `added` is added to the result."""
    filters = _headwise(joined, static_w, channels, parts, head_size, width)
    return _joined(joined, filters, channels, residual, parts, added)


def lowrank_gated_convolution(
    joined: Tensor,  # [B, T, C]: gate and up [D each], the generators' outputs [2*R], and perhaps padding
    U: Tensor,  # [R, W*2*D]
    static_w: Tensor | None,  # [W, 2*D]
    channels: int,  # D
    residual: bool = False,
    *,
    padded: bool = False,  # as for `lowrank_joined_convolution`
) -> Tensor:  # [B, T, D]
    """SwiGLU (arXiv 2002.05202): silu(gate) * up, each after `lowrank_dynamic_convolution`.

    Only the result is rounded and kept: the backward pass computes the convolutions again.
    """
    return _gated(joined, _lowrank(joined, U, static_w, channels, 2, padded), channels, residual)


def static_gated_convolution(
    joined: Tensor,  # [B, T, C]: gate and up [D each], and perhaps padding
    static_w: Tensor,  # [W, 2*D]
    channels: int,  # D
    residual: bool = False,
) -> Tensor:  # [B, T, D]
    """SwiGLU (arXiv 2002.05202): silu(gate) * up, each after `static_convolution`.

    Only the result is rounded and kept: the backward pass computes the convolutions again.
    """
    return _gated(joined, _static(joined, static_w, channels, 2), channels, residual)


def lowrank_rotary_convolution(
    joined: Tensor,  # [B, T, C]: queries, keys and values [D each], the generators' outputs [3*R], and perhaps padding
    U: Tensor,  # [R, W*3*D]
    static_w: Tensor | None,  # [W, 3*D]
    frequencies: Tensor,  # [E/2], float32: radians per token of each pair of channels
    heads: int,  # H
    residual: bool = False,
    *,
    padded: bool = False,  # as for `lowrank_joined_convolution`
) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, H, E] each
    """Queries and keys after `lowrank_dynamic_convolution` and RoPE, and values after convolution."""
    channels = _rotated_channels(joined, frequencies, heads)
    filters = _lowrank(joined, U, static_w, channels, 3, padded)
    return _rotary(joined, filters, channels, frequencies, residual, halves=False)


def static_rotary_convolution(
    joined: Tensor,  # [B, T, C]: queries, keys and values [D each], and perhaps padding
    static_w: Tensor,  # [W, 3*D]
    frequencies: Tensor,  # [E/2], float32: radians per token of each pair of channels
    heads: int,  # H
    residual: bool = False,
    *,
    halves: bool = False,  # RoPE's pairs are channels i and i + E/2 of a head, and not 2i and 2i + 1
) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, H, E] each
    """Queries and keys after `static_convolution` and RoPE, and values after convolution."""
    channels = _rotated_channels(joined, frequencies, heads)
    return _rotary(joined, _static(joined, static_w, channels, 3), channels, frequencies, residual, halves)


def headwise_rotary_convolution(
    joined: Tensor,  # [B, T, C]: queries, keys and values [D each], their filters [3*D/head_size * W], perhaps padding
    static_w: Tensor | None,  # [W, 3*D]
    frequencies: Tensor,  # [E/2], float32: radians per token of each pair of channels
    heads: int,  # H, of queries, and so on
    head_size: int,  # number of channels that share a filter; unrelated to the heads of attention
    width: int,  # W
    residual: bool = False,
    *,
    halves: bool = False,  # RoPE's pairs are channels i and i + E/2 of a head, and not 2i and 2i + 1
) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, H, E] each
    """Queries and keys after `headwise_dynamic_convolution` and RoPE, and values after convolution."""
    channels = _rotated_channels(joined, frequencies, heads)
    filters = _headwise(joined, static_w, channels, 3, head_size, width)
    return _rotary(joined, filters, channels, frequencies, residual, halves)


def _lowrank(joined: Tensor, up: Tensor, static_w: Tensor | None, channels: int, parts: int, padded: bool) -> _Filters:
    """The arguments as filters, checked."""
    check_floating(joined, "joined")
    check_sizes(channels=channels, parts=parts)
    check_flags(padded=padded)
    check(up, (None, None), "U", "[R, W*P*D]", joined)
    if up.numel() == 0 or up.shape[1] % (parts * channels):
        raise ValueError(
            f"U must be [R, W*P*D] with P = {parts} parts of D = {channels} channels; got {list(up.shape)}; "
            "pass the bases of all parts side by side"
        )
    filters = _Filters(up, static_w, up.shape[1] // (parts * channels), padded=padded)
    return _checked(joined, filters, channels, parts, "(D + R)")


def _static(joined: Tensor, static_w: Tensor, channels: int, parts: int) -> _Filters:
    """The arguments as filters, checked."""
    check_floating(joined, "joined")
    check_sizes(channels=channels, parts=parts)
    check(static_w, (None, parts * channels), "static_w", "[W, P*D]", joined)
    return _checked(joined, _Filters(None, static_w, static_w.shape[0]), channels, parts, "D")


def _headwise(
    joined: Tensor, static_w: Tensor | None, channels: int, parts: int, head_size: int, width: int
) -> _Filters:
    """The arguments as filters, checked."""
    check_sizes(channels=channels, parts=parts, head_size=head_size, width=width)
    if channels % head_size:
        raise ValueError(f"head_size must divide D = {channels}; got {head_size}; choose another")
    return _checked(joined, _Filters(None, static_w, width, head_size), channels, parts, "(D + D/head_size * W)")


def _checked(joined: Tensor, filters: _Filters, channels: int, parts: int, of_each: str) -> _Filters:
    """The same filters. Raises ValueError if they do not fit `joined`, whose columns for each part are `of_each`."""
    check_floating(joined, "joined")
    if joined.dim() != 3:
        raise ValueError(f"joined must be [B, T, C]; got {list(joined.shape)}; add or merge dimensions")
    if filters.width < 1:
        raise ValueError("W must be at least 1; got filters of no taps; pass tap 0, the current token's, at least")
    if filters.static_w is not None:
        check(filters.static_w, (filters.width, parts * channels), "static_w", "[W, P*D]", joined)
    least = parts * (channels + filters.columns(channels))
    if joined.shape[2] < least:
        raise ValueError(
            f"joined must have at least P * {of_each} = {least} columns; got {joined.shape[2]}; "
            "pass the parts and the generators' outputs side by side"
        )
    return filters


def _joined(
    joined: Tensor, filters: _Filters, channels: int, residual: bool, parts: int, added: Tensor | None
) -> tuple[Tensor, ...]:
    """Check `residual` and `added`, and convolve."""
    check_flags(residual=residual)
    if added is not None:
        if parts > 1:
            raise ValueError(f"added goes with one part; got {parts} parts; add it to the one that is meant")
        check(added, (*joined.shape[:2], channels), "added", "[B, T, D]", joined)
        added = added.to(joined.dtype)
    return _convolve(joined, filters, None, added, channels, parts, residual)


def _gated(joined: Tensor, filters: _Filters, channels: int, residual: bool) -> Tensor:
    """silu(gate) * up after convolution, by a fused kernel if it supports the inputs, else composed."""
    check_flags(residual=residual)
    if _may_launch(joined, filters.up, filters.static_w):
        from dynconv.ops import fused_operator

        up, static_w, width, _, padded = filters
        if fused_operator.fits(joined, up, None, channels, 2, width, 0, halves=False):
            return fused_operator.convolve_gated(joined, up, static_w, channels, width, residual, padded)
    gate, up = _composed(joined, filters, None, None, channels, 2, residual)
    return F.silu(gate) * up


def _rotated_channels(joined: Tensor, frequencies: Tensor, heads: int) -> int:
    """D, the number of channels of `heads` heads with E/2 frequencies. Raises ValueError if they do not fit."""
    check_floating(joined, "joined")
    check(frequencies, (None,), "frequencies", "[E/2]", joined)
    if frequencies.shape[0] == 0:
        raise ValueError("frequencies must be [E/2] of at least 1; got none; pass one for each pair of channels")
    check_sizes(heads=heads)
    return 2 * heads * len(frequencies)


def _rotary(
    joined: Tensor, filters: _Filters, channels: int, frequencies: Tensor, residual: bool, halves: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [B, T, H, E] after convolution, the first two after RoPE as well."""
    check_flags(residual=residual, halves=halves)
    results = _convolve(joined, filters, frequencies, None, channels, 3, residual, halves)
    q, k, v = (y.unflatten(2, (-1, 2 * len(frequencies))) for y in results)
    return q, k, v


def _convolve(
    joined: Tensor,  # [B, T, C]
    filters: _Filters,
    frequencies: Tensor | None,  # [E/2]
    added: Tensor | None,  # [B, T, D]
    channels: int,
    parts: int,
    residual: bool,
    halves: bool = False,
) -> tuple[Tensor, ...]:  # [B, T, D] each
    """The convolution by the fused kernels if they support the inputs, else composed."""
    up, static_w, width, head_size, padded = filters
    # The kernels do not compute the gradient of frequencies.
    learned = frequencies is not None and frequencies.requires_grad and torch.is_grad_enabled()
    if not learned and _may_launch(joined, up, static_w, added):
        # Imported here, so that a CPU user pays for neither Triton's import nor the operator's registration.
        from dynconv.ops import fused_operator

        if fused_operator.fits(joined, up, frequencies, channels, parts, width, head_size, halves):
            options = (channels, parts, width, head_size, residual, halves, padded)
            return fused_operator.convolve(joined, up, static_w, frequencies, added, *options)
    return _composed(joined, filters, frequencies, added, channels, parts, residual, halves)


def _may_launch(*tensors: Tensor | None) -> bool:
    """Whether fused kernels may be launched on these tensors: not under torch.func's transforms, nor on DTensors."""
    first = tensors[0]
    assert first is not None
    if not (functions._HAS_TRITON and (first.is_cuda or functions._INTERPRET)):
        return False
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return not transformed and forward_ad._current_level < 0 and not any_sharded(tensors)


def _composed(
    joined: Tensor,
    filters: _Filters,
    frequencies: Tensor | None,
    added: Tensor | None,
    channels: int,
    parts: int,
    residual: bool,
    halves: bool = False,
) -> tuple[Tensor, ...]:
    """As `_convolve`, from separate operations, each of which rounds its result."""
    x, generated, _ = joined.tensor_split((parts * channels, parts * (channels + filters.columns(channels))), 2)
    up, static_w, width, head_size, _ = filters
    if up is not None:
        generated = generated.unflatten(2, (parts, -1))[..., : len(up)].flatten(2)
        y = functions.lowrank_dynamic_convolution(x, generated, up, static_w, residual, segments=(channels,) * parts)
    elif head_size:
        weight = generated.unflatten(2, (-1, width))
        y = functions.headwise_dynamic_convolution(x, weight, static_w, residual)
    else:
        assert static_w is not None
        y = functions.static_convolution(x, static_w, residual)
    results = list(y.split(channels, 2))
    if added is not None:
        results[0] = results[0] + added
    if frequencies is not None:
        # Frequencies may be in 16 bits if the whole model was converted. Angles at large times need float32.
        frequencies = frequencies.to(torch.promote_types(frequencies.dtype, torch.float32))
        angle = torch.arange(x.shape[1], device=x.device, dtype=frequencies.dtype)[:, None] * frequencies
        results[:2] = (_rotated(result, angle, halves) for result in results[:2])
    return tuple(results)


def _rotated(
    x: Tensor,  # [B, T, H*E]
    angle: Tensor,  # [T, E/2]
    halves: bool,
) -> Tensor:  # [B, T, H*E]
    """x with each pair of channels rotated by its angle (RoPE)."""
    cosine, sine = angle.cos()[:, None], angle.sin()[:, None]
    pair = -2 if halves else -1
    sizes = (-1, 2, angle.shape[1]) if halves else (-1, angle.shape[1], 2)
    first, second = x.unflatten(2, sizes).unbind(pair)  # [B, T, H, E/2] each
    return torch.stack((first * cosine - second * sine, second * cosine + first * sine), pair).flatten(2).to(x.dtype)
