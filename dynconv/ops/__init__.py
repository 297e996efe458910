"""The convolution functions. Each runs on the best implementation for its tensors' device."""

from dynconv.ops.functions import (
    final_state,
    headwise_dynamic_convolution,
    headwise_dynamic_convolution_step,
    lowrank_dynamic_convolution,
    lowrank_dynamic_convolution_step,
    static_convolution,
    static_convolution_step,
)
from dynconv.ops.fused import (
    has_fused_kernels,
    headwise_joined_convolution,
    headwise_rotary_convolution,
    interleaved,
    lowrank_gated_convolution,
    lowrank_joined_convolution,
    lowrank_rotary_convolution,
    static_gated_convolution,
    static_joined_convolution,
    static_rotary_convolution,
)

__all__ = [
    "final_state",
    "has_fused_kernels",
    "headwise_dynamic_convolution",
    "headwise_dynamic_convolution_step",
    "headwise_joined_convolution",
    "headwise_rotary_convolution",
    "interleaved",
    "lowrank_dynamic_convolution",
    "lowrank_dynamic_convolution_step",
    "lowrank_gated_convolution",
    "lowrank_joined_convolution",
    "lowrank_rotary_convolution",
    "static_convolution",
    "static_convolution_step",
    "static_gated_convolution",
    "static_joined_convolution",
    "static_rotary_convolution",
]
