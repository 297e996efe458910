"""Select the runs of the ablation panels: arms that differ in a single fact.

A fact of an arm is any column whose name has a dot, such as "conv.rank". The run wrote it into its own record; this
module does not know what it means.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np
import pandas as pd

from analysis.laws.rates import for_a_law, rate_column
from analysis.logs.schema import axis_columns, fact_columns
from analysis.logs.selection import is_rate
from analysis.pages.tables import is_missing

KIND = "kind"  # never a factor of an ablation, since arms of two kinds differ in more than one fact
PLAIN = (KIND, "sites")  # facts whose values are understood without the name of the fact


def ablations(done: pd.DataFrame) -> pd.DataFrame:
    """Runs whose arms differ in a single fact, at the size that has most such runs; a run has one row for each fact in
    which it differs from another.

    Adds three columns to those of runs: the fact as `factor`, its value as `setting`, and the arm's other facts as
    `line`. Rows with different values in a column `source` are not compared with each other.
    """
    facts = [name for name in fact_columns(done) if done[name].notna().any()]
    kinds = [name for name in facts if _word(name) == KIND]
    declared = done[facts].notna().any(axis=1)
    for name in kinds:
        declared &= done[name].notna() & (done[name] != "none")
    tables = [_ablations(rows, facts) for _, rows in done[declared].groupby("size")]
    return max(tables, key=lambda table: (len(table), table["parameters"].mean()), default=done.iloc[:0])


def baseline_loss(done: pd.DataFrame, ablated: pd.DataFrame, baseline: str) -> float | None:
    """The baseline's mean loss at the size of the ablated runs, at its best setting of the axes."""
    same = done[(done["arm"] == baseline) & done["size"].isin(ablated["size"])]
    return float(np.mean(at_best_setting(same)["loss"])) if len(same) else None


def at_best_setting(runs: pd.DataFrame) -> pd.DataFrame:
    """Of each arm, size and budget, the runs at one setting, with their losses as measured.

    A mean over settings, of which some are bad on purpose, is no property of an arm. The learning rate is the one that
    a law is fitted at (`laws.rates.for_a_law`): the best at which training is stable. Runs without a rate stay. Of
    the other [vary] axes, whose values `dynconv table` pairs and does not choose, it is the point of least mean loss.
    """
    runs = runs[runs["loss"].notna()]
    if rate := rate_column(runs):
        rated = pd.to_numeric(runs[rate], errors="coerce").gt(0).fillna(False)
        best, _, _ = for_a_law(runs[rated].assign(tokens=runs["tokens"].astype(float)), "tokens")
        runs = runs[~rated | runs.index.isin(best.index)]
    settings = [name for name in axis_columns(runs) if not is_rate(name)]
    if not settings:
        return runs
    cell = [name for name in ("arm", "size", "budget") if name in runs]
    means = runs.groupby([*cell, *settings], dropna=False)["loss"].transform("mean")
    least = means.groupby([runs[name] for name in cell], dropna=False).transform("min")
    return runs[means == least]


def _ablations(rows: pd.DataFrame, facts: list[str]) -> pd.DataFrame:
    varying = [name for name in facts if rows[name].nunique() > 1]
    factors = sorted((name for name in varying if _word(name) != KIND), key=lambda name: _is_text(rows[name]))
    described = [name for name in facts if _word(name) in PLAIN or name in varying]
    key = [*facts, *axis_columns(rows), *(["source"] if "source" in rows else [])]
    parts = []
    for factor in factors:
        part = rows[rows[factor].notna()].sort_values(factor, key=lambda column: column.map(_place), kind="stable")
        line = [_line(row, [name for name in described if name != factor]) for row in part.to_dict("records")]
        others = part[[name for name in key if name != factor]].astype("string").fillna("")
        same = pd.Series(["|".join(values) for values in others.to_numpy()], index=part.index, dtype="string")
        alike = [name for name in facts if _word(name) == _word(factor)]
        label = (_word(factor) if len(alike) == 1 else factor).replace("_", " ")
        part = part.assign(factor=label, setting=part[factor].map(_text), line=line)
        parts.append(part[part.groupby(same)[factor].transform("nunique") > 1])
    return pd.concat(parts) if parts else rows.iloc[:0]


def _word(name: str) -> str:
    """The name of a fact without its part: "conv.kind" -> "kind"."""
    return name.rpartition(".")[2]


def _is_text(column: pd.Series) -> bool:
    return any(isinstance(value, str) for value in column.dropna())


def _place(setting: object) -> tuple[int, float, int, list[int], str]:
    """Sort key of a setting: numbers by value, then text. Sites such as "qk" are ordered by their number, then in the
    order of the layer."""
    if isinstance(setting, int | float | np.number | np.bool_):
        return 0, float(setting), 0, [], ""
    text = str(setting)
    return 1, 0.0, len(text), [*map("qkvo".find, text)], text


def _line(row: dict[Hashable, Any], names: Iterable[str]) -> str:
    """The named facts of an arm in words, such as "lowrank, qkv, rank 16, no residual"."""
    words = []
    for name in names:
        value, noun = row[name], _word(name).replace("_", " ")
        if is_missing(value):
            continue
        if isinstance(value, bool | np.bool_):
            words.append(noun if value else f"no {noun}")
        else:
            words.append(_text(value) if noun in PLAIN else f"{noun} {_text(value)}")
    return ", ".join(words) or "all arms"


def _text(setting: object) -> str:
    if isinstance(setting, bool | np.bool_):
        return "yes" if setting else "no"
    return f"{setting:g}" if isinstance(setting, float | np.floating) else str(setting)
