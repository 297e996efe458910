"""Minimise a loss of log y against log sum_t exp(terms), for many starts or many resamples at once.

Every power law here is a sum of positive terms, and the log of each term is linear in the parameters (log E;
log A - alpha log N; ...), so one solver serves all forms and all ways to share parameters among arms. All tolerances
are relative, so that scaling the data or the objective does not change the result.

Legend: K problems solved at once, T terms, P parameters, n points.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Indices = NDArray[np.int_]

# Iteratively reweighted least squares brings any start close to an optimum, then Newton's method converges to it.
# Huber's loss with a small delta is almost piecewise linear, so it is solved for decreasing deltas in turn.
SCHEDULE = ((None, 40), (1.0, 60))  # multiple of delta (None: reweighted at the widest), iterations
HUBER_SCHEDULE = ((None, 30), (64.0, 10), (16.0, 15), (4.0, 20), (1.0, 80))
GRADIENT_TOLERANCE = 1e-9  # stop below this gradient, relative to the sum of the points' absolute contributions
ROUNDING = 1e-8  # relative residuals below this count as rounding, so that a fit to exact data can converge
TOGETHER = 256  # problems iterated at once: enough to share the overhead, few enough for a processor's cache
RIDGE = 1e-11  # added to the unit diagonal of a scaled system, for parameters that the points do not determine
CONVERGED = 1e-5  # a solution whose relative gradient is below this counts as converged


@dataclass(frozen=True)
class Loss:
    """Huber on the log residual with a given delta, or least squares on the raw residual (delta None)."""

    delta: float | None

    def __call__(self, f: Floats, log_y: Floats) -> tuple[Floats, Floats, Floats, Floats]:
        """Value, first and second derivative in f = log prediction, and a positive substitute for the second derivative
        (that of reweighted least squares)."""
        if self.delta is None:
            with np.errstate(over="ignore", invalid="ignore"):  # a step that overflows is rejected
                prediction = np.exp(f)
                residual = prediction - np.exp(log_y)
                square = prediction * prediction
                slope = residual * prediction
                return 0.5 * residual * residual, slope, square + slope, square
        r = f - log_y
        size = np.abs(r)
        inside = size <= self.delta
        value = np.where(inside, 0.5 * r * r, self.delta * (size - 0.5 * self.delta))
        slope = np.clip(r, -self.delta, self.delta)
        return value, slope, inside.astype(float), self.delta / np.maximum(size, self.delta)


@dataclass(frozen=True)
class Solution:
    theta: Floats  # [K, P]
    objective: Floats  # [K] sums over the points
    gradient: Floats  # [K] largest entry, as a share of its absolute contributions; inactive bounds only
    converged: Bools  # [K]


@dataclass(frozen=True)
class Problem:
    """A minimisation problem: the terms at every point, the bounds of the parameters and the loss function."""

    terms: Floats  # [T, P, n]: log term t of point i is theta @ terms[t, :, i]
    low: Floats  # [P]
    high: Floats  # [P]
    linear: Bools  # [P]: parameters that are logs of levels, in which the prediction is linear
    loss: Loss

    def predict(self, theta: Floats) -> Floats:
        """Log predictions [K, n] of parameters [K, P]."""
        return self._shares(theta)[0]

    def _shares(self, theta: Floats) -> tuple[Floats, Floats]:
        """Log predictions [K, n], and each term's share of the prediction [K, T, n]."""
        logs = np.tensordot(theta, self.terms, axes=(1, 1))
        top = logs.max(axis=1, keepdims=True)
        share = np.exp(logs - top)
        total = share.sum(axis=1, keepdims=True)
        return (np.log(total) + top)[:, 0], share / total

    def objective(self, theta: Floats, log_y: Floats, weight: Floats | float = 1.0) -> Floats:
        """The objective [K], a weighted sum over the points."""
        return (weight * self.loss(self.predict(theta), log_y)[0]).sum(axis=1)

    def solve(self, starts: Floats, log_y: Floats, weight: Floats | float = 1.0) -> Solution:
        """Minimise from `starts` [K, P], with log_y [n] or [K, n]; a point counts `weight` [K, n] times."""
        theta = np.clip(starts, self.low, self.high)
        log_y = np.broadcast_to(log_y, (len(starts), self.terms.shape[2]))
        weight = np.broadcast_to(weight, log_y.shape)
        gradient = np.empty(len(starts))
        with np.errstate(over="ignore", invalid="ignore"):  # steps that overflow are rejected
            for first in range(0, len(starts), TOGETHER):
                part = slice(first, first + TOGETHER)
                for stage, newton, iterations in self._stages():
                    gradient[part] = stage._descend(theta[part], log_y[part], weight[part], newton, iterations)
        return Solution(theta, self.objective(theta, log_y, weight), gradient, gradient < CONVERGED)

    def _stages(self) -> list[tuple[Problem, bool, int]]:
        """The problems to solve in turn; for each, whether by Newton's method, and the number of iterations."""
        delta = self.loss.delta
        if delta is None:
            return [(self, widen is not None, iterations) for widen, iterations in SCHEDULE]
        widest = max(widen or 0 for widen, _ in HUBER_SCHEDULE)
        return [
            (replace(self, loss=replace(self.loss, delta=delta * (widen or widest))), widen is not None, iterations)
            for widen, iterations in HUBER_SCHEDULE
        ]

    def leverage(self, theta: Floats) -> Floats:
        """The leverage [n] of each point at theta [P]: the diagonal of the hat matrix of least squares, on raw or log
        residuals according to the loss, without the parameters that are at a bound."""
        f, share = self._shares(theta[None])
        jacobian = np.einsum("tn,tpn->np", share[0], self.terms)[:, (theta > self.low) & (theta < self.high)]
        if self.loss.delta is None:
            jacobian = jacobian * np.exp(f[0])[:, None]
        basis, _ = np.linalg.qr(jacobian)
        return np.asarray((basis**2).sum(axis=1))

    def curvature(self, theta: Floats, log_y: Floats) -> Floats:
        """A positive semidefinite approximation [K, P, P] of the Hessian: that of reweighted least squares."""
        return self._derivatives(theta, log_y, np.ones(1), newton=False)[2]

    def _descend(self, theta: Floats, log_y: Floats, weight: Floats, newton: bool, iterations: int) -> Floats:
        """Damped steps, each accepted only if it lowers the objective; changes `theta` in place and returns the
        relative gradients [K].

        Steps are taken in the levels, not in their logs, so that E can reach 0 and leave it again.
        """
        low, high = (np.broadcast_to(bound, theta.shape) for bound in (self.low, self.high))
        objective = self.objective(theta, log_y, weight)
        damping = np.full(len(theta), 1e-3)
        gradient = np.full(len(theta), np.inf)
        running = np.arange(len(theta))
        for _ in range(iterations):
            here, y, w = theta[running], log_y[running], weight[running]
            slope, hessian, robust, scale = map(np.nan_to_num, self._derivatives(here, y, w, newton))
            level = np.where(self.linear, np.exp(here), 1.0)
            if newton:
                hessian = hessian - np.eye(len(self.linear)) * np.where(self.linear, slope, 0.0)[:, None, :]
            product = level[:, :, None] * level[:, None, :]
            free = ~(((here <= low[running]) & (slope > 0)) | ((here >= high[running]) & (slope < 0)))
            free &= self.low < self.high  # a held parameter may differ from its bound by rounding
            gradient[running] = np.where(free, np.abs(slope) / np.maximum(scale, 1e-300), 0).max(axis=1)
            ends = [np.where(self.linear, np.exp(end[running]), end[running]) for end in (low, high)]
            at = np.where(self.linear, level, here)
            room = (ends[0] - at, ends[1] - at)
            step = _step(slope / level, hessian / product, robust / product, free, damping[running], room)
            moved = np.clip(at + step, *ends)
            moved = np.where(self.linear, np.log(np.where(self.linear, moved, 1.0)), moved)
            value = self.objective(moved, y, w)
            better = value < objective[running]
            theta[running[better]] = moved[better]
            objective[running[better]] = value[better]
            damping[running] = np.clip(damping[running] * np.where(better, 0.2, 6.0), 1e-12, 1e12)
            running = running[(gradient[running] > GRADIENT_TOLERANCE) & (damping[running] < 1e11)]
            if len(running) == 0:
                break
        return gradient

    def _derivatives(
        self, theta: Floats, log_y: Floats, weight: Floats, newton: bool
    ) -> tuple[Floats, Floats, Floats, Floats]:
        """Gradient [K, P]; Hessian [K, P, P] if `newton`, else its positive approximation; that approximation; and the
        sum of the absolute contributions to the gradient [K, P]."""
        f, share = self._shares(theta)
        jacobian = sum((share[:, t, None] * term for t, term in enumerate(self.terms)), np.zeros(1))
        first, second, stand_in = (weight * part for part in self.loss(f, log_y)[1:])
        slope = np.einsum("kpn,kn->kp", jacobian, first)
        scale = np.einsum("kpn,kn->kp", np.abs(jacobian), np.maximum(np.abs(first), ROUNDING * stand_in))
        robust = (jacobian * stand_in[:, None, :]) @ jacobian.transpose(0, 2, 1)
        if not newton:
            return slope, robust, robust, scale
        hessian = (jacobian * (second - first)[:, None, :]) @ jacobian.transpose(0, 2, 1)
        for t, term in enumerate(self.terms):
            hessian += (term * (first * share[:, t])[:, None, :]) @ term.T
        return slope, hessian, robust, scale


