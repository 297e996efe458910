"""Compute-optimal sizes: at each budget a parabola of loss in ln N, then N*(C) and D*(C) across budgets.

An optimum counts only if the parabola's curvature is clear of zero and the optimum lies inside the sizes tried; the
others are shown with what is wrong and left out of the law. The interval on N* holds the noise alone: simulated, it
covers .93 where sizes reach a factor 2 to each side, and .6 to .9 where they reach a factor 3 to 7 and the parabola
itself is off by more than the noise (a cubic where its last term is clear does no better); the exponents' cover .94.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtrit

from analysis.laws.solver import Floats
from analysis.logs.schema import CONVENTIONS
from analysis.logs.selection import choose_convention, finished, require_positive

if TYPE_CHECKING:
    import pandas as pd

Interval = tuple[float, float]

SAME_BUDGET = 0.05  # runs whose compute differs by less are of one budget
FEWEST_POINTS = 4  # a parabola through three leaves nothing to judge it by


@dataclass(frozen=True)
class Optimum:
    """The best size at one budget, by one arm."""

    arm: str
    compute: float  # FLOPs
    points: int
    N: float | None  # parameters at the least loss
    ci: Interval | None  # 95%, on N
    D: float | None  # tokens there, by the line of ln D in ln N
    loss: float | None
    curvature: float | None  # second derivative of loss in ln N
    status: str  # "ok", or why the optimum does not count


@dataclass(frozen=True)
class Allocation:
    """N* = N_at_top (C / compute_top)^N_exponent over the budgets that count, and D* likewise."""

    arm: str
    budgets: int
    N_exponent: float | None
    ci: Interval | None  # 95%, on N_exponent
    D_exponent: float | None
    D_ci: Interval | None  # 95%, on D_exponent
    N_at_top: float | None
    D_at_top: float | None
    compute_top: float | None
    status: str


def isoflop(runs: pd.DataFrame, convention: str | None = None) -> tuple[list[Optimum], list[Allocation]]:
    """Optima of every arm and budget, and each arm's law. Raises ValueError where a budget cannot be told."""
    runs, _ = finished(runs.assign(arm=runs["arm"].fillna("all")))
    column = CONVENTIONS[choose_convention(runs, convention)]
    for name, what in (("parameters", "N"), ("tokens", "D")):
        if runs[name].isna().all():
            raise ValueError(f"isoFLOP analysis needs {what}; add a column {what}, or name it with --columns")
        require_positive(runs, name, what)
    optima = [
        _optimum(str(arm), budget, column)
        for arm, rows in runs.groupby("arm", sort=False)
        for budget in _budgets(rows, column)
    ]
    if not any(item.points >= FEWEST_POINTS for item in optima):
        raise ValueError(
            f"no budget has {FEWEST_POINTS} sizes within {SAME_BUDGET:.0%} of compute; isoFLOP analysis needs several "
            "sizes trained at equal compute"
        )
    return optima, [
        _allocation(arm, [item for item in optima if item.arm == arm]) for arm in dict.fromkeys(runs["arm"])
    ]


def _budgets(rows: pd.DataFrame, column: str) -> Iterator[pd.DataFrame]:
    """Rows of one arm in groups of equal compute, smallest first."""
    ordered = rows.sort_values(column)
    jumps = ordered[column].to_numpy(float)[1:] / ordered[column].to_numpy(float)[:-1] > 1 + SAME_BUDGET
    group = np.concatenate([[0], np.cumsum(jumps)])
    for _, budget in ordered.groupby(group):
        yield budget


def _optimum(arm: str, rows: pd.DataFrame, column: str) -> Optimum:
    x = np.log(rows["parameters"].to_numpy(float))
    compute = float(rows[column].mean())
    if len(np.unique(x)) < FEWEST_POINTS:
        reason = f"{len(np.unique(x))} sizes; at least {FEWEST_POINTS} are needed"
        return Optimum(arm, compute, len(x), None, None, None, None, None, reason)
    middle = x.mean()
    design = np.stack([np.ones_like(x), x - middle, (x - middle) ** 2], axis=1)
    loss = rows["loss"].to_numpy(float)
    (base, slope, bend), *_ = np.linalg.lstsq(design, loss, rcond=None)
    dof = len(x) - 3
    covariance = np.linalg.inv(design.T @ design) * ((loss - design @ [base, slope, bend]) ** 2).sum() / dof
    t = float(stdtrit(dof, 0.975))
    if bend - t * np.sqrt(covariance[2, 2]) <= 0:
        return Optimum(arm, compute, len(x), None, None, None, None, 2 * float(bend), "no clear curvature")
    best = -slope / (2 * bend)
    gradient = np.array([0, -1 / (2 * bend), slope / (2 * bend**2)])
    half = t * float(np.sqrt(gradient @ covariance @ gradient))
    inside = x.min() < middle + best < x.max()
    size = float(np.exp(middle + best))
    growth, log_d = _line(x, np.log(rows["tokens"].to_numpy(float)))
    return Optimum(
        arm=arm,
        compute=compute,
        points=len(x),
        N=size,
        ci=(size * float(np.exp(-half)), size * float(np.exp(half))),
        D=float(np.exp(log_d + growth * best)),
        loss=float(base + slope * best / 2),
        curvature=2 * float(bend),
        status="ok" if inside else "the optimum is outside the sizes tried",
    )


def _allocation(arm: str, optima: list[Optimum]) -> Allocation:
    good = [item for item in optima if item.status == "ok"]
    if len(good) < 2:
        reason = f"{len(good)} of {len(optima)} budgets with a clear optimum; a law needs 2, an interval 3"
        return Allocation(arm, len(good), None, None, None, None, None, None, None, reason)
    compute, N, D = (np.log([getattr(item, name) for item in good]) for name in ("compute", "N", "D"))
    (n_exponent, n_ci, n_top), (d_exponent, d_ci, d_top) = _growth(compute, N), _growth(compute, D)
    status = "ok" if n_ci else "two budgets give no interval"
    return Allocation(arm, len(good), n_exponent, n_ci, d_exponent, d_ci, n_top, d_top, good[-1].compute, status)


def _growth(x: Floats, y: Floats) -> tuple[float, Interval | None, float]:
    """Slope of y in x, its 95% interval from three points on, and exp of the line's height at the last x."""
    slope, height = _line(x, y)
    top = float(np.exp(height + slope * (x[-1] - x.mean())))
    if len(x) < 3:
        return slope, None, top
    rest = y - height - slope * (x - x.mean())
    half = stdtrit(len(x) - 2, 0.975) * np.sqrt((rest**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum())
    return slope, (slope - float(half), slope + float(half)), top


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    """Slope, and height at the mean of x."""
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return float(slope), float(y.mean())
