"""Intervals of a fitted law: a hierarchical bootstrap (clusters, arms within them, rows), and calibrated profiles.

The coverage of the bootstrap's 95% intervals on grids of (N, D), with equal and with unequal noise, is in
analysis/README.md; on ladders of 5 to 8 sizes it is .95 to .97. Profiles cover .93 to .96 where all points have equal
noise, and at worst .91 to .92, for A and alpha by least squares. For a ladder with shared errors the interval of
m[arm] covers .98, so it is wider than needed; the paired estimator (advantage/paired.py) gives a narrower one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from analysis.laws.powerlaw import EXPONENTS, FORMS, LOG_LEVELS, Fit, Model
from analysis.laws.solver import ROUNDING, Floats, Solution

Interval = tuple[float, float]

ENOUGH = 30  # clusters (or residuals of a level) from which on they are resampled; below, a normal is drawn instead
MOST_LEVERAGE = 0.9  # cap of the leverage when residuals are divided by one minus it
SMOOTHING = 1.0  # sd of the normal noise added to resampled residuals, relative to theirs
CALIBRATION = 400  # resamples that calibrate a profile
LEVEL = 0.95
NEAR_STARTS, GRID_STARTS = 4, 9  # starts of a fit with a value held: the nearest resamples, and a grid of exponents
FAR = 50.0  # distance in the log of an amplitude or multiplier beyond which an interval is called unbounded


def bootstrap(fit: Fit, resamples: int = 1000, seed: int = 0) -> Fit:
    """The fit with 95% percentile intervals of every value, and the resamples' values.

    From 30 clusters on, the method allows errors whose variance differs from point to point. Huber's fit is repeated on
    clusters drawn with replacement (pairs bootstrap), because it passes exactly through as many points as it has
    parameters, whose zero residuals would be useless for resampling. Least squares is repeated on its own residuals,
    each multiplied by a random number (wild bootstrap).

    With fewer clusters, log residuals are split into three levels: clusters (the error that the arms and seeds of a
    size share), arms within a cluster, and rows within an arm. Each level is redrawn with its own standard deviation,
    estimated on its own degrees of freedom. That standard deviation is itself drawn, from its scaled inverse
    chi-square distribution; otherwise intervals from few sizes would be too narrow. Resampled residuals are smoothed
    with normal noise, because the exact zeros of Huber's fit would make the resamples vary too little. A resample that
    does not converge keeps its value and is counted as failed in the certificate. If a level has no degrees of freedom
    there is no interval, and the status says so.
    """
    model = Model(fit.points, fit.form, fit.loss.delta, fit.per_arm, fit.hold)
    drawn = _resample(fit, model, resamples, np.random.default_rng(seed))
    if drawn is None:
        return replace(fit, status=_also(fit.status, "too few sizes for intervals"))
    theta = drawn.solution.theta
    at_bound = model.at_bound(theta).any(axis=1)
    draws = [model.raw(row) for row in theta]
    table = np.array([list(draw.values()) for draw in draws])
    low, high = np.quantile(table, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    failed = int((~drawn.solution.converged).sum())
    counts = {"resamples": resamples, "resamples_failed": failed, "resamples_at_bound": int(at_bound.sum())}
    note = f"{failed / resamples:.0%} of the resamples failed" if failed > 0.05 * resamples else None
    return replace(
        fit,
        ci={name: (float(a), float(b)) for name, a, b in zip(draws[0], low, high, strict=True)},
        certificate=fit.certificate | counts,
        status=_also(fit.status, note),
        draws=tuple(draws),
    )


def profile(
    fit: Fit, resamples: int = CALIBRATION, seed: int = 0, each: Callable[[Iterable[str]], Iterable[str]] = iter
) -> Fit:
    """The fit with 95% profile intervals of its values, by name; `each` may show progress over the names.

    The interval contains every value at which the objective, minimised over the other parameters, exceeds its overall
    minimum by at most q. The threshold q is the 95% quantile of this excess over resamples (drawn as in `bootstrap`)
    with the value held at the fitted one. So the interval assumes neither independent errors nor a quadratic objective;
    for least squares with independent normal errors, q is s^2 F. Where the profile reaches a bound of the search, the
    end is 0 for E, the bound for an exponent, and 0 or infinity otherwise. There is no interval for m of form nd, which
    cannot be held by a linear condition, and none without degrees of freedom.
    """
    model = Model(fit.points, fit.form, fit.loss.delta, fit.per_arm, fit.hold)
    drawn = _resample(fit, model, resamples, np.random.default_rng(seed))
    names = [
        name for name in fit.values if not (fit.form == "nd" and name.startswith("m[")) and not model.is_held(name)
    ]
    if drawn is None:
        return fit
    return replace(fit, profile_ci={name: _Profile(fit, model, drawn, name).interval() for name in each(names)})


def band(fit: Fit, x: Mapping[str, Floats], arm: str, level: float = LEVEL) -> tuple[Floats, Floats]:
    """Ends [n] of the band of one arm's law at x ("C", or "N" and "D", each [n] in raw units), from a bootstrapped
    fit."""
    assert fit.draws is not None
    curves = [replace(fit, values=draw).predict(x, arm) for draw in fit.draws]
    low, high = np.quantile(curves, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


class _Profile:
    """The profile of one value, in a coordinate u: the log of an amplitude or multiplier, and otherwise the value."""

    def __init__(self, fit: Fit, model: Model, drawn: _Resamples, name: str) -> None:
        self.model, self.name = model, name
        self.theta = self.inside = fit.theta
        self.grid = model.starts(GRID_STARTS)
        self.least = float(model.problem.objective(fit.theta[None], model.log_y)[0])
        self.logged = name[0] not in "Ea" and not name.startswith("beta")
        self.middle = self._coordinate(fit.values[name])
        if self.logged:
            self.limits = (self.middle - FAR, self.middle + FAR)
        elif name[0] == "E":
            self.limits = (math.exp(LOG_LEVELS[0] + model.middle_loss), math.exp(LOG_LEVELS[1] + model.middle_loss))
        else:
            self.limits = EXPONENTS
        # From the law of the resample, and from the fit: where the two have E and the exponent far apart, a descent
        # from the first with an amplitude held may end in a worse minimum.
        problem = model.holding(name, fit.values[name])
        starts = (drawn.solution.theta, np.broadcast_to(fit.theta, drawn.solution.theta.shape))
        held = np.min([problem.solve(start, drawn.log_y, drawn.weight).objective for start in starts], axis=0)
        least = np.minimum(drawn.solution.objective, held)
        self.allowed = math.sqrt(float(np.quantile(held - least, LEVEL)))
        self.drawn = drawn.solution.theta
        self.drawn_at = np.array([self._coordinate(model.raw(row)[name]) for row in self.drawn])
        moves = np.abs(self.drawn_at - self.middle)
        self.step = max(float(np.quantile(moves, LEVEL)), 1e-9 * max(abs(self.middle), 1.0))

    def interval(self) -> Interval:
        return self._value(self._end(-1)), self._value(self._end(1))

    def _coordinate(self, value: float) -> float:
        return math.log(value) if self.logged else value

    def _value(self, u: float) -> float:
        low, high = self.limits
        if not self.logged:
            return 0.0 if self.name[0] == "E" and u <= low else u
        return 0.0 if u <= low else math.inf if u >= high else math.exp(u)

    def _excess(self, u: float) -> float:
        """The square root of the objective's excess at u, minus its threshold: positive outside the interval.

        With an amplitude held far from the fit's, the best exponent is far away too, and a descent from a single start
        may not reach it. So the fit starts from the last solution inside, from the resamples nearest to u and from a
        grid.
        """
        problem = self.model.holding(self.name, math.exp(u) if self.logged else u)
        near = self.drawn[np.argsort(np.abs(self.drawn_at - u), kind="stable")[:NEAR_STARTS]]
        solution = problem.solve(np.concatenate([self.inside[None], near, self.grid]), self.model.log_y)
        best = int(solution.objective.argmin())
        excess = math.sqrt(max(float(solution.objective[best]) - self.least, 0.0)) - self.allowed
        if excess <= 0:
            self.inside = solution.theta[best]
        return excess

    def _end(self, side: int) -> float:
        """The end of the interval on one side, by regula falsi (Illinois), which converges fast because the square root
        of the excess is nearly linear."""
        if self.least <= len(self.model.log_y) * ROUNDING**2:  # an exact fit has no width
            return self.middle
        self.inside = self.theta
        limit = self.limits[(side + 1) // 2]
        inside, below, step = self.middle, -self.allowed, self.step
        while True:
            outside = inside + side * step
            if side * (outside - limit) >= 0:
                outside = limit
            above = self._excess(outside)
            if above > 0:
                break
            if outside == limit:
                return limit
            inside, below, step = outside, above, 2 * step
        for _ in range(30):
            u = inside + (outside - inside) * below / (below - above)
            excess = self._excess(u)
            if abs(excess) < 1e-3 * self.allowed or abs(outside - inside) < 1e-3 * self.step:
                return u
            if excess > 0:
                outside, above = u, excess
                below /= 2
            else:
                inside, below = u, excess
                above /= 2
        return u


def _also(status: str, note: str | None) -> str:
    if note is None:
        return status
    return note if status == "ok" else f"{status}; {note}"


@dataclass(frozen=True)
class _Resamples:
    """Resampled data [K, n] (log losses in the model's units, and the weight of each point) and the fits to them."""

    log_y: Floats
    weight: Floats
    solution: Solution


def _resample(fit: Fit, model: Model, resamples: int, random: np.random.Generator) -> _Resamples | None:
    """Draw resamples and fit each; None if a level of the errors has no degrees of freedom."""
    _, cluster = np.unique(fit.points.cluster, return_inverse=True)
    clusters = int(cluster.max()) + 1
    f = model.problem.predict(fit.theta[None])[0]
    log_y, weight = np.tile(model.log_y, (resamples, 1)), np.ones((resamples, len(f)))
    if clusters >= max(ENOUGH, 3 * len(model.names)):
        if fit.loss.delta is None:
            log_y = f + _wild(fit, model, f, cluster, resamples, random)
        else:
            weight = random.multinomial(clusters, np.full(clusters, 1 / clusters), resamples)[:, cluster].astype(float)
    else:
        levels = error_levels(fit, model, model.log_y - f)
        if any(level.dof < 1 for level in levels):
            return None
        log_y = f + sum((level.draw(resamples, random) for level in levels), np.zeros((resamples, len(f))))
    return _Resamples(log_y, weight, model.problem.solve(np.tile(fit.theta, (resamples, 1)), log_y, weight))


def _wild(
    fit: Fit, model: Model, f: Floats, cluster: NDArray[np.int_], resamples: int, random: np.random.Generator
) -> Floats:
    """Wild-bootstrap residuals [resamples, n]: each point's own residual times a normal number drawn for its cluster,
    so that every point keeps its own variance (Wu 1986). Residuals are first divided by one minus the leverage (HC3 of
    MacKinnon and White), since a point pulls the fit towards itself."""
    residual = (model.log_y - f) / (1 - np.minimum(model.problem.leverage(fit.theta), MOST_LEVERAGE))
    # If few points carry most of the noise, its variance has few effective degrees of freedom. They are estimated from
    # the kurtosis, which is 3 for a normal distribution.
    effective = 3 * (residual**2).sum() ** 2 / max(float((residual**4).sum()), 1e-300)
    clusters = int(cluster.max()) + 1
    dof = max(min(effective, clusters) * (1 - model.free / clusters), 1.0)
    spread = np.sqrt(dof / random.chisquare(dof, (resamples, 1)))
    return residual * spread * random.standard_normal((resamples, int(cluster.max()) + 1))[:, cluster]


class Level:
    """One level of the errors, with one error for each group: `effects` [groups], minus the mean of the parent group
    where there is one; `lost` degrees of freedom are used up by the fit."""

    def __init__(self, effects: Floats, group: NDArray[np.int_], parent: NDArray[np.int_] | None, lost: int) -> None:
        self.effects, self.group, self.parent = effects, group, parent  # group: [n] of each row; parent: of each group
        parents = 0 if parent is None else int(parent.max()) + 1
        self.dof = len(effects) - parents - lost
        self.spread = np.sqrt((effects**2).sum() / self.dof) if self.dof > 0 else np.nan

    def draw(self, resamples: int, random: np.random.Generator) -> Floats:
        """Redrawn errors of every row, [resamples, n]."""
        shape = (resamples, len(self.effects))
        unit = random.standard_normal(shape)
        if len(self.effects) >= ENOUGH and self.spread > 0:
            drawn = random.choice(self.effects / np.sqrt((self.effects**2).mean()), shape)
            unit = (drawn + SMOOTHING * unit) / math.sqrt(1 + SMOOTHING**2)
        if self.parent is not None:
            size = np.bincount(self.parent)
            means = np.stack([np.bincount(self.parent, row) for row in unit]) / size
            unit = unit - means[:, self.parent]
        spread = self.spread * np.sqrt(self.dof / random.chisquare(self.dof, (resamples, 1)))
        return (unit * spread)[:, self.group]


def error_levels(fit: Fit, model: Model, residual: Floats) -> list[Level]:
    """The levels of the errors: clusters, arms within a cluster, rows within an arm."""
    # Degrees of freedom: parameters that a single arm would also have are fitted between clusters, and those by which
    # arms differ are fitted within clusters.
    between = min(1 + 2 * len(FORMS[fit.form]), model.free)
    _, cluster = np.unique(fit.points.cluster, return_inverse=True)
    _, first, cell = np.unique(
        [f"{c} {arm}" for c, arm in zip(cluster, fit.points.arm, strict=True)], return_index=True, return_inverse=True
    )
    row = np.arange(len(residual))
    cell_mean = np.bincount(cell, residual) / np.bincount(cell)
    cluster_of_cell = cluster[first]
    cluster_mean = np.bincount(cluster_of_cell, cell_mean) / np.bincount(cluster_of_cell)
    levels = [Level(cluster_mean, cluster, None, between)]
    if len(cell_mean) > len(cluster_mean):
        deviation = cell_mean - cluster_mean[cluster_of_cell]
        levels.append(Level(deviation, cell, cluster_of_cell, model.free - between))
    if len(row) > len(cell_mean):
        levels.append(Level(residual - cell_mean[cell], row, cell, 0))
    return levels
