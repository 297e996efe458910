"""One differentiable operator over the kernels: an autograd function when eager, a custom op when compiled.

torch.compile, dispatch modes and tensor subclasses see the custom op `dynconv::convolve`, which mutates nothing and has
fake kernels. Other eager calls skip it, because dispatching a Python custom op costs more host time than the launches.
Shapes: B batch, T time, D channels, H heads, W taps, R rank, G segments.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from dynconv.ops import flops, headwise, lowrank, static
from dynconv.ops.launch import copied, repeated
from dynconv.ops.optional import mma_fits, ring_fits
from dynconv.ops.sharded import all_plain

_TENSORS = "Tensor x, Tensor? z, Tensor? weight, Tensor? static_w, Tensor? positions"
_INPUTS = f"{_TENSORS}, int[] segments, bool residual, bool silu"

# The kernels compute a tile's address with 64-bit offsets, but offsets within it with 32 bits. A tile spans up to 2,560
# rows or 4,096 heads, and 4,096 strides of less than 2**19 elements stay below 2**31.
STRIDE_LIMIT = 2**19


def _rows_contiguous(tensor: Tensor) -> Tensor:  # [B, T, ...]
    """The tensor, or a contiguous copy if its last dimension is strided or its rows or heads are too far apart."""
    strides = tensor.stride()
    near = max(strides[1:-1]) < STRIDE_LIMIT and (strides[-1] == 1 or tensor.shape[-1] == 1)
    return tensor if near or tensor.is_contiguous() else copied(tensor)


def _contiguous(parameter: Tensor) -> Tensor:
    return parameter if parameter.is_contiguous() else copied(parameter)


def _forward(
    x: Tensor,  # [B, T, D]
    z: Tensor | None,  # [B, T, G*R]: low-rank
    weight: Tensor | None,  # [B, T, H, W]: head-wise; [R, W*D]: low-rank; None: static
    static_w: Tensor | None,  # [W, D]
    positions: Tensor | None,  # [T + 1] int32: as in `reference.convolve`
    segments: tuple[int, ...],
    residual: bool,
    silu: bool,  # True only if `_fuses_silu`
    dtype: torch.dtype,  # of the result: x's, or float32 if silu is applied afterwards
) -> tuple[Tensor]:  # [B, T, D]
    """Run the forward kernels; returns a tuple, as `repeated` requires."""
    if x.numel() == 0:
        return (x.new_empty(x.shape, dtype=dtype),)
    x = _rows_contiguous(x)
    static_w = None if static_w is None else _contiguous(static_w)
    if weight is None:
        assert static_w is not None
        return (static.forward(x, static_w, positions, residual, silu, dtype),)
    if z is None:
        return (headwise.forward(x, _rows_contiguous(weight), static_w, positions, residual, silu, dtype),)
    z, up = _rows_contiguous(z), _contiguous(weight)
    return (lowrank.forward(x, z, up, static_w, positions, segments, residual, silu, dtype),)


def _backward(
    dy: Tensor,  # [B, T, D]
    x: Tensor,  # [B, T, D]
    z: Tensor | None,
    weight: Tensor | None,
    static_w: Tensor | None,
    positions: Tensor | None,
    segments: tuple[int, ...],
    residual: bool,
    silu: bool,
    needs: tuple[bool, ...],  # whether x, z, weight and static_w want gradients
) -> tuple[Tensor | None, ...]:
    """The gradients of x, z, weight and static_w."""
    if x.numel() == 0:
        inputs = zip((x, z, weight, static_w), needs, strict=True)
        return tuple(t.new_zeros(t.shape) if t is not None and needed else None for t, needed in inputs)
    dy, x = _rows_contiguous(dy), _rows_contiguous(x)
    static_w = None if static_w is None else _contiguous(static_w)
    x_needs, z_needs, weight_needs, static_needs = needs
    if weight is None:
        assert static_w is not None
        dx, dstatic = static.backward(dy, x, static_w, positions, residual, silu, (x_needs, static_needs))
        return dx, None, None, dstatic
    if z is None:
        weight = _rows_contiguous(weight)
        needed = (x_needs, weight_needs, static_needs)
        dx, dweight, dstatic = headwise.backward(dy, x, weight, static_w, positions, residual, silu, needed)
        return dx, None, dweight, dstatic
    z, up = _rows_contiguous(z), _contiguous(weight)
    wanted = (x_needs, z_needs, weight_needs, static_needs)
    return lowrank.backward(dy, x, z, up, static_w, positions, segments, residual, silu, wanted)


def _fuses_silu(inputs: tuple[Any, ...], segments: tuple[int, ...]) -> bool:
    """Whether the kernels for these inputs can apply silu; otherwise PyTorch applies it to their float32 result."""
    x, z, weight, static_w, _ = inputs
    if z is not None:
        return mma_fits(x, weight, segments, silu=True)
    width = static_w.shape[0] if weight is None else weight.shape[3]
    return ring_fits(x, weight, width)


def _run_forward(
    inputs: tuple[Tensor | None, ...],  # x, z, weight, static_w, positions
    segments: tuple[int, ...],
    residual: bool,
    silu: bool,
) -> Tensor:  # [B, T, D]
    """The convolution, with silu in the kernels or after them."""
    x: Any = inputs[0]
    if not silu or _fuses_silu(inputs, segments):
        (y,) = repeated(_forward, inputs, (segments, residual, silu, x.dtype))
        return y
    (y,) = repeated(_forward, inputs, (segments, False, False, torch.float32))
    F.silu(y, inplace=True)
    y = y.add_(_without_padding(x, inputs[4])) if residual else y
    return y.to(x.dtype)


def _run_backward(
    dy: Tensor,  # [B, T, D]
    inputs: tuple[Tensor | None, ...],  # x, z, weight, static_w, positions
    segments: tuple[int, ...],
    residual: bool,
    silu: bool,
    needs: tuple[bool, ...],  # whether the first four want gradients
) -> tuple[Tensor | None, ...]:
    """The gradients of x, z, weight and static_w; None for those not in `needs`."""
    if not silu or _fuses_silu(inputs, segments):
        return repeated(_backward, (dy, *inputs), (segments, residual, silu, needs))
    x, z, _, _, positions = inputs
    assert x is not None
    # Recompute silu's input rather than save it in the forward pass: in float32 it takes at least x's memory.
    (inner,) = repeated(_forward, inputs, (segments, False, False, torch.float32))
    # This works in place, and takes a 16-bit dy without a float32 copy.
    inner = torch.ops.aten.silu_backward.grad_input(dy, inner, grad_input=inner)
    if z is not None:
        inner = inner.to(x.dtype)  # the low-rank kernels use it in 16-bit matrix products
    dx, *others = repeated(_backward, (inner, *inputs), (segments, False, False, needs))
    return dx.add_(_without_padding(dy, positions)) if residual and needs[0] else dx, *others


def _without_padding(value: Tensor, positions: Tensor | None) -> Tensor:  # [B, T, D], [T + 1]
    """The value, with zeros after the end of the last document."""
    if positions is None:
        return value
    time = value.shape[1]
    inside = torch.arange(time, device=value.device) + positions[-1] < time
    return torch.where(inside[:, None], value, 0.0)


@torch.library.custom_op("dynconv::convolve", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _convolve_op(*inputs: Any) -> Tensor:
    segments, residual, silu = inputs[5:]
    return _run_forward(inputs[:5], tuple(segments), residual, silu)


@_convolve_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "dynconv::convolve_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {_INPUTS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    segments, residual, silu, needs = inputs[5:]
    gradients = _run_backward(dy, inputs[:5], tuple(segments), residual, silu, tuple(needs))
    return tuple(dy.new_empty(0) if g is None else g for g in gradients)


@_backward_op.register_fake
def _(dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    wanted = zip(inputs[:4], inputs[-1], strict=True)
    return tuple(t.new_empty(t.shape) if needed else dy.new_empty(0) for t, needed in wanted)


def _raise_no_second_derivatives(ctx: Any, *_: Any) -> None:  # noqa: ARG001 - the protocol's signature
    raise RuntimeError(
        "the convolutions' kernels have first derivatives only; got a backward through their backward; "
        "for second derivatives pass float64 tensors, which run in plain PyTorch"
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - the protocol's signature
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad[:4]
    gradients = _backward_op(dy, *ctx.saved_tensors, *ctx.options, list(needs))
    wanted = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return (*wanted, None, None, None, None)


_convolve_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_raise_no_second_derivatives)


class _Convolve(torch.autograd.Function):
    """The eager path: it calls the kernels directly, because dispatching the custom op takes more host time."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        weight: Tensor | None,
        static_w: Tensor | None,
        positions: Tensor | None,
        *options: Any,  # segments, residual, silu
    ) -> Tensor:
        inputs = (x, z, weight, static_w, positions)
        ctx.save_for_backward(*inputs)
        ctx.options = options
        return _run_forward(inputs, *options)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:4]
        saved = ctx.saved_tensors
        # Grad mode is on in a backward pass with create_graph=True, after which second derivatives may be requested.
        # is_grads_batched gives a dy that stands for several gradients, and calls the operator once for each.
        batched = torch._C._functorch.is_legacy_batchedtensor(dy)
        if torch.is_grad_enabled() or batched or not launches_directly((dy, *saved)):
            made = _Gradients.apply(dy, *saved, *ctx.options, needs)
            gradients = tuple(g if needed else None for g, needed in zip(made, needs, strict=True))
        else:
            segments, residual, silu = ctx.options
            gradients = _run_backward(dy, saved, segments, residual, silu, needs)
        return (*gradients, None, None, None, None)


