"""The final states of packed documents by one Triton kernel. Legend: T time, D channels, W taps, N documents."""

import triton
import triton.language as tl
from torch import Tensor

from dynconv.ops.launch import launch, new, repeated


@triton.jit
def _state_kernel(
    x, cu_seqlens, before, state, channels, x_time, count, ROWS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(channels, BD)
    d = ((tl.program_id(0) % blocks) * BD + tl.arange(0, BD))[None, :]
    document = (tl.program_id(0) // blocks).to(tl.int64)
    start = tl.load(cu_seqlens + document).to(tl.int64)
    end = tl.load(cu_seqlens + document + 1).to(tl.int64)
    place = tl.arange(0, ROWS)[:, None]
    ok = (place < count) & (d < channels)
    token = place + (end - count)
    value = tl.load(x + token * x_time + d, mask=ok & (token >= start), other=0.0)
    rows = place + document * count
    if before is not None:  # a short document is preceded by the last rows of its initial state
        earlier = tl.load(before + (rows + (end - start)) * channels + d, mask=ok & (token < start), other=0.0)
        value = tl.where(token >= start, value, earlier)
    tl.store(state + rows * channels + d, value, mask=ok)


def _states(x: Tensor, cu_seqlens: Tensor, before: Tensor | None, width: int) -> tuple[Tensor]:
    """Launch the kernel; returns a tuple, as `repeated` requires."""
    channels, documents = x.shape[2], cu_seqlens.shape[0] - 1
    state = new(x, (documents, width - 1, channels), x.dtype)
    rows = triton.next_power_of_2(width - 1)
    block = max(16, min(1024 // rows, triton.next_power_of_2(channels)))
    programs = documents * triton.cdiv(channels, block)
    integers = (channels, x.stride(1), width - 1)
    launch(_state_kernel, programs, (x, cu_seqlens, before, state), integers, {"ROWS": rows, "BD": block})
    return (state,)


def packed_states(
    x: Tensor,  # [1, T, D], its last dimension contiguous
    cu_seqlens: Tensor,  # [N + 1]
    initial_state: Tensor | None,  # [N, W-1, D], contiguous, in x's dtype
    width: int,
) -> Tensor:  # [N, W-1, D]
    """`documents.final_state` in one launch, without support for gradients."""
    (state,) = repeated(_states, (x, cu_seqlens, initial_state), (width,))
    return state
