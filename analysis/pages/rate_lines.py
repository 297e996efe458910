"""The learning rates of untuned sizes as lines of a sweep file, with what they rest on as comments."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from analysis.laws.rate_rule import RateRule, SingleFactor
from analysis.laws.rates import Tuned

STEP = 2.0  # between the rates of a sweep: what lies beyond the edge is tried a factor of this away


def rate_lines(rule: RateRule, tuned: Sequence[Tuned], found: Sequence[SingleFactor]) -> str:
    """[vary_by_arm.ARM.learning_rate_factor] with the factors of `found`."""
    lines = [f"# ln factor grows by {rule.slope:+.3g} for each e-fold of compute in all arms; each has its own level."]
    lines += [f"# {arm}: by its best rates at {', '.join(level.sizes)}" for arm, level in rule.levels.items()]
    edges = {(item.arm, item.size, item.budget): item for item in tuned if item.rates > 1 and item.at_edge}
    lines += [_edge(item) for item in edges.values()]
    for arm in dict.fromkeys(item.arm for item in found):
        lines += ["", f"[vary_by_arm.{_key(arm)}.learning_rate_factor]"]
        for item in found:
            if item.arm == arm:
                note = f"  # {held}" if (held := held_at(item)) else ""
                lines.append(f"{_key(item.size)} = [{item.factor:g}]{note}")
    return "\n".join(lines)


def held_at(item: SingleFactor) -> str | None:
    """That a factor is not the rule's, as the arm is not known to learn there; None where it is the rule's."""
    if item.factor == item.unbounded:
        return None
    end = "highest" if item.factor < item.unbounded else "lowest"
    return f"held at {item.factor:g}, the {end} at which it learned; the rule goes on to {item.unbounded:g}"


def _edge(item: Tuned) -> str:
    """What to try where the best rate is the lowest or the highest of those at which the arm learned."""
    assert item.best is not None
    assert item.factor is not None
    lowest, highest = item.learned
    following = item.factor / STEP if item.best - lowest < highest - item.best else item.factor * STEP
    at_edge = f"{item.factor:.3g} is at the edge of its rates"
    return f"# {item.arm} at {item.size} does not count, as {at_edge}: try {following:.3g}"


def _key(name: str) -> str:
    """A key of TOML, in quotes where it needs them."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
