"""Missing memory of a GPU: how it is told, and the search for a micro-batch that fits once one did not."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from experiments.design.config import RunConfig
from experiments.training.parallel import World


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


def gpu_memory(device: torch.device) -> str:
    """The GPU's memory, and what other programs hold of it, which may be why something did not fit."""
    free, total = torch.cuda.mem_get_info(device)
    others = (total - free - torch.cuda.memory_reserved(device)) / 2**30
    size = f"{total / 2**30:.0f} GiB"
    # What torch did not reserve is also this program's context and libraries, a GiB or so.
    return f"{size}, of which other programs hold about {others:.0f} GiB" if others > 3 else size


def does_not_fit(make: Callable[[int], WarmsUp], tried: int, run: RunConfig, world: World) -> str:
    """What is too large for the GPU's memory, and what to set instead.

    `make` gives a trainer of so many sequences in a micro-batch; `tried` did not fit: 0 if the model itself did not.
    """
    gigabytes = gpu_memory(world.device)
    if tried == 0:
        return f"the model does not fit into the GPU's {gigabytes}; set parallel = 'fsdp' on more GPUs"
    if world.sharded:  # One process alone cannot try, and the others may be waiting for it already.
        advice = f"try micro_batch = {max(1, tried // 2)} in the profile, or more GPUs"
    elif fits := micro_batch_that_fits(make, tried, run.model.sequence_group):
        advice = f"{fits} do: set micro_batch = {fits} in the profile"
    else:
        advice = "nor do fewer: set parallel = 'fsdp' in the profile, on more GPUs"
    return (
        f"micro_batch = {tried} sequences of {run.train.sequence_length} tokens do not fit into the GPU's {gigabytes}; "
        f"{advice}"
    )


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
