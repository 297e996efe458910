"""Warnings where runs that are compared differ in more than the arm, from which a difference in loss may come as well.

They may differ in code, device, precision, execution (such as fused kernels), version of torch or size of the
vocabulary: within a pair, between the learning rates of one arm and size, or between pairs. Arms may differ in their
recipe, and some runs may lack a fact that others record. No statistic tells how much of a difference in loss comes from
these, so the reader is told.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from analysis.advantage.pairs import PAIRED_ON
from analysis.logs.columns import POINT_COLUMNS
from analysis.logs.provenance import SEVERAL, SEVERAL_OF, short_commits
from analysis.logs.schema import RUN_COLUMNS, fact_columns
from analysis.logs.selection import is_rate, some

if TYPE_CHECKING:
    import pandas as pd


RECIPE = "train."  # prefix of the facts of training
OF_ATTEMPTS = ("code", "torch", "dtype", "device", "execution")  # kinds that may differ between attempts of one run
KINDS = (*OF_ATTEMPTS, "vocabulary")
MIXED = "several in one run"  # the value for a run whose attempts differ


def mixtures(runs: pd.DataFrame, arm: str, baseline: str) -> list[str]:
    """A remark for each of KINDS in which the two runs of some pairs differ: how many pairs, the values, which pairs.

    Also a remark for each fact that only some runs of an arm record. `runs` are the runs of both arms that are
    compared, with the columns PAIRED_ON. Kinds that a run does not record are not compared.
    """
    both = runs[runs["arm"].isin([arm, baseline])]
    return [*_remarks(both, arm, baseline), *_unrecorded(both)]


def between_rates(runs: pd.DataFrame, rate: str | None) -> list[str]:
    """Lines for the reader on kinds that differ between the learning rates of one arm and size, where the choice of the
    best rate may be due to them. `runs` are those of both arms at all rates, which are in the column `rate`."""
    if rate is None:
        return []
    found = []
    for kind, values in _known(runs):
        unlike: dict[str, list[str]] = {}  # the different values -> arms and sizes
        for (arm, size, budget), rows in values.groupby(["arm", *PAIRED_ON[:2]], sort=False):
            of_rates = [set(part) for _, part in rows.groupby(rate)["_value"]]
            if any(each != of_rates[0] for each in of_rates):
                named = some(sorted(set[str]().union(*of_rates)))
                unlike.setdefault(named, []).append(f"{arm} at {' '.join(filter(None, (size, budget)))}")
        for named, at in unlike.items():
            found.append(f"{kind} is not the same over the learning rates of {some(at)} ({named})")
    return found


def between_pairs(runs: pd.DataFrame, arm: str, baseline: str) -> list[str]:
    """Lines for the reader on kinds that are equal within each pair but differ between pairs. A loss difference is then
    due to the arms alone, but m may change with size because of the kind. `runs` as for `mixtures`."""
    found = []
    for kind, values in _known(runs[runs["arm"].isin([arm, baseline])]):
        of_size: dict[str, set[str]] = {}
        for (size, _, _), rows in values.groupby(PAIRED_ON, sort=False):
            if rows["arm"].nunique() == 2 and rows["_value"].nunique() == 1:
                of_size.setdefault(size, set()).add(str(rows["_value"].iloc[0]))
        if len(set[str]().union(*of_size.values())) > 1:
            sizes: dict[str, list[str]] = {}  # value of the kind -> sizes
            for size, each in of_size.items():
                sizes.setdefault(" and ".join(sorted(each)), []).append(size)
            where = "; ".join(f"{each} at {', '.join(at)}" for each, at in sizes.items())
            found.append(f"pairs with {baseline} are of several {SEVERAL_OF[kind]}: {where}")
    return found


def _known(runs: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """(kind, runs that record it, with its value in a new column `_value`) for each kind that has several values."""
    for kind in OF_ATTEMPTS:
        values = _values(runs, kind)
        if values is not None and len({*values} - {""}) > 1:
            known = runs.assign(_value=list(map(short_commits, values)))
            yield kind, known[known["_value"] != ""]


def recipes(runs: pd.DataFrame, arm: str, baseline: str) -> list[str]:
    """Lines for the reader on parts of the recipe (facts of training) in which the paired arms differ, since a
    difference in loss may then come from the recipe. `runs` as for `mixtures`, at the learning rates that are compared.
    """
    found = []
    for name in [each for each in fact_columns(map(str, runs)) if each.startswith(RECIPE) and not is_rate(each)]:
        sides = [runs.loc[runs["arm"] == each].groupby(PAIRED_ON[:2])[name] for each in (baseline, arm)]
        values = [{key: sorted(set(map(str, part.dropna()))) for key, part in side} for side in sides]
        if any(values[0][key] != values[1][key] for key in values[0].keys() & values[1].keys()):
            shown = [
                some(dict.fromkeys(value for each in side.values() for value in each)) or "none" for side in values
            ]
            found.append(f"the arms differ in {name}: {shown[0]} in {baseline}, {shown[1]} in {arm}")
    return found


def changing_facts(runs: pd.DataFrame, arm: str, baseline: str) -> list[str]:
    """Lines for the reader on facts of an arm that change with size in another way than the other arm's.

    (Facts that change in the same way in both arms, such as the batch of a ladder, need no remark.) This may be by
    design, such as a rank that grows with the width, or because two stores give different arms one name; m is then that
    of several arms. `runs` as for `mixtures`.
    """
    names = [each for each in fact_columns(map(str, runs)) if not is_rate(each)]
    by_size = {side: rows.groupby("_size", sort=False) for side, rows in runs.groupby("arm")}
    values = {
        side: {
            name: {size: tuple(sorted(set(map(str, part.dropna())))) for size, part in sizes[name]} for name in names
        }
        for side, sizes in by_size.items()
    }
    found = []
    for side, other in ((baseline, arm), (arm, baseline)):
        changing = []
        for name, of_sizes in values[side].items():
            at: dict[tuple[str, ...], list[str]] = {}
            for size, known in of_sizes.items():
                if known:
                    at.setdefault(known, []).append(str(size))
            if len(at) > 1 and of_sizes != values[other][name]:
                shown = ", ".join(f"{some(known)} ({some(sizes)})" for known, sizes in at.items())
                changing.append(f"{name} is {shown}")
        if changing:
            found.append(f"not the same at all sizes of {side}: {some(changing)}")
    return found


def averaged_settings(runs: pd.DataFrame) -> list[str]:
    """For the reader: columns of a table of points whose meaning is not known and whose values differ within an arm,
    size and budget, as `optimizer` may, since runs of several settings are then averaged. Columns with about as many
    values as there are runs, as times and notes, are no settings. `runs` as for `mixtures`, at the learning rates that
    are compared."""
    found = []
    for name in map(str, runs):
        if name in (*RUN_COLUMNS, *POINT_COLUMNS) or "." in name or name.startswith("_"):
            continue
        known = runs[runs[name].notna()]
        values = known[name].astype("string")
        if known[name].dtype == "float64" or not 1 < values.nunique() <= len(values) / 3:
            continue
        cells = known.assign(_value=values).groupby(["arm", *PAIRED_ON[:2]], sort=False)["_value"]
        several = [
            f"{arm} at {' '.join(filter(None, at))}" for (arm, *at), count in cells.nunique().items() if count > 1
        ]
        if several:
            found.append(f"averaged over runs that differ in {name} ({some(sorted(values.unique()))}): {some(several)}")
    return found


def _unrecorded(runs: pd.DataFrame) -> Iterator[str]:
    """A remark for each fact that some runs of one arm, size and budget record and others do not, since the others may
    have another configuration."""
    groups = runs.groupby(["arm", *PAIRED_ON[:2]])
    for name in fact_columns(map(str, runs)):
        known = groups[name].transform("count")
        lacking = runs["run_id"][runs[name].isna() & (known > 0)]
        if len(lacking):
            yield f"{name} is recorded of some runs of one arm and size, and not of {some(lacking)}"


def _remarks(runs: pd.DataFrame, arm: str, baseline: str) -> Iterator[str]:
    """A remark for each of KINDS that differs within pairs."""
    for kind in KINDS:
        values = _values(runs, kind)
        if values is None:
            continue
        by_key: dict[tuple[str, str, float], dict[str, set[str]]] = {}
        for key, side, value in zip(
            zip(*(runs[name] for name in PAIRED_ON), strict=True), runs["arm"], values, strict=True
        ):
            by_key.setdefault(key, {}).setdefault(side, set()).add(value)
        pairs = {key: of[arm] | of[baseline] for key, of in by_key.items() if arm in of and baseline in of}
        known = {key: {value for value in both if value} for key, both in pairs.items()}
        unlike = [key for key, both in known.items() if len(both) > 1 or MIXED in both or SEVERAL in "".join(both)]
        if unlike:
            names = sorted({short_commits(value) for key in unlike for value in known[key]})
            yield (
                f"{kind} is not the same within {len(unlike)} of {len(pairs)} pairs ({some(names)}): "
                f"{some(_name(key) for key in unlike)}"
            )


def _values(runs: pd.DataFrame, kind: str) -> list[str] | None:
    """The value of a kind for each run, "" if the run does not record it; None if no run records it.

    Runs have the same code if they have the same commit, or the same hash of the modules that decide an outcome.
    """
    column = "code_commit" if kind == "code" else kind
    if column not in runs or runs[column].isna().all():
        return None
    found = runs[column].astype("string")
    if kind == "code":
        if "code_sha256" in runs:
            sha256 = runs["code_sha256"].astype("string")
            first = found.groupby(sha256).transform("first")  # One commit stands for all with the same modules.
            found = found.where(sha256.isna() | found.str.contains(SEVERAL, regex=False), first)
    elif kind in OF_ATTEMPTS and "clock" in runs:
        found = found.mask(found.isna() & runs["clock"].eq("mixed").fillna(False), MIXED)
    return [str(value).replace("; ", " and ") for value in found.fillna("")]  # "; " separates the remarks of a status.


def _name(key: tuple[str, str, float]) -> str:
    """A pair's (size, budget, seed) as text."""
    size, budget, seed = key
    return " ".join([size, *([budget] if budget else []), *([f"seed {seed:g}"] if seed >= 0 else [])])
