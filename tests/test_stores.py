"""Which folder is a sweep's store if no --store says so."""

import json
import re
from pathlib import Path

import pytest
from texts import CHEAP_SWEEP

from experiments import source
from experiments.cli.main import main
from experiments.cli.stores import chosen_runs, default_store, stores_of
from experiments.design.config import RunConfig
from experiments.design.sweep import load_sweep


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep file two folders below the root of a project."""
    monkeypatch.delenv("DYNCONV_STORES", raising=False)
    (tmp_path / "project" / "sweeps" / "mine").mkdir(parents=True)
    (tmp_path / "project" / "pyproject.toml").write_text("")
    path = tmp_path / "project" / "sweeps" / "mine" / "cheap.toml"
    path.write_text(CHEAP_SWEEP.format(source=tmp_path))
    return path


@pytest.fixture
def runs(sweep: Path) -> list[RunConfig]:
    return load_sweep(sweep)


def test_a_sweep_has_one_store_from_wherever_it_is_submitted(
    sweep: Path, runs: list[RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "project" / "results" / "runs" / runs[0].sweep
    for folder in (tmp_path, tmp_path / "project", sweep.parent):
        monkeypatch.chdir(folder)
        assert default_store(sweep, runs, "submit").resolve() == store
    monkeypatch.chdir(tmp_path / "project")
    assert str(default_store(Path("sweeps/mine/cheap.toml"), runs, "submit")) == f"results/runs/{runs[0].sweep}"
    monkeypatch.setenv("DYNCONV_STORES", "/shared/stores")
    assert default_store(sweep, runs, "submit") == Path("/shared/stores") / runs[0].sweep


def test_without_a_project_it_is_beside_the_sweep_file(sweep: Path, tmp_path: Path) -> None:
    (tmp_path / "project" / "pyproject.toml").unlink()
    if any((folder / name).exists() for folder in tmp_path.parents for name in ("pyproject.toml", ".git")):
        pytest.skip("the temporary folder is inside of a project")
    assert stores_of(sweep) == sweep.parent / "results" / "runs"


def test_a_sweep_of_an_installed_copy_is_kept_where_one_is(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "project" / "pyproject.toml").unlink()
    monkeypatch.setattr(source, "root", lambda: tmp_path / "project")
    (tmp_path / "work" / ".git").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    assert stores_of(sweep) == Path("results/runs")


def test_runs_in_another_store_are_not_trained_again(
    sweep: Path,
    runs: list[RunConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As in the folder that was the default in earlier versions, the working directory's."""
    before = tmp_path / "results" / "runs" / runs[0].sweep
    (before / runs[0].run_id).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    now = tmp_path / "project" / "results" / "runs" / runs[0].sweep
    told = f"1 runs of this sweep are in {before.relative_to(tmp_path)}, and the default is {now.relative_to(tmp_path)}"
    with pytest.raises(ValueError, match=f"^{re.escape(told)}: name the one that you want with --store$"):
        default_store(sweep, runs, "submit")
    assert main(["submit", str(sweep)]) == 2
    assert not now.exists()
    capsys.readouterr()
    assert default_store(sweep, runs, "status").resolve() == now
    assert f"{told}; --store names another" in capsys.readouterr().err
    (now / runs[0].run_id).mkdir(parents=True)
    assert default_store(sweep, runs, "submit").resolve() == now


@pytest.mark.parametrize("verb", ["cancel", "retry"])
def test_a_store_that_is_not_there_is_not_made(
    verb: str, sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([verb, str(sweep), "--store", str(tmp_path / "store")]) == 2
    assert f"{tmp_path / 'store'} is not a store, so it has no runs" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_what_can_keep_no_runs_is_no_store(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A frozen table hides runs that are trained beside it, so that nothing of them would be seen."""
    frozen = tmp_path / "frozen"
    frozen.mkdir()
    (frozen / "runs.parquet").touch()
    for verb in ("plan", "submit"):
        assert main([verb, str(sweep), "--store", str(frozen)]) == 2
        assert f"{frozen} is a frozen store: runs.parquet hides runs that are beside it" in capsys.readouterr().err
        assert main([verb, str(sweep), "--store", str(sweep)]) == 2
        assert f"{sweep} is a file; --store wants the folder" in capsys.readouterr().err
    assert [path.name for path in frozen.iterdir()] == ["runs.parquet"]


def test_a_part_of_a_sweep_is_chosen_by_a_condition(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For what is trained in several sessions: plan and submit take the runs that fulfil a condition on the plan."""
    sweep.write_text(sweep.read_text().replace("seeds = [0]", "seeds = [0, 1, 2]"))
    runs = load_sweep(sweep)

    def planned(where: str) -> list[str]:
        assert main(["plan", str(sweep), "--where", where, "--json"]) == 0
        return [row["run_id"] for row in json.loads(capsys.readouterr().out)]

    assert planned("seed >= 0") == [run.run_id for run in runs]
    assert planned("seed < 2 and N > 0") == [run.run_id for run in runs[:2]]
    for where, complaint in {"seed == 99": "leaves no row", "sead == 0": "write conditions as in"}.items():
        assert main(["submit", str(sweep), "--where", where]) == 2
        assert complaint in capsys.readouterr().err
    assert not (sweep.parents[1] / "results").exists()


def test_a_chosen_part_has_its_axes_and_its_trunks(sweep: Path) -> None:
    text = sweep.read_text().replace("tokens_per_parameter = ", "# ")
    axes = '[train]\nschedule = { kind = "wsd", decay_fraction = 0.2 }\n[vary]\ntokens_per_parameter = [2, 4]\n'
    sweep.write_text(text + axes)
    runs = load_sweep(sweep)
    kept = chosen_runs(runs, "`vary.tokens_per_parameter` == 2")
    trunks = {run.run_id for run in runs if run.trunk is None}
    assert {run.trunk for run in kept if run.trunk} == trunks == {run.run_id for run in kept} & trunks
    assert len(kept) == len(runs) - len(trunks)
