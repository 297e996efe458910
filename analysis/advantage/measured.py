"""Estimates the law and the noise from finished runs, as inputs to the simulation of a design (planning.py)."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from analysis.advantage.comparable import comparable
from analysis.advantage.paired import EXPONENTS, Local, local_multipliers
from analysis.advantage.pairs import Pairs, pair, usable
from analysis.advantage.planning import Ladder, World
from analysis.advantage.seeds import by_power, scatter
from analysis.errors import Refusal
from analysis.logs.learning import failed_runs
from analysis.logs.schema import CONVENTIONS, axis_columns, fact_columns
from analysis.logs.selection import choose_baseline, choose_convention

if TYPE_CHECKING:
    import pandas as pd

FEWEST_SIZES = 4  # with three, fitting E, a and g leaves no degrees of freedom for the noise of the arms' mean


@dataclass(frozen=True)
class Assumption:
    """One input number of the simulation, and where it comes from."""

    name: str  # also the name of the option that changes it
    value: float
    source: str


def measured(runs: pd.DataFrame, baseline: str | None = None) -> tuple[World, list[Assumption]]:
    """(inputs of the simulation, source of each). Inputs that cannot be estimated from the runs are World's defaults.

    Seed noise is the standard deviation of paired seeds' loss differences over the square root of 2, pooled over arms
    and sizes; with one arm, the standard deviation over its seeds. The arms' noise is the part of the variance of the
    differences about a constant m that the seed noise of each size does not explain. Shared noise is the part of the
    variance of the arms' mean loss about the law that the other two do not explain. Estimates of variance below zero
    become zero. The law is that of the baseline and the first arm with enough sizes.
    """
    found: dict[str, tuple[float, str]] = {}
    rows, paired = _paired(runs, baseline)
    seeds = _seed_noise(paired, rows, CONVENTIONS[choose_convention(runs)])
    if seeds is not None:
        found["seed_noise"] = seeds
    laws = [(each, _law(each)) for each in paired if len(each.sizes) >= FEWEST_SIZES]
    laws = [(each, law) for each, law in laws if EXPONENTS[0] * 1.01 < law.law.g[0] < EXPONENTS[1] / 1.01]
    if laws:
        found |= _noise_over_sizes(laws, found["seed_noise"][0] if "seed_noise" in found else 0.0)
        found |= _shape(*laws[0])
    world = replace(World(), **{name: value for name, (value, _) in found.items()})
    return world, [
        Assumption(name, value, found[name][1] if name in found else "assumed, not measured")
        for name, value in vars(world).items()
    ]


def seed_noise_by_size(runs: pd.DataFrame, ladder: Ladder, baseline: str | None = None) -> tuple[dict[str, float], str]:
    """(size -> standard deviation of a run's loss over seeds in nats a token, its source in words).

    It is a power of compute as in the analysis (seeds.py), fitted to the paired seeds of all arms. Empty if there are
    too few paired seeds to show how it changes with size.
    """
    squares, dof = np.zeros(len(ladder.sizes)), np.zeros(len(ladder.sizes))
    for each in _paired(runs, baseline)[1]:
        for size, d in zip(each.sizes, each.differences, strict=True):
            if size in ladder.sizes:
                squares[ladder.sizes.index(size)] += float(((d - d.mean()) ** 2).sum()) / 2
                dof[ladder.sizes.index(size)] += len(d) - 1
    found = by_power(ladder.compute, squares[None], np.ones(len(dof)), dof)
    if found is None or not found.differs_by_size:
        return {}, ""
    source = f"measured: paired seeds, a power of compute, {dof.sum():.0f} degrees of freedom"
    return dict(zip(ladder.sizes, map(float, np.sqrt(found.variance[0])), strict=True)), source


def _paired(runs: pd.DataFrame, baseline: str | None) -> tuple[pd.DataFrame, list[Pairs]]:
    """(the finished runs, the pairs of every arm that can be compared at two sizes or more)."""
    rows, _ = usable(runs)
    convention = choose_convention(runs)
    arms = list(dict.fromkeys(rows["arm"]))
    if len(arms) < 2:
        return rows, []
    baseline = choose_baseline(runs, baseline)
    paired: list[Pairs] = []
    for arm in arms:
        with contextlib.suppress(Refusal):  # An arm that cannot be compared contributes nothing to the estimates.
            two = rows[rows["arm"].isin([baseline, arm])]
            both, _, _ = comparable(two, arm, baseline, CONVENTIONS[convention], failed_runs(runs))
            paired += [pair(both, arm, baseline, convention)] if arm != baseline else []
    return rows, [each for each in paired if len(each.sizes) > 1]


def _seed_noise(paired: list[Pairs], rows: pd.DataFrame, column: str) -> tuple[float, str] | None:
    """(standard deviation of one run's loss over seeds, its source in words); None without repeated seeds."""
    squares, dof, what = 0.0, 0, "paired seeds"
    for each in paired:
        squares += sum(float(((d - d.mean()) ** 2).sum()) for d in each.differences) / 2
        dof += sum(len(d) - 1 for d in each.differences)
    if not dof:
        # Group by everything but the seed: runs that also differ in, say, the learning rate do not show seed noise.
        made = [name for name in [*axis_columns(rows), *fact_columns(rows)] if not name.endswith("seed")]
        cells = rows.groupby(["arm", "_size", column, *made], dropna=False)["loss"]
        spread, counts = cells.var(ddof=0), cells.size()
        squares, dof, what = float((spread * counts).sum()), int((counts - 1).sum()), "seeds of one arm and size"
    return (math.sqrt(squares / dof), f"measured: {what}, {dof} degrees of freedom") if dof else None


def _law(pairs: Pairs) -> Local:
    """The paired estimate of one arm, under the law of a constant m."""
    return local_multipliers(pairs.c0, pairs.c1, pairs.y0[None], pairs.y1[None], noise=pairs.noise)


def _noise_over_sizes(laws: list[tuple[Pairs, Local]], seed_noise: float) -> dict[str, tuple[float, str]]:
    """Name of World's field -> (value, source in words), for the standard deviations `arm_noise` and `shared_noise`.

    Variances are pooled over the arms by degrees of freedom. The part that seeds explain is subtracted: the seed noise
    of each size, since small models scatter more and have more seeds, or `seed_noise` for arms without repeated seeds.
    """
    own, shared, dof_own, dof_shared = 0.0, 0.0, 0, 0
    for pairs, local in laws:
        sizes, g, E = len(pairs.sizes), local.law.g[0], local.law.E[0]
        scale = g * local.reducible[0]
        # The variance of a loss difference that is due to seeds; a difference has the noise of two runs.
        by_seeds = 2 * seed_noise**2 / np.array(pairs.seeds) if local.noise is None else local.noise.variance[0]
        by_sizes = float(scatter(scale[None], local.ln_m, by_seeds[None])[0])
        means = (pairs.y0 + pairs.y1) / 2 - E
        means -= (local.reducible[0] + local.law.a1[0] * (pairs.c1 / local.law.unit) ** -g) / 2
        own += (sizes - 1) * by_sizes / 2
        shared += float((means**2).sum()) - (sizes - 3) * (by_sizes + float(by_seeds.mean())) / 4
        dof_own, dof_shared = dof_own + sizes - 1, dof_shared + sizes - 3
    return {
        name: (math.sqrt(max(total / dof, 0.0)), f"measured: {what} over sizes, {dof} degrees of freedom")
        for name, total, dof, what in (
            ("arm_noise", own, dof_own, "loss differences"),
            ("shared_noise", shared, dof_shared, "mean losses"),
        )
    }


def _shape(pairs: Pairs, local: Local) -> dict[str, tuple[float, str]]:
    """Name of World's field -> (value, source in words), for the parameters of the law."""
    law, source = local.law, f"measured: the law of {pairs.baseline} and {pairs.arm}"
    middle = float(np.exp(np.log(pairs.c0).mean()))
    reducible = float(law.a0[0] * (middle / law.unit) ** -law.g[0])
    return {
        "irreducible_loss": (float(law.E[0]), source),
        "reducible_loss": (reducible, source),
        "exponent": (float(law.g[0]), source),
    }
