"""Missing memory of a GPU: how it is told, and the search for a micro-batch that fits once one did not."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Protocol

import torch


class WarmsUp(Protocol):
    """What needs the memory of a whole step in its `warm_up`: the trainer."""

    def warm_up(self) -> None: ...


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it says that memory is missing. Triton says so by a RuntimeError that is no torch.OutOfMemoryError."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


@contextlib.contextmanager
def missing_memory_passed_over() -> Iterator[None]:
    """End the block, without an error, where memory is missing. The frames that hold tensors are gone after it."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise


def micro_batch_that_fits(
    make: Callable[[int], WarmsUp],  # from a number of sequences
    too_large: int,
    group: int,  # of sequences that must stay together
) -> int | None:
    """The largest of a half, a quarter, ... of `too_large` sequences that fits, found by trying; None if none does."""
    count = too_large
    while (count := count // 2 // group * group) > 0:
        gc.collect()
        torch.cuda.empty_cache()
        with missing_memory_passed_over():
            make(count).warm_up()
            return count
    return None
