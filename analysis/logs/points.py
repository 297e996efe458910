"""Reads tables from other sources: a table of points or a tracker's export, as a table of runs; and kernel times."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.logs.columns import NATS, POINT_COLUMNS, measured, renaming, unit_of
from analysis.logs.histories import last_of_each_run
from analysis.logs.learning import mark_points
from analysis.logs.numerals import decimal_mark, number, wrong_cells
from analysis.logs.rawtables import read_raw
from analysis.logs.schema import CONVENTIONS, RUN_COLUMNS

if TYPE_CHECKING:
    import pandas as pd

KERNEL_COLUMNS = {"op", "pass", "B", "T", "D", "W", "R", "H", "dtype", "us", "provider"}
TRAINING_COLUMNS = {"size", "arm", "gpus", "tokens_per_second", "step_ms", "slowdown", "against"}  # of `bench train`
# Our name of a run's status -> the names that W&B, MLflow, Optuna, ClearML and Slurm use. Ray Tune's "terminated" is
# left out, because it is also used for a trial that a scheduler stopped early.
STATES = {
    "complete": ("complete", "completed", "finished", "done", "succeeded", "success", "published", "true"),
    "failed": ("failed", "fail", "crashed", "error", "errored", "diverged", "out_of_memory", "node_fail", "timeout"),
    "cancelled": ("cancelled", "canceled", "killed", "aborted", "stopped", "interrupted", "pruned"),
    "unfinished": (
        *("unfinished", "running", "pending", "queued", "scheduled", "waiting", "created", "paused", "active"),
        *("in_progress", "preempted", "preempting", "suspended", "requeued", "false"),
    ),
}
STATE_OF = {word: state for state, words in STATES.items() for word in words}
SIX_N_D = {  # column of a convention that follows from N and D -> the column of the N that it counts
    "flops_6nd": "parameters",
    "flops_6n_nonemb_d": "parameters_nonembedding",
    "flops_6nactive_d": "parameters_active",
}
GUESSING = 13.9  # nats a token: ln of a million tokens, of which no tokenizer has more
UNLIKE = 1000.0  # times 6 N D: no convention of FLOPs is so far from it


def read_points(path: Path, columns: Mapping[str, str]) -> tuple[pd.DataFrame, list[str]]:
    """A table of points as a run table, and notes on how it was read.

    Compute without a named convention becomes `flops_given`; 6 N D, 6 N_nonemb D and 6 N_active D are computed where
    the table has N and D. Columns with a dot are facts or [vary] axes, unless they have a tracker's prefix for measured
    values. Counts that are not whole numbers (such as D = C / 6 N) are kept, in a float64 column. Raises ValueError
    with the file, the row and the column at fault.
    """
    raw = read_raw(path)
    if set(raw.columns) >= KERNEL_COLUMNS:  # here D is the number of channels, not of tokens
        raise ValueError(
            f"{path} holds times of kernels, not runs; `dynconv plot` draws them, pandas and DuckDB read them"
        )
    if set(raw.columns) >= TRAINING_COLUMNS:
        raise ValueError(
            f"{path} holds throughput of training, not runs; `dynconv plot` draws it alone, `dynconv table STORE "
            "--throughput` takes it"
        )
    if any(str(name).endswith("__MIN") for name in raw.columns):
        raise ValueError(f"{path} is a chart's export, with a column for each run; export the table of runs instead")
    names = renaming(path, raw, columns)
    points = raw.drop(columns=set(names.values()) - set(names), errors="ignore").rename(columns=names)
    points = points.rename(columns={name: measured(name) for name in points if name not in names.values()})
    unit = next((unit_of(path, theirs) for theirs, ours in names.items() if ours == "loss"), NATS)
    if unit != NATS and "loss_unit" not in points:
        points["loss_unit"] = unit
    points = _typed(path, _name_compute(path, points), {ours: theirs for theirs, ours in names.items()})
    states_given = "status" in points
    points["_diverged"] = _diverged(points)
    points["status"] = _states(points)
    points, notes = last_of_each_run(path, points, states_given)
    if "loss_unit" in points and points["loss_unit"].fillna(NATS).nunique() > 1:
        units = ", ".join(points["loss_unit"].fillna(NATS).unique())
        raise ValueError(f"{path}: the losses are in several units ({units}); split the table")
    points["did_not_learn"] = mark_points(points, points.pop("_diverged"))
    for flops, count in SIX_N_D.items():
        if {count, "tokens"} <= set(points) and flops not in points:
            points[flops] = 6.0 * points[count] * points["tokens"]
    return run_types(points), [*notes, *_unlike_compute(path, points), *_unlike_losses(path, points)]


def run_types(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs with every column of RUN_COLUMNS, of its type; counts that are not whole numbers are float64."""
    import pandas as pd

    absent = {name: pd.Series(index=runs.index, dtype=dtype) for name, dtype in RUN_COLUMNS.items() if name not in runs}
    types = {name: dtype for name, dtype in POINT_COLUMNS.items() if name in runs or name in absent}
    for name in [name for name, dtype in types.items() if dtype == "Int64" and name in runs]:
        if not is_whole(runs[name]):
            types[name] = "float64"
    return runs.assign(**absent).astype(types)


