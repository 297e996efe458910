"""Submit, retry and cancel runs: pending ones only, their config and their code frozen first."""

import contextlib
import fcntl
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.logs.files import write_json
from analysis.logs.record import schema_of
from analysis.logs.schema import SCHEMA
from experiments.design.config import RunConfig
from experiments.design.data import DataConfig
from experiments.launching import local, slurm, snapshot, states
from experiments.launching.profile import Profile
from experiments.launching.progress import Progress
from experiments.training.run import Run, RunFailed, write_config

if TYPE_CHECKING:
    import submitit

    from experiments.data.dataset import Dataset

SUBMITTABLE = ("pending", "lost")
RETRYABLE = ("failed", "cancelled", "lost")
REMEDIES = {"failed": "retry", "cancelled": "retry", "pending": "submit", "unknown": "status", "unreadable": "status"}
MARKERS = ("failure.json", "cancelled", "job.json")  # what earlier attempts and launchers left
STOP_SECONDS = 60.0  # what runs on this machine get to save their state after Ctrl-C
POLL_SECONDS = {"local": 0.5, "slurm": 10.0}


@dataclass(frozen=True)
class Outcome:
    """What a submission did."""

    submitted: list[str]  # run ids
    skipped: dict[str, list[str]] = field(default_factory=dict)  # state -> ids of the runs left alone
    ended: list[states.RunState] = field(default_factory=list)  # of those submitted, where they were waited for

    @property
    def unsuccessful(self) -> list[states.RunState]:
        return [state for state in self.ended if state.state != "complete"]


def submit(runs: Sequence[RunConfig], profile: Profile, store: Path, *, cache: Path, wait: bool = False) -> Outcome:
    """Submit the runs that are pending, or were lost by a scheduler or a crash; leave all others alone.

    Builds missing data into `cache`. Runs of the executors "local" and "debug" are always waited for, since they
    live in this process's care. What was submitted is said on standard error before the wait. Raises ValueError,
    before anything is written, where the cluster does not answer or the store takes no files.
    """
    return _launch(SUBMITTABLE, runs, profile, store.absolute(), cache, wait)


def retry(runs: Sequence[RunConfig], profile: Profile, store: Path, *, cache: Path, wait: bool = False) -> Outcome:
    """Submit failed, cancelled and lost runs again; they go on from their last checkpoint.

    Raises ValueError where a job of one of them has not ended yet. A run that cannot be submitted stays as it was.
    """
    return _launch(RETRYABLE, runs, profile, store.absolute(), cache, wait)


def _launch(
    wanted: Sequence[str], runs: Sequence[RunConfig], profile: Profile, store: Path, cache: Path, wait: bool
) -> Outcome:
    _check(runs, profile)
    _check_schema(store)
    with _locked(store):  # it takes files: better known before the data is built
        todo, skipped = _choose(wanted, runs, store)
    if todo:
        datasets = _build(runs, cache)  # may take hours, so not under the lock
        with _locked(store):
            todo, skipped = _choose(wanted, runs, store)  # another submit may have been here
            code = _freeze(todo, datasets, profile, store)
            with _unmarked([store / run.run_id for run in todo]):
                if profile.executor == "slurm":
                    _submit_arrays(todo, profile, store, code)
    run_ids = [run.run_id for run in todo]
    _say(store, run_ids, skipped)
    if not todo or (profile.executor == "slurm" and not wait):
        return Outcome(run_ids, skipped)
    {"slurm": _watch, "local": _run_here, "debug": _debug}[profile.executor](todo, profile, store, code)
    return Outcome(run_ids, skipped, states.read(store, run_ids))


def _say(store: Path, submitted: Sequence[str], skipped: Mapping[str, Sequence[str]]) -> None:
    parts = [f"{len(submitted)} runs submitted"]
    for state, run_ids in skipped.items():
        remedy = f" (see to them with `dynconv {REMEDIES[state]}`)" if state in REMEDIES else ""
        parts.append(f"{len(run_ids)} {state} already{remedy}")
    print(f"{store}: {'; '.join(parts)}", file=sys.stderr)


