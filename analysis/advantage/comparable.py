"""The runs of an arm and its baseline, made ready for pairing: budgets matched, each arm at its best learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from analysis.advantage.budgets import with_budgets
from analysis.advantage.mixtures import averaged_settings, between_pairs, between_rates, changing_facts, recipes
from analysis.advantage.pairs import averaged, require_one_configuration, with_axes
from analysis.errors import Refusal
from analysis.laws.rates import Tuned, at_best_rates, notes, rate_column, untuned
from analysis.logs.learning import failed_runs
from analysis.logs.schema import CONVENTIONS

if TYPE_CHECKING:
    import pandas as pd


def comparable(
    rows: pd.DataFrame, arm: str, baseline: str, column: str, failed: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, list[Tuned], list[str]]:
    """Prepare the runs of two arms (rows that `usable` returned) for pairing.

    Returns (rows, tuned, lines). `rows` have the budget that they are paired on, and are those at each arm's best
    learning rate. `tuned` says how the rates were tuned; `failed` are runs that did not learn, whose rates are
    unstable. `lines` tell the reader how budgets were matched, which rates are best, and what else differs between the
    runs. Raises Refusal if an arm has no row.
    """
    if absent := [each for each in (baseline, arm) if not rows["arm"].eq(each).any()]:
        raise Refusal(f"no run of {absent[0]} is among those that are compared")
    rows, how = with_budgets(rows, baseline, column)
    rows = with_axes(rows)
    require_one_configuration(rows)
    mixed = between_rates(rows, rate_column(rows))
    rows, tuned = at_best_rates(rows, rate_column(rows), column, failed)
    lines = [f"budgets {how}: {', '.join(sorted(rows['_budget'].unique()))}"] if how else []
    lines += notes(tuned) if tuned else untuned(rows, rate_column(rows), arm, baseline)
    lines += [*averaged(rows), *averaged_settings(rows)]
    lines += [*recipes(rows, arm, baseline), *changing_facts(rows, arm, baseline), *mixed]
    return rows, tuned, lines + between_pairs(rows, arm, baseline)


@dataclass(frozen=True)
class Ready:
    """The result of `comparable` for an arm and the baseline."""

    rows: pd.DataFrame
    tuned: list[Tuned]
    lines: list[str]


def every_arm(
    runs: pd.DataFrame, rows: pd.DataFrame, arms: Iterable[str], baseline: str, convention: str
) -> dict[str, Ready | Refusal]:
    """For each arm, its runs and the baseline's ready for pairing, or why they cannot be paired.

    `rows` are those of `runs` that `usable` returned. All arms are prepared before any is compared, since the rule of
    learning rates is fitted to all of them (laws/rate_rule.py).
    """
    failed = failed_runs(runs)
    found: dict[str, Ready | Refusal] = {}
    for arm in arms:
        try:
            _require_learned(rows, (arm, baseline))
            mine = rows[rows["arm"].isin([baseline, arm])]
            found[arm] = Ready(*comparable(mine, arm, baseline, CONVENTIONS[convention], failed))
        except Refusal as error:
            found[arm] = error
    return found


def _require_learned(rows: pd.DataFrame, arms: tuple[str, str]) -> None:
    """Raises Refusal if an arm has no run that finished and learned."""
    for arm in arms:
        if not rows["arm"].eq(arm).any():
            raise Refusal(f"no run of {arm} has finished and learned")
