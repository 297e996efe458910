"""One job at a time has a run's folder and one submit a store, with file locks and without; real processes."""

import errno
import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from launches import PATIENCE, slowly
from test_run import expect_whole, losses, result, wait_for

from analysis.logs import ownership
from analysis.logs.files import read_json, write_json
from analysis.logs.ownership import FolderHeld, held
from experiments.data.dataset import Dataset
from experiments.design.config import RunConfig
from experiments.launching import jobs, sbatch, slurm, submissions, worker
from experiments.launching import submit as launch
from experiments.launching.profile import Job, Profile, Slurm
from experiments.training.run import Run, RunFailed, _Attempt
from experiments.training.trainer import Trainer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside threads
Submitted = Callable[..., Path]
FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=["locks", "no locks"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system with file locks and one without, whose leases end soon."""
    if request.param == "no locks":
        without_locks(monkeypatch)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    without_locks(monkeypatch)


def without_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    monkeypatch.setattr(ownership, "LEASE_SECONDS", 5.0)  # fifteen beats, some of which come late on a loaded machine
    monkeypatch.setattr(ownership, "BEAT_SECONDS", 0.3)


def started(work: Callable[..., object], *arguments: object) -> BaseProcess:
    process = FORK.Process(target=work, args=arguments)
    process.start()
    return process


def run_as(job: str, run_dir: Path) -> None:
    """A job of Slurm, which has its id from the environment."""
    os.environ.update(SUBMITIT_EXECUTOR="slurm", SLURM_JOB_ID=job, SLURM_NTASKS="1", SLURM_PROCID="0")
    os.environ.update(SLURM_LOCALID="0", SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0", SLURM_JOB_NODELIST="here")
    try:
        Run(run_dir)()
    except RunFailed as error:
        print(error, flush=True)
        os._exit(3)


def note(run_dir: Path, job: str) -> None:
    jobs.write_job(run_dir, "slurm", job, None, Path("code"))


def attempts(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.glob("attempt-*.json"))


@pytest.fixture
def long_run(tiny_run: RunConfig) -> RunConfig:
    """A second or two."""
    return replace(tiny_run, train=replace(tiny_run.train, tokens=16 * 8 * 300, evaluate_every=16 * 8 * 100))


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs that begin after this take a tenth of a second a step, as long as this file is there."""
    file = tmp_path / "slowly"
    file.touch()
    monkeypatch.setattr(_Attempt, "_folder_taken", slowly(_Attempt._folder_taken, str(file), after=0))
    return file


@pytest.fixture
def reference(long_run: RunConfig, submitted: Submitted, tmp_path: Path) -> Path:
    run_dir = submitted(long_run, tmp_path / "reference")
    Run(run_dir)()
    return run_dir


@pytest.mark.slow
@pytest.mark.usefixtures("locks")
def test_a_job_stops_when_the_run_is_given_to_another_which_waits_for_that(
    long_run: RunConfig, submitted: Submitted, reference: Path, slow: Path, tmp_path: Path
) -> None:
    """The first job began before it was noted; its submitter was killed, and the next one submitted the run again."""
    run_dir = submitted(long_run, tmp_path / "store", checkpoint_minutes=0.002)
    first = started(run_as, "7", run_dir)
    wait_for(lambda: bool(list(run_dir.glob("checkpoint/step-*"))))
    os.kill(first.pid or 0, signal.SIGSTOP)  # so that it is here still when the second begins
    note(run_dir, "8")
    second = started(run_as, "8", run_dir)
    time.sleep(0.5)
    assert attempts(run_dir) == ["attempt-0001.json"]
    os.kill(first.pid or 0, signal.SIGCONT)
    first.join(PATIENCE)
    slow.unlink()
    second.join(PATIENCE)
    assert (first.exitcode, second.exitcode) == (3, 0)
    expect_whole(run_dir, reference)
    assert [attempt["job_id"] for attempt in result(run_dir)["attempts_made"]] == ["7", "8"]
    assert not (run_dir / "failure.json").exists()


def test_a_job_that_comes_late_leaves_the_run_to_the_job_that_has_it(
    tiny_run: RunConfig, submitted: Submitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = submitted(tiny_run, tmp_path)
    note(run_dir, "8")
    before = sorted(path.name for path in run_dir.iterdir())
    with pytest.raises(RunFailed, match="was given to job 8; this one stops and leaves it to that"):
        Run(run_dir)()
    assert sorted(path.name for path in run_dir.iterdir()) == before
    (run_dir / "job.json").unlink()

    evaluate, flushed = Trainer.evaluate, list[Path]()

    def given_away(self: Trainer, interrupted: Callable[[], bool]) -> object:
        note(run_dir, "9")
        flushed.extend(run_dir.glob("steps-*"))
        return evaluate(self, interrupted)

    monkeypatch.setattr(Trainer, "evaluate", given_away)
    with pytest.raises(RunFailed, match="was given to job 9"):
        Run(run_dir)()
    assert list(run_dir.glob("steps-*")) == flushed == []
    assert not (run_dir / "failure.json").exists()
    assert not (run_dir / "run.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("no_locks")
def test_two_jobs_of_one_run_without_locks_train_it_once(
    long_run: RunConfig, submitted: Submitted, reference: Path, slow: Path, tmp_path: Path
) -> None:
    """Neither is noted, as where a person starts a run twice: the second gives up as the lease is kept alive, and the
    third takes it over when the first was killed."""
    run_dir = submitted(long_run, tmp_path / "store", checkpoint_minutes=0.002)
    first = started(run_as, "7", run_dir)
    wait_for(lambda: bool(list(run_dir.glob("checkpoint/step-*"))))
    second = started(run_as, "8", run_dir)
    second.join(PATIENCE)
    assert second.exitcode == 3
    assert attempts(run_dir) == ["attempt-0001.json"]
    first.kill()
    first.join()
    slow.unlink()
    third = started(run_as, "9", run_dir)
    third.join(PATIENCE)
    assert third.exitcode == 0
    expect_whole(run_dir, reference)
    assert result(run_dir)["attempts"] == 2
    assert not (run_dir / ownership.LEASE).exists()


@pytest.mark.slow
@pytest.mark.usefixtures("no_locks")
def test_a_job_that_slept_through_its_lease_writes_nothing_more(
    long_run: RunConfig, submitted: Submitted, reference: Path, slow: Path, tmp_path: Path
) -> None:
    run_dir = submitted(long_run, tmp_path / "store", checkpoint_minutes=0.002)
    first = started(run_as, "7", run_dir)
    wait_for(lambda: bool(list(run_dir.glob("checkpoint/step-*"))))
    os.kill(first.pid or 0, signal.SIGSTOP)
    second = started(run_as, "8", run_dir)
    wait_for(lambda: len(attempts(run_dir)) == 2)
    os.kill(first.pid or 0, signal.SIGCONT)
    first.join(PATIENCE)
    slow.unlink()
    second.join(PATIENCE)
    assert (first.exitcode, second.exitcode) == (3, 0)
    expect_whole(run_dir, reference)
    assert not (run_dir / "failure.json").exists()


def test_a_lease_that_changes_hands_while_it_is_taken_away_stays(tmp_path: Path) -> None:
    lease = tmp_path / ownership.LEASE
    lease.touch()
    old = ownership._mark(lease)
    assert old is not None
    os.utime(lease, ns=(1, 1))  # its owner lives after all
    ownership._take_away(lease, old)
    assert [path.name for path in tmp_path.iterdir()] == [ownership.LEASE]
    now = ownership._mark(lease)
    assert now is not None
    ownership._take_away(lease, now)
    assert list(tmp_path.iterdir()) == []


def inside(folder: Path, journal: Path, times: int) -> None:
    for _ in range(times):
        with held(folder, patience=PATIENCE), journal.open("a") as file:
            for word in ("in", "out"):
                file.write(f"{word} {os.getpid()}\n")
                file.flush()
                time.sleep(0.05)


@pytest.mark.usefixtures("locks")
def test_one_process_at_a_time_has_a_folder(tmp_path: Path) -> None:
    folder, journal = tmp_path / "folder", tmp_path / "journal"
    folder.mkdir()
    processes = [started(inside, folder, journal, 3) for _ in range(4)]
    for process in processes:
        process.join(PATIENCE)
    lines = journal.read_text().splitlines()
    assert len(lines) == 2 * 3 * 4
    for entered, left in zip(lines[::2], lines[1::2], strict=True):
        assert (entered.split()[0], left) == ("in", entered.replace("in", "out"))
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("locks")
def test_a_lock_that_fails_is_not_taken_for_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lease beside somebody's lock would make two owners."""

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", broken)
    with pytest.raises(OSError, match="Input/output error"), ownership.held(tmp_path, patience=0.0):
        pass
    assert not (tmp_path / ownership.LEASE).exists()


def test_a_folder_that_is_anothers_is_said_to_be(tmp_path: Path) -> None:
    told: list[bool] = []
    with held(tmp_path, patience=0.0) as hold:
        with pytest.raises(FolderHeld), held(tmp_path, patience=0.3, waiting=lambda: told.append(True)):
            pass
        assert not hold.lost()
    assert told == [True]


def test_a_lock_that_a_killed_process_left_is_writable_for_whoever_may_write_in_the_folder(tmp_path: Path) -> None:
    """A store may be a group's; a colleague was told that it takes no files."""
    for mode in (0o755, 0o775):
        tmp_path.chmod(mode)
        with held(tmp_path, patience=0.0):
            assert (tmp_path / ownership.LOCK).stat().st_mode & 0o777 == mode & 0o666


def test_who_was_deprived_of_a_lock_knows_it(tmp_path: Path) -> None:
    """As by a server of NFS that had not heard of a client for long: the file stays, and is another's."""
    with held(tmp_path, patience=0.0) as first:
        fcntl.flock(first._file, fcntl.LOCK_UN)
        with held(tmp_path, patience=0.0) as second:
            assert first.lost()
            first.release()
            assert not second.lost()


# Submitting


@pytest.fixture
def profile(monkeypatch: pytest.MonkeyPatch) -> Profile:
    """Slurm's, whose sbatch accepts everything and starts nothing, and whose squeue does not answer."""
    accepted: list[str] = []

    def accept(*_: object) -> str:
        accepted.append(f"{os.getpid()}{len(accepted)}")
        return accepted[-1]

    monkeypatch.setattr(slurm, "check", lambda _: None)
    monkeypatch.setattr("submitit.slurm.slurm.SlurmExecutor.affinity", lambda _: 2)
    monkeypatch.setattr(sbatch, "submit", accept)
    monkeypatch.setattr(slurm, "max_array_size", lambda: 10)
    monkeypatch.setattr(slurm, "limit_running", lambda *_: None)
    monkeypatch.setattr(slurm, "queue", lambda *_: None)
    monkeypatch.setattr(slurm, "find", lambda *_: None)  # as where there is no accounting
    return Profile("slurm", slurm=Slurm("low", signal_seconds=30), default=Job(device="cpu"))


def submit_and_count(runs: list[RunConfig], profile: Profile, store: Path, cache: Path, answer: Path) -> None:
    outcome = launch.submit(runs, profile, store, cache=cache)
    write_json(answer, {"submitted": outcome.submitted})


@pytest.mark.usefixtures("locks")
def test_two_submits_at_once_submit_each_run_once(
    profile: Profile, tiny_run: RunConfig, dataset: Dataset, tmp_path: Path
) -> None:
    runs = [replace(tiny_run, seed=seed) for seed in range(6)]
    answers = [tmp_path / f"{number}.json" for number in range(2)]
    processes = [
        started(submit_and_count, runs, profile, tmp_path / "store", dataset.path.parent, answer) for answer in answers
    ]
    for process in processes:
        process.join(PATIENCE)
    submitted_runs = [run_id for answer in answers for run_id in read_json(answer)["submitted"]]
    assert sorted(submitted_runs) == sorted(run.run_id for run in runs)


def job_of_array(folder: Path, array: str, index: int) -> None:
    """What Slurm executes as one job of an array."""
    os.environ.update(SLURM_ARRAY_JOB_ID=array, SLURM_ARRAY_TASK_ID=str(index), SUBMITIT_EXECUTOR="slurm")
    os.environ.update(SLURM_JOB_ID=f"{array}{index}", SLURM_NTASKS="1", SLURM_PROCID="0", SLURM_LOCALID="0")
    os.environ.update(SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0", SLURM_JOB_NODELIST="here")
    worker._Job(folder).execute()


@pytest.mark.slow
@pytest.mark.usefixtures("locks")
def test_a_submitter_killed_between_two_notes_costs_a_job_and_no_step(
    profile: Profile,
    long_run: RunConfig,
    dataset: Dataset,
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slurm has the jobs of its array, and does not say so. When they are submitted again, all begin at once."""
    store = tmp_path / "store"
    runs = [replace(long_run, seed=1), long_run]  # an array has its first seeds first
    with monkeypatch.context() as patch:
        patch.setattr(submissions, "accepted", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        submitter = started(submit_and_count, runs, profile, store, dataset.path.parent, tmp_path / "never")
        submitter.join(PATIENCE)
    assert submitter.exitcode == -signal.SIGKILL
    (first,) = (store / jobs.FOLDER).iterdir()
    assert launch.submit(runs, profile, store, cache=dataset.path.parent).submitted == [run.run_id for run in runs]
    (second,) = set((store / jobs.FOLDER).iterdir()) - {first}
    array = read_json(store / runs[1].run_id / "job.json")["job_id"].partition("_")[0]
    processes = [started(job_of_array, first, "999", 1), started(job_of_array, second, array, 1)]
    for process in processes:
        process.join(PATIENCE)
    assert [process.exitcode for process in processes] == [0, 0]
    run_dir = store / runs[1].run_id
    expect_whole(run_dir, reference)
    assert len(losses(run_dir)) == long_run.train.steps
    assert [attempt["job_id"] for attempt in result(run_dir)["attempts_made"]] == [f"{array}_1"]
