"""Measured runs beside published rows: the differences that an ablation makes in perplexity and in loss.

A measured run belongs to a published row by the facts in its own record, never by its name. Every fact that the row
states must be equal, except those that the row calls free because they depend on the size of a model, such as the rank
in an ablation of the width. Free facts must agree within an ablation; if they are not the published ones, the answer
says so. If the facts fit several arms, which differ in something that is not published, none of them is taken.
Perplexities of different models on different texts cannot be compared, but the difference that a change makes in log
perplexity can be set beside the difference that it makes in our loss.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.advantage.outcomes import Outcome, compare_metric
from analysis.advantage.shares import Interval
from analysis.errors import Refusal
from analysis.logs.columns import NATS, loss_unit
from analysis.logs.schema import fact_columns
from analysis.logs.selection import finished

if TYPE_CHECKING:
    import pandas as pd

FILE = "ablations.csv"
NEEDED = ("ablation", "setting", "reference", "perplexity", "free", "source")


@dataclass(frozen=True)
class PublishedRow:
    """One published perplexity, and the facts of its model."""

    ablation: str
    setting: str
    reference: bool  # whether the other rows of the ablation are compared with this one
    perplexity: float
    facts: dict[str, str]  # fact -> value, as text
    free: tuple[str, ...]  # facts that a measured run need not share


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A published row beside the measured runs of one size that have its facts. Without such runs, fields are None."""

    ablation: str
    setting: str
    perplexity: float  # published
    published_difference: float | None  # of log perplexity from the reference's; None for the reference
    size: str | None = None
    arm: str | None = None
    seeds: int | None = None
    loss: float | None = None  # mean held-out loss, nats a token
    difference: float | None = None  # of the loss from the reference's, paired by seed
    ci: Interval | None = None  # 95% interval of `difference`
    differs: str | None = None  # free facts whose values are not the published ones
    status: str = "missing"  # "ok", "missing", "reference", or why the difference is not resolved


def read_published(folder: Path) -> list[PublishedRow]:
    """The rows of ablations.csv. Raises Refusal if the file is missing or lacks a column, or an ablation does not have
    exactly one reference."""
    import pandas as pd

    path = folder / FILE
    if not path.is_file():
        raise Refusal(f"no {FILE} in {folder}; give the folder with the published rows: --published DIR")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if missing := [name for name in NEEDED if name not in table]:
        raise Refusal(f"{path} has no column {', '.join(missing)}")
    facts = fact_columns(table)
    rows = [
        PublishedRow(
            row["ablation"],
            row["setting"],
            row["reference"] == "true",
            float(row["perplexity"]),
            {name: row[name] for name in facts if row[name] != ""},
            tuple(row["free"].split()),
        )
        for row in table.to_dict("records")
    ]
    for name, count in Counter(row.ablation for row in rows if row.reference).items():
        if count != 1:
            raise Refusal(f"{path}: ablation {name!r} has {count} references; give one")
    return rows


def beside_published(runs: pd.DataFrame, published: Sequence[PublishedRow]) -> list[Beside]:
    """Every published row with the measured runs that have its facts, at each size and budget that has the reference
    and another row of the ablation. A row without such runs has the status "missing". Raises Refusal if no run has
    finished, or if losses are not in nats a token."""
    if loss_unit(runs) != NATS:
        raise Refusal(f"published perplexities compare with losses in nats/token; got {loss_unit(runs)}")
    finished(runs)  # refuses what supports no comparison
    ended = runs[runs["status"].eq("complete").fillna(False) | runs["did_not_learn"].notna()]
    ended = ended[ended["size"].notna() & ended["arm"].notna()]
    ended = ended.assign(_budget=ended["budget"].fillna("")).sort_values("parameters", kind="stable")
    several = ended.groupby("size")["_budget"].nunique().max() > 1
    found: list[Beside] = []
    for ablation in dict.fromkeys(row.ablation for row in published):
        rows = [row for row in published if row.ablation == ablation]
        parts = []
        for (size, budget), mine in ended.groupby(["size", "_budget"], sort=False):
            arms = _arms_of(mine, rows, _varied(published))
            if arms is not None:
                label = f"{size}, {budget}" if several else str(size)
                parts.append(list(_measured(mine.drop(columns="_budget"), rows, arms, label)))
        for place, row in enumerate(rows):
            found += [part[place] for part in parts] or [_unmeasured(row, rows)]
    return found


def _varied(published: Sequence[PublishedRow]) -> set[str]:
    """The facts in which published rows differ, which a run must have recorded. A run without a fact that all rows
    share was made before there was a choice, so it has the shared value."""
    values: dict[str, set[str]] = {}
    for row in published:
        for name, value in row.facts.items():
            values.setdefault(name, set()).add(value)
    return {name for name, found in values.items() if len(found) > 1}


