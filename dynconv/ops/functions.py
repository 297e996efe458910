"""The convolution functions: they check their arguments and run on the best implementation for the device.

Shapes: B batch, T time, D channels, H heads of filters (H divides D), W taps, R rank, G segments.
Tap 0 is the current token. The result has x's dtype; the arithmetic is in float32.
"""

import importlib.util
import os

import torch
from torch import Tensor

from dynconv.ops import reference

# Triton's interpreter runs the kernels on CPU tensors. Triton itself reads the same variable.
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_WIDTH = 8


def static_convolution(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [W, D]
    residual: bool = False,
    *,
    cu_seqlens: Tensor | None = None,  # [N + 1] int: where documents start in T, and T; needs B = 1
) -> Tensor:  # [B, T, D]
    """y[b,t,d] = sum_w weight[w,d] x[b,t-w,d] (+ x[b,t,d]); nothing crosses a document's start."""
    _check_input(x)
    _check(weight, (None, x.shape[2]), "weight", "[W, D]", x)
    return _convolve(x, None, None, weight, cu_seqlens, (), residual)


def headwise_dynamic_convolution(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [B, T, H, W]
    static_w: Tensor | None = None,  # [W, D]
    residual: bool = False,
    *,
    cu_seqlens: Tensor | None = None,  # [N + 1] int: where documents start in T, and T; needs B = 1
) -> Tensor:  # [B, T, D]
    """One filter per token for each group of D/H consecutive channels, plus an optional static one.

    y[b,t,d] = sum_w (weight[b,t,d//(D/H),w] + static_w[w,d]) x[b,t-w,d] (+ x[b,t,d]).
    """
    _check_input(x)
    batch, time, channels = x.shape
    _check(weight, (batch, time, None, None), "weight", "[B, T, H, W]", x)
    heads, width = weight.shape[2:]
    if heads == 0 or channels % heads:
        raise ValueError(f"H must divide D; got H = {heads} and D = {channels}; choose another head size")
    if static_w is not None:
        _check(static_w, (width, channels), "static_w", "[W, D]", x)
    return _convolve(x, None, weight, static_w, cu_seqlens, (), residual)


def lowrank_dynamic_convolution(
    x: Tensor,  # [B, T, D]
    z: Tensor,  # [B, T, G*R]
    U: Tensor,  # [R, W*D]
    static_w: Tensor | None = None,  # [W, D]
    residual: bool = False,
    *,
    cu_seqlens: Tensor | None = None,  # [N + 1] int: where documents start in T, and T; needs B = 1
    segments: tuple[int, ...] | list[int] | None = None,  # G widths that add up to D; None: one segment
) -> Tensor:  # [B, T, D]
    """Every channel has its own filter: (z U) viewed [W, D], plus an optional static one.

    With segments, the channels are G runs of the given widths (Q, K and V side by side, say), and run g's
    filters are made from z's g-th R columns.
    """
    _check_input(x)
    batch, time, channels = x.shape
    _check(U, (None, None), "U", "[R, W*D]", x)
    if U.numel() == 0 or U.shape[1] % channels:
        raise ValueError(f"U must be [R, W*D] with D = {channels}; got {list(U.shape)}; pass U.reshape(R, W*D)")
    runs = (channels,) if segments is None else tuple(segments)
    if sum(runs) != channels or min(runs) < 1:
        raise ValueError(f"segments must be positive and add up to D = {channels}; got {runs}")
    _check(z, (batch, time, len(runs) * U.shape[0]), "z", "[B, T, G*R]", x)
    if static_w is not None:
        _check(static_w, (U.shape[1] // channels, channels), "static_w", "[W, D]", x)
    return _convolve(x, z, U, static_w, cu_seqlens, runs, residual)


def _convolve(
    x: Tensor,  # [B, T, D]
    z: Tensor | None,
    weight: Tensor | None,
    static_w: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: tuple[int, ...],
    residual: bool,
) -> Tensor:  # [B, T, D]
    positions = None if cu_seqlens is None else _positions(x, cu_seqlens)
    if _HAS_TRITON and (x.is_cuda or _INTERPRET) and x.dtype in _KERNEL_DTYPES:
        # Imported here, so that a CPU user pays for neither Triton's import nor the op's registration.
        from dynconv.ops.operator import convolve

        return convolve(x, z, weight, static_w, positions, segments, residual)
    return reference.convolve(x, z, weight, static_w, positions, segments, residual)


def _positions(
    x: Tensor,  # [1, T, D]
    cu_seqlens: Tensor,  # [N + 1]
) -> Tensor:  # [T] int32
    """Each token's place in its document."""
    batch, time, _ = x.shape
    if batch != 1:
        raise ValueError(f"cu_seqlens needs B = 1; got B = {batch}; pass x.reshape(1, B*T, D)")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be [N + 1] int32 or int64; got {list(cu_seqlens.shape)} {cu_seqlens.dtype}; "
            "pass the documents' starts and T"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on {x.device}; got {cu_seqlens.device}; move it")
    if not cu_seqlens.is_cuda and not torch.compiler.is_compiling():  # reading a GPU's values would stall it
        edges = cu_seqlens.tolist()
        if len(edges) < 2 or edges[0] != 0 or edges[-1] != time or sorted(edges) != edges:
            raise ValueError(f"cu_seqlens must rise from 0 to T = {time}; got {edges}; pass the starts and T")
    steps = torch.arange(time, dtype=cu_seqlens.dtype, device=x.device)
    document = torch.searchsorted(cu_seqlens, steps, right=True) - 1
    return (steps - cu_seqlens[document]).int()


def _check_input(x: Tensor) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, D]; got {list(x.shape)}; add or merge dimensions")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point; got {x.dtype}; convert it")


def _check(tensor: Tensor, shape: tuple[int | None, ...], name: str, letters: str, x: Tensor) -> None:
    fits = tensor.dim() == len(shape) and all(
        want is None or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        want = [n if n is not None else "any" for n in shape]
        raise ValueError(f"{name} must be {letters} = {want}; got {list(tensor.shape)}; reshape or transpose it")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x; got {tensor.device}; move it")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point; got {tensor.dtype}; convert it")
