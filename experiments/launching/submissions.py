"""Submissions to Slurm: what is written before sbatch is called, so that whatever becomes of its answer no job is lost.

A submission is an array of jobs, or one job. It has a folder of its own, whose name ends in random letters; these stand
in the jobs' name, by which squeue and sacct find them again. job.json of each of its runs names the submission from the
start; the job's id is added when sbatch answers, or by the job when it starts, or by the next `submit`. A job that its
run's job.json does not name ends without a word, so that a submission made twice trains nothing twice.
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

_WRITERS = 16  # files that are written side by side, as each waits for the disk


def begin(folder: Path, name: str, run_dirs: Sequence[Path], max_parallel: int, code: Path) -> None:
    """Write what the jobs need, in the order of the array, and let each run's job.json name the submission."""
    record = {
        "name": name,
        "runs": [run_dir.name for run_dir in run_dirs],
        "max_parallel": max_parallel,
        "submitted_at": time.time(),
    }
    write_json(folder / "submission.json", record)
    _side_by_side(lambda run_dir: jobs.write_job(run_dir, "slurm", None, None, code, folder.name), run_dirs)


def accepted(folder: Path, array: str) -> None:
    """Note the jobs' ids. Runs that another submission has by now are left alone."""
    run_dirs = _run_dirs(folder)
    ids = [array] if len(run_dirs) == 1 else [f"{array}_{index}" for index in range(len(run_dirs))]
    _side_by_side(lambda pair: jobs.adopt(pair[0], folder.name, pair[1]), zip(run_dirs, ids, strict=True))


def take_back(submission: str, run_dirs: Iterable[Path]) -> None:
    """Take back what `begin` wrote beside the runs, as there are no jobs."""
    for run_dir in run_dirs:
        if jobs.submission_of(run_dir) == submission:
            (run_dir / "job.json").unlink(missing_ok=True)


def settle(store: Path, run_ids: Iterable[str]) -> None:
    """Look for the jobs of submissions that sbatch did not answer, and say what was found.

    Afterwards their runs have jobs, or none, as if sbatch had answered. Raises ValueError where Slurm cannot be asked.
    The caller holds the store.
    """
    for folder in sorted(unanswered(store, run_ids)):
        record = read_submission(folder)
        array = slurm.find(record["name"], record["submitted_at"])
        if array is not None:
            accepted(folder, array)
            said = f"Slurm has it, as job {array}"
        elif any(job and job["owner"] != os.getuid() for job in map(jobs.job_of, _run_dirs(folder))):
            continue  # a colleague's, which Slurm may not show to us
        else:
            take_back(folder.name, _run_dirs(folder))
            said = "Slurm does not have it"
        count = len(record["runs"])
        print(f"{store}: sbatch had left the submission of {count} runs unanswered; {said}", file=sys.stderr)


def limit_running(store: Path, run_ids: Iterable[str], max_parallel: int) -> None:
    """Let the arrays of these runs, which are queued, have as many jobs at once as the profile says now."""
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
    """What `begin` wrote. Raises ValueError where the file holds something else."""
    path = folder / "submission.json"
    with jobs.errors_naming(path):
        record = read_json(path)
        return {key: record[key] for key in ("name", "runs", "max_parallel", "submitted_at")}


def _run_dirs(folder: Path) -> list[Path]:
    return [folder.parent.parent / run_id for run_id in read_submission(folder)["runs"]]


def _folders(store: Path, run_ids: Iterable[str]) -> set[Path]:
    """The submissions that the runs were last part of."""
    names = {jobs.submission_of(store / run_id) for run_id in run_ids}
    folders = {store / jobs.FOLDER / name for name in names if name is not None}
    return {folder for folder in folders if (folder / "submission.json").exists()}


def unanswered(store: Path, run_ids: Iterable[str]) -> set[Path]:
    """The submissions of those of the runs whose job has no id yet."""
    noted = {run_id: jobs.job_of(store / run_id) for run_id in run_ids}
    return _folders(store, [run_id for run_id, job in noted.items() if job is not None and job["job_id"] is None])


def _side_by_side(work: Callable[[Any], object], items: Iterable[Any]) -> None:
    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(work, items))
