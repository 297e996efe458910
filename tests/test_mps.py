"""NVIDIA's Multi-Process Service, here a program of the same name that notes what it is told."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from launches import wait_until

from experiments.launching import mps
from experiments.launching.local import Slots
from experiments.launching.profile import Job, Profile


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the control program was told: its arguments or standard input, and the GPUs that it saw."""
    log, program = tmp_path / "told", tmp_path / "bin" / "nvidia-cuda-mps-control"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ntest "$1" && said=$1 || read said\necho "$said $CUDA_VISIBLE_DEVICES" >> {log}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,4")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setattr(mps, "_DEFAULT_PIPES", tmp_path / "none")  # whatever runs on this machine
    return log


class Server:
    """In place of the fork server."""

    def __init__(self) -> None:
        self.environments: list[Mapping[str, str]] = []

    def start(self, folder: Path, environment: Mapping[str, str]) -> int:  # noqa: ARG002
        self.environments.append(environment)
        return os.getpid()


def environments(slots: Slots, folder: Path) -> list[Mapping[str, str]]:
    """Of runs in all slots, and how many variables of the service each has."""
    server = Server()
    with slots.shared_gpus():
        for slot in slots.free:
            slots.start(slot, folder / "run", Job(), folder / "jobs", server)  # type: ignore[arg-type]
    return server.environments


def test_runs_that_share_gpus_find_the_service_and_its_numbers(
    told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mps, "_PROBE", "import os; assert os.environ['CUDA_VISIBLE_DEVICES'] == '0'")
    found = environments(Slots(Profile("local", max_parallel=4), [Job()] * 4), tmp_path)
    assert told.read_text() == "-d 4,6\nquit 4,6\n"
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["1", "0", "1", "0"]
    (pipes,) = {each["CUDA_MPS_PIPE_DIRECTORY"] for each in found}
    assert not Path(pipes).exists()  # any more


def test_runs_take_turns_where_the_service_does_not_work(
    told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mps, "_PROBE", "raise SystemExit(2)")
    found = environments(Slots(Profile("local", max_parallel=4), [Job()] * 4), tmp_path)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["6", "4", "6", "4"]
    assert not any("CUDA_MPS_PIPE_DIRECTORY" in each for each in found)
    assert told.read_text() == "-d 4,6\nquit 4,6\n"
    assert "runs that share a GPU take turns" in capsys.readouterr().err


@pytest.mark.parametrize(("parallel", "runs"), [(2, 9), (4, 2)])
def test_runs_with_gpus_of_their_own_need_no_service(told: Path, tmp_path: Path, parallel: int, runs: int) -> None:
    environments(Slots(Profile("local", max_parallel=parallel), [Job()] * runs), tmp_path)
    assert not told.exists()


def test_a_service_that_is_there_is_left_alone(told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/somewhere")
    found = environments(Slots(Profile("local", max_parallel=4), [Job()] * 4), tmp_path)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["6", "4", "6", "4"]
    assert not told.exists()


def test_a_service_where_processes_look_by_themselves_is_left_alone(
    told: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "control").touch()
    monkeypatch.setattr(mps, "_DEFAULT_PIPES", tmp_path)
    found = environments(Slots(Profile("local", max_parallel=4), [Job()] * 4), tmp_path)
    assert [each["CUDA_VISIBLE_DEVICES"] for each in found] == ["6", "4", "6", "4"]
    assert told.read_text() == "get_server_list 6,4\n"


def test_the_service_may_keep_its_output_open(told: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on in the background, where a program of its name that sleeps goes on, too: longer than is waited."""
    program, sleeping = told.parent / "bin" / "nvidia-cuda-mps-control", told.parent / "sleeping"
    program.write_text(f"{program.read_text()}sleep 1000 &\necho $! >> {sleeping}\n")
    monkeypatch.setattr(mps, "_PROBE", "")
    try:
        with mps.multi_process_service([4, 6]) as variables:
            assert variables
        assert told.read_text() == "-d 4,6\nquit 4,6\n"
    finally:
        for process in sleeping.read_text().split():
            os.kill(int(process), signal.SIGKILL)


def test_a_control_program_that_cannot_run_is_no_service(told: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (told.parent / "bin" / "nvidia-cuda-mps-control").write_bytes(b"\x7fELF of another machine")
    with mps.multi_process_service([4, 6]) as variables:
        assert variables == {}
    assert "runs that share a GPU take turns" in capsys.readouterr().err


def test_the_service_ends_with_a_launcher_that_was_killed(told: Path) -> None:
    code = (
        "import os, signal; from pathlib import Path\n"
        "from experiments.launching import mps\n"
        "mps._PROBE, mps._DEFAULT_PIPES = '', Path('/nowhere')\n"
        "with mps.multi_process_service([4, 6]) as variables:\n"
        "    print(variables['CUDA_MPS_PIPE_DIRECTORY'], flush=True)\n"
        "    os.killpg(0, signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert done.returncode == -signal.SIGKILL
    wait_until(lambda: not Path(done.stdout.strip()).parent.exists())
    assert told.read_text() == "-d 4,6\nquit 4,6\n"
