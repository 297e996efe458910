"""Arms: the architecture variants that sweep files name.

Add one as an entry of `ARMS`, or as a table [arm.NAME] of one sweep file.
"""

from dataclasses import dataclass, field

from experiments.design.recipe import Recipe
from experiments.parts.attention import Attention
from experiments.parts.registry import AnyConvolution, FeedForward, Mixer
from experiments.parts.short_convolution import (
    HeadwiseConvolution,
    LowRankConvolution,
    NoConvolution,
    StaticConvolution,
)
from experiments.parts.swiglu import SwiGLU


@dataclass(frozen=True)
class Arm:
    """One architecture variant, with its own training settings. Settings that it leaves None come from the ladder."""

    mixer: Mixer = field(default_factory=Attention)
    ffn: FeedForward = field(default_factory=SwiGLU)
    conv: AnyConvolution = field(default_factory=NoConvolution)
    train: Recipe = field(default_factory=Recipe)


QKV = ("q", "k", "v")
ALL_LINEAR = (*QKV, "o", "gate", "up", "down")
# The four sites of Canon layers (arXiv 2512.17351), A to D: the normed input of attention; q, k and v; the normed input
# of the feed-forward part; its two inner maps, before the activation.
CANON = ("mixer_input", *QKV, "ffn_input", "gate", "up")

ARMS = {
    "transformer": Arm(),
    "static-qkv": Arm(conv=StaticConvolution(QKV)),
    "static-canon": Arm(conv=StaticConvolution(CANON)),
    "headwise-qkv": Arm(conv=HeadwiseConvolution(QKV)),
    "lowrank-qkv": Arm(conv=LowRankConvolution(QKV)),
    "lowrank-qkv-mismatched": Arm(conv=LowRankConvolution(QKV, mismatched=True)),
    "lowrank-all": Arm(conv=LowRankConvolution(ALL_LINEAR)),
}
