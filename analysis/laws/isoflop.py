"""Compute-optimal sizes: at each budget the minimum of loss over ln N, then N*(C) and D*(C) across budgets.

The curves of an arm's budgets share two shape parameters (isocurves.py). Each curve is tested for lack of fit; where
the test fails, the sizes farthest from the minimum are left out until it passes, or else the budget is not used. To be
used, a budget must also have a curvature significantly above zero and an optimum inside the sizes tried. The other
budgets are shown with the reason and left out of the law. The coverage of the intervals, simulated on both kinds of
design, is in analysis/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import stdtrit

from analysis.errors import Refusal
from analysis.laws.isocurves import Curves, Minima
from analysis.laws.rates import for_a_law, rate_column
from analysis.laws.solver import Bools, Floats
from analysis.logs.learning import Unlearned, failed_runs, uncounted, unlearned
from analysis.logs.schema import CONVENTIONS
from analysis.logs.selection import Excluded, alike, choose_convention, finished, require_positive

if TYPE_CHECKING:
    import pandas as pd

Interval = tuple[float, float]

SAME_BUDGET = 0.05  # runs whose compute differs by less than this share belong to one budget
FEWEST_POINTS = 4  # a curve has three coefficients, so three sizes leave no residual to judge it by
FEWEST_TESTED = 5  # sizes to which a window is narrowed at most; with fewer, a budget has too little power by itself
MISFIT = 0.01  # level of the lack-of-fit test of each budget, below which its window is narrowed
JOINT_MISFIT = 0.05  # level of the joint test of all budgets, below which the window of the worst one is narrowed


@dataclass(frozen=True)
class Optimum:
    """The best size at one budget, by one arm."""

    arm: str
    compute: float  # FLOPs
    points: int  # sizes inside the window; runs of a size are averaged
    N: float | None  # parameters at the least loss
    ci: Interval | None  # 95%, on N
    D: float | None  # tokens there, by the line of ln D in ln N
    loss: float | None
    loss_error: float | None  # standard error of it
    curvature: float | None  # second derivative of loss in ln N, at N
    bend: Interval | None  # a, b of the curve (isocurves.py)
    window: Interval | None  # smallest and largest N that the curve was fitted to
    misfit_p: float | None  # of the lack-of-fit test inside the window
    status: str  # "ok", or why the optimum does not count

    def curve(self, N: Floats) -> Floats:
        """The fitted loss at sizes N; NaN where there is no minimum."""
        if self.N is None or self.loss is None or self.curvature is None or self.bend is None:
            return np.full(len(N), np.nan)
        (a, b), u = self.bend, np.log(N / self.N)
        return self.loss + self.curvature / (a + b) * (np.expm1(-a * u) / a + np.expm1(b * u) / b)


@dataclass(frozen=True)
class Allocation:
    """The law N* = N_at_top (C / compute_top)^N_exponent through the budgets whose status is ok, and D* likewise."""

    arm: str
    budgets: int
    N_exponent: float | None
    ci: Interval | None  # 95%, on N_exponent
    D_exponent: float | None
    D_ci: Interval | None  # 95%, on D_exponent
    N_at_top: float | None
    D_at_top: float | None
    compute_top: float | None
    convention: str  # how the FLOPs were counted
    status: str


@dataclass(frozen=True)
class _Budget:
    """The sizes of one budget, as means over the runs of a size, so that sizes with several seeds weigh no more."""

    compute: float
    spread: float  # largest compute over the smallest
    x: Floats  # [n] ln N
    log_d: Floats  # [n] ln D
    loss: Floats  # [n]


def isoflop(runs: pd.DataFrame, convention: str | None = None) -> tuple[list[Optimum], list[Allocation]]:
    """Optima of every arm and budget, and each arm's law. Raises Refusal where N, D or compute is missing,
    and where no budget has enough sizes."""
    used, _, _ = usable_runs(runs, convention)
    return optima_of(used, convention, unlearned(runs, used, rate_column(used)))


def usable_runs(runs: pd.DataFrame, convention: str | None = None) -> tuple[pd.DataFrame, list[Excluded], list[str]]:
    """The finished runs, each once, at the best learning rate of their size and budget; the runs left out; and lines
    for the reader on how learning rates were chosen."""
    done, excluded = finished(runs.assign(arm=runs["arm"].fillna("all")))
    used, others, lines = for_a_law(done, CONVENTIONS[choose_convention(done, convention)], failed_runs(runs))
    lines += uncounted(runs, unlearned(runs, used, rate_column(used)))
    return used, excluded + others, lines


def optima_of(
    runs: pd.DataFrame, convention: str | None = None, failures: Mapping[str, Unlearned] | None = None
) -> tuple[list[Optimum], list[Allocation]]:
    """Like `isoflop`, for the runs that `usable_runs` returned. `failures` are the arms with runs that did not learn,
    which the status of their law then says."""
    convention = choose_convention(runs, convention)
    column = CONVENTIONS[convention]
    for name, what in (("parameters", "N"), ("tokens", "D")):
        if runs[name].isna().all():
            raise Refusal(f"isoFLOP analysis needs {what}; add a column {what}, or name it with --columns")
        require_positive(runs, name, what)
    optima: list[Optimum] = []
    laws = []
    for arm, rows in runs.groupby("arm", sort=False):
        found, covariance = _arm_optima(str(arm), list(_budgets(rows, column)))
        optima += found
        law = _allocation(str(arm), found, covariance, convention)
        if failures and (failed := failures.get(str(arm))):
            law = replace(law, status=failed.remark if law.status == "ok" else f"{failed.remark}; {law.status}")
        laws.append(law)
    if not any(item.points >= FEWEST_POINTS for item in optima):
        raise Refusal(
            f"no budget has {FEWEST_POINTS} sizes within {SAME_BUDGET:.0%} of compute; isoFLOP analysis needs several "
            "sizes trained at equal compute"
        )
    return optima, laws


def _budgets(rows: pd.DataFrame, column: str) -> Iterator[_Budget]:
    """Rows of one arm in groups of equal compute, smallest first."""
    group = alike(rows[column].to_numpy(float), rows["arm"].to_numpy(str), 1 + SAME_BUDGET)
    for _, budget in rows.groupby(group):
        sizes = budget.groupby("parameters")[["tokens", "loss"]].mean()
        yield _Budget(
            float(budget[column].mean()),
            float(budget[column].max() / budget[column].min()),
            np.log(sizes.index.to_numpy(float)),
            np.log(sizes["tokens"].to_numpy(float)),
            sizes["loss"].to_numpy(float),
        )


def _arm_optima(arm: str, budgets: list[_Budget]) -> tuple[list[Optimum], Floats]:
    """Every budget's optimum; and the covariances of ln N* and of ln D* [2, B, B], in the order of the budgets."""
    fitted = [i for i, item in enumerate(budgets) if len(item.x) >= FEWEST_POINTS]
    covariance = np.full((2, len(budgets), len(budgets)), np.nan)
    optima = [_no_optimum(arm, item, f"{len(item.x)} sizes; at least {FEWEST_POINTS} are needed") for item in budgets]
    if not fitted:
        return optima, covariance
    most = max(len(budgets[i].x) for i in fitted)

    def padded(name: str) -> Floats:
        return np.stack([np.pad(v := getattr(budgets[i], name), (0, most - len(v)), mode="edge") for i in fitted])

    x, y = padded("x"), padded("loss")
    used = np.arange(most) < np.array([len(budgets[i].x) for i in fitted])[:, None]
    minima, used, misfits = _narrowed(x, y, used)
    growths = np.empty(len(fitted))
    for place, i in enumerate(fitted):
        inside = used[place, : len(budgets[i].x)]
        growths[place], optima[i] = _optimum(arm, budgets[i], inside, minima, place, bool(misfits[place]))
    block = np.ix_(fitted, fitted)
    covariance[0][block] = minima.covariance
    covariance[1][block] = growths[:, None] * minima.covariance * growths
    return optima, covariance


