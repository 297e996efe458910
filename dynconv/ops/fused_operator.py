"""The operators of `fused`, for torch.compile, autograd and CUDA graphs.

Shapes: B batch, T time, W taps, R rank, P parts, D channels of a part, C columns of `joined`.
`weight` is U [R, W*P*D] of low-rank filters. Without it filters are head-wise, one for each `head_size` channels, or,
if that is 0, static.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dynconv.ops import flops, tiles
from dynconv.ops.launch import repeated
from dynconv.ops.operator import STRIDE_LIMIT
from dynconv.ops.optional import fused_mma, fused_ring

_INPUTS = (
    "Tensor joined, Tensor? weight, Tensor? static_w, Tensor? frequencies, Tensor? added, "
    "int channels, int parts, int width, int head_size, bool residual, bool halves, bool padded"
)


@torch.compiler.assume_constant_result
def _device_runs_gluon(index: int) -> bool:
    """`tiles.has_async_copies` of a GPU, which torch.compile calls, since it cannot trace the query to the driver."""
    return tiles.has_async_copies(torch.device("cuda", index))


def runs_on(device: torch.device) -> bool:
    """Whether there are kernels for 16-bit tensors on this GPU."""
    return fused_mma is not None and fused_ring is not None and tiles.has_async_copies(device)


def runs_gluon(tensor: Tensor) -> bool:
    """Whether the tensor's device runs the Gluon kernels."""
    return tensor.is_cuda and _device_runs_gluon(tensor.device.index)


def fits(
    joined: Tensor,  # [B, T, C]
    up: Tensor | None,  # [R, W*P*D]
    frequencies: Tensor | None,  # [E/2]
    channels: int,  # D
    parts: int,  # P
    width: int,  # W
    head_size: int,
    halves: bool,
) -> bool:
    """Whether the kernels support these inputs."""
    if fused_mma is None or fused_ring is None or not runs_gluon(joined):
        return False
    if up is not None:
        return not halves and bool(fused_mma.fits(joined, up, channels, parts))
    pairs = 0 if frequencies is None else len(frequencies)
    return bool(fused_ring.fits(joined, channels, parts, width, head_size, pairs, halves))


def convolve(
    joined: Tensor,  # [B, T, C]
    up: Tensor | None,  # [R, W*P*D]
    static_w: Tensor | None,  # [W, P*D]
    frequencies: Tensor | None,  # [E/2]
    added: Tensor | None,  # [B, T, D]
    channels: int,  # D
    parts: int,  # P
    width: int,  # W
    head_size: int,
    residual: bool,
    halves: bool,  # RoPE's pairs are channels i and i + E/2 of a head, not 2i and 2i + 1
    padded: bool,  # each generator's R columns of `joined` are followed by zeros up to a multiple of 16
) -> tuple[Tensor, ...]:  # [B, T, D] each
    """The convolution by the kernels. The arguments have been checked, and they `fits`."""
    options = (channels, parts, width, head_size, residual, halves, padded)
    return tuple(_op(joined, up, static_w, frequencies, added, *options))


def convolve_gated(
    joined: Tensor,  # [B, T, C]
    up: Tensor | None,  # [R, W*2*D]
    static_w: Tensor | None,  # [W, 2*D]
    channels: int,  # D
    width: int,  # W
    residual: bool,
    padded: bool,  # as for `convolve`
) -> Tensor:  # [B, T, D]
    """silu of the first part times the second, by the kernels. The arguments have been checked, and they `fits`.

    Filters are low-rank or static.
    """
    y: Tensor = _gated_op(joined, up, static_w, channels, width, residual, padded)
    return y


def _gated(*inputs: Any) -> tuple[Tensor, ...]:
    """The pass for `repeated`: `fused_mma.gated`."""
    results: tuple[Tensor, ...] = fused_mma.gated(*inputs)
    return results


def _forward(
    x: Tensor, generated: Tensor | None, up: Tensor | None, *rest: Any
) -> tuple[Tensor, ...]:  # [B, T, D] each
    """The pass for `repeated`, whose arguments are first all tensors, then the options."""
    static_w, frequencies, added, parts, width, residual, halves = rest
    results: tuple[Tensor, ...]
    if up is not None:
        results = fused_mma.forward(x, generated, up, static_w, frequencies, added, parts, residual)
    else:
        results = fused_ring.forward(x, generated, static_w, frequencies, added, parts, width, residual, halves)
    return results


