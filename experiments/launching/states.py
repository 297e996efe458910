"""The state of each run of a store, decided by the run's own files first, then Slurm's queue, then its accounting.

This reads only small files and imports no torch, so that `status` answers at once.
"""

import os
import socket
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from analysis.logs import reader
from analysis.logs.files import read_json
from analysis.logs.learning import why_not
from analysis.logs.record import check_unedited
from experiments.launching import attempts, causes, slurm
from experiments.launching.branches import trunk_failure
from experiments.launching.jobs import errors_naming, job_of
from experiments.terminal import duration
from experiments.training.presence import process_started
from experiments.training.stopping import STOPPED

# In these states a run may still have a job, so it must not get a second one.
ACTIVE = ("queued", "held", "running", "suspended", "requeued", "unknown")
STATES = ("pending", *ACTIVE, "stopped", "complete", "failed", "cancelled", "lost", "unreadable")
SUBMITTABLE = ("pending", "stopped", "lost")
RETRYABLE = ("failed", "cancelled", "stopped", "lost")
# A run may be stuck if it has logged nothing for SILENT_SECONDS and for SILENT_SHARE of its attempt's duration. Logs
# are written every ten seconds, and in a long attempt once in a hundredth of its duration.
SILENT_SECONDS = 300.0
SILENT_SHARE = 0.05
# Slurm's state -> ours, except for those that mean "running"
_WHERE = {
    "PENDING": "queued", "REQUEUED": "queued", "REQUEUE_FED": "queued", "REQUEUE_HOLD": "held", "SPECIAL_EXIT": "held",
    "RESV_DEL_HOLD": "held", "SUSPENDED": "suspended", "STOPPED": "suspended",
}  # fmt: skip
# Slurm's reasons that mean that a job is held -> in words
_HELD = {
    "JobHeldUser": "held by its user; `scontrol release {job}` lets it go",
    "JobHeldAdmin": "held by an administrator, who can release it",
    "JobHoldMaxRequeue": "held, as Slurm has requeued it too often; `scontrol release {job}` lets it go",
    "launch failed requeued held": "held, as its node could not start it; `scontrol release {job}` tries again",
}


@dataclass(frozen=True)
class RunState:
    """One row of `status`. None means not known, or not known yet."""

    run_id: str
    state: str  # one of STATES
    progress: float = 0.0  # share of the tokens trained on
    loss: float | None = None  # held-out if the run is complete, else of the last logged training step
    attempts: int = 0
    elapsed: float | None = None  # seconds of this attempt; of all attempts if the run is complete
    eta: float | None = None  # seconds that the rest of the run will take
    job_id: str | None = None
    cause: str | None = None  # why it failed, why its state is not known, or why a complete run did not learn
    log: str | None = None  # path of the job's output
    arm: str | None = None
    size: str | None = None
    reason: str | None = None  # Slurm's reason why its job waits
    expected_start: float | None = None  # unix seconds, if Slurm forecasts the start of its waiting job
    nodes: str | None = None  # where it runs
    last_logged: float | None = None  # unix seconds: when a running run last wrote its log
    gpu_hours: float | None = None  # of all attempts so far; on a CPU a process counts as a GPU
    forecast_gpu_hours: float | None = None  # of the whole run, when it was submitted
    redone_steps: int = 0  # steps that attempts did again, because the attempt before had lost them
    redone_seconds: float = 0.0  # training time of these steps
    between_seconds: float = 0.0  # from the end of an attempt to the start of the next
    flops: float | None = None  # exact training FLOPs of the whole run, without those of its trunk
    flops_left: float | None = None  # the part of `flops` that is still to be done


@dataclass(frozen=True)
class _Presence:
    """The state of a run's last job."""

    where: str  # "queued", "held", "running", "suspended", "gone" or "unknown"
    queued: slurm.Queued | None = None  # its entry in squeue


def find(store: Path) -> list[str]:
    """Ids of all runs in a store, which are the folders with a config.json. Raises ValueError if there is no store."""
    if not store.is_dir():
        raise ValueError(f"{store} is not a folder; give the store that `dynconv submit` made")
    return sorted(path.parent.name for path in store.glob("*/config.json") if not path.parent.name.startswith("."))


