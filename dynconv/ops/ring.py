"""The static and head-wise convolutions with a ring in shared memory: which inputs fit, and the launches.

Legend: B batch, T time, D channels, H heads, W taps (WP: the next power of two).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dynconv.ops import ring_kernels as kernels
from dynconv.ops.launch import launch, new
from dynconv.ops.tiles import aligned, cheapest_run, multiprocessors, new_like, new_sums, sum_parts

_WARP_CHANNELS = 128  # four for each of a warp's 32 lanes
_MAX_WIDTH = 8


def fits(x: Tensor, weight: Tensor | None, width: int) -> bool:
    """Whether these kernels support the inputs. The kernels of `static` and `headwise` support all, but not silu."""
    return (
        x.dtype in (torch.bfloat16, torch.float16)
        and x.shape[2] % 16 == 0
        and (width <= _MAX_WIDTH if weight is None else _weight_fits(x, weight, width))
    )


def _weight_fits(x: Tensor, weight: Tensor, width: int) -> bool:
    """Whether the kernels support these head-wise filters [B, T, H, W] of x [B, T, D]."""
    heads, padded = weight.shape[2], triton.next_power_of_2(width)
    head_size = x.shape[2] // heads
    return (
        2 <= width <= (4 if head_size < 4 else _MAX_WIDTH)  # smaller heads take more shared memory than there is
        and weight.dtype == x.dtype
        and (weight.stride(2) == width or padded != width)
        and heads * padded % 16 == 0  # cp.async requires aligned rows
        and head_size & (head_size - 1) == 0
        and head_size <= 4 * padded  # so that a lane copies at least two coefficients
    )


@triton.jit(do_not_specialize=["size", "time", "batch_stride", "time_stride", "head_stride"])
def _copy_taps_kernel(
    source, out, size, time, heads, batch_stride, time_stride, head_stride,
    GIVEN: tl.constexpr, WANTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tap, head, token = at % WANTED, at // WANTED % heads, at // (WANTED * heads)
    place = source + token // time * batch_stride + token % time * time_stride + head * head_stride + tap
    tl.store(out + at, tl.load(place, mask=(tap < GIVEN) & (at < size), other=0.0), mask=at < size)


def _with_taps(
    weight: Tensor,  # [B, T, H, W], with contiguous taps
    wanted: int,
) -> Tensor:  # [B, T, H, wanted]
    """Each head's filter, padded with zeros or cut to `wanted` taps."""
    batch, time, heads, given = weight.shape
    if given == wanted:
        return weight
    out = new(weight, (batch, time, heads, wanted), weight.dtype)
    integers = (out.numel(), time, heads, *weight.stride()[:3])
    constants = {"GIVEN": given, "WANTED": wanted, "BLOCK": 1024}
    launch(_copy_taps_kernel, triton.cdiv(out.numel(), 1024), (weight, out), integers, constants)
    return out


def prepared(weight: Tensor | None) -> Tensor | None:  # [B, T, H, W] -> [B, T, H, WP]
    """The filters in the layout of the kernels: padded to WP taps, and aligned for cp.async."""
    return None if weight is None else aligned(_with_taps(weight, triton.next_power_of_2(weight.shape[3])))


