"""The final values of metrics, such as accuracy on a recall task, from the evaluations of a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.errors import Refusal
from analysis.logs.selection import some

if TYPE_CHECKING:
    import pandas as pd

    from analysis.logs.store import Store

VALUES = ["run_id", "task", "metric", "value"]


def final_metrics(store: Store) -> pd.DataFrame:
    """Every metric of every run at the last evaluation that has it: the columns VALUES."""
    rows = store.evals()
    rows = rows[rows["run_id"].isin(store.runs["run_id"])].sort_values(["run_id", "step"], kind="stable")
    return rows.drop_duplicates(["run_id", "task", "metric"], keep="last")[VALUES].reset_index(drop=True)


def values_of(store: Store, wanted: str) -> pd.DataFrame:
    """The final values of one metric: the columns VALUES. `wanted` is METRIC, of every task that has it, or
    TASK/METRIC. A numeric column of a table of points serves as well. Raises Refusal where there are none."""
    import pandas as pd

    found = final_metrics(store)
    # Compared whole, because names of tasks hold slashes, too: domains of text are text/NAME.
    chosen = found[found["task"] + "/" + found["metric"] == wanted]
    if chosen.empty:
        chosen = found[found["metric"] == wanted]
    if chosen.empty and wanted in store.runs and pd.api.types.is_numeric_dtype(store.runs[wanted]):
        column = store.runs[["run_id", "task"]].assign(metric=wanted, value=store.runs[wanted].astype(float))
        chosen = column[column["value"].notna()].assign(task=lambda rows: rows["task"].fillna(""))
    if chosen.empty:
        known = some(dict.fromkeys(found["task"] + "/" + found["metric"]), 12) or "none, as it has no evaluations"
        raise Refusal(f"no metric {wanted!r} in {store.name}; there are {known}")
    _require_same_texts(found[found["task"].isin(chosen["task"])])
    return chosen


def _require_same_texts(found: pd.DataFrame) -> None:
    """Raises Refusal where runs were scored on different texts under one name, as their numbers of bytes tell."""
    for task, sizes in found[found["metric"] == "bytes"].groupby("task")["value"]:
        if sizes.nunique() > 1:
            counts = ", ".join(f"{size:.0f} bytes: {n}" for size, n in sizes.value_counts().items())
            raise Refusal(f"{task} is not the same text in all runs ({counts}); run `dynconv eval` on all again")
