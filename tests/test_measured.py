"""The tables that are committed are what `dynconv table` says of the runs that are committed."""

from pathlib import Path

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
