"""Tables with a row for each step of a run, as trackers export them: the last row of each run is kept as its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from analysis.logs.columns import plain, without_prefix

if TYPE_CHECKING:
    import pandas as pd

STEP_NAMES = ("step", "global_step", "trainer_global_step", "train_global_step", "iteration", "training_iteration")
RUN_NAMES = ("name", "run_name", "run", "tags_mlflow_runname")  # display names, which two runs may share
SETTINGS = (  # constant throughout a run, and used to distinguish runs that have no id
    "sweep",
    "arm",
    "size",
    "budget",
    "seed",
    "parameters",
    "parameters_nonembedding",
    "data_sha256",
    "tokenizer_sha256",
)
RATE = "train.learning_rate"  # either a setting of the run, or the current value of a schedule at each step
END = 0.99  # a loss measured after this share of a run's steps counts as its final loss


def last_of_each_run(path: Path, points: pd.DataFrame, states_given: bool) -> tuple[pd.DataFrame, list[str]]:
    """One row for each run, with a run_id, and notes on how the rows were reduced.

    Rows of one run_id at several steps (at several counts of tokens, where no column holds steps) are one run. Without
    a run_id, rows that agree in every setting and in tokens or compute are one run; rows that differ in tokens, compute
    or learning rate may be one run in progress or several runs, and are refused. The last row is the run's result only
    if the run has finished, so a table without a column of states is refused. `points` are typed, with our names, and
    their index is 0, 1, ... Raises ValueError with the rows at fault.
    """
    named = "run_id" in points and bool(points["run_id"].notna().any())
    weak = None if named else _first(points, RUN_NAMES)
    labels = points["run_id"] if named else points[weak].astype("string") if weak else None
    points = points.assign(run_id=_ids(points, labels, named))
    order = _first(points, STEP_NAMES) or ("tokens" if named and "tokens" in points else None)
    keys = ["run_id"] if named else [*([weak] if weak else []), *(name for name in SETTINGS if name in points)]
    kept, runs, rows_of_runs = set(points.index), 0, 0
    repeated = points[points.duplicated(keys, keep=False)] if keys else points[:0]
    for _, rows in repeated.groupby(keys, sort=False, dropna=False):
        several = order is not None and rows[order].nunique() > 1
        if named:
            _refuse_differing(path, rows, [name for name in SETTINGS if name in rows] if several else list(rows))
        if order is None or not several:
            continue
        last, state = _last(path, rows, order, named, states_given)
        kept -= set(rows.index) - {last}
        points.loc[last, "status"] = state
        if RATE in rows and rows[RATE].nunique() > 1:
            points.loc[last, RATE] = float("nan")  # the last value of a schedule is not the run's setting
        runs, rows_of_runs = runs + 1, rows_of_runs + len(rows)
    if not runs:
        return points, []
    counted = f"{rows_of_runs} rows are {runs} run{'s' if runs > 1 else ''}"
    note = f"{path}: {counted} at several values of {order}; of each run its last row is used"
    last_rows = points.loc[sorted(kept)].reset_index(drop=True)
    if weak and labels is not None and labels[sorted(kept)].is_unique:
        last_rows["run_id"] = labels[sorted(kept)].reset_index(drop=True).fillna(last_rows["run_id"])
    return last_rows, [note]


def _first(points: pd.DataFrame, usual: tuple[str, ...]) -> str | None:
    """The table's column for the first of the names in `usual` that it has; None without any."""
    names = {plain(without_prefix(str(name))): str(name) for name in reversed(list(points))}
    return next((names[name] for name in usual if name in names), None)


def _ids(points: pd.DataFrame, labels: pd.Series | None, named: bool) -> pd.Series:
    """The table's ids, its names where they are unique, else "row 1", "row 2" and so on."""
    import pandas as pd

    rows = pd.Series([f"row {row + 1}" for row in points.index], index=points.index, dtype="string")
    if labels is None or not (named or labels.dropna().is_unique):
        return rows
    return labels.fillna(rows)


def _last(path: Path, rows: pd.DataFrame, order: str, named: bool, states_given: bool) -> tuple[int, str]:
    """The index of the row that holds the result of a run at several steps, and the run's last state."""
    shown = f"rows {rows.index[0] + 1} and {rows.index[1] + 1}"
    given = next((name for name in ("tokens", "flops_given") if name in rows), None)
    settings = [given or order, *([RATE] if RATE in rows else [])]
    if not named and any(rows[name].nunique(dropna=False) > 1 for name in settings):
        raise ValueError(
            f"{path}: {shown} differ in {order} and agree in arm, size and seed: they may be one run on its way, or "
            "two runs; add a column run_id"
        )
    ordered = rows.sort_values(order, kind="stable")
    measured = ordered if "loss" not in rows or rows["loss"].isna().all() else ordered[ordered["loss"].notna()]
    if measured[order].isna().any() or measured[order].duplicated().any():
        raise ValueError(f"{path}: {shown} are of one run, two of whose losses are at one {order}; give it one a row")
    state = ordered["status"].dropna()
    if not states_given or state.empty:
        raise ValueError(
            f"{path}: {shown} are of one run at several values of {order}, and nothing says whether it finished; "
            "add a column status (complete, running, failed), or keep the last row of each finished run"
        )
    last, end = float(measured[order].iloc[-1]), float(ordered[order].max())
    if last < min(END * end, end - 1) and state.iloc[-1] == "complete":
        raise ValueError(
            f"{path}: the run of {shown} has its last loss at {order} {last:g} of {end:g}, which is not its final one; "
            "add the loss at the end, or leave the run out"
        )
    return int(measured.index[-1]), str(state.iloc[-1])


def _refuse_differing(path: Path, rows: pd.DataFrame, names: list[str]) -> None:
    """Raises ValueError where rows of one run_id differ in columns that are constant throughout a run."""
    distinct = rows.drop_duplicates(names)
    if len(distinct) > 1:
        different = [str(name) for name in names if rows[name].nunique(dropna=False) > 1]
        raise ValueError(
            f"{path}: rows {distinct.index[0] + 1} and {distinct.index[1] + 1} are both of run "
            f"{rows['run_id'].iloc[0]} and differ in {', '.join(different[:3])}; give every run an id of its own"
        )
