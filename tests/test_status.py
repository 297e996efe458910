"""What `status` tells of runs: causes, columns that fit, summaries of long lists, and the attempts at one run."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.cli.main import main
from experiments.design.config import RunConfig
from experiments.design.schedules import WarmupStableDecay
from experiments.design.trunks import with_trunks
from experiments.launching import attempts, causes, jobs, overview, slurm, states
from experiments.launching.slurm import Ended, Queued
from experiments.launching.states import RunState

SUBMITIT = """\
submitit INFO (2026-11-27 22:21:01,071) - Starting with JobEnvironment(job_id=15_0, hostname=vm, global_rank=0(1))
submitit INFO (2026-11-27 22:21:01,071) - Loading pickle: /store/.jobs/x/15_0_submitted.pkl
"""
TRACEBACK = """\
Traceback (most recent call last):
  File "/store/.code/1/experiments/training/run.py", line 63, in __call__
    finished = attempt.execute()
               ^^^^^^^^^^^^^^^^^
ValueError: /data holds data 0123; the run was submitted with 4567

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/x/submitit/core/submission.py", line 55, in process_job
    result = delayed.result()
experiments.training.run.RunFailed: a-run: step 1: ValueError: /data holds data 0123
submitit ERROR (2026-11-27 22:21:01,071) - Submitted job triggered an exception
srun: error: node1: task 0: Exited with exit code 1
"""
PREEMPTED = "slurmstepd: error: *** JOB 12 ON node1 CANCELLED AT 2026-11-27T22:21:52 DUE TO PREEMPTION ***\n"


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (SUBMITIT, None),
        (SUBMITIT + TRACEBACK, "ValueError: /data holds data 0123; the run was submitted with 4567"),
        (SUBMITIT + "step 8/25  held-out loss 5.1\nsrun: error: n2: task 1: Killed\n", "process 1 on n2: Killed"),
        ("srun: error: n2: task 1: Segmentation fault (core dumped)\n" + TRACEBACK, "process 1 on n2: Segm"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=9.0.\n" + TRACEBACK, "out of memory; raise memory_gb"),
        (SUBMITIT + "step 8/25  held-out loss 5.1\n", None),
        ("/spool/job00019/slurm_script: line 17: module: command not found\n", "the job's script, line 17: module: c"),
        (SUBMITIT + "Segmentation fault\n", "Segmentation fault"),
        # a start that was preempted is not why the next one failed
        (SUBMITIT + "step 8/25  held-out loss 5.1\n" + PREEMPTED + "bash: python: not found\n", "bash: python: not"),
        (SUBMITIT + TRACEBACK + SUBMITIT + "attempt 2, from step 9\n" + PREEMPTED, "ended on node1 due to preemption"),
    ],
)
def test_the_cause_is_found_in_what_a_job_printed(log: str, cause: str | None) -> None:
    found = causes.cause_in(log.splitlines())
    assert found is None if cause is None else str(found).startswith(cause), found


@pytest.mark.parametrize(
    ("ended", "cause"),
    [
        (Ended("FAILED", "1:0"), "Slurm says FAILED: ValueError: such is life"),
        (Ended("OUT_OF_MEMORY", "0:125"), "Slurm says OUT_OF_MEMORY: raise memory_gb in the profile"),
        (Ended("NODE_FAIL", "0:0", "n[1-2]"), "Slurm says NODE_FAIL on n[1-2]"),
        (Ended("CANCELLED by 0", "0:15"), "Slurm says CANCELLED by root"),
        (Ended("TIMEOUT", "0:0"), "Slurm says TIMEOUT"),
        (Ended("RUNNING", "0:0"), "it left the queue without a result: ValueError: such is life"),
        (None, "it left the queue without a result: ValueError: such is life"),
    ],
)
def test_slurms_word_on_the_end_of_a_job_is_joined_to_the_cause(
    ended: Ended | None, cause: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    log.write_text("Traceback (most recent call last):\n  File\nValueError: such is life\n")
    assert causes.cause_of(ended, log) == cause


@pytest.mark.parametrize(
    ("code", "words"),
    [("0:9", "ended by SIGKILL"), ("134:0", "ended by SIGABRT"), ("3:0", "it exited with code 3"), ("0:0", None)],
)
def test_exit_codes_in_words(code: str, words: str | None) -> None:
    assert causes.exited(code) == words


def attempt(first_step: int, step: int | None, start: float, end: float, **more: Any) -> dict[str, Any]:
    seconds = {"queue": 60.0, "startup": 5.0, "compile": 0.0, "train": 0.8 * (end - start), "eval": 0.0}
    logged = {"step": step, "tokens": None if step is None else 128 * step, "loss": 3.5}
    about = {"gpus": 2, "device": "H100", "job_id": "7_1", "hosts": ["n1"], "seconds": {**seconds, "checkpoint": 0.0}}
    return {**about, **logged, "first_step": first_step, "started_at": start, "updated_at": end, **more}


def write_attempts(run_dir: Path, *made: dict[str, Any]) -> None:
    for number, one in enumerate(made, 1):
        (run_dir / f"attempt-{number:04d}.json").write_text(json.dumps(one | {"attempt": number}))


@pytest.fixture
def in_slurm(
    tiny_run: RunConfig, submitted: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Queued | None, list[Ended]], Path]:
    """A submitted run, of which squeue and sacct say what is given here."""

    def say(queued: Queued | None, ended: list[Ended]) -> Path:
        monkeypatch.setattr(slurm, "queue", lambda *_: {} if queued is None else {"7_1": queued})
        monkeypatch.setattr(slurm, "accounting", lambda *_: {"7_1": ended} if ended else {})
        run_dir = submitted(tiny_run, tmp_path)
        jobs.write_job(run_dir, "slurm", "7_1", tmp_path / "log", tmp_path / "code")
        return run_dir

    return say


def state_of(run_dir: Path) -> RunState:
    return states.read(run_dir.parent, [run_dir.name])[0]


@pytest.mark.parametrize(
    ("queued", "state"),
    [
        (Queued("PENDING", "Priority", 2e9), "queued"),
        (Queued("PENDING", "JobHeldUser"), "held"),
        (Queued("REQUEUE_HOLD"), "held"),
        (Queued("SUSPENDED", None, 1e9, "n1"), "suspended"),
        (Queued("COMPLETING", None, 1e9, "n1"), "running"),
    ],
)
def test_slurms_states(in_slurm: Callable[..., Path], queued: Queued, state: str) -> None:
    found = state_of(in_slurm(queued, []))
    assert found.state == state
    assert found.state in states.ACTIVE
    waits = state in ("queued", "held")
    assert (found.reason, found.expected_start) == ((queued.reason, queued.start) if waits else (None, None))
    assert found.nodes == (None if waits else "n1")
    assert ("scontrol release" in str(found.cause)) == (state == "held")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> float:
    """The time, which stands still."""
    stopped = time.time()
    monkeypatch.setattr(time, "time", lambda: stopped)
    return stopped


def test_a_job_that_logs_nothing_from_its_start_on_is_said_to_be_silent(
    in_slurm: Callable[..., Path], now: float
) -> None:
    """Its earlier attempt logged long ago, which says nothing of this one."""
    run_dir = in_slurm(Queued("RUNNING", None, now - 60, "n1"), [])
    write_attempts(run_dir, attempt(1, 10, now - 9000, now - 8000))
    assert state_of(run_dir).cause is None
    run_dir = in_slurm(Queued("RUNNING", None, now - 600, "n1"), [])
    assert str(state_of(run_dir).cause).startswith("no step yet, and nothing else logged, for 10m00s")


def test_what_starting_again_cost(in_slurm: Callable[..., Path], now: float) -> None:
    """Steps 8 to 10 are done again. Each attempt counts its start-up, the running one up to now."""
    run_dir = in_slurm(Queued("RUNNING", None, now - 600, "n1"), [])
    write_attempts(run_dir, attempt(1, 10, now - 9000, now - 8000), attempt(8, 12, now - 500, now - 10))
    found = state_of(run_dir)
    assert (found.redone_steps, found.between_seconds) == (3, 60.0)
    assert found.redone_seconds == pytest.approx(3 * 800 / 10)
    assert found.gpu_hours == pytest.approx(2 * (1000 + 5 + 500 + 5) / 3600)


def test_the_attempts_at_a_run(in_slurm: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Of one start, Slurm alone knows: it was preempted before it logged anything."""
    starts = [
        Ended("PREEMPTED", "0:0", "n1", 990.0, 2010.0),
        Ended("PREEMPTED", "0:0", "n2", 2100.0, 2110.0),
        Ended("FAILED", "0:9", "n3", 2990.0, 3500.0),
    ]
    run_dir = in_slurm(None, starts)
    write_attempts(run_dir, attempt(1, 10, 1000.0, 2000.0), attempt(8, 12, 3000.0, 3400.0, hosts=["n3"]))
    made = attempts.history(run_dir, "lost", "7_1")
    assert [(one.number, one.nodes, one.redone_steps) for one in made] == [(1, "n1", 3), (None, "n2", 0), (2, "n3", 0)]
    assert [one.how_ended for one in made] == ["PREEMPTED", "PREEMPTED", "FAILED, ended by SIGKILL"]
    assert [one.ended_at for one in made] == [2010.0, 2110.0, 3500.0]
    assert main(["status", str(run_dir)]) == 0
    text = " ".join(capsys.readouterr().out.split())  # of lines that are as long as the terminal is wide
    assert "Slurm says FAILED: ended by SIGKILL" in text
    assert "3 steps done again (4m00s), 1m00s between attempts" in text
    assert str(run_dir.parent / "log") in text
    assert main(["status", str(run_dir), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["number"] for one in found["attempts_made"]] == [1, None, 2]
    assert found["state"] == "lost"


def test_a_place_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path / "xyz")]) == 2
    said = f"dynconv status: {tmp_path}/xyz is not there; give a sweep file, a store, or the folder of a run\n"
    assert capsys.readouterr().err == said


