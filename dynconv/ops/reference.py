"""The convolutions in plain PyTorch: any device, any dtype, differentiable by autograd.

This defines the result. Tests compare the kernels with it in float64, and it runs wherever the kernels cannot.

Shapes: B batch, T time, D channels, H heads of filters (H divides D), W taps, R rank, G segments.
Tap 0 is the current token, so every filter is causal by construction.
Source: Dynamic Short Convolutions Improve Transformers, arXiv 2606.03825, section 2.
"""

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def convolve(
    x: Tensor,  # [B, T, D]
    z: Tensor | None,  # [B, T, G*R]: low-rank
    weight: Tensor | None,  # [B, T, H, W]: head-wise; [R, W*D]: low-rank; None: static
    static_w: Tensor | None,  # [W, D]
    positions: Tensor | None,  # [T + 1] int32: each token's index in its document, then the padding's length; or None
    segments: tuple[int, ...],  # low-rank: the widths of the G segments of D; empty means one segment
    residual: bool,
    silu: bool = False,
    history: Tensor | None = None,  # [B, W-1, D]: the inputs before x, oldest first; zeros by default
) -> Tensor:  # [B, T, D], x's dtype
    """y[b,t,d] = sum_w filter[b,t,w,d] x[b,t-w,d] (+ x[b,t,d]), with zeros before a document's start.

    With `silu`, silu is applied to the sum before x is added.
    The filter is static_w[w,d] plus a dynamic filter: weight[b,t,d//(D/H),w] (head-wise); z @ weight viewed as [W, D],
    with the columns of z that belong to d's segment (low-rank); or nothing (static).
    16-bit inputs are converted to float32 first, and the result is rounded to x's dtype once.
    """
    channels, dtype = x.shape[2], x.dtype
    x, z, weight, static_w, history = (_at_least_float32(t) for t in (x, z, weight, static_w, history))
    inside = place = None
    if positions is not None:
        place = positions[:-1, None]  # [T, 1]
        inside = torch.arange(x.shape[1], device=x.device)[:, None] + positions[-1] < x.shape[1]
        x = torch.where(inside, x, 0.0)  # padding after the last document must affect nothing, even if NaN
        z = None if z is None else torch.where(inside, z, 0.0)
        if weight is not None and z is None:
            weight = torch.where(inside[..., None], weight, 0.0)
    taps = static_w
    if weight is not None:
        taps = _headwise(weight, channels) if z is None else _lowrank(z, weight, channels, segments)
        if static_w is not None:
            taps = taps + static_w
    assert taps is not None
    time, width = x.shape[1], taps.shape[-2]
    padded = F.pad(x, (0, 0, width - 1, 0)) if history is None else torch.cat([history.to(dtype).to(x.dtype), x], 1)
    y = x if residual and not silu else None
    for tap in range(width):
        earlier = padded[:, width - 1 - tap :][:, :time]
        if place is not None and tap > 0:
            # Mask before the product: a mask after it would give gradients of zero times NaN if a token outside is NaN.
            earlier = torch.where(place >= tap, earlier, 0.0)
        term = taps[..., tap, :] * earlier
        y = term if y is None else y + term
    assert y is not None
    if silu:
        y = F.silu(y) + x if residual else F.silu(y)
    if inside is not None:
        y = torch.where(inside, y, 0.0)
    return y.to(dtype)


def _at_least_float32(tensor: Any) -> Any:  # Tensor or None
    return tensor if tensor is None else tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _headwise(
    weight: Tensor,  # [B, T, H, W]
    channels: int,
) -> Tensor:  # [B, T, W, D]
    """Head-wise filters as a filter for every channel."""
    return weight.transpose(2, 3).repeat_interleave(channels // weight.shape[2], dim=3)


def _lowrank(
    z: Tensor,  # [B, T, G*R]
    up: Tensor,  # [R, W*D]
    channels: int,
    segments: tuple[int, ...],
) -> Tensor:  # [B, T, W, D]
    """Low-rank filters z U as a filter for every channel."""
    dtype = torch.promote_types(z.dtype, up.dtype)
    z, up = z.to(dtype), up.to(dtype)
    with torch.autocast(z.device.type, enabled=False) if z.device.type != "meta" else contextlib.nullcontext():
        if len(segments) <= 1:
            return (z @ up).unflatten(2, (-1, channels))
        bases = up.unflatten(1, (-1, channels)).split(segments, dim=2)  # each [R, W, D of the segment]
        generators = z.chunk(len(segments), dim=2)
        taps = [
            torch.einsum("btr,rwd->btwd", generator, basis) for generator, basis in zip(generators, bases, strict=True)
        ]
        return torch.cat(taps, dim=3)
