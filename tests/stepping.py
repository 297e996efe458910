"""What tests of a trainer's steps share, on a CPU and on a GPU."""

from collections.abc import Callable

import pytest
import torch

from experiments.data.dataset import Dataset
from experiments.design.config import Execution, RunConfig
from experiments.training.assembly import assemble
from experiments.training.parallel import World
from experiments.training.trainer import Step, Trainer

ALONE = World(0, 1, torch.device("cpu"))
CPU = Execution(device="cpu")


def on_a_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Warnings are listed, not errors: torch's compiler has advice for every GPU."""
    test = pytest.mark.filterwarnings("default")(test)
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")(test))


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten().cpu() for parameter in trainer.model.parameters()])


def to_the_end(trainer: Trainer) -> list[list[Step]]:
    """All windows."""
    windows = []
    while not trainer.finished:
        windows.append(trainer.advance())
    return windows


def gpu_trainer(run: RunConfig, dataset: Dataset, **execution: object) -> Trainer:
    settings = Execution(**({"device": "cuda"} | execution))  # type: ignore[arg-type]  # checked by the class
    trainer = assemble(run, dataset, settings, World(0, 1, torch.device("cuda")))
    trainer.warm_up()
    trainer.check_captured()
    return trainer
