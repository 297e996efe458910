"""A real one-node Slurm: brought up, swept through, preempted, requeued, cancelled, and taken down again."""

import errno
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from clusters import ON_THE_CLUSTER, PROFILE, SCRIPTS, ask, call, cluster, hasten, log_of, losses, submit, wait_until
from launches import Submit, slow_down, state_of
from texts import CHEAP_SWEEP

from analysis.logs.files import read_json
from analysis.logs.reader import read_rows
from experiments.cli.main import main
from experiments.data.dataset import Dataset
from experiments.design.config import RunConfig
from experiments.launching import jobs, sbatch, slurm, states
from experiments.launching import submit as launch
from experiments.launching.cancel import cancel
from experiments.launching.profile import Job, Slurm
from experiments.training.presence import process_started
from experiments.training.run import Run

__all__ = ["cluster", "submit"]  # fixtures
pytestmark = ON_THE_CLUSTER

DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd")


def pids(cluster: dict[str, str]) -> dict[str, int]:
    """Process ids of the daemons."""
    return {name: int((Path(cluster["DYNCONV_SLURM_STATE"]) / "run" / f"{name}.pid").read_text()) for name in DAEMONS}


def test_nothing_listens_beyond_loopback(cluster: dict[str, str]) -> None:
    """Also not srun, while a job step runs."""
    ask("sbatch", "--ntasks=2", "--output=/dev/null", "--wrap=srun sleep 300")
    daemons = set(pids(cluster).values())

    def listening() -> list[tuple[str, str, int]]:
        lines = [line.split() for line in ask("ss", "-ltnpH").splitlines()]
        named = [(line[3], re.search(r'"([^"]+)",pid=(\d+)', line[-1])) for line in lines]
        return [(address, found[1], int(found[2])) for address, found in named if found]

    wait_until(lambda: "srun" in {name for _, name, _ in listening()})
    ours = [(address, name) for address, name, pid in listening() if pid in daemons or name == "srun"]
    assert {name for _, name in ours} == {"slurmdbd", "slurmctld", "slurmd", "srun"}
    assert all(address.startswith("127.") for address, _ in ours), ours
    ask("scancel", "--me")


def test_up_and_down_can_be_called_again_and_mend(cluster: dict[str, str]) -> None:
    before = pids(cluster)
    assert call("up", cluster).returncode == 0
    assert pids(cluster) == before
    os.kill(before["slurmd"], 9)
    wait_until(lambda: process_started(str(before["slurmd"])) is None)
    again = call("up", cluster)
    assert again.returncode == 0
    assert "up: slurmd\n" in again.stderr
    assert ask("sinfo", "--noheader", "--format=%R").split() == ["low", "high"]


