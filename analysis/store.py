"""Read what there is to analyse into one table of runs: a live store, a frozen one, or a CSV or Parquet of points.

A row is a run; columns and units as in `runlog.RUN_COLUMNS`. Missing stays missing (NA), never zero. What could not
be read is named in `problems` and left out, never guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.runlog import (
    CLOCKS,
    COLUMNS,
    CONVENTIONS,
    IDENTITY,
    RUN_COLUMNS,
    SCHEMA,
    read_json,
    read_rows,
    status,
    write_atomically,
)

if TYPE_CHECKING:
    import pandas as pd

# What people call the columns of a table of points, lower case, by our name for them.
POINT_NAMES = {
    "arm": ("arm", "model", "variant", "architecture"),
    "size": ("size", "scale", "rung"),
    "seed": ("seed",),
    "parameters": ("parameters", "n", "params", "n_params", "num_params"),
    "parameters_nonembedding": ("parameters_nonembedding", "n_nonemb", "n_nonembedding"),
    "tokens": ("tokens", "d", "n_tokens", "num_tokens", "training tokens"),
    "flops_given": ("flops_given", "c", "flops", "compute", "flop", "training flop"),
    "loss": ("loss", "final_loss", "val_loss", "validation_loss", "test_loss"),
    "tokenizer_sha256": ("tokenizer_sha256", "tokenizer"),
    "data_sha256": ("data_sha256", "data", "dataset"),
}
POINT_SHORT = {"parameters": "N", "parameters_nonembedding": "N_nonemb", "tokens": "D", "flops_given": "C"}


@dataclass
class Store:
    """`runs` is read at once from small files; steps and evaluations when asked for."""

    path: Path
    runs: pd.DataFrame  # RUN_COLUMNS; of points also flops_given: C as the table gives it
    problems: list[str]
    run_dirs: list[Path] = field(default_factory=list)  # of a live store

    def steps(self) -> pd.DataFrame:
        """run_id and the columns of `runlog.STEP_COLUMNS`, by run and step."""
        return self._rows("steps")

    def evals(self) -> pd.DataFrame:
        """run_id and the columns of `runlog.EVAL_COLUMNS`, by run and step."""
        return self._rows("evals")

    def _rows(self, kind: str) -> pd.DataFrame:
        import pandas as pd

        frozen = self.path / f"{kind}.parquet"
        if frozen.exists():
            return pd.read_parquet(frozen)
        frames = []
        for run_dir in self.run_dirs:
            rows = read_rows(run_dir, kind)
            self.problems += [problem for problem in rows.problems if problem not in self.problems]
            frame = rows.table.to_pandas()
            frame.insert(0, "run_id", run_dir.name)
            frames.append(frame)
        if not frames:
            return pd.DataFrame(columns=["run_id", *COLUMNS[kind]])
        return pd.concat(frames, ignore_index=True)


def load(path: Path, columns: Mapping[str, str] | None = None) -> Store:
    """Read a live store, a frozen one or a table of points.

    `columns` maps N, D, C, N_nonemb or a name of ours to the table's name for it, where that is not a usual one.
    Raises ValueError if there is nothing to read or a needed file is torn.
    """
    if (path / "points.csv").is_file():
        path = path / "points.csv"
    if path.is_file():
        return Store(path, read_points(path, columns or {}), [])
    if columns:
        raise ValueError(f"--columns renames the columns of a CSV or Parquet file; {path} is a directory")
    if not path.is_dir():
        raise ValueError(f"no store at {path}; give a store's directory or a .csv or .parquet file")
    if (path / "runs.parquet").is_file():
        return Store(path, _read_frozen(path / "runs.parquet"), [])
    return _read_live(path)


def freeze(store: Store, out: Path, steps: bool = False) -> list[Path]:
    """Write runs.parquet and evals.parquet, and steps.parquet on request, into `out`; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    frames = {"evals": store.evals()} | ({"steps": store.steps()} if steps else {}) | {"runs": store.runs}
    for name, frame in frames.items():
        write_atomically(out / f"{name}.parquet", partial(frame.to_parquet, index=False))
    return [out / f"{name}.parquet" for name in sorted(frames)]


def _read_live(path: Path) -> Store:
    problems: list[str] = []
    found = list(_read_runs(path, problems))
    if not found:
        raise ValueError(
            f"{path} holds no run and no runs.parquet"
            + "".join(f"; {problem}" for problem in problems[:3])
            + "; give the directory that `dynconv submit` or `dynconv freeze` wrote"
        )
    return Store(path, run_table([row for _, row in found]), problems, [run_dir for run_dir, _ in found])


_TYPES: dict[str, type | tuple[type, ...]] = {"string": str, "Int64": int, "float64": (int, float)}


