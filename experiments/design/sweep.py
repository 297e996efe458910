"""Expand a sweep file to a list of frozen runs whose compute is matched."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from experiments.design import strict
from experiments.design.arms import ARMS, Arm
from experiments.design.config import TEXT, RunConfig
from experiments.design.data import DataConfig, missing
from experiments.design.ladder import LADDERS, Rung
from experiments.design.model import ModelConfig
from experiments.design.recipe import BUDGET_AXIS, Recipe
from experiments.design.schedules import Cosine
from experiments.design.sweep_file import LARGEST_SETTING, Sweep, read_sweep
from experiments.design.train import AdamW, TrainConfig
from experiments.design.trunks import with_trunks

FLOPS_TOLERANCE = 1e-3  # relative to the baseline's FLOPs, with match = "flops"
LARGEST_RATE = 1.0  # AdamW and Muon move each weight by about the learning rate in a step; initial weights are below .1


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


def load_at(path: Path, sizes: Sequence[str]) -> list[RunConfig]:
    """All runs that a sweep file would have with these sizes added, to compare its settings there with other runs'.

    Raises ValueError if the sweep's ladder lacks one of the sizes.
    """
    sweep = read_sweep(path)
    known = LADDERS[sweep.ladder].sizes
    if absent := [size for size in sizes if size not in known]:
        raise ValueError(
            f"{path} is of ladder {sweep.ladder!r}, whose sizes are {', '.join(known)}; got {', '.join(absent)}; "
            "give a sweep of the ladder that these runs are of"
        )
    added = tuple(size for size in dict.fromkeys(sizes) if size not in sweep.sizes)
    return expand(replace(sweep, sizes=sweep.sizes + added, max_epochs=LARGEST_SETTING))


def notes(sweep: Sweep) -> list[str]:
    """Warnings about settings that are legal but perhaps unintended."""
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
    """Everything about an arm that decides the outcome of its runs: model, recipe, and points of the axes."""
    model = _model(sweep, next(iter(sweep.task), TEXT), size, arm)
    return model, _recipe(sweep, arm), list(sweep.points(arm, size))


def _rates(sweep: Sweep, size: str, arm: str) -> list[float]:
    """The peak learning rates of an arm at a size, one for each point of the axes."""
    rung = LADDERS[sweep.ladder].sizes[size]
    return [_peak_rate(rung, _recipe(sweep, arm, point)) for point in sweep.points(arm, size)]


def expand(sweep: Sweep) -> list[RunConfig]:
    """All runs, ordered by task, size, arm, seed and point of the axes. A trunk comes before its branches.

    Raises ValueError as `load_sweep` does.
    """
    runs = []
    for task in sweep.task or (TEXT,):
        for size in sweep.sizes:
            for arm in sweep.arm:
                _model(sweep, task, size, arm)  # Also check arms that the file defines but `arms` does not list.
        for size, arm in itertools.product(sweep.sizes, sweep.arms):
            for seed in sweep.seeds_by_size.get(size, sweep.seeds):
                runs += with_trunks([_run(sweep, task, size, arm, seed, point) for point in sweep.points(arm, size)])
    _refuse_equal_runs(runs)
    return runs


def _refuse_equal_runs(runs: Sequence[RunConfig]) -> None:
    """Raises ValueError if two points of [vary] give the same run, for example two warm-up fractions that round to the
    same number of steps.

    A run's record has one value on each axis, so the other point would be missing from every table.
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
    """The rung of a size, with the sequence length of a generated task. Raises ValueError if text is too short."""
    rung = LADDERS[sweep.ladder].sizes[size]
    if sweep.data is None:
        return replace(rung, sequence_length=sweep.task[task].sequence_length)
    _check_data(sweep.data, rung, size)
    return rung


