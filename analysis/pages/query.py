"""SQL over a store, selection of runs by a condition, and summaries of runs by group."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from analysis.errors import first_line
from analysis.logs.columns import SHORT_NAMES
from analysis.logs.schema import CONVENTIONS, axis_columns
from analysis.logs.selection import repeats, some
from analysis.pages.tables import multiplier_rows

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from analysis.logs.store import Store

VIEWS = ("runs", "steps", "evals", "multipliers")
SUMMED = ("loss", "tokens_per_second")  # columns that `grouped` summarises, by which runs cannot be grouped
MIXED = {  # what mean losses are not to be mixed over
    "size": "sizes",
    "budget": "budgets",
    "task": "tasks",
    "tokenizer_sha256": "tokenizers",
    "data_sha256": "data",
}
SEALED = {  # a query sees the views and nothing else: no file, no network, no variable of this program
    "enable_external_access": "false",
    "autoload_known_extensions": "false",
    "autoinstall_known_extensions": "false",
    "python_enable_replacements": "false",
    "lock_configuration": "true",
}


def sql(
    store: Store, query: str, baseline: str | None = None, convention: str | None = None
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Columns and rows of a query over the views runs, steps, evals and multipliers (DuckDB's dialect).

    `baseline` and `convention` are those of the multipliers, as in `dynconv table`; C in runs follows the same
    convention. Only the views that the query names are read. Raises ValueError, with the first line of DuckDB's
    message, if the query is not valid.
    """
    import duckdb

    with duckdb.connect(config=SEALED) as connection:
        try:
            statements = connection.extract_statements(query)
            if len(statements) != 1:
                raise ValueError(f"one SQL statement is wanted; got {len(statements)}")
            for view in VIEWS:
                if re.search(rf"\b{view}\b", query, re.IGNORECASE):
                    connection.register(view, _view(store, view, baseline, convention))
            result = connection.execute(statements[0])
            return [str(column[0]) for column in result.description or ()], result.fetchall()
        except duckdb.Error as error:
            raise ValueError(f"{first_line(error)}; the views are {', '.join(VIEWS)}") from None


def _view(store: Store, view: str, baseline: str | None, convention: str | None) -> pa.Table:
    import pyarrow as pa

    if view in ("steps", "evals"):
        rows = store.rows(view)
        _check_kept(store, view, rows)
        return rows
    if view == "runs":
        return pa.Table.from_pandas(with_short_names(store.runs, convention), preserve_index=False)
    from analysis.advantage.multiplier import multipliers

    found, refused = multipliers(store.runs, baseline=baseline, convention=convention)
    store.problems += [f"no multiplier for {line}" for line in refused]
    columns, rows = multiplier_rows(found)
    return pa.table({name: [row[place] for row in rows] for place, name in enumerate(columns)})


def _check_kept(store: Store, view: str, rows: pa.Table) -> None:
    """Raises ValueError where no finished run has rows in the view, so that a count would be zero; where some have
    none, a line joins the store's problems."""
    complete = set(store.runs["run_id"][store.runs["status"] == "complete"])
    lacking = sorted(complete - set(rows["run_id"].unique().to_pylist()))
    if not lacking:
        return
    where = "a table of points has none, a frozen store steps only by `freeze --steps`: query the live store"
    if len(lacking) == len(complete):
        raise ValueError(f"{store.name} holds no {view} of its runs: {where}")
    store.problems.append(f"{view} lack {len(lacking)} of {len(complete)} finished runs, as {lacking[0]}: {where}")


def with_short_names(runs: pd.DataFrame, convention: str | None) -> pd.DataFrame:
    """The run table with added columns N, N_nonemb, D and C, unless it already has one of that name (in upper or lower
    case).

    C is compute by `convention`, else by the first convention that any run has, in the order of `choose_convention`.
    """
    if convention is not None and convention not in CONVENTIONS:
        raise ValueError(f"no FLOP convention {convention!r}; there are {', '.join(CONVENTIONS)}")
    order = [convention] if convention else ["exact", "given", "6ND", "6N_nonemb D"]
    compute = (CONVENTIONS[name] for name in order)
    names = {short: ours for short, ours in SHORT_NAMES.items() if short != "C"}
    names["C"] = next((name for name in compute if name in runs and runs[name].notna().any()), "")
    taken = {str(name).lower() for name in runs}
    added = {short: runs[ours] for short, ours in names.items() if ours in runs and short.lower() not in taken}
    return runs.assign(**added)


def chosen(runs: pd.DataFrame, where: str | None, convention: str | None = None) -> pd.DataFrame:
    """The rows that meet a condition on the run table's columns, in pandas' notation: size != "25k", N > 1e8. Names
    with a dot are written in backquotes: `conv.width` == 4. N, D and C may be used for their columns, C by
    `convention`.

    Raises ValueError where `where` is not a condition, or no row meets it.
    """
    if where is None:
        return runs
    import pandas as pd

    try:
        holds = with_short_names(runs, convention).eval(where, local_dict={}, global_dict={})
    except Exception as error:  # pandas raises many kinds of error for a wrong condition
        raise ValueError(
            f"--where {where!r}: {_as_typed(first_line(error), where)}; write conditions as in 'size != \"25k\"', "
            "and a name with a dot in backquotes, as in '`conv.width` == 4'"
        ) from None
    if not isinstance(holds, pd.Series) or str(holds.dtype) not in ("bool", "boolean"):
        raise ValueError(
            f"--where {where!r} is not true or false for each run; write a condition, as in 'size != \"25k\"'"
        )
    kept = runs[holds.fillna(False)]
    if kept.empty:
        raise ValueError(f"--where {where!r} leaves no row of {len(runs)}")
    return kept


