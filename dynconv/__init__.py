"""Dynamic short convolutions: causal depthwise convolutions whose filter every token makes for itself."""
