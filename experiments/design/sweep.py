"""Expand a sweep file to a list of frozen runs whose compute is matched."""

import difflib
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from experiments import source
from experiments.design import strict
from experiments.design.arms import ARMS, Arm
from experiments.design.config import TEXT, RunConfig
from experiments.design.data import DataConfig, missing, relative_to
from experiments.design.ladder import LADDERS, Rung
from experiments.design.model import ModelConfig
from experiments.design.recipe import BUDGET_AXIS, Recipe, check_axes
from experiments.design.schedules import Cosine
from experiments.design.train import AdamW, TrainConfig
from experiments.design.trunks import with_trunks
from experiments.tasks.registry import AnyTask

FLOPS_TOLERANCE = 1e-3  # relative to the baseline's FLOPs, with match = "flops"
LARGEST_SETTING = 1e9  # refuses numbers that would overflow later; no real sweep comes near it
LARGEST_RATE = 1.0  # AdamW and Muon move each weight by about the learning rate in a step; weights begin below .1
Values = tuple[float, ...]  # of an axis
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # of sweeps and arms: folders are named after them


@dataclass(frozen=True)
class Sweep:
    """The content of a sweep file."""

    name: str
    ladder: str
    sizes: tuple[str, ...]
    arms: tuple[str, ...]
    baseline: str
    seeds: tuple[int, ...]
    match: Literal["tokens", "flops"]
    data: DataConfig | None = None  # a sweep trains on this text or on the tasks below
    task: Mapping[str, AnyTask] = field(default_factory=dict)  # generated tasks: [task.NAME]; each is trained alone
    # The budget is one of the next two: tokens for each parameter (N) of the baseline, given here or in [vary], or the
    # number of the baseline's optimizer steps, which is the same at all sizes.
    tokens_per_parameter: float | None = None
    count: Literal["total", "active"] = "total"  # parameters that tokens_per_parameter counts: N or N_active
    steps: int | None = None
    # task -> its steps, where they are not `steps`, such as those of a smaller training set
    steps_by_task: Mapping[str, int] = field(default_factory=dict)
    packed: bool = False  # keep the documents of a sequence of text apart: data/packing.py
    evaluations: int = 8  # number of evaluations during a run, in addition to the one at its end
    max_epochs: float = 4.0  # passes over the training data; a run with more is refused
    train: Recipe = field(default_factory=Recipe)
    # size -> its seeds, where they are not `seeds`: more where noise is larger, or fewer where a run is dear
    seeds_by_size: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    # axis -> its values; every combination is a run
    vary: Mapping[str, Values] = field(default_factory=dict)
    # arm -> axis of `vary` -> the arm's own values, such as other learning rates, or size -> its values at that size
    vary_by_arm: Mapping[str, Mapping[str, Values | Mapping[str, Values]]] = field(default_factory=dict)
    arm: Mapping[str, Arm] = field(default_factory=dict)  # arms that the file defines: [arm.NAME]

    def __post_init__(self) -> None:
        seeds = {"seeds": self.seeds, **{f"seeds_by_size.{size}": own for size, own in self.seeds_by_size.items()}}
        for name, values in {"sizes": self.sizes, "arms": self.arms, **seeds}.items():
            if not values:
                raise ValueError(f"{name} is empty; name at least one")
            if len(set(values)) != len(values):
                raise ValueError(f"{name} must not list a value twice; got {list(values)}; remove the repetition")
        for name, own in seeds.items():
            for seed in own:
                if not 0 <= seed < 2**63:
                    raise ValueError(f"{name} must be 0 to 2**63 - 1; got {seed}; choose another")
        named = [("name", self.name), *(("arm", name) for name in self.arm), *(("task", name) for name in self.task)]
        for key, name in named:
            if not NAME_PATTERN.fullmatch(name):
                raise ValueError(
                    f"{key} must be letters, digits, '_', '.' and '-', the first a letter or a digit, "
                    f"as a folder is named after it; got {name!r}; rename it"
                )
        self._check_names()
        self._check_axes()

    def _check_names(self) -> None:
        strict.choose(self.ladder, LADDERS, "ladder")
        for size in self.sizes:
            strict.choose(size, LADDERS[self.ladder].sizes, f"sizes of ladder {self.ladder!r}")
        known = ARMS | dict(self.arm)
        for arm in self.arms:
            strict.choose(arm, known, "arms")
        strict.choose(self.baseline, self.arms, "baseline: one of this sweep's arms is wanted")
        for size in self.seeds_by_size:
            strict.choose(size, self.sizes, "seeds_by_size: one of this sweep's sizes is wanted")
        for arm in self.vary_by_arm:
            strict.choose(arm, self.arms, "vary_by_arm: one of this sweep's arms is wanted")
        for task in self.steps_by_task:
            strict.choose(task, self.task, "steps_by_task: one of this sweep's tasks is wanted")
        redefined = sorted(set(self.arm) & set(ARMS))
        if redefined:
            raise ValueError(f"arm {redefined[0]!r} is built in; give your variant another name")
        if (self.data is None) == (not self.task):
            given = "neither is there" if self.data is None else "both are there"
            raise ValueError(f"a sweep trains on text, [data], or on generated tasks, [task.NAME]; {given}; give one")
        if TEXT in self.task:
            raise ValueError(f"task {TEXT!r} is the name of language modelling; give the task another name")

    def _check_axes(self) -> None:
        check_axes(self.vary, "vary")
        for arm, own in self.vary_by_arm.items():
            for axis, values in own.items():
                by_size = values if isinstance(values, Mapping) else dict.fromkeys(self.sizes, values)
                for size, at_size in by_size.items():
                    where = f"vary_by_arm.{arm}"
                    strict.choose(size, self.sizes, f"{where}.{axis}: one of this sweep's sizes is wanted")
                    check_axes({axis: at_size}, where)
                if axis not in self.vary:
                    raise ValueError(
                        f"vary_by_arm.{arm}.{axis} gives one arm's values of an axis, which [vary] must have for the "
                        f"others; add {axis} there"
                    )
        given = [self.tokens_per_parameter is not None, BUDGET_AXIS in self.vary, self.steps is not None]
        if self.steps is not None and sum(given) > 1:
            raise ValueError("steps and tokens_per_parameter are both given; give one of them")
        if self.steps is not None and self.count != "total":
            raise ValueError(f"count needs tokens_per_parameter; got {self.count!r} beside steps; remove it")
        if sum(given) != 1:
            often = "twice" if any(given) else "nowhere"
            raise ValueError(f"tokens_per_parameter is given {often}; give a number, or a list of them in [vary]")
        for name in ("tokens_per_parameter", "steps", "evaluations", "max_epochs"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= LARGEST_SETTING:  # also false for nan
                raise ValueError(f"{name} must be above zero, at most {LARGEST_SETTING:g}; got {value}; correct it")
        for task, steps in self.steps_by_task.items():
            if self.steps is None or not 0 < steps <= LARGEST_SETTING:
                raise ValueError(
                    f"steps_by_task.{task} must be a number above zero, beside steps for the other tasks; got {steps} "
                    f"and steps = {self.steps}; correct it"
                )
        for where, recipe in [
            ("train", self.train),
            *((f"arm.{name}.train", arm.train) for name, arm in self.arm.items()),
        ]:
            for axis in self.vary:
                if getattr(recipe, axis, None) is not None:
                    raise ValueError(f"{axis} is in [vary] and in [{where}]; remove one of the two")

    def points(self, arm: str, size: str) -> Iterator[dict[str, float]]:
        """Every combination of an arm's values of the axes, as axis -> value; one empty point if there are no axes."""
        axes = dict(self.vary)
        for axis, values in self.vary_by_arm.get(arm, {}).items():
            axes[axis] = values.get(size, self.vary[axis]) if isinstance(values, Mapping) else values
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))