def _arms_of(
    runs: pd.DataFrame, rows: Sequence[PublishedRow], varied: set[str]
) -> dict[str, tuple[list[str], dict[str, str]]] | None:
    """Setting -> (arms that have its facts, facts of the first arm), among the runs of one size.

    None unless the reference and another row have arms. If the free facts of arms differ, the arms with the values that
    most rows of the ablation have are taken. Of several arms that fit the reference, it is the baseline of the runs'
    sweep.
    """
    facts_of = {str(arm): _facts(mine) for arm, mine in runs.groupby("arm", sort=False)}

    def free(row: PublishedRow, facts: dict[str, str]) -> tuple[tuple[str, str | None], ...]:
        return tuple((name, facts.get(name)) for name in row.free)

    fitting = {row.setting: [arm for arm, facts in facts_of.items() if _fits(row, facts, varied)] for row in rows}
    votes = Counter(key for row in rows for key in {free(row, facts_of[arm]) for arm in fitting[row.setting]})
    as_published = {free(row, row.facts) for row in rows}
    most = {  # names of free facts -> their values in most of the ablation
        names: max(
            (key for key in votes if tuple(name for name, _ in key) == names),
            key=lambda key: (votes[key], key in as_published),
            default=None,
        )
        for names in {row.free for row in rows}
    }
    chosen = {}
    for row in rows:
        arms = [arm for arm in fitting[row.setting] if free(row, facts_of[arm]) == most[row.free]]
        if row.reference and "baseline" in runs:
            arms = [arm for arm in arms if arm in set(runs["baseline"].dropna())] or arms
        if arms:
            chosen[row.setting] = arms, facts_of[arms[0]]
    reference = next(row for row in rows if row.reference)
    return chosen if reference.setting in chosen and len(chosen) > 1 else None


def _facts(runs: pd.DataFrame) -> dict[str, str]:
    """The facts that all these runs share, as text in the form of published rows."""
    found = {}
    for name in fact_columns(map(str, runs)):
        values = runs[name].dropna().unique()
        if len(values) == 1 and runs[name].notna().all():
            value = values[0]
            found[name] = str(value).lower() if isinstance(value, bool | np.bool_) else _text(value)
    return found


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float | np.number) else str(value)


def _fits(row: PublishedRow, facts: dict[str, str], varied: set[str]) -> bool:
    """Whether the facts of measured runs are those that the published row states, apart from its free ones."""
    stated = {name: value for name, value in row.facts.items() if name not in row.free}
    return all(facts.get(name, None if name in varied else value) == value for name, value in stated.items())


def _measured(
    runs: pd.DataFrame, rows: Sequence[PublishedRow], arms: dict[str, tuple[list[str], dict[str, str]]], size: str
) -> Iterator[Beside]:
    """The rows of an ablation beside the runs of one size. `arms` is the result of `_arms_of`."""
    reference = next(row for row in rows if row.reference)
    bases = arms[reference.setting][0]
    runs = runs[runs["arm"].isin([names[0] for names, _ in arms.values() if len(names) == 1])]
    losses = runs[["run_id", "task", "loss"]].rename(columns={"loss": "value"}).assign(metric="loss")
    losses = losses[losses["value"].notna()].assign(task=losses["task"].fillna(""))
    outcomes: Sequence[Outcome] = ()
    why = f"the reference: {_several(bases)}" if len(bases) > 1 else ""
    if not why:
        try:
            outcomes = compare_metric(runs, losses, baseline=bases[0]).rows
        except Refusal as error:
            why = str(error)
    for row in rows:
        published = _unmeasured(row, rows, size)
        if row.setting not in arms:
            yield published
            continue
        (arm, *others), facts = arms[row.setting]
        if others:
            yield replace(published, status=_several([arm, *others]))
            continue
        of_arm = [outcome for outcome in outcomes if outcome.arm == arm]
        if len(of_arm) != 1:
            several = ", ".join(outcome.budget for outcome in of_arm)
            reason = f"it has several budgets ({several}); choose one with --where" if several else ""
            yield replace(published, arm=arm, status=why or reason or f"no run of {arm} has finished and learned")
            continue
        (outcome,) = of_arm
        stated = {name: row.facts[name] for name in row.free if name in row.facts}
        unlike = {name: facts[name] for name, value in stated.items() if facts.get(name, value) != value}
        yield replace(
            published,
            arm=arm,
            seeds=outcome.seeds,
            loss=outcome.mean,
            difference=outcome.difference,
            ci=outcome.ci,
            differs=", ".join(f"{name} {value}" for name, value in unlike.items()) or None,
            status="reference" if row.reference else outcome.status,
        )


def _several(arms: Sequence[str]) -> str:
    return f"several arms have its facts ({', '.join(arms)}); choose one with --where"


def _unmeasured(row: PublishedRow, rows: Sequence[PublishedRow], size: str | None = None) -> Beside:
    """A published row of the ablation `rows` without measured runs."""
    reference = next(other for other in rows if other.reference)
    difference = None if row.reference else math.log(row.perplexity / reference.perplexity)
    return Beside(
        ablation=row.ablation,
        setting=row.setting,
        perplexity=row.perplexity,
        published_difference=difference,
        size=size,
    )
