"""m where it may change with compute: at the largest, by an interval that does not take constancy for granted; and
beyond the sizes.

Three laws answer: m constant; the arm's exponent its own, so that m grows as a power of compute
(`paired.changing_multipliers`); the arm's irreducible loss its own (shifted.py). Few sizes do not tell them apart, so
their answers are averaged by how well each fits (averaging.py).

Legend: K comparisons at once, S sizes.
"""

from __future__ import annotations

import numpy as np

from analysis.advantage.averaging import Student, averaged, fit_gain
from analysis.advantage.constancy import SIGNIFICANCE
from analysis.advantage.paired import Local, trend
from analysis.advantage.shifted import Shifted
from analysis.laws.solver import Floats

# The weight of a changing m before the data speak, a constant one having 1. More of it covers more and is wider: the
# frontier is in analysis/README.md. Few sizes need less, as their t distributions are wide.
ODDS_A_SIZE = 0.1  # for each size beyond the two that a line takes
MOST_ODDS = 0.5


def reported(local: Local, p: Floats, changing: Local, odds: float | None = None) -> tuple[Floats, Floats, Floats]:
    """The headline's ln m and the ends of its interval, [K] each, given `constancy_p` [K] and `changing` (of
    `changing_multipliers`). ln m is the constant one, or where p is below SIGNIFICANCE that at the largest compute.

    The interval is for m at the largest compute, whether m changes or not: the constant and the changing law's,
    averaged by how well each fits, the second having `odds` before the data. Coverage and width: analysis/README.md.
    """
    sizes = local.ln_m.shape[1]
    top = trend(changing, local.c0[-1])
    ln_m = np.where(p < SIGNIFICANCE, top.at, local.mean)
    odds = odds or min(MOST_ODDS, ODDS_A_SIZE * (sizes - 2))
    none = np.zeros_like(ln_m)
    constant = Student(local.mean, local.error, none + sizes - 1, none)
    varying = Student(top.at, top.error, top.dof, np.log(odds) + fit_gain(trend(local, local.c0[-1]).t, sizes))
    _, low, high = averaged([constant, varying])
    return ln_m, np.minimum(low, ln_m), np.maximum(high, ln_m)


def band(changing: Local, shifted: Shifted, compute: float) -> tuple[Floats, Floats, Floats]:
    """ln m at a compute (FLOPs) by the two laws in which it changes, and the ends of its 95% interval, [K] each.

    The laws bend differently beyond the sizes. At 10x, with what is labelled 95%, the law with an exponent of its own
    covers .69 to .98 over the grid of analysis/README.md, and both together .87 to .98.
    """
    line = trend(changing, compute)
    own_exponent = Student(line.at, line.error, line.dof, fit_gain(line.t, changing.ln_m.shape[1]))
    return averaged([own_exponent, shifted.at(compute)])
