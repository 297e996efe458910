"""A new generated task is one file and a line of the registry."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_task_runs import SWEEP, write

from analysis.logs.store import load

TASK = '''
"""Say the first token again at the end."""

from dataclasses import dataclass

import numpy as np

from experiments.draws import Draws
from experiments.tasks.base import Examples, Generator


@dataclass(frozen=True, kw_only=True)
class Echo(Generator):
    kind = "echo"

    loudness: float = 1.0

    def check(self) -> None:
        self.require("sequence_length", 2, "a first token and a last one")

    def examples(self, draws: Draws, held_out: bool) -> Examples:
        inputs = draws.integers(self.vocabulary, self.sequence_length)
        mask = np.zeros(inputs.shape, bool)
        mask[:, -1] = True
        return Examples(inputs, np.broadcast_to(inputs[:, :1], inputs.shape), mask)
'''


@pytest.mark.slow
def test_a_new_task_is_a_file_and_a_line(tmp_path: Path) -> None:
    for package in ("analysis", "dynconv", "experiments"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(Path(__file__).parent.parent / package, tmp_path / package, ignore=ignored)
    (tmp_path / "experiments/tasks/echo.py").write_text(TASK)
    registry = tmp_path / "experiments/tasks/registry.py"
    text = registry.read_text().replace(
        "    return (", "    from experiments.tasks.echo import Echo\n    return (Echo, "
    )
    registry.write_text(text)
    sweep = SWEEP.partition("[task")[0] + "[task.last]\nkind = 'echo'\nsequence_length = 8\nvocabulary = 5\n"
    (tmp_path / "here.toml").write_text('executor = "debug"\n[default]\ndevice = "cpu"\n')

    def dynconv(*arguments: object) -> str:
        command = [sys.executable, "-m", "experiments.cli.main", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    path, store = write(tmp_path, sweep), tmp_path / "store"
    dynconv("submit", path, "--store", store, "--profile", tmp_path / "here.toml")
    assert "task.loudness" in dynconv("table", store, "--by", "task.loudness")
    evals = load(store).evals()
    assert set(evals["task"]) == {"last"}
    assert "accuracy" in set(evals["metric"])
