"""Runs on this machine: slots with their GPUs, in which submitit's local executor has one run at a time.

By itself that executor starts every job at once, ends each after two minutes and hides the GPUs.
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
    """A run that stays stopped when it is told to stop, where submitit would start it again at once."""

    def checkpoint(self) -> NoReturn:
        print(f"{self.why_stopped}; submit again to go on", file=sys.stderr)
        raise SystemExit(1)


def visible_gpus() -> list[int]:
    """Numbers of the GPUs that runs may use, without loading torch."""
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
    """What the driver calls the GPUs of this machine."""
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return re.findall(r"^GPU \d+: (.+?)(?: \(UUID.*)?$", listed.stdout, re.MULTILINE)


def device_name(job: Job) -> str:
    """The device of a run on this machine: "cpu" with its model, or the first GPU as its driver calls it, and torch."""
    gpus, names = ([], []) if job.device == "cpu" else (visible_gpus(), _gpu_names())
    if gpus and gpus[0] < len(names):
        return names[gpus[0]]
    return cpu_name()


class Slots:
    """Room for runs on this machine. A slot has its GPUs; slots beyond the GPUs share them, round-robin."""

    def __init__(self, profile: Profile, jobs: Sequence[Job]) -> None:
        """Raises ValueError where the largest of the jobs does not fit on this machine."""
        need = max((job.gpus for job in jobs), default=1)
        gpus = [] if all(job.device == "cpu" for job in jobs) else visible_gpus()
        if not gpus and any(job.device == "cuda" for job in jobs):
            raise ValueError("device = 'cuda' was asked for and this machine shows no GPU; set device = 'auto'")
        if gpus and need > len(gpus):
            raise ValueError(f"gpus = {need} a run were asked for; this machine shows {len(gpus)}; lower it")
        self._service: Mapping[str, str] = {}  # variables by which runs find the service of `shared_gpus`, if it runs
        self._served: list[int] = []  # the GPUs that it numbers from 0
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
        self._in_use = min(len(self._gpus), len(jobs))  # slots are taken from the first on, so others stay free

    def beside(self, own: Container[int]) -> list[Present]:
        """The runs of other launchers that use this one's GPUs or cores now; `own` holds the process ids of its own."""
        return [run for run in present() if run.share.overlaps(self._all) and run.pid not in own]

    def room(self, beside: Sequence[Present]) -> bool:
        """Whether there is a free slot, and this launcher's runs and those beside them leave one to use."""
        return bool(self.free) and len(self._gpus) - len(self.free) + len(beside) < len(self._gpus)

    def take(self, beside: Sequence[Present]) -> int:
        """Take the first free slot of those whose GPUs have the fewest runs of others."""
        free = [slot for slot in self.free if slot < self._in_use] if self._service else self.free
        used = [gpu for run in beside for gpu in run.share.gpus]
        slot = min(sorted(free), key=lambda slot: max(map(used.count, self._gpus[slot]), default=0))
        self.free.remove(slot)
        return slot

    def share(self, slot: int, job: Job) -> Share:
        """What a run in this slot uses."""
        return replace(self._all, gpus=tuple(self._devices(slot, job)), threads=job.gpus * job.threads)

    def _devices(self, slot: int, job: Job) -> list[int]:
        return [] if job.device == "cpu" else self._gpus[slot][: job.gpus]

    @contextlib.contextmanager
    def shared_gpus(self) -> Iterator[None]:
        """Let runs that share a GPU use it at the same time, where the machine can do that."""
        in_use = self._gpus[: self._in_use]
        self._served = sorted({gpu for gpus in in_use for gpu in gpus})
        if sum(map(len, in_use)) == len(self._served):  # none is shared
            yield
            return
        with multi_process_service(self._served) as self._service:
            yield

    def server(self, snapshot: Path) -> AbstractContextManager[ForkServer]:
        """The process from which the runs are forked, with the code of `snapshot`."""
        variables = {
            "PYTHONPATH": os.pathsep.join([str(snapshot), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONSAFEPATH": "1",  # else the folder that was submitted from comes before the snapshot
            "OMP_NUM_THREADS": str(self._threads),
            "SUBMITIT_PREEMPT_SIGNAL": "TERM",  # submitit reads it when it is imported
            # Otherwise each run starts as many processes that compile as there are cores.
            _COMPILERS: os.environ.get(_COMPILERS, str(max(1, self._cores // max(1, self._in_use)))),
        }
        return fork_server(variables, compiler=self._compiles)

    def start(self, slot: int, run_dir: Path, job: Job, folder: Path, server: ForkServer) -> "submitit.Job[None]":
        """Start a run in a free slot; submitit's files and the output go to `folder`."""
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
    """Ask a run's processes to save their state and leave."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(job_id), signal.SIGTERM)  # submitit's controller passes it on to each process of the run


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for the programs started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
