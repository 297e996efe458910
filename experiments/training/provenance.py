"""What an attempt at a run runs on, as its log keeps it: device, processes, versions, and how many runs share it."""

import importlib.metadata
import os
import platform
import socket
from typing import TYPE_CHECKING, Any

from experiments import source
from experiments.design.config import Execution
from experiments.training.presence import sharing

if TYPE_CHECKING:  # torch takes seconds to import, which the launcher does without; and `job` imports this module
    from experiments.training.job import Place
    from experiments.training.parallel import World

# Slurm's jobs have it: the number of runs on their device; empty: unknown. On this machine runs are counted.
SHARING_VARIABLE = "DYNCONV_SHARING"


def runs_on_device(place: "Place") -> int | None:
    """How many runs use this run's device now; None where it is not known."""
    if (said := os.environ.get(SHARING_VARIABLE)) is not None:
        return int(said) if said.isdigit() else None
    return sharing(int(place.job) if place.job.isdigit() else os.getpid())


def provenance(world: "World", place: "Place", execution: Execution, code_commit: str | None) -> dict[str, Any]:
    """The provenance of this attempt, for its log."""
    import torch

    cuda = world.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(world.device) if cuda else "cpu",
        "gpus": world.size,
        "parallel": world.parallel if world.size > 1 else None,
        "dtype": "bfloat16" if cuda else "float32",
        "execution": execution.in_words(cuda),
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "job_id": place.job or None,
        "hosts": list(place.hosts) or [socket.gethostname()],
        "code_commit": source.recorded_commit() or code_commit,  # of the copy that this process runs
        "code_sha256": source.code_sha256(),
        "sharing": runs_on_device(place),
    }


def version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
