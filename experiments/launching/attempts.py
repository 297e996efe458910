"""The attempts at a run: where and when each ran, how it ended, and what starting again has cost."""

import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from analysis.logs.files import read_json
from analysis.logs.reader import attempt_records
from experiments.launching import causes, slurm
from experiments.launching.jobs import errors_naming

CLOCK_TOLERANCE = 5.0  # seconds by which the clocks of a node and of Slurm may differ


@dataclass(frozen=True)
class Cost:
    """What a run has cost so far, summed over its attempts, each until its last entry in the log.

    On a CPU a process counts as a GPU.
    """

    gpu_hours: float | None  # None if an attempt did not record its number of GPUs
    redone_steps: int  # logged steps that a later attempt did again
    redone_seconds: float  # training time of these steps
    between_seconds: float  # from the end of an attempt to the start of the next, or to a new submission


@dataclass(frozen=True)
class Attempt:
    """One start of a run. `number` is None for a start that Slurm knows of and that has logged nothing."""

    number: int | None
    job_id: str | None
    nodes: str | None
    device: str | None
    gpus: int | None
    started_at: float | None  # unix seconds
    ended_at: float | None  # unix seconds; of the last entry in the log if the end itself is not known
    first_step: int | None
    last_step: int | None
    redone_steps: int
    waited_seconds: float | None  # in the queue before it started
    how_ended: str


def read_made(
    run_dir: Path, run: Mapping[str, Any] | None, files: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """The records of a run's attempts, in order: from `run`, the content of run.json, if the run is complete.

    `files` are the names in its directory, if they are known already. Raises ValueError if a record was not written by
    us.
    """
    if run is not None:
        made: list[dict[str, Any]] = run.get("attempts_made", [])
        return made
    with errors_naming(run_dir / "attempt-*.json"):
        return attempt_records(run_dir, files)


def cost(made: Sequence[Mapping[str, Any]], running: bool) -> Cost:
    """The cost of these attempts. If the run is `running`, the last attempt is counted until now."""
    now = time.time()
    hours, known = 0.0, bool(made)
    for number, attempt in enumerate(made):
        end = now if running and number == len(made) - 1 else attempt["updated_at"]
        seconds = end - attempt["started_at"] + attempt.get("seconds", {}).get("startup", 0.0)
        known = known and attempt.get("gpus") is not None
        hours += (attempt.get("gpus") or 0) * seconds / 3600
    repeats = [(_redone(one, after), one, after) for one, after in itertools.pairwise(made)]
    return Cost(
        gpu_hours=hours if known else None,
        redone_steps=sum(steps for steps, _, _ in repeats),
        redone_seconds=sum(steps * _seconds_per_step(one) for steps, one, _ in repeats),
        between_seconds=sum(after.get("seconds", {}).get("queue", 0.0) for _, _, after in repeats),
    )


def _redone(attempt: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """How many of an attempt's logged steps the next attempt did again."""
    last = attempt["step"] if attempt["step"] is not None else attempt["first_step"] - 1
    return int(max(0, last - (after["first_step"] - 1)))


def _seconds_per_step(attempt: Mapping[str, Any]) -> float:
    """Mean training seconds of an attempt's logged steps; 0 if it logged none."""
    steps = (attempt["step"] or 0) - attempt["first_step"] + 1
    return float(attempt.get("seconds", {}).get("train", 0.0)) / steps if steps > 0 else 0.0


def history(run_dir: Path, state: str, job_id: str | None) -> list[Attempt]:
    """All starts of a run in `state`, in order of time, from its log and from Slurm's accounting.

    `job_id` is the run's job on Slurm, if it has one. Raises ValueError if a file was not written by us.
    """
    run = read_json(run_dir / "run.json") if (run_dir / "run.json").exists() else None
    made = read_made(run_dir, run)
    with errors_naming(run_dir / "attempt-*.json"):
        job_ids = {job_id, *(attempt.get("job_id") for attempt in made)} - {None} if job_id else set()
        ended = slurm.accounting(sorted(map(str, job_ids))) if job_ids else {}
        starts = {each: [one for one in several if one.start is not None] for each, several in ended.items()}
        found = []
        for attempt, after in zip(made, [*made[1:], None], strict=True):
            mine = starts.get(str(attempt.get("job_id")), [])
            one = next((one for one in mine if _covers(one, attempt["started_at"])), None)
            if one is not None:
                mine.remove(one)
            found.append(_attempt(run_dir, state, run, attempt, after, one))
    silent = [
        Attempt(None, job_id, one.nodes, None, None, one.start, one.end, None, None, 0, None, _said(one))
        for one in starts.get(str(job_id), [])
    ]
    return sorted([*found, *silent], key=lambda one: one.started_at or 0.0)


def _covers(ended: slurm.Ended, moment: float) -> bool:
    """Whether Slurm says that the job ran at this moment (unix seconds), within CLOCK_TOLERANCE."""
    assert ended.start is not None
    return ended.start - CLOCK_TOLERANCE <= moment and (ended.end is None or moment <= ended.end + CLOCK_TOLERANCE)


def _attempt(
    run_dir: Path,
    state: str,
    run: Mapping[str, Any] | None,
    attempt: Mapping[str, Any],
    after: Mapping[str, Any] | None,
    ended: slurm.Ended | None,
) -> Attempt:
    """One attempt by its record, the record `after` it if there is one, and Slurm's accounting if that has it."""
    end = attempt["updated_at"]
    if run is not None and after is None:
        end = run.get("finished_at", end)
    elif ended is not None and ended.end is not None:
        end = ended.end
    last = attempt["step"]
    seconds = attempt.get("seconds", {})
    return Attempt(
        number=attempt["attempt"],
        job_id=attempt.get("job_id"),
        nodes=",".join(attempt.get("hosts") or ()) or (ended and ended.nodes) or None,
        device=attempt.get("device"),
        gpus=attempt.get("gpus"),
        started_at=attempt["started_at"] - seconds.get("startup", 0.0),
        ended_at=None if after is None and state in ("running", "suspended") else end,
        first_step=attempt["first_step"],
        last_step=last,
        redone_steps=0 if after is None else _redone(attempt, after),
        waited_seconds=seconds.get("queue"),
        how_ended=_how_ended(run_dir, state, attempt, after, ended),
    )


def _how_ended(
    run_dir: Path,
    state: str,
    attempt: Mapping[str, Any],
    after: Mapping[str, Any] | None,
    ended: slurm.Ended | None,
) -> str:
    """In words, how an attempt ended: by the run's own markers, else Slurm's accounting, else the steps it logged."""
    if after is None and state in ("complete", "running", "suspended", "cancelled"):
        return "" if state in ("running", "suspended") else state
    if state == "failed":
        failure = read_json(run_dir / "failure.json")
        if failure.get("attempt") == attempt["attempt"]:
            return f"failed: {failure.get('cause')}"
    if (cause := attempt.get("interrupted")) and not attempt.get("preempted"):
        return f"stopped: {cause}"
    if ended is not None and ended.end is not None:
        return _said(ended)
    if after is None:
        return "stopped, its state saved" if state == "stopped" else "ended without a result"
    return "stopped" if _redone(attempt, after) else "stopped, its state saved"


def _said(ended: slurm.Ended) -> str:
    """Slurm's state of a job that ended; of one that failed also its exit code."""
    code = causes.exited(ended.exit_code) if ended.state == "FAILED" else None
    return causes.how_ended(ended) + (f", {code}" if code else "")
