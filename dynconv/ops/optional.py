"""The modules of Gluon kernels; None where this Triton lacks what they use, and the plain Triton kernels do."""

import importlib
from typing import Any

from torch import Tensor

from dynconv.ops.tiles import runs_gluon


def _module(name: str) -> Any:
    try:  # Gluon is experimental, and its names move
        return importlib.import_module(f"dynconv.ops.{name}")
    except (AssertionError, AttributeError, ImportError):  # a Triton with other names; the interpreter
        return None


lowrank_mma = _module("lowrank_mma")
ring = _module("ring")


def ring_fits(
    x: Tensor,  # [B, T, D]
    weight: Tensor | None,  # [B, T, H, W]; None: static
    width: int,
) -> bool:
    """Whether the kernels with a ring take the inputs; they apply silu, too."""
    return ring is not None and runs_gluon(x) and ring.fits(x, weight, width)


def mma_fits(
    x: Tensor,  # [B, T, D]
    up: Tensor,  # [R, W*D]
    segments: tuple[int, ...],
    silu: bool = False,
) -> bool:
    """Whether the low-rank kernels on tensor cores take the inputs, and with `silu` apply it, too."""
    return lowrank_mma is not None and runs_gluon(x) and lowrank_mma.fits(x, up, segments, silu)
