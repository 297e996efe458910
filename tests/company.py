"""Forked processes of a test that train as one."""

import gc
from pathlib import Path

import torch
import torch.distributed as dist


def meet(rank: int, size: int, folder: Path) -> None:
    """Join the other processes; `folder` is theirs alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=size)


def part() -> None:
    """Leave them. The trainer must be deleted before: DDP would be the last to hold the group, and free it with the
    interpreter's lock, for which the group's thread may wait (see `process_group` in training/rendezvous.py)."""
    gc.collect()
    dist.destroy_process_group()
