"""Read what there is to analyse into one table of runs: a live store, a frozen one, or a CSV or Parquet of points.

A row is a run; columns and units as in `runlog.RUN_COLUMNS`. Missing stays missing (NA), never zero. What could not
be read is named in `problems` and left out, never guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.errors import first_line
from analysis.logs.columns import format_columns
from analysis.logs.files import read_json, write_atomically
from analysis.logs.points import read_points, run_types
from analysis.logs.reader import read_rows, status
from analysis.logs.schema import ARM_FACTS, CLOCKS, COLUMNS, IDENTITY, RUN_COLUMNS, SCHEMA

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

ALL_LINEAR = ("q", "k", "v", "o", "gate", "up", "down")  # the linear maps of a layer, in order
CONVOLUTION = {  # the facts that each kind of convolution has, beside its sites
    "static": ("width", "residual"),
    "headwise": ("width", "residual", "static_filter", "head_size"),
    "lowrank": ("width", "residual", "static_filter", "rank"),
}


@dataclass
class Store:
    """`runs` is read at once from small files; steps and evaluations when asked for."""

    path: Path
    runs: pd.DataFrame  # RUN_COLUMNS; of points also flops_given: C as the table gives it
    problems: list[str]
    run_dirs: list[Path] = field(default_factory=list)  # of a live store
    columns: Mapping[str, str] = field(default_factory=dict)  # of a table of points: what --columns said

    @property
    def paths(self) -> list[Path]:
        """Where the runs were read from: one path, but for stores that were merged."""
        return [self.path]

    @property
    def name(self) -> str:
        """The store in a title."""
        return " + ".join(path.name for path in self.paths)

    @property
    def arguments(self) -> list[str]:
        """How a command line names this store: its paths, and --columns where a table's columns were named."""
        return [*map(str, self.paths), *format_columns(self.columns)]

    def steps(self) -> pd.DataFrame:
        """run_id and the columns of `runlog.STEP_COLUMNS`, by run and step."""
        return self.rows("steps").to_pandas()

    def evals(self) -> pd.DataFrame:
        """run_id and the columns of `runlog.EVAL_COLUMNS`, by run and step."""
        return self.rows("evals").to_pandas()

    def rows(self, kind: str) -> pa.Table:
        """The steps or the evals: a thousand runs have ten million steps, of which pandas would make a copy or two."""
        import pyarrow as pa
        from pyarrow import parquet
        from tqdm import tqdm

        frozen = self.path / f"{kind}.parquet"
        if frozen.exists():
            return _whole(frozen, parquet.read_table)
        types = [(name, pa.type_for_alias(dtype)) for name, dtype in COLUMNS[kind].items()]
        tables = [pa.schema([("run_id", pa.string()), *types]).empty_table()]
        for run_dir in tqdm(self.run_dirs, desc=kind, delay=2, leave=False):
            found = read_rows(run_dir, kind)
            self.problems += [problem for problem in found.problems if problem not in self.problems]
            tables.append(found.table.add_column(0, "run_id", pa.repeat(run_dir.name, found.table.num_rows)))
        return pa.concat_tables(tables)


def load(path: Path, columns: Mapping[str, str] | None = None) -> Store:
    """Read a live store, a frozen one or a table of points.

    `columns` maps N, D, C, N_nonemb or a name of ours to the table's name for it, where that is not a usual one.
    Raises ValueError if there is nothing to read or a needed file is torn.
    """
    if (path / "points.csv").is_file():
        path = path / "points.csv"
    if path.is_file():
        runs, notes = read_points(path, columns or {})
        return Store(path, runs, notes, columns=dict(columns or {}))
    if columns:
        raise ValueError(f"--columns renames the columns of a table in a file; {path} is a directory")
    if not path.is_dir():
        raise ValueError(f"no store at {path}; give a store's directory or a table of points")
    if (path / "runs.parquet").is_file():
        return Store(path, _read_frozen(path / "runs.parquet"), [])
    return _read_live(path)


def freeze(store: Store, out: Path, steps: bool = False) -> list[Path]:
    """Write runs.parquet and evals.parquet, and steps.parquet on request, into `out`; returns their paths."""
    import pyarrow as pa
    from pyarrow import parquet

    if store.run_dirs and out.resolve() in [path.resolve() for path in store.paths]:
        raise ValueError(f"{out} is the live store itself, whose later runs the frozen one would hide; give another -o")
    out.mkdir(parents=True, exist_ok=True)
    tables = {kind: store.rows(kind) for kind in (("evals", "steps") if steps else ("evals",))}
    tables["runs"] = pa.Table.from_pandas(store.runs, preserve_index=False)
    for name, table in tables.items():
        write_atomically(out / f"{name}.parquet", partial(parquet.write_table, table))
    return [out / f"{name}.parquet" for name in sorted(tables)]


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


_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "Int64": int,
    "float64": (int, float),
    "boolean": bool,
}


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
    row |= arm_facts(config.get("config"))
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


def arm_facts(config: Any) -> dict[str, Any]:
    """ARM_FACTS out of a run's frozen configuration; nothing where it declares no convolution."""
    model = config.get("model") if isinstance(config, dict) else None
    conv = model.get("conv") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(conv, dict):
        return {}
    facts = {"kind": conv.get("kind"), "qk_norm": model.get("qk_norm"), "kv_heads": model.get("kv_heads")}
    if facts["kind"] in CONVOLUTION:
        facts["site"] = site_name(conv.get("sites") or ())
        facts |= {name: conv.get(name) for name in CONVOLUTION[facts["kind"]]}
    return facts


def site_name(sites: Iterable[str]) -> str | None:
    """Where the convolution is applied, in one word: "qkv", "all-linear", "q+gate"."""
    chosen = sorted(sites, key=lambda site: ALL_LINEAR.index(site) if site in ALL_LINEAR else len(ALL_LINEAR))
    if tuple(chosen) == ALL_LINEAR:
        return "all-linear"
    return ("" if all(len(site) == 1 for site in chosen) else "+").join(chosen) or None


def run_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table with the columns and types of RUN_COLUMNS."""
    import pandas as pd

    return pd.DataFrame.from_records(rows).reindex(columns=list(RUN_COLUMNS)).astype(RUN_COLUMNS)


def _read_frozen(path: Path) -> pd.DataFrame:
    import pandas as pd

    runs = _whole(path, pd.read_parquet)
    missing = [name for name in RUN_COLUMNS if name not in runs.columns and name not in ARM_FACTS]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}; freeze the store again")
    return run_types(runs)


def _whole(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (OSError, ValueError) as error:  # Arrow's errors are ValueErrors
        raise ValueError(f"{path} is unreadable ({first_line(error)}); freeze the store again") from None
