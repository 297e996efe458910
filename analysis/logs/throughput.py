"""Training throughput as anyone measured it: tokens a second by size and arm, with the settings that must be equal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from analysis.errors import first_line
from analysis.logs.selection import some

if TYPE_CHECKING:
    import pandas as pd

NEEDED = ("size", "arm", "tokens_per_second")
# Throughput is compared only where all of these are equal; missing values count as equal.
SETTING = (
    *("batch", "sequence", "gpus", "parallel", "micro_batches", "recompute", "fused", "vocabulary"),
    *("device", "versions", "commit"),
)
# Columns of SETTING, with their plurals: measurements of several kinds are not averaged.
ONE_KIND = {
    "device": "devices",
    "vocabulary": "vocabularies",
    "versions": "versions",
    "commit": "commits",
    "fused": "settings of fused",
}
OPTIMIZER = "optimizer"  # each arm is compared with that of its runs
RUNS_OPTIMIZER = "train.optimizer"  # the fact that names it


def read_throughput(path: Path) -> pd.DataFrame:
    """The columns NEEDED, SETTING and OPTIMIZER of a .csv or .parquet file, as `dynconv bench train` writes one.

    All but the throughput are text; rows without a throughput (out of memory, say) are left out.

    Raises ValueError where the file cannot be read, lacks a column, or has other numbers than positive ones.
    """
    import pandas as pd

    readers = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    if path.suffix not in readers:
        raise ValueError(f"--throughput takes a .csv or .parquet file of measured throughput; got {path}")
    if not path.exists():
        raise ValueError(f"--throughput: no file {path}; give one that `dynconv bench train` wrote")
    try:
        rows = readers[path.suffix](path)
    except (OSError, ValueError) as error:  # parser errors are ValueErrors
        remedy = "copy it again, or have `dynconv bench train` make it again"
        raise ValueError(f"{path} is unreadable ({first_line(error)}); {remedy}") from None
    if missing := [name for name in NEEDED if name not in rows]:
        raise ValueError(f"{path} has no column {', '.join(missing)}; throughput needs {', '.join(NEEDED)}")
    rows = rows[rows["tokens_per_second"].notna()]
    rates = pd.to_numeric(rows["tokens_per_second"], errors="coerce")
    wrong = rows.index[~(rates > 0) | (rates == float("inf"))]
    if len(wrong) or rows.empty:
        got = some(f"{rows.at[at, 'tokens_per_second']} in row {at + 1}" for at in wrong) or "no row with one"
        raise ValueError(f"{path}: tokens_per_second must be positive numbers; got {got}")
    texts = (*SETTING, OPTIMIZER)
    text = {name: rows[name].astype("string") for name in ("size", "arm", *texts) if name in rows}
    absent = {name: pd.Series(pd.NA, index=rows.index, dtype="string") for name in texts if name not in rows}
    return pd.DataFrame({**text, **absent, "tokens_per_second": rates.astype(float)})
