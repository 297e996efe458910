"""The low-rank convolution of queries, keys and values together with RoPE, in one launch each way.

By itself, RoPE reads and writes queries and keys once more, forward and backward, and copies lay the gradients of q, k,
v and of the generators' outputs side by side. Here the kernel reads all of them from the output of one projection,
rotates what it computed before it writes it, and its backward pass writes the one gradient that the projection needs.

Shapes: B batch, T time, W taps, R rank, H heads, E channels of a head, D = H*E, C columns of the projection's output.
RoPE (arXiv 2104.09864) rotates pairs of adjacent channels 2i and 2i + 1 here, as its paper and Meta's Llama have them.
Models that pair channels i and i + E/2, as Hugging Face's Llama does, pass `interleaved` weights and filters of queries
and keys. Attention does not see the order of channels, as long as it is the same for queries and keys.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dynconv.ops import functions
from dynconv.ops.checks import check, check_floating
from dynconv.ops.sharded import any_sharded


def interleaved(
    tensor: Tensor,  # [..., H*E, ...], where channels i and i + E/2 of a head are a pair
    heads: int,
    dim: int = 0,  # that of the channels; 0 for a linear map's weight, -1 for filters
) -> Tensor:
    """The same channels in an order in which pairs are adjacent: within each head 0, E/2, 1, E/2 + 1, ..."""
    first = dim % tensor.dim()
    return tensor.unflatten(first, (heads, 2, -1)).transpose(first + 1, first + 2).flatten(first, first + 2)


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
    channels = _check(joined, U, static_w, frequencies, heads)
    if _may_launch(joined, U, static_w):
        # Imported here, so that a CPU user pays for neither Triton's import nor the operator's registration.
        from dynconv.ops import fused_rotary_operator

        if fused_rotary_operator.fits(joined, U, channels):
            return fused_rotary_operator.convolve_and_rotate(joined, U, static_w, frequencies, heads, residual)
    return _composed(joined, U, static_w, frequencies, heads, residual)


def _check(joined: Tensor, up: Tensor, static_w: Tensor | None, frequencies: Tensor, heads: int) -> int:
    """D. Raises ValueError for arguments that do not fit together."""
    check_floating(joined, "joined")
    if joined.dim() != 3:
        raise ValueError(f"joined must be [B, T, C]; got {list(joined.shape)}; add or merge dimensions")
    check(frequencies, (None,), "frequencies", "[E/2]", joined)
    check(up, (None, None), "U", "[R, W*3*D]", joined)
    channels = 2 * heads * len(frequencies)
    if channels < 1 or up.shape[0] < 1 or up.shape[1] % (3 * channels) or up.shape[1] == 0:
        raise ValueError(
            f"U must be [R, W*3*D] with D = {channels} for {heads} heads and {len(frequencies)} frequencies; got "
            f"{list(up.shape)}; pass the bases of queries, keys and values side by side"
        )
    if static_w is not None:
        check(static_w, (up.shape[1] // (3 * channels), 3 * channels), "static_w", "[W, 3*D]", joined)
    if joined.shape[2] < 3 * (channels + up.shape[0]):
        raise ValueError(
            f"joined must have at least 3 * (D + R) = {3 * (channels + up.shape[0])} columns; got {joined.shape[2]}; "
            "pass queries, keys, values and the generators' outputs side by side"
        )
    return channels


def _may_launch(joined: Tensor, up: Tensor, static_w: Tensor | None) -> bool:
    """Whether there may be kernels for these tensors. Transforms of torch.func and DTensors are left to others."""
    if not (functions._HAS_TRITON and (joined.is_cuda or functions._INTERPRET)):
        return False
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return not transformed and forward_ad._current_level < 0 and not any_sharded((joined, up, static_w))


def _composed(
    joined: Tensor, up: Tensor, static_w: Tensor | None, frequencies: Tensor, heads: int, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from a convolution and a rotation, which round one after the other."""
    x, z = parts(joined, up, frequencies, heads)
    widths = (x.shape[2] // 3,) * 3
    y = functions.lowrank_dynamic_convolution(x, z, up, static_w, residual, segments=widths)
    q, k, v = y.unflatten(2, (3, heads, -1)).unbind(2)
    angle = torch.arange(x.shape[1], device=x.device, dtype=frequencies.dtype)[:, None] * frequencies
    cosine, sine = angle.cos()[:, None], angle.sin()[:, None]  # [T, 1, E/2]

    def rotated(value: Tensor) -> Tensor:  # [B, T, H, E]
        first, second = value[..., 0::2], value[..., 1::2]
        pairs = torch.stack((first * cosine - second * sine, second * cosine + first * sine), -1)
        return pairs.flatten(-2).to(value.dtype)

    return rotated(q), rotated(k), v


def parts(joined: Tensor, up: Tensor, frequencies: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Views of what is convolved [B, T, 3*D], and of the generators' outputs [B, T, 3*R]."""
    channels = 6 * heads * len(frequencies)
    return joined[..., :channels], joined[..., channels : channels + 3 * len(up)]
