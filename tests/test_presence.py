"""The runs that share a machine: how many a run counts, and how many two launchers start together. Real processes."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launches import PATIENCE, slow_down
from test_run import wait_for

from analysis.logs.files import read_json
from analysis.logs.provenance import summarize
from experiments.data.dataset import Dataset
from experiments.design.config import RunConfig
from experiments.design.schedules import WarmupStableDecay
from experiments.design.trunks import with_trunks
from experiments.launching import jobs, local, states
from experiments.launching import submit as launch
from experiments.launching.profile import Job, Profile
from experiments.training import presence
from experiments.training.presence import Share, sharing
from experiments.training.trainer import Trainer

CPU = Profile("local", max_parallel=2, default=Job(device="cpu"))
CORES = tuple(sorted(os.sched_getaffinity(0)))
Start = Callable[[Share], subprocess.Popen[bytes]]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(presence.FOLDER_VARIABLE, str(tmp_path / "present"))


@pytest.fixture
def start() -> Iterator[Start]:
    """A process that is noted to train a run with this share of the machine."""
    processes = []

    def sleep(share: Share) -> subprocess.Popen[bytes]:
        processes.append(subprocess.Popen(["sleep", "1000"]))
        with presence.starting():
            presence.add(processes[-1].pid, "/store/a-run", share)
        return processes[-1]

    yield sleep
    for process in processes:
        process.kill()
        process.wait()


def test_runs_on_a_gpu_share_it_with_those_that_have_one_of_its_gpus(start: Start) -> None:
    def on(*gpus: int) -> int:
        return start(Share(gpus, 1, CORES)).pid

    first, second, both, other = on(4), on(6), on(4, 6), on(7)
    start(Share((), 10**6, CORES))  # on the CPU
    assert [sharing(pid) for pid in (first, second, both, other)] == [2, 2, 3, 1]
    assert sharing(os.getpid()) is None


def test_runs_on_a_cpu_share_it_when_there_are_more_threads_than_cores(start: Start) -> None:
    four, others = (0, 1, 2, 3), (4, 5)
    first = start(Share((), 2, four)).pid
    assert sharing(first) == 1
    start(Share((), 2, four))
    assert sharing(first) == 1
    third = start(Share((), 2, four))
    assert sharing(first) == 2
    elsewhere = start(Share((), 2, others)).pid
    assert (sharing(first), sharing(elsewhere)) == (2, 1)
    third.kill()
    third.wait()
    assert sharing(first) == 1


def test_what_killed_processes_left_is_forgotten(start: Start, tmp_path: Path) -> None:
    process = start(Share((0,), 1, CORES))
    assert len(list((tmp_path / "present").glob("*.json"))) == 1
    process.kill()
    process.wait()
    assert presence.present() == []
    with presence.starting():
        assert list((tmp_path / "present").glob("*.json")) == []


def test_files_that_are_none_of_ours_stay(start: Start, tmp_path: Path) -> None:
    """Whoever sets the variable may name a folder that holds other files."""
    (tmp_path / "present").mkdir()
    (tmp_path / "present" / "package-lock.json").write_text("{}")
    start(Share((0,), 1, CORES))
    assert (tmp_path / "present" / "package-lock.json").exists()


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "present").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with (
        pytest.raises(ValueError, match=r"it is another user's.*; set DYNCONV_PRESENCE to a folder of your own"),
        presence.starting(),
    ):
        pass


def test_a_machine_that_cannot_note_its_runs_is_refused_before_anything_is_written(
    tiny_run: RunConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(presence.FOLDER_VARIABLE, str(tmp_path / "file" / "present"))
    with pytest.raises(
        ValueError, match=r"is to note which runs this machine trains \(Not a directory\); set DYNCONV_"
    ):
        launch.submit([tiny_run], CPU, tmp_path / "store", cache=dataset.path.parent)
    assert not (tmp_path / "store").exists()


def test_a_launcher_takes_the_gpu_that_others_use_least(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6,7")
    start(Share((4,), 1, CORES))
    start(Share((2,), 1, CORES))  # none of this launcher's
    slots = local.Slots(Profile("local"), [Job()] * 3)
    beside = slots.beside(())
    assert [run.share.gpus for run in beside] == [(4,)]
    taken = []
    while slots.room(beside):
        taken.append(slots._gpus[slots.take(beside)])
    assert taken == [[6], [7]]


def submit_in_a_process(
    runs: list[RunConfig], store: Path, cache: Path, said: Path, profile: Profile = CPU
) -> subprocess.Popen[bytes]:
    arguments = said.with_suffix(".pkl")
    arguments.write_bytes(pickle.dumps((runs, profile, store, cache)))
    code = (
        "import pickle, sys; from experiments.launching import submit as launch; "
        "runs, profile, store, cache = pickle.load(open(sys.argv[1], 'rb')); "
        "sys.exit(len(launch.submit(runs, profile, store, cache=cache).unsuccessful))"
    )
    with said.open("w") as stderr:
        return subprocess.Popen([sys.executable, "-c", code, str(arguments)], stderr=stderr)


@pytest.mark.slow
def test_a_submit_waits_while_the_runs_of_others_leave_no_room(
    start: Start, tiny_run: RunConfig, dataset: Dataset, tmp_path: Path
) -> None:
    """Two runs of others for max_parallel = 2, one of which is killed in the end."""
    others = [start(Share((), 1, CORES)) for _ in range(2)]
    store, said = tmp_path / "store", tmp_path / "said"
    runs = [replace(tiny_run, seed=seed) for seed in range(2)]
    launcher = submit_in_a_process(runs, store, dataset.path.parent, said)
    told = f"2 runs of other submits, as a-run (process {others[0].pid}), train on this machine: waiting until"
    wait_for(lambda: told in said.read_text())
    time.sleep(1.0)
    assert len(presence.present()) == 2
    assert {state.state for state in states.read(store, [run.run_id for run in runs])} == {"pending"}
    others[1].kill()
    others[1].wait()
    assert launcher.wait(PATIENCE) == 0
    finished = [read_json(store / run.run_id / "run.json") for run in runs]
    spans = [(run["attempts_made"][0]["started_at"], run["finished_at"]) for run in finished]
    assert max(start for start, _ in spans) > min(end for _, end in spans)  # one after the other


@pytest.mark.slow
def test_two_submits_of_one_sweep_train_it_once_and_both_end_well(
    tiny_run: RunConfig, dataset: Dataset, tmp_path: Path
) -> None:
    """No more runs at a time than one of them allows, and neither calls a run of the other's unsuccessful."""
    runs = [replace(tiny_run, seed=seed) for seed in range(4)]
    store = tmp_path / "store"
    launchers = [submit_in_a_process(runs, store, dataset.path.parent, tmp_path / f"said-{name}") for name in "ab"]
    most = 0
    while any(launcher.poll() is None for launcher in launchers):
        most = max(most, len(presence.present()))
        time.sleep(0.02)
    assert [launcher.wait() for launcher in launchers] == [0, 0]
    assert 1 <= most <= 2
    found = states.read(store, [run.run_id for run in runs])
    assert {(state.state, state.attempts) for state in found} == {("complete", 1)}
    started = 0
    for name in "ab":
        said = (tmp_path / f"said-{name}").read_text()
        submitted, taken = (
            re.search(r"(\d+) runs submitted", said),
            re.search(r"(\d+) of \d+ runs were not start", said),
        )
        assert submitted is not None
        started += int(submitted[1]) - (int(taken[1]) if taken else 0)
    assert started == 4  # what they say adds up


