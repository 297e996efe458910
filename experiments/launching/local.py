"""Runs on this machine: submitit's local executor, fed as slots free.

Left to itself it starts every job at once, ends each after two minutes and hides the GPUs.
"""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import submitit

from experiments.launching.profile import Job, Profile
from experiments.training.run import Run


class LocalRun(Run):
    """A run that stays stopped when it is told to stop, where submitit would start it again at once."""

    def checkpoint(self) -> NoReturn:
        print("stopped with its state saved; submit again to go on", file=sys.stderr)
        raise SystemExit(1)


def visible_gpus() -> list[int]:
    """Numbers of the GPUs that runs may use, without loading torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",") if name.strip()]
        names = list(
            itertools.takewhile(lambda name: not name.startswith("-"), names)
        )  # CUDA stops there: -1 hides all
        if not all(name.isdigit() for name in names):
            raise ValueError(f"CUDA_VISIBLE_DEVICES={chosen}: wanted numbers, as submitit takes no other names")
        return [int(name) for name in names]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return list(range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines())))


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
        cores = len(os.sched_getaffinity(0)) // max((job.gpus * job.threads for job in jobs), default=1)
        fitting = len(gpus) // need if gpus else max(1, cores)
        self._gpus = [
            [gpus[(slot * need + k) % len(gpus)] for k in range(need)] if gpus else []
            for slot in range(profile.max_parallel or fitting)
        ]
        self.free = list(range(len(self._gpus)))

    def start(self, slot: int, run_dir: Path, job: Job, folder: Path, snapshot: Path) -> "submitit.Job[None]":
        gpus = [] if job.device == "cpu" else self._gpus[slot][: job.gpus]
        executor = submitit.LocalExecutor(folder=folder)
        executor.update_parameters(
            timeout_min=60 * job.hours,
            tasks_per_node=job.gpus,
            gpus_per_node=len(gpus),
            visible_gpus=gpus,
            stderr_to_stdout=True,
        )
        variables = {
            "SUBMITIT_PREEMPT_SIGNAL": "TERM",
            "PYTHONPATH": os.pathsep.join([str(snapshot), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "PYTHONSAFEPATH": "1",  # else the folder that was submitted from comes before the snapshot
            "OMP_NUM_THREADS": str(job.threads),
        }
        with _environment(variables):
            return executor.submit(LocalRun(run_dir))


def stop(job_id: str) -> None:
    """Ask a run's processes to save their state and leave."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(job_id), signal.SIGTERM)  # submitit's controller passes it on to each process of the run


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Nothing short of SIGKILL ends this process inside, where a job has begun that nobody would know of.

    INT and HUP are ignored, also and for good by the programs started inside: a terminal sends both to all of them.
    TERM is acted on at the end.
    """
    noted: list[int] = []
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGHUP)}
    before[signal.SIGTERM] = signal.signal(signal.SIGTERM, lambda number, _: noted.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if noted:
            signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
