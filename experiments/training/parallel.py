"""The processes that share a run, and how a model's gradients become the same in all of them."""

import contextlib
from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """The processes that share a run, one a device."""

    rank: int
    size: int
    device: torch.device

    def share(self, count: int) -> tuple[int, int]:
        """This process's part of `count` sequences: (first, how many)."""
        first = count * self.rank // self.size
        return first, count * (self.rank + 1) // self.size - first

    def sum(self, tensor: Tensor) -> Tensor:
        """In place, over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def agree(self, number: int) -> bool:
        """Whether all processes have the same number: all of them get the same answer."""
        if self.size == 1:
            return True
        ends = torch.tensor([number, -number], dtype=torch.int64, device=self.device)
        dist.all_reduce(ends, op=dist.ReduceOp.MIN)  # of the numbers, and of their negatives
        return int(ends[0]) == -int(ends[1])

    def wait_for_all(self) -> None:
        """Return once every process has come here."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether the flag is up in any process: all processes get the same answer."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model, wrapped so that a backward pass averages gradients over the processes."""
        return DistributedDataParallel(model) if self.size > 1 else model


def without_averaging(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Forward and backward passes inside leave the gradients of a replicated model to be averaged by a later one."""
    if isinstance(model, DistributedDataParallel):
        return cast(contextlib.AbstractContextManager[None], model.no_sync())
    return contextlib.nullcontext()
