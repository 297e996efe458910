"""Learning-rate schedules after the warm-up. Add one as a class here and as an entry of `SCHEDULES`."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar


class Schedule(ABC):
    """The learning rate from the end of the warm-up to the last step, relative to the peak rate."""

    kind: ClassVar[str]

    @abstractmethod
    def factor(self, step: int, warmup: int, steps: int) -> float:
        """The learning rate over the peak rate at the 0-based `step`.

        `warmup` is the number of warm-up steps, at most `step`; `steps` is the number of steps of the run.
        """


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a period of a cosine, from the peak rate to zero (arXiv 2606.03825, section 4)."""

    kind = "cosine"

    def factor(self, step: int, warmup: int, steps: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * ((step - warmup) / (steps - warmup))))


@dataclass(frozen=True)
class Linear(Schedule):
    """A linear decay to zero."""

    kind = "linear"

    def factor(self, step: int, warmup: int, steps: int) -> float:
        return 1 - (step - warmup) / (steps - warmup)


@dataclass(frozen=True)
class WarmupStableDecay(Schedule):
    """The peak rate, then a linear decay to zero over the last `decay_fraction` of all steps (arXiv 2404.06395).

    Runs of one arm, size and seed that differ only in their budget share a trunk: see trunks.py.
    """

    kind = "wsd"

    decay_fraction: float

    def __post_init__(self) -> None:
        if not 0 < self.decay_fraction < 1:
            raise ValueError(f"decay_fraction must be between 0 and 1; got {self.decay_fraction}")

    def factor(self, step: int, warmup: int, steps: int) -> float:  # noqa: ARG002
        return min(1.0, (steps - step) / (self.decay_steps(steps) + 1))

    def decay_steps(self, steps: int) -> int:
        """How many of the last of `steps` steps decay; at least one."""
        return max(1, round(self.decay_fraction * steps))


@dataclass(frozen=True)
class Constant(Schedule):
    """The peak rate to the end, as in the trunk of warm-up-stable-decay runs."""

    kind = "constant"

    def factor(self, step: int, warmup: int, steps: int) -> float:  # noqa: ARG002
        return 1.0


SCHEDULES: tuple[type[Schedule], ...] = (Cosine, Linear, WarmupStableDecay, Constant)
AnySchedule = Annotated[Schedule, SCHEDULES]