def cancel(store: Path, run_ids: Iterable[str]) -> list[str]:
    """Cancel the named runs that have not ended; their ids. They stay cancelled until they are retried.

    The marker comes first: to a running job the signal of scancel looks like a preemption. Raises ValueError, and
    takes the markers back, for the runs whose jobs cannot be reached from here; the others are cancelled.
    """
    here = states.read(store, [run_id for run_id in run_ids if (store / run_id).is_dir()])
    ids = [state.run_id for state in here if state.state in ("pending", "lost", *states.ACTIVE)]
    for run_id in ids:
        (store / run_id / "cancelled").touch()
    jobs = {run_id: states.job_of(store / run_id) for run_id in states.busy(store, ids)}
    in_slurm = {run_id: job["job_id"] for run_id, job in jobs.items() if job and job["executor"] == "slurm"}
    beyond: dict[str, str] = {}  # run id -> why its job goes on
    try:
        if in_slurm:
            slurm.cancel(list(in_slurm.values()))
    except ValueError as error:
        beyond |= dict.fromkeys(in_slurm, str(error))
    for run_id, job in jobs.items():
        if job and job["executor"] != "slurm" and (why := _stop_here(job)):
            beyond[run_id] = why
    for run_id in beyond:
        (store / run_id / "cancelled").unlink(missing_ok=True)
    if beyond:
        reasons = [f"{count} go on: {why}" for why, count in Counter(beyond.values()).items()]
        raise ValueError(f"{len(ids) - len(beyond)} of {len(ids)} runs cancelled; {'; '.join(reasons)}")
    return ids


def _stop_here(job: Mapping[str, Any]) -> str | None:
    """Stop a job of this machine's; why not, where it cannot be."""
    if job["host"] != socket.gethostname():
        return f"they run on {job['host']}; cancel there"
    if job["executor"] == "debug":
        return f"they run in process {job['job_id']}; press Ctrl-C there"
    try:
        local.stop(job["job_id"])
    except PermissionError:
        return f"process {job['job_id']} is another user's, who can cancel it"
    return None


def _check(runs: Sequence[RunConfig], profile: Profile) -> None:
    if profile.slurm is not None:
        slurm.check(profile.slurm)
    if profile.executor == "local":
        local.Slots(profile, [profile.job(run.size) for run in runs])


def _check_schema(store: Path) -> None:
    """Raises ValueError where the store has runs of another schema: they lack columns that a comparison needs."""
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
    """The runs in one of the wanted states, and the ids of the others by their state."""
    todo, skipped = [], dict[str, list[str]]()
    for run, state in zip(runs, states.read(store, [run.run_id for run in runs]), strict=True):
        if state.state in wanted:
            todo.append(run)
        else:
            skipped.setdefault(state.state, []).append(run.run_id)
    if ending := states.busy(store, [run.run_id for run in todo]):
        raise ValueError(f"{', '.join(sorted(ending))}: the last job has not ended yet; try again in a moment")
    return todo, skipped


def _build(runs: Sequence[RunConfig], cache: Path) -> dict[DataConfig, "Dataset"]:
    """Build what data is missing."""
    from experiments.data.build import build
    from experiments.data.dataset import Dataset

    return {spec: Dataset.open(build(spec, cache)) for spec in dict.fromkeys(run.data for run in runs)}


def _freeze(runs: Sequence[RunConfig], datasets: Mapping[DataConfig, "Dataset"], profile: Profile, store: Path) -> Path:
    """Copy the code, write each run's config.json; the folder of the code."""
    code = snapshot.take(store)
    commit = snapshot.commit(code)
    for run in runs:
        execution = profile.job(run.size).execution
        write_config(run, store, datasets[run.data], execution, code_commit=commit, submitted_at=time.time())
    return code


@contextlib.contextmanager
def _unmarked(run_dirs: Iterable[Path]) -> Iterator[None]:
    """Without what earlier attempts left. Where the block fails it comes back to the runs that got no new job."""
    paths = [run_dir / name for run_dir in run_dirs for name in MARKERS]
    kept = {path: path.read_bytes() for path in paths if path.exists()}
    for path in kept:
        path.unlink()
    try:
        yield
    except BaseException:
        for path, content in kept.items():  # a run's job.json comes last
            if not path.with_name("job.json").exists():
                path.write_bytes(content)
        raise


def _submit_arrays(runs: Sequence[RunConfig], profile: Profile, store: Path, code: Path) -> None:
    """One array a size, since an array has one set of resources; several where it passes the cluster's limit."""
    assert profile.slurm is not None
    limit = slurm.max_array_size()
    by_size = [[run for run in runs if run.size == size] for size in dict.fromkeys(run.size for run in runs)]
    arrays = [same[low : low + limit] for same in by_size for low in range(0, len(same), limit)]
    queued = 0
    for array in arrays:
        size = array[0].size
        executor = slurm.executor(
            profile.job(size),
            profile.slurm,
            max_parallel=profile.max_parallel,
            name=f"{array[0].sweep}-{size}",
            folder=_job_folder(store, size),
            snapshot=code,
        )
        try:
            _submit_array([store / run.run_id for run in array], executor, code)
        except ValueError as error:
            rest = f"; {queued} of {len(runs)} runs are queued: submit again for the rest" if queued else ""
            raise ValueError(f"{error}{rest}") from None
        queued += len(array)