def _narrowed(x: Floats, y: Floats, used: Bools) -> tuple[Minima, Bools, Bools]:
    """Narrow the windows until no lack of fit is found. Returns the minima, the points used [B, n], and which budgets
    [B] fail the test even in the narrowest window."""
    while True:
        minima = Curves(x, y, used).minima()
        p = np.nan_to_num(minima.misfit_p, nan=1.0)
        fails, wide = p < MISFIT / len(x), used.sum(axis=1) > FEWEST_TESTED
        narrow = (p < MISFIT) & wide
        if minima.joint_misfit_p < JOINT_MISFIT and wide.any() and not narrow.any():
            narrow[np.where(wide, p, 2.0).argmin()] = True
        if not narrow.any():
            return minima, used, fails
        lowest = np.take_along_axis(x, np.where(used, y, np.inf).argmin(axis=1)[:, None], axis=1)[:, 0]
        inside = (minima.best > np.where(used, x, np.inf).min(axis=1)) & (
            minima.best < np.where(used, x, -np.inf).max(axis=1)
        )
        centre = np.where(inside, minima.best, lowest)
        farthest = np.where(used, np.abs(x - centre[:, None]), -1).argmax(axis=1)
        used = used.copy()
        used[narrow, farthest[narrow]] = False


def _no_optimum(arm: str, budget: _Budget, status: str) -> Optimum:
    return Optimum(
        arm, budget.compute, len(budget.x), None, None, None, None, None, None, None, None, None, status
    )  # fmt: skip


