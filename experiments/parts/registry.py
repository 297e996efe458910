"""Every part that a sweep file can name. A new one is a class in this folder, its module in experiments/models, and a
name here."""

from typing import Annotated

from experiments.parts.attention import Attention
from experiments.parts.base import Part
from experiments.parts.short_convolution import (
    Convolution,
    HeadwiseConvolution,
    LowRankConvolution,
    NoConvolution,
    StaticConvolution,
)
from experiments.parts.swiglu import SwiGLU

MIXERS: tuple[type[Part], ...] = (Attention,)
FEED_FORWARDS: tuple[type[Part], ...] = (SwiGLU,)
CONVOLUTIONS: tuple[type[Convolution], ...] = (
    NoConvolution,
    StaticConvolution,
    HeadwiseConvolution,
    LowRankConvolution,
)

# Types of fields that hold one of the kinds: strict.py reads the key `kind` and looks the class up.
Mixer = Annotated[Part, MIXERS]
FeedForward = Annotated[Part, FEED_FORWARDS]
AnyConvolution = Annotated[Convolution, CONVOLUTIONS]
