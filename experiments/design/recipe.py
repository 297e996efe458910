"""The training settings of a sweep file: `[train]`, an arm's `[arm.NAME.train]`, and the axes of `[vary]`."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from experiments.design import strict
from experiments.design.schedules import AnySchedule
from experiments.design.train import AnyOptimizer

BUDGET_AXIS = "tokens_per_parameter"
AXES = {  # setting that [vary] may list -> whether its values must be whole numbers
    "learning_rate": False,
    "learning_rate_factor": False,
    "batch_sequences": True,
    "warmup_fraction": False,
    "weight_decay": False,
    "clip_norm": False,
    BUDGET_AXIS: False,
}


@dataclass(frozen=True)
class Recipe:
    """Training settings. None: an arm takes the setting from the sweep's [train], and that takes it from the ladder."""

    learning_rate: float | None = None  # at its peak
    learning_rate_factor: float | None = None  # multiplies the peak rate, given here or by the ladder
    batch_sequences: int | None = None
    warmup_fraction: float | None = None  # share of the steps; with schedule "wsd", of the steps of the smallest budget
    schedule: AnySchedule | None = None
    optimizer: AnyOptimizer | None = None
    weight_decay: float | None = None
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        for name in ("learning_rate", "learning_rate_factor", "batch_sequences", "clip_norm"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be above zero and finite; got {value}; correct it")
        if self.weight_decay is not None and not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must be at least zero and finite; got {self.weight_decay}; correct it")
        if self.warmup_fraction is not None and not 0 <= self.warmup_fraction < 1:
            raise ValueError(f"warmup_fraction must be at least 0 and below 1; got {self.warmup_fraction}; correct it")

    def over(self, other: "Recipe") -> "Recipe":
        """This recipe, with the settings that it leaves None taken from `other`."""
        settings = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(other, **{name: value for name, value in settings.items() if value is not None})

    def varied(self, axes: Mapping[str, float]) -> "Recipe":
        """This recipe with the settings of one point of the sweep's axes."""
        settings: dict[str, Any] = {
            name: int(value) if AXES[name] else value for name, value in axes.items() if name != BUDGET_AXIS
        }
        return dataclasses.replace(self, **settings)


def check_axes(vary: Mapping[str, tuple[float, ...]], where: str) -> None:
    """Raises ValueError if an axis is not one of AXES, or its values are not different, finite and above zero.

    `where` is the key of the table in the sweep file, for the message.
    """
    for axis, values in vary.items():
        strict.choose(axis, AXES, f"{where}: an axis must be a setting of the runs")
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{where}.{axis} must list different numbers; got {list(values)}; correct it")
        for value in values:
            if not 0 < value < math.inf:
                raise ValueError(f"{where}.{axis} must hold finite numbers above zero; got {value}; correct it")
            if AXES[axis] and value != int(value):
                raise ValueError(f"{where}.{axis} must hold whole numbers; got {value}; correct it")