@pytest.mark.slow
def test_branches_wait_for_a_trunk_that_another_submit_trains(
    tiny_run: RunConfig, dataset: Dataset, tmp_path: Path
) -> None:
    train = replace(tiny_run.train, schedule=WarmupStableDecay(0.25))
    budgets = [(f"{steps} steps", replace(train, tokens=16 * 8 * steps)) for steps in (40, 60)]
    runs = with_trunks([replace(tiny_run, budget=budget, train=train) for budget, train in budgets])
    store, cache = tmp_path / "store", dataset.path.parent
    slow = slow_down(store)
    first = submit_in_a_process(runs, store, cache, tmp_path / "said-a")
    wait_for(lambda: bool(list((store / runs[0].run_id).glob("attempt-*"))))
    controller = read_json(store / runs[0].run_id / "job.json")["job_id"]
    (trunk,) = map(int, Path(f"/proc/{controller}/task/{controller}/children").read_text().split())
    os.kill(trunk, signal.SIGSTOP)
    second = submit_in_a_process(runs, store, cache, tmp_path / "said-b")
    wait_for(lambda: "2 runs submitted; 1 running already" in (tmp_path / "said-b").read_text())
    time.sleep(2.0)
    slow.unlink()
    os.kill(trunk, signal.SIGCONT)
    assert [launcher.wait(PATIENCE) for launcher in (first, second)] == [0, 0]
    found = states.read(store, [run.run_id for run in runs])
    assert {(state.state, state.attempts) for state in found} == {("complete", 1)}


