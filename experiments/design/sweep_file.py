"""The content of a sweep file, and the checks that need only the file itself. sweep.py expands it to runs."""

import difflib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from experiments import source
from experiments.design import strict
from experiments.design.arms import ARMS, Arm
from experiments.design.config import TEXT
from experiments.design.data import DataConfig, relative_to
from experiments.design.ladder import LADDERS
from experiments.design.recipe import BUDGET_AXIS, Recipe, check_axes
from experiments.tasks.registry import AnyTask

LARGEST_SETTING = 1e9  # far above any real sweep; larger numbers would overflow later
Values = tuple[float, ...]  # values of an axis
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # legal names, since folders are named after sweeps and arms


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
    # The budget is either the training tokens per parameter of the baseline, given here or in [vary], or the number of
    # the baseline's optimizer steps, which is the same at all sizes.
    tokens_per_parameter: float | None = None
    count: Literal["total", "active"] = "total"  # parameters that tokens_per_parameter counts: N or N_active
    steps: int | None = None
    # task -> its number of steps in place of `steps`, for example because its training set is smaller
    steps_by_task: Mapping[str, int] = field(default_factory=dict)
    packed: bool = False  # keep the documents of a sequence of text apart: data/packing.py
    evaluations: int = 8  # number of evaluations during a run, in addition to the one at its end
    max_epochs: float = 4.0  # passes over the training data; a run with more is refused
    train: Recipe = field(default_factory=Recipe)
    # size -> its seeds in place of `seeds`: more where noise is larger, or fewer where runs are expensive
    seeds_by_size: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    # axis -> its values; every combination is a run
    vary: Mapping[str, Values] = field(default_factory=dict)
    # arm -> axis of `vary` -> the arm's own values, such as other learning rates; or size -> the arm's values there
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
        self._check_budget()
        self._check_recipes()

    def _check_names(self) -> None:
        """Raises ValueError for names of a ladder, size, arm or task that do not exist."""
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
        """Raises ValueError for illegal axes in `vary` and `vary_by_arm`."""
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

    def _check_budget(self) -> None:
        """Raises ValueError unless exactly one budget is given, and every number of steps and tokens is legal."""
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

    def _check_recipes(self) -> None:
        """Raises ValueError if a recipe gives a setting that is also an axis."""
        for where, recipe in [
            ("train", self.train),
            *((f"arm.{name}.train", arm.train) for name, arm in self.arm.items()),
        ]:
            for axis in self.vary:
                if getattr(recipe, axis, None) is not None:
                    raise ValueError(f"{axis} is in [vary] and in [{where}]; remove one of the two")

    def points(self, arm: str, size: str) -> Iterator[dict[str, float]]:
        """Every combination of an arm's values of the axes, each as axis -> value. A single empty one without axes."""
        axes = dict(self.vary)
        for axis, values in self.vary_by_arm.get(arm, {}).items():
            axes[axis] = values.get(size, self.vary[axis]) if isinstance(values, Mapping) else values
        for values in itertools.product(*axes.values()):
            yield dict(zip(axes, values, strict=True))


def read_sweep(path: Path) -> Sweep:
    """Read a sweep file. Relative paths of its data that exist in the file's folder are taken from there.

    Raises ValueError if the file is missing or has anything illegal in it.
    """
    if not path.is_file() and (meant := near_sweep(path)):
        raise ValueError(f"{path}: no sweep file; did you mean {meant}?")
    sweep = strict.load(path, Sweep)
    return sweep if sweep.data is None else replace(sweep, data=relative_to(sweep.data, path.resolve().parent))


def near_sweep(path: Path) -> Path | None:
    """The sweep file that the user may have meant by a path that does not exist, such as `demo`; None if there is none.

    It is the path with ".toml" added, or the shipped sweep of the most similar name.
    """
    beside = path.parent / f"{path.name}.toml"
    shipped = {each.stem: each for each in (source.root() / "experiments" / "sweeps").glob("*.toml")}
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    found = beside if beside.is_file() else shipped[near[0]] if near else None
    return found.relative_to(Path.cwd()) if found and found.is_relative_to(Path.cwd()) else found
