"""A server process that imports torch once and forks the runs on this machine.

Importing torch and its compiler takes 3 to 9 seconds, which a forked run saves. Each job still has processes of its
own: submitit's controller, and its tasks, which load the code of the snapshot. The server itself must not use CUDA,
which does not survive a fork.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import submitit
from submitit.core.submission import process_job
from submitit.core.utils import JobPaths
from submitit.local.local import Controller, LocalJob

from analysis.errors import WorkFailed
from experiments.training.presence import process_started

# Dynamo is among them because torch imports it when the first optimizer is made.
_MODULES = ("numpy", "pandas", "pyarrow.parquet", "torch", "torch._dynamo", "torch.utils.checkpoint")
_PATIENCE = 10.0  # seconds to wait for the launcher's file
_COMPILER = ("torch._inductor.compile_fx", "triton")  # also imported for runs on a GPU


class ForkServer:
    """The launcher's connection to the server."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, folder: Path, environment: Mapping[str, str]) -> int:
        """Start a job that submitit has pickled into `folder`. Returns the process id of its controller.

        Raises WorkFailed if the server has ended.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `_answer` raises then.
            self._process.stdin.write(json.dumps({"folder": str(folder), "environment": dict(environment)}) + "\n")
            self._process.stdin.flush()
        return int(self._answer())

    def wait_until_ready(self) -> None:
        """Return once everything is imported. Call it once, before `start`. Raises WorkFailed if the server ended."""
        self._answer()

    def _answer(self) -> str:
        """The server's next line. Raises WorkFailed if it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkFailed(f"the process that starts runs ended with code {self._process.wait()}; see above for why")
        return line


@contextlib.contextmanager
def fork_server(environment: Mapping[str, str], compiler: bool) -> Iterator[ForkServer]:
    """A server with these environment variables added to the launcher's, until the context ends. Runs outlive it."""
    command = [sys.executable, "-u", "-m", "experiments.launching.fork_server", *(_COMPILER if compiler else ())]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    ) as process:
        try:
            yield ForkServer(process)
        except BaseException:
            process.kill()  # It may still be importing, or be waiting for runs that do not end.
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # An unread request must not hide the original error.
                process.stdin.close()
            raise


class ForkedExecutor(submitit.LocalExecutor):
    """submitit's local executor, whose jobs are forked from a server instead of started as new interpreters."""

    def __init__(self, folder: Path, server: ForkServer) -> None:
        super().__init__(folder)
        self._server = server

    def _submit_command(self, command: str) -> LocalJob:
        """Overrides submitit's method. It uses only the parameters that `Slots.start` sets."""
        parameters = self.parameters
        tasks = parameters["tasks_per_node"]
        gpus = parameters["visible_gpus"][: parameters["gpus_per_node"]]
        environment = {
            **os.environ,
            "SUBMITIT_LOCAL_NTASKS": str(tasks),
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_TIMEOUT_S": str(int(60 * parameters["timeout_min"])),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": "30",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "SUBMITIT_EXECUTOR": "local",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)),
        }
        pid = self._server.start(self.folder, environment)
        return LocalJob(folder=self.folder, job_id=str(pid), tasks=list(range(tasks)), process=_Controlled(pid))


class _Controlled:
    """A job's controller, with the methods of Popen that submitit's LocalJob calls. It is no child of this process."""

    def __init__(self, pid: int) -> None:
        self.pid, self._started = pid, process_started(str(pid))

    def poll(self) -> int | None:
        """None while the process lives."""
        lives = self._started is not None and process_started(str(self.pid)) == self._started
        return None if lives else 0

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


# The functions and classes below run in the server and the processes forked from it.


class _Task(ForkProcess):
    """One process of a job, with the methods of `subprocess.Popen` that submitit's controller calls."""

    def poll(self) -> int | None:
        code: int | None = self.exitcode
        return code

    def send_signal(self, number: int) -> None:
        if self.exitcode is None and self.pid is not None:
            os.kill(self.pid, number)


class _ForkingController(Controller):
    """submitit's controller, which forks the processes of a job instead of starting new interpreters."""

    def start_tasks(self) -> None:
        self.folder.mkdir(exist_ok=True)
        paths = [JobPaths(self.folder, self.pid, rank) for rank in range(self.ntasks)]
        self.stdouts = self.stderrs = [path.stdout.open("a") for path in paths]
        for rank, output in enumerate(self.stdouts):
            own = {f"SUBMITIT_LOCAL_{name}": str(rank) for name in ("LOCALID", "GLOBALID")}
            task = _Task(target=_task, args=(self.folder, own | {"SUBMITIT_LOCAL_JOB_ID": self.pid}, output.fileno()))
            task.start()
            self.tasks.append(task)

    def wait(self, freq: int = 24) -> Sequence[int | None]:
        """As in submitit's class. Writes to rank 0's output which signal ended a process, as it cannot do so itself."""
        codes: Sequence[int | None] = super().wait(freq)
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                print(f"process {rank} was ended by {signal.Signals(-code).name}", file=self.stdouts[0], flush=True)
        return codes


def _task(folder: Path, environment: Mapping[str, str], output: int) -> None:
    """Execute a job's pickled function in a forked process, with its output in the file descriptor `output`."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Drop the controller's handler.
    os.environ.update(environment)
    os.dup2(output, 1)
    os.dup2(output, 2)
    _wait_for(JobPaths(folder, environment["SUBMITIT_LOCAL_JOB_ID"]).submitted_pickle)
    process_job(folder)


def _wait_for(path: Path) -> None:
    """Return once the launcher has written the file, or after _PATIENCE. submitit would look only once a second."""
    end = time.monotonic() + _PATIENCE
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.005)


def _job(folder: str, environment: Mapping[str, str]) -> None:
    """Run a job's controller in a forked process."""
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(2, 1)  # Standard output is the server's pipe to the launcher, which a job must not write to.
    _ForkingController(Path(folder)).run()


def main(modules: Sequence[str]) -> None:
    """Import the modules, then fork a job for every line of standard input, and answer with its process id."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # Imports must not initialise CUDA to see whether it exists.
    os.environ["TORCH_WARM_POOL"] = "0"  # Do not start compiler processes here: a run that needs them starts its own.
    for module in (*_MODULES, *modules):
        importlib.import_module(module)
    print("ready")
    for line in sys.stdin:
        request: dict[str, Any] = json.loads(line)
        job = ForkProcess(target=_job, kwargs=request)
        job.start()
        print(job.pid)


if __name__ == "__main__":
    main(sys.argv[1:])
