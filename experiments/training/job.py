"""This process's job: its place among the job's processes, its device, and joining them to a process group."""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import submitit

from experiments.design.config import Execution
from experiments.training.compile_cache import compile_cache

if TYPE_CHECKING:  # torch takes seconds to import, and the launcher needs this module without it
    import torch

    from experiments.training.parallel import World


@dataclass(frozen=True)
class Place:
    """The place of this process among the processes of its job, as the scheduler reports it."""

    rank: int = 0
    size: int = 1  # number of processes of the job
    local_rank: int = 0  # rank among the processes on this node
    job: str = ""  # the job's id
    hosts: tuple[str, ...] = ()  # the job's nodes


def this_place() -> Place:
    """The place of this process. Outside of a job it is the only process."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return Place()
    job = submitit.JobEnvironment()
    return Place(job.global_rank, job.num_tasks, job.local_rank, job.job_id, tuple(job.hostnames))


@contextmanager
def joined(run_dir: Path, execution: Execution, place: Place) -> Iterator["World"]:
    """The processes of this job. If there are several, they are joined to a process group until the context ends.

    Programs compiled for a GPU are cached for other runs (compile_cache.py). Raises ValueError if the requested device
    is missing, or if the processes' GPUs differ.
    """
    from experiments.training.parallel import World

    device = _device(execution, place)
    world = World(place.rank, place.size, device, execution.parallel)
    with ExitStack() as stack:
        if device.type == "cuda":  # Nothing is compiled for a CPU.
            stack.enter_context(compile_cache())
        if world.size > 1:
            stack.enter_context(_process_group(run_dir, world, place))
        yield world


@contextmanager
def _process_group(run_dir: Path, world: "World", place: Place) -> Iterator[None]:
    """Join the processes of this job until the context ends. Raises ValueError if their GPUs differ."""
    import torch

    from experiments.training.rendezvous import process_group

    restart = os.environ.get("SLURM_RESTART_COUNT", "0")  # A requeued job keeps its id.
    meeting = run_dir.absolute() / f".rendezvous-{place.job}-{restart}"
    if world.rank == 0:
        for stale in run_dir.glob(".rendezvous-*"):  # left by attempts that were killed before all processes joined
            stale.unlink(missing_ok=True)
    device = world.device
    with process_group(device, meeting, world.rank, world.size, place.hosts):
        names = world.gather(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
        other = next((rank for rank, name in enumerate(names) if name != names[0]), None)
        if other is not None:
            raise ValueError(
                f"the processes' devices differ: rank 0 has {names[0]}, and rank {other} has {names[other]}; "
                "ask for equal ones, on Slurm by constraint = ... in the profile"
            )
        yield


def _device(execution: Execution, place: Place) -> "torch.device":
    """The device of this process. Raises ValueError if the profile asks for a GPU and torch finds none."""
    import torch

    if execution.device == "cpu" or not torch.cuda.is_available():
        if torch.version.cuda is None and torch.version.hip is None:
            problem = f"torch {torch.__version__} was built without CUDA; install a build that has it"
        else:
            problem = "torch sees no GPU"
        if execution.device == "cuda":
            raise ValueError(f"device = 'cuda' was asked for and {problem}; set device = 'auto' or 'cpu'")
        if execution.device == "auto" and os.environ.get("CUDA_VISIBLE_DEVICES"):
            print(f"this run was given a GPU and trains on the CPU, because {problem}", file=sys.stderr, flush=True)
        torch.set_num_threads(execution.threads)
        return torch.device("cpu")
    device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
