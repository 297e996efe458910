"""Times the trainer's own steps: the arms of one size take turns, round after round, with one process for each GPU."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.spawn import ProcessException, spawn
from tqdm import tqdm

from analysis.errors import WorkFailed
from analysis.logs.files import read_json, write_json
from experiments.bench.trials import Trial
from experiments.bench.weights import Lendable, RepeatedDraws
from experiments.design.config import Execution
from experiments.models.decoder import Decoder
from experiments.tasks.base import Examples, Task
from experiments.tasks.stream import GeneratedTask
from experiments.training.assembly import make_trainer
from experiments.training.job import Place, joined
from experiments.training.memory import out_of_memory_suppressed
from experiments.training.parallel import World
from experiments.training.trainer import NonFiniteLoss

MOST_KERNELS = 10  # kernels that a profile lists
_WARM_UPS = 8  # largest number of windows before the first round; each may be twice as long as the one before
_PROFILED_WINDOWS = 2


@dataclass(frozen=True)
class Kernel:
    """The time of one kernel in a step."""

    name: str
    milliseconds: float  # per step
    share: float  # of the time of all kernels


@dataclass
class Outcome:
    """What was measured of one trial."""

    seconds: list[float] = field(default_factory=list)  # for each round, the median time of a step
    memory: int | None = None  # peak memory in bytes; None on a CPU
    captured: bool = False  # whether the step is a CUDA graph
    kernels: list[Kernel] = field(default_factory=list)  # the most expensive ones, with `Settings.profile`


@dataclass(frozen=True)
class Settings:
    """What to measure, and for how long."""

    trials: tuple[Trial, ...]  # of one size
    device: str  # "cuda" or "cpu"
    rounds: int
    seconds: float  # approximate duration of a turn
    profile: bool  # whether to record the most expensive kernels
    progress: bool  # whether to show a progress bar

    @property
    def execution(self) -> Execution:
        """How the processes for all trials are started, which is the execution of the trial with the most GPUs."""
        return max(self.trials, key=lambda trial: trial.gpus).execution(self.device)


class DoesNotFit(Exception):
    """The device does not have enough memory for the trial that the message names."""


def measure(settings: Settings) -> list[Outcome]:
    """The outcomes of trials of one size, which take turns on as many GPUs as the largest of them needs.

    Every other round takes the trials in the opposite order, so that no trial always follows the one that heats the
    device most. Raises DoesNotFit if a trial does not fit into memory, and WorkFailed if a loss is not finite or a
    captured step differs from the uncompiled model.
    """
    size = max(trial.gpus for trial in settings.trials)
    if size == 1:
        return measure_here(settings, Path(), Place())
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "outcomes.json"
        try:
            spawn(_work, (size, Path(folder), settings), nprocs=size)
        except ProcessException as error:  # One of the processes failed, and `spawn` ended the others.
            if not result.exists():
                raise WorkFailed(f"{settings.trials[0].run.size} on {size} processes: {_last_line(error)}") from error
        found = read_json(result)
    if found["does_not_fit"]:
        raise DoesNotFit(found["does_not_fit"])
    return [Outcome(**row | {"kernels": [Kernel(**each) for each in row["kernels"]]}) for row in found["outcomes"]]


def measure_here(settings: Settings, folder: Path, place: Place) -> list[Outcome]:
    """The outcomes in this process, which is one of a job's. The processes find each other through `folder`.

    Raises as `measure` does.
    """
    with joined(folder, settings.execution, place) as world:
        return _outcomes(settings, world)


def _work(rank: int, size: int, folder: Path, settings: Settings) -> None:
    """Measure in one of the processes. Rank 0 writes the outcomes; a process that runs out of memory reports that."""
    place = Place(rank, size, local_rank=rank, job="bench")
    with joined(folder, settings.execution, place) as world:
        try:
            outcomes = _outcomes(settings, world)
        except DoesNotFit as problem:
            write_json(folder / "outcomes.json", {"does_not_fit": str(problem)})
            raise
        if rank == 0:
            found = [asdict(outcome) for outcome in outcomes]
            write_json(folder / "outcomes.json", {"does_not_fit": None, "outcomes": found})


def _last_line(error: Exception) -> str:
    """The last line of a message, which is the cause if the message is a traceback."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _outcomes(settings: Settings, world: World) -> list[Outcome]:
    """The outcomes of trials in this process. Raises DoesNotFit once the memory of the failed trial is free again."""
    measurement = _Measurement(settings, world)
    with out_of_memory_suppressed():  # Leaving the block drops the error, whose frames hold the failed trial's tensors.
        return measurement.outcomes()
    gc.collect()
    torch.cuda.empty_cache()
    raise DoesNotFit(measurement.current)