def _read_runs(path: Path, problems: list[str]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for run_dir in sorted(path.iterdir()):
        if run_dir.name.startswith(".") or not run_dir.is_dir():
            continue
        try:
            yield run_dir, _read_run(run_dir)
        except ValueError as error:
            problems.append(f"{error}; {run_dir.name} is left out")


def _read_run(run_dir: Path) -> dict[str, Any]:
    """One row of the run table, from config.json and run.json alone."""
    config = read_json(run_dir / "config.json")
    missing = [key for key in IDENTITY if key not in config]
    if missing or config.get("schema") != SCHEMA:
        raise ValueError(
            f"{run_dir / 'config.json'} is not of schema {SCHEMA} (lacks {', '.join(missing) or 'schema'})"
        )
    if config["run_id"] != run_dir.name:
        raise ValueError(f"{run_dir / 'config.json'} belongs to run {config['run_id']}")
    row = {key: config.get(key) for key in (*IDENTITY, "code_commit", "data_sha256", "tokenizer_sha256")}
    row["status"] = status(run_dir)
    if row["status"] == "complete":
        run = read_json(run_dir / "run.json")
        clocks = run.get("seconds", {})
        if not isinstance(clocks, dict):
            raise ValueError(f"{run_dir / 'run.json'} has seconds {clocks!r}, not a clock each")
        row |= {f"{clock}_seconds": seconds for clock, seconds in clocks.items() if clock in CLOCKS}
        row |= {key: value for key, value in run.items() if key in RUN_COLUMNS}
    for key, value in row.items():
        if value is not None and not isinstance(value, _TYPES[RUN_COLUMNS[key]]):
            raise ValueError(f"{run_dir} has {key} = {value!r}, not a {RUN_COLUMNS[key]}")
    return row


def run_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table with the columns and types of RUN_COLUMNS."""
    import pandas as pd

    return pd.DataFrame.from_records(rows).reindex(columns=list(RUN_COLUMNS)).astype(RUN_COLUMNS)


def _read_frozen(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        runs = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is unreadable ({str(error).splitlines()[0]}); freeze the store again") from None
    missing = [name for name in RUN_COLUMNS if name not in runs.columns]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}; freeze the store again")
    return runs.astype(RUN_COLUMNS)


def read_points(path: Path, columns: Mapping[str, str]) -> pd.DataFrame:
    """A table of points as a run table. Compute given without a named convention becomes `flops_given`; with N and D
    there are also flops_6nd = 6 N D and flops_6n_nonemb_d, by their definitions."""
    import pandas as pd

    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"{path} is neither .csv nor .parquet; give one of these, or a store's directory")
    try:
        points = readers[path.suffix](path)
    except (OSError, ValueError, UnicodeDecodeError) as error:  # pandas' parser errors are ValueErrors
        raise ValueError(f"{path} is unreadable ({str(error).splitlines()[0]})") from None
    if points.empty:
        raise ValueError(f"{path} has no rows")
    points = points.rename(columns=_renaming(path, [str(name) for name in points.columns], columns))
    if "convention" in points and points["convention"].nunique() == 1:
        name = str(points["convention"].iloc[0])
        if name not in CONVENTIONS:
            raise ValueError(f"{path}: no FLOP convention {name!r}; there are {', '.join(CONVENTIONS)}")
        points = points.rename(columns={"flops_given": CONVENTIONS[name]})
    numbers = [name for name in points.columns if RUN_COLUMNS.get(name, "float64") != "string"]
    for name in set(numbers) & ({*RUN_COLUMNS, "flops_given"}):
        points[name] = _numeric(path, points[name])
    if "status" not in points:
        points["status"] = "complete"
    if {"parameters", "tokens"} <= set(points) and "flops_6nd" not in points:
        points["flops_6nd"] = 6.0 * points["parameters"] * points["tokens"]
    if {"parameters_nonembedding", "tokens"} <= set(points) and "flops_6n_nonemb_d" not in points:
        points["flops_6n_nonemb_d"] = 6.0 * points["parameters_nonembedding"] * points["tokens"]
    if "run_id" not in points:
        points["run_id"] = [f"row {number}" for number in range(1, len(points) + 1)]
    types = {name: "string" if dtype == "string" else "float64" for name, dtype in RUN_COLUMNS.items()}
    absent = {name: pd.Series(index=points.index, dtype=types[name]) for name in types if name not in points}
    return points.assign(**absent).astype(types)


def _renaming(path: Path, names: list[str], columns: Mapping[str, str]) -> dict[str, str]:
    """The table's column names to ours: as `columns` says, else by their usual names."""
    ours = {short: name for name, short in POINT_SHORT.items()} | {"C": "flops_given"}
    renaming = {}
    for wanted, theirs in columns.items():
        target = ours.get(wanted, wanted)
        if target not in RUN_COLUMNS and target != "flops_given":
            raise ValueError(f"--columns: no column {wanted!r} is known; known are N, D, C, {', '.join(RUN_COLUMNS)}")
        if theirs not in names:
            raise ValueError(f"{path} has no column {theirs!r}; it has {', '.join(names)}")
        renaming[theirs] = target
    for target, usual in POINT_NAMES.items():
        matches = [name for name in names if name.lower() in usual and name not in renaming]
        if target not in renaming.values() and matches:
            renaming[matches[0]] = target
    return renaming


def _numeric(path: Path, column: pd.Series) -> pd.Series:
    import pandas as pd

    try:
        return pd.to_numeric(column)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: column {column.name} must hold numbers ({error})") from None
