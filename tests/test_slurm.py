"""A real one-node Slurm: brought up, swept through, preempted, requeued, cancelled, and taken down again."""

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import launches
import pytest
from launches import Submit, state_of
from texts import CHEAP_SWEEP

from analysis.errors import WorkFailed
from analysis.logs.files import read_json
from analysis.logs.reader import read_rows
from experiments.cli.main import main
from experiments.data.build import build
from experiments.data.dataset import Dataset
from experiments.design.config import RunConfig
from experiments.design.data import DataConfig
from experiments.design.schedules import WarmupStableDecay
from experiments.design.trunks import with_trunks
from experiments.launching import data_jobs, jobs, sbatch, slurm, states
from experiments.launching import submit as launch
from experiments.launching.profile import DataJobs, Job, Profile, Slurm
from experiments.training.run import Run

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.xdist_group("slurm"),  # one worker, one cluster
]

SCRIPTS = Path(__file__).parent.parent / "slurm" / "cluster"
PROFILE = Profile("slurm", slurm=Slurm("low", signal_seconds=30), default=Job(device="cpu", hours=0.5))
DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd")


def call(script: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPTS / script, *arguments], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A cluster of these tests' own; the variables that name it. Somebody else's on this machine is left alone."""
    with cluster_of(1) as environment:
        yield environment


@contextlib.contextmanager
def cluster_of(nodes: int) -> Iterator[dict[str, str]]:
    """A cluster of one node or two, on ports of its own; the variables that name it. SLURM_CONF is set meanwhile."""
    if shutil.which("sbatch") is None:
        pytest.skip("Slurm is not installed; slurm/cluster/install installs it")
    # Not pytest's folder: only its owner may enter that, and MUNGE wants a socket that everybody can reach.
    state = Path(tempfile.mkdtemp(prefix="dynconv-test-", dir="/var/tmp"))
    environment = {"DYNCONV_SLURM_STATE": str(state), "DYNCONV_SLURM_NODES": str(nodes)}
    environment["DYNCONV_SLURM_PORT"] = str(three_free_ports() + (1000 if nodes > 1 else 0))
    up = call("up", environment)
    try:
        if up.returncode == 2:
            pytest.skip(f"this machine cannot have a Slurm: {up.stderr.splitlines()[-1]}")
        assert up.returncode == 0, up.stderr
        assert up.stdout == f"export SLURM_CONF={state}/slurm.conf\n"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SLURM_CONF", f"{state}/slurm.conf")
            yield environment
    finally:
        down = call("down", environment, "--purge")
    assert down.returncode == 0, down.stderr
    assert not state.exists()


def three_free_ports() -> int:
    for first in range(20_000 + os.getpid() % 3_000 * 3, 30_000, 3):
        with socket.socket() as a, socket.socket() as b, socket.socket() as c:
            try:
                for offset, s in enumerate((a, b, c)):
                    s.bind(("127.0.0.1", first + offset))
            except OSError:
                continue
            return first
    raise AssertionError("no three free ports in a row")


@pytest.fixture
def submit(dataset: Dataset) -> Submit:
    def submit(runs: list[RunConfig], store: Path, profile: Profile = PROFILE, **options: bool) -> launch.Outcome:
        return launch.submit(runs, profile, store, cache=dataset.path.parent, **options)

    return submit


def test_data_is_built_by_arrays_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed while it reads, which ends all jobs, and again while it tokenizes; then the bytes of a build at once."""
    monkeypatch.setattr(data_jobs, "POLL_SECONDS", 0.5)
    (tmp_path / "text").mkdir()
    base = "".join(f"line {number * number} of the text\n" for number in range(5000))
    for part in range(2):  # of more than 64 MiB each: a part, that is a piece of work
        with (tmp_path / "text" / f"{part}.jsonl").open("w") as file:
            for number in range(3500):
                start = (part * 3500 + number) * 11 % 100_000
                file.write(json.dumps({"text": f"{part} {number}\n{base[start : start + 20_000]}"}) + "\n")
    spec = DataConfig(source=str(tmp_path / "text"), vocabulary=300, train_tokens=4_000_000, validation_tokens=10_000)
    profile = replace(PROFILE, data=DataJobs(cores=2, hours=0.5))
    cache = tmp_path / "cache"

    def kill(step: str, after: float) -> None:
        """One of the array's two jobs, some seconds after it began."""
        assert data_jobs.build(spec, profile, cache) is None
        (submitted,) = [
            job for job in json.loads(next(cache.glob(".*/jobs.json")).read_text())["jobs"] if job["step"] == step
        ]
        element = f"{submitted['id']}_1"
        wait_until(lambda: "RUNNING" in ask("squeue", "--noheader", f"--jobs={element}", "--format=%T"))
        time.sleep(after)
        ask("scancel", "--signal=KILL", "--full", element)
        with pytest.raises(ValueError, match=r"the data are being built by Slurm \(\d of 2 parts read"):
            data_jobs.require_nothing_under_way([spec], cache)
        with pytest.raises(WorkFailed, match="building the data failed: its jobs were killed"):
            data_jobs.build(spec, profile, cache, wait=True)

    kill("read", after=0.2)  # it takes a second
    read = {path: path.stat().st_ino for path in cache.glob(".*/spill/part-*")}
    kill("tokenize", after=1)
    path = data_jobs.build(spec, profile, cache, wait=True)
    assert path is not None
    assert {path: path.stat().st_ino for path in read if path.exists()} in (read, {})
    assert data_jobs.build(spec, profile, cache) == path
    assert "2 of 2 parts read" in capsys.readouterr().err
    data_jobs.require_nothing_under_way([spec], cache)
    assert Dataset.open(path).sha256 == Dataset.open(build(spec, tmp_path / "at once")).sha256


