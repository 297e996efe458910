"""The calibration of a sweep: a few steps of each kind of run, executed as the profile would execute it.

`dynconv plan --calibrate` calls `calibrate` on this machine, or submits a Slurm job for each size that executes this
module. experiments/design/calibrations.py stores the measured speeds.
"""

import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from analysis.errors import WorkFailed
from analysis.logs.files import read_json, write_json
from experiments import source
from experiments.bench.trials import calibration_trial
from experiments.design import calibrations, strict
from experiments.design.calibrations import Work
from experiments.design.config import Execution, RunConfig
from experiments.design.identity import to_dict
from experiments.training.job import Place, this_place

ROUNDS = 3
SECONDS = 0.5  # duration of a turn; each arm has one turn in a round, after a warm-up of about the same duration
REQUEST = "request.json"


@dataclass(frozen=True)
class Request:
    """What to measure: one run for each kind of work of a size."""

    runs: tuple[RunConfig, ...]
    execution: Execution
    place: str
    cache: str  # the folder in which the measurements are stored

    @property
    def size(self) -> str:
        """The size of the runs, which is the same for all."""
        return self.runs[0].size


def requests(
    runs: Sequence[RunConfig],
    executions: Mapping[str, Execution],  # by size, as are the places
    places: Mapping[str, str],
    cache: Path,
) -> list[Request]:
    """A request for each size, with the first run of each kind of work.

    Raises ValueError for packed runs: their speed depends on their documents, and random tokens have none.
    """
    if any(run.packed for run in runs):
        raise ValueError(
            "--calibrate measures sequences that are whole; got a sweep with packed = true, whose speed depends on its "
            "documents; run one of each arm and size, by which the others are forecast then, or state "
            "teraflops_per_second in the profile"
        )
    found: dict[str, dict[Work, RunConfig]] = {}
    for run in runs:
        found.setdefault(run.size, {}).setdefault(Work.of(run, executions[run.size], places[run.size]), run)
    return [Request(tuple(kinds.values()), executions[size], places[size], str(cache)) for size, kinds in found.items()]


def calibrate(request: Request) -> None:
    """Measure on this machine, and store the speeds. Raises WorkFailed if a micro-batch does not fit into memory."""
    _measure(request, None, Path(), progress=True)


def freeze(request: Request, folder: Path) -> None:
    """Write the request for a job whose processes execute this module with the folder as argument."""
    write_json(folder / REQUEST, to_dict(request))


def main() -> None:
    """Measure as one of a job's processes. TERM, which Slurm sends before the time limit, ends it without a requeue."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = Path(sys.argv[1])
    request = strict.parse(read_json(folder / REQUEST), Request, str(folder / REQUEST))
    _measure(request, this_place(), folder, progress=False)


def measured_at(request: Request) -> list[float | None]:
    """When each speed of a request was measured, in Unix seconds by that machine's clock; None if it was not."""
    works = [Work.of(run, request.execution, request.place) for run in request.runs]
    kept = [calibrations.read(work, request.place, Path(request.cache)) for work in works]
    return [None if one is None else one.measured_at for one in kept]


def _measure(request: Request, place: Place | None, folder: Path, progress: bool) -> None:
    """Measure in this process and those that it starts, or, if `place` is given, as one of a job's processes."""
    import torch

    from experiments.bench.stepping import DoesNotFit, Settings, measure, measure_here

    cuda = request.execution.device != "cpu" and torch.cuda.is_available()
    if request.execution.device == "cuda" and not cuda:
        raise ValueError("device = 'cuda' was asked for and torch sees no GPU; set device = 'auto' or 'cpu'")
    trials = [calibration_trial(run, request.execution) for run in request.runs]
    for trial in trials:
        trial.execution("cpu").check(trial.run)
    settings = Settings(tuple(trials), "cuda" if cuda else "cpu", ROUNDS, SECONDS, profile=False, progress=progress)
    try:
        outcomes = measure(settings) if place is None else measure_here(settings, folder, place)
    except DoesNotFit as problem:
        raise WorkFailed(
            f"{problem}: a micro-batch does not fit into the GPU's memory, nor would it in a run; lower micro_batch, "
            "or set parallel = 'fsdp' on more GPUs, in the profile"
        ) from None
    if len(outcomes[0].seconds) < ROUNDS:
        raise KeyboardInterrupt
    if place is not None and place.rank > 0:
        return
    for run, trial, outcome in zip(request.runs, trials, outcomes, strict=True):
        step = statistics.median(outcome.seconds)
        calibration = calibrations.Calibration(
            arm=run.arm,
            size=run.size,
            tokens_per_second=trial.tokens / step,
            spread=(max(outcome.seconds) - min(outcome.seconds)) / step,
            place=request.place,
            device=torch.cuda.get_device_name() if cuda else calibrations.cpu_name(),
            dtype="bfloat16" if cuda else "float32",
            versions=calibrations.versions(),
            code=source.code_sha256(),
            measured_at=time.time(),
        )
        calibrations.write(calibration, Work.of(run, request.execution, request.place), Path(request.cache))


if __name__ == "__main__":
    main()
