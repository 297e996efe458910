"""Curves of loss against ln N at equal compute, one for each budget, with two shape parameters common to all budgets.

With L = E + A N^-alpha + B D^-beta and N D fixed by the budget, loss over u = ln N - ln N* is
    L* + k ((e^(-a u) - 1) / a + (e^(b u) - 1) / b),
where a and b, which are close to alpha and beta, are the same at every budget, while L*, k and N* differ by budget. For
small a and b the curve is a parabola. A plain parabola is exact at the minimum only: over a wide or asymmetric range of
sizes it biases N*, and if all budgets have the same sizes it biases the exponent of N*(C). Given (a, b) a curve is
linear in three coefficients, so only a and b need a nonlinear search (variable projection).

Where the sizes are too close together to determine a and b, a broad prior keeps them near the published exponents.

Legend: B budgets, n sizes at most in one (absent ones have weight 0), x = ln N.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import fdtrc

from analysis.laws.solver import Bools, Floats

BEND = 0.3  # a and b before the data have been seen: published alpha and beta are .28 to .37 (arXiv 2404.10102)
BEND_SPREAD = 0.5  # sd of ln a and ln b about it: 95% within a factor of 2.7
BENDS = (0.02, 0.8)  # bounds of a and b, so that diverged runs cannot be fitted by an implausibly steep curve
STEP = 1e-4  # of ln a and ln b, in finite differences
ITERATIONS = 40
COEFFICIENTS = 3  # of a budget's curve
FEWEST_CONTRASTS = 3  # contrasts of neighbouring sizes needed to estimate the noise for the lack-of-fit test
NORMAL_MEDIAN = 0.6745  # median of |z|, z standard normal
EFFICIENCY = 0.4  # effective degrees of freedom for each contrast, when a variance is estimated by their median


@dataclass(frozen=True)
class Minima:
    """The fitted curves' minima. What does not exist is NaN."""

    bend: Floats  # [2] a, b
    best: Floats  # [B] ln N*
    covariance: Floats  # [B, B] of ln N*, from the noise and from the uncertainty of a and b
    loss: Floats  # [B] L*
    loss_error: Floats  # [B] standard error of it
    curvature: Floats  # [B] second derivative of loss in ln N at the minimum
    bending: Floats  # [B] t statistic of the curvature: the coefficient of the function near u^2 / 2
    noise: float  # sd of a loss about its curve
    dof: float  # degrees of freedom of `noise`
    misfit_p: Floats  # [B] p-value of the test that residuals are no larger than the noise between neighbouring sizes
    joint_misfit_p: float  # the same for all budgets together; both are NaN where the noise cannot be estimated


@dataclass(frozen=True)
class _Given:
    """The curves of all budgets, fitted by least squares at given (a, b)."""

    coefficients: Floats  # [B, 3]
    gram: Floats  # [B, 3, 3]
    residual: Floats  # [B, n]
    best: Floats  # [B]
    loss: Floats  # [B]
    curvature: Floats  # [B]


