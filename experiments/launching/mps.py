"""NVIDIA's Multi-Process Service (MPS), by which kernels of several processes run on one GPU at the same time.

Without it a GPU gives each process a slice of time in turn, and runs that share it gain nothing over one after the
other. https://docs.nvidia.com/deploy/mps
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

_CONTROL = "nvidia-cuda-mps-control"
_PIPES = "CUDA_MPS_PIPE_DIRECTORY"
_DEFAULT_PIPES = Path("/tmp/nvidia-mps")  # where processes look for a service if no variable names one
# Exits with 0 if a process can use the first GPU of the service. The service may start and still be unusable, for
# example in a container that does not share memory with it.
_PROBE = """
import ctypes, sys
cuda, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
sys.exit(
    cuda.cuInit(0)
    or cuda.cuDeviceGet(ctypes.byref(device), 0)
    or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
)
"""
# Stops the service when standard input closes, which happens when this process ends, however it ends. The service
# itself stops only after its last client, so runs that outlive the launcher can still use it.
_KEEPER = f'cat > /dev/null; echo quit | {_CONTROL}; rm -rf -- "$0"'
_PATIENCE = 20.0  # seconds


@contextlib.contextmanager
def multi_process_service(gpus: Sequence[int]) -> Iterator[Mapping[str, str]]:
    """Run the service on these GPUs. Yields the environment variables by which a process finds it.

    It ends with the context, or with this process if that is killed. A process that uses it sees the GPUs as numbers
    0, 1, ... in the order of `gpus`. Yields no variables if this machine does not have the service, if it does not
    work, or if a service is already running, which processes find by default.
    """
    if shutil.which(_CONTROL) is None or _PIPES in os.environ or _runs_already():
        yield {}
        return
    folder = Path(tempfile.mkdtemp(prefix="dynconv-mps-"))
    variables = {name: str(folder / name) for name in (_PIPES, "CUDA_MPS_LOG_DIRECTORY")}
    for path in variables.values():
        Path(path).mkdir()
    served = {**os.environ, **variables, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
    process = {**served, "CUDA_VISIBLE_DEVICES": "0"}
    with _kept(folder, served):
        works = _succeeds([_CONTROL, "-d"], served) and _succeeds([sys.executable, "-c", _PROBE], process)
        if not works:
            print("runs that share a GPU take turns, because NVIDIA's MPS does not work here", file=sys.stderr)
        yield variables if works else {}


@contextlib.contextmanager
def _kept(folder: Path, environment: Mapping[str, str]) -> Iterator[None]:
    """Stop the service with its pipes in `folder`, and delete the folder, when the context or this process ends."""
    keeper = subprocess.Popen(
        ["sh", "-c", _KEEPER, str(folder)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that a signal to the launcher's process group does not end it
    )
    try:
        yield
    finally:
        assert keeper.stdin is not None
        keeper.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):  # It waits for runs that have not stopped.
            keeper.wait(_PATIENCE)


def _runs_already() -> bool:
    """Whether a service answers in the folder where processes look for one by default."""
    return (_DEFAULT_PIPES / "control").exists() and _succeeds([_CONTROL], os.environ, said="get_server_list\n")


def _succeeds(command: Sequence[str], environment: Mapping[str, str], said: str = "") -> bool:
    """Whether a command, given `said` on standard input, ends in time and without an error."""
    try:
        # Do not use a pipe for its output: the service continues in the background and would keep the pipe open.
        quiet = subprocess.DEVNULL
        ended = subprocess.run(
            command, env=environment, input=said, text=True, stdout=quiet, stderr=quiet, timeout=_PATIENCE, check=False
        )
    except (subprocess.TimeoutExpired, OSError):
        return False
    return ended.returncode == 0
