"""Which folder is a sweep's store if no --store says so."""

import re
from pathlib import Path

import pytest
from texts import CHEAP_SWEEP

from experiments import source
from experiments.cli.main import main
from experiments.cli.stores import default_store, stores_of
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