class Curves:
    """Losses y [B, n] at x = ln N [B, n]; `used` [B, n] are the points that count."""

    def __init__(self, x: Floats, y: Floats, used: Bools) -> None:
        self.weight = used.astype(float)
        count = self.weight.sum(axis=1)
        self.middle = (self.weight * x).sum(axis=1) / count
        self.level = (self.weight * y).sum(axis=1) / count
        self.u = np.where(used, x - self.middle[:, None], 0.0)
        self.y = np.where(used, y - self.level[:, None], 0.0)
        self.points = int(count.sum())

    def minima(self) -> Minima:
        """Fit all curves. By the delta method, the errors of N* and L* have two parts: those of the coefficients of the
        budget's own curve at given (a, b), and those of a and b, which all budgets share."""
        theta, precision, noise, dof = self._fit_bend()
        here = self._given(theta)
        around = self._around(theta)
        of_theta = np.linalg.inv(precision)
        of_coefficients = np.linalg.inv(here.gram) * noise**2
        best_by_theta = np.stack([(up.best - down.best) / (2 * STEP) for up, down in around])
        loss_by_theta = np.stack([(up.loss - down.loss) / (2 * STEP) for up, down in around])
        slope = self._best_slope(theta, here)
        covariance = np.diag(np.einsum("bi,bij,bj->b", slope, of_coefficients, slope))
        covariance = covariance + best_by_theta.T @ of_theta @ best_by_theta
        at_best = self._functions(theta, here.best[:, None])[:, 0]
        loss_variance = np.einsum("bi,bij,bj->b", at_best, of_coefficients, at_best)
        loss_variance += np.einsum("ib,ij,jb->b", loss_by_theta, of_theta, loss_by_theta)
        error = np.sqrt(np.maximum(of_coefficients[:, 2, 2], 1e-300))
        misfit_p, joint_misfit_p = self._misfit_p(here)
        return Minima(
            bend=np.exp(theta),
            best=here.best + self.middle,
            covariance=covariance,
            loss=here.loss + self.level,
            loss_error=np.sqrt(loss_variance),
            curvature=here.curvature,
            bending=here.coefficients[:, 2] / error,
            noise=noise,
            dof=dof,
            misfit_p=misfit_p,
            joint_misfit_p=joint_misfit_p,
        )

    def _given(self, theta: Floats) -> _Given:
        """The least-squares curves at given ln a, ln b."""
        basis = self._basis(theta)
        gram = np.einsum("bni,bn,bnj->bij", basis, self.weight, basis)
        right = np.einsum("bni,bn->bi", basis, self.weight * self.y)
        c = np.linalg.solve(gram, right[:, :, None])[:, :, 0]
        residual = self.weight * (self.y - np.einsum("bni,bi->bn", basis, c))
        a, b = np.exp(theta)
        left, rise = c[:, 2] / (a + b) - c[:, 1] / 2, c[:, 2] / (a + b) + c[:, 1] / 2  # slope: rise e^bu - left e^-au
        exists = (left > 0) & (rise > 0)
        ratio = np.where(exists, left, np.nan) / np.where(exists, rise, np.nan)
        best = np.log(ratio) / (a + b)
        at_best = self._functions(theta, best[:, None])[:, 0]
        loss = np.einsum("bi,bi->b", at_best, c)
        return _Given(c, gram, residual, best, loss, (a + b) * left * np.exp(-a * best))

    def _functions(self, theta: Floats, u: Floats) -> Floats:
        """The three basis functions of a curve at u [B, n], as [B, n, 3]: 1, a function close to u, one close to
        u^2 / 2."""
        a, b = np.exp(theta)
        falls, rises = -np.expm1(-a * u) / a, np.expm1(b * u) / b
        return np.stack([np.ones_like(u), (falls + rises) / 2, (rises - falls) / (a + b)], axis=2)

    def _basis(self, theta: Floats) -> Floats:
        return self._functions(theta, self.u)

    def _best_slope(self, theta: Floats, here: _Given) -> Floats:
        """Derivative [B, 3] of u* in the coefficients: -(dL'/dc) / L''."""
        a, b = np.exp(theta)
        falls, rises = np.exp(-a * here.best), np.exp(b * here.best)
        parts = [np.zeros_like(falls), (falls + rises) / 2, (rises - falls) / (a + b)]
        return -np.stack(parts, axis=1) / here.curvature[:, None]

    def _around(self, theta: Floats) -> list[tuple[_Given, _Given]]:
        return [(self._given(theta + step), self._given(theta - step)) for step in STEP * np.eye(2)]

    def _fit_bend(self) -> tuple[Floats, Floats, float, float]:
        """ln a and ln b; their precision matrix [2, 2]; the noise and its degrees of freedom. Takes damped Gauss-Newton
        steps on the residuals of the least-squares curves. The noise, which sets the weight of the data against the
        prior, is re-estimated after every step."""
        prior = np.full(2, np.log(BEND))
        theta, damping = prior.copy(), 1e-3
        here = self._given(theta)
        jacobian, variance, dof = self._linearised(theta, here)

        def cost(given: _Given, theta: Floats) -> float:
            return float((given.residual**2).sum() / variance + ((theta - prior) ** 2).sum() / BEND_SPREAD**2)

        for _ in range(ITERATIONS):
            hessian = jacobian.T @ jacobian / variance + np.eye(2) / BEND_SPREAD**2
            slope = jacobian.T @ here.residual.ravel() / variance + (theta - prior) / BEND_SPREAD**2
            step = -np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), slope)
            moved = np.clip(theta + step, *np.log(BENDS))
            there = self._given(moved)
            if cost(there, moved) > cost(here, theta):
                damping *= 8
                if damping > 1e6:
                    break
                continue
            small = float(np.abs(moved - theta).max()) < 1e-6
            theta, here, damping = moved, there, damping / 5
            jacobian, variance, dof = self._linearised(theta, here)
            if small:
                break
        return theta, jacobian.T @ jacobian / variance + np.eye(2) / BEND_SPREAD**2, float(np.sqrt(variance)), dof

    def _linearised(self, theta: Floats, here: _Given) -> tuple[Floats, float, float]:
        """The derivatives [B n, 2] of the residuals in ln a and ln b, the variance of the residuals and its degrees of
        freedom. a and b use up a fraction of two degrees of freedom: the share that the data, rather than the prior,
        determine."""
        jacobian = np.stack([((up.residual - down.residual) / (2 * STEP)).ravel() for up, down in self._around(theta)])
        gram = jacobian @ jacobian.T
        rss = float((here.residual**2).sum())
        dof = float(max(self.points - COEFFICIENTS * len(self.y), 1))
        for _ in range(3):
            variance = max(rss / dof, 1e-24)
            by_data = np.linalg.solve(gram / variance + np.eye(2) / BEND_SPREAD**2, gram / variance)
            dof = max(self.points - COEFFICIENTS * len(self.y) - float(np.trace(by_data)), 1.0)
        return jacobian.T, max(rss / dof, 1e-24), dof

    def _misfit_p(self, here: _Given) -> tuple[Floats, float]:
        """p-values of F tests, for each budget and for all together, that compare the residuals with the noise between
        neighbouring sizes."""
        count = self.weight.sum(axis=1)
        rss = (here.residual**2).sum(axis=1)
        dof = np.maximum(count - COEFFICIENTS, 0)
        rough = self._roughness(here)
        if len(rough) < FEWEST_CONTRASTS:
            return np.full(len(count), np.nan), float("nan")
        variance = max(float((np.median(np.abs(rough)) / NORMAL_MEDIAN) ** 2), 1e-24)
        noise_dof = max(EFFICIENCY * len(rough), 1.0)
        each = fdtrc(np.maximum(dof, 1), noise_dof, rss / np.maximum(dof, 1) / variance)
        all_dof = max(float(dof.sum()) - 2, 1.0)
        return np.where(dof > 0, each, np.nan), float(fdtrc(all_dof, noise_dof, rss.sum() / all_dof / variance))

    def _roughness(self, here: _Given) -> Floats:
        """For every four neighbouring sizes, the contrast of their residuals that is zero for any parabola, scaled to
        the standard deviation of a single loss. A step or a kink affects only a few contrasts, so their median is a
        robust estimate of the noise."""
        found = []
        for u, residual, weight in zip(self.u, here.residual, self.weight, strict=True):
            order = np.argsort(u[weight > 0])
            x, r = u[weight > 0][order], residual[weight > 0][order]
            for i in range(len(x) - 3):
                t = x[i : i + 4]
                contrast = np.array([1 / np.prod(t[j] - np.delete(t, j)) for j in range(4)])
                found.append(float(contrast @ r[i : i + 4] / np.linalg.norm(contrast)))
        return np.array(found)
