"""Dynamic short convolutions: causal depthwise convolutions in which each token computes its own filter."""

from dynconv.ops import (
    final_state,
    headwise_dynamic_convolution,
    headwise_dynamic_convolution_step,
    lowrank_dynamic_convolution,
    lowrank_dynamic_convolution_step,
    static_convolution,
    static_convolution_step,
)

__all__ = [
    "final_state",
    "headwise_dynamic_convolution",
    "headwise_dynamic_convolution_step",
    "lowrank_dynamic_convolution",
    "lowrank_dynamic_convolution_step",
    "static_convolution",
    "static_convolution_step",
]
