"""The wheel holds the three packages and what they need, and nothing that would overwrite another project's."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from the tracked files only, as a release would be."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "-w", str(folder), str(folder / "source")], check=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_top_level_names(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"dynconv", "analysis", "experiments", f"dynconv-{PROJECT['version']}.dist-info"}


def test_shipped_data(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {"experiments/sweeps/demo.toml", "experiments/data/sources/python.toml", "dynconv/py.typed"} <= set(names)
    assert {"analysis/pages/page.css", "analysis/pages/page.js"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    (entry,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "dynconv = experiments.cli.main:main" in wheel.read(entry).decode()


def test_every_direct_requirement_is_pinned() -> None:
    pins = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()}
    wanted = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    names = {
        requirement.split(";")[0].split(">")[0].strip().lower()
        for requirement in wanted
        if not requirement.startswith("dynconv[")
    }
    assert names <= pins
    assert "torch==2.13.0" in (ROOT / "constraints.txt").read_text().split()
