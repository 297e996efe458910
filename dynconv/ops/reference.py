"""The convolutions in plain PyTorch: any device, any dtype, differentiable by autograd.

This is the definition the kernels are held to (in float64) and what runs where Triton cannot.

Shapes: B batch, T time, D channels, H heads of filters (H divides D), W taps, R rank.
Tap 0 is the current token, so every filter is causal by construction.
Source: Dynamic Short Convolutions Improve Transformers, arXiv 2606.03825, section 2.
"""

import torch.nn.functional as F
from torch import Tensor


def static_convolution(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [W, D]
    residual: bool = False,
) -> Tensor:  # [B, T, D]
    """y[b,t,d] = sum_w weight[w,d] x[b,t-w,d] (+ x[b,t,d])."""
    _check_input(x)
    _check(weight, (None, x.shape[2]), "weight", "[W, D]")
    return _convolve(x, weight, residual)


def headwise_dynamic_convolution(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [B, T, H, W]
    static_w: Tensor | None = None,  # [W, D]
    residual: bool = False,
) -> Tensor:  # [B, T, D]
    """One filter per token for each group of D/H consecutive channels, plus an optional static one.

    y[b,t,d] = sum_w (weight[b,t,d//(D/H),w] + static_w[w,d]) x[b,t-w,d] (+ x[b,t,d]).
    """
    _check_input(x)
    batch, time, channels = x.shape
    _check(weight, (batch, time, None, None), "weight", "[B, T, H, W]")
    heads, width = weight.shape[2:]
    if channels % heads:
        raise ValueError(f"H must divide D; got H = {heads} and D = {channels}; choose another head size")
    taps = weight.transpose(2, 3).repeat_interleave(channels // heads, dim=3)
    if static_w is not None:
        _check(static_w, (width, channels), "static_w", "[W, D]")
        taps = taps + static_w
    return _convolve(x, taps, residual)


def lowrank_dynamic_convolution(
    x: Tensor,  # [B, T, D]
    z: Tensor,  # [B, T, R]
    U: Tensor,  # [R, W*D]
    static_w: Tensor | None = None,  # [W, D]
    residual: bool = False,
) -> Tensor:  # [B, T, D]
    """Every channel has its own filter: (z U) viewed [W, D], plus an optional static one."""
    _check_input(x)
    batch, time, channels = x.shape
    _check(z, (batch, time, None), "z", "[B, T, R]")
    _check(U, (z.shape[2], None), "U", "[R, W*D]")
    if U.shape[1] == 0 or U.shape[1] % channels:
        raise ValueError(
            f"U must be [R, W*D] with D = {channels}; got {list(U.shape)}; pass U.reshape(R, W*D)"
        )
    taps = (z @ U).unflatten(2, (-1, channels))
    if static_w is not None:
        _check(static_w, (taps.shape[2], channels), "static_w", "[W, D]")
        taps = taps + static_w
    return _convolve(x, taps, residual)


def _convolve(
    x: Tensor,  # [B, T, D]
    taps: Tensor,  # [W, D] or [B, T, W, D]
    residual: bool,
) -> Tensor:  # [B, T, D]
    time, width = x.shape[1], taps.shape[-2]
    padded = F.pad(x, (0, 0, width - 1, 0))
    terms = [taps[..., tap, :] * padded[:, width - 1 - tap :][:, :time] for tap in range(width)]
    return sum(terms, start=x) if residual else sum(terms[1:], start=terms[0])


def _check_input(x: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, D]; got {list(x.shape)}; add or merge dimensions")


def _check(tensor: Tensor, shape: tuple[int | None, ...], name: str, letters: str) -> None:
    fits = tensor.dim() == len(shape) and all(
        want is None or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        want = [n if n is not None else "any" for n in shape]
        raise ValueError(
            f"{name} must be {letters} = {want}; got {list(tensor.shape)}; reshape or transpose it"
        )
