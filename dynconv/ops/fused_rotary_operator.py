"""The operator of the low-rank convolution with RoPE, for torch.compile, autograd and CUDA graphs. See `fused_rotary`.

Shapes: B batch, T time, W taps, R rank, H heads, E channels of a head, D = H*E, C columns of `joined`.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynconv.ops import flops
from dynconv.ops.fused_rotary import parts
from dynconv.ops.launch import repeated
from dynconv.ops.optional import fused_rotary_mma
from dynconv.ops.tiles import runs_gluon

_INPUTS = "Tensor joined, Tensor weight, Tensor? static_w, Tensor frequencies, int heads, bool residual"


def fits(joined: Tensor, up: Tensor, channels: int) -> bool:
    """Whether the kernels support these inputs, for D channels."""
    return fused_rotary_mma is not None and runs_gluon(joined) and fused_rotary_mma.fits(joined, up, channels)


def convolve_and_rotate(
    joined: Tensor, up: Tensor, static_w: Tensor | None, frequencies: Tensor, heads: int, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_rotary.lowrank_rotary_convolution` by the kernels; the arguments have been checked, and they `fits`."""
    q, k, v = _rotary_op(joined, up, static_w, frequencies, heads, residual)
    return q, k, v


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass, as `repeated` takes it: x, z, U, the static filter and the frequencies, then the options."""
    x, z, up, static_w, frequencies, residual = inputs
    y: tuple[Tensor, Tensor, Tensor] = fused_rotary_mma.forward(x, z, up, static_w, frequencies, residual)
    return y


def _backward(*inputs: Any) -> tuple[Tensor | None, ...]:
    gradients: tuple[Tensor | None, ...] = fused_rotary_mma.backward(*inputs)
    return gradients


@torch.library.custom_op("dynconv::lowrank_rotary", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor)")
def _rotary_op(
    joined: Tensor, up: Tensor, static_w: Tensor | None, frequencies: Tensor, heads: int, residual: bool
) -> tuple[Tensor, ...]:
    joined = _rows(joined)
    up, static_w, frequencies = up.contiguous(), _contiguous(static_w), frequencies.float().contiguous()
    x, z = parts(joined, up, frequencies, heads)
    if joined.numel() == 0:
        return tuple(y.contiguous() for y in x.unflatten(2, (3, heads, -1)).unbind(2))
    results = repeated(_forward, (x, z, up, static_w, frequencies), (residual,))
    return tuple(y.unflatten(2, (heads, -1)) for y in results)


@_rotary_op.register_fake
def _(joined: Tensor, up: Tensor, static_w: Tensor | None, frequencies: Tensor, heads: int, residual: bool) -> Any:  # noqa: ARG001
    shape = (*joined.shape[:2], heads, 2 * frequencies.shape[0])
    return tuple(joined.new_empty(shape) for _ in range(3))


@torch.library.custom_op(
    "dynconv::lowrank_rotary_backward",
    mutates_args=(),
    schema=f"(Tensor dq, Tensor dk, Tensor dv, {_INPUTS}, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
def _backward_op(
    dq: Tensor,  # [B, T, H, E], as the next two
    dk: Tensor,
    dv: Tensor,
    joined: Tensor,
    up: Tensor,
    static_w: Tensor | None,
    frequencies: Tensor,
    heads: int,
    residual: bool,
    needs: list[bool],  # whether `joined`, U and static_w want gradients
) -> tuple[Tensor, ...]:
    if joined.numel() == 0:
        like = (joined, up, joined.new_empty(0) if static_w is None else static_w)
        return tuple(torch.zeros_like(t) if wanted else t.new_empty(0) for t, wanted in zip(like, needs, strict=True))
    joined = _rows(joined)
    up, static_w, frequencies = up.contiguous(), _contiguous(static_w), frequencies.float().contiguous()
    x, z = parts(joined, up, frequencies, heads)
    dys = (_rows(gradient.flatten(2)) for gradient in (dq, dk, dv))
    options = (residual, joined.shape[2], tuple(needs))
    gradients = repeated(_backward, (*dys, x, z, up, static_w, frequencies), options)
    return tuple(dq.new_empty(0) if gradient is None else gradient for gradient in gradients)


@_backward_op.register_fake
def _(dq: Tensor, dk: Tensor, dv: Tensor, joined: Tensor, up: Tensor, static_w: Tensor | None, *rest: Any) -> Any:  # noqa: ARG001
    wanted = zip((joined, up, static_w), rest[-1], strict=True)
    return tuple(t.new_empty(t.shape) if need and t is not None else dq.new_empty(0) for t, need in wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 - the protocol's signature
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


def _differentiate(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    gradients = _backward_op(dq, dk, dv, *ctx.saved_tensors, *ctx.options, needs)
    wanted = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return (*wanted, None, None, None)


def _raise_no_second_derivatives(ctx: Any, *_: Any) -> None:  # noqa: ARG001 - the protocol's signature
    raise RuntimeError(
        "the fused convolution and RoPE has first derivatives only; got a backward through its backward; "
        "for second derivatives pass float64 tensors, which run in plain PyTorch"
    )


_rotary_op.register_autograd(_differentiate, setup_context=_save)
_backward_op.register_autograd(_raise_no_second_derivatives)


def _rows(tensor: Tensor) -> Tensor:  # [B, T, ...]
    """The tensor, or a copy if its channels are not adjacent."""
    return tensor if tensor.stride(2) == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _forward_flops(joined: Any, weight: Any, static_w: Any, frequencies: Any, heads: int, *_: Any, **__: Any) -> int:
    """Those of the convolution; RoPE counts as nothing, as in torch's own formulas for attention."""
    x = [*joined[:2], 6 * heads * frequencies[0]]
    return flops.forward(x, joined, weight, static_w)


def _backward_flops(dq: Any, dk: Any, dv: Any, joined: Any, weight: Any, static_w: Any, *rest: Any, **_: Any) -> int:  # noqa: ARG001
    x = [*joined[:2], 3 * dq[2] * dq[3]]
    needs = rest[-1]
    return flops.backward(x, x, joined, weight, static_w, None, (), False, False, (needs[0], *needs))


register_flop_formula(torch.ops.dynconv.lowrank_rotary)(_forward_flops)
register_flop_formula(torch.ops.dynconv.lowrank_rotary_backward)(_backward_flops)
