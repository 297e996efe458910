"""Profiles: where runs execute. A new machine or cluster needs a new TOML file (see slurm/profiles), never new code."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from experiments.design import strict
from experiments.design.config import Execution
from experiments.design.ladder import LADDERS

LONGEST_ATTEMPT = 24.0  # hours: the time limit if the profile has none and the speed was not measured
AUTO = "auto"


@dataclass(frozen=True)
class Job(Execution):
    """How one run executes, and what it asks of the scheduler."""

    # The time limit of one attempt; a run that reaches it saves its state and continues in another attempt. None, or
    # "auto" in a file: derived from the measured speed (launching/account.py), else LONGEST_ATTEMPT.
    hours: float | None = None
    gpus_per_node: int = 8
    cpus_per_gpu: int = 1  # cores of each process
    memory_gb: float | None = None  # per node; None: the cluster's default
    teraflops_per_second: float | None = None  # sustained by one device, for forecasts if nothing was measured

    def __post_init__(self) -> None:
        counts = ("gpus", "gpus_per_node", "cpus_per_gpu", "threads", "max_attempts")
        for name in ("hours", "memory_gb", "teraflops_per_second", *counts):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be finite and above zero; got {value}")
        for name in ("micro_batch", "checkpoint_minutes"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative; got {getattr(self, name)}")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"gpus must fill whole nodes of gpus_per_node = {self.gpus_per_node}; got {self.gpus}; "
                "change one of the two"
            )

    @property
    def time_limit(self) -> float:
        """The time limit of one attempt, in hours."""
        return LONGEST_ATTEMPT if self.hours is None else self.hours

    @property
    def nodes(self) -> int:
        """The number of nodes that hold its GPUs."""
        return -(-self.gpus // self.gpus_per_node)

    @property
    def execution(self) -> Execution:
        """The settings that the run itself needs, which are written into its config.json."""
        return Execution(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Execution)})


@dataclass(frozen=True)
class Slurm:
    """The options of sbatch and srun that all jobs on this cluster share."""

    partition: str
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    setup: tuple[str, ...] = ()  # shell lines before the run, e.g. "module load cuda"
    signal_seconds: int = 120  # how long before the time limit Slurm warns; must suffice to save a checkpoint
    options: Mapping[str, str] = field(default_factory=dict)  # other long options of sbatch: name -> value
    srun_options: tuple[str, ...] = ()  # for the srun that starts the run's processes, e.g. "--container-image=..."
    python: str | None = None  # shell words that start Python on the nodes; None: the interpreter that submits

    def __post_init__(self) -> None:
        if not self.partition.strip():
            raise ValueError(f"partition must be one of the cluster's; got {self.partition!r}; `sinfo` lists them")


@dataclass(frozen=True)
class DataJobs:
    """The resources of jobs on Slurm that build data: `dynconv data build --profile`."""

    cores: int = 64  # number of jobs at once, each of one core
    hours: float = 12.0  # the time limit of each job
    memory_gb: float | None = None  # per job; None: the cluster's default
    partition: str | None = None  # None: the partition of [slurm]

    def __post_init__(self) -> None:
        for name in ("cores", "hours", "memory_gb"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be finite and above zero; got {value}")


@dataclass(frozen=True)
class Profile:
    """The content of one file of slurm/profiles. `default` applies to every size that is not in `size`."""

    executor: Literal["local", "debug", "slurm"]
    max_parallel: int = 0  # runs at once; 0: as many as there are GPUs or cores (local), no limit (slurm)
    max_gpu_hours: float | None = None  # cap for a store: `submit` refuses runs that would exceed it
    slurm: Slurm | None = None
    data: DataJobs = field(default_factory=DataJobs)
    default: Job = field(default_factory=Job)
    size: Mapping[str, Job] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_parallel < 0:
            raise ValueError(f"max_parallel must not be negative; got {self.max_parallel}")
        if self.max_gpu_hours is not None and not 0 < self.max_gpu_hours < math.inf:
            raise ValueError(f"max_gpu_hours must be finite and above zero; got {self.max_gpu_hours}")
        if (self.executor == "slurm") != (self.slurm is not None):
            need = "needs" if self.executor == "slurm" else "does not go with"
            raise ValueError(f"executor {self.executor!r} {need} a table [slurm]")
        if self.slurm is not None:
            hours = min(job.time_limit for job in (self.default, *self.size.values()))
            if not 0 < self.slurm.signal_seconds < 3600 * hours:
                raise ValueError(
                    f"signal_seconds must be above zero and shorter than the shortest hours = {hours:g}; "
                    f"got {self.slurm.signal_seconds}"
                )
        for size in self.size:
            strict.choose(size, [name for ladder in LADDERS.values() for name in ladder.sizes], "table size")

    def job(self, size: str) -> Job:
        """The job of a run of this size."""
        return self.size.get(size, self.default)


def load_profile(path: Path) -> Profile:
    """Read a profile. A table [size.NAME] holds only what differs from [default].

    Raises ValueError, which names the file, the key, the legal values and the nearest match.
    """
    table = strict.read_toml(path)
    default, sizes = table.get("default", {}), table.get("size", {})
    if isinstance(default, dict) and isinstance(sizes, dict):
        table["size"] = {n: default | own if isinstance(own, dict) else own for n, own in sizes.items()}
        for job in (default, *table["size"].values()):
            if isinstance(job, dict) and job.get("hours") == AUTO:
                job["hours"] = None
    return strict.parse(table, Profile, str(path))