def _backward(*inputs: Any) -> tuple[Tensor | None, ...]:
    """The pass for `repeated`, whose arguments are first all tensors, beginning with dys, then the options."""
    parts = inputs[-1]
    dys, (x, generated, up, static_w, frequencies, *options) = inputs[:parts], inputs[parts:-1]
    width, residual, halves, columns, needs = options
    gradients: tuple[Tensor | None, ...]
    if up is not None:
        gradients = fused_mma.backward(dys, x, generated, up, static_w, frequencies, residual, columns, needs)
    else:
        wanted = (needs[0], needs[2])
        dx, dstatic = fused_ring.backward(
            dys, x, generated, static_w, frequencies, width, residual, halves, columns, wanted
        )
        gradients = (dx, None, dstatic)
    return gradients


def _gated_backward(
    dy: Tensor, x: Tensor, generated: Tensor | None, up: Tensor | None, static_w: Tensor | None, *options: Any
) -> tuple[Tensor | None, ...]:
    """The pass for `repeated`, whose arguments are first all tensors, then the options."""
    width, residual, columns, needs = options
    gradients: tuple[Tensor | None, ...]
    if up is not None:
        gradients = fused_mma.gated_backward(dy, x, generated, up, static_w, residual, columns, needs)
    else:
        dys = fused_mma.gated(x, None, None, static_w, dy, width, residual)
        wanted = (needs[0], needs[2])
        dx, dstatic = fused_ring.backward(dys, x, None, static_w, None, width, residual, False, columns, wanted)
        gradients = (dx, None, dstatic)
    return gradients


