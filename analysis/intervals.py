"""Intervals around a fitted law: the wild bootstrap, and the profile of a least-squares fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from analysis.powerlaw import Fit, Model
from analysis.solver import Floats

# Webb's six points (Webb 2023, Canadian J. Economics 56): mean 0, variance 1, and enough of them for few clusters.
WEBB = np.array([-np.sqrt(1.5), -1.0, -np.sqrt(0.5), np.sqrt(0.5), 1.0, np.sqrt(1.5)])


def bootstrap(fit: Fit, resamples: int = 1000, seed: int = 0) -> Fit:
    """The fit with 95% percentile intervals of every parameter, and of each arm's ratios to the baseline.

    Wild bootstrap: log residuals, widened by sqrt(n / (n - P)), times one of Webb's weights a cluster, so that what
    the arms and seeds of a size share stays shared. A resample that does not converge, or ends at a bound where the fit
    is not, keeps its value and is counted as failed in the certificate.
    """
    points = fit.points
    count, size = len(points.loss), len(fit.theta)
    if count <= size:
        raise ValueError(f"{count} points leave nothing to resample beside {size} parameters; give --bootstrap 0")
    model = Model(points, fit.form, fit.loss.delta, fit.per_arm)
    f = model.problem.predict(fit.theta[None])[0]
    residual = (model.log_y - f) * np.sqrt(count / (count - size))
    _, cluster = np.unique(points.cluster, return_inverse=True)
    weights = np.random.default_rng(seed).choice(WEBB, (resamples, cluster.max() + 1))
    solution = model.problem.solve(np.tile(fit.theta, (resamples, 1)), f + weights[:, cluster] * residual)
    low, high = model.problem.low, model.problem.high
    held = (solution.theta <= low) | (solution.theta >= high)
    failed = ~solution.converged | (held & ~((fit.theta <= low) | (fit.theta >= high))).any(axis=1)
    draws = [model.raw(theta) for theta in solution.theta]
    table = np.array([list(draw.values()) for draw in draws])
    low_end, high_end = np.quantile(table, [0.025, 0.975], axis=0)
    ci = {name: (float(a), float(b)) for name, a, b in zip(draws[0], low_end, high_end, strict=True)}
    certificate = fit.certificate | {"resamples": resamples, "resamples_failed": int(failed.sum())}
    status = fit.status
    if failed.mean() > 0.05:
        note = f"{failed.mean():.0%} of the resamples failed"
        status = note if status == "ok" else f"{status}; {note}"
    return replace(fit, ci=ci, certificate=certificate, status=status, draws=tuple(draws))


def band(fit: Fit, x: Mapping[str, Floats], arm: str) -> tuple[Floats, Floats]:
    """95% band of one arm's law at x ("C", or "N" and "D", each [n] in raw units), from a bootstrapped fit."""
    assert fit.draws is not None
    curves = [replace(fit, values=draw).predict(x, arm) for draw in fit.draws]
    low, high = np.quantile(curves, [0.025, 0.975], axis=0)
    return low, high