def _optimum(
    arm: str, budget: _Budget, inside: Bools, minima: Minima, place: int, misfit: bool
) -> tuple[float, Optimum]:
    """The slope of ln D in ln N inside the window, and the optimum."""
    x = budget.x[inside]
    growth, log_d = _line(x, budget.log_d[inside])
    best, p = float(minima.best[place]), float(minima.misfit_p[place])
    half = float(stdtrit(minima.dof, 0.975) * np.sqrt(minima.covariance[place, place]))
    empty = _no_optimum(arm, budget, "no clear curvature")
    found = replace(
        empty,
        points=len(x),
        window=(float(np.exp(x.min())), float(np.exp(x.max()))),
        misfit_p=None if np.isnan(p) else p,
    )
    if minima.bending[place] <= stdtrit(minima.dof, 0.975):
        return growth, found
    if np.isnan(best):
        return growth, replace(found, status="the optimum is outside the sizes tried")
    status = "ok"
    if misfit:
        status = f"lack of fit even within the {len(x)} sizes nearest the minimum"
    elif not x.min() < best < x.max():
        status = "the optimum is outside the sizes tried"
    elif budget.spread > 1 + 2 * SAME_BUDGET:
        status = f"compute differs {budget.spread:.2f}-fold within the budget"
    return growth, replace(
        found,
        N=float(np.exp(best)),
        ci=(float(np.exp(best - half)), float(np.exp(best + half))),
        D=float(np.exp(log_d + growth * (best - x.mean()))),
        loss=float(minima.loss[place]),
        loss_error=float(minima.loss_error[place]),
        curvature=float(minima.curvature[place]),
        bend=(float(minima.bend[0]), float(minima.bend[1])),
        status=status,
    )


def _allocation(arm: str, optima: list[Optimum], covariance: Floats, convention: str) -> Allocation:
    places = [i for i, item in enumerate(optima) if item.status == "ok"]
    good = [optima[i] for i in places]
    if len(good) < 2:
        reason = f"{len(good)} of {len(optima)} budgets with a clear optimum; a law needs 2, an interval 3"
        return Allocation(arm, len(good), None, None, None, None, None, None, None, convention, reason)
    compute, N, D = (np.log([getattr(item, name) for item in good]) for name in ("compute", "N", "D"))
    of_n, of_d = (part[np.ix_(places, places)] for part in covariance)
    (n_exponent, n_ci, n_top), (d_exponent, d_ci, d_top) = growth(compute, N, of_n), growth(compute, D, of_d)
    status = "ok" if n_ci else "two budgets give no interval"
    return Allocation(
        arm, len(good), n_exponent, n_ci, d_exponent, d_ci, n_top, d_top, good[-1].compute, convention, status
    )


def growth(x: Floats, y: Floats, covariance: Floats) -> tuple[float, Interval | None, float]:
    """Slope of y in x, its 95% interval (None below three points), and exp of the line's value at the last x.

    The fit is generalised least squares with the `covariance` of y. Scatter beyond it is added to its diagonal (Paule
    and Mandel 1982). The interval is t's at n - 2 degrees of freedom, scaled by the weighted spread about the line
    (Knapp and Hartung 2003), so it is narrower than the covariance implies where the points scatter less.
    """
    design = np.stack([np.ones_like(x), x - x[-1]], axis=1)

    def line(scatter: float) -> tuple[Floats, Floats, float]:
        weight = np.linalg.inv(covariance + scatter * np.eye(len(x)))
        error = np.linalg.inv(design.T @ weight @ design)
        coefficients = error @ design.T @ weight @ y
        rest = y - design @ coefficients
        return coefficients, error, float(rest @ weight @ rest)

    (height, slope), error, spread = line(0.0)
    dof = len(x) - 2
    if dof < 1:
        return float(slope), None, float(np.exp(height))
    if spread > dof:
        low, high = 0.0, float(np.trace(covariance)) / len(x)
        while line(high)[2] > dof:
            high *= 4
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if line(middle)[2] > dof else (low, middle)
        (height, slope), error, spread = line(high)
    half = float(stdtrit(dof, 0.975) * np.sqrt(error[1, 1] * spread / dof))
    return float(slope), (float(slope) - half, float(slope) + half), float(np.exp(height))


def _line(x: Floats, y: Floats) -> tuple[float, float]:
    """Slope of the least-squares line, and its value at the mean of x."""
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    return float(slope), float(y.mean())
