"""A sweep file -> a list of frozen runs whose compute is matched. A new arm is an entry of `ARMS`, or a table
`[arm.NAME]` in the sweep file."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from experiments.design import flops, strict
from experiments.design.config import ConvConfig, Kind, ModelConfig, RunConfig, Site, TrainConfig
from experiments.design.data import DataConfig
from experiments.design.ladder import LADDERS, Rung

FLOPS_TOLERANCE = 1e-3  # of the baseline's FLOPs, under match = "flops"
MOST = 1e9  # far beyond any sweep's numbers, far below where they overflow
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # of sweeps and arms, after which folders are named
USED = {  # what each kind takes of an arm's keys; the others are every arm's
    "none": (),
    "static": ("width", "residual"),
    "headwise": ("width", "residual", "static_filter", "head_size"),
    "lowrank": ("width", "residual", "static_filter", "rank"),
}


@dataclass(frozen=True)
class Arm:
    """One architecture variant. `rank` and `head_size` default to the ladder's."""

    kind: Kind = "none"
    sites: tuple[Site, ...] = ()
    width: int = 4
    rank: int | None = None
    head_size: int | None = None
    residual: bool = True
    static_filter: bool = True
    qk_norm: bool = False
    kv_heads: int | None = None  # grouped-query attention; default: as many as query heads

    def __post_init__(self) -> None:
        for key in fields(self):
            takers = [kind for kind, keys in USED.items() if key.name in keys]
            if takers and self.kind not in takers and getattr(self, key.name) != key.default:
                raise ValueError(
                    f"{key.name} is for kind {' or '.join(takers)}; "
                    f"got {getattr(self, key.name)!r} with kind {self.kind!r}; remove it or change kind"
                )


_QKV: tuple[Site, ...] = ("q", "k", "v")
_ALL_LINEAR: tuple[Site, ...] = (*_QKV, "o", "gate", "up", "down")

ARMS = {
    "transformer": Arm(),
    "static-qkv": Arm("static", _QKV),
    "headwise-qkv": Arm("headwise", _QKV),
    "lowrank-qkv": Arm("lowrank", _QKV),
    "lowrank-all": Arm("lowrank", _ALL_LINEAR),
}


@dataclass(frozen=True)
class Sweep:
    """The file's content: what a person writes."""

    name: str
    ladder: str
    sizes: tuple[str, ...]
    arms: tuple[str, ...]
    baseline: str
    seeds: tuple[int, ...]
    tokens_per_parameter: float  # of the baseline's total N
    match: Literal["tokens", "flops"]
    data: DataConfig
    evaluations: int = 8  # on the held-out set during a run, beside the one at its end
    max_epochs: float = 4.0  # over the data; more is refused
    arm: Mapping[str, Arm] = field(default_factory=dict)  # the file's own arms

    def __post_init__(self) -> None:
        for name in ("sizes", "arms", "seeds"):
            values = getattr(self, name)
            if not values:
                raise ValueError(f"{name} is empty; name at least one")
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names one twice; got {list(values)}")
        for name in ("tokens_per_parameter", "evaluations", "max_epochs"):
            if not 0 < getattr(self, name) <= MOST:  # nor is it so for nan
                raise ValueError(f"{name} must be above zero, at most {MOST:g}; got {getattr(self, name)}; correct it")
        for seed in self.seeds:
            if not 0 <= seed < 2**63:
                raise ValueError(f"seeds must be 0 to 2**63 - 1; got {seed}; choose another")
        for key, name in [("name", self.name), *(("arm", name) for name in self.arm)]:
            if not NAME.fullmatch(name):
                raise ValueError(
                    f"{key} must be letters, digits, '_', '.' and '-', the first a letter or a digit, "
                    f"as a folder is named after it; got {name!r}; rename it"
                )
        strict.choose(self.ladder, LADDERS, "ladder")
        for size in self.sizes:
            strict.choose(size, LADDERS[self.ladder].sizes, f"sizes of ladder {self.ladder!r}")
        known = ARMS | dict(self.arm)
        for arm in self.arms:
            strict.choose(arm, known, "arms")
        strict.choose(self.baseline, self.arms, "baseline: one of this sweep's arms is wanted")
        redefined = sorted(set(self.arm) & set(ARMS))
        if redefined:
            raise ValueError(f"arm {redefined[0]!r} is built in; give your variant another name")


def load_sweep(path: Path) -> list[RunConfig]:
    """All runs of a sweep file.

    Raises ValueError for anything illegal in it, for compute that cannot be matched within 0.1%, and for more
    epochs over the data than the sweep allows.
    """
    sweep = strict.load(path, Sweep)
    try:
        return expand(sweep)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def expand(sweep: Sweep) -> list[RunConfig]:
    """All runs, by size, then arm, then seed."""
    for size in sweep.sizes:
        for arm in sweep.arm:
            _model(sweep, size, arm)  # also those that `arms` leaves out for now
    return [_run(sweep, size, arm, seed) for size in sweep.sizes for arm in sweep.arms for seed in sweep.seeds]


