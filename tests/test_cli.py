"""The command line as a person and a script meet it: results on standard output, one line for each mistake."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from experiments.cli import main, parser
from experiments.sweep import load_sweep

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "experiments" / "sweeps" / "demo.toml"
LOCAL = ROOT / "slurm" / "profiles" / "local.toml"
PLAN_KEYS = {
    *("run_id", "arm", "size", "seed", "parameters", "parameters_nonembedding", "tokens"),
    *("flops_exact", "flops_6nd", "flops_6n_nonemb_d"),
}
VERBS = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a wrong request gets."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"dynconv {verb}" in text.partition("examples:")[2]


def test_plan_for_scripts_and_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(DEMO), "--profile", str(LOCAL), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    sweep = tomllib.loads(DEMO.read_text())
    assert len(rows) == len(sweep["sizes"]) * len(sweep["arms"]) * len(sweep["seeds"])
    assert all(row.keys() >= PLAN_KEYS for row in rows)
    assert main(["plan", str(DEMO), "--profile", str(LOCAL)]) == 0
    text = capsys.readouterr().out
    assert all(row["run_id"] in text for row in rows)
    assert f"{len(rows)} runs" in text


def test_plan_writes_nothing(tmp_path: Path) -> None:
    """Neither a store nor data: from an empty folder with an empty home."""
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-m", "experiments.cli", "plan", str(DEMO), "--profile", str(LOCAL)]
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("DYNCONV_CACHE", None)
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert sorted(tmp_path.rglob("*")) == [home]


def test_wrong_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typo = tmp_path / "typo.toml"
    typo.write_text(DEMO.read_text().replace("tokens_per_parameter", "tokens_per_param"))
    assert "unknown key 'tokens_per_param'; did you mean 'tokens_per_parameter'?" in refused(capsys, "plan", typo)
    assert "nothing.toml: no such file" in refused(capsys, "plan", tmp_path / "nothing.toml")
    profile = tmp_path / "profile.toml"
    profile.write_text('executor = "locall"\n')
    assert "did you mean 'local'" in refused(capsys, "submit", DEMO, "--profile", profile)
    assert "is not a folder" in refused(capsys, "status", "--store", tmp_path / "nowhere")
    run_id = load_sweep(DEMO)[0].run_id
    line = refused(capsys, "cancel", DEMO, f"{run_id[:-1]}x", "--store", tmp_path)
    assert f"the sweep has no such run: got '{run_id[:-1]}x'; did you mean '{run_id}'?" in line


def test_an_unwritable_store(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "submit", DEMO, "--profile", LOCAL, "--store", "/proc/store")
    assert "/proc/store" in line


def test_a_store_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "store").write_text("")
    assert "store" in refused(capsys, "submit", DEMO, "--profile", LOCAL, "--store", tmp_path / "store")
    assert (tmp_path / "store").read_text() == ""


def test_an_unknown_verb_is_a_wrong_request(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plam"])
    assert left.value.code == 2
    assert "plan" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        main(["--debug", "plan", str(tmp_path / "nothing.toml")])


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m experiments.cli plan {DEMO} --profile {LOCAL} | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("run ")
