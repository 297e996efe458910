"""The main job: a sweep file in, a table of compute multipliers out, through the commands a person types."""

import json
from pathlib import Path

import pytest

from analysis.logs.files import read_json
from experiments.cli.main import main

ROOT = Path(__file__).parent.parent
SWEEP = """
name = "small"
ladder = "nano"
sizes = ["25k", "45k", "70k"]
arms = ["transformer", "static-qkv"]
baseline = "transformer"
seeds = [0]
tokens_per_parameter = 5
match = "flops"
evaluations = 2

[data]
source = "{source}"
vocabulary = 300
train_tokens = 400_000
validation_tokens = 4_000
"""


@pytest.mark.slow
def test_from_a_sweep_file_to_a_table(
    tmp_path: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYNCONV_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)
    sweep, store = tmp_path / "small.toml", tmp_path / "store"
    sweep.write_text(SWEEP.format(source=text_folder))

    assert main(["submit", str(sweep), "--store", str(store)]) == 0
    capsys.readouterr()
    assert main(["status", str(sweep), "--store", str(store), "--format", "json"]) == 0
    states = json.loads(capsys.readouterr().out)
    assert [state["state"] for state in states] == ["complete"] * 6

    finished = {path: path.stat().st_mtime_ns for path in store.glob("*/run.json")}
    assert len(finished) == 6
    assert main(["submit", str(sweep), "--store", str(store)]) == 0
    assert {path: path.stat().st_mtime_ns for path in store.glob("*/run.json")} == finished
    capsys.readouterr()

    assert main(["plan", str(sweep), "--format", "json"]) == 0
    planned = {row["run_id"]: row for row in json.loads(capsys.readouterr().out)}
    for path in finished:
        run = read_json(path)
        for key in ("parameters", "parameters_nonembedding", "tokens", "flops_exact", "flops_6nd"):
            assert run[key] == planned[run["run_id"]][key]

    assert main(["table", str(store), "--format", "json"]) == 0
    (row,) = [row for row in json.loads(capsys.readouterr().out) if row["arm"] == "static-qkv"]
    low, high = row["ci"]
    assert low <= row["m"] <= high
    assert row["n_sizes"] == 3
    assert row["excluded"] == []

    frozen = tmp_path / "frozen"
    assert main(["freeze", str(store), "-o", str(frozen)]) == 0
    capsys.readouterr()
    assert main(["table", str(frozen), "--format", "json"]) == 0
    assert [r for r in json.loads(capsys.readouterr().out) if r["arm"] == "static-qkv"] == [row]

    assert main(["plot", str(store), "-o", str(tmp_path / "figures")]) == 0
    assert list((tmp_path / "figures").glob("*.svg"))