def is_whole(column: pd.Series) -> bool:
    """Whether all numbers of a column are whole and fit into Int64."""
    import numpy as np

    if str(column.dtype) in ("Int64", "int64"):
        return True
    values = column.dropna().to_numpy(float)
    return bool(np.all((values == np.floor(values)) & (np.abs(values) < 2.0**63)))


def read_kernels(path: Path) -> pd.DataFrame | None:
    """The table that `dynconv bench kernels` writes, or None if the path holds something else. Raises ValueError for
    times that are not positive."""
    import pandas as pd

    if not path.is_file() or path.suffix not in (".csv", ".parquet"):
        return None
    try:
        rows = pd.read_csv(path) if path.suffix == ".csv" else pd.read_parquet(path)
    except (OSError, ValueError):
        return None  # the caller then calls `load`, which reports the error
    if not set(rows.columns) >= KERNEL_COLUMNS:
        return None
    if len(wrong := rows[~(rows["us"] > 0)]):
        raise ValueError(f"{path}: us must be positive; got {wrong['us'].iloc[0]} in {len(wrong)} rows; remove these")
    return rows


def _unlike_compute(path: Path, points: pd.DataFrame) -> list[str]:
    """A line where C is so far from 6 N D that one of the three is in another unit, such as billions. Multipliers are
    ratios and do not tell; laws and predictions would be wrong. Sparse models may be far below 6 N D, within a
    hundred."""
    if not {"flops_given", "flops_6nd"} <= set(points):
        return []
    ratios = (points["flops_given"] / points["flops_6nd"]).astype(float)
    wrong = ratios[(ratios > UNLIKE) | (ratios < 1 / UNLIKE)]
    if wrong.empty:
        return []
    return [
        f"{path}: C is {wrong.iloc[0]:.2g} times 6 N D in {len(wrong)} of {len(points)} rows: is one of N, D and C in "
        "another unit? N counts parameters, D tokens, C floating-point operations"
    ]


def _unlike_losses(path: Path, points: pd.DataFrame) -> list[str]:
    """A line where losses in nats a token are worse than guessing. Laws would be wrong, and of perplexities
    multipliers, too."""
    if "loss" not in points or "loss_unit" in points:
        return []
    counted = points[points["status"].eq("complete").fillna(False) & points["did_not_learn"].isna()]
    losses = counted["loss"].astype("float64")
    wrong = losses[(losses > GUESSING) & (losses < float("inf"))]
    if wrong.empty:
        return []
    return [
        f"{path}: loss is {wrong.iloc[0]:.3g} in {len(wrong)} of {len(points)} rows, and guessing among a million "
        f"tokens is {GUESSING} nats a token: is it a perplexity or in another unit, or did these runs diverge (column "
        "status)?"
    ]


def _name_compute(path: Path, points: pd.DataFrame) -> pd.DataFrame:
    """The table with its compute renamed to the column of a convention, if a column `convention` names one for all
    rows."""
    if "convention" not in points or points["convention"].nunique() != 1:
        return points
    name = str(points["convention"].dropna().iloc[0])
    if name not in CONVENTIONS:
        raise ValueError(f"{path}: no FLOP convention {name!r}; there are {', '.join(CONVENTIONS)}")
    return points if CONVENTIONS[name] in points else points.rename(columns={"flops_given": CONVENTIONS[name]})


def _typed(path: Path, points: pd.DataFrame, theirs: Mapping[str, str]) -> pd.DataFrame:
    """The table with typed columns: known columns have their defined type, others a type guessed from their cells.
    `theirs` maps our names to those in the file, for messages."""
    import pandas as pd

    types = {name: POINT_COLUMNS.get(str(name), "") for name in points}
    counted = [name for name, dtype in types.items() if dtype in ("Int64", "float64") and name != "seed"]
    try:
        mark = decimal_mark({theirs.get(name, name): list(points[name]) for name in counted})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    typed: dict[Any, pd.Series] = {}
    for name, dtype in types.items():
        cells = points[name].rename(theirs.get(name, name))
        if name == "seed":
            typed[name] = pd.Series(_seeds(path, cells), index=points.index, dtype="Int64")
        elif dtype in ("Int64", "float64"):
            typed[name] = _numbers(path, cells, mark)
        elif dtype == "string":
            typed[name] = cells.map(_text, na_action="ignore").astype("string")
        else:
            typed[name] = _guessed(cells, mark)
    return pd.DataFrame(typed, index=points.index)