def read(store: Path, run_ids: Iterable[str]) -> list[RunState]:
    """The states of the named runs, in their order. A run without a folder is "pending"; one with a file that we did
    not write is "unreadable".

    The queue is read before the runs' markers, so that a run that ends in between is seen as complete, not as lost.
    """
    run_ids = list(run_ids)
    files = {run_id: reader.list_files(store / run_id) for run_id in run_ids}
    jobs, found = dict[str, dict[str, Any] | None](), dict[str, RunState]()
    for run_id in run_ids:
        try:
            jobs[run_id] = job_of(store / run_id) if "job.json" in files[run_id] else None
        except ValueError as error:
            found[run_id] = RunState(run_id, "unreadable", cause=str(error))
    unfinished = {
        run_id: job for run_id, job in jobs.items() if reader.status(store / run_id, files[run_id]) == "unfinished"
    }
    present = _present(unfinished)
    files |= {run_id: reader.list_files(store / run_id) for run_id in present}
    for run_id, job in jobs.items():
        try:
            found[run_id] = _state(store / run_id, files[run_id], job, present.get(run_id, _Presence("gone")))
        except ValueError as error:
            found[run_id] = RunState(run_id, "unreadable", cause=str(error))
    lost = {
        run_id: job["job_id"]
        for run_id, job in jobs.items()
        if job is not None and job["executor"] == "slurm" and found[run_id].state == "lost" and not found[run_id].cause
    }
    ended = slurm.accounting(list(lost.values())) if lost else {}
    found |= {run_id: _explained(found[run_id], ended.get(job_id, [])) for run_id, job_id in lost.items()}
    return [found[run_id] for run_id in run_ids]


def busy(store: Path, run_ids: Iterable[str]) -> dict[str, str]:
    """Run id -> state of its last job, for runs whose job has not ended, whatever the run's markers say.

    The states are "queued", "held", "running", "suspended" and "unknown".
    """
    present = _present({run_id: job_of(store / run_id) for run_id in run_ids})
    return {run_id: presence.where for run_id, presence in present.items() if presence.where != "gone"}


def history(store: Path, state: RunState) -> list[attempts.Attempt]:
    """The attempts at a run whose state `read` returned."""
    job = job_of(store / state.run_id)
    in_slurm = job is not None and job["executor"] == "slurm"
    return attempts.history(store / state.run_id, state.state, state.job_id if in_slurm else None)


def _present(jobs: Mapping[str, dict[str, Any] | None]) -> dict[str, _Presence]:
    """The state of the last job of each run that has a job.json."""
    submitted = {run_id: job for run_id, job in jobs.items() if job is not None}
    in_slurm = [job for job in submitted.values() if job["executor"] == "slurm" and job["job_id"] is not None]
    queue = slurm.queue([job["job_id"] for job in in_slurm], {job["owner"] for job in in_slurm}) if in_slurm else {}
    present = {}
    for run_id, job in submitted.items():
        if job["executor"] == "slurm":
            present[run_id] = _in_slurm(job, queue)
        elif job["host"] != socket.gethostname():
            present[run_id] = _Presence("unknown")
        else:
            alive = job["started"] is not None and job["started"] == process_started(job["job_id"])
            present[run_id] = _Presence("running" if alive else "gone")
    return present


def _in_slurm(job: Mapping[str, Any], queue: Mapping[str, slurm.Queued] | None) -> _Presence:
    """The state of a job on Slurm. `queue` is None if squeue did not answer."""
    if queue is None or job["job_id"] is None:  # Without an id it is not known yet whether Slurm has the job.
        return _Presence("unknown")
    found = queue.get(job["job_id"])
    if found is None:
        # On clusters with PrivateData=jobs, squeue never shows a colleague's jobs.
        return _Presence("gone" if job["owner"] == os.getuid() else "unknown")
    where = _WHERE.get(found.state, "running")
    return _Presence("held" if where == "queued" and found.reason in _HELD else where, found)


def _state(run_dir: Path, files: Collection[str], job: dict[str, Any] | None, presence: _Presence) -> RunState:
    """The state of one run, without Slurm's accounting. `files` are the names in its directory."""
    where = reader.status(run_dir, files)
    if where == "unfinished":
        where = "pending" if job is None else "lost" if presence.where == "gone" else presence.where
    known: dict[str, Any] = {"job_id": job["job_id"], "log": job["log"]} if job else {}
    if "config.json" not in files and not reader.attempt_numbers(run_dir, files):
        return RunState(run_dir.name, where, **known)
    with errors_naming(run_dir / "config.json"):
        config = read_json(run_dir / "config.json")
        check_unedited(run_dir / "config.json", config)
        tokens, trunk = config["tokens"], config.get("trunk")
        known |= {name: config.get(name) for name in ("arm", "size", "forecast_gpu_hours")}
        if "flops_exact" in config:
            known["flops"] = known["flops_left"] = config["flops_exact"] * config.get("tokens_own", tokens) / tokens
    if where == "complete":
        return _complete(run_dir, known)
    known["cause"] = (trunk_failure(run_dir.parent, trunk) if where in ("pending", "lost") else None) or _cause(
        run_dir, job, where
    )
    if where == "lost" and str(known["cause"]).startswith(STOPPED):  # for example by Ctrl-C
        where = "stopped"
    if presence.queued is not None:
        known |= _in_queue(presence.queued, where, known["job_id"])
    with errors_naming(run_dir / "attempt-*.json"):
        made = attempts.read_made(run_dir, None, files)
        latest = reader.progress_of(made)
        known |= vars(attempts.cost(made, where == "running")) if made else {}
    if where == "running" and job is not None:
        began = (presence.queued and presence.queued.start) or job["submitted_at"]
        known |= _course(latest, tokens, began)
    if latest is None:
        return RunState(run_dir.name, where, **known)
    if where == "queued":
        where = "requeued"
    share = (latest.tokens or 0) / tokens  # A branch counts its trunk's tokens.
    if "flops" in known:
        known["flops_left"] = min(known["flops"], config["flops_exact"] * (1 - share))
    return RunState(run_dir.name, where, share, latest.loss, latest.attempt, **known)


