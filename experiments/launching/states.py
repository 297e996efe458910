"""Where each run of a store stands. What decides is, in this order: the run's own markers, the queue, the accounting.

Reads small files only and imports no torch, so that `status` answers at once.
"""

import os
import pwd
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.logs import reader
from analysis.logs.files import read_json
from analysis.logs.learning import why_not
from experiments.launching import slurm
from experiments.launching.branches import trunk_failure
from experiments.launching.jobs import errors_naming, job_of, process_started
from experiments.terminal import align, duration

ACTIVE = ("queued", "running", "requeued", "unknown")  # such a run may still have a job, so it gets no second one
STATES = ("pending", *ACTIVE, "complete", "failed", "cancelled", "lost", "unreadable")
SUBMITTABLE = ("pending", "lost")
RETRYABLE = ("failed", "cancelled", "lost")
# A run that has logged nothing for so long, also as a share of its attempt's duration, may be stuck: logs are written
# every ten seconds, and later in a long attempt once in a hundredth of its duration.
SILENT_SECONDS = 300.0
SILENT_SHARE = 0.05


@dataclass(frozen=True)
class RunState:
    """One row of `status`. None: not known, or not yet."""

    run_id: str
    state: str  # one of STATES
    progress: float = 0.0  # share of the tokens trained on
    loss: float | None = None  # held-out when complete, of the last logged training step before
    attempts: int = 0
    elapsed: float | None = None  # seconds of this attempt, or of all of a complete run
    eta: float | None = None  # seconds
    job_id: str | None = None
    cause: str | None = None  # of a failure, of our not knowing, or why a complete run did not learn
    log: str | None = None  # path of the job's output


def find(store: Path) -> list[str]:
    """Ids of all runs in a store. A folder without config.json is not a run."""
    if not store.is_dir():
        raise ValueError(f"{store} is not a folder; give the store that `dynconv submit` made")
    return sorted(path.parent.name for path in store.glob("*/config.json") if not path.parent.name.startswith("."))


def read(store: Path, run_ids: Iterable[str]) -> list[RunState]:
    """Where the named runs stand. A run without a folder is pending; one whose files have another form is unreadable.

    The queue is asked before the markers are read: a run that ends in between is then seen as complete.
    """
    run_ids = list(run_ids)
    jobs, found = dict[str, dict[str, Any] | None](), dict[str, RunState]()
    for run_id in run_ids:
        try:
            jobs[run_id] = job_of(store / run_id)
        except ValueError as error:
            found[run_id] = RunState(run_id, "unreadable", cause=str(error))
    unfinished = {run_id: job for run_id, job in jobs.items() if reader.status(store / run_id) == "unfinished"}
    present = _present(unfinished)
    for run_id, job in jobs.items():
        try:
            found[run_id] = _state(store / run_id, job, present.get(run_id))
        except ValueError as error:
            found[run_id] = RunState(run_id, "unreadable", cause=str(error))
    lost = {
        run_id: job["job_id"]
        for run_id, job in jobs.items()
        if found[run_id].state == "lost" and job is not None and job["executor"] == "slurm"
    }
    ended = slurm.accounting(list(lost.values())) if lost else {}
    found |= {run_id: _explained(found[run_id], ended) for run_id in lost if trunk_failure(store / run_id) is None}
    return [found[run_id] for run_id in run_ids]


def busy(store: Path, run_ids: Iterable[str]) -> dict[str, str]:
    """Run id -> "queued", "running" or "unknown", for runs whose last job has not ended, whatever their markers say."""
    present = _present({run_id: job_of(store / run_id) for run_id in run_ids})
    return {run_id: where for run_id, where in present.items() if where != "gone"}


def _present(jobs: Mapping[str, dict[str, Any] | None]) -> dict[str, str]:
    """Run id -> "queued", "running", "gone" or "unknown", for the runs that have a job."""
    submitted = {run_id: job for run_id, job in jobs.items() if job is not None}
    in_slurm = [job for job in submitted.values() if job["executor"] == "slurm"]
    queue = slurm.queue([job["job_id"] for job in in_slurm], {job["owner"] for job in in_slurm}) if in_slurm else {}
    present = {}
    for run_id, job in submitted.items():
        if job["executor"] == "slurm":
            # Where jobs are private (PrivateData=jobs) a colleague's are not shown, whether they run or have ended.
            unseen = "gone" if job["owner"] == os.getuid() else "unknown"
            unseen = "unknown" if job["job_id"] is None else unseen  # whether Slurm has it is not known yet
            state = "unknown" if queue is None else queue.get(job["job_id"], unseen)
            present[run_id] = {"PENDING": "queued", "gone": "gone", "unknown": "unknown"}.get(state, "running")
        elif job["host"] != socket.gethostname():
            present[run_id] = "unknown"
        else:
            alive = job["started"] is not None and job["started"] == process_started(job["job_id"])
            present[run_id] = "running" if alive else "gone"
    return present