def _as_typed(message: str, where: str) -> str:
    """An error of pandas with the names that stand in backquotes in `where`, for which pandas has names of its own."""
    from pandas.core.computation.parsing import clean_column_name

    for name in re.findall("`([^`]+)`", where):
        message = message.replace(f"'{clean_column_name(name)}'", f"`{name}`")
    return message


def grouped(runs: pd.DataFrame, by: Sequence[str]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Finished runs by group: their number, mean and standard deviation of the loss (missing for a single run), mean
    tokens a second, and total hours. Where some run of the table did not learn, the means are of those that did, and a
    column counts the others. Raises ValueError for a column that is missing or named twice."""
    for name in by:
        if name not in runs or name in SUMMED:
            filled = [str(column) for column in runs if runs[column].notna().any() and column not in SUMMED]
            raise ValueError(f"--by: no column {name!r} to group by; there are {', '.join(filled)}")
    repeated = [name for name in dict.fromkeys(by) if by.count(name) > 1]
    if repeated:
        raise ValueError(f"--by names {', '.join(repeated)} more than once; name each column once")
    failed = runs["did_not_learn"].notna()
    ended = runs[(runs["status"] == "complete") | failed].sort_values(["arm", "parameters"], kind="stable")
    learned = ended["did_not_learn"].isna()
    positive = {name: ended[name].where(_positive(ended[name])) for name in ("loss", "tokens_per_second")}
    hours = ended["train_seconds"].where(_positive(ended["train_seconds"])) / 3600
    ended = ended.assign(**positive, train_hours=hours, _learned=learned, _failed=~learned)
    ended["loss"] = ended["loss"].where(learned)
    counts = {"did_not_learn": ("_failed", "sum")} if failed.any() and "did_not_learn" not in by else {}
    table = (
        ended.groupby(list(by), sort=False, dropna=False)
        .agg(
            runs=("_learned", "sum"),
            **counts,
            loss=("loss", "mean"),
            loss_sd=("loss", "std"),
            tokens_per_second=("tokens_per_second", "mean"),
            train_hours=("train_hours", lambda hours: hours.sum(min_count=1)),
        )
        .reset_index()
    )
    return [str(name) for name in table.columns], [tuple(row) for row in table.itertuples(index=False)]


def not_counted(runs: pd.DataFrame) -> list[str]:
    """Lines for the reader on the runs that `grouped` leaves out of the means, or counts twice."""
    ended = runs[(runs["status"] == "complete") | runs["did_not_learn"].notna()]
    waiting = runs.drop(ended.index)
    status = waiting["status"].astype("string").fillna("no status")
    found = [f"{some(rows['run_id'])} left out ({state})" for state, rows in waiting.groupby(status)]
    learned = ended[ended["did_not_learn"].isna()]
    if len(wrong := learned[~_positive(learned["loss"])]):
        found.append(f"the loss of {some(wrong['run_id'])} is in no mean, as it is no positive number")
    timed = ended[ended["train_seconds"].notna()]
    if len(wrong := timed[~_positive(timed["train_seconds"])]):
        found.append(f"the train_seconds of {some(wrong['run_id'])} are in no sum, as they are no positive number")
    if len(again := learned[repeats(learned)]):
        found.append(f"{some(again['run_id'])} repeat a run and count as another: remove them from the table")
    return found


def _positive(values: pd.Series) -> pd.Series:
    numbers = values.astype("Float64")
    return ((numbers > 0) & (numbers < float("inf"))).fillna(False)


def cautions(runs: pd.DataFrame, by: Sequence[str]) -> list[str]:
    """Lines for the reader where the means of `grouped` do not compare the groups, as these stand on unlike runs, or on
    clocks that do not count. `by` are columns that `grouped` accepts."""
    learned = runs[(runs["status"] == "complete") & runs["did_not_learn"].isna()]
    found = [
        f"the groups hold unlike shares of {name}, whose losses differ: add {column} to --by, or choose one by --where"
        for column, name in MIXED.items()
        if column not in by and _unlike_shares(learned, by, column)
    ]
    axes = [name for name in axis_columns(map(str, runs)) if name not in by and _unlike_shares(learned, by, name)]
    if axes:
        found.append(
            f"the groups hold unlike shares of the values of {', '.join(axes)}: add to --by, or choose by --where"
        )
    timed = runs[(runs["status"] == "complete") & runs["tokens_per_second"].notna()]
    clocks = timed["clock"].dropna()
    if others := int((clocks != "alone").sum()):
        found.append(
            f"tokens_per_second and train_hours do not compare: {others} of {len(timed)} runs shared their device, "
            "ran in several ways, or may have shared it"
        )
    return found


def _unlike_shares(runs: pd.DataFrame, by: Sequence[str], column: str) -> bool:
    """Whether the groups' runs are distributed differently over the values of a column."""
    if column not in runs or runs[column].nunique(dropna=False) < 2:
        return False
    values = runs[column].astype("string").fillna("")
    counts = runs.assign(_value=values).groupby(list(by), sort=False, dropna=False)["_value"]
    shares = counts.value_counts(normalize=True).unstack().fillna(0)
    return len(shares) > 1 and bool((shares.max() - shares.min()).max() >= 1e-9)
