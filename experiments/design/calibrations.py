"""Measured training speeds, one small file each: `plan --calibrate` writes them, `plan` and `submit` read them.

The name of a file is a hash of what is trained and how (`Work`) and of where (`place`: this machine's device, or the
options that Slurm is given). The file names the device, the versions and the code of the measurement. A measurement
with other code or versions than those here is stale and is not used.
"""

import importlib.metadata
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from analysis.logs.files import read_json, write_json
from experiments import source
from experiments.design import strict
from experiments.design.config import Execution, RunConfig
from experiments.design.identity import digest
from experiments.design.model import ModelConfig
from experiments.tasks.registry import AnyTask

FOLDER = "calibrations"  # in the cache of data, which the nodes of a cluster share


@dataclass(frozen=True)
class Work:
    """The settings that decide how long a training step takes on a given device."""

    model: ModelConfig
    task: AnyTask | None
    batch_sequences: int
    sequence_length: int
    optimizer: str
    gpus: int
    parallel: str
    micro_batch: int
    compile: bool
    recompute: str
    threads: int
    fused: bool
    packed: bool = False

    @classmethod
    def of(cls, run: RunConfig, execution: Execution, place: str) -> "Work":
        """The work of a run at a place, without settings that have no effect there."""
        cpu = place.startswith(("cpu", "slurm cpu"))
        return cls(
            run.model,
            run.task,
            run.train.batch_sequences,
            run.train.sequence_length,
            run.train.optimizer.kind,
            execution.gpus,
            execution.parallel if execution.gpus > 1 else "none",
            execution.micro_batch,
            execution.compile and not cpu,
            execution.recompute,
            execution.threads if cpu else 0,
            execution.fused and not cpu,
            run.packed,
        )


@dataclass(frozen=True)
class Calibration:
    """One measurement, as it is stored in its file."""

    arm: str  # the name at that time, which is not part of the key
    size: str
    tokens_per_second: float  # of all GPUs of a run, without evaluations
    spread: float  # difference between the slowest and the fastest round, over the median
    place: str
    device: str
    dtype: str
    versions: str
    code: str  # `source.code_sha256()`
    measured_at: float  # unix seconds

    def __post_init__(self) -> None:
        if not 0 < self.tokens_per_second < float("inf"):
            raise ValueError(f"tokens_per_second must be positive and finite; got {self.tokens_per_second}")

    def stale(self, elsewhere: bool) -> str | None:
        """Why this measurement does not apply to the code and versions here, or None if it does.

        With `elsewhere`, runs use another Python environment than this one, so its versions are not compared.
        """
        if not elsewhere and self.versions != versions():
            return f"of {self.versions}; here is {versions()}"
        return None if self.code == source.code_sha256() else "of other code"


def versions() -> str:
    """The installed versions of the packages that decide the speed of a step, as text."""
    found = {}
    for package in ("torch", "triton"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(f"{package} {version}" for package, version in found.items())


def cpu_name() -> str:
    """The name of the CPU as a device, with the processor's model."""
    try:
        models = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        models = []
    return f"cpu ({models[0] if models else platform.machine()})"


def write(calibration: Calibration, work: Work, cache: Path) -> None:
    """Store a measurement. It replaces an older one of the same work at the same place."""
    path = _path(work, calibration.place, cache)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(calibration))


def read(work: Work, place: str, cache: Path) -> Calibration | None:
    """The measurement of this work at this place, stale or not; None if there is none.

    Raises ValueError with the file's name if it is damaged.
    """
    path = _path(work, place, cache)
    if not path.exists():
        return None
    return strict.parse(read_json(path), Calibration, str(path))


def _path(work: Work, place: str, cache: Path) -> Path:
    return cache / FOLDER / f"{digest(_Key(work, place))}.json"


@dataclass(frozen=True)
class _Key:
    work: Work
    place: str
