"""SQL over a store, and runs summed up by group."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.tables import multiplier_rows

if TYPE_CHECKING:
    import pandas as pd

    from analysis.store import Store

VIEWS = ("runs", "steps", "evals", "multipliers")


def sql(store: Store, query: str) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Columns and rows of a query over the views runs, steps, evals and multipliers (DuckDB's dialect).

    Only the views that the query names are read. Raises ValueError with DuckDB's first line if it is not valid.
    """
    import duckdb
    import pyarrow as pa

    with duckdb.connect() as connection:
        for view in VIEWS:
            if re.search(rf"\b{view}\b", query, re.IGNORECASE):
                connection.register(view, pa.Table.from_pandas(_view(store, view), preserve_index=False))
        try:
            result = connection.execute(query)
            if result.description is None:
                return [], []
            return [str(column[0]) for column in result.description], result.fetchall()
        except duckdb.Error as error:
            raise ValueError(f"{str(error).splitlines()[0]}; the views are {', '.join(VIEWS)}") from None


def _view(store: Store, view: str) -> pd.DataFrame:
    import pandas as pd

    if view == "multipliers":
        from analysis.multiplier import multipliers

        columns, rows = multiplier_rows(multipliers(store.runs)[0])
        return pd.DataFrame(rows, columns=list(columns))
    return store.runs if view == "runs" else getattr(store, view)()


def chosen(runs: pd.DataFrame, where: str | None) -> pd.DataFrame:
    """The rows for which a condition on the run table's columns holds, in pandas' notation: `size != "25k"`."""
    if where is None:
        return runs
    try:
        kept = runs.query(where)
    except Exception as error:  # pandas raises many kinds, for what is always a wrong condition
        raise ValueError(f"--where {where!r}: {error}") from None
    if kept.empty:
        raise ValueError(f"--where {where!r} leaves no row of {len(runs)}")
    return kept


def grouped(runs: pd.DataFrame, by: Sequence[str]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Finished runs by group: how many, loss (mean, and standard deviation where repeated), tokens a second, hours."""
    unknown = [name for name in by if name not in runs]
    if unknown:
        raise ValueError(f"--by: no column {unknown[0]!r}; the run table has {', '.join(map(str, runs.columns))}")
    done = runs[runs["status"] == "complete"].assign(train_hours=lambda rows: rows["train_seconds"] / 3600)
    groups = done.groupby(list(by), sort=False)
    table = groups.agg(
        runs=("loss", "size"),
        loss=("loss", "mean"),
        loss_sd=("loss", "std"),
        tokens_per_second=("tokens_per_second", "mean"),
        train_hours=("train_hours", "sum"),
    ).reset_index()
    return [str(name) for name in table.columns], [tuple(row) for row in table.itertuples(index=False)]
