"""Submits runs as arrays of jobs on Slurm: groups them into arrays, and finds how many the cluster accepts now."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from experiments.design.config import RunConfig
from experiments.launching import branches, jobs, sbatch, slurm, submissions
from experiments.launching.profile import Profile


def submit(runs: Sequence[RunConfig], profile: Profile, store: Path, code: Path) -> tuple[list[RunConfig], str]:
    """Submit the runs in arrays, trunks before their branches, as far as the limits on a user's jobs allow.

    Returns the runs that have to wait, and why. Raises TooMany if all of them have to wait, and ValueError if sbatch
    refuses or does not answer; runs that were accepted before stay queued.
    """
    sbatch.name_ignored_variables()
    waiting, queued, reason = list[RunConfig](), 0, ""
    for array in _arrays(runs, slurm.max_array_size()):
        try:
            accepted, reason = (0, reason) if waiting else _submit_what_fits(array, profile, store, code)
        except ValueError as error:
            rest = f"; {queued} of {len(runs)} runs are queued: submit again for the rest" if queued else ""
            raise type(error)(f"{error}{rest}") from None
        queued += accepted
        waiting += array[accepted:]
    if not queued:
        raise sbatch.TooMany(f"{reason}; none of {len(runs)} runs is queued; submit again when other jobs have ended")
    return waiting, reason


def _arrays(runs: Sequence[RunConfig], limit: int) -> list[list[RunConfig]]:
    """The runs grouped into arrays of at most `limit` jobs.

    An array has one size, since its jobs ask for the same resources, and one trunk, since it has one dependency. First
    seeds come first, so that later seeds find their program compiled.
    """
    grouped: dict[tuple[str, str | None], list[RunConfig]] = {}
    for run in sorted(runs, key=lambda run: (run.trunk is not None, run.seed)):
        grouped.setdefault((run.size, run.trunk), []).append(run)
    return [same[low : low + limit] for same in grouped.values() for low in range(0, len(same), limit)]


def _submit_what_fits(runs: Sequence[RunConfig], profile: Profile, store: Path, code: Path) -> tuple[int, str]:
    """Submit as many of the runs, from the first on, as the limits on jobs allow.

    A refused array is tried again with half as many runs. Returns the number accepted, and the limit in sbatch's words.
    """
    accepted, count, reason = 0, len(runs), ""
    while count:
        try:
            _submit_array(runs[accepted : accepted + count], profile, store, code)
            accepted += count
            count = min(count, len(runs) - accepted)
        except sbatch.TooMany as error:
            count, reason = count // 2, str(error)
    return accepted, reason


def _submit_array(runs: Sequence[RunConfig], profile: Profile, store: Path, code: Path) -> None:
    """Submit one array. If sbatch refuses it, the files that were written for it are removed again."""
    assert profile.slurm is not None
    size = runs[0].size
    folder = jobs.new_folder(store, size)
    name = f"{runs[0].sweep}-{size}-{folder.name.rpartition('-')[2]}"
    script = sbatch.script(
        profile.job(size),
        profile.slurm,
        count=len(runs),
        max_parallel=profile.max_parallel,
        name=name,
        folder=folder,
        snapshot=code,
        after=branches.dependency(runs[0], store),
    )
    run_dirs = [store / run.run_id for run in runs]
    try:
        submissions.begin(folder, name, run_dirs, profile.max_parallel, code)
        array = sbatch.submit(script, folder, name)
    except sbatch.Unanswered:  # Keep the files: each run's job.json names this submission to the next `submit`.
        raise
    except (ValueError, OSError):
        submissions.take_back(folder.name, run_dirs)
        shutil.rmtree(folder, ignore_errors=True)
        raise
    submissions.accepted(folder, array)
