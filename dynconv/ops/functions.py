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
"""

import importlib.util
import itertools
import operator
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dynconv.ops import reference, sharded

# Triton's interpreter runs the kernels on CPU tensors. Triton itself reads the same variable.
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_DTYPES = (*_KERNEL_DTYPES, torch.float64)
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
    residual: bool = False,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    activation: str | None = None,
) -> Any:  # Tensor [B, T, D]; with return_final_state, that and a state [N, W-1, D]
    """y[b,t,d] = sum_w weight[w,d] x[b,t-w,d] (+ x[b,t,d])."""
    _check_input(x)
    _check(weight, (None, x.shape[2]), "weight", "[W, D]", x)
    filters = _Filters(None, None, weight, (), weight.shape[0])
    return _run(x, filters, residual, cu_seqlens, initial_state, return_final_state, activation)


def headwise_dynamic_convolution(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [B, T, H, W]
    static_w: Tensor | None = None,  # [W, D]
    residual: bool = False,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    activation: str | None = None,
) -> Any:  # Tensor [B, T, D]; with return_final_state, that and a state [N, W-1, D]
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
    filters = _Filters(None, weight, static_w, (), width)
    return _run(x, filters, residual, cu_seqlens, initial_state, return_final_state, activation)


def lowrank_dynamic_convolution(
    x: Tensor,  # [B, T, D]
    z: Tensor,  # [B, T, G*R]
    U: Tensor,  # [R, W*D]
    static_w: Tensor | None = None,  # [W, D]
    residual: bool = False,
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    activation: str | None = None,
    segments: tuple[int, ...] | list[int] | None = None,
) -> Any:  # Tensor [B, T, D]; with return_final_state, that and a state [N, W-1, D]
    """Every channel has its own filter: (z U) viewed [W, D], plus an optional static one.

    `segments`: the channels are G runs of these widths (Q, K and V side by side, say), and run g's filters are made
    from z's g-th R columns.
    """
    _check_input(x)
    batch, time, channels = x.shape
    _check(U, (None, None), "U", "[R, W*D]", x)
    if U.numel() == 0 or channels == 0 or U.shape[1] % channels:
        remedy = (
            "choose R and W of at least 1" if U.numel() == 0 else "pass a basis of R rows, for W taps of D channels"
        )
        raise ValueError(f"U must be [R, W*D] with D = {channels}; got {list(U.shape)}; {remedy}")
    runs = (channels,) if segments is None else _segments(segments, channels)
    _check(z, (batch, time, len(runs) * U.shape[0]), "z", "[B, T, G*R]", x)
    width = U.shape[1] // channels
    if static_w is not None:
        _check(static_w, (width, channels), "static_w", "[W, D]", x)
    filters = _Filters(z, U, static_w, runs, width)
    return _run(x, filters, residual, cu_seqlens, initial_state, return_final_state, activation)


def static_convolution_step(
    x: Tensor,  # [B, T, D]: one token, or a few to be verified
    state: Tensor,  # [B, W-1, D]: the inputs before, oldest first
    weight: Tensor,  # [W, D]
    residual: bool = False,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:  # [B, T, D], [B, W-1, D]
    """Decode: `static_convolution` from a state, and the next state.

    If only k of several tokens are accepted, the state is torch.cat([state, x], 1)[:, k : k + W - 1].
    """
    _check_floating(state, "state")
    options: dict[str, Any] = {"initial_state": state, "return_final_state": True, "activation": activation}
    return static_convolution(x, weight, residual, **options)


def headwise_dynamic_convolution_step(
    x: Tensor,  # [B, T, D]
    state: Tensor,  # [B, W-1, D]
    weight: Tensor,  # [B, T, H, W]
    static_w: Tensor | None = None,  # [W, D]
    residual: bool = False,
    *,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:  # [B, T, D], [B, W-1, D]
    """Decode: `headwise_dynamic_convolution` from a state, and the next state."""
    _check_floating(state, "state")
    options: dict[str, Any] = {"initial_state": state, "return_final_state": True, "activation": activation}
    return headwise_dynamic_convolution(x, weight, static_w, residual, **options)


def lowrank_dynamic_convolution_step(
    x: Tensor,  # [B, T, D]
    state: Tensor,  # [B, W-1, D]
    z: Tensor,  # [B, T, G*R]
    U: Tensor,  # [R, W*D]
    static_w: Tensor | None = None,  # [W, D]
    residual: bool = False,
    *,
    activation: str | None = None,
    segments: tuple[int, ...] | list[int] | None = None,
) -> tuple[Tensor, Tensor]:  # [B, T, D], [B, W-1, D]
    """Decode: `lowrank_dynamic_convolution` from a state, and the next state."""
    _check_floating(state, "state")
    options: dict[str, Any] = {"initial_state": state, "return_final_state": True, "activation": activation}
    return lowrank_dynamic_convolution(x, z, U, static_w, residual, segments=segments, **options)


def _run(
    x: Tensor,  # [B, T, D]
    filters: _Filters,
    residual: bool,
    cu_seqlens: Tensor | None,  # [N + 1]
    initial_state: Tensor | None,  # [N, W-1, D]
    return_final_state: bool,
    activation: str | None,
) -> Any:  # Tensor [B, T, D]; with return_final_state, that and a state [N, W-1, D]
    for name, flag in (("residual", residual), ("return_final_state", return_final_state)):
        if isinstance(flag, Tensor):  # one argument too many, or too few
            raise ValueError(f"{name} must be True or False; got a tensor; pass tensors by their names")
        if isinstance(flag, str):
            raise ValueError(f"{name} must be True or False; got {flag!r}; pass one of them")
    if activation not in (None, "silu"):
        got = repr(activation) if isinstance(activation, str) else _kind(activation)
        raise ValueError(f'activation must be None or "silu"; got {got}; apply another one to the result')
    if filters.width == 0:
        raise ValueError("W must be at least 1; got filters of no taps; pass tap 0, the current token's, at least")
    document = positions = None
    sequences = x.shape[0]
    if cu_seqlens is not None:
        document, positions = _documents(x, cu_seqlens)  # [T], [T + 1]
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        shape = (sequences, filters.width - 1, x.shape[2])
        _check(initial_state, shape, "initial_state (of a step: state)", "[N, W-1, D]", x)
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
    return y, _final_state(x, filters.width, cu_seqlens, initial_state)


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


def _final_state(
    x: Tensor,  # [B, T, D]
    width: int,
    cu_seqlens: Tensor | None,  # [N + 1]
    initial_state: Tensor | None,  # [N, W-1, D]
) -> Tensor:  # [N, W-1, D]
    """The last W-1 inputs of every sequence, oldest first."""
    count = width - 1
    if cu_seqlens is None or x.shape[1] == 0:
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        before = x.new_zeros(sequences, count, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
        if cu_seqlens is not None:  # of documents that are all empty
            return before.clone()
        recent = x if torch.compiler.is_exporting() else x[:, max(0, x.shape[1] - count) :]
        return torch.cat([before, recent], 1)[:, recent.shape[1] :]
    starts, ends = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    tokens = ends - count + torch.arange(count, device=x.device)  # [N, W-1]
    recent = x[0, tokens.clamp(min=0, max=x.shape[1] - 1)]
    if initial_state is None:
        before = torch.zeros((), dtype=x.dtype, device=x.device)
    else:
        places = (tokens - starts + count).clamp(min=0, max=max(0, count - 1))
        before = initial_state.to(x.dtype).gather(1, places[..., None].expand(-1, -1, x.shape[2]))
    return torch.where((tokens >= starts)[..., None], recent, before)


def _documents(
    x: Tensor,  # [1, T, D]
    cu_seqlens: Tensor,  # [N + 1]
) -> tuple[Tensor, Tensor]:  # [T] int64, [T + 1] int32
    """Each token's document, N past the last one's end; and its place there. The last place is the padding's length.

    Raises ValueError where they are no documents of x.
    """
    batch, time, _ = x.shape
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be a tensor; got {_kind(cu_seqlens)}; pass torch.tensor(cu_seqlens)")
    if batch != 1:
        raise ValueError(f"cu_seqlens needs B = 1; got B = {batch}; pass x.reshape(1, B*T, D)")
    if cu_seqlens.dim() != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be [N + 1] int32 or int64; got {list(cu_seqlens.shape)} {cu_seqlens.dtype}; "
            "pass the documents' starts and the last one's end"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on {x.device}; got {cu_seqlens.device}; move it")
    readable = cu_seqlens.is_cpu and type(cu_seqlens) is Tensor  # fake tensors have no values; a GPU's would stall it
    if readable and not torch.compiler.is_compiling():
        edges = cu_seqlens.tolist()
        if edges[0] != 0 or edges[-1] > time or sorted(edges) != edges:
            falls = next((f", {b} after {a}" for a, b in itertools.pairwise(edges) if b < a), "")
            got = edges if len(edges) <= 8 else f"{len(edges)} values from {edges[0]} to {edges[-1]}{falls}"
            raise ValueError(
                f"cu_seqlens must rise from 0 to T = {time} at most; got {got}; pass the starts and the last one's end"
            )
    steps = torch.arange(time + 1, dtype=cu_seqlens.dtype, device=x.device)
    document = torch.searchsorted(cu_seqlens, steps, right=True) - 1
    return document[:-1], (steps - cu_seqlens[document]).int()


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _segments(segments: Any, channels: int) -> tuple[int, ...]:
    """The widths, if they are what they must be."""
    try:
        widths: tuple[Any, ...] = tuple(
            n if isinstance(n, (int, torch.SymInt)) else operator.index(n) for n in segments
        )
    except TypeError:
        raise ValueError(f"segments must be whole numbers; got {segments!r}; pass a tuple of widths") from None
    if sum(widths) != channels or min(widths) < 1:
        raise ValueError(f"segments must be positive and add up to D = {channels}; got {widths}; pass all the widths")
    return widths


def _check_input(x: Tensor) -> None:
    _check_floating(x, "x")
    if x.dim() != 3:
        raise ValueError(f"x must be [B, T, D]; got {list(x.shape)}; add or merge dimensions")


def _check_floating(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor; got {_kind(tensor)}; mind the order of the arguments")
    if tensor.is_nested:
        raise ValueError(f"{name} must be dense; got a nested tensor; pass values()[None], and offsets() as cu_seqlens")
    if tensor.dtype not in _DTYPES:
        raise ValueError(f"{name} must be bfloat16, float16, float32 or float64; got {tensor.dtype}; convert it")


def _check(tensor: Tensor, shape: tuple[int | None, ...], name: str, letters: str, x: Tensor) -> None:
    _check_floating(tensor, name)
    fits = tensor.dim() == len(shape) and all(
        want is None or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not fits:
        want = [n if n is not None else "any" for n in shape]
        raise ValueError(f"{name} must be {letters} = {want}; got {list(tensor.shape)}; reshape or transpose it")
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device} like x; got {tensor.device}; move it")