def load_sweep(path: Path) -> list[RunConfig]:
    """All runs of a sweep file.

    Raises ValueError for anything illegal in it, for compute that cannot be matched within 0.1%, and for more
    epochs over the data than the sweep allows.
    """
    sweep = read_sweep(path)
    try:
        return expand(sweep)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_sweep(path: Path) -> Sweep:
    """The content of a sweep file; what of its data lies beside it is found there.

    Raises ValueError for anything illegal in it.
    """
    if not path.is_file() and (meant := near_sweep(path)):
        raise ValueError(f"{path}: no sweep file; did you mean {meant}?")
    sweep = strict.load(path, Sweep)
    return sweep if sweep.data is None else replace(sweep, data=relative_to(sweep.data, path.resolve().parent))


def near_sweep(path: Path) -> Path | None:
    """The sweep file that may be meant by a path that is none, as `demo`: one beside it, or one of those shipped."""
    beside = path.parent / f"{path.name}.toml"
    shipped = {each.stem: each for each in (source.root() / "experiments" / "sweeps").glob("*.toml")}
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    found = beside if beside.is_file() else shipped[near[0]] if near else None
    return found.relative_to(Path.cwd()) if found and found.is_relative_to(Path.cwd()) else found


def notes(sweep: Sweep) -> list[str]:
    """Messages about settings that are legal but perhaps not meant."""
    unused = [name for name in sweep.arm if name not in sweep.arms]
    found = [f"[arm.{name}] makes no run; name it in `arms`, or remove it" for name in unused]
    alike = dict[str, str]()
    for arm in sweep.arms:
        other = alike.setdefault(str([_outcome(sweep, size, arm) for size in sweep.sizes]), arm)
        if other != arm:
            found.append(f"arms {other} and {arm} differ in their names alone; change one, or remove it")
    high = [
        f"{rate:g} of {arm} {size}"
        for arm in sweep.arms
        for size in sweep.sizes
        for rate in _rates(sweep, size, arm)
        if rate > LARGEST_RATE
    ]
    if high:
        others = f" and {len(high) - 1} more" if len(high) > 1 else ""
        found.append(f"no model learns at a learning rate above {LARGEST_RATE:g}; got {high[0]}{others}")
    if sweep.data is None:
        return found
    for key, place in missing(sweep.data).items():
        found.append(f"data.{key} = {place!r} is not there; `submit` will refuse to build the data")
    if sweep.packed:
        found.append(
            "packed: FLOPs hold attention over whole sequences, of which within_documents in config.json is real"
        )
    return found


