"""The provenance of an attempt at a run, for its log: device, processes, versions, number of runs on the device."""

import importlib.metadata
import os
import platform
import socket
from typing import TYPE_CHECKING, Any

from experiments import source
from experiments.design.config import Execution
from experiments.training.presence import sharing

if TYPE_CHECKING:  # torch takes seconds to import, and the launcher needs no torch; and `job` imports this module
    from experiments.training.job import Place
    from experiments.training.parallel import World

# Set in jobs on Slurm to the number of runs on their device, or empty if that is unknown. Without it, this run is on
# the launcher's machine, where the registry of presence.py counts the runs.
SHARING_VARIABLE = "DYNCONV_SHARING"


def runs_on_device(place: "Place") -> int | None:
    """How many runs use this run's device now; None if it is not known."""
    if (said := os.environ.get(SHARING_VARIABLE)) is not None:
        return int(said) if said.isdigit() else None
    return sharing(int(place.job) if place.job.isdigit() else os.getpid())


def provenance(world: "World", place: "Place", execution: Execution, code_commit: str | None) -> dict[str, Any]:
    """The provenance of this attempt, as results/README.md describes it for an attempt in the log."""
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
        "code_commit": source.recorded_commit() or code_commit,  # the commit of the copy that this process executes
        "code_sha256": source.code_sha256(),
        "sharing": runs_on_device(place),
    }


def version(package: str) -> str | None:
    """The version of an installed package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
