"""What every analysis asks of a table of runs.

Finished rows with positive numbers, each run once, one FLOP convention and one baseline.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from analysis.errors import Refusal
from analysis.logs.learning import has_failures
from analysis.logs.schema import CONVENTIONS, IDENTITY, TRUNK

if TYPE_CHECKING:
    import pandas as pd

ALIKE = 1.1  # computes within 10% count as equal, since step counts are rounded and a run may stop slightly early


@dataclass(frozen=True)
class Excluded:
    """A row that was left out, and why."""

    run_id: str
    arm: str
    reason: str


def finished(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[Excluded]]:
    """The finished rows of runs that learned, each run once, and those left out. Runs that did not learn are to be
    reported beside the answer (learning.unlearned).

    Raises Refusal, with the rows at fault, on anything that would make a comparison meaningless.
    """
    trunks = runs["budget"].astype("string").eq(TRUNK).fillna(False) if "budget" in runs else runs["run_id"].isna()
    excluded = excluded_rows(runs[trunks], "a trunk, whose branches are the results")
    runs = runs[~trunks]
    if has_failures(runs):
        failed = runs[runs["did_not_learn"].notna()]
        excluded += excluded_rows(failed, "did not learn: " + failed["did_not_learn"])
        runs = runs.drop(failed.index)
        if not runs["status"].eq("complete").any():
            raise Refusal(f"none of the runs learned: {some(f'{row.run_id}, {row.reason}' for row in excluded)}")
    status = runs["status"].astype("string").fillna("no status")
    unfinished, done = runs[status != "complete"], runs[status == "complete"]
    excluded += excluded_rows(unfinished, status[unfinished.index])
    if done.empty:
        stands = ", ".join(status.unique())
        raise Refusal(f"none of {len(runs)} runs has finished, which is status complete; got {stands}")
    if done["loss"].isna().all():
        raise Refusal("the table has no column loss with values; add one, or name it with --columns loss=...")
    require_positive(done, "loss", "loss")
    for column, name in (("parameters", "N"), ("tokens", "D")):
        if column in done:
            require_positive(done[done[column].notna()], column, name)
    if "task" in done and done["task"].nunique() > 1:
        tasks = list(done["task"].dropna().unique())
        raise Refusal(
            f"the runs are of several tasks ({some(tasks)}), whose losses cannot be compared; choose one with --where "
            f"'task == \"{tasks[0]}\"', or compare a metric task by task with `dynconv table --metric`"
        )
    for name, noun in (
        ("tokenizer_sha256", "tokenizers"),
        ("data_sha256", "data"),
        ("convention", "FLOP conventions"),
    ):
        if name in done and done[name].nunique(dropna=False) > 1:
            groups = done.assign(_of=done[name].astype("string").fillna("unknown")).groupby("_of")
            counts = "; ".join(f"{str(value)[:12]}: {some(rows['run_id'])}" for value, rows in groups)
            raise Refusal(f"the runs mix {noun} ({counts}) and cannot be compared; split the table")
    repeated = repeats(done)
    return done[~repeated], excluded + excluded_rows(done[repeated], "repeats a run")


def require_positive(rows: pd.DataFrame, column: str, name: str) -> None:
    """Raises Refusal with the rows at fault unless a column holds positive numbers only."""
    values = rows[column].to_numpy(float, na_value=np.nan)
    wrong = rows[~(np.isfinite(values) & (values > 0))]
    if len(wrong):
        marks = "unfinished, or diverged" if column == "loss" else "unfinished"
        raise Refusal(
            f"{name} must be positive; got {some(wrong[column])} in {some(wrong['run_id'])}; "
            f"correct these rows, remove them, or mark them {marks} in a column status"
        )


def repeats(done: pd.DataFrame) -> pd.Series[bool]:
    """Which rows repeat an earlier one. Rows that agree in configuration and in loss are one run that was entered
    twice. Rows without a seed, or with the same seed, that differ in loss are different runs: replicates."""
    what = [*IDENTITY, "flops_given", "loss"]
    same = [name for name in done if (name in what and name not in ("run_id", "sweep")) or "." in str(name)]
    return done.duplicated(same)


def excluded_rows(rows: pd.DataFrame, reason: str | pd.Series) -> list[Excluded]:
    named = rows.assign(_reason=reason, arm=rows["arm"].fillna(""))
    return [Excluded(*map(str, row)) for row in named[["run_id", "arm", "_reason"]].itertuples(index=False)]


def alike(values: NDArray[np.float64], within: NDArray[np.str_], step: float = ALIKE) -> NDArray[np.intp]:
    """Group equal labels `within` [n] by nearly equal `values` [n]: in ascending order, a new group starts wherever a
    value exceeds the one before by more than the factor `step`. Returns the number [n] of each value's group, counted
    from 0 within each label."""
    found = np.zeros(len(values), dtype=np.intp)
    for label in np.unique(within):
        mine = np.flatnonzero(within == label)
        ordered = mine[np.argsort(values[mine], kind="stable")]
        found[ordered[1:]] = np.cumsum(values[ordered[1:]] > step * values[ordered[:-1]])
    return found


def is_rate(name: str) -> bool:
    """Whether a column holds a learning rate or a factor of it. A run may have several rates, for different kinds of
    parameters."""
    return name.endswith(("learning_rate", "learning_rate_factor"))


def conventions_in(rows: pd.DataFrame) -> dict[str, str]:
    """The FLOP conventions under which every row has a compute, each with its column.

    6 N_active D is left out where it equals 6 N D in every row, as it does for models without experts.
    """
    found = {name: column for name, column in CONVENTIONS.items() if column in rows and (rows[column] > 0).all()}
    active, total = (CONVENTIONS[name] for name in ("6N_active D", "6ND"))
    if {active, total} <= {*found.values()} and (rows[active] == rows[total]).all():
        del found["6N_active D"]
    return found


def choose_convention(runs: pd.DataFrame, wanted: str | None = None) -> str:
    """The convention asked for, else the first of exact, given, 6ND, 6N_nonemb D that the finished rows have.

    Raises Refusal, with the rows at fault, where only some rows have it, rather than choosing another silently.
    """
    done = runs[runs["status"] == "complete"]
    have = [name for name, column in CONVENTIONS.items() if column in done and done[column].notna().any()]
    if wanted is not None and wanted not in CONVENTIONS:
        raise Refusal(f"no FLOP convention {wanted!r}; there are {', '.join(CONVENTIONS)}")
    if wanted is not None and wanted not in have:
        raise Refusal(f"the table lacks {CONVENTIONS[wanted]}; it has compute by {', '.join(have) or 'none'}")
    chosen = wanted or next((name for name in ("exact", "given", "6ND", "6N_nonemb D") if name in have), None)
    if chosen is None:
        raise Refusal("the table has no compute in every row; add a column C in FLOPs, or columns N and D")
    require_positive(done, CONVENTIONS[chosen], "compute")
    return chosen


def choose_baseline(runs: pd.DataFrame, wanted: str | None = None) -> str:
    """The baseline asked for, else the one that the runs name. Raises Refusal where there is no such arm."""
    arms = sorted(runs["arm"].dropna().unique())
    if wanted is None:
        named = runs["baseline"].dropna().unique()
        if len(named) != 1:
            raise Refusal(
                f"the table names {', '.join(sorted(named)) or 'no arm'} as baseline; choose one of {', '.join(arms)} "
                "with --baseline"
            )
        wanted = str(named[0])
    if wanted not in arms:
        raise Refusal(f"no arm {wanted!r} to be the baseline; the arms are {', '.join(arms)}")
    return wanted


def some(values: Iterable[object], most: int = 4) -> str:
    """The first `most` values as a list in words, for messages: "a, b, c, d and 3 more"."""
    shown = [str(value) for value in values]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
