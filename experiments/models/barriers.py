"""Barriers that torch.compile leaves out, without which a kernel can read memory before it is written.

A kernel that torch.compile generates may store a tensor and read it back in a second loop, as the backward pass of a
norm does with a gradient that another kernel needs, too. Triton may give the load other threads than the store, since a
thread stores at most 16 bytes at a time, 4 numbers of float32, but loads 8 beside loads of 8 numbers of bfloat16. A
warp then reads what another has not written yet: whatever the memory held before. Found by pytorch/pytorch#190519,
whose barrier torch has from 2.14 on, and triton-lang/triton#10924.
"""

import re
from functools import wraps
from typing import Any

_STORED = re.compile(r"tl\.(?:store|atomic_\w+)\((?:tl\.\w+\()?(\w+)")  # the pointer, or that of a block pointer
_LOADED = re.compile(r"tl\.load\((?:tl\.\w+\()?(\w+)")
_BARRIER = "tl.debug_barrier()"


def with_barriers(source: str) -> str:
    """The source of a generated Triton kernel, with a barrier before each load of what the kernel has stored."""
    stored: set[str] = set()
    lines: list[str] = []
    for line in source.splitlines(keepends=True):
        if not stored.isdisjoint(_LOADED.findall(line)) and not (lines and lines[-1].strip() == _BARRIER):
            indent = line[: len(line) - len(line.lstrip())]
            lines.append(f"{indent}{_BARRIER}\n")
        stored.update(_STORED.findall(line))
        lines.append(line)
    return "".join(lines)


def add_barriers() -> None:
    """Have torch.compile put these barriers into all kernels that it generates from now on in this process.

    The sources are changed where they are compiled, so that those of torch's cache, which earlier processes may have
    filled, are changed, too. Kernels written by hand are not.
    """
    from torch._inductor.async_compile import AsyncCompile  # takes seconds to import

    compile_kernel: Any = AsyncCompile.triton
    if hasattr(compile_kernel, "adds_barriers"):
        return

    @wraps(compile_kernel)
    def with_source_changed(self: Any, kernel_name: str, source_code: str, *args: Any, **kwargs: Any) -> Any:
        by_hand = "triton_heuristics.user_autotune" in source_code
        source = source_code if by_hand else with_barriers(source_code)
        return compile_kernel(self, kernel_name, source, *args, **kwargs)

    with_source_changed.adds_barriers = True  # type: ignore[attr-defined]
    AsyncCompile.triton = with_source_changed  # type: ignore[method-assign]
