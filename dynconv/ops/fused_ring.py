"""The launches of static and head-wise convolutions of a projection's output, for 16-bit inputs on NVIDIA GPUs.

Shapes: B batch, T time, P parts of the channels (such as q, k and v), D channels of a part, H heads of filters of all
parts, W taps, C columns of the projection's output.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dynconv.ops import ring
from dynconv.ops import ring_kernels as kernels
from dynconv.ops.launch import copied, launch, new
from dynconv.ops.tiles import aligned, new_sums, sum_parts, three


class Tile(NamedTuple):
    """How a program works: with a ring buffer of `stages` groups of `slots` time steps."""

    slots: int
    stages: int
    registers: int | None  # largest number for a thread; None: the compiler's choice
    at_once: int  # programs of four warps that a multiprocessor then runs


# The tiles of `ring`, into which RoPE fits without spills, except that fewer programs run at once forward. Neither they
# nor others have been timed on a GPU.
FORWARD_TILE = Tile(2, 4, None, 6)
BACKWARD_TILE = Tile(4, 2, 128, 4)
_MAX_WIDTH, _MAX_PARTS = 4, 3


def fits(
    joined: Tensor,  # [B, T, C]
    channels: int,  # D
    parts: int,  # P
    width: int,  # W
    head_size: int,  # channels that share a head-wise filter; 0: filters are static
    pairs: int,  # number of pairs of channels in a head that RoPE rotates
    halves: bool,  # whether a pair is channels i and i + E/2 of such a head, and not 2i and 2i + 1
) -> bool:
    """Whether these kernels support the inputs."""
    return (
        joined.dtype in (torch.bfloat16, torch.float16)
        and channels % 16 == 0
        and parts <= _MAX_PARTS
        and width <= _MAX_WIDTH
        # Both channels of a pair must lie in one warp, in lanes whose numbers differ in one bit.
        and (not halves or pairs in (4, 8, 16, 32, 64))
        and (head_size == 0 or _filters_fit(parts * channels, width, head_size))
    )


def _filters_fit(channels: int, width: int, head_size: int) -> bool:
    """Whether the kernels support head-wise filters of these sizes."""
    return (
        width in (2, 4)  # the kernel writes all coefficients of a head at once, into the gradient itself
        and head_size in (4, 8, 16)  # smaller heads take more shared memory
        and head_size <= 4 * width  # so that a lane copies at least two coefficients
        and channels // head_size * width % 16 == 0  # cp.async requires aligned rows
    )


def forward(
    x: Tensor,  # [B, T, P*D]
    weight: Tensor | None,  # [B, T, H, W]; None: static
    static_w: Tensor | None,  # [W, P*D]
    frequencies: Tensor | None,  # [E/2] float32, for RoPE on heads of E channels; only with three parts
    added: Tensor | None,  # [B, T, D], contiguous; only with one part
    parts: int,
    width: int,
    residual: bool,
    halves: bool,
) -> tuple[Tensor, ...]:  # [B, T, D] each
    """The parts after convolution. With frequencies the first two are rotated; `added` is added to the one part."""
    batch, time, channels = *x.shape[:2], x.shape[2] // parts
    x, weight = aligned(x), ring.prepared(weight)
    added = None if added is None else aligned(added)
    results = tuple(new(x, (batch, time, channels), x.dtype) for _ in range(parts))
    tile = FORWARD_TILE
    chunks, blocks, run, constants = ring.plan(
        x, weight, width, residual, False, tile.slots, tile.stages, tile.at_once, parts, *_pairs(frequencies, halves)
    )
    launch(
        kernels.forward_kernel,
        blocks * batch * chunks,
        (x, weight, static_w, *three(results), frequencies, added, None),
        (time, parts * channels, x.stride(0), 0 if weight is None else weight.stride(0), chunks, blocks, run),
        constants | {"y_time": channels},
        num_warps=constants["WARPS"],
        maxnreg=tile.registers,
    )
    return results


def backward(
    dys: tuple[Tensor, ...],  # [B, T, D] each
    x: Tensor,  # [B, T, P*D]
    weight: Tensor | None,  # [B, T, H, W]
    static_w: Tensor | None,  # [W, P*D]
    frequencies: Tensor | None,  # [E/2] float32
    width: int,
    residual: bool,
    halves: bool,
    columns: int,  # C: of `joined`, which holds x and then the filters
    needs: tuple[bool, bool],  # whether `joined` and static_w require gradients
) -> tuple[Tensor | None, ...]:  # [B, T, C], [W, P*D]
    """The gradients of `joined` and static_w."""
    batch, time, channels = dys[0].shape
    parts = len(dys)
    dys = tuple(aligned(dy) for dy in dys)
    if any(dy.stride() != dys[0].stride() for dy in dys):
        dys = tuple(copied(dy) for dy in dys)
    x, weight = aligned(x), ring.prepared(weight)
    tile = BACKWARD_TILE
    chunks, blocks, run, constants = ring.plan(
        x, weight, width, residual, False, tile.slots, tile.stages, tile.at_once, parts, *_pairs(frequencies, halves)
    )
    # A filter's gradient is whole in one program, which writes it beside that of x. What is beyond them is padding.
    written = x.shape[2] + (0 if weight is None else weight.shape[2] * width)
    djoined = new(x, (batch, time, columns), x.dtype, zero=columns > written) if needs[0] else None
    partial, dstatic = new_sums(static_w if needs[1] else None, batch * chunks)
    launch(
        kernels.backward_kernel,
        blocks * batch * chunks,
        (
            *three(dys), x, weight, static_w, frequencies,
            djoined, None if weight is None else djoined, partial, None,
        ),
        (
            time, parts * channels, dys[0].stride(0), x.stride(0), 0 if weight is None else weight.stride(0),
            chunks, blocks, run,
        ),
        constants
        | {
            "dy_time": dys[0].stride(1), "dx_time": columns,
            "dweight_time": columns, "dweight_first": x.shape[2],
        },
        num_warps=constants["WARPS"],
        maxnreg=tile.registers,
    )  # fmt: skip
    sum_parts((partial, dstatic))
    return djoined, dstatic


def _pairs(frequencies: Tensor | None, halves: bool) -> tuple[int, int]:
    """(number of pairs of channels in a head, distance between the two channels of a pair)."""
    if frequencies is None:
        return 0, 1
    return len(frequencies), len(frequencies) if halves else 1
