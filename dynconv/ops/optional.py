"""The modules of Gluon kernels; None where this Triton lacks what they use, and the plain Triton kernels do."""

import importlib
from typing import Any


def _module(name: str) -> Any:
    try:  # Gluon is experimental, and its names move
        return importlib.import_module(f"dynconv.ops.{name}")
    except (AssertionError, AttributeError, ImportError):  # a Triton with other names; the interpreter
        return None


lowrank_mma = _module("lowrank_mma")
ring = _module("ring")
