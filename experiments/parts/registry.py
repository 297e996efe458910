"""Every part that a sweep file can name.

To add one, write its class in parts/X.py, its module in models/X.py, and enter the class below.
"""

from typing import Annotated

from experiments.parts.attention import Attention
from experiments.parts.base import Part
from experiments.parts.gated_deltanet import GatedDeltaNet
from experiments.parts.mamba2 import Mamba2
from experiments.parts.moe import MoE
from experiments.parts.short_convolution import (
    Convolution,
    HeadwiseConvolution,
    LowRankConvolution,
    NoConvolution,
    StaticConvolution,
)
from experiments.parts.swiglu import SwiGLU

MIXERS: tuple[type[Part], ...] = (Attention, Mamba2, GatedDeltaNet)
FEED_FORWARDS: tuple[type[Part], ...] = (SwiGLU, MoE)
CONVOLUTIONS: tuple[type[Convolution], ...] = (
    NoConvolution,
    StaticConvolution,
    HeadwiseConvolution,
    LowRankConvolution,
)

# Types of fields that hold a part of any kind: design/strict.py chooses the class by the key `kind`.
Mixer = Annotated[Part, MIXERS]
FeedForward = Annotated[Part, FEED_FORWARDS]
AnyConvolution = Annotated[Convolution, CONVOLUTIONS]