def log_of(store: Path, run: RunConfig) -> str:
    log = Path(str(state_of(store, run).log))
    return log.read_text() if log.exists() else ""


def wait_until(condition: Callable[[], bool], seconds: float = 90.0) -> None:
    launches.wait_until(condition, seconds, lambda: f"; queue:\n{ask('squeue', '--array')}")


def hasten(job_id: str) -> None:
    """Let a requeued job start before the two minutes that Slurm waits are over.

    A job that starts in the second in which its last start was revoked on the node fails ("credential revoked").
    """
    wait_until(lambda: "JobState=PENDING" in ask("scontrol", "show", "job", job_id))
    time.sleep(4)
    ask("scontrol", "update", f"jobid={job_id}", "starttime=now")


def losses(run_dir: Path) -> list[float]:
    return read_rows(run_dir, "steps").table["loss"].to_pylist()


def pids(cluster: dict[str, str]) -> dict[str, int]:
    """Process ids of the daemons."""
    return {name: int((Path(cluster["DYNCONV_SLURM_STATE"]) / "run" / f"{name}.pid").read_text()) for name in DAEMONS}


def test_nothing_listens_beyond_loopback(cluster: dict[str, str]) -> None:
    """Also not srun, while a job step runs."""
    ask("sbatch", "--ntasks=2", "--output=/dev/null", "--wrap=srun sleep 15")
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
    submit([long_run], store)
    wait_until(lambda: "step 100/" in log_of(store, long_run))
    ask("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    wait_until(lambda: state_of(store, long_run).state == "requeued")
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
    submit([run], tmp_path, sharded)
    wait_until(lambda: "step 100/" in log_of(tmp_path, run))
    ask("sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    wait_until(lambda: state_of(tmp_path, run).state == "requeued")
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
    submit(both, tmp_path, replace(PROFILE, max_parallel=1))
    wait_until(lambda: "step 100/" in log_of(tmp_path, long_run))
    assert state_of(tmp_path, both[1]).state == "queued"
    assert launch.cancel(tmp_path, [run.run_id for run in both]) == [run.run_id for run in both]
    wait_until(lambda: states.busy(tmp_path, [run.run_id for run in both]) == {})
    time.sleep(3)  # a requeue would show by now: the scheduler looks every second
    assert states.busy(tmp_path, [run.run_id for run in both]) == {}
    assert {state_of(tmp_path, run).state for run in both} == {"cancelled"}
    assert submit(both, tmp_path).skipped == {"cancelled": [run.run_id for run in both]}
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
    launch.cancel(tmp_path, [run.run_id for run in runs])


def test_a_failed_and_a_killed_run_are_reported_with_their_causes(
    tiny_run: RunConfig, long_run: RunConfig, submit: Submit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diverging = replace(tiny_run, seed=99, train=replace(tiny_run.train, learning_rate=1e30))
    submit([diverging, long_run], tmp_path)
    wait_until(lambda: "step 100/" in log_of(tmp_path, long_run))
    ask("scancel", "--signal=ABRT", str(state_of(tmp_path, long_run).job_id))
    wait_until(lambda: {state_of(tmp_path, run).state for run in (diverging, long_run)} == {"failed", "lost"})
    assert str(state_of(tmp_path, diverging).cause).startswith("NonFiniteLoss: ")
    wait_until(lambda: "Slurm says FAILED: process 0 on node1: Aborted" in str(state_of(tmp_path, long_run).cause))
    monkeypatch.setattr(launch, "POLL_SECONDS", 0.5)
    again = submit([diverging, long_run], tmp_path, wait=True)
    assert (again.submitted, again.skipped) == ([long_run.run_id], {"failed": [diverging.run_id]})
    assert [(state.state, state.attempts) for state in again.ended] == [("complete", 2)]


def test_status_says_what_a_job_waits_for(long_run: RunConfig, submit: Submit, tmp_path: Path) -> None:
    """Held, released to wait for room, running, suspended."""
    blocker = ask("sbatch", "--parsable", "--exclusive", "--time=7", "--output=/dev/null", "--wrap=sleep 300")
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
    launch.cancel(tmp_path, [long_run.run_id])


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
    launch.cancel(tmp_path, [tiny_run.run_id])


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
    launch.cancel(tmp_path, [run.run_id for run in runs])


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


def _shared(run: RunConfig) -> list[RunConfig]:
    """A trunk and its branches of 40 and 60 steps."""
    train = replace(run.train, schedule=WarmupStableDecay(0.25))
    budgets = [(f"{steps} steps", replace(train, tokens=16 * 8 * steps)) for steps in (40, 60)]
    return with_trunks([replace(run, budget=budget, train=train) for budget, train in budgets])


def test_a_calibration_is_a_job_whose_speed_sets_the_time_limit(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of two processes, as the profile wants; the run that is submitted then has a limit of its own."""
    monkeypatch.setenv("DYNCONV_CACHE", str(tmp_path / "cache"))
    sweep, profile, store = tmp_path / "cheap.toml", tmp_path / "p.toml", tmp_path / "store"
    sweep.write_text(CHEAP_SWEEP.format(source=text_folder))
    text = 'executor = "slurm"\nmax_gpu_hours = 5\n[slurm]\npartition = "low"\nsignal_seconds = 30\n'
    profile.write_text(text + '[default]\ndevice = "cpu"\ngpus = 2\nhours = "auto"\n')
    words = [str(sweep), "--profile", str(profile), "--store", str(store)]
    assert main(["plan", *words, "--json", "--calibrate"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    (kept,) = (tmp_path / "cache" / "calibrations").glob("*.json")
    assert read_json(kept)["place"] == "slurm cpu partition=low"
    assert (row["gpus"], row["tokens_per_second"]) == (2, read_json(kept)["tokens_per_second"])
    assert not store.exists()
    assert main(["submit", *words]) == 0
    assert "the time limit of 25k is 0.5" in capsys.readouterr().err
    job_id = read_json(store / row["run_id"] / "job.json")["job_id"]
    minutes = round(60 * (1.5 * row["hours"] + 0.5))
    assert ask("squeue", "--noheader", f"--jobs={job_id}", "--format=%l").strip() == f"{minutes}:00"
    assert main(["cancel", str(sweep), "--store", str(store)]) == 0


def test_branches_begin_when_their_trunk_has_ended(tiny_run: RunConfig, submit: Submit, tmp_path: Path) -> None:
    sharing = _shared(tiny_run)
    outcome = submit(sharing[::-1], tmp_path, wait=True)
    assert outcome.unsuccessful == []
    trunk, *branches = (read_json(tmp_path / run.run_id / "run.json") for run in sharing)
    begun = [read_json(tmp_path / run["run_id"] / "attempt-0001.json")["started_at"] for run in branches]
    assert min(begun) > trunk["finished_at"]


def test_slurm_drops_the_branches_of_a_trunk_that_failed(tiny_run: RunConfig, submit: Submit, tmp_path: Path) -> None:
    trunk, *branches = [
        replace(run, train=replace(run.train, learning_rate=1e30)) for run in _shared(replace(tiny_run, seed=4))
    ]
    branches = [replace(run, trunk=trunk.run_id) for run in branches]
    outcome = submit([trunk, *branches], tmp_path, wait=True)
    assert [state.state for state in outcome.ended] == ["failed", "lost", "lost"]
    assert {state.cause for state in outcome.ended[1:]} == {f"its trunk {trunk.run_id} failed; retry that"}


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
    launch.cancel(tmp_path / "store", [run.run_id for run in both])


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
    assert launch.cancel(store, [long_run.run_id]) == [long_run.run_id]
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
    assert launch.cancel(store, [long_run.run_id]) == [long_run.run_id]
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
