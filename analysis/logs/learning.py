"""Which runs did not learn, decided from their logs, and how many of each arm.

A run did not learn if it diverged, if its gradient is exactly zero at the last step, or if it was trained on text and
ends with a held-out loss of ln V (V: vocabulary) or more, which is the loss of a guess among all tokens. Its loss says
nothing about its arm at that size, so it enters no fit and no mean. Leaving it out without a word would favour arms
that are unstable, so every answer counts such runs, and a comparison in which there are any is not resolved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from analysis.logs.schema import TRUNK

if TYPE_CHECKING:
    import pandas as pd

TEXT = "text"  # the task whose loss is ln V for a guess; of other tasks, chance is no sign that training failed
DIVERGED = "NonFiniteLoss"  # the error with which training stops at the first loss or gradient that is not finite
AT_CHANCE = 1e-3  # nats; a loss this little below ln V still counts as at ln V, since losses are means of rounded terms
NATS_OF_UNIT = {"nats/token": 1.0, "bits/token": math.log(2)}


def why_not(
    *, loss: float | None, task: str | None, vocabulary: float | None, gradient_norm: float | None, unit: float = 1.0
) -> str | None:
    """Why a complete run did not learn; None where it did, or where the log does not tell.

    `loss` is the final held-out loss in units of `unit` nats a token, and `gradient_norm` that of the last step. A
    gradient of zero at a loss of zero is that of a task which is solved.
    """
    if gradient_norm == 0 and loss is not None and loss > 0:
        return "its gradient is exactly zero"
    if task == TEXT and loss is not None and vocabulary is not None and vocabulary > 1:
        chance = math.log(vocabulary)
        nats = loss * unit
        if nats >= chance - AT_CHANCE:
            return f"its loss of {nats:.3f} nats is not below that of a guess, ln {vocabulary:.0f} = {chance:.3f}"
    return None


def why_failed(failure: Mapping[str, Any]) -> str | None:
    """Why a failed run did not learn, from its failure.json: it diverged. None for every other cause of a failure."""
    cause = str(failure.get("cause", ""))
    return f"it diverged at step {failure.get('step')}" if cause.startswith(DIVERGED) else None


def mark_branches(rows: Iterable[dict[str, Any]]) -> None:
    """Mark the runs that never started because the trunk from whose state they branch diverged."""
    rows = list(rows)
    diverged = {row["run_id"] for row in rows if row["did_not_learn"] is not None and row["status"] == "failed"}
    for row in rows:
        if row["trunk"] in diverged and row["status"] != "complete" and row["did_not_learn"] is None:
            row["did_not_learn"] = "its trunk diverged"


def mark_points(points: pd.DataFrame, diverged: pd.Series) -> pd.Series:
    """The column `did_not_learn` of a table of points: as the table has it, else by the columns that it has. `diverged`
    says of which rows the table states that they diverged. A table without a column `task` is taken to be of text."""
    import pandas as pd

    def cell(row: dict[str, Any], name: str) -> Any:
        return None if pd.isna(row.get(name)) else row[name]

    found = []
    for row, failed in zip(points.to_dict("records"), diverged, strict=True):
        unit = NATS_OF_UNIT.get(cell(row, "loss_unit") or "nats/token")
        measured = {name: cell(row, name) for name in ("loss", "vocabulary", "gradient_norm")}
        if unit is None:  # bits a byte, say, cannot be compared with ln V
            measured["vocabulary"] = None
        reason = cell(row, "did_not_learn")
        if reason is None and failed:
            reason = "it diverged"
        if reason is None and row["status"] == "complete":
            reason = why_not(**measured, task=cell(row, "task") or TEXT, unit=unit or 1.0)
        found.append(reason)
    return pd.Series(found, index=points.index, dtype="string")


@dataclass(frozen=True)
class Unlearned:
    """How many runs of one arm did not learn."""

    arm: str
    runs: int
    of: int  # runs with an outcome: those that finished, and those that did not learn
    sizes: tuple[tuple[str, int, int], ...]  # size, runs, of: the sizes with such runs
    run_ids: tuple[str, ...]

    @property
    def remark(self) -> str:
        """For a status, such as "1 of 3 runs of lowrank-qkv at 110k did not learn"."""
        if len(self.sizes) == 1:
            size, runs, of = self.sizes[0]
            return f"{runs} of {of} runs of {self.arm}{f' at {size}' if size else ''} did not learn"
        where = ", ".join(f"{runs} of {of} at {size or 'no size'}" for size, runs, of in self.sizes)
        return f"{self.runs} of {self.of} runs of {self.arm} did not learn ({where})"


def has_failures(runs: pd.DataFrame) -> bool:
    """Whether some run of the table did not learn."""
    return "did_not_learn" in runs and bool(runs["did_not_learn"].notna().any())


def with_outcome(runs: pd.DataFrame) -> pd.Series:
    """Which runs were trained to their end, or did not learn: the others were cut short, or wait."""
    outcome = runs["status"].eq("complete").fillna(False)
    return outcome | runs["did_not_learn"].notna() if "did_not_learn" in runs else outcome


def failed_runs(runs: pd.DataFrame) -> pd.DataFrame | None:
    """The runs that did not learn; None where there are none. A missing arm is called "all"."""
    if not has_failures(runs):
        return None
    return runs[runs["did_not_learn"].notna()].assign(arm=lambda rows: _names(rows["arm"], "all"))


def unlearned(runs: pd.DataFrame, used: pd.DataFrame | None = None, rate: str | None = None) -> dict[str, Unlearned]:
    """The arms with runs that did not learn, by name; a missing arm is called "all".

    Where the runs of a size differ in the learning rate, in column `rate`, an arm is compared at its best one, and a
    run that failed at a higher one says only that this rate is too high. So runs are counted at rates up to the highest
    that is left in `used`, the rows at the best rate of each size; where all of a size failed, all are counted.
    """
    if not has_failures(runs):
        return {}
    ended = with_outcome(runs)
    if "budget" in runs:
        ended &= runs["budget"].astype("string").ne(TRUNK).fillna(True)
    rows = runs[ended].assign(_arm=_names(runs["arm"], "all"), _at=_sizes(runs))
    if used is not None and rate is not None:
        rows = rows[_not_too_high(rows, used, rate)]
    found = {}
    for arm, mine in rows.groupby("_arm", sort=False):
        failed = mine[mine["did_not_learn"].notna()]
        if len(failed):
            of = mine["_at"].value_counts()
            sizes = tuple((str(size), len(part), int(of[size])) for size, part in failed.groupby("_at", sort=False))
            found[str(arm)] = Unlearned(str(arm), len(failed), len(mine), sizes, tuple(map(str, failed["run_id"])))
    return found


def uncounted(runs: pd.DataFrame, counted: Mapping[str, Unlearned]) -> list[str]:
    """A line for each arm with runs that did not learn and that are not in `counted`, as their rate was too high."""
    found = []
    for arm, failed in unlearned(runs).items():
        if others := failed.runs - (counted[arm].runs if arm in counted else 0):
            what = "run" if others == 1 else "runs"
            found.append(f"{others} {what} of {arm} at learning rates above its best did not learn, and do not count")
    return found


def _names(column: pd.Series, missing: str) -> pd.Series:
    return column.astype("string").fillna(missing)


def _sizes(runs: pd.DataFrame) -> pd.Series:
    """The size of each run by name, else its N, else ""."""
    by_count = runs["parameters"].map("N = {:.6g}".format, na_action="ignore").astype("string")
    return runs["size"].astype("string").fillna(by_count).fillna("")


def _not_too_high(rows: pd.DataFrame, used: pd.DataFrame, rate: str) -> list[bool]:
    """Which of the rows are at a learning rate not above those that were chosen for their arm and size."""
    import pandas as pd

    def keyed(runs: pd.DataFrame) -> list[tuple[tuple[str, str], float]]:
        rates = pd.to_numeric(runs[rate], errors="coerce").astype(float)
        return list(zip(zip(_names(runs["arm"], "all"), _sizes(runs), strict=True), rates, strict=True))

    highest: dict[tuple[str, str], float] = {}
    for key, value in keyed(used):
        highest[key] = max(value, highest.get(key, value))
    return [not value > highest.get(key, math.inf) * (1 + 1e-6) for key, value in keyed(rows)]
