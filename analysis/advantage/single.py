"""An arm with one size: its local multiplier at a stated irreducible loss, without an interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from analysis.advantage.answers import Answer, Multiplier
from analysis.advantage.pairs import Pairs, curve
from analysis.errors import Refusal

if TYPE_CHECKING:
    import pandas as pd


def require_below(irreducible_losses: Sequence[float], least: float) -> None:
    """Raises Refusal unless every irreducible loss is at least 0 and below `least`, the smallest loss."""
    wrong = [E for E in irreducible_losses if not 0 <= E < least]
    if wrong:
        raise Refusal(f"the irreducible loss must be at least 0 and below every loss ({least:g}); got {wrong[0]:g}")


def single_size(
    pairs: Pairs, others: dict[str, Pairs], rows: pd.DataFrame, irreducible_losses: Sequence[float]
) -> Multiplier:
    """The local m of an arm with one size, from the exponent of the baseline's curve at stated `irreducible_losses`.
    Several budgets of a size are averaged. Raises Refusal if the baseline's curve gives no exponent, or a stated
    irreducible loss is not below every loss."""
    if pairs.budgets:
        rows = rows[rows["_budget"].isin(pairs.budgets)]
    curves = {each.convention: curve(rows, each.baseline, each.convention) for each in (pairs, *others.values())}
    if len(curves[pairs.convention][0]) < 2:
        raise Refusal(f"1 paired size, and {pairs.baseline} has no second one to give the exponent; add sizes")
    require_below(irreducible_losses, float(min(pairs.y1[0], curves[pairs.convention][1].min())))

    def at(pairs: Pairs, irreducible_loss: float) -> tuple[float, float]:
        compute, loss = curves[pairs.convention]
        g = -np.polyfit(np.log(compute), np.log(loss - irreducible_loss), 1)[0]
        if g <= 0:
            raise Refusal(f"1 paired size, and the loss of {pairs.baseline} does not fall with compute; add sizes")
        share = (pairs.y0[0] - pairs.y1[0]) / (pairs.y0[0] - irreducible_loss)
        return float(np.exp(-np.log1p(-share) / g) * pairs.c0[0] / pairs.c1[0]), float(g)

    m, g = at(pairs, irreducible_losses[0])
    return Multiplier(
        arm=pairs.arm,
        baseline=pairs.baseline,
        m=m,
        ci=None,
        method="local, by the baseline's exponent at a stated E",
        m_at_cmax=m,
        convention=pairs.convention,
        n_sizes=1,
        n_seeds=pairs.seeds[0],
        status="not resolved: one size gives no interval",
        excluded=pairs.excluded,
        conventions={name: Answer(at(other, irreducible_losses[0])[0], None) for name, other in others.items()},
        irreducible_loss_sensitivity=tuple(
            {
                "E": irreducible_loss,
                "m": at(pairs, irreducible_loss)[0],
                "conventions": {name: at(other, irreducible_loss)[0] for name, other in others.items()},
            }
            for irreducible_loss in irreducible_losses
        ),
        irreducible_loss=irreducible_losses[0],
        exponent=g,
    )
