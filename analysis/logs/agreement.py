"""Whether the steps and the evaluations of a finished run are those from which its results were taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.logs.selection import some

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

RESULT = {"steps": "gradient_norm", "evals": "loss"}  # the column of the run table that repeats the last row of each
ROUNDING = 1e-9  # relative; both are the same float64


def without_foreign_rows(runs: pd.DataFrame, kind: str, table: pa.Table) -> tuple[pa.Table, list[str]]:
    """The rows without those of finished runs whose log ends otherwise than their results say, and a line on these.

    run.json repeats the last gradient norm, and the last loss on the run's own task. Where these differ, the log was
    edited, or is a copy of another run's. `table` has the rows of all runs, by run and step.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    name = RESULT[kind]
    done = runs.loc[runs["status"].eq("complete").fillna(False) & runs[name].notna(), ["run_id", "task", name]]
    both = done.merge(_last_steps(table) if kind == "steps" else _last_losses(table, done), on="run_id")
    stated, logged = both[name].astype("float64"), both["logged"].astype("float64")
    foreign = both[((stated - logged).abs() > ROUNDING * stated.abs()).fillna(False)]
    if foreign.empty:
        return table, []
    first = foreign.iloc[0]
    line = (
        f"the {kind} of {some(foreign['run_id'])} are left out: they end at another {name} than run.json has "
        f"({first['logged']:.6g}, and {first[name]:.6g}), so they were edited, or are of another run; restore them"
    )
    return table.filter(pc.invert(pc.is_in(table["run_id"], pa.array(foreign["run_id"], pa.string())))), [line]


def _last_steps(table: pa.Table) -> pd.DataFrame:
    """The last gradient norm of each run: run_id, logged."""
    import pyarrow.compute as pc

    options = pc.ScalarAggregateOptions(skip_nulls=False)
    last = table.group_by("run_id", use_threads=False).aggregate([("gradient_norm", "last", options)])
    return last.rename_columns({"gradient_norm_last": "logged"}).to_pandas()


def _last_losses(table: pa.Table, runs: pd.DataFrame) -> pd.DataFrame:
    """The last loss of each run on its own task: run_id, logged."""
    import pyarrow.compute as pc

    losses = table.filter(pc.equal(table["metric"], "loss")).select(["run_id", "task", "step", "value"]).to_pandas()
    own = losses.merge(runs[["run_id", "task"]], on=["run_id", "task"]).sort_values("step", kind="stable")
    return own.drop_duplicates("run_id", keep="last")[["run_id", "value"]].rename(columns={"value": "logged"})
