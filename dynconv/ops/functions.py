"""The convolution functions: they check their arguments and run on the best implementation for the device.

Shapes: B batch, T time, D channels, H heads of filters (H divides D), W taps, R rank, G segments, N sequences: B, or
as many documents as cu_seqlens names. Tap 0 is the current token. The result has x's dtype. Sums are in float32 (of
float64 inputs in float64), and so is silu of them; in the low-rank kernels z, U, the gradient of what silu is applied
to, and the gradients' products are rounded to x's dtype first, as in a matrix product.
All tensors may be DTensors; see `sharded` for how they may lie, which each function checks.
Rows of views are read where they lie if their last dimension is contiguous; on a GPU some kernels copy 16-bit rows
whose strides are no multiples of 16. Keywords of all three functions:

cu_seqlens [N+1], int32 or int64: x is [1, T, D] and holds documents that start at these places, and the last one's end;
nothing crosses them. What follows that end is padding: it is not read, its outputs are zeros, and so are its gradients.
The places rise from 0 to T at most, which is checked on a CPU only: on a GPU it is the caller's duty, as reading them
would stall it.
initial_state [N, W-1, D]: the inputs before x, oldest first; zeros by default.
return_final_state: the result is (y, state [N, W-1, D]), the state to go on from.
activation: None or "silu"; y = silu(conv) (+ x).
bias [D]: added to the convolution, before silu. And `residual` may be a tensor [B, T, D], which is added in place of x.
No kernel has these two: they cost passes over float32 copies of x and y, and y is rounded once.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from dynconv.ops import reference, sharded
from dynconv.ops.checks import as_segments, check, check_floating, check_input, kind_of
from dynconv.ops.documents import final_state, find_documents

# Triton's interpreter runs the kernels on CPU tensors. Triton itself reads the same variable.
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_WIDTH = 8  # of the kernels; the reference takes any
_FEW_TOKENS = 8  # a decoding step: fewer launches through the reference than through the kernels


class _Filters(NamedTuple):
    """What makes the filters; see `reference.convolve`."""

    z: Tensor | None
    weight: Tensor | None
    static_w: Tensor | None
    segments: tuple[int, ...]
    width: int

    def of_tokens(self, take: Callable[[Tensor], Tensor]) -> "_Filters":
        """Those of the tokens that `take` picks from a tensor [B, T, ...]."""
        if self.z is not None:
            return self._replace(z=take(self.z))
        return self if self.weight is None else self._replace(weight=take(self.weight))


def static_convolution(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [W, D]
    residual: bool | Tensor = False,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    activation: str | None = None,
    bias: Tensor | None = None,
) -> Any:  # Tensor [B, T, D]; with return_final_state, that and a state [N, W-1, D]
    """y[b,t,d] = sum_w weight[w,d] x[b,t-w,d] (+ x[b,t,d])."""
    check_input(x)
    check(weight, (None, x.shape[2]), "weight", "[W, D]", x)
    filters = _Filters(None, None, weight, (), weight.shape[0])
    return _run(x, filters, residual, cu_seqlens, initial_state, return_final_state, activation, bias)


def headwise_dynamic_convolution(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [B, T, H, W]
    static_w: Tensor | None = None,  # [W, D]
    residual: bool | Tensor = False,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    activation: str | None = None,
    bias: Tensor | None = None,
) -> Any:  # Tensor [B, T, D]; with return_final_state, that and a state [N, W-1, D]
    """One filter per token for each group of D/H consecutive channels, plus an optional static one.

    y[b,t,d] = sum_w (weight[b,t,d//(D/H),w] + static_w[w,d]) x[b,t-w,d] (+ x[b,t,d]).
    """
    check_input(x)
    batch, time, channels = x.shape
    check(weight, (batch, time, None, None), "weight", "[B, T, H, W]", x)
    heads, width = weight.shape[2:]
    if heads == 0 or channels % heads:
        raise ValueError(f"H must divide D; got H = {heads} and D = {channels}; choose another head size")
    if static_w is not None:
        check(static_w, (width, channels), "static_w", "[W, D]", x)
    filters = _Filters(None, weight, static_w, (), width)
    return _run(x, filters, residual, cu_seqlens, initial_state, return_final_state, activation, bias)


def lowrank_dynamic_convolution(
    x: Tensor,  # [B, T, D]
    z: Tensor,  # [B, T, G*R]
    U: Tensor,  # [R, W*D]
    static_w: Tensor | None = None,  # [W, D]
    residual: bool | Tensor = False,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    activation: str | None = None,
    bias: Tensor | None = None,
    segments: tuple[int, ...] | list[int] | None = None,
) -> Any:  # Tensor [B, T, D]; with return_final_state, that and a state [N, W-1, D]
    """Every channel has its own filter: (z U) viewed [W, D], plus an optional static one.

    `segments`: the channels are G runs of these widths (Q, K and V side by side, say), and run g's filters are made
    from z's g-th R columns.
    """
    check_input(x)
    batch, time, channels = x.shape
    check(U, (None, None), "U", "[R, W*D]", x)
    if U.numel() == 0 or channels == 0 or U.shape[1] % channels:
        remedy = (
            "choose R and W of at least 1" if U.numel() == 0 else "pass a basis of R rows, for W taps of D channels"
        )
        raise ValueError(f"U must be [R, W*D] with D = {channels}; got {list(U.shape)}; {remedy}")
    runs = (channels,) if segments is None else as_segments(segments, channels)
    check(z, (batch, time, len(runs) * U.shape[0]), "z", "[B, T, G*R]", x)
    width = U.shape[1] // channels
    if static_w is not None:
        check(static_w, (width, channels), "static_w", "[W, D]", x)
    filters = _Filters(z, U, static_w, runs, width)
    return _run(x, filters, residual, cu_seqlens, initial_state, return_final_state, activation, bias)


def static_convolution_step(
    x: Tensor,  # [B, T, D]: one token, or a few to be verified
    state: Tensor,  # [B, W-1, D]: the inputs before, oldest first
    weight: Tensor,  # [W, D]
    residual: bool | Tensor = False,
    *,
    activation: str | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # [B, T, D], [B, W-1, D]
    """Decode: `static_convolution` from a state, and the next state.

    If only k of several tokens are accepted, the state is torch.cat([state, x], 1)[:, k : k + W - 1].
    """
    check_floating(state, "state")
    options: dict[str, Any] = {
        "initial_state": state,
        "return_final_state": True,
        "activation": activation,
        "bias": bias,
    }
    return static_convolution(x, weight, residual, **options)


def headwise_dynamic_convolution_step(
    x: Tensor,  # [B, T, D]
    state: Tensor,  # [B, W-1, D]
    weight: Tensor,  # [B, T, H, W]
    static_w: Tensor | None = None,  # [W, D]
    residual: bool | Tensor = False,
    *,
    activation: str | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # [B, T, D], [B, W-1, D]
    """Decode: `headwise_dynamic_convolution` from a state, and the next state."""
    check_floating(state, "state")
    options: dict[str, Any] = {
        "initial_state": state,
        "return_final_state": True,
        "activation": activation,
        "bias": bias,
    }
    return headwise_dynamic_convolution(x, weight, static_w, residual, **options)


def lowrank_dynamic_convolution_step(
    x: Tensor,  # [B, T, D]
    state: Tensor,  # [B, W-1, D]
    z: Tensor,  # [B, T, G*R]
    U: Tensor,  # [R, W*D]
    static_w: Tensor | None = None,  # [W, D]
    residual: bool | Tensor = False,
    *,
    activation: str | None = None,
    bias: Tensor | None = None,
    segments: tuple[int, ...] | list[int] | None = None,
) -> tuple[Tensor, Tensor]:  # [B, T, D], [B, W-1, D]
    """Decode: `lowrank_dynamic_convolution` from a state, and the next state."""
    check_floating(state, "state")
    options: dict[str, Any] = {
        "initial_state": state,
        "return_final_state": True,
        "activation": activation,
        "bias": bias,
    }
    return lowrank_dynamic_convolution(x, z, U, static_w, residual, segments=segments, **options)


def _run(
    x: Tensor,  # [B, T, D]
    filters: _Filters,
    residual: bool | Tensor,  # or [B, T, D]
    cu_seqlens: Tensor | None,  # [N + 1]
    initial_state: Tensor | None,  # [N, W-1, D]
    return_final_state: bool,
    activation: str | None,
    bias: Tensor | None = None,  # [D]
) -> Any:  # Tensor [B, T, D]; with return_final_state, that and a state [N, W-1, D]
    if isinstance(residual, Tensor):
        check(residual, tuple(x.shape), "residual (True, False or a tensor)", "[B, T, D]", x)
    if isinstance(return_final_state, Tensor):
        raise ValueError("return_final_state must be True or False; got a tensor; pass tensors by their names")
    for name, flag in (("residual", residual), ("return_final_state", return_final_state)):
        if isinstance(flag, str):
            raise ValueError(f"{name} must be True or False; got {flag!r}; pass one of them")
    if activation not in (None, "silu"):
        got = repr(activation) if isinstance(activation, str) else kind_of(activation)
        raise ValueError(f'activation must be None or "silu"; got {got}; apply another one to the result')
    if filters.width == 0:
        raise ValueError("W must be at least 1; got filters of no taps; pass tap 0, the current token's, at least")
    document = positions = None
    sequences = x.shape[0]
    if cu_seqlens is not None:
        document, positions = find_documents(x, cu_seqlens)  # [T], [T + 1]
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        shape = (sequences, filters.width - 1, x.shape[2])
        check(initial_state, shape, "initial_state (of a step: state)", "[N, W-1, D]", x)
    if bias is not None or isinstance(residual, Tensor):
        if bias is not None:
            check(bias, (x.shape[2],), "bias", "[D]", x)
        return _unfused(x, filters, residual, cu_seqlens, initial_state, return_final_state, activation, bias)
    if sharded.any_sharded((x, *filters[:3], initial_state)):
        one = len(filters.segments) == 1

        def share(x: Tensor, z: Any, weight: Any, static_w: Any, state: Any) -> Any:
            own = _Filters(z, weight, static_w, (x.shape[2],) if one else filters.segments, filters.width)
            return _run(x, own, residual, cu_seqlens, state, return_final_state, activation)

        packed = cu_seqlens is not None
        return sharded.run(share, x, *filters[:3], initial_state, filters.segments, packed)
    silu = activation == "silu"
    if initial_state is None:
        y = _convolve(x, filters, positions, residual, silu)
    else:
        y = _continue(x, filters, document, positions, cu_seqlens, residual, silu, initial_state)
    if not return_final_state:
        return y
    return y, final_state(x, filters.width, cu_seqlens, initial_state)


def _unfused(
    x: Tensor,  # [B, T, D]
    filters: _Filters,
    residual: bool | Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    activation: str | None,
    bias: Tensor | None,  # [D]
) -> Any:  # as `_run`
    """What the kernels lack, around the convolution of x in float32, so that the result is rounded once."""
    added = residual if isinstance(residual, Tensor) else x if residual else None
    sharded.check_all_sharded({"x": x, "bias": bias, "residual": added})
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    state = None if initial_state is None else initial_state.to(x.dtype)
    y, state = _run(wide, filters, False, cu_seqlens, state, True, None)
    y = y if bias is None else y + bias
    y = F.silu(y) if activation == "silu" else y
    y = y if added is None else y + added
    if cu_seqlens is not None:
        y = torch.where((torch.arange(x.shape[1], device=x.device) < cu_seqlens[-1])[:, None], y, 0.0)
    y = y.to(x.dtype)
    return (y, state.to(x.dtype)) if return_final_state else y


def _convolve(
    x: Tensor,  # [B, T, D]
    filters: _Filters,
    positions: Tensor | None,  # [T + 1]
    residual: bool,
    silu: bool,
) -> Tensor:  # [B, T, D]
    kernels = _HAS_TRITON and (x.is_cuda or (_INTERPRET and x.is_cpu)) and x.dtype in _KERNEL_DTYPES
    forward_mode = forward_ad._current_level >= 0  # whose derivatives only the reference has
    if kernels and filters.width <= _MAX_WIDTH and not forward_mode:
        # Imported here, so that a CPU user pays for neither Triton's import nor the op's registration.
        from dynconv.ops.operator import convolve

        return convolve(x, *filters[:3], positions, filters.segments, residual, silu)
    return reference.convolve(x, *filters[:3], positions, filters.segments, residual, silu)


def _continue(
    x: Tensor,  # [B, T, D]
    filters: _Filters,
    document: Tensor | None,  # [T]
    positions: Tensor | None,  # [T + 1]
    cu_seqlens: Tensor | None,  # [N + 1]
    residual: bool,
    silu: bool,
    state: Tensor,  # [N, W-1, D]
) -> Tensor:  # [B, T, D]
    """The convolution of sequences that go on from a state, which reaches their first W-1 outputs only."""
    count = filters.width - 1
    if count == 0 or x.shape[1] == 0:
        return _convolve(x, filters, positions, residual, silu)
    if cu_seqlens is None and torch.compiler.is_exporting():  # one program for every T, few tokens or many
        after = filters.of_tokens(
            lambda made: torch.cat([made.new_zeros(made.shape[0], count, *made.shape[2:]), made], 1)
        )
        return _convolve(torch.cat([state.to(x.dtype), x], 1), after, None, residual, silu)[:, count:]
    if cu_seqlens is None or document is None or positions is None:
        count = x.shape[1] if x.shape[1] <= _FEW_TOKENS else count
        few = filters.of_tokens(lambda made: made[:, :count])
        heads = reference.convolve(x[:, :count], *few[:3], None, few.segments, residual, silu, state)
        if count == x.shape[1]:
            return heads
        return torch.cat([heads, _convolve(x, filters, None, residual, silu)[:, count:]], 1)
    tokens = cu_seqlens[:-1, None] + torch.arange(count, device=x.device)  # [N, W-1]
    inside = tokens < cu_seqlens[1:, None]
    tokens = tokens.clamp(max=x.shape[1] - 1)

    def first(made: Tensor) -> Tensor:  # [1, T, ...] -> [N, W-1, ...]
        """Zeros past a short document's end, lest gradients that are zero there meet the next one's NaN."""
        return torch.where(inside.view(*inside.shape, *[1] * (made.dim() - 2)), made[0, tokens], 0.0)

    few = filters.of_tokens(first)
    heads = reference.convolve(first(x), *few[:3], None, few.segments, residual, silu, state)
    y = _convolve(x, filters, positions, residual, silu)
    place, documents = positions[:-1], len(heads)
    near = (place < count) & (document < documents)  # padding belongs to none
    own = heads[document.clamp(max=documents - 1), place.clamp(min=0, max=count - 1)]
    return torch.where(near[:, None], own, y)