def _outcome(sweep: Sweep, size: str, arm: str) -> tuple[ModelConfig, Recipe, list[dict[str, float]]]:
    """What of an arm decides the outcome of its runs: the model, the recipe, and the points of the axes."""
    model = _model(sweep, next(iter(sweep.task), TEXT), size, arm)
    return model, _arm(sweep, arm).train.over(sweep.train), list(sweep.points(arm, size))


def _rates(sweep: Sweep, size: str, arm: str) -> list[float]:
    """The peak learning rates of an arm at a size, one for each point of the axes."""
    recipe = _arm(sweep, arm).train.over(sweep.train)
    rung = LADDERS[sweep.ladder].sizes[size]
    return [_peak_rate(rung, recipe.varied(point)) for point in sweep.points(arm, size)]


def expand(sweep: Sweep) -> list[RunConfig]:
    """All runs, by task, then size, then arm, then seed, then along the axes; a trunk comes before its branches."""
    runs = []
    for task in sweep.task or (TEXT,):
        for size in sweep.sizes:
            for arm in sweep.arm:
                _model(sweep, task, size, arm)  # Check arms that `arms` does not list, too.
        for size, arm in itertools.product(sweep.sizes, sweep.arms):
            for seed in sweep.seeds_by_size.get(size, sweep.seeds):
                runs += with_trunks([_run(sweep, task, size, arm, seed, point) for point in sweep.points(arm, size)])
    _refuse_equal_runs(runs)
    return runs


