"""An m that may change with compute: its interval at the largest compute, and its extrapolation beyond the sizes.

Three laws are considered: m is constant; the arm has an exponent of its own, so that m grows as a power of compute
(`paired.changing_multipliers`); the arm has an irreducible loss of its own (shifted.py). Few sizes cannot distinguish
these laws, so their estimates are averaged with weights by goodness of fit (averaging.py).

Legend: K comparisons at once, S sizes.
"""

from __future__ import annotations

import numpy as np

from analysis.advantage.averaging import Student, averaged, fit_gain
from analysis.advantage.constancy import SIGNIFICANCE
from analysis.advantage.paired import Local, trend
from analysis.advantage.shifted import Shifted
from analysis.laws.solver import Floats

# Prior odds of a changing m against a constant one. Larger odds give better coverage and wider intervals; the trade-off
# is tabulated in analysis/README.md. Few sizes need smaller odds, since their t distributions are already wide.
ODDS_A_SIZE = 0.1  # for each size beyond the two that determine a line
MOST_ODDS = 0.5


def reported(
    local: Local, p: Floats, changing: Local, odds: float | None = None, level: float = 0.05
) -> tuple[Floats, Floats, Floats]:
    """(ln m of the headline, low and high end of its interval), [K] each.

    `p` [K] is `constancy_p` and `changing` the result of `changing_multipliers`. ln m is the constant one, or, if p is
    below SIGNIFICANCE, the one at the largest compute. The interval is for m at the largest compute in either case. It
    averages the laws of a constant and of a changing m by how well each fits, with prior odds `odds` for the latter;
    `level` is the probability that it misses. Its coverage and width are in analysis/README.md.
    """
    sizes = local.ln_m.shape[1]
    top = trend(changing, local.c0[-1])
    ln_m = np.where(p < SIGNIFICANCE, top.at, local.mean)
    odds = odds or min(MOST_ODDS, ODDS_A_SIZE * (sizes - 2))
    zero = np.zeros_like(ln_m)
    constant = Student(local.mean, local.error, zero + sizes - 1, zero)
    varying = Student(top.at, top.error, top.dof, np.log(odds) + fit_gain(trend(local, local.c0[-1]).t, sizes))
    _, low, high = averaged([constant, varying], 1 - level)
    return ln_m, np.minimum(low, ln_m), np.maximum(high, ln_m)


def band(changing: Local, shifted: Shifted, compute: float) -> tuple[Floats, Floats, Floats]:
    """(ln m, low and high end of its 95% interval) at a compute (FLOPs), [K] each, averaged over the two laws in which
    m changes. The variance is at least that of the seed noise of each size (seeds.py).

    The two laws extrapolate differently. At 10x the largest compute, the nominal 95% interval of the law with its own
    exponent covers .69 to .98 of the simulated truths over the grid of analysis/README.md; the average covers .87 to
    .98.
    """
    line = trend(changing, compute, at_least_seeds=True)
    own_exponent = Student(line.at, line.error, line.dof, fit_gain(line.t, changing.ln_m.shape[1]))
    return averaged([own_exponent, shifted.at(compute)])
