"""job.json in a run's folder: the job that executes the run. Launchers write it; `status` and `cancel` read it."""

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

FOLDER = ".jobs"  # folder of a store for the files of launchers and jobs that belong to no single run
JOB_KEYS = {"executor", "job_id", "host", "started", "submitted_at", "log"}
_ALL_RIGHTS = 0o777


def write_job(
    run_dir: Path, executor: str, job_id: str | None, log: Path | None, code: Path, submission: str | None = None
) -> None:
    """Write job.json: which executor has the run, and the job's id.

    On this machine the id is a process id, which is unique together with the process's start time. On Slurm it is None
    until sbatch has answered.
    """
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
    """The content of job.json with `owner`, the user id of the file's owner, added; None if there is no file.

    Raises ValueError if we did not write the file.
    """
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
    """The name of the run's last submission to Slurm; None if there is none."""
    job = job_of(run_dir)
    return None if job is None else job["submission"]


def adopt(run_dir: Path, submission: str, job_id: str, *, note: bool = True) -> bool:
    """Whether the run belongs to this job of `submission`. If job.json has no job id yet, writes it, unless `note` is
    False.

    The run belongs to another job if it was submitted again, or if sbatch accepted the submission twice.
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
    """A context in which errors caused by a file's unexpected content become ValueError with the file's name.

    Such a file may come from another version of this package.
    """
    try:
        yield
    except (KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path} is not as `dynconv` writes it ({type(error).__name__}: {error})") from None


def new_folder(store: Path, name: str) -> Path:
    """Make a folder for the files and the output of a submission's jobs. `name` becomes part of its name."""
    folder = store / FOLDER
    folder.mkdir(exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=time.strftime(f"%Y%m%d-%H%M%S-{name}-"), dir=folder))
    # mkdtemp lets only the owner enter the folder, but colleagues who share the store must be able to read the output.
    umask = os.umask(0)
    os.umask(umask)
    made.chmod(_ALL_RIGHTS & ~umask)
    return made