def _step(
    slope: Floats, hessian: Floats, robust: Floats, free: Bools, damping: Floats, room: tuple[Floats, Floats]
) -> Floats:
    """The damped step [K, P], limited to `room` below and above; `robust`, the positive approximation of the Hessian,
    replaces it where the step would not descend.

    Parameters that are not free do not move. One that would leave its room is moved to the limit, and the step of the
    others is then recomputed.
    """
    diagonal = np.einsum("kpp->kp", robust)
    felt = diagonal > 1e-100  # a parameter without effect on any prediction does not move
    free = free & felt
    unit = 1 / np.sqrt(np.where(felt, diagonal, 1.0))  # scales the system to a unit diagonal
    scale = unit[:, :, None] * unit[:, None, :]
    damped = damping[:, None, None] * robust
    ridge = RIDGE * (1 + damping[:, None, None]) * np.eye(slope.shape[1])

    def solve(matrix: Floats) -> Floats:
        matrix = (matrix + damped) * scale + ridge
        step = _reduced(matrix, -slope * unit, free, np.zeros_like(slope)) * unit
        edge = np.clip(step, *room)
        leaves = free & (edge != step)
        if leaves.any():
            step = _reduced(matrix, -slope * unit, free & ~leaves, np.where(leaves, edge / unit, 0)) * unit
        return step

    step = solve(hessian)
    uphill = (step * slope).sum(axis=1) >= 0
    if uphill.any() and hessian is not robust:
        step[uphill] = solve(robust)[uphill]
    return step


def _reduced(matrix: Floats, right: Floats, free: Bools, fixed: Floats) -> Floats:
    """Solve matrix @ step = right for the free parameters [K, P], the others being `fixed`."""
    right = right - (matrix @ fixed[:, :, None])[:, :, 0]
    both = free[:, :, None] & free[:, None, :]
    matrix = np.where(both, matrix, 0) + np.eye(free.shape[1]) * ~free[:, :, None]
    step = np.linalg.solve(matrix, np.where(free, right, 0)[:, :, None])
    return np.where(free, step[:, :, 0], fixed)
