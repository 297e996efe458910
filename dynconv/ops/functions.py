"""The convolution functions: they check their arguments and run on the best implementation for the device.

Shapes: B batch, T time, D channels, H heads of filters (H divides D), W taps, R rank, G segments, N sequences (the
number of documents if cu_seqlens is given, else B). Tap 0 is the current token. The result has x's dtype.

Precision: sums and silu are computed in float32, or in float64 for float64 inputs. The low-rank kernels use matrix
products, so they first round to x's dtype: z, U, the gradient with respect to silu's input, and the products dy * x.
Memory: a view is read without a copy if its last dimension is contiguous, except that some GPU kernels copy 16-bit
tensors whose strides are not multiples of 16. All tensors but cu_seqlens and seq_idx may be DTensors; `sharded` lists
the placements supported.
Each function raises ValueError for arguments that do not fit together. Keywords of all three functions:

cu_seqlens [N+1], int32 or int64: x is [1, T, D] and holds packed documents; these are their starts, followed by the
last one's end. No filter reaches into another document. Tokens after that end are padding: they are not read, and
their outputs and gradients are zero. The values must not decrease, start at 0 and not exceed T. This is checked on the
CPU only, in eager mode; on a GPU and in compiled programs it is the caller's responsibility, because reading the values
would force a synchronisation. There, values above T count as T, and tokens before the first start are one more
document, which begins with zeros and has no state; with values that decrease the result is undefined.
seq_idx [B, T], int32 or int64: another way to pack documents, for any B: each run of one value in a row is a document,
and tokens with a negative value are padding, anywhere in a row. They are not read, and their outputs and gradients are
zero. This reads and writes x, y and what defines the filters once more, which cu_seqlens does not.
initial_state [N, W-1, D]: the inputs before x, oldest first; zeros by default.
return_final_state: if true, return (y, state), where state [N, W-1, D] is the initial_state of what follows.
activation: None or "silu"; y = silu(conv) (+ x).
bias [D]: added to the convolution, before silu.
residual: whether to add x; or a tensor [B, T, D] to add instead of x.
The kernels support neither a bias nor a residual tensor. PyTorch adds these, to the kernels' result for a float32 copy
of x, which takes extra passes over memory; the result is rounded to x's dtype once.
"""

import importlib.util
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from dynconv.ops import documents, reference, sharded
from dynconv.ops.checks import as_segments, check, check_floating, check_input, check_options

# Triton's interpreter runs the kernels on CPU tensors. Triton itself reads the same variable.
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MAX_WIDTH = 8  # of filters in the kernels; wider ones run through the reference
_FEW_TOKENS = 8  # Up to so many tokens, decoding uses only the reference, which takes fewer launches.


class _Filters(NamedTuple):
    """The tensors and sizes that define the filters; their shapes are those of `reference.convolve`."""

    z: Tensor | None
    weight: Tensor | None
    static_w: Tensor | None
    segments: tuple[int, ...]
    width: int

    def select_tokens(self, select: Callable[[Tensor], Tensor]) -> "_Filters":
        """The filters of the tokens that `select` picks from a tensor [B, T, ...]."""
        if self.z is not None:
            return self._replace(z=select(self.z))
        return self if self.weight is None else self._replace(weight=select(self.weight))


def static_convolution(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [W, D]
    residual: bool | Tensor = False,
    *,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    activation: str | None = None,
    bias: Tensor | None = None,
) -> Any:  # Tensor [B, T, D]; with return_final_state, that and a state [N, W-1, D]
    """One filter per channel, the same at every time: y[b,t,d] = sum_w weight[w,d] x[b,t-w,d] (+ x[b,t,d])."""
    check_input(x)
    check(weight, (None, x.shape[2]), "weight", "[W, D]", x)
    filters = _Filters(None, None, weight, (), weight.shape[0])
    return _run(x, filters, residual, cu_seqlens, initial_state, return_final_state, activation, bias, seq_idx)


