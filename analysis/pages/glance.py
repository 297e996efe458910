"""The report's first screen: the findings in words, one row for each arm, claiming no more than the intervals allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from analysis.advantage.unresolved import UNRESOLVED
from analysis.pages.style import MANY
from analysis.pages.tables import capitalised, interval_text, ratio_text

if TYPE_CHECKING:
    from analysis.advantage.answers import Multiplier

Interval = tuple[float, float]
WIDEST = 2.5  # the scale extends at most this factor beyond the smallest and the largest m
TICKS = (0.1, 0.2, 0.25, 0.33, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 4, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class Verdict:
    """What an interval shows of a ratio: kind "more" (it lies above 1), "less" (below 1) or "open", and a sentence."""

    kind: str
    text: str


def headline(found: Sequence[Multiplier]) -> str:
    """The whole comparison in one sentence."""
    baseline = found[0].baseline
    gains = [item for item in found if compute_verdict(item).kind == "more"]
    costs = [item for item in found if compute_verdict(item).kind == "less"]
    if len(found) == 1:
        return f"{found[0].arm}: {compute_verdict(found[0]).text}"
    open_arms = len(found) - len(gains) - len(costs)
    said = [f"{len(gains)} of {len(found)} arms save compute over {baseline}"] if gains else []
    said += [f"{len(costs)} need{'s' if len(costs) == 1 else ''} more than {baseline}"] if costs else []
    if not said:
        return f"None of {len(found)} arms is shown to save or to cost compute over {baseline}."
    said += [f"for {open_arms} no difference is shown"] if open_arms else []
    return f"{'; '.join(said)}."


def compute_verdict(item: Multiplier) -> Verdict:
    """What the runs show of the arm's compute at equal loss, in words for readers without statistics."""
    if item.ci is None:
        return Verdict("open", "One size gives no interval, so nothing is claimed.")
    low, high = item.family_ci or item.ci
    remarks = item.status.removeprefix(UNRESOLVED).split("; ")
    if not item.status.startswith(UNRESOLVED) and (low > 1 or high < 1):
        scope = "" if "largest" not in item.method else ", at the largest compute measured"
        kind = "more" if low > 1 else "less"
        return Verdict(kind, f"{_claim(kind, item.baseline, low, high)}{scope}.")
    if low <= 1 <= high:
        return Verdict("open", f"No difference from {item.baseline} is shown: {_between(low, high)} fits the runs.")
    return Verdict("open", f"Nothing is claimed: {remarks[0]}.")


def _claim(kind: str, baseline: str, low: float, high: float) -> str:
    """The sentence for an interval of m that lies on one side of 1."""
    if kind == "more":
        need = (
            f"at least {ratio_text(low, 2)}" if math.isinf(high) else f"{ratio_text(low, 2)} to {ratio_text(high, 2)}"
        )
        return f"Saves compute: for its loss, {baseline} needs {need} times as much"
    need = (
        f"at least {ratio_text(1 / high, 2)}" if low <= 0 else f"{ratio_text(1 / high, 2)} to {ratio_text(1 / low, 2)}"
    )
    return f"Costs compute: it needs {need} times that of {baseline} for the same loss"


def _between(low: float, high: float) -> str:
    """The phrase for an interval of m that contains 1."""
    worse = "any amount more" if low <= 0 else f"{_percent(1 / low - 1)} more"
    better = "any amount less" if math.isinf(high) else f"{_percent(1 - 1 / high)} less"
    return f"anything from {worse} compute to {better}"


def glance(found: Sequence[Multiplier], links: Sequence[str]) -> str:
    """The table of the first screen, one row for each arm, the largest m first: m, its interval drawn on a common
    scale, m by the wall clock, and one sentence.

    `links` are the HTML ids of the sources of each arm's m.
    """
    scale = Scale.of(found)
    rows = [
        _row(item, scale, link) for item, link in sorted(zip(found, links, strict=True), key=lambda pair: -pair[0].m)
    ]
    axis = "".join(f'<i style="left:{scale.place(tick):.2f}%">{tick:g}</i>' for tick in scale.ticks())
    heads = ("arm", "compute multiplier", f'<span class="axis">{axis}</span>', "by the clock", "what the runs say")
    head = "".join(f"<th scope=col>{text}</th>" for text in heads)
    body = "\n".join(rows)
    many = ' class="many"' if len(found) > MANY else ""
    return f'<table id="glance"{many}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


