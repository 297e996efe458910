"""The job that a run was given: job.json in its folder, which the launchers write and `status` and `cancel` read."""

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from analysis.logs.files import read_json, write_json
from experiments.training.presence import process_started

FOLDER = ".jobs"  # of a store: what launchers and jobs write beside the runs
JOB_KEYS = {"executor", "job_id", "host", "started", "submitted_at", "log"}
_ALL_RIGHTS = 0o777


def write_job(
    run_dir: Path, executor: str, job_id: str | None, log: Path | None, code: Path, submission: str | None = None
) -> None:
    """Note which executor has the run, under which id. On this machine the id is a process's, which with its start
    time names that process only; on Slurm it is None until it is known which job the submission became."""
    job = {
        "executor": executor,
        "job_id": job_id,
        "submission": submission,
        "host": socket.gethostname(),
        "started": None if executor == "slurm" or job_id is None else process_started(job_id),
        "submitted_at": time.time(),
        "log": None if log is None else str(log),
        "code": code.name,
    }
    write_json(run_dir / "job.json", job)


def job_of(run_dir: Path) -> dict[str, Any] | None:
    """What the launcher noted when it submitted the run, with `owner`, the user id of who did it; None if it noted
    nothing. Raises ValueError where the file holds something else."""
    path = run_dir / "job.json"
    if not path.exists():
        return None
    with errors_naming(path):
        job = read_json(path)
        return {
            "owner": path.stat().st_uid,
            "submission": job.get("submission"),
            **{key: job[key] for key in JOB_KEYS},
        }


def submission_of(run_dir: Path) -> str | None:
    """The name of the submission to Slurm that the run was last part of; None if there is none."""
    job = job_of(run_dir)
    return None if job is None else job["submission"]


def adopt(run_dir: Path, submission: str, job_id: str, *, note: bool = True) -> bool:
    """Whether the run is this job's; if nothing says so yet, that is noted, unless `note` is False.

    It is another's where it was submitted again since, or where sbatch accepted a submission twice.
    """
    path = run_dir / "job.json"
    if not path.exists():
        return False
    job = read_json(path)
    if job.get("submission") != submission or job.get("job_id") not in (None, job_id):
        return False
    if job.get("job_id") is None and note:
        log = run_dir.parent / FOLDER / submission / f"{job_id}_0_log.out"
        write_json(path, job | {"job_id": job_id, "log": str(log)})
    return True


@contextlib.contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """Raise ValueError with the file's name where it holds something else than we write: another version's, perhaps."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} is not as `dynconv` writes it ({type(error).__name__}: {error})") from None


def new_folder(store: Path, name: str) -> Path:
    """A new folder for what a submission's jobs need, and for their output."""
    folder = store / FOLDER
    folder.mkdir(exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=time.strftime(f"%Y%m%d-%H%M%S-{name}-"), dir=folder))
    # mkdtemp makes folders that their owner alone may enter; colleagues who share the store must read the output.
    umask = os.umask(0)
    os.umask(umask)
    made.chmod(_ALL_RIGHTS & ~umask)
    return made