def _refuse_equal_runs(runs: Sequence[RunConfig]) -> None:
    """Raises ValueError if two points of [vary] round to the same run, such as two warm-up fractions to equal steps.

    A run has one record with one value on each axis, so the other point would be missing from every table.
    """
    first: dict[str, RunConfig] = {}
    for run in runs:
        other = first.setdefault(run.run_id, run)
        if other is not run:
            points = " and ".join(str(dict(each.vary)) for each in (other, run))
            raise ValueError(
                f"{run.arm} {run.size}: the points {points} of [vary] are the same run; remove one of them"
            )


def _rung(sweep: Sweep, task: str, size: str) -> Rung:
    """The rung of a size, at the sequence length of the task."""
    rung = LADDERS[sweep.ladder].sizes[size]
    if sweep.data is None:
        return replace(rung, sequence_length=sweep.task[task].sequence_length)
    _check_data(sweep.data, rung, size)
    return rung


def _run(sweep: Sweep, task: str, size: str, arm: str, seed: int, point: Mapping[str, float]) -> RunConfig:
    rung = _rung(sweep, task, size)
    baseline = _model(sweep, task, size, sweep.baseline)
    model = _model(sweep, task, size, arm)
    recipe = _arm(sweep, arm).train.over(sweep.train).varied(point)
    batch = rung.batch_sequences if recipe.batch_sequences is None else recipe.batch_sequences
    baseline_sequences, budget = _budget(sweep, task, rung, baseline, point)
    if baseline_sequences < batch:
        raise ValueError(f"{size}: {budget} gives {baseline_sequences} sequences; one batch takes {batch}; raise it")
    sequences = baseline_sequences
    if sweep.match == "flops":
        sequences = _matched_sequences(baseline, model, baseline_sequences, rung.sequence_length, f"{arm} {size}")
    train = _train(sweep, task, rung, recipe, sequences, batch)
    train = replace(train, evaluate_every=_evaluation_interval(sweep, rung, baseline_sequences))
    run = RunConfig(
        sweep=sweep.name,
        arm=arm,
        baseline=sweep.baseline,
        ladder=sweep.ladder,
        size=size,
        budget=budget,
        seed=seed,
        model=model,
        train=train,
        data=sweep.data,
        vary=point,
        task=sweep.task.get(task),
        task_name=task,
        packed=sweep.packed,
    )
    if run.data is not None and run.epochs is not None and run.epochs > sweep.max_epochs:
        raise ValueError(
            f"{arm} {size} would read the data {run.epochs:.1f} times; at most max_epochs = {sweep.max_epochs:g} "
            "is allowed; raise train_tokens or max_epochs, or lower tokens_per_parameter or steps"
        )
    return run


def _budget(sweep: Sweep, task: str, rung: Rung, baseline: ModelConfig, point: Mapping[str, float]) -> tuple[int, str]:
    """The number of the baseline's training sequences, and the budget in words."""
    steps = sweep.steps_by_task.get(task, sweep.steps)
    if steps is not None:
        recipe = _arm(sweep, sweep.baseline).train.over(sweep.train).varied(point)
        return steps * (recipe.batch_sequences or rung.batch_sequences), f"{steps} steps"
    tokens_per_parameter = point.get(BUDGET_AXIS, sweep.tokens_per_parameter)
    assert tokens_per_parameter is not None
    counted = baseline.parameters() if sweep.count == "total" else baseline.parameters_active()
    sequences = round(tokens_per_parameter * counted / rung.sequence_length)
    return sequences, f"{tokens_per_parameter:g} tokens per {'' if sweep.count == 'total' else 'active '}parameter"


def _peak_rate(rung: Rung, recipe: Recipe) -> float:
    """The learning rate at its peak. Raises ValueError if it underflows or overflows."""
    rate = rung.learning_rate if recipe.learning_rate is None else recipe.learning_rate
    factor = 1.0 if recipe.learning_rate_factor is None else recipe.learning_rate_factor
    if not 0 < rate * factor < math.inf:
        raise ValueError(
            f"learning_rate times learning_rate_factor must be above zero and finite; got {rate:g} times {factor:g}; "
            "correct one of them"
        )
    return rate * factor


