"""Where runs that are compared do not share code, device, precision, execution (as fused), version of torch or size of
the vocabulary: the two runs of a pair, runs at several learning rates of one arm and size, or one pair and another; and
where arms differ in their recipe or seeds in what is known of them. What of a difference in loss may come from that, no
statistic tells, so it is said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from analysis.logs.provenance import SEVERAL, SEVERAL_OF, short_commits
from analysis.logs.schema import fact_columns
from analysis.logs.selection import is_rate, some

if TYPE_CHECKING:
    import pandas as pd

ON = ["_size", "_budget", "_seed"]  # what runs are paired on
RECIPE = "train."  # prefix of the facts of training
OF_ATTEMPTS = ("code", "torch", "dtype", "device", "execution")  # which the attempts of one run may differ in
KINDS = (*OF_ATTEMPTS, "vocabulary")
MIXED = "several in one run"  # whose attempts differ


def mixtures(runs: pd.DataFrame, arm: str, baseline: str) -> list[str]:
    """A remark for each kind in which pairs of the two arms differ, with their number, the values and the pairs.

    `runs` are those of both arms that are compared, with the columns that pairs are made on. What is not known of a
    run is not compared.
    """
    both = runs[runs["arm"].isin([arm, baseline])]
    return [*_remarks(both, arm, baseline), *_unrecorded(both)]


def between_rates(runs: pd.DataFrame, rate: str | None) -> list[str]:
    """For the reader: in which kinds the runs at several learning rates of one arm and size differ. The best rate is
    then chosen by more than the rate. `runs` are those of both arms at all rates, which are in the column `rate`."""
    if rate is None:
        return []
    found = []
    for kind, values in _known(runs):
        unlike: dict[str, list[str]] = {}  # the values -> arms and sizes
        for (arm, size, budget), rows in values.groupby(["arm", *ON[:2]], sort=False):
            of_rates = [set(part) for _, part in rows.groupby(rate)["_value"]]
            if any(each != of_rates[0] for each in of_rates):
                named = some(sorted(set[str]().union(*of_rates)))
                unlike.setdefault(named, []).append(f"{arm} at {' '.join(filter(None, (size, budget)))}")
        for named, at in unlike.items():
            found.append(f"{kind} is not the same over the learning rates of {some(at)} ({named})")
    return found


def between_pairs(runs: pd.DataFrame, arm: str, baseline: str) -> list[str]:
    """For the reader: of which kinds there are several, though the two runs of a pair share one. A loss difference is
    then of the arms alone, but m may change with size for that reason. `runs` as for `mixtures`."""
    found = []
    for kind, values in _known(runs[runs["arm"].isin([arm, baseline])]):
        of_size: dict[str, set[str]] = {}
        for (size, _, _), rows in values.groupby(ON, sort=False):
            if rows["arm"].nunique() == 2 and rows["_value"].nunique() == 1:
                of_size.setdefault(size, set()).add(str(rows["_value"].iloc[0]))
        if len(set[str]().union(*of_size.values())) > 1:
            sizes: dict[str, list[str]] = {}  # by what their pairs are of
            for size, each in of_size.items():
                sizes.setdefault(" and ".join(sorted(each)), []).append(size)
            where = "; ".join(f"{each} at {', '.join(at)}" for each, at in sizes.items())
            found.append(f"pairs with {baseline} are of several {SEVERAL_OF[kind]}: {where}")
    return found


def _known(runs: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """Each kind in which the runs have several values, and the runs of which it is known, with it in `_value`."""
    for kind in OF_ATTEMPTS:
        values = _values(runs, kind)
        if values is not None and len({*values} - {""}) > 1:
            known = runs.assign(_value=list(map(short_commits, values)))
            yield kind, known[known["_value"] != ""]


def recipes(runs: pd.DataFrame, arm: str, baseline: str) -> list[str]:
    """For the reader: in which parts of the recipe (facts of training) the arms differ where they are paired, since a
    difference in loss is then of both. `runs` as for `mixtures`, at the learning rates that are compared."""
    found = []
    for name in [each for each in fact_columns(map(str, runs)) if each.startswith(RECIPE) and not is_rate(each)]:
        sides = [runs.loc[runs["arm"] == each].groupby(ON[:2])[name] for each in (baseline, arm)]
        values = [{key: sorted(set(map(str, part.dropna()))) for key, part in side} for side in sides]
        if any(values[0][key] != values[1][key] for key in values[0].keys() & values[1].keys()):
            shown = [
                some(dict.fromkeys(value for each in side.values() for value in each)) or "none" for side in values
            ]
            found.append(f"the arms differ in {name}: {shown[0]} in {baseline}, {shown[1]} in {arm}")
    return found


def changing_facts(runs: pd.DataFrame, arm: str, baseline: str) -> list[str]:
    """For the reader: the settings of an arm that change with size, where those of the other do not change alike, as
    the batch of a ladder does. By design, as a rank that grows with the width, or because two stores call two things by
    one name: m is then of several arms. `runs` as for `mixtures`."""
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


def _unrecorded(runs: pd.DataFrame) -> Iterator[str]:
    """Facts that some runs of an arm, size and budget have and others lack, which may be of another configuration."""
    groups = runs.groupby(["arm", *ON[:2]])
    for name in fact_columns(map(str, runs)):
        known = groups[name].transform("count")
        lacking = runs["run_id"][runs[name].isna() & (known > 0)]
        if len(lacking):
            yield f"{name} is recorded of some runs of one arm and size, and not of {some(lacking)}"


def _remarks(runs: pd.DataFrame, arm: str, baseline: str) -> Iterator[str]:
    for kind in KINDS:
        values = _values(runs, kind)
        if values is None:
            continue
        by_key: dict[tuple[str, str, float], dict[str, set[str]]] = {}
        for key, side, value in zip(zip(*(runs[name] for name in ON), strict=True), runs["arm"], values, strict=True):
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
    """What each run was trained by; "" where it is not known, and None where no run says. Runs of the same commit or
    of the same deciding modules have the same code."""
    column = "code_commit" if kind == "code" else kind
    if column not in runs or runs[column].isna().all():
        return None
    found = runs[column].astype("string")
    if kind == "code":
        if "code_sha256" in runs:
            sha256 = runs["code_sha256"].astype("string")
            first = found.groupby(sha256).transform("first")  # one commit stands for all that share these modules
            found = found.where(sha256.isna() | found.str.contains(SEVERAL, regex=False), first)
    elif kind in OF_ATTEMPTS and "clock" in runs:
        found = found.mask(found.isna() & runs["clock"].eq("mixed").fillna(False), MIXED)
    return [str(value).replace("; ", " and ") for value in found.fillna("")]  # "; " divides the remarks of a status


def _name(key: tuple[str, str, float]) -> str:
    size, budget, seed = key
    return " ".join([size, *([budget] if budget else []), *([f"seed {seed:g}"] if seed >= 0 else [])])
