"""The modules of Gluon kernels, or None if the installed Triton lacks what they use.

The plain Triton kernels of `static`, `headwise` and `lowrank` run instead.
"""

import importlib
from typing import Any

from torch import Tensor

from dynconv.ops.tiles import runs_gluon


def _module(name: str) -> Any:
    """The module, or None if it cannot be imported: Gluon is experimental, and its names change between releases."""
    try:
        return importlib.import_module(f"dynconv.ops.{name}")
    except (AssertionError, AttributeError, ImportError):  # other names, or Triton's interpreter
        return None


fused_mma = _module("fused_mma")
fused_ring = _module("fused_ring")
lowrank_mma = _module("lowrank_mma")
ring = _module("ring")


def ring_fits(
    x: Tensor,  # [B, T, D]
    weight: Tensor | None,  # [B, T, H, W]; None: static
    width: int,
) -> bool:
    """Whether the Gluon kernels of `ring` support these inputs. They can apply silu."""
    return ring is not None and runs_gluon(x) and ring.fits(x, weight, width)


def mma_fits(
    x: Tensor,  # [B, T, D]
    up: Tensor,  # [R, W*D]
    segments: tuple[int, ...],
    silu: bool = False,
) -> bool:
    """Whether the tensor-core kernels of `lowrank_mma` support these inputs, including silu if asked for."""
    return lowrank_mma is not None and runs_gluon(x) and lowrank_mma.fits(x, up, segments, silu)