def _views(
    joined: Tensor,  # [B, T, C]
    up: Tensor | None,  # [R, W*P*D]
    channels: int,
    parts: int,
    width: int,
    head_size: int,
    padded: bool,
) -> tuple[Tensor, Tensor | None]:
    """(x [B, T, P*D], the generators' outputs) as views of `joined`.

    The outputs are z [B, T, P*R] of low-rank filters, filters [B, T, H, W], or None for static ones. If they are
    `padded`, z has a multiple of 16 columns for each part.
    """
    end = channels * parts
    x = joined[..., :end]
    if up is not None:
        return x, joined[..., end : end + parts * (len(up) + (-len(up) % 16 if padded else 0))]
    if not head_size:
        return x, None
    return x, joined[..., end : end + end // head_size * width].unflatten(2, (-1, width))


def _prepared(
    joined: Tensor,
    up: Tensor | None,
    static_w: Tensor | None,
    frequencies: Tensor | None,
    channels: int,
    parts: int,
    width: int,
    head_size: int,
    padded: bool,
) -> tuple[Tensor | None, ...]:
    """`_views`, and the other tensors in the layout and dtype that the kernels require."""
    x, generated = _views(_rows(joined), up, channels, parts, width, head_size, padded)
    up = None if up is None else up.contiguous()
    static_w = None if static_w is None else static_w.contiguous()
    frequencies = None if frequencies is None else frequencies.float().contiguous()
    return x, generated, up, static_w, frequencies


@torch.library.custom_op("dynconv::joined", mutates_args=(), schema=f"({_INPUTS}) -> Tensor[]")
def _op(
    joined: Tensor,
    up: Tensor | None,
    static_w: Tensor | None,
    frequencies: Tensor | None,
    added: Tensor | None,
    channels: int,
    parts: int,
    width: int,
    head_size: int,
    residual: bool,
    halves: bool,
    padded: bool,
) -> list[Tensor]:
    if joined.numel() == 0:
        return [joined.new_empty(*joined.shape[:2], channels) for _ in range(parts)]
    tensors = _prepared(joined, up, static_w, frequencies, channels, parts, width, head_size, padded)
    added = None if added is None else added.contiguous()
    return list(repeated(_forward, (*tensors, added), (parts, width, residual, halves)))


@_op.register_fake
def _(joined: Tensor, up: Any, static_w: Any, frequencies: Any, added: Any, channels: int, parts: int, *_: Any) -> Any:  # noqa: ARG001
    return [joined.new_empty(*joined.shape[:2], channels) for _ in range(parts)]


@torch.library.custom_op(
    "dynconv::joined_backward",
    mutates_args=(),
    schema=(
        "(Tensor[] dys, Tensor joined, Tensor? weight, Tensor? static_w, Tensor? frequencies, "
        "int width, int head_size, bool residual, bool halves, bool padded, bool[] needs) -> (Tensor, Tensor, Tensor)"
    ),
)
def _backward_op(
    dys: Sequence[Tensor],  # [B, T, D] each
    joined: Tensor,
    up: Tensor | None,
    static_w: Tensor | None,
    frequencies: Tensor | None,
    width: int,
    head_size: int,
    residual: bool,
    halves: bool,
    padded: bool,
    needs: Sequence[bool],  # whether `joined`, U and the static filter want gradients
) -> tuple[Tensor, ...]:
    if joined.numel() == 0:
        return _no_gradients(joined, up, static_w, needs)
    parts = len(dys)
    tensors = _prepared(joined, up, static_w, frequencies, dys[0].shape[2], parts, width, head_size, padded)
    options = (width, residual, halves, joined.shape[2], tuple(needs), parts)
    return _each(repeated(_backward, (*map(_rows, dys), *tensors), options), joined)


def _each(gradients: tuple[Tensor | None, ...], joined: Tensor) -> tuple[Tensor, ...]:
    """The gradients, and empty tensors instead of those that are not wanted, which an operator cannot leave out."""
    return tuple(joined.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _no_gradients(
    joined: Tensor, up: Tensor | None, static_w: Tensor | None, needs: Sequence[bool]
) -> tuple[Tensor, ...]:
    """The gradients if `joined` is empty: zeros."""
    like = zip((joined, up, static_w), needs, strict=True)
    return _each(tuple(t.new_zeros(t.shape) if wanted and t is not None else None for t, wanted in like), joined)


@_backward_op.register_fake
def _(dys: Any, joined: Tensor, up: Tensor | None, static_w: Tensor | None, *rest: Any) -> Any:  # noqa: ARG001
    return _like(joined, up, static_w, rest[-1])


def _like(joined: Tensor, up: Tensor | None, static_w: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor, ...]:
    """Tensors of the shapes of the gradients."""
    wanted = zip((joined, up, static_w), needs, strict=True)
    return tuple(t.new_empty(t.shape) if need and t is not None else joined.new_empty(0) for t, need in wanted)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 - the protocol's signature
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[7:]


def _differentiate(ctx: Any, dys: list[Tensor]) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    gradients = _backward_op(dys, *ctx.saved_tensors, *ctx.options, needs)
    wanted = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    return (*wanted, None, dys[0] if ctx.needs_input_grad[4] else None, *[None] * 7)


def _raise_no_second_derivatives(ctx: Any, *_: Any) -> None:  # noqa: ARG001 - the protocol's signature
    raise RuntimeError(
        "the fused convolutions have first derivatives only; got a backward through their backward; "
        "for second derivatives pass float64 tensors, which run in plain PyTorch"
    )


_GATED_INPUTS = "Tensor joined, Tensor? weight, Tensor? static_w, int channels, int width, bool residual, bool padded"


@torch.library.custom_op("dynconv::gated", mutates_args=(), schema=f"({_GATED_INPUTS}) -> Tensor")
def _gated_op(
    joined: Tensor,
    up: Tensor | None,
    static_w: Tensor | None,
    channels: int,
    width: int,
    residual: bool,
    padded: bool,
) -> Tensor:
    if joined.numel() == 0:
        return joined.new_empty(*joined.shape[:2], channels)
    *tensors, _ = _prepared(joined, up, static_w, None, channels, 2, width, 0, padded)
    (y,) = repeated(_gated, (*tensors, None), (width, residual))
    return y


@_gated_op.register_fake
def _(joined: Tensor, up: Any, static_w: Any, channels: int, *_: Any) -> Any:  # noqa: ARG001
    return joined.new_empty(*joined.shape[:2], channels)


# The tag accepts any layout: torch.compile pads the rows of dy, which is a matrix product, and would copy it otherwise.
@torch.library.custom_op(
    "dynconv::gated_backward",
    mutates_args=(),
    schema=f"(Tensor dy, {_GATED_INPUTS}, bool[] needs) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.flexible_layout,),
)
def _gated_backward_op(
    dy: Tensor,  # [B, T, D]
    joined: Tensor,
    up: Tensor | None,
    static_w: Tensor | None,
    channels: int,
    width: int,
    residual: bool,
    padded: bool,
    needs: Sequence[bool],  # whether `joined`, U and the static filter want gradients
) -> tuple[Tensor, ...]:
    if joined.numel() == 0:
        return _no_gradients(joined, up, static_w, needs)
    *tensors, _ = _prepared(joined, up, static_w, None, channels, 2, width, 0, padded)
    options = (width, residual, joined.shape[2], tuple(needs))
    return _each(repeated(_gated_backward, (_rows(dy), *tensors), options), joined)


@_gated_backward_op.register_fake
def _(dy: Any, joined: Tensor, up: Tensor | None, static_w: Tensor | None, *rest: Any) -> Any:  # noqa: ARG001
    return _like(joined, up, static_w, rest[-1])


def _save_gated(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001 - the protocol's signature
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _differentiate_gated(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:3])
    gradients = _gated_backward_op(dy, *ctx.saved_tensors, *ctx.options, needs)
    return (*(g if needed else None for g, needed in zip(gradients, needs, strict=True)), *[None] * 4)


_op.register_autograd(_differentiate, setup_context=_save)
_gated_op.register_autograd(_differentiate_gated, setup_context=_save_gated)
for _first_derivatives in (_backward_op, _gated_backward_op):
    _first_derivatives.register_autograd(_raise_no_second_derivatives)


def _rows(tensor: Tensor) -> Tensor:  # [B, T, ...]
    """The tensor, or a contiguous copy if its channels are not adjacent or its rows are STRIDE_LIMIT or more apart."""
    near = tensor.stride(2) == 1 and tensor.stride(1) < STRIDE_LIMIT
    return tensor if near else tensor.contiguous()


def _flops_shapes(joined: Any, weight: Any, channels: int, parts: int, width: int, head_size: int) -> tuple[Any, ...]:
    """The shapes of x, z and weight, as the functions of `flops` take them."""
    x = [*joined[:2], channels * parts]
    filters = [*x[:2], x[2] // head_size, width] if head_size else None
    return (x, joined, weight) if weight is not None else (x, None, filters)


def _forward_flops(joined: Any, weight: Any, static_w: Any, *rest: Any, **_: Any) -> int:
    """FLOPs of the convolution; RoPE and sums are not counted."""
    return flops.forward(*_flops_shapes(joined, weight, *rest[2:6]), static_w)


def _gated_flops(joined: Any, weight: Any, static_w: Any, channels: int, width: int, *_: Any, **__: Any) -> int:
    return flops.forward(*_flops_shapes(joined, weight, channels, 2, width, 0), static_w)


def _gated_backward_flops(dy: Any, *inputs: Any, **__: Any) -> int:
    """FLOPs of the backward pass, and of computing the convolutions again, which SwiGLU's gradients need."""
    joined, weight, static_w, _, width, residual, padded, needs = inputs
    backward = _backward_flops((dy, dy), joined, weight, static_w, None, width, 0, residual, False, padded, needs)
    return _gated_flops(*inputs) + backward


def _backward_flops(dys: Any, joined: Any, weight: Any, static_w: Any, *rest: Any, **_: Any) -> int:
    width, head_size, needs = rest[1], rest[2], rest[-1]
    x, z, filters = _flops_shapes(joined, weight, dys[0][2], len(dys), width, head_size)
    wanted = (needs[0], needs[0] and z is not None, needs[1] if z is not None else needs[0] and head_size > 0, needs[2])
    return flops.backward(x, x, z, filters, static_w, None, (), False, False, wanted)


register_flop_formula(torch.ops.dynconv.joined)(_forward_flops)
register_flop_formula(torch.ops.dynconv.gated)(_gated_flops)
register_flop_formula(torch.ops.dynconv.gated_backward)(_gated_backward_flops)
register_flop_formula(torch.ops.dynconv.joined_backward)(_backward_flops)
