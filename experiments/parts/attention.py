"""Multi-head attention with rotary positions (arXiv 2104.09864), optionally grouped (GQA) and with QK-norm."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

from experiments.parts.base import Fact, LinearMap, Part, Shape


@dataclass(frozen=True)
class Attention(Part):
    """Causal self-attention: q, k and v map the normed input, and o maps the result back into the residual stream."""

    kind = "attention"
    takes_documents = True

    heads: int | None = None  # heads of queries; None: as many as the size has
    kv_heads: int | None = None  # heads of keys and values, a divisor of `heads`; None: as many as `heads`
    qk_norm: bool = False  # RMSNorm on each head's queries and keys, after the convolutions and before RoPE
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if not 0 < self.rope_theta < math.inf:
            raise ValueError(f"rope_theta must be above zero and finite; got {self.rope_theta}; correct it")

    def fitted(self, shape: Shape) -> Self:
        heads = shape.heads if self.heads is None else self.heads
        kv_heads = heads if self.kv_heads is None else self.kv_heads
        if heads < 1 or shape.width % heads or shape.width // heads % 2:
            raise ValueError(
                f"heads must divide the width of the model into heads with an even number of channels, which RoPE "
                f"rotates in pairs; got {heads} heads and width {shape.width}; choose another number"
            )
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"kv_heads must divide heads; got {kv_heads} and {heads}; choose others")
        return replace(self, heads=heads, kv_heads=kv_heads)

    def head_counts(self) -> tuple[int, int]:
        """(heads of queries, heads of keys and values). Only for a part that `fitted` returned."""
        assert self.heads is not None and self.kv_heads is not None, "fitted() comes first"  # noqa: PT018
        return self.heads, self.kv_heads

    def head_size(self, width: int) -> int:
        return width // self.head_counts()[0]

    def linear_maps(self, width: int) -> dict[str, LinearMap]:
        kv_width = self.head_counts()[1] * self.head_size(width)
        return {
            "q": LinearMap(width, width),
            "k": LinearMap(width, kv_width),
            "v": LinearMap(width, kv_width),
            "o": LinearMap(width, width, of_part_input=False),
        }

    def other_parameters(self, width: int) -> int:
        return 2 * self.head_size(width) if self.qk_norm else 0

    def other_flops(self, width: int, sequence_length: int) -> dict[str, int]:
        # The products QK^T and AV take 2 T^2 D each over all heads; half of that counts, because attention is causal.
        return {"attention": 2 * sequence_length**2 * width}

    def facts(self) -> Mapping[str, Fact]:
        return {"qk_norm": self.qk_norm, "kv_heads": self.head_counts()[1]}
