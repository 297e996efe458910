"""Out-of-memory errors of a GPU: recognising them, and finding a micro-batch that fits when one did not."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from experiments.design.config import RunConfig
from experiments.training.parallel import World


class WarmsUp(Protocol):
    """What allocates the memory of a whole training step in its `warm_up`: the trainer."""

    def warm_up(self) -> None: ...


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error says that GPU memory ran out. Triton raises a plain RuntimeError, not OutOfMemoryError."""
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)


@contextlib.contextmanager
def out_of_memory_suppressed() -> Iterator[None]:
    """Leave the block without an error when GPU memory runs out.

    The traceback, whose frames hold tensors, is released then, so that their memory can be used again.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise


def gpu_memory(device: torch.device) -> str:
    """The GPU's memory in words, and how much of it other programs hold if that is more than 3 GiB."""
    free, total = torch.cuda.mem_get_info(device)
    others = (total - free - torch.cuda.memory_reserved(device)) / 2**30
    size = f"{total / 2**30:.0f} GiB"
    # The memory that torch did not reserve includes this program's CUDA context and libraries, about a GiB.
    return f"{size}, of which other programs hold about {others:.0f} GiB" if others > 3 else size


def does_not_fit(make: Callable[[int], WarmsUp], tried: int, run: RunConfig, world: World) -> str:
    """An error message: what is too large for the GPU's memory, and what to set instead.

    `make` returns a trainer with this number of sequences in a micro-batch. `tried` is the number that did not fit, or
    0 if the model itself did not.
    """
    gigabytes = gpu_memory(world.device)
    if tried == 0:
        return f"the model does not fit into the GPU's {gigabytes}; set parallel = 'fsdp' on more GPUs"
    if world.sharded:  # Trying takes all processes, and the others may already be waiting elsewhere.
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
    make: Callable[[int], WarmsUp],  # returns a trainer with this number of sequences in a micro-batch
    too_large: int,  # number of sequences that did not fit
    group: int,  # The number of sequences must be a multiple of this.
) -> int | None:
    """The largest of 1/2, 1/4, ... of `too_large` sequences that fits, found by trying; None if none does."""
    count = too_large
    while (count := count // 2 // group * group) > 0:
        gc.collect()
        torch.cuda.empty_cache()
        with out_of_memory_suppressed():
            make(count).warm_up()
            return count
    return None
