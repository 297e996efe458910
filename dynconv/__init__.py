"""Dynamic short convolutions: causal depthwise convolutions whose filter every token makes for itself."""

from dynconv.ops import headwise_dynamic_convolution, lowrank_dynamic_convolution, static_convolution

__all__ = ["headwise_dynamic_convolution", "lowrank_dynamic_convolution", "static_convolution"]
