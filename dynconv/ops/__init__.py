"""The convolution functions. Each runs on the best implementation for its tensors' device."""

from dynconv.ops.functions import (
    headwise_dynamic_convolution,
    lowrank_dynamic_convolution,
    static_convolution,
)

__all__ = ["headwise_dynamic_convolution", "lowrank_dynamic_convolution", "static_convolution"]
