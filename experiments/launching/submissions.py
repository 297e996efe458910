"""Records of submissions to Slurm, written before sbatch is called, so that no job is lost if its answer is.

A submission is an array of jobs, or one job. It has a folder of its own, whose name ends in random letters. These are
also part of the jobs' name, by which squeue and sacct find them again. job.json of each of its runs names the
submission from the start; the job's id is added when sbatch answers, by the job when it starts, or by the next
`submit`. A job whose run's job.json names another job ends at once, so that a run that was submitted twice is trained
once.
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from analysis.logs.files import read_json, write_json
from experiments.launching import jobs, slurm
from experiments.terminal import warn

_WRITERS = 16  # files that are written at a time, since each waits for the disk


def begin(folder: Path, name: str, run_dirs: Sequence[Path], max_parallel: int, code: Path) -> None:
    """Write what the jobs need, with the runs in the order of the array, and each run's job.json."""
    record = {
        "name": name,
        "runs": [run_dir.name for run_dir in run_dirs],
        "max_parallel": max_parallel,
        "submitted_at": time.time(),
    }
    write_json(folder / "submission.json", record)
    _in_parallel(lambda run_dir: jobs.write_job(run_dir, "slurm", None, None, code, folder.name), run_dirs)


def accepted(folder: Path, array: str) -> None:
    """Write the jobs' ids into their runs' job.json, except for runs that belong to another submission by now."""
    run_dirs = _run_dirs(folder)
    ids = [array] if len(run_dirs) == 1 else [f"{array}_{index}" for index in range(len(run_dirs))]
    _in_parallel(lambda pair: jobs.adopt(pair[0], folder.name, pair[1]), zip(run_dirs, ids, strict=True))


def take_back(submission: str, run_dirs: Iterable[Path]) -> None:
    """Remove the files job.json that `begin` wrote, if there are no jobs."""
    for run_dir in run_dirs:
        if jobs.submission_of(run_dir) == submission:
            (run_dir / "job.json").unlink(missing_ok=True)


def settle(store: Path, run_ids: Iterable[str]) -> None:
    """Find out whether Slurm has the jobs of submissions that sbatch did not answer, and report it on standard error.

    Afterwards the runs' files are as if sbatch had answered. Raises ValueError if Slurm does not answer. The caller
    must hold the store's lock.
    """
    for folder in sorted(unanswered(store, run_ids)):
        record = read_submission(folder)
        array = slurm.find(record["name"], record["submitted_at"])
        if array is not None:
            accepted(folder, array)
            said = f"Slurm has it, as job {array}"
        elif any(job and job["owner"] != os.getuid() for job in map(jobs.job_of, _run_dirs(folder))):
            continue  # It belongs to a colleague, whose jobs Slurm may not show us.
        else:
            take_back(folder.name, _run_dirs(folder))
            said = "Slurm does not have it"
        count = len(record["runs"])
        print(f"{store}: sbatch had left the submission of {count} runs unanswered; {said}", file=sys.stderr)


def limit_running(store: Path, run_ids: Iterable[str], max_parallel: int) -> None:
    """Change the queued arrays of these runs so that `max_parallel` of their jobs may run at once (0: any number)."""
    for folder in sorted(_folders(store, run_ids)):
        record = read_submission(folder)
        if record["max_parallel"] == max_parallel or len(record["runs"]) == 1:
            continue
        job = next(job for job in map(jobs.job_of, _run_dirs(folder)) if job and job["submission"] == folder.name)
        array = str(job["job_id"]).split("_")[0]
        try:
            slurm.limit_running(array, max_parallel)
        except ValueError as error:
            warn(str(error))
            continue
        write_json(folder / "submission.json", record | {"max_parallel": max_parallel})
        now, before = (str(limit or "any number") for limit in (max_parallel, record["max_parallel"]))
        print(f"{store}: {now} of the runs of array {array} may run at once; before, {before}", file=sys.stderr)


def read_submission(folder: Path) -> dict[str, Any]:
    """The record that `begin` wrote. Raises ValueError if the file was not written by us."""
    path = folder / "submission.json"
    with jobs.errors_naming(path):
        record = read_json(path)
        return {key: record[key] for key in ("name", "runs", "max_parallel", "submitted_at")}


def _run_dirs(folder: Path) -> list[Path]:
    return [folder.parent.parent / run_id for run_id in read_submission(folder)["runs"]]


def _folders(store: Path, run_ids: Iterable[str]) -> set[Path]:
    """The folders of the runs' last submissions."""
    names = {jobs.submission_of(store / run_id) for run_id in run_ids}
    folders = {store / jobs.FOLDER / name for name in names if name is not None}
    return {folder for folder in folders if (folder / "submission.json").exists()}


def unanswered(store: Path, run_ids: Iterable[str]) -> set[Path]:
    """The folders of submissions that sbatch did not answer: those of runs whose job has no id yet."""
    noted = {run_id: jobs.job_of(store / run_id) for run_id in run_ids}
    return _folders(store, [run_id for run_id, job in noted.items() if job is not None and job["job_id"] is None])


def _in_parallel(work: Callable[[Any], object], items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(work, items))