def headwise_dynamic_convolution(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [B, T, H, W]
    static_w: Tensor | None = None,  # [W, D]
    residual: bool | Tensor = False,
    *,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
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
    return _run(x, filters, residual, cu_seqlens, initial_state, return_final_state, activation, bias, seq_idx)


def lowrank_dynamic_convolution(
    x: Tensor,  # [B, T, D]
    z: Tensor,  # [B, T, G*R]
    U: Tensor,  # [R, W*D]
    static_w: Tensor | None = None,  # [W, D]
    residual: bool | Tensor = False,
    *,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    activation: str | None = None,
    bias: Tensor | None = None,
    segments: tuple[int, ...] | list[int] | None = None,
) -> Any:  # Tensor [B, T, D]; with return_final_state, that and a state [N, W-1, D]
    """One filter per token and channel: (z U) viewed as [W, D], plus an optional static filter.

    `segments` are the widths of G groups of consecutive channels (for example Q, K and V, concatenated). The filters
    of group g use the g-th R columns of z.
    """
    check_input(x)
    batch, time, channels = x.shape
    check(U, (None, None), "U", "[R, W*D]", x)
    if U.numel() == 0 or channels == 0 or U.shape[1] % channels:
        remedy = (
            "choose R and W of at least 1" if U.numel() == 0 else "pass a basis of R rows, for W taps of D channels"
        )
        raise ValueError(f"U must be [R, W*D] with D = {channels}; got {list(U.shape)}; {remedy}")
    widths = (channels,) if segments is None else as_segments(segments, channels)
    check(z, (batch, time, len(widths) * U.shape[0]), "z", "[B, T, G*R]", x)
    width = U.shape[1] // channels
    if static_w is not None:
        check(static_w, (width, channels), "static_w", "[W, D]", x)
    filters = _Filters(z, U, static_w, widths, width)
    return _run(x, filters, residual, cu_seqlens, initial_state, return_final_state, activation, bias, seq_idx)


def static_convolution_step(
    x: Tensor,  # [B, T, D]; T is 1, or the number of drafted tokens in speculative decoding
    state: Tensor,  # [B, W-1, D]: the inputs before x, oldest first
    weight: Tensor,  # [W, D]
    residual: bool | Tensor = False,
    *,
    activation: str | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # [B, T, D], [B, W-1, D]
    """Decode: `static_convolution` continued from a state. Returns the outputs and the next state.

    If only the first k of several tokens are accepted, the next state is torch.cat([state, x], 1)[:, k : k + W - 1].
    """
    check_floating(state, "state")
    y: tuple[Tensor, Tensor] = static_convolution(
        x, weight, residual, initial_state=state, return_final_state=True, activation=activation, bias=bias
    )
    return y


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
    """Decode: `headwise_dynamic_convolution` continued from a state. Returns the outputs and the next state."""
    check_floating(state, "state")
    y: tuple[Tensor, Tensor] = headwise_dynamic_convolution(
        x, weight, static_w, residual, initial_state=state, return_final_state=True, activation=activation, bias=bias
    )
    return y


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
    """Decode: `lowrank_dynamic_convolution` continued from a state. Returns the outputs and the next state."""
    check_floating(state, "state")
    y: tuple[Tensor, Tensor] = lowrank_dynamic_convolution(
        x,
        z,
        U,
        static_w,
        residual,
        initial_state=state,
        return_final_state=True,
        activation=activation,
        bias=bias,
        segments=segments,
    )
    return y


def final_state(
    x: Tensor,  # [B, T, D]
    width: int,  # W
    *,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> Tensor:  # [N, W-1, D]
    """The state that the convolutions return with `return_final_state`, computed without a convolution.

    Raises ValueError for arguments that do not fit together.
    """
    check_input(x)
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width must be a whole number of at least 1; got {width!r}; pass the number of taps")
    sequences = x.shape[0]
    if cu_seqlens is not None:
        _, cu_seqlens = documents.find_documents(x, cu_seqlens)
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        check(initial_state, (sequences, width - 1, x.shape[2]), "initial_state", "[N, W-1, D]", x)
    return _final_state(x, width, cu_seqlens, initial_state)


def _run(
    x: Tensor,  # [B, T, D]
    filters: _Filters,
    residual: bool | Tensor,  # or [B, T, D]
    cu_seqlens: Tensor | None,  # [N + 1]
    initial_state: Tensor | None,  # [N, W-1, D]
    return_final_state: bool,
    activation: str | None,
    bias: Tensor | None = None,  # [D]
    seq_idx: Tensor | None = None,  # [B, T]
) -> Any:  # Tensor [B, T, D]; with return_final_state, that and a state [N, W-1, D]
    """Check the arguments that all three convolutions share, and run the implementation that they need."""
    check_options(x, filters.width, residual, return_final_state, activation)
    positions = None
    sequences = x.shape[0]
    if seq_idx is not None:
        documents.check_seq_idx(x, seq_idx, cu_seqlens, initial_state, return_final_state)
    if cu_seqlens is not None:
        positions, cu_seqlens = documents.find_documents(x, cu_seqlens)  # [T + 1], [N + 1]
        sequences = cu_seqlens.shape[0] - 1
    if initial_state is not None:
        shape = (sequences, filters.width - 1, x.shape[2])
        check(initial_state, shape, "initial_state (of a step: state)", "[N, W-1, D]", x)
    if bias is not None or isinstance(residual, Tensor):
        if bias is not None:
            check(bias, (x.shape[2],), "bias", "[D]", x)
        return _unfused(x, filters, residual, cu_seqlens, initial_state, return_final_state, activation, bias, seq_idx)
    if sharded.any_sharded((x, *filters[:3], initial_state)):
        one_segment = len(filters.segments) == 1

        def run_local(x: Tensor, z: Any, weight: Any, static_w: Any, state: Any) -> Any:
            segments = (x.shape[2],) if one_segment else filters.segments
            local_filters = _Filters(z, weight, static_w, segments, filters.width)
            return _run(x, local_filters, residual, cu_seqlens, state, return_final_state, activation, None, seq_idx)

        packed = cu_seqlens is not None or seq_idx is not None
        return sharded.run(run_local, x, *filters[:3], initial_state, filters.segments, packed)
    silu = activation == "silu"
    if seq_idx is not None:
        return _convolve_runs(x, filters, seq_idx, residual, silu)
    if initial_state is None:
        y = _convolve(x, filters, positions, residual, silu)
    else:
        y = _convolve_from_state(x, filters, positions, cu_seqlens, residual, silu, initial_state)
    if not return_final_state:
        return y
    return y, _final_state(x, filters.width, cu_seqlens, initial_state)


def _unfused(
    x: Tensor,  # [B, T, D]
    filters: _Filters,
    residual: bool | Tensor,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    activation: str | None,
    bias: Tensor | None,  # [D]
    seq_idx: Tensor | None,  # [B, T]
) -> Any:  # as `_run`
    """Add a bias or a residual tensor in PyTorch, because the kernels support neither.

    The convolution runs on x in float32, so that the result is rounded to x's dtype only once, at the end.
    """
    added = residual if isinstance(residual, Tensor) else x if residual else None
    sharded.check_all_sharded({"x": x, "bias": bias, "residual": added})
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    state = None if initial_state is None else initial_state.to(x.dtype)
    y = _run(wide, filters, False, cu_seqlens, state, return_final_state, None, None, seq_idx)
    y, state = y if return_final_state else (y, None)
    y = y if bias is None else y + bias
    y = F.silu(y) if activation == "silu" else y
    y = y if added is None else y + added
    if cu_seqlens is not None:
        inside = torch.arange(x.shape[1], device=x.device) < cu_seqlens[-1]
        y = torch.where(sharded.replicated(inside[:, None], y), y, 0.0)
    if seq_idx is not None:
        y = torch.where(sharded.replicated(seq_idx[..., None] >= 0, y), y, 0.0)
    y = y.to(x.dtype)
    return y if state is None else (y, state.to(x.dtype))


def _final_state(
    x: Tensor,  # [B, T, D]
    width: int,
    cu_seqlens: Tensor | None,  # [N + 1]
    initial_state: Tensor | None,  # [N, W-1, D]
) -> Tensor:  # [N, W-1, D]
    """`documents.final_state`. For packed documents a kernel computes it, if no gradient is needed."""
    tensors = (x, cu_seqlens, initial_state)
    gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if cu_seqlens is not None and not gradient and width > 1 and x.numel() and x.stride(2) == 1 and _runs_kernels(x):
        from dynconv.ops import operator, states

        if operator.launches_directly(tensors):
            state = None if initial_state is None else initial_state.to(x.dtype).contiguous()
            return states.packed_states(x, cu_seqlens.contiguous(), state, width)
    return documents.final_state(x, width, cu_seqlens, initial_state)


def _runs_kernels(x: Tensor) -> bool:
    """Whether kernels can run on this tensor's device and dtype."""
    return _HAS_TRITON and (x.is_cuda or (_INTERPRET and x.is_cpu)) and x.dtype in _KERNEL_DTYPES


def _convolve(
    x: Tensor,  # [B, T, D]
    filters: _Filters,
    positions: Tensor | None,  # [T + 1]
    residual: bool,
    silu: bool,
) -> Tensor:  # [B, T, D]
    """The convolution by the kernels if they support the inputs, else by the reference."""
    forward_mode = forward_ad._current_level >= 0  # Only the reference supports forward-mode derivatives.
    if _runs_kernels(x) and filters.width <= _MAX_WIDTH and not forward_mode:
        # Imported here, so that a CPU user pays for neither Triton's import nor the op's registration.
        from dynconv.ops.operator import convolve

        return convolve(x, *filters[:3], positions, filters.segments, residual, silu)
    return reference.convolve(x, *filters[:3], positions, filters.segments, residual, silu)


def _convolve_runs(
    x: Tensor,  # [B, T, D]
    filters: _Filters,
    seq_idx: Tensor,  # [B, T]
    residual: bool,
    silu: bool,
) -> Tensor:  # [B, T, D]
    """The convolution of rows that each hold several documents and padding, computed on all rows packed into one.

    Padding is set to zero in the inputs, because the kernels treat it as a document, and in the outputs, so that their
    gradients affect nothing.
    """
    inside, positions = documents.find_runs(seq_idx)  # [B, T], [B*T + 1]

    def packed(tensor: Tensor) -> Tensor:  # [B, T, ...] -> [1, B*T, ...]
        return torch.where(inside.view(*inside.shape, *[1] * (tensor.dim() - 2)), tensor, 0.0).flatten(0, 1)[None]

    y = _convolve(packed(x), filters.select_tokens(packed), positions, residual, silu)
    return torch.where(inside[..., None], y.view(x.shape), 0.0)


def _convolve_from_state(
    x: Tensor,  # [B, T, D]
    filters: _Filters,
    positions: Tensor | None,  # [T + 1]
    cu_seqlens: Tensor | None,  # [N + 1]
    residual: bool,
    silu: bool,
    state: Tensor,  # [N, W-1, D]
) -> Tensor:  # [B, T, D]
    """The convolution of sequences that continue from a state.

    Only the first W-1 outputs of a sequence depend on the state. The reference computes those, and the kernels, which
    take no state, compute the rest.
    """
    count = filters.width - 1
    if count == 0 or x.shape[1] == 0:
        return _convolve(x, filters, positions, residual, silu)
    if cu_seqlens is None and torch.compiler.is_exporting():  # An exported program must work for every T.
        padded_filters = filters.select_tokens(
            lambda tensor: torch.cat([tensor.new_zeros(tensor.shape[0], count, *tensor.shape[2:]), tensor], 1)
        )
        return _convolve(torch.cat([state.to(x.dtype), x], 1), padded_filters, None, residual, silu)[:, count:]
    if cu_seqlens is None:
        count = x.shape[1] if x.shape[1] <= _FEW_TOKENS else count
        first_filters = filters.select_tokens(lambda tensor: tensor[:, :count])
        from_state = reference.convolve(x[:, :count], *first_filters[:3], None, filters.segments, residual, silu, state)
        if count == x.shape[1]:
            return from_state
        return torch.cat([from_state, _convolve(x, filters, None, residual, silu)[:, count:]], 1)
    tokens = cu_seqlens[:-1, None] + torch.arange(count, device=x.device)  # [N, W-1]
    inside = tokens < cu_seqlens[1:, None]
    near = tokens.clamp(max=x.shape[1] - 1)

    def first_tokens(tensor: Tensor) -> Tensor:  # [1, T, ...] -> [N, W-1, ...]
        """The first W-1 tokens of every document; zeros after the end of a shorter one.

        Without the zeros these places would hold the next document's values. If those are NaN, the zero gradients of
        these places times NaN would be NaN.
        """
        return torch.where(inside.view(*inside.shape, *[1] * (tensor.dim() - 2)), tensor[0, near], 0.0)

    first_filters = filters.select_tokens(first_tokens)
    state = torch.where(inside[:, :1, None], state, 0.0)  # nothing reads an empty document's: as above, it may be NaN
    from_state = reference.convolve(first_tokens(x), *first_filters[:3], None, filters.segments, residual, silu, state)
    # A place after its document's end has no token. It is written to one more row, because the host does not know how
    # many to leave out.
    y = _convolve(x, filters, positions, residual, silu).flatten(0, 1)
    rows = torch.cat([y, y.new_zeros(1, y.shape[1])])
    places = torch.where(inside, tokens, x.shape[1]).long()
    # vmap cannot write slices of its own into a tensor that all slices share.
    # torch.compile takes out a copy that nothing needs by itself.
    copied = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    put = rows.index_put if copied else rows.index_put_
    return put((places,), from_state)[None, : x.shape[1]]
