"""What several rooms' tests share: a small real dataset and runs on it that take a second."""

import contextlib
import importlib.util
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # test processes run side by side
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else each starts as many that compile as there are cores
os.environ["HF_HUB_OFFLINE"] = "1"  # tests of evaluation and export read local files only
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell's background job ignores Ctrl-C, and so do its children: tests that send it would wait for ever.
    signal.signal(signal.SIGINT, signal.default_int_handler)

import random
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from convolutions import kernels
from launches import HERE, Submit

from experiments.data.build import build
from experiments.data.dataset import Dataset
from experiments.design.arms import ALL_LINEAR
from experiments.design.config import Execution, RunConfig
from experiments.design.data import DataConfig
from experiments.design.model import ModelConfig
from experiments.design.train import TrainConfig
from experiments.launching import submit as launch
from experiments.launching.profile import Profile
from experiments.parts.attention import Attention
from experiments.parts.short_convolution import LowRankConvolution
from experiments.parts.swiglu import SwiGLU
from experiments.training.record import write_record
from experiments.training.run import Run

importlib.import_module("dynconv.ops.functions")  # before the variable is set: CPU tensors stay with the reference
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    # Triton decides at its first import, which torch may do at any time, whether to interpret. The kernels'
    # tests need it to.
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("dynconv.ops.operator")
    del os.environ["TRITON_INTERPRET"]

# Its examples take what they take. They are the same each time; `pytest --hypothesis-profile=search` looks for others.
hypothesis.settings.register_profile("shared machine", deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile("shared machine")
torch.manual_seed(0)  # for tensors that modules of tests make when they are imported

LOWRANK = LowRankConvolution(("q", "k", "v"), rank=2)


@pytest.fixture(scope="session", autouse=True)
def presence(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Runs of other tests, and of this machine's user, do not count among those that share the machine."""
    os.environ["DYNCONV_PRESENCE"] = str(tmp_path_factory.mktemp("presence"))


@pytest.fixture(autouse=True)
def seeds() -> None:
    """What a test draws without a generator of its own depends neither on the tests before it nor on chance."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pieces of the standard library as .txt files: many, so that both splits get their share on any Python."""
    folder = tmp_path_factory.mktemp("text")
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]:
        text = path.read_text(encoding="utf-8")
        for start in range(0, min(len(text), 30_000), 2_000):
            (folder / f"{path.stem}-{start}.txt").write_text(text[start : start + 2_000], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tiny_data(text_folder: Path) -> DataConfig:
    return DataConfig(source=str(text_folder), vocabulary=300, train_tokens=40_000, validation_tokens=2_000)


@pytest.fixture(scope="session")
def dataset(tiny_data: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.open(build(tiny_data, tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def tiny_run(tiny_data: DataConfig) -> RunConfig:
    """25 steps, the last batch short, evaluated every 8 steps."""
    return RunConfig(
        sweep="test",
        arm="lowrank-qkv",
        baseline="transformer",
        ladder="nano",
        size="tiny",
        budget="some tokens",
        seed=3,
        model=ModelConfig(2, width=16, vocabulary=300, mixer=Attention(2, 2), ffn=SwiGLU(24), conv=LOWRANK),
        train=TrainConfig(
            tokens=16 * (8 * 24 + 5),
            sequence_length=16,
            batch_sequences=8,
            learning_rate=1e-2,
            evaluate_every=16 * 8 * 8,
            held_out_sequences=50,
            warmup_steps=2,
        ),
        data=tiny_data,
    )


@pytest.fixture
def submitted(dataset: Dataset) -> Callable[..., Path]:
    """Freeze a run in a store as the launcher does; its directory."""

    def write(run: RunConfig, store: Path, **execution: object) -> Path:
        settings = Execution(**({"device": "cpu"} | execution))  # type: ignore[arg-type]  # checked by the class
        return write_record(run, store, dataset, settings, code_commit=None, submitted_at=time.time())

    return write


@pytest.fixture
def submit(dataset: Dataset) -> Submit:
    """Submit runs to this machine, where no profile is given."""

    def submit(runs: list[RunConfig], store: Path, profile: Profile = HERE, **options: bool) -> launch.Outcome:
        return launch.submit(runs, profile, store, cache=dataset.path.parent, **options)

    return submit


@pytest.fixture
def runs(tiny_run: RunConfig) -> list[RunConfig]:
    """Three seeds."""
    return [replace(tiny_run, seed=seed) for seed in range(3)]


@pytest.fixture
def long_run(tiny_run: RunConfig) -> RunConfig:
    """Some five seconds."""
    return replace(tiny_run, train=replace(tiny_run.train, tokens=16 * 8 * 1500, evaluate_every=16 * 8 * 100))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset, tiny_data: DataConfig) -> Callable[..., Path]:
    """The folder of a finished run of a model with these settings, which trains for four steps."""
    folder = tmp_path_factory.mktemp("store")

    def train(**model: Any) -> Path:
        settings = {"mixer": Attention(4, 2), "ffn": SwiGLU(24), "conv": LowRankConvolution(ALL_LINEAR, rank=3)} | model
        run = RunConfig(
            sweep="test", arm="an-arm", baseline="transformer", ladder="nano", size="tiny", budget="some", seed=1,
            model=ModelConfig(2, width=16, vocabulary=300, **settings),
            train=TrainConfig(
                tokens=16 * 8 * 4, sequence_length=16, batch_sequences=8, learning_rate=1e-2,
                evaluate_every=16 * 8 * 4, held_out_sequences=50, warmup_steps=1,
            ),
            data=tiny_data,
        )  # fmt: skip
        if not (folder / run.run_id).exists():
            write_record(run, folder, dataset, Execution(device="cpu"), code_commit=None, submitted_at=time.time())
            Run(folder / run.run_id)()
        return folder / run.run_id

    return train


@pytest.fixture(scope="module", params=["kernels"] if torch.cuda.is_available() else ["reference", "kernels"])
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the functions of `dynconv.ops` run on."""
    with kernels() if request.param == "kernels" else contextlib.nullcontext():
        yield


@pytest.fixture(scope="module")
def by_kernels() -> Iterator[None]:
    with kernels():
        yield