def _complete(run_dir: Path, known: dict[str, Any]) -> RunState:
    """The state of a complete run, from run.json and what is `known` already."""
    with errors_naming(run_dir / "run.json"):
        run = read_json(run_dir / "run.json")
        check_unedited(run_dir / "run.json", run)
        elapsed = sum(seconds for clock, seconds in run["seconds"].items() if clock != "queue")
        measured: dict[str, Any] = {key: run.get(key) for key in ("loss", "task", "vocabulary", "gradient_norm")}
        known["cause"] = (reason := why_not(**measured)) and f"it did not learn: {reason}"
        known |= vars(attempts.cost(attempts.read_made(run_dir, run), False))
        known["redone_seconds"], known["flops_left"] = run["seconds"].get("lost", 0.0), 0.0
        return RunState(run_dir.name, "complete", 1.0, float(run["loss"]), run["attempts"], elapsed, **known)


def _in_queue(queued: slurm.Queued, where: str, job_id: str) -> dict[str, Any]:
    """Why a job waits and when it is expected to start, or where it runs."""
    if where not in ("queued", "held"):
        return {"nodes": queued.nodes}
    waits: dict[str, Any] = {"reason": queued.reason, "expected_start": queued.start}
    if where == "held":
        cause = _HELD.get(queued.reason or "", "held; `scontrol release {job}` lets it go")
        waits["cause"] = cause.format(job=job_id)
    return waits


def _course(latest: reader.Progress | None, tokens: int, began: float) -> dict[str, Any]:
    """The progress of a running run: `elapsed`, `last_logged`, `eta` at this attempt's speed, and a `cause` if it may
    be stuck. `began` is when its job started, in Unix seconds."""
    now = time.time()
    # The log may be that of an earlier attempt.
    started, logged = (max(began, latest.started_at), max(began, latest.updated_at)) if latest else (began, began)
    course: dict[str, Any] = {"elapsed": now - started, "last_logged": latest and latest.updated_at}
    if latest and latest.step is not None and latest.tokens and latest.step >= latest.first_step:
        seconds_per_step = (latest.updated_at - latest.started_at) / (latest.step - latest.first_step + 1)
        steps = latest.step * tokens / latest.tokens
        course["eta"] = seconds_per_step * (steps - latest.step)
    if (silent := now - logged) > max(SILENT_SECONDS, SILENT_SHARE * (now - started)):
        stepped = latest and latest.step is not None and latest.step >= latest.first_step and latest.started_at >= began
        said = "no step" if stepped else "no step yet, and nothing else logged,"
        course["cause"] = f"{said} for {duration(silent)}: it may be stuck; `dynconv logs` may say why"
    return course


def _cause(run_dir: Path, job: dict[str, Any] | None, where: str) -> str | None:
    """Why a run is in its state, or None. A run that Slurm lost gets its cause later, from the accounting."""
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
            return f"job {job['job_id']} of user {causes.user(job['owner'])} is not shown here; ask there"
        return "squeue does not answer"
    if where == "suspended":
        return "suspended by Slurm; it goes on when that lets it"
    if where == "lost" and job is not None and job["executor"] != "slurm":
        said = causes.cause_in_log(Path(job["log"])) if job["log"] else None
        return said or "its process ended without a word"
    return None


def _explained(state: RunState, starts: list[slurm.Ended]) -> RunState:
    """The state of a run that Slurm lost, with the cause by the accounting and the job's output."""
    ended = starts[-1] if starts else None
    # The user may have called scancel instead of `dynconv cancel`.
    where = "cancelled" if ended is not None and ended.state.startswith("CANCELLED") else "lost"
    return replace(state, state=where, cause=causes.cause_of(ended, Path(state.log) if state.log else None))
