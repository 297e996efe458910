"""Local multipliers by a law in which the arm's irreducible loss is the baseline's plus a shift.

The arm's loss minus the baseline's E is then linear in x = a0 c1^-g,
    r - d = slope x + shift,
where r is the baseline's reducible loss and d = y0 - y1 the loss difference. The line is fitted to the paired
differences, so that errors which the arms share cancel; m at any compute follows from the line and r there.

Legend: K comparisons at once, S sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from analysis.advantage.averaging import Student, fit_gain
from analysis.advantage.paired import REFITS, Local, SharedLaw, of_law, shared_law
from analysis.laws.solver import Floats

LARGEST_SHIFT = 0.5  # bound of the shift, as a share of the smallest loss
LEAST_LEFT = 1e-3  # lower bound of the arm's loss above E, over the baseline's; m would be infinite if it were 0
STEP = 1e-4  # relative step of finite differences


@dataclass(frozen=True)
class Shifted:
    """The fitted shift, and the law of both arms after the shift is removed from the arm's losses."""

    local: Local
    difference: Floats  # [K, S] y0 - y1
    shift: Floats  # [K] nats a token; negative where the arm's irreducible loss is lower
    t: Floats  # [K] shift over its standard error

    def at(self, compute: float) -> Student:
        """The estimate of ln m at a compute (FLOPs), with `support` by how much better a shift fits than none. Its
        variance is at least that due to the seed noise of each size."""
        law, sizes = self.local.law, self.difference.shape[1]
        ln_m, left, own = _height(self.local, self.difference, law.g, law.a0, compute)
        own_dof = np.full_like(own, sizes - 2)
        if self.local.noise is not None:
            own, own_dof = self.local.noise.at_least(own, own_dof, _share_of_sizes(self.local, compute))
        own = own / (left * law.g) ** 2
        by_law = _law_variance(self.local, lambda g, a0: _height(self.local, self.difference, g, a0, compute)[0])
        total = np.maximum(own + by_law, 1e-300)
        dof = total**2 / np.maximum(own**2 / own_dof + by_law**2 / self.local.law_dof, 1e-300)
        return Student(ln_m, np.sqrt(total), np.minimum(dof, sizes), fit_gain(self.t, sizes))


def shifted_multipliers(local: Local) -> Shifted:
    """Fit the shift, starting from the law with a constant m and refitting shift and law in turn (REFITS times);
    S >= 3."""
    y0, y1 = local.losses
    difference, law = y0 - y1, local.law
    largest = LARGEST_SHIFT * np.minimum(y0.min(axis=1), y1.min(axis=1))
    for _ in range(REFITS):
        shift = np.clip(_line(local, difference, law, law.g, law.a0, np.zeros_like(law.g))[0], -largest, largest)
        law = shared_law(local.c0, local.c1, y0, y1 - shift[:, None], local.irreducible_loss)
    unshifted = of_law(law, local, (y0, y1 - shift[:, None]))
    none = np.zeros_like(shift)
    shift, own = _line(local, difference, law, law.g, law.a0, none)
    by_law_ = _law_variance(unshifted, lambda g, a0: _line(local, difference, law, g, a0, none)[0])
    return Shifted(unshifted, difference, shift, shift / np.sqrt(np.maximum(own + by_law_, 1e-300)))


def _line(local: Local, difference: Floats, law: SharedLaw, g: Floats, a0: Floats, at: Floats) -> tuple[Floats, Floats]:
    """The value [K] of the fitted line at x = `at` [K], and its variance [K], for a law's g and a0 [K]."""
    r, x = (a0[:, None] * (c / law.unit) ** -g[:, None] for c in (local.c0, local.c1))
    left, sizes = r - difference, len(local.c0)
    share, middle, away, lever = _around_the_middle(local, x)
    mean = (share * left).sum(axis=1)
    slope = (share * away * left).sum(axis=1) / lever
    residual = left - mean[:, None] - slope[:, None] * away
    spread = (share * residual**2).sum(axis=1) / (sizes - 2)
    return mean + slope * (at - middle), spread * (1 + (at - middle) ** 2 / lever)


def _around_the_middle(local: Local, x: Floats) -> tuple[Floats, Floats, Floats, Floats]:
    """(weights of the sizes in the fit of the line [K, S], by their inverse variances; weighted mean of x [K];
    deviations of x from it [K, S]; their weighted mean square [K])."""
    share = 1 / (local.variance / local.variance.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    middle = (share * x).sum(axis=1)
    away = x - middle[:, None]
    return share, middle, away, np.maximum((share * away**2).sum(axis=1), 1e-300)


def _share_of_sizes(local: Local, compute: float) -> Floats:
    """The factor [K, S] of each size's loss difference in the height of the line at a compute (FLOPs)."""
    law = local.law
    x, at = (law.a0[:, None] * (c / law.unit) ** -law.g[:, None] for c in (local.c1, np.array([compute])))
    share, middle, away, lever = _around_the_middle(local, x)
    found: Floats = share * (1 + ((at[:, 0] - middle) / lever)[:, None] * away)
    return found


def _height(local: Local, difference: Floats, g: Floats, a0: Floats, compute: float) -> tuple[Floats, Floats, Floats]:
    """(ln m at a compute (FLOPs), the arm's loss above the baseline's E there, the variance of that loss), [K] each."""
    r = a0 * (compute / local.law.unit) ** -g
    left, variance = _line(local, difference, local.law, g, a0, r)
    left = np.maximum(left, LEAST_LEFT * r)
    return -np.log(left / r) / g, left, variance


def _law_variance(local: Local, value: Callable[[Floats, Floats], Floats]) -> Floats:
    """The variance [K] of `value(g, a0)` due to the errors of g and a0, by the delta method."""
    g, a0 = local.law.g, local.law.a0
    middle = value(g, a0)
    slopes = np.stack([value(g * (1 + STEP), a0) - middle, value(g, a0 * (1 + STEP)) - middle], axis=1) / STEP
    found: Floats = np.einsum("ki,kij,kj->k", slopes, local.law_error, slopes)
    return found
