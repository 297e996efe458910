"""What `dynconv bench train` measures: arms at sizes, as runs of a sweep that train on random tokens."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from experiments.design import strict
from experiments.design.arms import ARMS, Arm
from experiments.design.config import Execution, RunConfig
from experiments.design.data import DataConfig
from experiments.design.ladder import LADDERS
from experiments.design.model import BACKWARD_OVER_FORWARD, ModelConfig
from experiments.design.recipe import Recipe
from experiments.design.schedules import Constant
from experiments.design.sweep import expand
from experiments.design.sweep_file import Sweep, read_sweep
from experiments.design.train import OPTIMIZERS, Optimizer, TrainConfig

Recompute = Literal["none", "block", "attention-kept"]
DEFAULT_ARMS = ("transformer", "static-qkv", "headwise-qkv", "lowrank-qkv", "lowrank-all")
VOCABULARIES = {"paper": 100_352, "mini": 4096, "nano": 512}  # by ladder, as in experiments/sweeps
ENDLESS = 10**7  # steps of a measured run, far more than are ever taken
_ANY_NUMBER = 1e9  # the largest setting of a sweep; used where the length of the run does not matter


@dataclass(frozen=True)
class Trial:
    """One arm at a size, with an optimizer, on a number of GPUs."""

    run: RunConfig
    gpus: int = 1  # on a CPU, the number of processes
    parallel: str = "none"  # "ddp" or "fsdp" on several GPUs
    micro_batches: int = 1  # per step, on each GPU
    recompute: Recompute = "none"  # as in `Execution`
    fused: bool = True  # as in `Execution`
    own: Execution | None = None  # a profile's execution, for a calibration; None: made from the settings above

    @property
    def batch(self) -> int:
        """Sequences of a micro-batch on each GPU."""
        if self.own is not None and self.own.micro_batch:
            return self.own.micro_batch
        return self.run.train.batch_sequences // self.gpus // self.micro_batches

    @property
    def tokens(self) -> int:
        """Tokens of a step on all GPUs."""
        return self.run.train.batch_sequences * self.run.train.sequence_length

    @property
    def optimizer(self) -> str:
        """The kind of its optimizer."""
        return self.run.train.optimizer.kind

    @property
    def name(self) -> str:
        """A name for messages."""
        where = " not fused" * (not self.fused) + (f" in {self.gpus} processes" if self.gpus > 1 else "")
        return f"{self.run.size} {self.run.arm} {self.optimizer}{where}"

    def execution(self, device: str) -> Execution:
        """How the trial is executed on the device "cuda" or "cpu"."""
        kind: Literal["cpu", "cuda"] = "cuda" if device == "cuda" else "cpu"
        if self.own is not None:
            return replace(self.own, device=kind)
        shared: Literal["ddp", "fsdp"] = "fsdp" if self.parallel == "fsdp" else "ddp"
        return Execution(kind, self.gpus, shared, self.batch, recompute=self.recompute, fused=self.fused)

    def flops(self) -> dict[str, int]:
        """Training FLOPs of a step on all GPUs, by part of the model."""
        length = self.run.train.sequence_length
        sequences = self.run.train.batch_sequences * (1 + BACKWARD_OVER_FORWARD)
        return {part: sequences * count for part, count in flops_by_part(self.run.model, length).items()}


def flops_by_part(model: ModelConfig, sequence_length: int) -> dict[str, int]:
    """FLOPs of one forward pass over one sequence, for "mixer", "ffn", "convolutions" (with generators) and "head".

    Their sum is that of `ModelConfig.forward_flops`.
    """
    total = model.forward_flops(sequence_length)
    found = {
        name: model.layers * sum(part.forward_flops(model.width, sequence_length).values())
        for name, part in (("mixer", model.mixer), ("ffn", model.ffn))
    }
    found["head"] = total["head"]
    return found | {"convolutions": sum(total.values()) - sum(found.values())}


@dataclass(frozen=True)
class Request:
    """The request of the command line."""

    sizes: tuple[str, ...]
    arms: tuple[str, ...] = ()  # empty: all of the sweep, or DEFAULT_ARMS
    optimizers: tuple[str, ...] = ()  # empty: the arm's own
    sweep: Path | None = None
    batch: int | None = None  # sequences of a micro-batch; None: as in a run
    micro_batches: int = 1  # per step, on each GPU
    sequence: int | None = None  # None: the ladder's
    gpus: int = 1
    parallel: str = "ddp"
    recompute: Recompute = "none"
    fused: tuple[bool, ...] = (True,)


def trials(request: Request, size: str, micro_batch_tokens: int, batch: int | None = None) -> list[Trial]:
    """The trials of one size, ordered by number of GPUs, then optimizer, then `fused`, then arm.

    `batch`, if given, replaces the request's. Without either, a micro-batch is what a run would use: the recipe's
    batch, but at most `micro_batch_tokens`. Raises ValueError for a size, an arm or an optimizer that is not known,
    for numbers below 1, and for a batch that separates sequences that read one another.
    """
    for name in ("batch", "sequence", "micro_batches", "gpus"):
        value = getattr(request, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}")
    sweep = _sweep(request, size)
    known = {optimizer.kind: optimizer for optimizer in OPTIMIZERS}
    for kind in request.optimizers:
        strict.choose(kind, known, "--optimizer")
    optimizers: list[Optimizer | None] = [known[kind]() for kind in request.optimizers]
    runs = expand(sweep)
    group = max(run.model.sequence_group for run in runs)  # sequences that read one another; all arms take one batch
    if request.batch is not None and request.batch % group:
        raise ValueError(
            f"--batch must be a multiple of {group}, as the sequences of {_grouped_arm(runs)} read one another in "
            f"groups of so many; got {request.batch}; change it, or leave the arm out of --arms"
        )
    found = []
    for gpus, optimizer, fused, run in itertools.product(
        dict.fromkeys((1, request.gpus)), optimizers or [None], request.fused, runs
    ):
        length = request.sequence or run.train.sequence_length
        fitting = min(run.train.batch_sequences, max(1, micro_batch_tokens // length))
        fitting = max(group, fitting // group * group)
        sequences = (batch or request.batch or fitting) * request.micro_batches * gpus
        train = _endless(run.train, sequences, length)
        if optimizer is not None:
            train = replace(train, optimizer=optimizer)
        parallel = "none" if gpus == 1 else request.parallel
        how = (request.micro_batches, request.recompute, fused)
        found.append(Trial(replace(run, train=train), gpus, parallel, *how))
        found[-1].execution("cpu").check(found[-1].run)
    return found


def _grouped_arm(runs: Sequence[RunConfig]) -> str:
    return max(runs, key=lambda run: run.model.sequence_group).arm


def calibration_trial(run: RunConfig, execution: Execution) -> Trial:
    """A run of a sweep as it would be executed, except that it never ends."""
    train = replace(_endless(run.train, run.train.batch_sequences, run.train.sequence_length), branch_steps=())
    parallel = "none" if execution.gpus == 1 else execution.parallel
    return Trial(replace(run, train=train), execution.gpus, parallel, recompute=execution.recompute, own=execution)


def _endless(train: TrainConfig, sequences: int, length: int) -> TrainConfig:
    """Settings of a run that is never evaluated and never ends.

    The warm-up lasts for the whole run, so the learning rate is near zero, and random tokens do not spoil the weights.
    """
    tokens = ENDLESS * sequences * length
    return replace(
        train,
        tokens=tokens,
        sequence_length=length,
        batch_sequences=sequences,
        evaluate_every=tokens,
        warmup_steps=ENDLESS,
        schedule=Constant(),
    )


def _sweep(request: Request, size: str) -> Sweep:
    """A sweep with one run of each chosen arm at this size. Raises ValueError for unknown sizes and arms."""
    own: dict[str, Arm] = {}  # arms that the file defines
    arms: tuple[str, ...] = DEFAULT_ARMS
    if request.sweep is None:
        ladders = {each: name for name in VOCABULARIES for each in LADDERS[name].sizes}
        ladder = ladders[strict.choose(size, ladders, "size")]
        train, vocabulary = Recipe(), VOCABULARIES[ladder]
    else:
        given = read_sweep(request.sweep)
        if given.data is None:
            raise ValueError(f"--sweep {request.sweep} has no [data]; give a sweep on text")
        ladder, train, own, vocabulary = given.ladder, given.train, dict(given.arm), given.data.vocabulary
        strict.choose(size, LADDERS[ladder].sizes, f"sizes of ladder {ladder!r}")
        arms = (given.baseline, *(arm for arm in given.arms if arm != given.baseline))
    for arm in request.arms:
        strict.choose(arm, ARMS | own, "--arms")
    arms = tuple(dict.fromkeys(request.arms or arms))
    return Sweep(
        name="bench",
        ladder=ladder,
        sizes=(size,),
        arms=arms,
        baseline=arms[0],
        seeds=(0,),
        match="tokens",
        data=DataConfig(vocabulary=vocabulary, train_tokens=2**62, validation_tokens=2**31),
        tokens_per_parameter=_ANY_NUMBER,
        max_epochs=_ANY_NUMBER,
        train=train,
        arm=own,
    )
