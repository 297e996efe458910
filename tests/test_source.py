"""Which code decides an outcome, and what of it counts as another version."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import source

# Imported with a trainer, but without a say in what it learns: they show progress, read and write logs, check and name
# configurations, and build data, whose content has a hash of its own.
BESIDE = (
    "experiments/__init__.py",
    "experiments/source.py",
    "experiments/terminal.py",
    "experiments/data/__init__.py",
    "experiments/design/__init__.py",
    "experiments/design/config.py",
    "experiments/design/data.py",
    "experiments/design/identity.py",
)
IMPORTS = """
import sys
from pathlib import Path
from experiments import source
from experiments.parts.registry import *
import experiments.training.assembly, experiments.training.checkpoints, experiments.training.optimizers
import importlib, pkgutil, experiments.models, experiments.tasks
for package in (experiments.models, experiments.tasks):
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] in ("experiments", "dynconv") and getattr(module, "__file__", None):
        print(Path(module.__file__).relative_to(source.root()).as_posix())
"""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for package in ("dynconv", "experiments"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source.root() / package, tmp_path / package, ignore=ignore)
    return tmp_path


def test_everything_that_a_trainer_imports_decides_its_outcome_or_is_known_not_to() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True, cwd=source.root()
    )
    imported, deciding = set(done.stdout.split()), set(source.module_hashes(source.root()))
    assert imported - deciding - set(source.NOT_DECIDING) == set(BESIDE)
    for place in (*source.DECIDING, *source.NOT_DECIDING):
        assert (source.root() / place).exists(), place
    assert not {name for name in deciding if name.startswith("analysis/")}


def test_comments_docstrings_and_layout_are_no_other_version(copy: Path) -> None:
    path, before = copy / "experiments/models/swiglu.py", source.module_hashes(copy)
    assert before == source.module_hashes(source.root())
    text = path.read_text()
    path.write_text('"""Another docstring."""\n# A comment.\n' + text.partition('"""\n\n')[2].replace("    ", "  "))
    assert path.read_text() != text
    assert source.module_hashes(copy) == before
    assert source.differing(copy, source.code_sha256()) == []
    (copy / "experiments/cli/main.py").write_text("print()")
    assert source.module_hashes(copy) == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("experiments/models/swiglu.py", "F.silu(gate) * up", "F.silu(up) * gate"),
        ("experiments/models/chunks.py", "CHUNK = 64", "CHUNK = 32"),
        ("dynconv/ops/reference.py", "0.0", "0.5"),
        ("experiments/training/loss.py", "IGNORED = -100", "IGNORED = -101"),
    ],
)
def test_what_is_computed_is(copy: Path, name: str, old: str, new: str) -> None:
    before = source.module_hashes(copy)
    text = (copy / name).read_text()
    assert old in text
    (copy / name).write_text(text.replace(old, new))
    after = source.module_hashes(copy)
    assert [each for each in after if after[each] != before[each]] == [name]
    assert source.differing(copy, "0" * 64) is None


def test_a_removed_module_is_another_version(copy: Path) -> None:
    (copy / "experiments/tasks/memorize.py").unlink()
    assert source.module_hashes(copy) != source.module_hashes(source.root())