def _submit_array(run_dirs: Sequence[Path], executor: "submitit.SlurmExecutor", code: Path) -> None:
    with local.shielded():  # between sbatch and job.json nobody would know of the jobs
        jobs = slurm.submit([Run(run_dir) for run_dir in run_dirs], executor)
        try:
            for run_dir, job in zip(run_dirs, jobs, strict=True):
                _write_job(run_dir, "slurm", job.job_id, job.paths.stdout, code)
        except OSError:
            slurm.cancel([job.job_id for job in jobs])
            for run_dir in run_dirs:
                (run_dir / "job.json").unlink(missing_ok=True)
            raise


def _watch(runs: Sequence[RunConfig], _profile: Profile, store: Path, _code: Path) -> None:
    """Wait until no run is queued or running any more."""
    quiet = 0
    try:
        with Progress(store, runs) as progress:
            while quiet < 2:  # on a shared file system the last result may appear after the job has left the queue
                time.sleep(POLL_SECONDS["slurm"])
                active = any(state.state in states.ACTIVE for state in progress.update())
                quiet = 0 if active else quiet + 1
    except KeyboardInterrupt:
        print(f"\nthe jobs go on; `dynconv status --store {store}` shows them", file=sys.stderr)
        raise


def _run_here(runs: Sequence[RunConfig], profile: Profile, store: Path, code: Path) -> None:
    """Feed the runs to this machine's slots until all have ended. Ctrl-C lets them save their state, then stops."""
    folder = _job_folder(store, "local")
    slots = local.Slots(profile, [profile.job(run.size) for run in runs])
    waiting, running = deque(runs), dict[int, "submitit.Job[None]"]()
    with Progress(store, runs) as progress, _terminated_as_interrupted():
        try:
            while waiting or running:
                for slot in [slot for slot, job in running.items() if job.done()]:
                    del running[slot]
                    slots.free.append(slot)
                while waiting and slots.free:
                    run = waiting.popleft()
                    run_dir = store / run.run_id
                    with _locked(store):  # another `submit` or a `cancel` may have been here first
                        if states.read(store, [run.run_id])[0].state in SUBMITTABLE:
                            slot = slots.free.pop(0)
                            with local.shielded():
                                running[slot] = slots.start(slot, run_dir, profile.job(run.size), folder, code)
                                _write_job(run_dir, "local", running[slot].job_id, running[slot].paths.stdout, code)
                progress.update()
                time.sleep(POLL_SECONDS["local"])
        except BaseException:  # Ctrl-C, a full disk, our own mistake: no run outlives its launcher
            _stop([job for job in running.values() if not job.done()])
            raise


def _stop(jobs: Sequence["submitit.Job[None]"]) -> None:
    print(f"\nstopping {len(jobs)} runs; their state is being saved", file=sys.stderr)
    end = time.monotonic() + STOP_SECONDS
    while (living := [job for job in jobs if not job.done()]) and time.monotonic() < end:
        for job in living:  # again and again: a controller that has just begun has nobody to pass it on to
            local.stop(job.job_id)
        time.sleep(POLL_SECONDS["local"])


def _debug(runs: Sequence[RunConfig], _profile: Profile, store: Path, code: Path) -> None:
    """In this process, one after the other. A failed run's traceback is shown; the next run starts all the same."""
    for run in runs:
        _write_job(store / run.run_id, "debug", str(os.getpid()), None, code)
        try:
            Run(store / run.run_id)()
        except RunFailed:
            traceback.print_exc()
        finally:
            (store / run.run_id / "job.json").unlink()


def _write_job(run_dir: Path, executor: str, job_id: str, log: Path | None, code: Path) -> None:
    job = {
        "executor": executor,
        "job_id": job_id,
        "host": socket.gethostname(),
        "started": None if executor == "slurm" else states.process_started(job_id),
        "submitted_at": time.time(),
        "log": None if log is None else str(log),
        "code": code.name,
    }
    write_json(run_dir / "job.json", job)


def _job_folder(store: Path, name: str) -> Path:
    """A new folder for submitit's files and the jobs' output."""
    folder = store / ".jobs"
    folder.mkdir(exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=time.strftime(f"%Y%m%d-%H%M%S-{name}-"), dir=folder))


@contextlib.contextmanager
def _locked(store: Path) -> Iterator[None]:
    """One submission to a store at a time; whoever waits is told. Raises ValueError where the store takes no files."""
    try:
        store.mkdir(parents=True, exist_ok=True)
        lock = (store / ".lock").open("w")
    except OSError as error:
        raise ValueError(f"{store} takes no files ({error.strerror}); choose another with --store") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another submit to {store}", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # some cluster file systems have no locks: the window is small, so go on without
            pass
        yield


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """A closed terminal or a plain `kill` ends the runs like Ctrl-C. What is ignored stays so: `nohup` sees to that."""
    heeded = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
