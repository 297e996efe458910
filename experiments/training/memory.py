"""The search for a micro-batch that fits into the memory of a GPU, once one did not."""

import gc
from collections.abc import Callable
from typing import Protocol

import torch


class WarmsUp(Protocol):
    """What needs the memory of a whole step in its `warm_up`: the trainer."""

    def warm_up(self) -> None: ...


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
        try:
            make(count).warm_up()
        except torch.OutOfMemoryError:
            continue
        return count
    return None
