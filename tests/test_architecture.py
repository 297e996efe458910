"""The house rules that a machine can hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("dynconv", "analysis", "experiments")


def test_import_contracts() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def modules_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import experiments.cli; experiments.cli.parser()", {"torch", "pandas", "scipy", "matplotlib", "tokenizers"}),
        ("import experiments.sweep, experiments.plan", {"torch", "pandas", "numpy"}),
        ("import analysis.runlog", {"torch", "pandas", "pyarrow"}),
        ("import analysis.powerlaw, analysis.multiplier, analysis.tables", {"torch", "matplotlib"}),
    ],
)
def test_starting_loads_no_more_than_it_needs(statement: str, absent: set[str]) -> None:
    assert not modules_after(statement) & absent


def test_slurm_and_results_hold_no_package() -> None:
    assert not [
        path for room in ("slurm", "results") for path in (ROOT / room).rglob("*.py") if "runs" not in path.parts
    ]


def test_files_are_whole_and_shallow() -> None:
    """A room is a folder of files that a person can read: two levels, none long."""
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert len(path.relative_to(ROOT).parts) <= 3, path
            tree = ast.parse(path.read_text())
            assert ast.get_docstring(tree) or not tree.body, f"{path} does not say what it is for"
