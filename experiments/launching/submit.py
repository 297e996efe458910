"""Submits runs, and retries failed ones. A run's configuration and code are frozen before it is submitted."""

import functools
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.logs.files import write_atomically
from analysis.logs.record import schema_of
from analysis.logs.schema import SCHEMA
from experiments import source
from experiments.design.config import RunConfig
from experiments.design.data import DataConfig
from experiments.design.forecast import Rate
from experiments.launching import (
    account,
    arrays,
    branches,
    local,
    local_loop,
    sbatch,
    slurm,
    snapshot,
    states,
    submissions,
)
from experiments.launching.locks import require_store, store_lock
from experiments.launching.profile import Profile
from experiments.launching.progress import Progress
from experiments.launching.versions import check_code
from experiments.training import presence
from experiments.training.record import check_store, data_sha256, write_record

if TYPE_CHECKING:
    from experiments.data.dataset import Dataset

REMEDIES = {  # state of a run that was not submitted -> the verb that deals with it
    "behind a trunk that failed": "retry",
    "failed": "retry",
    "cancelled": "retry",
    "held": "status",
    "pending": "submit",
    "unknown": "status",
    "unreadable": "status",
}
MARKERS = ("failure.json", "cancelled", "job.json")  # files of earlier attempts and launchers in a run's folder
WRITERS = 16  # runs whose files are written at a time, since each file waits for the disk
POLL_SECONDS = 10.0  # between two looks at the queue
ROOM_SECONDS = 60.0  # between two attempts to submit runs that exceed a limit on jobs


@dataclass(frozen=True)
class Outcome:
    """The result of a submission."""

    submitted: list[str]  # run ids
    skipped: dict[str, list[str]] = field(default_factory=dict)  # state -> ids of runs that were not submitted
    ended: list[states.RunState] = field(default_factory=list)  # of runs that were waited for
    waiting: list[str] = field(default_factory=list)  # ids of runs that exceed the cluster's limits on jobs now

    @property
    def unsuccessful(self) -> list[states.RunState]:
        """The runs that ended without being complete."""
        return [state for state in self.ended if state.state != "complete"]


def submit(
    runs: Sequence[RunConfig],
    profile: Profile,
    store: Path,
    *,
    cache: Path,
    wait: bool = False,
    accept: Sequence[str] = (),
) -> Outcome:
    """Submit the runs that are pending, stopped or lost (SUBMITTABLE); skip all others.

    Builds missing data into `cache`. Runs of the executors "local" and "debug" end with this process, so they are
    always waited for; `wait` is for Slurm. Standard error says what was submitted before the wait. Raises ValueError,
    before anything is submitted, if the cluster does not answer, or if the store cannot be written or holds runs of
    another schema, on other data or, unless `accept` has "code", by other code.
    """
    return _launch(_Request(states.SUBMITTABLE, runs, profile, store.absolute(), cache, accept), wait)


def retry(
    runs: Sequence[RunConfig],
    profile: Profile,
    store: Path,
    *,
    cache: Path,
    wait: bool = False,
    accept: Sequence[str] = (),
) -> Outcome:
    """Submit failed, cancelled, stopped and lost runs again; they continue from their last checkpoint.

    Raises ValueError as `submit` does, and if a job of one of them has not ended yet. A run that cannot be submitted
    keeps its state.
    """
    require_store(store)
    return _launch(_Request(states.RETRYABLE, runs, profile, store.absolute(), cache, accept), wait)


@dataclass(frozen=True)
class _Request:
    """The arguments of `submit` or `retry`."""

    wanted: Sequence[str]  # the states in which a run is submitted
    runs: Sequence[RunConfig]
    profile: Profile
    store: Path
    cache: Path
    accept: Sequence[str]


def _launch(request: _Request, wait: bool) -> Outcome:
    """Submit what can be submitted, and wait for it if `wait` is True or the runs end with this process."""
    runs, profile, store = request.runs, request.profile, request.store
    _check(runs, profile)
    _check_schema(store)
    outcome, code = _submit_now(request)
    chosen = _named(outcome.submitted, runs)
    if profile.executor != "slurm":
        begin = {"local": local_loop.run_in_slots, "debug": local_loop.run_in_this_process}[profile.executor]
        if chosen:
            begin(chosen, profile, store, code)
        return replace(outcome, ended=states.read(store, outcome.submitted))
    if not wait:
        return outcome
    under_way = [run_id for name in states.ACTIVE if name != "unknown" for run_id in outcome.skipped.get(name, ())]
    watched = _named([*outcome.submitted, *under_way], runs)
    if watched:
        _watch(watched, store)
    outcome = replace(outcome, ended=states.read(store, [run.run_id for run in watched]))
    if not outcome.waiting:
        return outcome
    more = _launch_when_possible(replace(request, runs=_named(outcome.waiting, runs)))
    submitted, ended = outcome.submitted + more.submitted, outcome.ended + more.ended
    return replace(more, submitted=submitted, skipped=outcome.skipped | more.skipped, ended=ended)