@dataclass(frozen=True)
class Scale:
    """A common logarithmic scale of multipliers, in per cent of its width."""

    low: float
    high: float

    @classmethod
    def of(cls, found: Sequence[Multiplier]) -> Scale:
        middles = [1.0, *(item.m for item in found if item.m > 0 and math.isfinite(item.m))]
        ends = [end for item in found for end in (item.ci or ()) if end > 0 and math.isfinite(end)]
        low = max(min(*middles, *ends), min(middles) / WIDEST) if ends else min(middles)
        high = min(max(*middles, *ends), max(middles) * WIDEST) if ends else max(middles)
        return cls(low / 1.08, high * 1.08)

    def place(self, value: float) -> float:
        """The position of a value in per cent; values beyond the scale are placed at its edge."""
        inside = min(max(value, self.low), self.high)
        return 100 * math.log(inside / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """As many round numbers as there is room for, chosen from 1 outwards."""
        shown: list[float] = []
        for tick in sorted(TICKS, key=lambda tick: (tick != 1, abs(math.log(tick)))):
            inside = self.low <= tick <= self.high
            if inside and all(abs(self.place(tick) - self.place(other)) > 14 for other in shown):
                shown.append(tick)
        return sorted(shown)


def _row(item: Multiplier, scale: Scale, link: str) -> str:
    verdict = compute_verdict(item)
    cells = [
        f"<th scope=row>{escape(item.arm)}</th>",
        f'<td class="m"><a href=#{link}>{ratio_text(item.m)}</a>{_interval(item.ci)}{_at_top(item)}</td>',
        f'<td class="drawn">{_whisker(item, scale)}</td>',
        f'<td class="clock">{_clock(item)}</td>',
        f"<td class=says>{escape(verdict.text)}{_more(item)}</td>",
    ]
    return f'<tr class="{verdict.kind}">{"".join(cells)}</tr>'


def _whisker(item: Multiplier, scale: Scale) -> str:
    low, high = item.ci or (item.m, item.m)
    left, right = scale.place(low), scale.place(high)
    cut = f"{' cut-low' if low < scale.low else ''}{' cut-high' if high > scale.high else ''}"
    text = f"{ratio_text(item.m)} {interval_text(item.ci) or ''}".strip()
    return (
        f'<span class="whisker{cut}" role=img aria-label="{escape(text)}">'
        f'<i class="one" style="left:{scale.place(1):.2f}%"></i>'
        f'<i class="bar" style="left:{left:.2f}%;width:{right - left:.2f}%"></i>'
        f'<i class="dot" style="left:{scale.place(item.m):.2f}%"></i></span>'
    )


def _interval(interval: Interval | None) -> str:
    text = interval_text(interval)
    return f"<small>{text}</small>" if text else "<small>no interval</small>"


def _at_top(item: Multiplier) -> str:
    """m at the largest compute, shown next to an m that is reported as constant."""
    if item.n_sizes < 3 or "largest" in item.method:
        return ""
    interval = interval_text(item.m_at_cmax_ci) or ""
    return f"<small>at the largest compute {ratio_text(item.m_at_cmax)} {interval}</small>"


def _clock(item: Multiplier) -> str:
    """The wall-clock multiplier in a few words, or why there is none."""
    clock = item.wall_clock
    if clock is None:
        return f"not measured{f'<small>{escape(item.no_clock)}</small>' if item.no_clock else ''}"
    low, high = clock.family_ci or clock.ci or (0.0, math.inf)
    says = "faster" if low > 1 else "slower" if high < 1 else "no difference shown"
    varies = "" if "not constant" not in clock.status else ", at the largest size: it changes with size"
    says = f"{says}{varies}" if clock.ci else "nothing is claimed"
    return f"<b>{ratio_text(clock.m)}</b>{_interval(clock.ci)}<small>{says}</small>"


def _more(item: Multiplier) -> str:
    """The other remarks of the status, and the numbers of sizes and seeds, in small print."""
    remarks = [] if item.status == "ok" else item.status.removeprefix(UNRESOLVED).split("; ")
    shown = [remark for remark in remarks if remark != "the interval holds 1"]
    if item.status.startswith(UNRESOLVED) and shown and (item.ci is None or not _holds_one(item)):
        shown = shown[1:]  # the sentence already gives this reason
    seeds = f"{item.n_seeds} seed{'' if item.n_seeds == 1 else 's'}"
    base = f"{item.n_sizes} size{'' if item.n_sizes == 1 else 's'} with {seeds} each"
    return f"<small>{escape('. '.join([*map(capitalised, shown), base]))}.</small>"


def _holds_one(item: Multiplier) -> bool:
    low, high = item.family_ci or item.ci or (0.0, math.inf)
    return low <= 1 <= high


def _percent(share: float) -> str:
    return f"{100 * share:.0f}%"