def _numbers(path: Path, cells: pd.Series, mark: str) -> pd.Series:
    import pandas as pd

    if pd.api.types.is_numeric_dtype(cells) and not pd.api.types.is_bool_dtype(cells):
        return cells.astype("Float64").astype("float64") if not is_whole(cells) else cells.astype("Int64")
    try:
        return pd.Series([number(cell, mark) for cell in cells.astype(object)], index=cells.index, dtype="float64")
    except (ValueError, TypeError):
        raise _refusal(path, cells, "numbers", wrong_cells(cells, mark)) from None


def _refusal(path: Path, cells: pd.Series, wanted: str, wrong: list[tuple[int, Any]]) -> ValueError:
    got = ", ".join(f"{cell!r} in row {row}" for row, cell in wrong[:3])
    return ValueError(f"{path}: column {cells.name} must hold {wanted}; got {got}; correct the cells")


def _text(cell: Any) -> str:
    """A cell as text; 125.0 from a typed file is "125", as a CSV would have it."""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() and abs(cell) < 1e15 else str(cell)


def _guessed(cells: pd.Series, mark: str) -> pd.Series:
    """A column of unknown meaning: booleans or numbers where every cell is one, else text."""
    import pandas as pd

    if cells.dtype != object:
        return cells
    present = cells.dropna()
    if len(present) and present.map(lambda cell: str(cell).lower() in ("true", "false")).all():
        return cells.map(lambda cell: str(cell).lower() == "true", na_action="ignore").astype("boolean")
    try:
        if not len(present) or present.map(lambda cell: isinstance(cell, str) and cell[:1].isalpha()).any():
            raise ValueError("no plain numbers")
        values = pd.Series([_plain_number(cell, mark) for cell in cells], index=cells.index, dtype="float64")
    except (ValueError, TypeError):
        return cells.map(_text, na_action="ignore").astype("string")
    return values.astype("Int64") if is_whole(values) else values


def _plain_number(cell: Any, mark: str) -> float:
    """A cell as a number. Raises ValueError for one that ends in a letter, such as 91M: in a column of unknown meaning
    it may be a name."""
    if isinstance(cell, str) and cell[-1:].isalpha():
        raise ValueError(f"{cell!r} is no plain number")
    return number(cell, mark)


def _seeds(path: Path, cells: pd.Series) -> list[int | None]:
    """Seeds as whole numbers. "seed 3" and "s3" become 3. Other text becomes its CRC-32, which is the same in every
    file, so that several tables agree on which seeds are equal. Raises ValueError where two seeds would coincide."""
    labels = [
        None if cell is None or cell != cell else _text(cell)
        for cell in cells.astype(object).where(cells.notna(), None)
    ]
    numbers: dict[str, int] = {}
    for row, label in enumerate(labels, 1):
        if label is None or label in numbers:
            continue
        whole = re.fullmatch(r"(-?\d{1,18})(\.0*)?", label)
        ending = whole or re.fullmatch(r"[A-Za-z]+[\s_=:-]*(\d{1,18})", label)
        if not ending and not re.search(r"[A-Za-z]", label):
            raise _refusal(path, cells, "whole numbers or names", [(row, label)])
        numbers[label] = int(ending[1]) if ending else zlib.crc32(label.encode())
    if len(set(numbers.values())) < len(numbers):  # such as "a1" and "b1"
        numbers = {
            label: int(label) if re.fullmatch(r"-?\d{1,18}", label) else zlib.crc32(label.encode()) for label in numbers
        }
    if len(set(numbers.values())) < len(numbers):
        raise ValueError(f"{path}: the seeds {', '.join(sorted(numbers))} cannot be told apart as numbers; number them")
    return [None if label is None else numbers[label] for label in labels]


def _diverged(points: pd.DataFrame) -> pd.Series:
    """Which rows the table's own column `status` calls diverged."""
    import pandas as pd

    if "status" not in points:
        return pd.Series(False, index=points.index)
    return points["status"].str.strip().str.lower().eq("diverged").fillna(False)


def _states(points: pd.DataFrame) -> pd.Series:
    """The column `status` in our terms (STATES). An unknown word is kept, and counts as not finished. In a table
    without such a column, all runs count as finished."""
    import pandas as pd

    if "status" not in points:
        states = pd.Series("complete", index=points.index, dtype="string")
    else:
        words = points["status"].str.strip().str.lower().str.replace(r"[\s-]+", "_", regex=True)
        states = words.map(lambda word: STATE_OF.get(word, word), na_action="ignore").astype("string")
    for name in points:
        flags = points[name]
        if str(name).rpartition("/")[2].lower() in ("failed", "crashed") and str(flags.dtype) in ("bool", "boolean"):
            states = states.mask(flags.fillna(False).astype(bool), "failed")
    return states
