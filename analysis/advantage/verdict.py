"""Tests of the assumptions behind a comparison: that m is constant, and that errors are independent over sizes.

`judge` takes arrays, so that it also works for m in seconds: give the arm's compute divided by its relative throughput.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from analysis.advantage.constancy import (
    NEGLIGIBLE,
    ROUNDING,
    SIGNIFICANCE,
    change_bounds,
    constancy_p,
    correlation_p,
    shown_constant,
)
from analysis.advantage.joint import Interval
from analysis.advantage.paired import Local, changing_multipliers, local_multipliers, ratio
from analysis.advantage.seeds import NoiseBySize
from analysis.laws.solver import Floats


@dataclass(frozen=True)
class Verdict:
    """One comparison by both laws, and the tests of its assumptions. The last four are None below three sizes."""

    local: Local  # by the law of a constant m
    changing: Local  # by the law of a changing m
    constant_m_p: float | None  # p-value of the test that m is constant
    constancy: str | None  # "shown", "not shown" or "rejected"
    change: Interval | None  # 90% interval of m at the largest compute over the mean m
    correlation_p: float | None  # p-value of the test that errors are independent over sizes; None if untestable

    def remarks(self) -> Iterator[str]:
        """Warnings for the reader: m may change with compute, or errors of sizes are correlated."""
        if self.constancy == "not shown":
            yield f"m is not shown to be constant within {NEGLIGIBLE:.0%}: see m at Cmax, the largest compute"
        if self.correlation_p is not None and self.correlation_p < SIGNIFICANCE:
            yield (
                f"errors of neighbouring sizes go together (p = {self.correlation_p:.3f}), so intervals are too "
                "narrow: find what else changes with size (learning rate, batch, data)"
            )


def judge(
    c0: Floats,
    c1: Floats,
    y0: Floats,
    y1: Floats,
    *,
    irreducible_loss: float | None = None,
    noise: NoiseBySize | None = None,
    resamples: int = 999,
    seed: int = 0,
) -> Verdict:
    """Compare losses y0, y1 [S] (nats a token, averaged over seeds) at computes c0, c1 [S] (FLOPs), and test the
    assumptions. `irreducible_loss` is a stated E, which is then not fitted; `noise` is the seed noise, if known."""
    local = local_multipliers(c0, c1, y0[None], y1[None], irreducible_loss, noise)
    if len(c0) < 3:
        return Verdict(local, local, None, None, None, None)
    changing = changing_multipliers(local)
    p = float(
        constancy_p(c0, c1, y0[None], y1[None], resamples, seed, irreducible_loss=irreducible_loss, noise=noise)[0]
    )
    low, high = change_bounds(changing)
    # The residuals of losses without noise are rounding errors, which are far from independent.
    independence_p = np.nan if np.ptp(local.ln_m[0]) < ROUNDING else float(correlation_p(changing)[0])
    return Verdict(
        local=local,
        changing=changing,
        constant_m_p=p,
        constancy="rejected" if p < SIGNIFICANCE else "shown" if shown_constant(changing)[0] else "not shown",
        change=(ratio(low[0]), ratio(high[0])),
        correlation_p=None if math.isnan(independence_p) else independence_p,
    )
