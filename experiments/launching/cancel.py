"""Cancel runs: mark them first, then stop their jobs on Slurm or on this machine."""

import socket
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.launching import jobs, local, slurm, states, submissions
from experiments.launching.locks import require_store, store_lock


def cancel(store: Path, run_ids: Iterable[str]) -> list[str]:
    """Cancel the named runs that have not ended, and return their ids. They stay cancelled until they are retried.

    The marker `cancelled` is written first, because scancel's signal looks like a preemption to a running job. A run
    that was cancelled before but whose job has not ended is cancelled again. If some jobs cannot be stopped from here,
    removes their runs' markers and raises ValueError; the others are cancelled.
    """
    require_store(store)
    run_ids = list(run_ids)
    with store_lock(store):  # Another `submit` may be about to delete markers, or be waiting for sbatch.
        if submissions.unanswered(store, run_ids):
            submissions.settle(store, run_ids)
        here = states.read(store, [run_id for run_id in run_ids if (store / run_id).is_dir()])
        marked = [state.run_id for state in here if state.state == "cancelled"]
        ids = [state.run_id for state in here if state.state in ("pending", "stopped", "lost", *states.ACTIVE)]
        ids += sorted(states.busy(store, marked))
        _mark_cancelled(store, ids)
    job_by_run = {run_id: jobs.job_of(store / run_id) for run_id in states.busy(store, ids)}
    on_slurm = {run_id: job["job_id"] for run_id, job in job_by_run.items() if job and job["executor"] == "slurm"}
    in_slurm = {run_id: job_id for run_id, job_id in on_slurm.items() if job_id is not None}
    # run id -> why its job cannot be stopped from here
    out_of_reach = dict.fromkeys(on_slurm.keys() - in_slurm, "a colleague's submission that sbatch left unanswered")
    try:
        if in_slurm:
            slurm.cancel(list(in_slurm.values()))
    except ValueError as error:  # scancel may have cancelled some of them, or all.
        out_of_reach |= dict.fromkeys(states.busy(store, list(in_slurm)), str(error))
    for run_id, job in job_by_run.items():
        if job and job["executor"] != "slurm" and (why := _stop_here(job)):
            out_of_reach[run_id] = why
    for run_id in out_of_reach:
        (store / run_id / "cancelled").unlink(missing_ok=True)
    if out_of_reach:
        reasons = [f"{count} go on: {why}" for why, count in Counter(out_of_reach.values()).items()]
        raise ValueError(f"{len(ids) - len(out_of_reach)} of {len(ids)} runs cancelled; {'; '.join(reasons)}")
    return ids


def _mark_cancelled(store: Path, run_ids: Sequence[str]) -> None:
    """Write the marker of each run. If one cannot be written, removes the new markers and raises OSError."""
    written = []
    try:
        for run_id in run_ids:
            marker = store / run_id / "cancelled"
            if not marker.exists():
                marker.touch()
                written.append(marker)
    except OSError:
        for marker in written:
            marker.unlink(missing_ok=True)
        raise


def _stop_here(job: Mapping[str, Any]) -> str | None:
    """Stop a job on this machine. Returns why it cannot be stopped, or None."""
    if job["host"] != socket.gethostname():
        return f"they run on {job['host']}; cancel there"
    if job["executor"] == "debug":
        return f"they run in process {job['job_id']}; press Ctrl-C there"
    try:
        local.stop(job["job_id"])
    except PermissionError:
        return f"process {job['job_id']} is another user's, who can cancel it"
    return None
