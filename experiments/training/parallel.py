"""The processes that train a run together, and the averaging of gradients over them."""

import contextlib
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """The processes that train a run together, each on a device of its own."""

    rank: int
    size: int
    device: torch.device

    def share(self, count: int, group: int = 1) -> tuple[int, int]:
        """This process's share of `count` sequences, as (index of the first, number of sequences).

        Shares hold whole groups of `group` neighbouring sequences, the last of which may have fewer.
        """
        groups = -(-count // group)
        first, end = (min(count, group * (groups * rank // self.size)) for rank in (self.rank, self.rank + 1))
        return first, end - first

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`, replaced in place by its sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, number: int) -> bool:
        """Whether all processes pass the same number. Every process gets the same answer."""
        if self.size == 1:
            return True
        # One reduction gives the minimum and, negated, the maximum. They are equal only if all numbers are.
        extremes = torch.tensor([number, -number], dtype=torch.int64, device=self.device)
        dist.all_reduce(extremes, op=dist.ReduceOp.MIN)
        return int(extremes[0]) == -int(extremes[1])

    def wait_for_all(self) -> None:
        """Return once every process has called this."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether any process passes True. Every process gets the same answer."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model, wrapped so that a backward pass averages gradients over the processes."""
        return DistributedDataParallel(model) if self.size > 1 else model


def without_averaging(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """A context in which backward passes accumulate gradients without averaging them over the processes.

    The next backward pass outside of it averages what was accumulated.
    """
    if isinstance(model, DistributedDataParallel):
        return cast(contextlib.AbstractContextManager[None], model.no_sync())
    return contextlib.nullcontext()
