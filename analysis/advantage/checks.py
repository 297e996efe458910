"""Checks of a paired estimate: m with a size left out, at other irreducible losses, against seed noise and compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from analysis.advantage.answers import Answer, AskedAt, At
from analysis.advantage.changing import band, reported
from analysis.advantage.joint import Interval, joint_interval
from analysis.advantage.paired import Local, changing_multipliers, local_multipliers, ratio, seed_noise, trend
from analysis.advantage.pairs import Pairs
from analysis.advantage.shifted import shifted_multipliers
from analysis.errors import Refusal
from analysis.laws.solver import Floats

EXTRAPOLATED = 10.0  # m(C) is drawn up to this multiple of the largest compute
FARTHEST = 1e6  # factor beyond the trained computes above which no m is given, even if the user asks for it
IRREDUCIBLE_LOSS_SHIFTS = (0.0, 0.5, 0.9, 1.0, 1.1)  # multiples of the fitted E at which m is computed as well


def local_of(pairs: Pairs, irreducible_loss: float | None) -> Local:
    """The paired estimate under the law of a constant m; `irreducible_loss` is a stated E, or None to fit it."""
    return local_multipliers(pairs.c0, pairs.c1, pairs.y0[None], pairs.y1[None], irreducible_loss, pairs.noise)


def headline_answer(local: Local, p: float | None, level: float = 0.05) -> Answer:
    """The headline m and its interval, which misses with probability `level`.

    `p` is the p-value of the test that m is constant, or None below three sizes.
    """
    if p is None:
        return answer_of(local.mean, *local.interval(level))
    return answer_of(*reported(local, np.array([p]), changing_multipliers(local), level=level))


def answer_of(ln_m: Floats, low: Floats, high: Floats) -> Answer:
    """The answer of the first comparison, from ln m and the ends of its interval, [K] each."""
    return Answer(ratio(ln_m[0]), (ratio(low[0]), ratio(high[0])))


def by_joint_fit(pairs: Pairs) -> Answer | None:
    """m by the joint fit of both arms; None if every m fits equally well."""
    found = joint_interval(pairs)
    return found and Answer(*found)


def curve(pairs: Pairs, local: Local) -> Iterator[At]:
    """m(C) with its 95% band. From three sizes on it follows the laws in which m changes, since an extrapolation should
    not assume that m is constant. Two sizes cannot show a change, so for them it is the constant m, and only within
    their range of compute."""
    if len(pairs.sizes) < 3:
        for compute in np.geomspace(pairs.c0[0], pairs.c0[-1], 40):
            answer = headline_answer(local, None)
            assert answer.ci is not None
            yield At(float(compute), answer.m, answer.ci)
        return
    yield from _by_changing_laws(local, np.geomspace(pairs.c0[0], EXTRAPOLATED * pairs.c0[-1], 40))


def _by_changing_laws(local: Local, computes: Sequence[float] | Floats) -> Iterator[At]:
    """m at each compute (FLOPs) with its 95% interval, by the laws in which m changes; S >= 3."""
    changing, shifted = changing_multipliers(local), shifted_multipliers(local)
    for compute in map(float, computes):
        ln_m, low, high = band(changing, shifted, compute)
        yield At(compute, ratio(ln_m[0]), (ratio(low[0]), ratio(high[0])))


def asked_at(local: Local, computes: Sequence[float]) -> Iterator[AskedAt]:
    """m at computes (FLOPs) that the user asked for, by the laws of `curve`; none below three sizes.

    `curve` stops at EXTRAPOLATED times the largest compute, up to which its band was simulated. A compute that the user
    asked for may lie beyond, since the answer states how far; its interval is valid only if the laws hold there.
    """
    if len(local.c0) < 3:
        return
    for at in _by_changing_laws(local, computes):
        yield AskedAt(at.compute, at.m, at.ci, at.compute / float(local.c0[-1]), at.compute / float(local.c0[0]))


def require_in_reach(computes: Sequence[float], trained: Floats) -> None:
    """Raises Refusal for a compute (FLOPs) more than FARTHEST times above the largest or below the smallest of
    `trained`. A law fitted to these runs says nothing there, and such a number is most likely a mistake."""
    low, high = float(trained.min()), float(trained.max())
    if far := [each for each in computes if not low / FARTHEST <= each <= high * FARTHEST]:
        raise Refusal(
            f"--at {far[0]:.4g} is too far from the {low:.3g} to {high:.3g} FLOPs that were trained: at most "
            f"{FARTHEST:.0e} times beyond is answered; give a number from {low / FARTHEST:.3g} to {high * FARTHEST:.3g}"
        )


def headline(local: Local, varies: bool, top: float) -> float:
    """m as in the headline: the constant one, or m at compute `top` (FLOPs) if m varies."""
    return ratio((trend(changing_multipliers(local), top).at if varies else local.mean)[0])


def leave_one_out(pairs: Pairs, stated: float | None, local: Local, varies: bool) -> Interval | None:
    """(smallest, largest) headline m with each size left out in turn.

    E is refitted as long as three sizes remain; otherwise it is held at the E of all sizes (`local`). None if fewer
    than two sizes would remain, or fewer than three if m varies.
    """
    sizes = len(pairs.sizes)
    if sizes < (4 if varies else 3):
        return None
    irreducible_loss = float(local.law.E[0]) if stated is None and sizes == 3 else stated
    values = []
    for out in range(sizes):
        keep = np.arange(sizes) != out
        part = (pairs.c0[keep], pairs.c1[keep], pairs.y0[None, keep], pairs.y1[None, keep])
        noise = local.noise and local.noise.of_sizes(keep)
        values.append(headline(local_multipliers(*part, irreducible_loss, noise), varies, pairs.c0[-1]))
    return min(values), max(values)


def at_other_irreducible_losses(
    pairs: Pairs, others: dict[str, Pairs], local: Local, stated: Sequence[float], varies: bool
) -> tuple[dict[str, Any], ...]:
    """m at each stated irreducible loss, or, if none is stated, at multiples of the fitted one. Values that are not
    below every measured loss are left out."""
    irreducible_losses = stated or dict.fromkeys(shift * float(local.law.E[0]) for shift in IRREDUCIBLE_LOSS_SHIFTS)
    least = min(pairs.y0.min(), pairs.y1.min())
    possible = [irreducible_loss for irreducible_loss in irreducible_losses if irreducible_loss < 0.999 * least]

    def m(pairs: Pairs, irreducible_loss: float) -> float:
        return headline(local_of(pairs, irreducible_loss), varies, pairs.c0[-1])

    return tuple(
        {
            "E": irreducible_loss,
            "m": m(pairs, irreducible_loss),
            "conventions": {name: m(other, irreducible_loss) for name, other in others.items()},
        }
        for irreducible_loss in possible
    )


def noise_floor(local: Local) -> float | None:
    """The smallest m above 1 that is significant at 95% against seed noise alone; None without repeated seeds."""
    least = seed_noise(local)
    return None if least is None else ratio(least[0])


def local_rows(pairs: Pairs, local: Local) -> Iterator[dict[str, Any]]:
    """For each size: name, number of paired seeds, compute (FLOPs) and loss (nats a token) of both arms, local m."""
    columns = (pairs.c0, pairs.c1, pairs.y0, pairs.y1, [ratio(value) for value in local.ln_m[0]])
    names = ("compute_baseline", "compute", "loss_baseline", "loss", "m")
    for size, seeds, *values in zip(pairs.sizes, pairs.seeds, *columns, strict=True):
        yield {"size": size, "seeds": seeds, **dict(zip(names, map(float, values), strict=True))}