def _launch_when_possible(request: _Request) -> Outcome:
    """Submit the runs as soon as the cluster accepts jobs again, and wait for them."""
    while True:
        try:
            return _launch(request, wait=True)
        except sbatch.TooMany:  # Jobs that have ended count for a while, and other users' jobs may count, too.
            time.sleep(ROOM_SECONDS)


def _submit_now(request: _Request) -> tuple[Outcome, Path]:
    """Submit what can be submitted now. Returns (outcome, folder of the code)."""
    wanted, runs, profile = request.wanted, request.runs, request.profile
    store, cache = request.store, request.cache
    with store_lock(store):  # Check the store first, since building the data may take hours.
        if profile.executor == "slurm":
            submissions.settle(store, [run.run_id for run in runs])
        todo, skipped = _choose(wanted, runs, store)
        check_code(todo, store, request.accept)
        checked = source.module_hashes(source.root())
    waiting, reason, code = list[RunConfig](), "", Path()
    if todo:
        account.require_within_cap(todo, runs, profile, store, cache)
        datasets = _build(runs, cache)  # without the lock, for which others would wait
        with store_lock(store):
            todo, skipped = _choose(wanted, runs, store)  # again: another `submit` may have changed the store
            account.require_within_cap(todo, runs, profile, store, cache)
            _check_store(todo, datasets, store)
            found = account.speeds(runs, profile, store, cache)
            profile = account.with_time_limits(profile, todo, found)
            code = snapshot.take(store)
            if source.module_hashes(code) != checked:
                raise ValueError("the code was edited while the data were built; they are built now: submit again")
            _freeze(todo, datasets, profile, store, found.rates, code)
            kept = _remove_markers([store / run.run_id for run in todo])
            try:
                if profile.executor == "slurm" and todo:
                    waiting, reason = arrays.submit(todo, profile, store, code)
            except BaseException:
                _restore_markers(kept)
                raise
            if waiting:
                _restore_markers(kept)
    begins_later = [run_id for state in ("queued", "held", "requeued") for run_id in skipped.get(state, ())]
    if profile.executor == "slurm" and begins_later:
        with store_lock(store):
            submissions.limit_running(store, begins_later, profile.max_parallel)
    left = {run.run_id: run for run in waiting}
    submitted = [run.run_id for run in todo if run.run_id not in left]
    _say(store, submitted, skipped, len(waiting), reason)
    return Outcome(submitted, skipped, waiting=list(left)), code


def _named(run_ids: Iterable[str], runs: Sequence[RunConfig]) -> list[RunConfig]:
    """The runs that have one of these ids, in their order."""
    wanted = set(run_ids)
    return [run for run in runs if run.run_id in wanted]


def _say(
    store: Path, submitted: Sequence[str], skipped: Mapping[str, Sequence[str]], waiting: int, reason: str
) -> None:
    """Report on standard error what was submitted, what waits and why, and what was skipped."""
    parts = [f"{len(submitted)} runs submitted"]
    if waiting:
        parts.append(f"{waiting} wait, as Slurm takes no more now ({reason}): submit again when some have ended")
    for state, run_ids in skipped.items():
        remedy = f" (see to them with `dynconv {REMEDIES[state]}`)" if state in REMEDIES else ""
        parts.append(f"{len(run_ids)} {state} already{remedy}")
    print(f"{store}: {'; '.join(parts)}", file=sys.stderr)


def _check(runs: Sequence[RunConfig], profile: Profile) -> None:
    """Raises ValueError if the runs cannot execute under the profile, or if Slurm or this machine is not ready."""
    for run in runs:
        profile.job(run.size).execution.check(run)
    if profile.slurm is not None:
        slurm.check(profile.slurm)
    else:
        presence.check()
    if profile.executor == "local":
        local.Slots(profile, [profile.job(run.size) for run in runs])


