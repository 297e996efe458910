"""Tests for lack of fit of a law of compute (form c): F tests for effects that the law cannot represent.

Each tests whether the residuals of log loss still depend on some variable, after allowing for small changes of the
law's own parameters (its derivatives at the fit):
- "exponents": on ln C, differently by arm, after errors that the arms of a cluster share are removed. If so, the
  compute multiplier changes with compute, and one m (or one exponent) does not describe the arms;
- "sizes": on ln N at equal compute, within an arm and budget, as a parabola whose minimum may move with compute. If
  so, loss is not a function of compute alone;
- "bend": on the cube of ln C, over all clusters. If so, the points do not follow one power law with an irreducible
  loss.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import fdtrc

from analysis.laws.powerlaw import Fit
from analysis.laws.solver import Floats
from analysis.logs.selection import alike

SAME_COMPUTE = 0.05  # runs whose compute differs by less than this share belong to one budget
CLEAR = 0.01  # level of each test, below which the status reports it
SAYS = {
    "exponents": "lack of fit: the arms' exponents differ, and m changes with compute (`dynconv table` says how)",
    "sizes": "lack of fit: at equal compute the loss depends on N; use --form nd or `dynconv isoflop`",
    "bend": "lack of fit: the losses bend more than a power law of compute does",
}


def with_lack_of_fit(fit: Fit) -> Fit:
    """The fit with the p-values of the tests that its points allow, and failed tests in its status. Form c only; a fit
    of another form is returned as it is."""
    if fit.form != "c":
        return fit
    found = {
        name: p
        for name, p in (("exponents", _exponents_p(fit)), ("sizes", _sizes_p(fit)), ("bend", _bend_p(fit)))
        if p is not None
    }
    notes = [SAYS[name] for name, p in found.items() if p < CLEAR]
    status = "; ".join(([] if fit.status == "ok" and notes else [fit.status]) + notes)
    return replace(fit, misfit=found, status=status)


def _residual(fit: Fit) -> tuple[Floats, Floats]:
    """Log residuals [n], and the reducible share of the prediction [n], which is the derivative of the log prediction
    in the log of the amplitude."""
    prediction, reducible = np.empty(len(fit.points.loss)), np.empty(len(fit.points.loss))
    arm = np.array(fit.points.arm)
    for name in dict.fromkeys(fit.points.arm):
        mine = arm == name
        prediction[mine] = fit.predict({"C": fit.points.x["C"][mine]}, name)
        reducible[mine] = prediction[mine] - fit.parameter("E", name)
    return np.log(fit.points.loss / prediction), reducible / prediction


def _exponents_p(fit: Fit) -> float | None:
    """p-value of the test "exponents"; None unless arms share the exponent and have an amplitude each."""
    arms = [arm for arm in dict.fromkeys(fit.points.arm) if arm != fit.points.baseline]
    if not arms or fit.per_arm != ("A",):
        return None
    r, share = _residual(fit)
    arm, log_c = np.array(fit.points.arm), _centred_log(fit.points.x["C"])
    _, cluster = np.unique(fit.points.cluster, return_inverse=True)
    amplitudes = np.stack([share * (arm == name) for name in arms], axis=1)
    r, null, further = (_within(part, cluster) for part in (r, amplitudes, amplitudes * log_c[:, None]))
    return _f_test(r, null, further, lost=int(cluster.max()) + 1)


def _sizes_p(fit: Fit) -> float | None:
    """p-value of the test "sizes"; None unless some budget of an arm has several sizes."""
    if fit.points.sizes is None or not np.isfinite(fit.points.sizes).all():
        return None
    _, arm = np.unique(fit.points.arm, return_inverse=True)
    group = alike(fit.points.x["C"], np.array(fit.points.arm), 1 + SAME_COMPUTE)
    _, budget = np.unique(np.stack([arm, group]), axis=1, return_inverse=True)
    x = _within(np.log(fit.points.sizes), budget)
    if np.ptp(x) < SAME_COMPUTE:
        return None
    r, none = _within(_residual(fit)[0], budget), np.empty((len(x), 0))
    bent, turning = _within(x**2, budget), x * _centred_log(fit.points.x["C"])
    # If the sizes tried follow the optimum, a dependence on N shows as a parabola. If every budget has the same sizes,
    # it shows as a slope that changes with compute, since the best size grows. Two tests are made, without and with
    # this slope, because few rows leave too few degrees of freedom for the larger model; the p-value is corrected.
    lost = int(budget.max()) + 1
    asked = (np.stack([x, bent], axis=1), np.stack([x, bent, turning], axis=1))
    found = [p for further in asked if (p := _f_test(r, none, further, lost)) is not None]
    return min(1.0, len(found) * min(found)) if found else None


def _bend_p(fit: Fit) -> float | None:
    """p-value of the test "bend"; None unless all arms share E and the exponent, and there are enough clusters."""
    if not set(fit.per_arm) <= {"A"}:
        return None
    r, share = _residual(fit)
    log_c, arm = _centred_log(fit.points.x["C"]), np.array(fit.points.arm)
    amplitudes = share[:, None] * (arm[:, None] == np.unique(arm))
    columns = np.column_stack([r, 1 - share, amplitudes, share * log_c, log_c**3])
    # The arms and seeds of a cluster share its error, so each cluster counts as one observation, its mean.
    _, cluster = np.unique(fit.points.cluster, return_inverse=True)
    columns = np.stack([np.bincount(cluster, column) for column in columns.T], axis=1)
    columns /= np.bincount(cluster)[:, None]
    return _f_test(columns[:, 0], columns[:, 1:-1], columns[:, -1:])


def _f_test(r: Floats, null: Floats, further: Floats, lost: int = 0) -> float | None:
    """p-value of the null hypothesis that r [n] depends on `null` [n, j] only, against a dependence on `further` [n, k]
    as well. `lost` degrees of freedom are already used up; None where none remain."""
    both = np.hstack([null, further])
    ranks = [int(np.linalg.matrix_rank(part)) if part.size else 0 for part in (null, both)]
    dof, parts = len(r) - ranks[1] - lost, ranks[1] - ranks[0]
    if dof < 1 or parts < 1:
        return None
    rss = [float(((r - part @ np.linalg.lstsq(part, r, rcond=None)[0]) ** 2).sum()) for part in (null, both)]
    tiny = len(r) * 1e-24  # rounding errors of exact data must not count as lack of fit
    return float(fdtrc(parts, dof, max(rss[0] - rss[1], 0.0) / parts / (max(rss[1], tiny) / dof)))


def _within(values: Floats, group: NDArray[np.int_]) -> Floats:
    """`values` [n] or [n, k] minus the means of their groups."""
    columns = values.reshape(len(values), -1)
    means = np.stack([np.bincount(group, column) for column in columns.T], axis=1) / np.bincount(group)[:, None]
    return (columns - means[group]).reshape(values.shape)


def _centred_log(compute: Floats) -> Floats:
    log_c = np.log(compute)
    return np.asarray((log_c - log_c.mean()) / max(np.ptp(log_c), math.ulp(1.0)))
