"""Which runs show what one fact of an arm does, the others being the same: the rows behind the ablation panels."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

import pandas as pd

from analysis.logs.schema import fact_columns
from analysis.pages.tables import is_missing

FACTORS = ("conv.width", "conv.rank", "conv.head_size", "conv.sites")  # a panel each


def ablations(done: pd.DataFrame) -> pd.DataFrame:
    """Runs whose arms differ in one fact alone, a row for each fact in which they do, at the size that has most.

    Beside the columns of runs: the fact as `factor`, its value as `setting`, and the arm's other facts as `line`.
    Rows that were taken from different sources are not joined.
    """
    if "conv.kind" not in done:
        return done.iloc[:0]
    described = done[done["conv.kind"].notna() & (done["conv.kind"] != "none")]
    tables = [_ablations(rows) for _, rows in described.groupby("size")]
    return max(tables, key=lambda table: (len(table), table["parameters"].mean()), default=described.iloc[:0])


def _ablations(rows: pd.DataFrame) -> pd.DataFrame:
    facts = fact_columns(rows)
    told = [name for name in facts if name in ("conv.kind", *FACTORS) or rows[name].nunique() > 1]
    key = [*facts, *(["source"] if "source" in rows else [])]
    parts = []
    for factor in (name for name in FACTORS if name in facts):
        part = rows[rows[factor].notna()].sort_values(factor, key=lambda column: column.map(_place), kind="stable")
        line = [_line(row, [name for name in told if name != factor]) for row in part.to_dict("records")]
        others = part[[name for name in key if name != factor]].astype("string").fillna("")
        same = pd.Series(["|".join(values) for values in others.to_numpy()], index=part.index, dtype="string")
        part = part.assign(factor=_noun(factor), setting=part[factor].map(_text), line=line)
        parts.append(part[part.groupby(same)[factor].transform("nunique") > 1])
    return pd.concat(parts) if parts else rows.iloc[:0]


def _place(setting: int | str) -> tuple[int, list[int]]:
    """Numbers by size; sites by how many there are, then in the order of the layer."""
    return (len(setting), [*map("qkvo".find, setting)]) if isinstance(setting, str) else (setting, [])


def _line(row: dict[Hashable, Any], names: Iterable[str]) -> str:
    """As "lowrank, qkv, rank 16, no residual"."""
    words = []
    for name in names:
        value, noun = row[name], _noun(name)
        if is_missing(value):
            continue
        if isinstance(value, bool):
            words.append(noun if value else f"no {noun}")
        else:
            words.append(_text(value) if name in ("conv.kind", "conv.sites") else f"{noun} {_text(value)}")
    return ", ".join(words)


def _noun(fact: str) -> str:
    """ "conv.head_size" -> "head size"."""
    return fact.rpartition(".")[2].replace("_", " ")


def _text(setting: int | float | str) -> str:
    return f"{setting:g}" if isinstance(setting, float) else str(setting)