def _state(run_dir: Path, job: dict[str, Any] | None, present: str | None) -> RunState:
    where = reader.status(run_dir)
    if where == "unfinished":
        where = "pending" if job is None else "lost" if present in ("gone", None) else present
    known: dict[str, Any] = {"job_id": job["job_id"], "log": job["log"]} if job else {}
    if where == "complete":
        with errors_naming(run_dir / "run.json"):
            run = read_json(run_dir / "run.json")
            elapsed = sum(seconds for clock, seconds in run["seconds"].items() if clock != "queue")
            measured: dict[str, Any] = {key: run.get(key) for key in ("loss", "task", "vocabulary", "gradient_norm")}
            known["cause"] = (reason := why_not(**measured)) and f"it did not learn: {reason}"
            return RunState(run_dir.name, where, 1.0, float(run["loss"]), run["attempts"], elapsed, **known)
    known["cause"] = (trunk_failure(run_dir) if where in ("pending", "lost") else None) or _cause(run_dir, job, where)
    with errors_naming(run_dir / "attempt-*.json"):
        latest = reader.progress(run_dir)
    if latest is None:
        return RunState(run_dir.name, where, **known)
    if where == "queued":
        where = "requeued"
    with errors_naming(run_dir / "config.json"):
        tokens = read_json(run_dir / "config.json")["tokens"]
        share = (latest.tokens or 0) / tokens
    if where == "running":
        known |= _times(latest, tokens)
        silent = time.time() - latest.updated_at
        if silent > max(SILENT_SECONDS, SILENT_SHARE * (time.time() - latest.started_at)):
            known["cause"] = f"nothing logged for {duration(silent)}; `dynconv logs` may say why"
    return RunState(run_dir.name, where, share, latest.loss, latest.attempt, **known)


def _times(latest: reader.Progress, tokens: int) -> dict[str, float]:
    """Seconds that this attempt has taken so far, and that the rest of the run will take at the attempt's speed."""
    times = {"elapsed": time.time() - latest.started_at}
    if latest.step is not None and latest.tokens and latest.step >= latest.first_step:
        seconds_per_step = (latest.updated_at - latest.started_at) / (latest.step - latest.first_step + 1)
        steps = latest.step * tokens / latest.tokens
        times["eta"] = seconds_per_step * (steps - latest.step)
    return times


def _cause(run_dir: Path, job: dict[str, Any] | None, where: str) -> str | None:
    if where == "failed":
        with errors_naming(run_dir / "failure.json"):
            failure = read_json(run_dir / "failure.json")
            return f"{failure['cause']} (step {failure['step']})"
    if where == "unknown" and job is not None:
        if job["executor"] != "slurm":
            return f"started on {job['host']}; ask there"
        if job["job_id"] is None:
            return "sbatch has not answered; `dynconv submit` finds out whether Slurm has the job"
        if job["owner"] != os.getuid():
            return f"job {job['job_id']} of user {_user(job['owner'])} is not shown here; ask there"
        return "squeue does not answer"
    if where == "lost" and job is not None:
        return _last_line(Path(job["log"])) if job["log"] else "its process ended"
    return None


def _user(number: int) -> str:
    """The name of a user, or the number where it has none on this machine."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").split("\n")
    except OSError:
        lines = []
    return next((line.strip() for line in reversed(lines) if line.strip()), "its process ended without a word")


def _explained(state: RunState, ended: Mapping[str, str]) -> RunState:
    """A run that Slurm lost, with what the accounting says of its end."""
    end = ended.get(str(state.job_id))
    if end is None or end.startswith(("RUNNING", "PENDING", "REQUEUED")):  # unknown, or not up to date
        return replace(state, cause="it left the queue without a result")
    where = "cancelled" if end.startswith("CANCELLED") else "lost"  # by scancel, past `dynconv cancel`
    return replace(state, state=where, cause=f"Slurm says {end}")


HEADINGS = ("run", "state", "done", "loss", "attempts", "elapsed", "to go", "job")


def render(states: Sequence[RunState]) -> str:
    """The rows as a table for people, what went wrong below it, and a count of each state."""
    cells = [
        (
            state.run_id,
            state.state,
            f"{state.progress:.0%}",
            "" if state.loss is None else f"{state.loss:.4f}",
            str(state.attempts or ""),
            duration(state.elapsed),
            duration(state.eta),
            state.job_id or "",
        )
        for state in states
    ]
    causes = [f"{state.run_id} {state.state}: {state.cause}" for state in states if state.cause]
    counts = Counter(state.state for state in states)
    summary = f"{len(states)} runs: " + ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name])
    return "\n".join([align(HEADINGS, cells), "", *causes, summary])