def _check_schema(store: Path) -> None:
    """Raises ValueError if the store has runs of another schema, which lack columns that a comparison needs."""
    for run_dir in sorted(path.parent for path in store.glob("*/config.json")):
        schema = schema_of(run_dir)
        if schema is not None and schema != SCHEMA:
            raise ValueError(
                f"{store} holds runs of schema {schema} of the log, such as {run_dir.name}; runs of schema {SCHEMA} "
                "are wanted; choose another store with --store"
            )


def _choose(
    wanted: Sequence[str], runs: Sequence[RunConfig], store: Path
) -> tuple[list[RunConfig], dict[str, list[str]]]:
    """The runs in one of the wanted states, and the ids of the others by their state.

    Raises ValueError if the last job of a wanted run has not ended yet.
    """
    todo, skipped = [], dict[str, list[str]]()
    for run, state in zip(runs, states.read(store, [run.run_id for run in runs]), strict=True):
        if state.state in wanted:
            todo.append(run)
        else:
            skipped.setdefault(state.state, []).append(run.run_id)
    chosen = {run.run_id for run in todo}
    if stuck := [run for run in todo if run.trunk not in chosen and branches.hopeless(run, store)]:
        skipped["behind a trunk that failed"] = [run.run_id for run in stuck]
        todo = [run for run in todo if run not in stuck]
    if ending := states.busy(store, [run.run_id for run in todo]):
        raise ValueError(f"{', '.join(sorted(ending))}: the last job has not ended yet; try again in a moment")
    return todo, skipped


def _check_store(runs: Sequence[RunConfig], datasets: Mapping[DataConfig, "Dataset"], store: Path) -> None:
    """Raises ValueError if the store holds runs that cannot be compared with these."""
    alike: dict[tuple[str, str, str | None], list[RunConfig]] = {}
    for run in runs:
        dataset = None if run.data is None else datasets[run.data]
        tokenizer = None if dataset is None else dataset.tokenizer_sha256
        alike.setdefault((run.task_name, data_sha256(run, dataset), tokenizer), []).append(run)
    for (_, sha256, tokenizer), group in alike.items():
        check_store(group, store, sha256, tokenizer)


def _build(runs: Sequence[RunConfig], cache: Path) -> dict[DataConfig, "Dataset"]:
    """The datasets of the runs by their specification, built if they are missing. Generated tasks have none."""
    from experiments.data.build import build
    from experiments.data.dataset import Dataset
    from experiments.launching import data_jobs

    specs = dict.fromkeys(run.data for run in runs if run.data is not None)
    data_jobs.require_nothing_under_way(specs, cache)
    return {spec: Dataset.open(build(spec, cache)) for spec in specs}


def _freeze(
    runs: Sequence[RunConfig],
    datasets: Mapping[DataConfig, "Dataset"],
    profile: Profile,
    store: Path,
    rates: Mapping[str, Rate],  # by run id; runs of unknown speed are missing
    code: Path,
) -> None:
    """Write each run's config.json."""
    commit = snapshot.commit(code)

    def freeze(run: RunConfig) -> None:
        job, rate = profile.job(run.size), rates.get(run.run_id)
        write_record(
            run,
            store,
            None if run.data is None else datasets[run.data],
            job.execution,
            code_commit=commit,
            submitted_at=time.time(),
            forecast_gpu_hours=None if rate is None else job.gpus * rate.hours(run),
        )

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(freeze, runs))


def _remove_markers(run_dirs: Iterable[Path]) -> dict[Path, bytes]:
    """Delete the MARKERS of earlier attempts and launchers. Returns their content by path."""
    paths = [run_dir / name for run_dir in run_dirs for name in MARKERS]
    kept = {path: path.read_bytes() for path in paths if path.exists()}
    for path in kept:
        path.unlink()
    return kept


def _restore_markers(kept: Mapping[Path, bytes]) -> None:
    """Restore the files that `_remove_markers` deleted, for runs that got no job."""
    for path, content in kept.items():  # A run's job.json comes last, so it does not hide its other markers.
        if not path.with_name("job.json").exists():
            write_atomically(path, functools.partial(Path.write_bytes, data=content))


def _watch(runs: Sequence[RunConfig], store: Path) -> None:
    """Wait until no run is active any more."""
    quiet = 0  # consecutive looks that found no active run
    try:
        with Progress(store, runs) as progress:
            while quiet < 2:  # On a shared file system, a result may appear after its job has left the queue.
                time.sleep(POLL_SECONDS)
                active = any(state.state in states.ACTIVE for state in progress.update())
                quiet = 0 if active else quiet + 1
    except KeyboardInterrupt:
        print(f"\nthe jobs go on; `dynconv status --store {store}` shows them", file=sys.stderr)
        raise
