"""Intervals around a fitted law by bootstrap, at the levels at which its errors arise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from analysis.powerlaw import FORMS, Fit, Model
from analysis.solver import Floats

ENOUGH = 30  # residuals of a level to draw from; with fewer, a normal of their spread stands in


def bootstrap(fit: Fit, resamples: int = 1000, seed: int = 0) -> Fit:
    """The fit with 95% percentile intervals of every value, and the resamples' values.

    Log residuals are split into those of clusters (what the arms and seeds of a size share), of arms within a cluster,
    and of rows within an arm; each level is drawn anew with its own spread over its own degrees of freedom, and the
    spread itself is drawn too (from its scaled inverse chi-square), without which few sizes would look certain. A
    resample that does not converge keeps its value and is counted as failed in the certificate. Without degrees of
    freedom at a level there is no interval, and the status says so.
    """
    model = Model(fit.points, fit.form, fit.loss.delta, fit.per_arm)
    f = model.problem.predict(fit.theta[None])[0]
    random = np.random.default_rng(seed)
    levels = _levels(fit, model, model.log_y - f)
    if any(level.dof < 1 for level in levels):
        return replace(fit, status=_also(fit.status, "too few sizes for intervals"))
    noise = sum((level.draw(resamples, random) for level in levels), np.zeros((resamples, len(f))))
    solution = model.problem.solve(np.tile(fit.theta, (resamples, 1)), f + noise)
    at_bound = ((solution.theta <= model.problem.low) | (solution.theta >= model.problem.high)).any(axis=1)
    draws = [model.raw(theta) for theta in solution.theta]
    table = np.array([list(draw.values()) for draw in draws])
    low, high = np.quantile(table, [0.025, 0.975], axis=0)
    failed = int((~solution.converged).sum())
    counts = {"resamples": resamples, "resamples_failed": failed, "resamples_at_bound": int(at_bound.sum())}
    note = f"{failed / resamples:.0%} of the resamples failed" if failed > 0.05 * resamples else None
    return replace(
        fit,
        ci={name: (float(a), float(b)) for name, a, b in zip(draws[0], low, high, strict=True)},
        certificate=fit.certificate | counts,
        status=_also(fit.status, note),
        draws=tuple(draws),
    )


def band(fit: Fit, x: Mapping[str, Floats], arm: str) -> tuple[Floats, Floats]:
    """95% band of one arm's law at x ("C", or "N" and "D", each [n] in raw units), from a bootstrapped fit."""
    assert fit.draws is not None
    curves = [replace(fit, values=draw).predict(x, arm) for draw in fit.draws]
    low, high = np.quantile(curves, [0.025, 0.975], axis=0)
    return low, high


def _also(status: str, note: str | None) -> str:
    if note is None:
        return status
    return note if status == "ok" else f"{status}; {note}"


class _Level:
    """Errors that arise once a group: `effects` [groups], less their parents' means."""

    def __init__(self, effects: Floats, group: NDArray[np.int_], parent: NDArray[np.int_] | None, lost: int) -> None:
        self.effects, self.group, self.parent = effects, group, parent  # group: [n] of each row; parent: of each group
        parents = 0 if parent is None else int(parent.max()) + 1
        self.dof = len(effects) - parents - lost
        self.spread = np.sqrt((effects**2).sum() / self.dof) if self.dof > 0 else np.nan

    def draw(self, resamples: int, random: np.random.Generator) -> Floats:
        """[resamples, n]"""
        shape = (resamples, len(self.effects))
        if len(self.effects) >= ENOUGH:
            unit = random.choice(self.effects / np.sqrt((self.effects**2).mean()), shape)
        else:
            unit = random.standard_normal(shape)
        if self.parent is not None:
            size = np.bincount(self.parent)
            means = np.stack([np.bincount(self.parent, row) for row in unit]) / size
            unit = unit - means[:, self.parent]
        spread = self.spread * np.sqrt(self.dof / random.chisquare(self.dof, (resamples, 1)))
        return (unit * spread)[:, self.group]


def _levels(fit: Fit, model: Model, residual: Floats) -> list[_Level]:
    """The levels at which rows differ: clusters, arms within them, rows within these."""
    between = 1 + 2 * len(FORMS[fit.form])  # parameters that one arm alone would have; the others tell arms apart
    _, cluster = np.unique(fit.points.cluster, return_inverse=True)
    _, first, cell = np.unique(
        [f"{c} {arm}" for c, arm in zip(cluster, fit.points.arm, strict=True)], return_index=True, return_inverse=True
    )
    row = np.arange(len(residual))
    cell_mean = np.bincount(cell, residual) / np.bincount(cell)
    cluster_of_cell = cluster[first]
    cluster_mean = np.bincount(cluster_of_cell, cell_mean) / np.bincount(cluster_of_cell)
    levels = [_Level(cluster_mean, cluster, None, between)]
    if len(cell_mean) > len(cluster_mean):
        deviation = cell_mean - cluster_mean[cluster_of_cell]
        levels.append(_Level(deviation, cell, cluster_of_cell, len(model.names) - between))
    if len(row) > len(cell_mean):
        levels.append(_Level(residual - cell_mean[cell], row, cell, 0))
    return levels
