"""One differentiable operator over the kernels: an autograd function when eager, a custom op when compiled.

The custom op `dynconv::convolve` is what torch.compile sees: functional, with fake kernels. Eager calls skip
it, because the dispatch of a Python custom op costs more host time than the launches.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dynconv.ops import headwise, lowrank, static

_INPUTS = "Tensor x, Tensor? z, Tensor? weight, Tensor? static_w, Tensor? positions, int[] segments, bool residual"


def _rows_contiguous(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


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
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, z, weight and static_w."""
    if x.numel() == 0:
        parameters = (z, weight, static_w)
        return (torch.zeros_like(x), *(None if p is None else torch.zeros_like(p) for p in parameters))  # type: ignore[return-value]  # a star hides the length
    dy, x = _rows_contiguous(dy), _rows_contiguous(x)
    static_w = None if static_w is None else static_w.contiguous()
    if weight is None:
        assert static_w is not None
        dx, dstatic = static.backward(dy, x, static_w, positions, residual)
        return dx, None, None, dstatic
    if z is None:
        dx, dweight, dstatic_w = headwise.backward(dy, x, _rows_contiguous(weight), static_w, positions, residual)
        return dx, None, dweight, dstatic_w
    return lowrank.backward(
        dy, x, _rows_contiguous(z), weight.contiguous(), static_w, positions, tuple(segments), residual
    )


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
        gradients = _backward(dy, x, z, weight, static_w, positions, ctx.segments, ctx.residual)
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
    schema=f"(Tensor dy, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_op(dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    return tuple(dy.new_empty(0) if g is None else g for g in _backward(dy, *inputs))


@_backward_op.register_fake
def _(dy: Tensor, x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    parameters = (dy.new_empty(0) if p is None else p.new_empty(p.shape) for p in inputs[:3])
    return (x.new_empty(x.shape), *parameters)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001 - the protocol's signature
    ctx.save_for_backward(*inputs[:5])
    ctx.segments, ctx.residual = inputs[5:]


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    gradients = _backward_op(dy, *inputs, ctx.segments, ctx.residual)
    present = (None if i is None else g for i, g in zip(inputs[:4], gradients, strict=True))
    return (*present, None, None, None)


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
    if torch.compiler.is_compiling():
        return _convolve_op(x, z, weight, static_w, positions, segments, residual)
    return _Convolve.apply(x, z, weight, static_w, positions, segments, residual)