def _run(sweep: Sweep, task: str, size: str, arm: str, seed: int, point: Mapping[str, float]) -> RunConfig:
    """One run. Raises ValueError if its budget is below one batch, cannot be matched, or takes too many epochs."""
    rung = _rung(sweep, task, size)
    baseline = _model(sweep, task, size, sweep.baseline)
    model = _model(sweep, task, size, arm)
    recipe = _recipe(sweep, arm, point)
    batch = rung.batch_sequences if recipe.batch_sequences is None else recipe.batch_sequences
    baseline_sequences, budget = _budget(sweep, task, rung, baseline, point)
    if baseline_sequences < batch:
        raise ValueError(f"{size}: {budget} gives {baseline_sequences} sequences; one batch takes {batch}; raise it")
    sequences = baseline_sequences
    if sweep.match == "flops":
        sequences = _matched_sequences(baseline, model, baseline_sequences, rung.sequence_length, f"{arm} {size}")
    run = RunConfig(
        sweep=sweep.name,
        arm=arm,
        baseline=sweep.baseline,
        ladder=sweep.ladder,
        size=size,
        budget=budget,
        seed=seed,
        model=model,
        train=_train(sweep, task, rung, recipe, batch, sequences, baseline_sequences),
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
    """(number of the baseline's training sequences, budget in words)."""
    steps = sweep.steps_by_task.get(task, sweep.steps)
    if steps is not None:
        batch = _recipe(sweep, sweep.baseline, point).batch_sequences
        return steps * (batch or rung.batch_sequences), f"{steps} steps"
    tokens_per_parameter = point.get(BUDGET_AXIS, sweep.tokens_per_parameter)
    assert tokens_per_parameter is not None
    counted = baseline.parameters() if sweep.count == "total" else baseline.parameters_active()
    sequences = round(tokens_per_parameter * counted / rung.sequence_length)
    return sequences, f"{tokens_per_parameter:g} tokens per {'' if sweep.count == 'total' else 'active '}parameter"


def _peak_rate(rung: Rung, recipe: Recipe) -> float:
    """The peak learning rate: rate times factor. Raises ValueError if it underflows or overflows."""
    rate = rung.learning_rate if recipe.learning_rate is None else recipe.learning_rate
    factor = 1.0 if recipe.learning_rate_factor is None else recipe.learning_rate_factor
    if not 0 < rate * factor < math.inf:
        raise ValueError(
            f"learning_rate times learning_rate_factor must be above zero and finite; got {rate:g} times {factor:g}; "
            "correct one of them"
        )
    return rate * factor


def _train(
    sweep: Sweep,
    task: str,
    rung: Rung,
    recipe: Recipe,
    batch: int,  # sequences of a batch
    sequences: int,  # training sequences of the run
    baseline_sequences: int,  # those of the baseline, by which all arms of a size are evaluated at the same tokens
) -> TrainConfig:
    """The training settings of a run."""
    batches = max(1, baseline_sequences // rung.batch_sequences // sweep.evaluations)  # between two evaluations
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
        evaluate_every=batches * rung.batch_sequences * rung.sequence_length,
        held_out_sequences=held_out,
        warmup_steps=max(1, round(fraction * -(-sequences // batch))),
        schedule=recipe.schedule or Cosine(),
        optimizer=recipe.optimizer or AdamW(),
        **{name: value for name, value in chosen.items() if value is not None},
    )


def _check_data(data: DataConfig, rung: Rung, size: str) -> None:
    """Raises ValueError if a split is shorter than one sequence and the token after it, the sequence's last target."""
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
    """An arm that the file defines, or a built-in one."""
    return sweep.arm[name] if name in sweep.arm else ARMS[name]


def _recipe(sweep: Sweep, arm: str, point: Mapping[str, float] | None = None) -> Recipe:
    """The training settings of an arm, at a point of the axes."""
    return _arm(sweep, arm).train.over(sweep.train).varied(point or {})


def _model(sweep: Sweep, task: str, size: str, name: str) -> ModelConfig:
    """The model of the arm `name` at a size. Raises ValueError if the arm does not fit the size."""
    vocabulary = sweep.task[task].vocabulary if sweep.data is None else sweep.data.vocabulary
    try:
        model = _build_model(sweep, vocabulary, size, _arm(sweep, name))
        return replace(model, reads_last_token=task in sweep.task and sweep.task[task].reads_last_token)
    except ValueError as error:
        raise ValueError(f"arm.{name} at {size}: {error}") from None


def _build_model(sweep: Sweep, vocabulary: int, size: str, arm: Arm) -> ModelConfig:
    """An arm's model with the shapes of the ladder. The sites of its convolution depend on the other parts."""
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
