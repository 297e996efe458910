"""The tables that are committed are what `dynconv table` says of the runs that are committed."""

import math
from pathlib import Path

import pandas as pd
import pytest

from experiments.cli.main import main

ROOT = Path(__file__).parent.parent
TABLES = sorted(path.relative_to(ROOT) for path in (ROOT / "results" / "measured").glob("*/*/table*.md"))


@pytest.mark.parametrize("table", TABLES, ids=str)
def test_the_committed_runs_give_the_committed_table_to_the_digit(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """table.md is against the sweep's baseline, table-ARM.md against that arm."""
    monkeypatch.chdir(ROOT)
    baseline = table.stem.removeprefix("table").removeprefix("-")
    assert main(["table", str(table.parent), *(["--baseline", baseline] if baseline else [])]) == 0
    assert capsys.readouterr().out == table.read_text()


def test_the_multipliers_in_seconds_are_those_of_the_committed_throughput(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page's own code, run again; where rows were measured again, paste what it prints. Beside it the arithmetic in
    pandas, where each setting is there once."""
    monkeypatch.chdir(ROOT)
    page = Path("results/measured/h200/README.md").read_text().partition("in seconds of this card")[2]
    exec(page.split("```python\n")[1].split("```")[0], {})
    printed = capsys.readouterr().out
    assert printed in page, f"results/measured/h200/README.md wants these lines in its table:\n{printed}"
    rows = pd.read_parquet("results/measured/h200/training.parquet").query(
        "gpus == 1 and optimizer == 'adamw' and fused"
    )
    mfu = rows.groupby(["size", "arm"])["mfu"].agg(["mean", "size"])
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in printed.splitlines()]
    assert len(told) >= 6
    for size, arm, claim, seconds in told:
        (mine, count), (theirs, others) = mfu.loc[size, arm], mfu.loc[size, "transformer"]
        if count == others == 1:
            assert math.isclose(float(seconds), float(claim) * mine / theirs, abs_tol=0.006)
