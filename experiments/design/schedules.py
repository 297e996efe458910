"""Learning-rate schedules: the factor on the peak rate after the warm-up. A new one is a class and its name here."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar


class Schedule(ABC):
    """What happens between the warm-up and the last step."""

    kind: ClassVar[str]

    @abstractmethod
    def factor(self, step: int, warmup: int, steps: int) -> float:
        """The rate of the 0-based `step`, at or after the first `warmup` of all `steps`, over the peak rate."""


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine, to zero (arXiv 2606.03825, section 4)."""

    kind = "cosine"

    def factor(self, step: int, warmup: int, steps: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * ((step - warmup) / (steps - warmup))))


@dataclass(frozen=True)
class Linear(Schedule):
    """A straight line to zero."""

    kind = "linear"

    def factor(self, step: int, warmup: int, steps: int) -> float:
        return 1 - (step - warmup) / (steps - warmup)


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """The peak rate, then a straight line to zero over the last `decay_fraction` of all steps (arXiv 2404.06395).

    Budgets of one arm, size and seed are branches of one trunk, which trains at the peak rate.
    """

    kind = "wsd"

    decay_fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.decay_fraction < 1:
            raise ValueError(f"decay_fraction must be between 0 and 1; got {self.decay_fraction}")

    def factor(self, step: int, warmup: int, steps: int) -> float:  # noqa: ARG002
        return min(1.0, (steps - step) / (self.decay_steps(steps) + 1))

    def decay_steps(self, steps: int) -> int:
        """How many of all `steps` have less than the peak rate; at least one."""
        return max(1, round(self.decay_fraction * steps))


@dataclass(frozen=True)
class Constant(Schedule):
    """The peak rate to the end: the trunk of warm-up-stable-decay branches."""

    kind = "constant"

    def factor(self, step: int, warmup: int, steps: int) -> float:  # noqa: ARG002
        return 1.0


SCHEDULES: tuple[type[Schedule], ...] = (Cosine, Linear, WarmupStableDecay, Constant)
AnySchedule = Annotated[Schedule, SCHEDULES]
