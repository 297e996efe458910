"""The measure of the house: a new part is two files and a line of the registry, and every verb works with it."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launches import PATIENCE, slow_down_code, wait_until

ROOT = Path(__file__).parent.parent
PART = '''
"""A toy mixer: each token gets the mean of all tokens so far, mapped by one matrix."""

from collections.abc import Mapping
from dataclasses import dataclass

from experiments.parts.base import Fact, LinearMap, Part


@dataclass(frozen=True)
class RunningMean(Part):
    kind = "running_mean"

    gain: float = 1.0

    def linear_maps(self, width: int) -> dict[str, LinearMap]:
        return {"mix": LinearMap(width, width)}

    def facts(self) -> Mapping[str, Fact]:
        return {"gain": self.gain}
'''
MODULE = '''
"""The module of the toy mixer."""

import torch
from torch import Tensor, nn

from experiments.design.model import ModelConfig
from experiments.models.short_convolution import Maps
from experiments.parts.running_mean import RunningMean


def build(part: RunningMean, model: ModelConfig) -> nn.Module:
    return Module(part, model)


class Module(nn.Module):
    into_residual = ("mix",)

    def __init__(self, part: RunningMean, model: ModelConfig) -> None:
        super().__init__()
        self.gain = part.gain
        self.maps = Maps(part, model)

    def forward(self, x: Tensor) -> Tensor:
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype)[:, None]
        (y,) = self.maps.apply_to(self.gain * x.cumsum(1) / count, ("mix",), x)
        return y
'''
SWEEP = """
name = "toy"
ladder = "nano"
sizes = ["25k", "45k", "70k"]
arms = ["toy", "toy-static"]
baseline = "toy"
seeds = [0]
tokens_per_parameter = 4
match = "flops"
evaluations = 2

[arm.toy]
mixer = { kind = "running_mean", gain = 2.0 }

[arm.toy-static]
mixer = { kind = "running_mean", gain = 2.0 }
conv = { kind = "static", sites = ["mix", "up"] }

[data]
source = "SOURCE"
vocabulary = 300
train_tokens = 400_000
validation_tokens = 4_000
"""


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A copy of the packages with the toy part in it."""
    for package in ("analysis", "dynconv", "experiments"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "experiments/parts/running_mean.py").write_text(PART)
    (tmp_path / "experiments/models/running_mean.py").write_text(MODULE)
    registry = tmp_path / "experiments/parts/registry.py"
    text = registry.read_text()
    text = text.replace("MIXERS: tuple[type[Part], ...] = (", "MIXERS = (RunningMean, ")
    registry.write_text(
        text.replace("import SwiGLU\n", "import SwiGLU\nfrom experiments.parts.running_mean import RunningMean\n")
    )
    return tmp_path


@pytest.fixture
def dynconv(house: Path) -> Callable[..., subprocess.Popen[str]]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(house),
        "DYNCONV_CACHE": str(house / "cache"),
        "OMP_NUM_THREADS": "1",
    }

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "experiments.cli.main", *map(str, arguments)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=house, env=environment, stdout=pipe, stderr=pipe, text=True)

    return start


def finish(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=2 * PATIENCE)
    assert process.returncode == 0, err
    return out


@pytest.mark.slow
def test_a_new_part_is_two_files_and_a_line(
    house: Path, dynconv: Callable[..., subprocess.Popen[str]], text_folder: Path
) -> None:
    sweep, store = house / "toy.toml", house / "store"
    sweep.write_text(SWEEP.replace("SOURCE", str(text_folder)))
    planned = json.loads(finish(dynconv("plan", sweep, "--json")))
    assert {row["arm"] for row in planned} == {"toy", "toy-static"}
    assert planned[0]["parameters"] == 300 * 24 + 2 * (24 * 24 + 3 * 24 * 56 + 2 * 24) + 24

    slow = slow_down_code(house)
    interrupted = dynconv("submit", sweep, "--store", store)
    wait_until(lambda: bool(list(store.glob("*/attempt-0001.json"))))
    interrupted.send_signal(signal.SIGTERM)
    interrupted.communicate(timeout=PATIENCE)
    slow.unlink()
    assert len(list(store.glob("*/run.json"))) < len(planned)
    finish(dynconv("submit", sweep, "--store", store))
    runs = [json.loads(path.read_text()) for path in store.glob("*/run.json")]
    assert len(runs) == len(planned)
    assert max(run["attempts"] for run in runs) == 2  # one was resumed
    assert all(run["facts"]["running_mean.gain"] == 2.0 for run in runs)

    (row,) = json.loads(finish(dynconv("table", store, "--json")))
    assert (row["arm"], row["n_sizes"]) == ("toy-static", 3)
    assert "running_mean" in finish(dynconv("table", store, "--by", "mixer.kind,running_mean.gain"))
    finish(dynconv("report", store, "-o", house / "report.html"))
    assert "toy-static" in (house / "report.html").read_text()