def test_folders_that_are_no_store_say_what_they_are(
    tiny_run: RunConfig, submitted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    submitted(tiny_run, tmp_path / "stores" / "mine")
    assert main(["status", str(tmp_path / "stores")]) == 2
    said = "is no store, but holds some (mine); give one of them"
    assert said in capsys.readouterr().err
    assert main(["table", str(tmp_path / "stores")]) == 2
    assert said in capsys.readouterr().err
    assert main(["freeze", str(tmp_path / "stores" / "mine"), "-o", str(tmp_path / "frozen")]) == 0
    assert main(["status", str(tmp_path / "frozen")]) == 2
    assert "is a frozen store, whose runs have no jobs; `dynconv table`" in capsys.readouterr().err


def test_without_accounting_the_steps_say_how_an_attempt_ended(in_slurm: Callable[..., Path]) -> None:
    run_dir = in_slurm(None, [])
    made = [attempt(1, 10, 1000.0, 2000.0), attempt(11, 12, 3000.0, 3400.0), attempt(9, None, 4000.0, 4100.0)]
    write_attempts(run_dir, *made)
    (run_dir / "failure.json").write_text(json.dumps({"attempt": 3, "step": 9, "cause": "such is life", "time": 0.0}))
    ends = [one.how_ended for one in attempts.history(run_dir, "failed", "7_1")]
    assert ends == ["stopped, its state saved", "stopped", "failed: such is life"]
    stopped = attempts.history(run_dir, "stopped", None)
    assert stopped[-1].how_ended == "stopped, its state saved"


def test_what_a_branch_has_left_to_do(tiny_run: RunConfig, submitted: Callable[..., Path], tmp_path: Path) -> None:
    """Its own FLOPs are a part of the run's; the tokens in its log are those of its trunk, too."""
    train = replace(tiny_run.train, schedule=WarmupStableDecay(0.25))
    runs = [replace(tiny_run, budget=f"{n}", train=replace(train, tokens=16 * 8 * n)) for n in (40, 60)]
    branch = next(run for run in with_trunks(runs) if run.trunk is not None and run.budget == "60")
    run_dir = submitted(branch, tmp_path)
    whole, own = float(branch.counts.flops_exact), float(branch.own_flops)
    assert own < 0.5 * whole
    assert (state_of(run_dir).flops, state_of(run_dir).flops_left) == pytest.approx((own, own))
    write_attempts(run_dir, attempt(branch.branch_step + 1, None, 0.0, 1.0))
    assert state_of(run_dir).flops_left == pytest.approx(own)
    write_attempts(run_dir, attempt(branch.branch_step + 1, 54, 0.0, 1.0))
    assert state_of(run_dir).flops_left == pytest.approx(0.1 * whole)


def list_of(count: int, **changes: Any) -> list[RunState]:
    busy = {"reason": "Resources", "expected_start": 2e9, "nodes": "node[001-004]", "log": "x", "job_id": "123456_12"}
    hours = {"gpu_hours": 12.5, "forecast_gpu_hours": 20.0, "last_logged": time.time() - 20, "elapsed": 7e3, "eta": 1e4}
    return [
        RunState(f"lowrank-qkv-110k-s{n}-0123456789", "running", 0.3, 3.1, 2, **{**busy, **hours, **changes})
        for n in range(count)
    ]


def test_a_table_fits_the_terminal() -> None:
    cause = "a cause that is much longer than the terminal is wide, so that it has to be broken somewhere, and is"
    runs = list_of(3, cause=cause)
    for width in (80, 160):
        lines = overview.render(runs, width).splitlines()
        assert max(map(len, lines)) <= width
        assert lines[0].split()[:3] == ["run", "state", "done"]
    wide, narrow = (overview.render(runs, width).splitlines()[0] for width in (160, 80))
    assert "waits for" in narrow
    assert len(wide.split()) > len(narrow.split())
    assert {"device time", "forecast", "node", "job"} <= {c.heading for c in overview.COLUMNS}
    assert all(column.heading in overview.render(runs, 10_000) for column in overview.COLUMNS)


def test_a_long_list_is_summed_up_by_arm_and_size() -> None:
    runs = [replace(run, arm="a", size="25k") for run in list_of(50)]
    runs += [
        RunState(f"b-{n}", "failed", arm="b", size="45k", cause=f"NonFiniteLoss: loss is nan (step {n})")
        for n in range(9)
    ]
    text = overview.render(runs, 80)
    assert [line.split() for line in text.splitlines()[1:3]] == [
        ["a", "25k", "50", "50", "30%"],
        ["b", "45k", "9", "9", "0%"],
    ]
    said = "9 failed (b-0, b-1, b-2 and 6 more): NonFiniteLoss: loss is nan (step 0) (others alike)"
    assert said in " ".join(text.split())
    assert "59 runs: 50 running, 9 failed" in text
    assert max(map(len, text.splitlines())) <= 80
    assert overview.render(runs, 80, every=True).count("lowrank-qkv-110k-s") == 50


def test_the_time_until_all_runs_have_ended() -> None:
    """Two at once. Runs of a size take a second for each of its FLOPs, those of the other two."""
    done = [RunState("a", "complete", 1.0, elapsed=10.0, size="s", flops=10.0)]
    done += [RunState("b", "complete", 1.0, elapsed=40.0, size="l", flops=20.0)]
    running = [RunState(f"r{n}", "running", 0.5, eta=5.0, size="s", flops=10.0, flops_left=5.0) for n in range(2)]
    queued = [RunState("q", "queued", size="s", flops_left=10.0), RunState("p", "pending", size="l", flops_left=20.0)]
    assert overview.seconds_to_go([*done, *running, *queued]) == max(40.0, (5 + 5 + 10 + 40) / 2)
    assert overview.seconds_to_go([*done, *running]) == 5.0
    assert overview.seconds_to_go([*done, *queued]) is None  # nothing runs
    assert overview.seconds_to_go(done) is None
    assert overview.seconds_to_go([RunState("x", "running"), *queued]) is None  # no speed is known
    text = overview.render([*done, *running, *queued], 80)
    assert "about 0m40s to go with 2 running at once" in text


def test_filters(
    tiny_run: RunConfig, submitted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = replace(tiny_run, arm="other", seed=9)
    for run in (tiny_run, other):
        submitted(run, tmp_path)
    (tmp_path / other.run_id / "cancelled").touch()

    def shown(*options: str) -> list[str]:
        assert main(["status", str(tmp_path), "--json", *options]) == 0
        return [row["arm"] for row in json.loads(capsys.readouterr().out)]

    assert shown() == ["lowrank-qkv", "other"]
    assert shown("--state", "pending,failed") == ["lowrank-qkv"]
    assert shown("--arm", "other", "--arm", "lowrank-qkv", "--state", "cancelled") == ["other"]
    assert shown("--size", "tiny", "--state", "failed") == []
    assert main(["status", str(tmp_path), "--state", "runing"]) == 2
    assert "--state: got 'runing'; did you mean 'running'?" in capsys.readouterr().err
    assert main(["status", str(tmp_path), "--arm", "othr"]) == 2
    assert "did you mean 'other'?" in capsys.readouterr().err
    assert main(["status", str(tmp_path), "--store", str(tmp_path)]) == 2
    assert "both name a store" in capsys.readouterr().err
    (tmp_path / tiny_run.run_id / "run.json").write_text('{"torn')  # of which arm it is is not known then
    assert shown("--arm", "other", "--size", "tiny") == [None, "other"]
    assert main(["status", str(tmp_path), "--arm", "thr"]) == 2
    assert "None" not in capsys.readouterr().err


def test_the_loss_of_a_training_step_is_called_so() -> None:
    """Of one step of a stopped run it was 3.48 in the column where the same run, complete, had 4.25 held out."""
    stopped = RunState("a", "stopped", 0.71, 3.4827)
    done = RunState("b", "complete", 1.0, 4.25)
    assert [line.split()[3:] for line in overview.render([stopped, done], 80).splitlines()[1:3]] == [
        ["train", "3.4827"],
        ["4.2500"],
    ]
    assert "71%, loss train 3.4827" in overview.render_run(stopped, [], 80)
