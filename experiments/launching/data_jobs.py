"""Builds data by jobs on Slurm: one array of jobs for each step of experiments/data/steps.py, one after another."""

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.errors import WorkFailed
from analysis.logs.files import read_json, write_json
from experiments.data import steps
from experiments.data.build import build as build_here
from experiments.design.data import DataConfig
from experiments.launching import jobs, sbatch, slurm, snapshot
from experiments.launching.locks import store_lock
from experiments.launching.profile import DataJobs, Profile, Slurm

POLL_SECONDS = 5.0
JOBS = "jobs.json"


def build(spec: DataConfig, profile: Profile, cache: Path, *, wait: bool = False) -> Path | None:
    """The dataset of `spec` if it is in the cache. Otherwise submits jobs that build it, unless they are queued, and
    returns None, or with `wait` the dataset once it is built.

    A build whose job failed or was killed continues where it stopped. Raises ValueError as `build` of data does, or if
    Slurm does not answer; WorkFailed if the jobs ended without the dataset.
    """
    if profile.slurm is None or spec.pretokenized is not None:
        return build_here(spec, cache)
    slurm.check(profile.slurm)
    with store_lock(cache):
        shared = steps.begin(spec, cache)
        if isinstance(shared, Path):
            return shared
        submitted = _submitted(shared)
        if not _queued(submitted):
            submitted = _submit(shared, profile.slurm, profile.data)
    print(
        f"data build: {shared.progress()}; jobs {', '.join(job['id'] for job in submitted)}, output in "
        f"{submitted[0]['folder']}; the build's files are in {shared.folder}",
        file=sys.stderr,
    )
    return _wait(spec, shared, submitted, cache) if wait else None


def require_nothing_under_way(specs: Iterable[DataConfig], cache: Path) -> None:
    """Raises ValueError if jobs on Slurm are building one of these datasets, so that it is not built twice."""
    for spec in specs:
        shared = None if spec.pretokenized is not None else steps.under_way(spec, cache)
        submitted = [] if shared is None else _submitted(shared)
        if shared is not None and _queued(submitted):
            raise ValueError(
                f"the data are being built by Slurm ({shared.progress()}; jobs "
                f"{', '.join(job['id'] for job in submitted)}); wait for them with `dynconv data build SWEEP "
                "--profile FILE --wait`, or cancel them"
            )


def _submitted(shared: steps.Shared) -> list[dict[str, Any]]:
    """The arrays of the last submission: for each its step, id, number of workers, user id and folder of output."""
    path = shared.folder / JOBS
    return list(read_json(path)["jobs"]) if path.exists() else []


def _queued(submitted: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one of the jobs is waiting or running. Raises ValueError if Slurm does not answer."""
    if not submitted:
        return False
    ids = [f"{job['id']}_{worker}" for job in submitted for worker in range(job["workers"])]
    found = slurm.queue(ids, {job["user"] for job in submitted})
    if found is None:
        raise ValueError("Slurm does not say whether jobs build the data (squeue failed); try again when it answers")
    return bool(found)


def _may_be_queued(submitted: Sequence[Mapping[str, Any]]) -> bool:
    """As `_queued`, but True if Slurm does not answer: the caller asks again."""
    try:
        return _queued(submitted)
    except ValueError as error:
        print(f"data build: {error}", file=sys.stderr)
        return True


def _submit(shared: steps.Shared, asked: Slurm, data: DataJobs) -> list[dict[str, Any]]:
    """Submit all steps, each to start when the one before has succeeded. Returns the arrays.

    Raises ValueError if one is refused, after it cancelled those before it.
    """
    sbatch.name_ignored_variables()
    code, folder = snapshot.take(shared.cache), jobs.new_folder(shared.cache, "data")
    steps.failure_of(shared.folder).unlink(missing_ok=True)
    most = min(data.cores, slurm.max_array_size())
    submitted: list[dict[str, Any]] = []
    for step, pieces in shared.counts().items():
        workers = min(pieces, most)
        after = submitted[-1]["id"] if submitted else None
        script = _script(shared, asked, data, step, workers, folder, code, after)
        try:
            job_id = _sbatch(script)
        except ValueError:
            if submitted:
                slurm.cancel([job["id"] for job in submitted])
                (shared.folder / JOBS).unlink()
            raise
        submitted.append({"step": step, "id": job_id, "workers": workers, "user": os.getuid(), "folder": str(folder)})
        write_json(shared.folder / JOBS, {"jobs": submitted})
    return submitted


def _script(
    shared: steps.Shared,
    asked: Slurm,
    data: DataJobs,
    step: str,
    workers: int,
    folder: Path,
    code: Path,
    after: str | None,
) -> str:
    """The batch script of an array of `workers` jobs of one core each; `after` is the id of the step before."""
    options = {
        "job-name": f"data-{step}",
        "partition": data.partition or asked.partition,
        "account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "array": f"0-{workers - 1}",
        "cpus-per-task": "1",
        "time": str(max(1, round(60 * data.hours))),
        "mem": None if data.memory_gb is None else f"{round(1024 * data.memory_gb)}M",
        "output": str(folder / f"{step}-%a.out"),
        "open-mode": "append",
        "requeue": "",  # after a preemption or a node failure
        "dependency": after and f"afterok:{after}",
        "kill-on-invalid-dep": after and "yes",
        **asked.options,
    }
    lines = [f"#SBATCH --{name}{'=' * bool(value)}{value}" for name, value in options.items() if value is not None]
    command = f"-m experiments.data.steps {shlex.quote(str(shared.folder))} {step} $SLURM_ARRAY_TASK_ID {workers}"
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            *asked.setup,
            f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
            "export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1",
            f"exec {asked.python or shlex.quote(sys.executable)} -u {command}",
            "",
        ]
    )


def _sbatch(script: str) -> str:
    """Submit the script. Returns the id of the array. Raises ValueError if sbatch refuses it."""
    done = subprocess.run(
        ["sbatch", "--parsable"],
        input=script,
        capture_output=True,
        text=True,
        check=False,
        env=slurm.environment(),
    )
    accepted = re.search(r"^(\d+)(?:;.*)?$", done.stdout, re.MULTILINE)  # Sites may print notices, too.
    if done.returncode != 0 or accepted is None:
        raise ValueError(f"sbatch refused: {slurm.one_line(done.stderr)}")
    return accepted[1]


def _wait(spec: DataConfig, shared: steps.Shared, submitted: Sequence[Mapping[str, Any]], cache: Path) -> Path:
    """Wait for the jobs and return the dataset. Raises WorkFailed if they ended without it."""
    said = ""
    try:
        while (shared.folder / steps.RECORD).exists() and _may_be_queued(submitted):
            if (now := shared.progress()) != said:
                print(f"data build: {now}", file=sys.stderr)
                said = now
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        print("\nthe jobs go on; the same command waits for them again", file=sys.stderr)
        raise
    if isinstance(found := steps.begin(spec, cache), Path):
        return found
    failure, reason = steps.failure_of(shared.folder), "its jobs were killed, ran out of time, or do not see the cache"
    if failure.exists():
        reason = failure.read_text()
    raise WorkFailed(f"building the data failed: {reason}; output in {submitted[0]['folder']}; build again to go on")