def plan(
    x: Tensor,  # [B, T, D]
    weight: Tensor | None,  # [B, T, H, WP]
    width: int,
    residual: bool,
    silu: bool,
    slots: int,
    stages: int,
    at_once: int,  # programs of four warps that a multiprocessor holds
    parts: int | None = None,  # segments of equal width, each with a result of its own; None: all of x is one
    pairs: int = 0,  # pairs of channels in a head that RoPE rotates
    apart: int = 1,  # distance from the first channel of a pair to the second
) -> tuple[int, int, int, dict[str, Any]]:
    """(number of chunks of time, number of blocks of channels, RUN, constants that both passes share)."""
    batch, time, channels = x.shape
    channels //= parts or 1
    warps = 4 if channels % (4 * _WARP_CHANNELS) == 0 else 2 if channels % (2 * _WARP_CHANNELS) == 0 else 1
    blocks = (parts or 1) * triton.cdiv(channels, warps * _WARP_CHANNELS)
    step = slots * stages
    longest = 128 // step * step
    _, run = cheapest_run(time, 1, blocks * batch, multiprocessors(x), at_once * 4 // warps, step, longest)
    constants = {
        "x_time": x.stride(1), "weight_time": 0 if weight is None else weight.stride(1),
        "SEGMENTS": parts and (channels,) * parts, "PAIRS": pairs, "APART": apart,
        "HP": 1 if weight is None else x.shape[2] // weight.shape[2], "W": width, "WP": triton.next_power_of_2(width),
        "RESIDUAL": residual, "SILU": silu,
        "SLOTS": slots, "STAGES": stages, "WARPS": warps,
    }  # fmt: skip
    assert run % step == 0, "the kernels expect a run's last inputs at the ring's start"
    return triton.cdiv(time, run), blocks, run, constants


def forward(
    x: Tensor,  # [B, T, D]
    weight: Tensor | None,  # [B, T, H, W]; None: static
    static_w: Tensor | None,  # [W, D]
    positions: Tensor | None,  # [T + 1] int32: as in `reference.convolve`
    width: int,
    residual: bool,
    silu: bool,
) -> Tensor:  # [B, T, D]
    """The result, in x's dtype."""
    batch, time, channels = x.shape
    x, weight = aligned(x), prepared(weight)
    y = new_like(x)
    at_once = 8 if width <= 5 else 4  # limited by registers
    chunks, blocks, run, constants = plan(x, weight, width, residual, silu, 2, 4, at_once)
    launch(
        kernels.forward_kernel,
        blocks * batch * chunks,
        (x, weight, static_w, y, None, None, None, None, positions),
        (time, channels, x.stride(0), 0 if weight is None else weight.stride(0), chunks, blocks, run),
        constants | {"y_time": channels},
        num_warps=constants["WARPS"],
    )
    return y


def backward(
    dy: Tensor,  # [B, T, D]
    x: Tensor,  # [B, T, D]
    weight: Tensor | None,  # [B, T, H, W]
    static_w: Tensor | None,  # [W, D]
    positions: Tensor | None,  # [T + 1] int32: as in `reference.convolve`
    width: int,
    residual: bool,
    silu: bool,
    needs: tuple[bool, bool, bool],  # whether x, weight and static_w require gradients
) -> tuple[Tensor | None, ...]:  # [B, T, D], [B, T, H, W], [W, D]
    """The gradients of x, weight and static_w, in their dtypes."""
    batch, time, channels = x.shape
    dy, x, weight = aligned(dy), aligned(x), prepared(weight)
    stages = 2
    if weight is not None and channels < 4 * weight.shape[2]:  # heads of under 4 channels: a lane holds several filters
        slots, registers, at_once = 8, None, 2  # shared memory allows two programs
    elif width > 5:  # the ring must reach W - 1 slots ahead
        slots, stages = 2, 5
        registers, at_once = (168, 3) if weight is None and not silu else (255, 2)
    elif weight is not None and silu:
        slots, registers, at_once = 4, 168, 3
    else:
        slots, registers, at_once = 4, 128, 4
    chunks, blocks, run, constants = plan(x, weight, width, residual, silu, slots, stages, at_once)
    dx = new_like(x) if needs[0] else None
    dweight = None if weight is None or not needs[1] else new_like(weight)
    partial, dstatic = new_sums(static_w if needs[2] else None, batch * chunks)
    launch(
        kernels.backward_kernel,
        blocks * batch * chunks,
        (dy, None, None, x, weight, static_w, None, dx, dweight, partial, positions),
        (
            time, channels, dy.stride(0), x.stride(0), 0 if weight is None else weight.stride(0), chunks, blocks, run,
        ),
        constants
        | {
            "dy_time": dy.stride(1), "dx_time": channels,
            "dweight_time": 0 if weight is None else weight.shape[2] * weight.shape[3], "dweight_first": 0,
        },
        num_warps=constants["WARPS"],
        maxnreg=registers,
    )  # fmt: skip
    sum_parts((partial, dstatic))
    return dx, None if dweight is None else _with_taps(dweight, width), dstatic
