"""The low-rank convolution of queries, keys and values together with RoPE, in one launch each way.

By itself, RoPE reads and writes queries and keys once more, forward and backward, and q, k, v, the generators' outputs and
their gradients are laid side by side by copies. Here the kernel reads all of them from the output of one projection,
rotates what it computed before it writes it, and its backward pass writes the one gradient that the projection needs.

Shapes: B batch, T time, W taps, R rank, H heads, E channels of a head, D = H*E, C columns of the projection's output.
RoPE (arXiv 2104.09864) rotates pairs of adjacent channels 2i and 2i + 1 here, as its paper and Meta's Llama have them.
Models that pair channels i and i + E/2, as Hugging Face's Llama does, pass `interleaved` weights and filters of queries and
keys. Attention does not see the order of channels, as long as it is the same for queries and keys.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from dynconv.ops import flops, functions
from dynconv.ops.checks import check, check_floating
from dynconv.ops.optional import fused_rotary_mma, runs_gluon
from dynconv.ops.sharded import any_sharded


def interleaved(
    rows: Tensor,  # [H*E, ...]: of a linear map's weight, where channels i and i + E/2 of a head are a pair
    heads: int,
) -> Tensor:  # [H*E, ...]
    """The same rows in an order in which pairs are adjacent: within each head 0, E/2, 1, E/2 + 1, ..."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def lowrank_rotary_convolution(
    joined: Tensor,  # [B, T, C]: queries, keys and values [D each], the generators' outputs [3*R], and perhaps padding
    U: Tensor,  # [R, W*3*D]
    static_w: Tensor | None,  # [W, 3*D]
    frequencies: Tensor,  # [E/2], float32: radians per token of each pair of channels
    heads: int,  # H
    residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # [B, T, H, E] each
    """Queries and keys after convolution and RoPE, and values after convolution.

    The convolution is `lowrank_dynamic_convolution` with three segments. The token at time t is rotated by the angles
    t * frequencies. Columns after the generators' outputs have gradient zero. Raises ValueError for arguments that do
    not fit together.
    """
    channels = _check(joined, U, static_w, frequencies, heads)
    if not _kernels_fit(joined, U, static_w, channels):
        return _composed(joined, U, static_w, frequencies, heads, residual)
    q, k, v = _rotary_op(joined, U, static_w, frequencies, heads, residual)
    return q, k, v


def _check(joined: Tensor, up: Tensor, static_w: Tensor | None, frequencies: Tensor, heads: int) -> int:
    """D. Raises ValueError for arguments that do not fit together."""
    check_floating(joined, "joined")
    if joined.dim() != 3:
        raise ValueError(f"joined must be [B, T, C]; got {list(joined.shape)}; add or merge dimensions")
    check(frequencies, (None,), "frequencies", "[E/2]", joined)
    check(up, (None, None), "U", "[R, W*3*D]", joined)
    channels = 2 * heads * len(frequencies)
    if channels < 1 or up.shape[0] < 1 or up.shape[1] % (3 * channels) or up.shape[1] == 0:
        raise ValueError(
            f"U must be [R, W*3*D] with D = {channels} for {heads} heads and {len(frequencies)} frequencies; got "
            f"{list(up.shape)}; pass the bases of queries, keys and values side by side"
        )
    if static_w is not None:
        check(static_w, (up.shape[1] // (3 * channels), 3 * channels), "static_w", "[W, 3*D]", joined)
    if joined.shape[2] < 3 * (channels + up.shape[0]):
        raise ValueError(
            f"joined must have at least 3 * (D + R) = {3 * (channels + up.shape[0])} columns; got {joined.shape[2]}; "
            "pass queries, keys, values and the generators' outputs side by side"
        )
    return channels


def _kernels_fit(joined: Tensor, up: Tensor, static_w: Tensor | None, channels: int) -> bool:
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    if transformed or forward_ad._current_level >= 0 or any_sharded((joined, up, static_w)):
        return False
    return fused_rotary_mma is not None and runs_gluon(joined) and fused_rotary_mma.fits(joined, up, channels)


def _composed(
    joined: Tensor, up: Tensor, static_w: Tensor | None, frequencies: Tensor, heads: int, residual: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from a convolution and a rotation, which round one after the other."""
    x, z = _parts(joined, up, frequencies, heads)
    widths = (x.shape[2] // 3,) * 3
    y = functions.lowrank_dynamic_convolution(x, z, up, static_w, residual, segments=widths)
    q, k, v = y.unflatten(2, (3, heads, -1)).unbind(2)
    angle = torch.arange(x.shape[1], device=x.device, dtype=frequencies.dtype)[:, None] * frequencies
    cosine, sine = angle.cos()[:, None], angle.sin()[:, None]  # [T, 1, E/2]

    def rotated(value: Tensor) -> Tensor:  # [B, T, H, E]
        first, second = value[..., 0::2], value[..., 1::2]
        pairs = torch.stack((first * cosine - second * sine, second * cosine + first * sine), -1)
        return pairs.flatten(-2).to(value.dtype)

    return rotated(q), rotated(k), v


def _parts(joined: Tensor, up: Tensor, frequencies: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Views of what is convolved [B, T, 3*D], and of the generators' outputs [B, T, 3*R]."""
    channels = 6 * heads * len(frequencies)
    return joined[..., :channels], joined[..., channels : channels + 3 * len(up)]


_INPUTS = "Tensor joined, Tensor weight, Tensor? static_w, Tensor frequencies, int heads, bool residual"


def _forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass, as `repeated` takes it: x, z, U, the static filter and the frequencies, then the options."""
    x, z, up, static_w, frequencies, residual = inputs
    y: tuple[Tensor, Tensor, Tensor] = fused_rotary_mma.forward(x, z, up, static_w, frequencies, residual)
    return y


def _backward(*inputs: Any) -> tuple[Tensor | None, ...]:
    gradients: tuple[Tensor | None, ...] = fused_rotary_mma.backward(*inputs)
    return gradients


@torch.library.custom_op(
    "dynconv::lowrank_rotary", mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor)"
)
def _rotary_op(
    joined: Tensor, up: Tensor, static_w: Tensor | None, frequencies: Tensor, heads: int, residual: bool
) -> tuple[Tensor, ...]:
    from dynconv.ops.launch import repeated  # imports Triton

    joined = _rows(joined)
    up, static_w, frequencies = up.contiguous(), _contiguous(static_w), frequencies.float().contiguous()
    x, z = _parts(joined, up, frequencies, heads)
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
    from dynconv.ops.launch import repeated

    if joined.numel() == 0:
        like = (joined, up, joined.new_empty(0) if static_w is None else static_w)
        return tuple(torch.zeros_like(t) if wanted else t.new_empty(0) for t, wanted in zip(like, needs, strict=True))
    joined = _rows(joined)
    up, static_w, frequencies = up.contiguous(), _contiguous(static_w), frequencies.float().contiguous()
    x, z = _parts(joined, up, frequencies, heads)
    dys = (gradient.flatten(2) for gradient in (dq, dk, dv))
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


def _rows(joined: Tensor) -> Tensor:
    """The tensor, or a copy if its channels are not adjacent."""
    return joined if joined.stride(2) == 1 else joined.contiguous()


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
