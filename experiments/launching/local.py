"""Runs on this machine: a fixed number of slots, each with its GPUs and one run at a time, over submitit's executor.

By itself submitit's local executor starts every job at once, ends each after two minutes and hides the GPUs.
"""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import submitit

from experiments.design.calibrations import cpu_name
from experiments.launching.fork_server import ForkedExecutor, ForkServer, fork_server
from experiments.launching.mps import multi_process_service
from experiments.launching.profile import Job, Profile
from experiments.training.presence import Present, Share, present
from experiments.training.run import Run

_COMPILERS = "TORCHINDUCTOR_COMPILE_THREADS"


class LocalRun(Run):
    """A run that stays stopped when it is told to stop. submitit would start it again at once."""

    def checkpoint(self) -> NoReturn:
        """Called by submitit after the state was saved. Ends the process instead of returning a job to submit."""
        print(f"{self.why_stopped}; submit again to go on", file=sys.stderr)
        raise SystemExit(1)


def visible_gpus() -> list[int]:
    """Numbers of the GPUs that runs may use, without importing torch. Raises ValueError for names such as UUIDs."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",") if name.strip()]
        # CUDA reads the list up to the first negative number, so that -1 hides all GPUs.
        names = list(itertools.takewhile(lambda name: not name.startswith("-"), names))
        if not all(name.isdigit() for name in names):
            raise ValueError(f"CUDA_VISIBLE_DEVICES={chosen}: wanted numbers, as submitit takes no other names")
        return [int(name) for name in names]
    return list(range(len(_gpu_names())))


def _gpu_names() -> list[str]:
    """The names of this machine's GPUs, from the driver."""
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", listed.stdout, re.MULTILINE)


def device_name(job: Job) -> str:
    """The name of a job's device on this machine: of the first GPU, as the driver and torch name it, or of the CPU."""
    gpus, names = ([], []) if job.device == "cpu" else (visible_gpus(), _gpu_names())
    if gpus and gpus[0] < len(names):
        return names[gpus[0]]
    return cpu_name()


class Slots:
    """Slots for runs on this machine, each with its GPUs. More slots than GPUs share them, round-robin."""

    def __init__(self, profile: Profile, jobs: Sequence[Job]) -> None:
        """Raises ValueError if the largest of the jobs does not fit on this machine."""
        need = max((job.gpus for job in jobs), default=1)
        gpus = [] if all(job.device == "cpu" for job in jobs) else visible_gpus()
        if not gpus and any(job.device == "cuda" for job in jobs):
            raise ValueError("device = 'cuda' was asked for and this machine shows no GPU; set device = 'auto'")
        if gpus and need > len(gpus):
            raise ValueError(f"gpus = {need} a run were asked for; this machine shows {len(gpus)}; lower it")
        self._service: Mapping[str, str] = {}  # environment variables for the MPS of `shared_gpus`, if it runs
        self._served: list[int] = []  # the GPUs of the MPS, which numbers them from 0 in this order
        self._compiles = bool(gpus) and any(job.compile for job in jobs)
        self._cores = len(os.sched_getaffinity(0))
        self._threads = max((job.gpus * job.threads for job in jobs), default=1)  # of the largest run
        fitting = len(gpus) // need if gpus else max(1, self._cores // self._threads)
        self._gpus = [
            [gpus[(slot * need + k) % len(gpus)] for k in range(need)] if gpus else []
            for slot in range(profile.max_parallel or fitting)
        ]
        self._all = Share(tuple(gpus), 0, tuple(sorted(os.sched_getaffinity(0))))
        self.free = list(range(len(self._gpus)))
        self._in_use = min(len(self._gpus), len(jobs))  # number of slots that can be in use: the first ones

    def beside(self, own: Container[int]) -> list[Present]:
        """The runs of other launchers that use these GPUs or cores now. `own` has the process ids of our own runs."""
        return [run for run in present() if run.share.overlaps(self._all) and run.pid not in own]

    def room(self, beside: Sequence[Present]) -> bool:
        """Whether a slot is free, and the runs of all launchers together are fewer than the slots."""
        return bool(self.free) and len(self._gpus) - len(self.free) + len(beside) < len(self._gpus)

    def take(self, beside: Sequence[Present]) -> int:
        """Take the free slot whose GPUs have the fewest runs of other launchers, the first of several. Returns it."""
        free = [slot for slot in self.free if slot < self._in_use] if self._service else self.free
        used = [gpu for run in beside for gpu in run.share.gpus]
        slot = min(sorted(free), key=lambda slot: max(map(used.count, self._gpus[slot]), default=0))
        self.free.remove(slot)
        return slot

    def share(self, slot: int, job: Job) -> Share:
        """The part of this machine that a run in this slot uses."""
        return replace(self._all, gpus=tuple(self._devices(slot, job)), threads=job.gpus * job.threads)

    def _devices(self, slot: int, job: Job) -> list[int]:
        return [] if job.device == "cpu" else self._gpus[slot][: job.gpus]

    @contextlib.contextmanager
    def shared_gpus(self) -> Iterator[None]:
        """A context in which runs that share a GPU use it at the same time, if the machine has NVIDIA's MPS."""
        in_use = self._gpus[: self._in_use]
        self._served = sorted({gpu for gpus in in_use for gpu in gpus})
        if sum(map(len, in_use)) == len(self._served):  # No GPU is shared.
            yield
            return
        with multi_process_service(self._served) as self._service:
            yield

    def server(self, snapshot: Path) -> AbstractContextManager[ForkServer]:
        """A context with the server that forks the runs, which imports the code of `snapshot`."""
        variables = {
            "PYTHONPATH": os.pathsep.join([str(snapshot), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONSAFEPATH": "1",  # Otherwise Python imports from the current folder before the snapshot.
            "OMP_NUM_THREADS": str(self._threads),
            "SUBMITIT_PREEMPT_SIGNAL": "TERM",  # submitit reads it when it is imported.
            # By default each run would start as many compiler processes as there are cores.
            _COMPILERS: os.environ.get(_COMPILERS, str(max(1, self._cores // max(1, self._in_use)))),
        }
        return fork_server(variables, compiler=self._compiles)

    def start(self, slot: int, run_dir: Path, job: Job, folder: Path, server: ForkServer) -> "submitit.Job[None]":
        """Start a run in a slot that was taken. submitit's files and the run's output go to `folder`."""
        gpus = self._devices(slot, job)
        executor = ForkedExecutor(folder, server)
        executor.update_parameters(
            timeout_min=60 * job.time_limit,
            tasks_per_node=job.gpus,
            gpus_per_node=len(gpus),
            visible_gpus=[self._served.index(gpu) for gpu in gpus] if self._service else gpus,
        )
        variables = {
            **self._service,
            "SUBMITIT_PREEMPT_SIGNAL": "TERM",
            "OMP_NUM_THREADS": str(job.threads),
        }
        with environment(variables):
            return executor.submit(LocalRun(run_dir))


def stop(job_id: str) -> None:
    """Ask a run's processes to save their state and end. Raises PermissionError if they are another user's."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(job_id), signal.SIGTERM)  # submitit's controller forwards it to each process of the run.


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """A context with these environment variables set, for programs started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