def _vmap_rule(function: Any) -> Callable[..., Any]:
    """A function's rule for torch.func.vmap: it runs the slices one after the other.

    Merging the slices into the batch would be wrong, because each needs its own gradient sums over B and T.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        results = []
        for index in range(info.batch_size):
            pairs = zip(arguments, in_dims, strict=True)
            results.append(
                function(*(a.select(d, index) if isinstance(a, Tensor) and d is not None else a for a, d in pairs))
            )
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        stacked = tuple(torch.stack(each) for each in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


class _Gradients(torch.autograd.Function):
    """The backward pass under create_graph=True: any attempt to differentiate its results raises an error.

    PyTorch's `once_differentiable` raises only if dy itself requires a gradient. Otherwise it would silently leave out
    the part of a second derivative that flows through x, z, weight and static_w.
    """

    @staticmethod
    def forward(dy: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        gradients: tuple[Tensor, ...] = _backward_op(dy, *arguments[:-1], list(arguments[-1]))
        return gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    backward = staticmethod(_raise_no_second_derivatives)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _vmap_rule(_Gradients.apply)(info, in_dims, *arguments)


class _Transformed(_Convolve):
    """The form that torch.func's transforms require: a separate `setup_context`, and a rule for vmap.

    It dispatches the custom op, which takes more host time than `_Convolve`.
    """

    @staticmethod
    def forward(*arguments: Any) -> Tensor:
        y: Tensor = _convolve_op(*arguments)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save(ctx, inputs, output)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        return _vmap_rule(_Transformed.apply)(info, in_dims, *arguments)


register_flop_formula(torch.ops.dynconv.convolve)(flops.forward)
register_flop_formula(torch.ops.dynconv.convolve_backward)(flops.backward)


def dispatch_is_observed() -> bool:
    """Whether a compiler, a tracer or a dispatch mode (make_fx, FlopCounterMode, selective checkpointing) is active.

    These observe the operators that PyTorch dispatches, so they would miss kernels that are launched directly.
    """
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._get_tracing_state() is not None
    )


def launches_directly(tensors: tuple[Any, ...]) -> bool:  # each a Tensor or None
    """Whether kernels may be launched on these tensors without dispatching an operator.

    Not in forward mode: a kernel would drop the tangents, without an error.
    """
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    forward_mode = forward_ad._current_level >= 0
    return all_plain(tensors) and not dispatch_is_observed() and not transformed and not forward_mode


def convolve(
    x: Tensor,  # [B, T, D]
    z: Tensor | None,  # [B, T, G*R]: low-rank
    weight: Tensor | None,  # [B, T, H, W]: head-wise; [R, W*D]: low-rank; None: static
    static_w: Tensor | None,  # [W, D]
    positions: Tensor | None,  # [T + 1] int32: as in `reference.convolve`
    segments: tuple[int, ...],
    residual: bool,
    silu: bool,
) -> Tensor:  # [B, T, D]
    """Compute `reference.convolve` with the kernels."""
    inputs = (x, z, weight, static_w, positions)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _Transformed.apply(*inputs, segments, residual, silu)
    if not launches_directly(inputs):
        return _convolve_op(*inputs, segments, residual, silu)
    return _Convolve.apply(*inputs, segments, residual, silu)
