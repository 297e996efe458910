"""How a run is optimised. Together with the model, the data and the seed, these settings decide its outcome."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from experiments.design.identity import OUTSIDE_ID
from experiments.design.schedules import AnySchedule, Cosine


class Optimizer:
    """Settings of an optimizer, which the function for its kind in experiments/training/optimizers.py makes."""

    kind: ClassVar[str]


def _check_settings(averages: Mapping[str, float], epsilon: float) -> None:
    """Raises ValueError for decay rates of moving averages outside [0, 1), and for a negative or infinite epsilon."""
    for name, value in averages.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be at least 0 and below 1; got {value}; correct it")
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon must be at least 0 and finite; got {epsilon}; correct it")


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv 1711.05101).

    arXiv 2606.03825 does not give the betas and epsilon; these defaults are what its authors use in other work.
    """

    kind = "adamw"

    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-10

    def __post_init__(self) -> None:
        _check_settings({"beta1": self.beta1, "beta2": self.beta2}, self.epsilon)


@dataclass(frozen=True)
class Muon(Optimizer):
    """Orthogonalised momentum for the matrices of linear maps, AdamW for all other parameters (arXiv 2502.16982).

    Updates are scaled to the root mean square of AdamW's, so that both use the same learning rate.
    """

    kind = "muon"

    momentum: float = 0.95
    beta1: float = 0.9  # this and the two below are AdamW's
    beta2: float = 0.95
    epsilon: float = 1e-10

    def __post_init__(self) -> None:
        _check_settings({"momentum": self.momentum, "beta1": self.beta1, "beta2": self.beta2}, self.epsilon)


OPTIMIZERS: tuple[type[Optimizer], ...] = (AdamW, Muon)
AnyOptimizer = Annotated[Optimizer, OPTIMIZERS]


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of one run: a linear warm-up to the peak rate, then the schedule."""

    tokens: int  # D, a whole number of sequences
    sequence_length: int
    batch_sequences: int  # sequences in a batch over all processes; the last batch of a run may have fewer
    learning_rate: float  # at its peak
    held_out_sequences: int
    warmup_steps: int
    # tokens between evaluations; the same for every arm of a size, so that losses during training compare
    evaluate_every: int = field(metadata=OUTSIDE_ID)
    schedule: AnySchedule = field(default_factory=Cosine)
    optimizer: AnyOptimizer = field(default_factory=AdamW)
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # largest norm of the gradient; the paper does not state one
    branch_steps: tuple[int, ...] = ()  # of a trunk only: the steps after which its branches begin

    @property
    def sequences(self) -> int:
        """The number of training sequences."""
        return self.tokens // self.sequence_length

    @property
    def steps(self) -> int:
        """The number of optimizer steps."""
        return -(-self.sequences // self.batch_sequences)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of the 0-based `step`."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * self.schedule.factor(step, self.warmup_steps, self.steps)
