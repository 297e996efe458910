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
# Exits with 0 if a process can use the first GPU of the service. The service may start and yet serve nobody, as in a
# container that does not share memory with it.
_PROBE = """
import ctypes, sys
cuda, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
sys.exit(
    cuda.cuInit(0)
    or cuda.cuDeviceGet(ctypes.byref(device), 0)
    or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
)
"""
_PATIENCE = 20.0  # seconds


@contextlib.contextmanager
def multi_process_service(gpus: Sequence[int]) -> Iterator[Mapping[str, str]]:
    """Run the service on these GPUs until the context ends. Yields the variables by which a process finds it.

    To such a process the GPUs have the numbers 0, 1, ... in the order of `gpus`. Yields no variables if this machine
    does not have the service, if it does not work, or if somebody has set up one already (CUDA_MPS_PIPE_DIRECTORY).
    """
    if shutil.which(_CONTROL) is None or _PIPES in os.environ:
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="dynconv-mps-", ignore_cleanup_errors=True) as folder:
        variables = {name: str(Path(folder) / name) for name in (_PIPES, "CUDA_MPS_LOG_DIRECTORY")}
        for path in variables.values():
            Path(path).mkdir()
        served = {**os.environ, **variables, "CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus))}
        process = {**served, "CUDA_VISIBLE_DEVICES": "0"}
        try:
            works = _succeeds([_CONTROL, "-d"], served) and _succeeds([sys.executable, "-c", _PROBE], process)
            if not works:
                print("runs that share a GPU take turns, because NVIDIA's MPS does not work here", file=sys.stderr)
            yield variables if works else {}
        finally:
            _succeeds([_CONTROL], served, said="quit\n")


def _succeeds(command: Sequence[str], environment: Mapping[str, str], said: str = "") -> bool:
    """Whether a command ends in time and without an error."""
    try:
        ended = subprocess.run(
            command, env=environment, input=said, text=True, capture_output=True, timeout=_PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        return False
    return ended.returncode == 0