@pytest.mark.parametrize(("script", "arguments"), [("up", []), ("down", ["--purge"])])
def test_a_configuration_of_somebody_else_is_left_alone(script: str, arguments: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        theirs = Path(folder) / "slurm.conf"
        theirs.write_text("ClusterName=theirs\n")
        done = call(script, {"DYNCONV_SLURM_STATE": folder}, *arguments)
        assert done.returncode == 2
        assert "was not written by slurm/cluster/up and stays as it is" in done.stderr.splitlines()[-1]
        assert list(Path(folder).iterdir()) == [theirs]
        assert theirs.read_text() == "ClusterName=theirs\n"


def test_a_sweep_runs_to_its_end_and_is_not_submitted_twice(
    runs: list[RunConfig],
    submit: Submit,
    submitted: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In an array of two and a job by itself, as a MaxArraySize of two would have it."""
    monkeypatch.setattr(slurm, "max_array_size", lambda: 2)
    store = tmp_path / "store"
    first = submit(runs, store)
    assert (len(first.submitted), first.ended) == (3, [])
    ids = [str(state.job_id) for state in states.read(store, first.submitted)]
    array = ids[0].split("_")[0]
    assert ids == [f"{array}_0", f"{array}_1", str(int(ids[2]))]
    again = submit(runs, store)
    assert again.submitted == []
    assert set(again.skipped) <= {"queued", "running", "complete"}
    wait_until(lambda: {state_of(store, run).state for run in runs} == {"complete"})
    assert submit(runs, store).skipped == {"complete": first.submitted}
    reference = submitted(runs[0], tmp_path / "reference")
    Run(reference)()
    assert losses(store / runs[0].run_id) == losses(reference)


def test_a_preempted_run_is_requeued_and_loses_no_step(
    long_run: RunConfig, submit: Submit, submitted: Callable[..., Path], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    slow = slow_down(store, after=100)
    submit([long_run], store)
    wait_until(lambda: "step 100/" in log_of(store, long_run))
    ask("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    wait_until(lambda: state_of(store, long_run).state == "requeued")
    slow.unlink()
    requeued = state_of(store, long_run)
    assert 0.0 < requeued.progress < 1.0
    assert submit([long_run], store).skipped == {"requeued": [long_run.run_id]}
    hasten(str(requeued.job_id))
    wait_until(lambda: state_of(store, long_run).state == "complete")
    run_dir = store / long_run.run_id
    rows = read_rows(run_dir, "steps").table
    assert rows["step"].to_pylist() == list(range(1, long_run.train.steps + 1))
    assert set(rows["attempt"].to_pylist()) == {1, 2}
    run = read_json(run_dir / "run.json")
    assert (run["attempts"], run["seconds"]["lost"]) == (2, 0.0)
    first, second = states.history(store, state_of(store, long_run))
    assert (first.job_id, first.nodes, first.redone_steps) == (requeued.job_id, "node1", 0)
    assert (first.how_ended in ("PREEMPTED", "REQUEUED"), second.how_ended) == (True, "complete")
    assert second.first_step == int(str(first.last_step)) + 1
    reference = submitted(long_run, tmp_path / "reference")
    Run(reference)()
    assert losses(run_dir) == losses(reference)


def test_a_preempted_run_of_two_tasks_goes_on_where_all_of_them_stopped(
    tiny_run: RunConfig, submit: Submit, tmp_path: Path
) -> None:
    """Every task gets the signal and writes its part of the checkpoint."""
    run = replace(tiny_run, train=replace(tiny_run.train, tokens=16 * 8 * 400, evaluate_every=16 * 8 * 100))
    sharded = replace(PROFILE, default=Job(device="cpu", hours=0.5, gpus=2, parallel="fsdp"))
    slow = slow_down(tmp_path, after=100)
    submit([run], tmp_path, sharded)
    wait_until(lambda: "step 100/" in log_of(tmp_path, run))
    ask("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    wait_until(lambda: state_of(tmp_path, run).state == "requeued")
    slow.unlink()
    (checkpoint,) = (tmp_path / run.run_id / "checkpoint").iterdir()
    assert read_json(checkpoint / "manifest.json")["processes"] == 2
    hasten(str(state_of(tmp_path, run).job_id))
    wait_until(lambda: state_of(tmp_path, run).state == "complete")
    result = read_json(tmp_path / run.run_id / "run.json")
    assert (result["gpus"], result["attempts"], result["steps"], result["seconds"]["lost"]) == (2, 2, 400, 0.0)


def test_cancelled_runs_leave_the_queue_for_good(
    long_run: RunConfig, submit: Submit, dataset: Dataset, tmp_path: Path
) -> None:
    """One running, one pending. To the first, scancel looks like a preemption."""
    both = [long_run, replace(long_run, seed=9)]
    slow = slow_down(tmp_path, after=100)
    submit(both, tmp_path, replace(PROFILE, max_parallel=1))
    wait_until(lambda: "step 100/" in log_of(tmp_path, long_run))
    assert state_of(tmp_path, both[1]).state == "queued"
    assert cancel(tmp_path, [run.run_id for run in both]) == [run.run_id for run in both]
    wait_until(lambda: states.busy(tmp_path, [run.run_id for run in both]) == {})
    time.sleep(3)  # a requeue would show by now: the scheduler looks every second
    assert states.busy(tmp_path, [run.run_id for run in both]) == {}
    assert {state_of(tmp_path, run).state for run in both} == {"cancelled"}
    assert submit(both, tmp_path).skipped == {"cancelled": [run.run_id for run in both]}
    slow.unlink()
    again = launch.retry([long_run], PROFILE, tmp_path, cache=dataset.path.parent)
    assert again.submitted == [long_run.run_id]
    wait_until(lambda: state_of(tmp_path, long_run).state == "complete")
    assert read_json(tmp_path / long_run.run_id / "run.json")["attempts"] == 2


def test_a_run_that_slurm_cancelled_while_pending_is_not_submitted_again(
    runs: list[RunConfig], submit: Submit, tmp_path: Path
) -> None:
    """Somebody's plain scancel, seen through the accounting."""
    submit(runs, tmp_path, replace(PROFILE, slurm=Slurm("low", options={"hold": ""})))
    assert {state_of(tmp_path, run).state for run in runs} == {"held"}
    ask("scancel", str(state_of(tmp_path, runs[0]).job_id).split("_")[0])
    wait_until(lambda: {state_of(tmp_path, run).state for run in runs} == {"cancelled"})
    assert str(state_of(tmp_path, runs[0]).cause).startswith("Slurm says CANCELLED by")
    assert submit(runs, tmp_path).submitted == []


def test_ctrl_c_while_waiting_leaves_the_jobs_alone(
    runs: list[RunConfig],
    submit: Submit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def press(*_: object) -> None:
        raise KeyboardInterrupt

    held = replace(PROFILE, slurm=Slurm("low", signal_seconds=30, options={"hold": ""}))
    with monkeypatch.context() as patch:
        patch.setattr(launch, "POLL_SECONDS", 0.0)
        patch.setattr(launch.Progress, "update", press)
        with pytest.raises(KeyboardInterrupt):
            submit(runs, tmp_path, held, wait=True)
    told = capsys.readouterr().err
    assert told.index("3 runs submitted") < told.index("the jobs go on; `dynconv status --store")
    assert {state_of(tmp_path, run).state for run in runs} == {"held"}
    cancel(tmp_path, [run.run_id for run in runs])


def test_a_failed_and_a_killed_run_are_reported_with_their_causes(
    tiny_run: RunConfig, long_run: RunConfig, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging = replace(tiny_run, seed=99, train=replace(tiny_run.train, learning_rate=1e30))
    slow = slow_down(tmp_path, after=100)
    submit([diverging, long_run], tmp_path)
    wait_until(lambda: "step 100/" in log_of(tmp_path, long_run))
    ask("scancel", "--signal=ABRT", str(state_of(tmp_path, long_run).job_id))
    wait_until(lambda: {state_of(tmp_path, run).state for run in (diverging, long_run)} == {"failed", "lost"})
    assert str(state_of(tmp_path, diverging).cause).startswith("NonFiniteLoss: ")
    wait_until(lambda: "Slurm says FAILED: process 0 on node1: Aborted" in str(state_of(tmp_path, long_run).cause))
    slow.unlink()
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.5)
    again = submit([diverging, long_run], tmp_path, wait=True)
    assert (again.submitted, again.skipped) == ([long_run.run_id], {"failed": [diverging.run_id]})
    assert [(state.state, state.attempts) for state in again.ended] == [("complete", 2)]


def test_status_says_what_a_job_waits_for(long_run: RunConfig, submit: Submit, tmp_path: Path) -> None:
    """Held, released to wait for room, running, suspended."""
    blocker = ask("sbatch", "--parsable", "--exclusive", "--time=7", "--output=/dev/null", "--wrap=sleep 300")
    slow_down(tmp_path)
    submit([long_run], tmp_path, replace(PROFILE, slurm=Slurm("low", signal_seconds=30, options={"hold": ""})))
    held = state_of(tmp_path, long_run)
    assert (held.state, held.reason) == ("held", "JobHeldUser")
    assert "scontrol release" in str(held.cause)
    job = str(held.job_id)
    ask("scontrol", "release", job)
    wait_until(lambda: state_of(tmp_path, long_run).reason in ("Resources", "Priority"))
    wait_until(lambda: state_of(tmp_path, long_run).expected_start is not None)  # the backfill scheduler has looked
    queued = state_of(tmp_path, long_run)
    assert queued.state == "queued"
    assert float(str(queued.expected_start)) > time.time()
    ask("scancel", blocker.strip())
    wait_until(lambda: state_of(tmp_path, long_run).state == "running")
    assert state_of(tmp_path, long_run).nodes == "node1"
    ask("scontrol", "suspend", job)
    wait_until(lambda: state_of(tmp_path, long_run).state == "suspended")
    cancel(tmp_path, [long_run.run_id])


def test_refusals_leave_nothing_behind(tiny_run: RunConfig, submit: Submit, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(ValueError, match=r"no such partition: got 'hihg'; did you mean 'high'\? legal: high, low"):
        submit([tiny_run], store, replace(PROFILE, slurm=Slurm("hihg")))
    assert not store.exists()
    with pytest.raises(ValueError, match=r"sbatch refused: .*More processors requested than permitted"):
        submit([tiny_run], store, replace(PROFILE, default=Job(device="cpu", cpus_per_gpu=1000)))
    assert state_of(store, tiny_run).state == "pending"


def test_a_controller_that_does_not_answer(
    tiny_run: RunConfig, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused to submit; a run that was queued before is not taken for lost, or it would be started twice."""
    submit([tiny_run], tmp_path, replace(PROFILE, slurm=Slurm("low", options={"hold": ""})))
    text = Path(os.environ["SLURM_CONF"]).read_text()
    broken = tmp_path / "slurm.conf"
    broken.write_text(re.sub(r"SlurmctldPort=\d+", "SlurmctldPort=9", text) + "MessageTimeout=1\n")
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_CONF", str(broken))
        unknown = state_of(tmp_path, tiny_run)
        assert (unknown.state, unknown.cause) == ("unknown", "squeue does not answer")
        with pytest.raises(ValueError, match="controller does not answer"):
            submit([tiny_run], tmp_path)
    assert state_of(tmp_path, tiny_run).state == "held"
    cancel(tmp_path, [tiny_run.run_id])


def test_what_was_accepted_before_a_refusal_is_kept(
    runs: list[RunConfig], submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a limit on jobs is met between two arrays: the first stays queued, and is not submitted twice."""
    monkeypatch.setattr(slurm, "max_array_size", lambda: 2)
    held = replace(PROFILE, slurm=Slurm("low", signal_seconds=30, options={"hold": ""}))
    accept = sbatch.submit

    def submit_arrays_only(script: str, folder: Path, name: str) -> str:
        if "--array" not in script:
            raise ValueError("sbatch refused: enough")
        return accept(script, folder, name)

    with monkeypatch.context() as patch:
        patch.setattr(sbatch, "submit", submit_arrays_only)
        with pytest.raises(ValueError, match="refused: enough; 2 of 3 runs are queued: submit again for the rest"):
            submit(runs, tmp_path, held)
    assert [state_of(tmp_path, run).state for run in runs] == ["held", "held", "pending"]
    assert submit(runs, tmp_path, held).submitted == [runs[2].run_id]
    cancel(tmp_path, [run.run_id for run in runs])


def test_jobs_that_cannot_be_noted_are_not_submitted(
    runs: list[RunConfig], submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full: then nothing is submitted."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(jobs, "write_job", full)
    with pytest.raises(OSError, match="No space left"):
        submit(runs, tmp_path, replace(PROFILE, slurm=Slurm("low", signal_seconds=30, options={"hold": ""})))
    assert ask("squeue", "--noheader", "--states=PENDING", "--format=%j") == ""
    assert {state_of(tmp_path, run).state for run in runs} == {"pending"}


def test_the_shipped_profile_through_the_command_line(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYNCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.5)
    sweep, store = tmp_path / "cheap.toml", tmp_path / "store"
    sweep.write_text(CHEAP_SWEEP.format(source=text_folder))
    profile = SCRIPTS.parent / "profiles" / "one-node.toml"
    assert main(["submit", str(sweep), "--store", str(store), "--profile", str(profile), "--wait"]) == 0
    assert f"{store}: 1 runs submitted\n" in capsys.readouterr().err
    assert main(["status", str(sweep), "--store", str(store), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["state"], row["attempts"]) == ("complete", 1)
    assert row["job_id"].isdigit()


def test_variables_of_the_users_shell_change_nothing(
    long_run: RunConfig,
    submit: Submit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """squeue would hide the job, so that it seemed lost; sbatch would run a part of the array and never requeue it."""
    hostile = {
        "SQUEUE_STATES": "COMPLETED", "SQUEUE_FORMAT": "%j", "SQUEUE_USERS": "nobody", "SACCT_FORMAT": "JobName",
        "SBATCH_ARRAY_INX": "0", "SBATCH_NO_REQUEUE": "1", "SBATCH_PARTITION": "high", "SBATCH_TIMELIMIT": "1",
    }  # fmt: skip
    for name, value in hostile.items():
        monkeypatch.setenv(name, value)
    both = [long_run, replace(long_run, seed=9)]
    slow_down(tmp_path / "store")
    submit(both, tmp_path / "store")
    assert "SBATCH_ARRAY_INX, SBATCH_NO_REQUEUE" in capsys.readouterr().err
    found = states.read(tmp_path / "store", [run.run_id for run in both])
    assert {state.state for state in found} <= {"queued", "running"}
    job = json.loads((tmp_path / "store" / long_run.run_id / "job.json").read_text())["job_id"]
    for name in hostile:
        monkeypatch.delenv(name)
    said = ask("scontrol", "show", "job", job)
    assert "Partition=low" in said
    assert "Requeue=1" in said
    assert "TimeLimit=00:30:00" in said
    assert "WCKey=submitit" not in said
    cancel(tmp_path / "store", [run.run_id for run in both])


def test_a_colleagues_job_that_cannot_be_seen_is_not_lost(
    tiny_run: RunConfig, submitted: Callable[..., Path], submit: Submit, tmp_path: Path
) -> None:
    run_dir = submitted(tiny_run, tmp_path)
    jobs.write_job(run_dir, "slurm", "999999", None, tmp_path / "code")
    assert state_of(tmp_path, tiny_run).state == "lost"
    os.chown(run_dir / "job.json", 65534, -1)
    found = state_of(tmp_path, tiny_run)
    assert found.state == "unknown"
    assert "999999" in str(found.cause)
    assert submit([tiny_run], tmp_path).skipped == {"unknown": [tiny_run.run_id]}


def test_what_was_cancelled_while_its_job_goes_on_is_cancelled_again(
    long_run: RunConfig, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scancel that cancels and exits 1 must not take the marker back, and one that fails must not keep it."""
    store = tmp_path / "store"
    submit([long_run], store)
    (store / long_run.run_id / "cancelled").touch()  # as an interrupted cancel leaves it
    assert cancel(store, [long_run.run_id]) == [long_run.run_id]
    wait_until(lambda: not states.busy(store, [long_run.run_id]))
    assert state_of(store, long_run).state == "cancelled"

    launch.retry(
        [long_run], PROFILE, store, cache=Path(read_json(store / long_run.run_id / "config.json")["data_dir"]).parent
    )
    real = subprocess.run

    def cancels_and_fails(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        done = real(command, **options)  # type: ignore[call-overload]
        if command[0] == "scancel":
            wait_until(lambda: long_run.run_id not in states.busy(store, [long_run.run_id]))
            done.returncode = 1
        return done

    monkeypatch.setattr(slurm.subprocess, "run", cancels_and_fails)
    assert cancel(store, [long_run.run_id]) == [long_run.run_id]
    assert state_of(store, long_run).state == "cancelled"


def test_options_of_sbatch_that_are_the_launchers_own_are_refused(
    tiny_run: RunConfig, submit: Submit, tmp_path: Path
) -> None:
    profile = replace(PROFILE, slurm=Slurm("low", signal_seconds=30, options={"array": "0-1"}))
    with pytest.raises(ValueError, match="must leave to the launcher what it sets itself; got array"):
        submit([tiny_run], tmp_path / "store", profile)
    assert not (tmp_path / "store").exists()


def test_a_cluster_without_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm, "_ask", lambda *command: "MaxArraySize = 0\n" if command[0] == "scontrol" else None)
    assert slurm.max_array_size() == 1


def test_a_notice_of_the_site_among_the_jobs_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "*** maintenance | see the wiki ***\n7_1|RUNNING|None|2026-01-02T03:04:05|n[1-2]\n8|PENDING|Priority|N/A|\n"
    monkeypatch.setattr(slurm, "_ask", lambda *_: said)
    started = time.mktime((2026, 1, 2, 3, 4, 5, 0, 0, -1))
    found = {"7_1": slurm.Queued("RUNNING", None, started, "n[1-2]"), "8": slurm.Queued("PENDING", "Priority")}
    assert slurm.queue(["7_1", "8", "9"], [0]) == found