def _train(sweep: Sweep, task: str, rung: Rung, recipe: Recipe, sequences: int, batch: int) -> TrainConfig:
    fraction = recipe.warmup_fraction
    if fraction is None:
        fraction = LADDERS[sweep.ladder].warmup_fraction
    if sweep.data is None:
        held_out = sweep.task[task].held_out_sequences
    else:
        held_out = (sweep.data.validation_tokens - 1) // rung.sequence_length
    chosen = {name: getattr(recipe, name) for name in ("weight_decay", "clip_norm")}
    return TrainConfig(
        tokens=sequences * rung.sequence_length,
        sequence_length=rung.sequence_length,
        batch_sequences=batch,
        learning_rate=_peak_rate(rung, recipe),
        evaluate_every=0,
        held_out_sequences=held_out,
        warmup_steps=max(1, round(fraction * -(-sequences // batch))),
        schedule=recipe.schedule or Cosine(),
        optimizer=recipe.optimizer or AdamW(),
        **{name: value for name, value in chosen.items() if value is not None},
    )


def _check_data(data: DataConfig, rung: Rung, size: str) -> None:
    """Raises ValueError if a split is shorter than one sequence and the token after it, which is its last target."""
    for name in ("train_tokens", "validation_tokens"):
        if getattr(data, name) <= rung.sequence_length:
            raise ValueError(
                f"{size}: data.{name} must be above the sequence length, {rung.sequence_length}; "
                f"got {getattr(data, name)}; raise it"
            )


def _matched_sequences(
    baseline: ModelConfig, model: ModelConfig, baseline_sequences: int, sequence_length: int, where: str
) -> int:
    """The number of whole sequences at which the model's exact training FLOPs are nearest to the baseline's.

    Raises ValueError if they differ by more than FLOPS_TOLERANCE.
    """
    budget = baseline_sequences * baseline.training_flops_per_sequence(sequence_length)
    each = model.training_flops_per_sequence(sequence_length)
    sequences = round(budget / each)
    error = sequences * each / budget - 1
    if abs(error) > FLOPS_TOLERANCE:
        raise ValueError(
            f"{where}: FLOPs match the baseline's only within {error:+.2%}; 0.1% is wanted; "
            "raise tokens_per_parameter or steps, so that one sequence is a smaller share"
        )
    return sequences


def _arm(sweep: Sweep, name: str) -> Arm:
    return sweep.arm[name] if name in sweep.arm else ARMS[name]


def _model(sweep: Sweep, task: str, size: str, name: str) -> ModelConfig:
    try:
        model = _build_model(sweep, _vocabulary(sweep, task), size, _arm(sweep, name))
        return replace(model, reads_last_token=task in sweep.task and sweep.task[task].reads_last_token)
    except ValueError as error:
        raise ValueError(f"arm.{name} at {size}: {error}") from None


def _vocabulary(sweep: Sweep, task: str) -> int:
    return sweep.task[task].vocabulary if sweep.data is None else sweep.data.vocabulary


def _build_model(sweep: Sweep, vocabulary: int, size: str, arm: Arm) -> ModelConfig:
    ladder = LADDERS[sweep.ladder]
    rung, shape = ladder.sizes[size], ladder.shape(size)
    plain = ModelConfig(
        layers=rung.layers,
        width=rung.width,
        vocabulary=vocabulary,
        mixer=arm.mixer.fitted(shape),
        ffn=arm.ffn.fitted(shape),
        init_std=ladder.init_std,
        tied=ladder.tied,
    )
    sites = plain.sites()
    for site in arm.conv.sites:
        strict.choose(site, sites, "conv.sites")
    return replace(plain, conv=arm.conv.fitted(shape, sites))


def _evaluation_interval(sweep: Sweep, rung: Rung, baseline_sequences: int) -> int:
    """Tokens between evaluations: a multiple of the ladder's batch, the same for every arm of a size."""
    batches = max(1, baseline_sequences // rung.batch_sequences // sweep.evaluations)
    return batches * rung.batch_sequences * rung.sequence_length