def _run(sweep: Sweep, size: str, arm: str, seed: int) -> RunConfig:
    ladder = LADDERS[sweep.ladder]
    rung = ladder.sizes[size]
    _check_data(sweep.data, rung, size)
    baseline = _model(sweep, size, sweep.baseline)
    model = _model(sweep, size, arm)
    baseline_sequences = round(sweep.tokens_per_parameter * flops.parameters(baseline) / rung.sequence_length)
    if baseline_sequences < rung.batch_sequences:
        raise ValueError(
            f"{size}: tokens_per_parameter = {sweep.tokens_per_parameter} gives {baseline_sequences} sequences; "
            f"one batch takes {rung.batch_sequences}; raise it"
        )
    sequences = baseline_sequences
    if sweep.match == "flops":
        sequences = _matched_sequences(baseline, model, baseline_sequences, rung.sequence_length, f"{arm} {size}")
    train = TrainConfig(
        tokens=sequences * rung.sequence_length,
        sequence_length=rung.sequence_length,
        batch_sequences=rung.batch_sequences,
        learning_rate=rung.learning_rate,
        warmup_fraction=ladder.warmup_fraction,
        evaluate_every=_evaluation_interval(sweep, rung, baseline_sequences),
        held_out_sequences=(sweep.data.validation_tokens - 1) // rung.sequence_length,
    )
    run = RunConfig(
        sweep.name, arm, sweep.baseline, sweep.ladder, size, seed, model=model, train=train, data=sweep.data
    )
    if epochs(run) > sweep.max_epochs:
        raise ValueError(
            f"{arm} {size} would read the data {epochs(run):.1f} times; at most max_epochs = {sweep.max_epochs:g} "
            "is allowed; raise train_tokens or max_epochs, or lower tokens_per_parameter"
        )
    return run


def _check_data(data: DataConfig, rung: Rung, size: str) -> None:
    """Each split must hold a sequence and the token after it."""
    for name in ("train_tokens", "validation_tokens"):
        if getattr(data, name) <= rung.sequence_length:
            raise ValueError(
                f"{size}: data.{name} must be above the sequence length, {rung.sequence_length}; "
                f"got {getattr(data, name)}; raise it"
            )


def epochs(run: RunConfig) -> float:
    """Passes over the training tokens."""
    return run.train.tokens / run.data.train_tokens


def _matched_sequences(
    baseline: ModelConfig, model: ModelConfig, baseline_sequences: int, sequence_length: int, where: str
) -> int:
    """Whole sequences at which the model's exact training FLOPs equal the baseline's."""
    budget = baseline_sequences * flops.training_flops_per_sequence(baseline, sequence_length)
    each = flops.training_flops_per_sequence(model, sequence_length)
    sequences = round(budget / each)
    error = sequences * each / budget - 1
    if abs(error) > FLOPS_TOLERANCE:
        raise ValueError(
            f"{where}: FLOPs match the baseline's only within {error:+.2%}, 0.1% is wanted; "
            "raise tokens_per_parameter, so that one sequence is a smaller share"
        )
    return sequences


def _model(sweep: Sweep, size: str, name: str) -> ModelConfig:
    try:
        return _build_model(sweep, size, (ARMS | dict(sweep.arm))[name])
    except ValueError as error:
        raise ValueError(f"arm.{name} at {size}: {error}") from None


def _build_model(sweep: Sweep, size: str, arm: Arm) -> ModelConfig:
    ladder = LADDERS[sweep.ladder]
    rung = ladder.sizes[size]
    conv = ConvConfig(arm.kind, arm.sites, arm.width, residual=arm.residual, static_filter=arm.static_filter)
    if arm.kind == "lowrank":
        conv = replace(conv, rank=ladder.rank if arm.rank is None else arm.rank)
    if arm.kind == "headwise":
        conv = replace(conv, head_size=ladder.head_size if arm.head_size is None else arm.head_size)
    return ModelConfig(
        layers=rung.layers,
        width=rung.width,
        ffn=rung.ffn,
        heads=rung.heads,
        kv_heads=rung.heads if arm.kv_heads is None else arm.kv_heads,
        vocabulary=sweep.data.vocabulary,
        qk_norm=arm.qk_norm,
        init_std=ladder.init_std,
        conv=conv,
    )


def _evaluation_interval(sweep: Sweep, rung: Rung, baseline_sequences: int) -> int:
    """Tokens between evaluations: whole batches, the same for every arm of a size."""
    batches = max(1, baseline_sequences // rung.batch_sequences // sweep.evaluations)
    return batches * rung.batch_sequences * rung.sequence_length
