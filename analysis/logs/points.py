"""Other people's tables: a CSV or Parquet file of points as a table of runs, and tables of kernel times."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.errors import first_line
from analysis.logs.record import typed
from analysis.logs.schema import CONVENTIONS, RUN_COLUMNS, axis_columns, fact_columns

if TYPE_CHECKING:
    import pandas as pd

# What people call the columns of a table of points, lower case, by our name for them.
POINT_NAMES = {
    "arm": ("arm", "model", "variant", "architecture"),
    "size": ("size", "scale", "rung"),
    "seed": ("seed",),
    "parameters": ("parameters", "n", "params", "n_params", "num_params"),
    "parameters_nonembedding": ("parameters_nonembedding", "n_nonemb", "n_nonembedding"),
    "parameters_active": ("parameters_active", "n_active", "active_params", "active_parameters"),
    "tokens": ("tokens", "d", "n_tokens", "num_tokens", "training tokens"),
    "flops_given": ("flops_given", "c", "flops", "compute", "flop", "training flop"),
    "loss": ("loss", "final_loss", "val_loss", "validation_loss", "test_loss"),
    "tokenizer_sha256": ("tokenizer_sha256", "tokenizer"),
    "data_sha256": ("data_sha256", "data", "dataset"),
    "budget": ("budget",),
    "train.learning_rate": ("train.learning_rate", "learning_rate", "lr"),
}
KERNEL_COLUMNS = {"op", "pass", "B", "T", "D", "W", "R", "H", "dtype", "us", "provider"}
POINT_SHORT = {
    "parameters": "N",
    "parameters_nonembedding": "N_nonemb",
    "parameters_active": "N_active",
    "tokens": "D",
    "flops_given": "C",
}
SIX_N_D = {  # a convention that N and D alone decide -> the N it counts
    "flops_6nd": "parameters",
    "flops_6n_nonemb_d": "parameters_nonembedding",
    "flops_6nactive_d": "parameters_active",
}


def read_points(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """A table of points as a run table. Compute given without a named convention becomes `flops_given`; 6 N D,
    6 N_nonemb D and 6 N_active D follow from N and D where the table has these. Columns with a dot are facts or axes.

    Raises ValueError naming the file, and the column and cells at fault.
    """
    import pandas as pd

    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"{path} is neither .csv nor .parquet; give one of these, or a store's directory")
    try:
        points = readers[path.suffix](path)
    except (OSError, ValueError, UnicodeDecodeError) as error:  # pandas' parser errors are ValueErrors
        raise ValueError(f"{path} is unreadable ({first_line(error)})") from None
    if points.empty:
        raise ValueError(f"{path} has no rows")
    if set(points.columns) >= KERNEL_COLUMNS:  # whose D are channels, not tokens
        raise ValueError(
            f"{path} holds times of kernels, not runs; `dynconv plot` draws them, pandas and DuckDB read them"
        )
    renaming = _renaming(path, [str(name) for name in points.columns], columns)
    points = points.drop(columns=set(renaming.values()) - set(renaming), errors="ignore").rename(columns=renaming)
    if "convention" in points and points["convention"].nunique() == 1:
        name = str(points["convention"].dropna().iloc[0])
        if name not in CONVENTIONS:
            raise ValueError(f"{path}: no FLOP convention {name!r}; there are {', '.join(CONVENTIONS)}")
        points = points.rename(columns={"flops_given": CONVENTIONS[name]})
    types = {name: "float64" if dtype == "Int64" else dtype for name, dtype in RUN_COLUMNS.items()}
    for name in (*axis_columns(points), *fact_columns(points)):
        points[name] = typed(_values(points[name])).set_axis(points.index)
    for name, dtype in {**types, "flops_given": "float64"}.items():
        if name in points:
            points[name] = _typed(path, points[name], dtype)
    if "status" not in points:
        points["status"] = "complete"
    for flops, count in SIX_N_D.items():
        if {count, "tokens"} <= set(points) and flops not in points:
            points[flops] = 6.0 * points[count] * points["tokens"]
    if "run_id" not in points:
        points["run_id"] = [f"row {number}" for number in range(1, len(points) + 1)]
    absent = {name: pd.Series(index=points.index, dtype=types[name]) for name in types if name not in points}
    return points.assign(**absent).astype(types)


def read_kernels(path: Path) -> pd.DataFrame | None:
    """The table that `dynconv bench kernels` writes, or None if the path holds something else."""
    import pandas as pd

    if not path.is_file() or path.suffix not in (".csv", ".parquet"):
        return None
    try:
        rows = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except (OSError, ValueError):
        return None  # `load` says what is wrong with it
    return rows if set(rows.columns) >= KERNEL_COLUMNS else None


def _values(column: pd.Series) -> list[Any]:
    """The cells as plain values, None where missing; numbers that are all whole as integers, which a CSV with gaps
    does not keep."""
    values = [None if missing else value for value, missing in zip(column.tolist(), column.isna(), strict=True)]
    numbers = [value for value in values if value is not None]
    if any(isinstance(value, float) for value in numbers) and all(value == int(value) for value in numbers):
        return [None if value is None else int(value) for value in values]
    return values


def _renaming(path: Path, names: list[str], columns: Mapping[str, str]) -> dict[str, str]:
    """The table's column names to ours: as `columns` says, else by their usual names."""
    ours = {short: name for name, short in POINT_SHORT.items()} | {"C": "flops_given"}
    renaming = {}
    for wanted, theirs in columns.items():
        target = ours.get(wanted, wanted)
        if target not in RUN_COLUMNS and target != "flops_given" and "." not in target:
            raise ValueError(
                f"--columns: no column {wanted!r} is known; known are N, D, C, {', '.join(RUN_COLUMNS)}, and facts by "
                "their dotted names, such as conv.width"
            )
        if theirs not in names:
            raise ValueError(f"{path} has no column {theirs!r}; it has {', '.join(names)}")
        if theirs in renaming:
            raise ValueError(f"--columns gives column {theirs!r} two names; give it one")
        renaming[theirs] = target
    for target, usual in POINT_NAMES.items():
        matches = [name for name in names if name.lower() in usual and name not in renaming]
        if target not in {*names, *renaming.values()} and matches:
            renaming[matches[0]] = target
    return renaming


def _typed(path: Path, column: pd.Series, dtype: str) -> pd.Series:
    import pandas as pd

    try:
        return (pd.to_numeric(column) if dtype == "float64" else column).astype(dtype)
    except (ValueError, TypeError):
        what = {"float64": "numbers", "string": "text"}[dtype]
        wrong = [(row, cell) for row, cell in enumerate(column, 1) if not _is(cell, dtype)][:3]
        got = ", ".join(f"{cell!r} in row {row}" for row, cell in wrong)
        raise ValueError(f"{path}: column {column.name} must hold {what}; got {got}; correct the cells") from None


def _is(cell: object, dtype: str) -> bool:
    """Whether one cell alone can be read as the type."""
    import pandas as pd

    try:
        (pd.to_numeric(pd.Series([cell])) if dtype == "float64" else pd.Series([cell], dtype="object")).astype(dtype)
    except (ValueError, TypeError):
        return False
    return True
