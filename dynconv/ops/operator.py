"""One differentiable operator over the kernels: an autograd function when eager, a custom op when compiled.

The custom op `dynconv::convolve` is what torch.compile and tensor subclasses see: functional, with fake kernels. Other
eager calls skip it, because the dispatch of a Python custom op costs more host time than the launches.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynconv.ops import headwise, lowrank, static

_INPUTS = "Tensor x, Tensor? z, Tensor? weight, Tensor? static_w, Tensor? positions, int[] segments, bool residual"


# The kernels reach a tile by 64-bit offsets, and go by 32-bit ones within it: up to 2,048 rows, or 4,096 heads.
_FARTHEST = 2**19


def _rows_contiguous(tensor: Tensor) -> Tensor:  # [B, T, ...]
    """The tensor, or a copy where its last dimension is strided, or its rows or heads lie too far apart."""
    strides = tensor.stride()
    near = max(strides[1:-1]) < _FARTHEST and (strides[-1] == 1 or tensor.shape[-1] == 1)
    return tensor if near else tensor.contiguous()


def _forward(
    x: Tensor,  # [B, T, D]
    z: Tensor | None,  # [B, T, G*R]: low-rank
    weight: Tensor | None,  # [B, T, H, W]: head-wise; [R, W*D]: low-rank; None: static
    static_w: Tensor | None,  # [W, D]
    positions: Tensor | None,  # [T] int32
    segments: list[int] | tuple[int, ...],
    residual: bool,
) -> Tensor:  # [B, T, D]
    if x.numel() == 0:
        return x.new_empty(x.shape)
    x = _rows_contiguous(x)
    static_w = None if static_w is None else static_w.contiguous()
    if weight is None:
        assert static_w is not None
        return static.forward(x, static_w, positions, residual)
    if z is None:
        return headwise.forward(x, _rows_contiguous(weight), static_w, positions, residual)
    return lowrank.forward(x, _rows_contiguous(z), weight.contiguous(), static_w, positions, tuple(segments), residual)


def _backward(
    dy: Tensor,  # [B, T, D]
    x: Tensor,  # [B, T, D]
    z: Tensor | None,
    weight: Tensor | None,
    static_w: Tensor | None,
    positions: Tensor | None,
    segments: list[int] | tuple[int, ...],
    residual: bool,
    needs: list[bool] | tuple[bool, ...],  # whether z, weight and static_w want gradients
) -> tuple[Tensor | None, ...]:
    """The gradients of x, z, weight and static_w."""
    if x.numel() == 0:
        parameters = zip((z, weight, static_w), needs, strict=True)
        return (torch.zeros_like(x), *(torch.zeros_like(p) if p is not None and n else None for p, n in parameters))
    dy, x = _rows_contiguous(dy), _rows_contiguous(x)
    static_w = None if static_w is None else static_w.contiguous()
    z_needs, weight_needs, static_needs = needs
    if weight is None:
        assert static_w is not None
        dx, dstatic = static.backward(dy, x, static_w, positions, residual, static_needs)
        return dx, None, None, dstatic
    if z is None:
        weight = _rows_contiguous(weight)
        needed = (weight_needs, static_needs)
        dx, dweight, dstatic = headwise.backward(dy, x, weight, static_w, positions, residual, needed)
        return dx, None, dweight, dstatic
    z, up = _rows_contiguous(z), weight.contiguous()
    wanted = (z_needs, weight_needs, static_needs)
    return lowrank.backward(dy, x, z, up, static_w, positions, tuple(segments), residual, wanted)


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        z: Tensor | None,
        weight: Tensor | None,
        static_w: Tensor | None,
        positions: Tensor | None,
        segments: tuple[int, ...],
        residual: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, z, weight, static_w, positions)
        ctx.segments, ctx.residual = segments, residual
        return _forward(x, z, weight, static_w, positions, segments, residual)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, z, weight, static_w, positions = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        gradients = _backward(dy, x, z, weight, static_w, positions, ctx.segments, ctx.residual, needs)
        return (*gradients, None, None, None)


@torch.library.custom_op("dynconv::convolve", mutates_args=(), schema=f"({_INPUTS}) -> Tensor")
def _convolve_op(*inputs: Any) -> Tensor:
    return _forward(*inputs)


@_convolve_op.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op(
    "dynconv::convolve_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {_INPUTS}, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if g is None else g for g in _backward(dy, *inputs))


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    parameters = zip(inputs[:3], inputs[-1], strict=True)
    return (x.new_empty(x.shape), *(p.new_empty(p.shape) if needed else dy.new_empty(0) for p, needed in parameters))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - the protocol's signature
    ctx.save_for_backward(*inputs[:5])
    ctx.segments, ctx.residual = inputs[5:]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    needs = ctx.needs_input_grad[:4]
    gradients = _backward_op(dy, *inputs, ctx.segments, ctx.residual, list(needs[1:]))
    wanted = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return (*wanted, None, None, None)


def _refuse(ctx: Any, *_: Any) -> None:  # noqa: ARG001 - the protocol's signature
    raise RuntimeError("the convolutions are differentiable once; got a backward through their backward")


_convolve_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_refuse)


def convolve(
    x: Tensor,  # [B, T, D]
    z: Tensor | None,  # [B, T, G*R]: low-rank
    weight: Tensor | None,  # [B, T, H, W]: head-wise; [R, W*D]: low-rank; None: static
    static_w: Tensor | None,  # [W, D]
    positions: Tensor | None,  # [T] int32
    segments: tuple[int, ...],
    residual: bool,
) -> Tensor:  # [B, T, D]
    """`reference.convolve` by kernels."""
    if torch.compiler.is_compiling() or type(x) is not Tensor:  # fake tensors, say, have no memory to launch on
        return _convolve_op(x, z, weight, static_w, positions, segments, residual)
    return _Convolve.apply(x, z, weight, static_w, positions, segments, residual)