class _Measurement:
    """The measurement of the trials of one size in one process. On several GPUs each process has one of these."""

    def __init__(self, settings: Settings, world: World) -> None:
        self.current = ""  # name of the trial that has its turn
        self._settings, self._trials, self._world = settings, settings.trials, world
        turns = len(self._trials) * (1 + settings.rounds + settings.profile)
        shown = settings.progress and world.rank == 0
        self._bar = tqdm(total=turns, desc=f"bench {self._trials[0].run.size}", unit="turn", disable=not shown)

    def outcomes(self) -> list[Outcome]:
        """The outcome of each trial, which is empty for trials in which this process takes no part.

        If a single process is interrupted, it returns the rounds that were complete, if there are any.
        """
        torch.compiler.reset()  # Programs of other sizes count towards torch's limit of programs for one function.
        runners: dict[int, _Runner] = {}
        with self._bar:
            for index in self._by_memory():
                with self._turn(index):
                    if self._takes_part(index):
                        runners[index] = self._prepare(index)
            try:
                self._take_turns(runners)
            except KeyboardInterrupt:
                complete = min(len(runner.outcome.seconds) for runner in runners.values())
                if not complete or self._world.size > 1:
                    raise
                for runner in runners.values():
                    del runner.outcome.seconds[complete:]
        return [runners[index].outcome if index in runners else Outcome() for index in range(len(self._trials))]

    def _take_turns(self, runners: Mapping[int, _Runner]) -> None:
        """All rounds, and then the profiles."""
        order = range(len(self._trials))
        turns = [(index, _Runner.turn) for n in range(self._settings.rounds) for index in order[:: -1 if n % 2 else 1]]
        turns += [(index, _Runner.profile) for index in order] if self._settings.profile else []
        for index, work in turns:
            with self._turn(index):
                if index in runners:
                    work(runners[index])

    def _by_memory(self) -> list[int]:
        """Indices of the trials: those with more convolutions first, since they need more memory and fail early.

        Among equals, trials on more GPUs come first. torch compiles an arm for each device, so all processes then
        compile it at the same time, and rank 0 finds its program again when it measures the arm alone.
        """
        trials = self._trials
        return sorted(
            range(len(trials)), key=lambda index: (-trials[index].flops()["convolutions"], -trials[index].gpus)
        )

    def _takes_part(self, index: int) -> bool:
        """Whether this process is one of those of the trial."""
        return self._world.rank < self._trials[index].gpus

    @contextlib.contextmanager
    def _turn(self, index: int) -> Iterator[None]:
        """A context for a trial's turn in all processes: those that take no part in it wait for its end."""
        self.current = self._trials[index].name
        self._bar.set_postfix_str(self.current)
        yield
        self._world.wait_for_all()
        self._bar.update()

    def _prepare(self, index: int) -> _Runner:
        trial = self._trials[index]
        world = self._world if trial.gpus > 1 else World(0, 1, self._world.device)
        return _Runner(trial, world, self._settings.seconds, alone=len(self._trials) == 1)


class RandomTokens:
    """A task of uniformly random tokens, drawn once, so that the host spends no time on them between steps."""

    name = "random tokens"
    sha256 = "random tokens"

    def __init__(self, vocabulary: int, sequences: int, length: int) -> None:
        self.vocabulary = vocabulary
        drawn = np.random.default_rng(0).integers(0, vocabulary, (sequences, length + 1))  # [B, T + 1]
        self.held_out = Examples(drawn[:, :-1], drawn[:, 1:])

    def batch(self, step: int, first: int, count: int) -> Examples:  # noqa: ARG002
        """Sequences `first` to `first + count` - 1, which are the same in every step."""
        return self.held_out.rows(first, first + count)

    def metrics(self, loss: float) -> Mapping[str, float]:
        """The loss alone."""
        return {"loss": loss}