def test_a_run_is_counted_from_its_first_look_on(
    tiny_run: RunConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow the disk is on which its launcher notes it."""
    write_job = jobs.write_job

    def write_late(*arguments: Any) -> None:
        wait_for(lambda: bool(list((tmp_path / "store" / tiny_run.run_id).glob("attempt-*.json"))))
        write_job(*arguments)

    monkeypatch.setattr(jobs, "write_job", write_late)
    outcome = launch.submit([tiny_run], CPU, tmp_path / "store", cache=dataset.path.parent)
    assert outcome.unsuccessful == []
    (attempt,) = read_json(tmp_path / "store" / tiny_run.run_id / "run.json")["attempts_made"]
    assert attempt["sharing"] == 1


def test_a_run_that_was_alone_part_of_the_time_is_marked(
    start: Start, tiny_run: RunConfig, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another submit's run comes and goes while it trains."""
    monkeypatch.setattr("experiments.training.folder.CHECK_SECONDS", 0.0)
    evaluate, come = Trainer.evaluate, list[subprocess.Popen[bytes]]()

    def joined_meanwhile(self: Trainer, interrupted: Callable[[], bool]) -> object:
        if self.steps_done == 8:
            come.append(start(Share((), 2 * len(CORES), CORES)))
        if self.steps_done == 24:
            come[0].kill()
            come[0].wait()
        return evaluate(self, interrupted)

    monkeypatch.setattr(Trainer, "evaluate", joined_meanwhile)
    alone, shared = tiny_run, replace(tiny_run, seed=9)
    debug = Profile("debug", default=Job(device="cpu"))
    launch.submit([shared], debug, tmp_path / "store", cache=dataset.path.parent)
    run = read_json(tmp_path / "store" / shared.run_id / "run.json")
    assert (run["sharing"], run["clock"]) == (3, "mixed")
    monkeypatch.undo()
    launch.submit([alone], debug, tmp_path / "store", cache=dataset.path.parent)
    run = read_json(tmp_path / "store" / alone.run_id / "run.json")
    assert (run["sharing"], run["clock"]) == (1, "alone")


def test_a_number_that_is_not_known_for_a_moment_makes_the_clock_unknown() -> None:
    attempt = {"step": 1, "device": "cpu", "sharing": None, "sharing_changed": True}
    assert summarize([attempt])["clock"] == "unknown"
    assert summarize([attempt | {"sharing": 2}])["clock"] == "mixed"
    assert summarize([attempt | {"sharing": 2, "sharing_changed": False}])["clock"] == "shared"
