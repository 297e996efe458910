"""A Slurm of the tests' own, and what they ask of it. SLURM_CONF names it while a test runs."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import launches
import pytest
from launches import Submit, state_of

from analysis.logs.reader import read_rows
from experiments.data.dataset import Dataset
from experiments.design.config import RunConfig
from experiments.launching import submit as launch
from experiments.launching.profile import Job, Profile, Slurm

SCRIPTS = Path(__file__).parent.parent / "slurm" / "cluster"
ON_THE_CLUSTER = [  # the marks of a file whose tests share one cluster
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.usefixtures("cluster"),
    pytest.mark.xdist_group("slurm"),  # one worker, one cluster
]
PROFILE = Profile("slurm", slurm=Slurm("low", signal_seconds=30), default=Job(device="cpu", hours=0.5))


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
    for _ in range(3):  # a port that is free now may be somebody else's some seconds later, when a daemon asks for it
        environment["DYNCONV_SLURM_PORT"] = str(free_ports(2 + nodes))
        up = call("up", environment)
        if "already in use" not in up.stderr and "is taken by somebody else" not in up.stderr:
            break
        assert call("down", environment, "--purge").returncode == 0
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


def free_ports(count: int) -> int:
    """The first of so many free ports in a row, below those that the system gives to whoever asks for any."""
    for first in random.sample(range(10_000, 32_000, count), 1_000):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError(f"no {count} free ports in a row")


@pytest.fixture
def submit(dataset: Dataset) -> Submit:
    def submit(runs: list[RunConfig], store: Path, profile: Profile = PROFILE, **options: bool) -> launch.Outcome:
        return launch.submit(runs, profile, store, cache=dataset.path.parent, **options)

    return submit


def log_of(store: Path, run: RunConfig) -> str:
    log = Path(str(state_of(store, run).log))
    return log.read_text() if log.exists() else ""


def wait_until(condition: Callable[[], bool]) -> None:
    launches.wait_until(condition, said=lambda: f"; queue:\n{ask('squeue', '--array')}")


def hasten(job_id: str) -> None:
    """Let a requeued job start before the two minutes that Slurm waits are over.

    A job that starts in the second in which its last start was revoked on the node fails ("credential revoked").
    """
    wait_until(lambda: "JobState=PENDING" in ask("scontrol", "show", "job", job_id))
    time.sleep(4)
    ask("scontrol", "update", f"jobid={job_id}", "starttime=now")


def losses(run_dir: Path) -> list[float]:
    return read_rows(run_dir, "steps").table["loss"].to_pylist()
