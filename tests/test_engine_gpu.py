"""The engine on a GPU: captured steps and evaluations follow float32, and leave the state as checked steps do."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from stepping import ALONE, CPU, gpu_trainer, on_a_gpu, to_the_end, weights

from experiments.data.dataset import Dataset
from experiments.design.arms import ALL_LINEAR
from experiments.design.config import Execution, RunConfig
from experiments.design.train import Muon
from experiments.parts.short_convolution import (
    Convolution,
    HeadwiseConvolution,
    LowRankConvolution,
    NoConvolution,
    StaticConvolution,
)
from experiments.training import checkpoints
from experiments.training.assembly import assemble
from experiments.training.parallel import World
from experiments.training.trainer import NonFiniteLoss


@on_a_gpu
@pytest.mark.parametrize(
    ("conv", "execution"),
    [
        (NoConvolution(), {}),
        (StaticConvolution(ALL_LINEAR), {}),
        (HeadwiseConvolution(ALL_LINEAR, head_size=8), {}),
        (LowRankConvolution(ALL_LINEAR, rank=2), {}),
        (LowRankConvolution(ALL_LINEAR, rank=2), {"micro_batch": 3}),
        (LowRankConvolution(ALL_LINEAR, rank=2), {"compile": False}),
        (LowRankConvolution(ALL_LINEAR, rank=2, mismatched=True), {}),
    ],
    ids=["none", "static", "headwise", "lowrank", "lowrank in micro-batches", "lowrank uncompiled", "mismatched"],
)
def test_bfloat16_on_a_gpu_follows_float32(
    conv: Convolution, execution: dict[str, object], tiny_run: RunConfig, dataset: Dataset
) -> None:
    run = replace(tiny_run, model=replace(tiny_run.model, conv=conv))
    torch.compiler.reset()
    checked = assemble(run, dataset, CPU, ALONE)
    trainer = gpu_trainer(run, dataset, **execution)
    assert trainer._engine is not None
    assert trainer._engine.captured == execution.get("compile", True)
    got = [step for window in to_the_end(trainer) for step in window]
    for step in got:
        assert step.loss == pytest.approx(checked.step().loss, abs=4e-2)  # an H200 showed up to .022
    one, other = checked.evaluate(lambda: False), trainer.evaluate(lambda: False)
    assert one is not None
    assert other is not None
    assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], abs=4e-2)


@on_a_gpu
def test_muon_is_captured_and_follows_float32(tiny_run: RunConfig, dataset: Dataset) -> None:
    run = replace(tiny_run, train=replace(tiny_run.train, optimizer=Muon()))
    torch.compiler.reset()
    checked, trainer = assemble(run, dataset, CPU, ALONE), gpu_trainer(run, dataset)
    assert trainer._engine is not None
    assert trainer._engine.captured
    for step in [step for window in to_the_end(trainer) for step in window][:10]:
        assert step.loss == pytest.approx(checked.step().loss, rel=2e-2)


@on_a_gpu
@pytest.mark.parametrize("compiled", [True, False], ids=["captured", "uncompiled"])
@pytest.mark.parametrize("policy", ["block", "attention-kept"])
def test_recomputed_activations_make_the_same_steps(
    policy: str, compiled: bool, tiny_run: RunConfig, dataset: Dataset
) -> None:
    torch.compiler.reset()
    plain, other = (
        gpu_trainer(tiny_run, dataset, compile=compiled, recompute=recompute) for recompute in ("none", policy)
    )
    assert other._engine is not None
    assert other._engine.captured == compiled
    for _ in range(5):
        assert other.step().loss == pytest.approx(plain.step().loss, rel=1e-3)


@on_a_gpu
def test_evaluations_are_repeated_exactly_and_see_new_weights(tiny_run: RunConfig, dataset: Dataset) -> None:
    torch.compiler.reset()
    trainer = gpu_trainer(tiny_run, dataset, micro_batch=3)  # The last micro-batch of 50 sequences has two.
    uncaptured = gpu_trainer(tiny_run, dataset, compile=False)
    first, again, plain = (each.evaluate(lambda: False) for each in (trainer, trainer, uncaptured))
    assert first is not None
    assert again is not None
    assert plain is not None
    assert first.metrics == again.metrics
    assert first.metrics["loss"] == pytest.approx(plain.metrics["loss"], abs=1e-3)
    trainer.step()
    later = trainer.evaluate(lambda: False)
    assert later is not None
    assert later.metrics["loss"] < first.metrics["loss"]
    assert trainer.evaluate(lambda: True) is None


@on_a_gpu
def test_a_captured_step_that_is_not_finite_leaves_the_state(tiny_run: RunConfig, dataset: Dataset) -> None:
    torch.compiler.reset()
    trainer = gpu_trainer(tiny_run, dataset)
    trainer.step()
    with torch.no_grad():
        trainer.model.norm.weight[0] = math.nan
    before, trainer._window = weights(trainer), 4
    with pytest.raises(NonFiniteLoss, match="loss nan, gradient norm nan, first in"):
        trainer.advance(4)
    assert trainer.steps_done == 1
    torch.testing.assert_close(weights(trainer), before, rtol=0, atol=0, equal_nan=True)
    (optimizer,) = trainer._optimizers
    assert {int(state["step"]) for state in optimizer.state.values()} == {1}


@on_a_gpu
def test_a_gpu_checkpoint_goes_on_on_a_gpu_and_on_a_cpu(tiny_run: RunConfig, dataset: Dataset, tmp_path: Path) -> None:
    torch.compiler.reset()
    trainer = gpu_trainer(tiny_run, dataset)
    for _ in range(5):
        trainer.step()
    checkpoints.save(tmp_path, trainer.state(), ALONE)
    expected = [trainer.step().loss for _ in range(5)]
    cpu = assemble(tiny_run, dataset, CPU, ALONE)
    again = assemble(tiny_run, dataset, Execution(device="cuda"), World(0, 1, torch.device("cuda")))
    for resumed in (cpu, again):
        assert checkpoints.load_newest(tmp_path, tiny_run.run_id, resumed, ALONE) == []
    again.warm_up()
    again.check_captured()
    for want in expected:
        assert again.step().loss == pytest.approx(want, rel=1e-3)
        assert cpu.step().loss == pytest.approx(want, rel=1e-2)