class _Runner:
    """A trial's trainer and its outcome.

    Between its turns it lends its memory to the other trials. It does not if its steps are captured, which fixes the
    addresses of its tensors; models that are captured are small.
    """

    def __init__(self, trial: Trial, world: World, seconds: float, alone: bool) -> None:
        self._trial, self._world, self._cuda = trial, world, world.device.type == "cuda"
        self.outcome = Outcome()
        before = self._start_counting_memory()
        train = trial.run.train
        task: Task
        if trial.run.task is None:
            task = RandomTokens(trial.run.model.vocabulary, train.batch_sequences, train.sequence_length)
        else:  # Fewer targets than tokens count in a generated task, so a step is less work than with random tokens.
            task = GeneratedTask(trial.run.task, trial.run.task_name, train.batch_sequences, trial.run.seed)
        with RepeatedDraws(), world.device:
            model = Decoder(trial.run.model, trial.run.seed)
        self._trainer = make_trainer(trial.run, model, task, trial.execution(world.device.type), world)
        if self._cuda:
            self._trainer.warm_up()
            needed = torch.cuda.max_memory_allocated()
            try:
                self._trainer.check_captured()  # takes an uncompiled step, whose memory must not count for the trial
            except WorkFailed as error:
                raise WorkFailed(f"{trial.name}: {error}") from error
            torch.cuda.reset_peak_memory_stats()
        self.outcome.captured = self._trainer.captured
        self._lendable = Lendable()
        lends = not alone and not self.outcome.captured
        if lends:
            # Add the parameters now, and the optimizer's state once the first steps have made it.
            self._lendable.add(self._trainer.state().tensors.values())
        self._windows = self._count_windows(seconds)
        if lends:
            self._lendable.add(self._trainer.state().tensors.values())
        if self._cuda:
            self.outcome.memory = max(needed, torch.cuda.max_memory_allocated()) - before
        self._lendable.lend()

    def turn(self) -> None:
        """Take the steps of one round. The first window is not counted, since clocks and caches have yet to settle."""
        self._lendable.take_back()
        self._window()
        times = [seconds for _ in range(self._windows) for seconds in self._window()]
        self.outcome.seconds.append(statistics.median(times))
        self._lendable.lend()

    def profile(self) -> None:
        """Record the kernels of a few steps."""
        self._lendable.take_back()
        self._window()
        kind = torch.profiler.ProfilerActivity.CUDA if self._cuda else torch.profiler.ProfilerActivity.CPU
        with torch.profiler.profile(activities=[kind]) as record:
            steps = sum(len(self._window()) for _ in range(_PROFILED_WINDOWS))
        self.outcome.kernels = most_expensive(record.key_averages(), self._cuda, steps)
        self._lendable.lend()

    def _start_counting_memory(self) -> int:
        """Start to count the peak memory. Returns the bytes that other trials have allocated on the device."""
        if not self._cuda:
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _count_windows(self, seconds: float) -> int:
        """How many windows of steps take about `seconds`, once the trainer has settled the length of its windows."""
        spent = 0.0
        for _ in range(_WARM_UPS):
            window = torch.tensor(sum(self._window()), dtype=torch.float64, device=self._world.device)
            last = self._world.sum(window).item() / self._world.size  # the same in all processes
            spent += last
            if spent >= seconds:
                break
        return max(1, math.ceil(seconds / last))

    def _window(self) -> list[float]:
        """The seconds of each step of the next window. Raises WorkFailed if a loss is not finite."""
        try:
            return [step.seconds for step in self._trainer.advance()]
        except NonFiniteLoss as error:
            raise WorkFailed(f"{self._trial.name}: {error}") from error


def most_expensive(events: Iterable[Any], cuda: bool, steps: int) -> list[Kernel]:
    """The MOST_KERNELS kernels (on a CPU, operators) with the largest total time, from a profiler's averages."""

    def microseconds(event: Any) -> float:
        if not cuda:
            return float(event.self_cpu_time_total)
        counts = event.device_type.name == "CUDA" and not event.is_user_annotation
        return float(event.self_device_time_total) if counts else 0.0

    times: dict[str, float] = defaultdict(float)
    for event in events:
        times[event.key] += microseconds(event)
    total = sum(times.values())
    longest = sorted(times.items(), key=lambda item: -item[1])[:MOST_KERNELS]
    return [Kernel(name, us / 1e3 / steps, us / total) for name, us in longest if us > 0]
