"""Steps that are launched without a look at their losses: they follow the trainer's checked steps, stop where something
is due, and leave the state alone once a loss is not finite. On a CPU the engine runs the same code, uncaptured."""

import contextlib
import gc
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast
from unittest import mock

import pytest
import torch
import torch.multiprocessing as mp
from company import meet, part
from stepping import ALONE, CPU, to_the_end, weights

from analysis.errors import WorkFailed
from experiments.data.dataset import Dataset
from experiments.design.arms import ALL_LINEAR
from experiments.design.config import Execution, RunConfig
from experiments.design.train import AdamW, Muon, Optimizer
from experiments.parts.moe import MoE
from experiments.parts.short_convolution import (
    Convolution,
    LowRankConvolution,
    NoConvolution,
)
from experiments.training import checkpoints
from experiments.training.assembly import assemble
from experiments.training.loss import linear_cross_entropy
from experiments.training.parallel import World
from experiments.training.trainer import NonFiniteLoss, Trainer


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> Callable[..., Trainer]:
    """A trainer on a CPU that launches windows of steps, as on a GPU."""

    def make(run: RunConfig, window: int = 1, execution: Execution = CPU) -> Trainer:
        with monkeypatch.context() as patch:
            patch.setattr("experiments.training.trainer.runs_ahead", lambda *_: True)
            trainer = assemble(run, dataset, execution, ALONE)
        trainer._window = window
        return trainer

    return make


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_windows_follow_checked_steps(
    micro_batch: int, tiny_run: RunConfig, dataset: Dataset, ahead: Callable[..., Trainer]
) -> None:
    """8 = 3 + 3 + 2, and the last batch of 5 = 3 + 2 has an empty third micro-batch."""
    execution = replace(CPU, micro_batch=micro_batch)
    checked = assemble(tiny_run, dataset, execution, ALONE)
    expected = [checked.step() for _ in range(25)]
    trainer = ahead(tiny_run, 4, execution)
    got = [step for window in to_the_end(trainer) for step in window]
    for one, other in zip(expected, got, strict=True):
        assert (one.step, one.tokens, one.learning_rate) == (other.step, other.tokens, other.learning_rate)
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-3)
    torch.testing.assert_close(weights(trainer), weights(checked), rtol=0, atol=1e-4)


class Recorded:
    """In place of a CUDA graph: runs the step, and multiplies its results by row, and its gradients by name."""

    def __init__(self, trainer: Trainer, factors: dict[int | str, float]) -> None:
        assert trainer._engine is not None
        self.parameters, self.engine, self.factors = dict(trainer.model.named_parameters()), trainer._engine, factors

    def replay(self) -> None:
        at = int(self.engine._next)
        self.engine._step()
        for key, factor in self.factors.items():
            changed = self.engine._results[key, at] if isinstance(key, int) else self.parameters[key].grad
            assert changed is not None
            changed *= factor
        self.engine._captured_gradients = [parameter.grad for parameter in self.engine.parameters]
        self.engine._release_gradients()


SMALL = "blocks.1.ffn_norm.weight"  # its gradient is 1e-4 of the norm of all


@pytest.mark.parametrize(
    ("factors", "message"),
    [({}, None), ({1: 1.1}, None), ({SMALL: 1.2}, None)]
    + [({0: factor}, "has loss") for factor in (0.95, 1.05)]
    + [({1: factor}, "and gradient norm") for factor in (0.7, 1.3, 400.0, math.nan)]
    + [({SMALL: factor}, f"the gradient of {SMALL} differs by") for factor in (0.0, 0.5, -1.0, math.nan, math.inf)],
    ids=str,
)
def test_a_captured_step_that_computes_something_else_is_refused(
    factors: dict[int | str, float], message: str | None, tiny_run: RunConfig, ahead: Callable[..., Trainer]
) -> None:
    trainer, untouched = ahead(tiny_run), ahead(tiny_run)
    engine = trainer._engine
    assert engine is not None
    engine._graph = cast(torch.cuda.CUDAGraph, Recorded(trainer, factors))
    refused = contextlib.nullcontext() if message is None else pytest.raises(WorkFailed, match=f"{message}.*false")
    with mock.patch("torch.cuda.get_device_name", return_value="a card"), refused:
        trainer.check_captured()
    engine._graph = None
    assert torch.equal(weights(trainer), weights(untouched))
    assert trainer.step().loss == untouched.step().loss  # and nothing of the check is left


def test_after_a_step_only_large_parts_of_the_gradient_are_judged(
    tiny_run: RunConfig, ahead: Callable[..., Trainer]
) -> None:
    """Small ones are then mostly rounding."""
    trainer = ahead(tiny_run)
    engine = trainer._engine
    assert engine is not None
    trainer.step()
    engine._graph = cast(torch.cuda.CUDAGraph, Recorded(trainer, {SMALL: 0.0}))
    trainer.check_captured()
    engine._graph = cast(torch.cuda.CUDAGraph, Recorded(trainer, {"embedding.weight": 0.0}))
    with (
        mock.patch("torch.cuda.get_device_name", return_value="a card"),
        pytest.raises(WorkFailed, match="the gradient of embedding"),
    ):
        trainer.check_captured()


@pytest.mark.parametrize("factor", [1.0, 1.001, 0.98, 1.02, math.nan])
def test_a_captured_evaluation_that_computes_something_else_is_refused(
    factor: float, tiny_run: RunConfig, ahead: Callable[..., Trainer]
) -> None:
    trainer, untouched = ahead(tiny_run), ahead(tiny_run)
    loss = trainer._evaluator._loss
    assert loss is not None

    def replay() -> None:
        assert loss is not None
        loss._pass()
        loss._total *= factor

    refused = (
        contextlib.nullcontext()
        if abs(factor - 1) < 2e-3
        else pytest.raises(WorkFailed, match="the compiled evaluation")
    )
    with mock.patch("torch.cuda.get_device_name", return_value="a card"), refused:
        loss._graph = cast(torch.cuda.CUDAGraph, mock.Mock(replay=replay))
        trainer.check_captured()
    loss._graph = None
    evaluations = [each.evaluate(lambda: False) for each in (trainer, untouched)]
    assert evaluations[0] is not None
    assert evaluations[1] is not None
    assert evaluations[0].metrics == evaluations[1].metrics  # nothing of the check is left


@pytest.mark.parametrize(
    ("capability", "experts", "captured"),
    [((8, 0), False, True), ((8, 0), True, False), ((9, 0), True, True), ((10, 3), True, True), ((12, 0), True, False)],
)
def test_what_makes_the_host_wait_is_not_captured(
    capability: tuple[int, int], experts: bool, captured: bool, tiny_run: RunConfig, ahead: Callable[..., Trainer]
) -> None:
    """torch has the experts' products in one kernel on some GPUs only; a capture on others would end with an error."""
    ffn = MoE(experts=4, top_k=2, shared=1, hidden=16) if experts else tiny_run.model.ffn
    trainer = ahead(replace(tiny_run, model=replace(tiny_run.model, ffn=ffn)))
    trainer.compiled = True
    assert trainer._engine is not None
    with (
        mock.patch.object(trainer._engine, "warm_up") as warm_up,
        mock.patch("torch.cuda.get_device_capability", return_value=capability),
        mock.patch("torch.cuda.synchronize"),
    ):
        trainer.warm_up()
    warm_up.assert_called_once_with(captured)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("Triton Error [CUDA]: out of memory")],
    ids=lambda error: type(error).__name__,
)
def test_a_check_for_which_the_memory_is_too_small_is_left_out(
    error: Exception, tiny_run: RunConfig, ahead: Callable[..., Trainer], capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, untouched = ahead(tiny_run), ahead(tiny_run)
    engine = trainer._engine
    assert engine is not None
    engine._graph = cast(torch.cuda.CUDAGraph, Recorded(trainer, {}))
    with mock.patch.object(torch.compiler, "set_stance", side_effect=error):  # between the graph and the model
        trainer.check_captured()
    assert "was not checked" in capsys.readouterr().err
    engine._graph = None
    assert trainer.step().loss == untouched.step().loss


def test_only_a_captured_step_that_will_be_taken_is_checked(tiny_run: RunConfig, ahead: Callable[..., Trainer]) -> None:
    trainer = ahead(tiny_run)
    engine = trainer._engine
    assert engine is not None
    with mock.patch.object(engine, "compare_with_eager", side_effect=AssertionError):
        trainer.check_captured()
        trainer.steps_done = tiny_run.train.steps
        engine._graph = cast(torch.cuda.CUDAGraph, Recorded(trainer, {}))
        trainer.check_captured()


@pytest.mark.parametrize(
    "conv", [NoConvolution(), LowRankConvolution(ALL_LINEAR, rank=2)], ids=lambda conv: type(conv).__name__
)
def test_what_a_gpu_computes_follows_float32_on_a_cpu_too(
    conv: Convolution,
    tiny_run: RunConfig,
    dataset: Dataset,
    ahead: Callable[..., Trainer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """bfloat16 residual stream, shared products, padded channels and the chunked loss, by torch instead of kernels."""
    # At a rate of 1e-2 rounding grows with the steps: to 1e-3 on one machine, and to 0.03 on another.
    train = replace(tiny_run.train, learning_rate=1e-3)
    run = replace(tiny_run, model=replace(tiny_run.model, conv=conv), train=train)
    checked = assemble(run, dataset, CPU, ALONE)
    expected = [checked.step() for _ in range(25)]

    def losses_of(
        model: torch.nn.Module,
        _: torch.device,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        divisor: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.autocast("cpu", torch.bfloat16):
            loss, _, _ = model(
                inputs,
                lambda x, head: linear_cross_entropy(x.flatten(0, 1), head, targets.flatten(), 48, divisor),
            )
        return loss, {}

    monkeypatch.setattr("experiments.training.trainer.losses_of", losses_of)
    monkeypatch.setattr("experiments.models.short_convolution._shares_products", lambda _: True)
    got = [step for window in to_the_end(ahead(run, 4)) for step in window]
    differences = [abs(other.loss - one.loss) for one, other in zip(expected, got, strict=True)]
    assert expected[-1].loss < expected[0].loss - 0.05  # .08 on one machine, more on another
    assert 1e-6 < max(differences) < 2e-3  # measured with AVX2, AVX-512 and without: 1.3e-4 to 2.0e-4


def test_windows_end_where_something_is_due_and_change_no_bit(
    tiny_run: RunConfig, ahead: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(tiny_run, train=replace(tiny_run.train, branch_steps=(11,)))
    by_one = ahead(run)
    expected = [by_one.step() for _ in range(25)]
    trainer = ahead(run, 1000)
    monkeypatch.setattr("experiments.training.trainer.WINDOW_SECONDS", 1000.0)  # however slow the machine is
    windows = to_the_end(trainer)
    assert {8, 11, 16, 24, 25} <= {window[-1].step for window in windows}
    assert max(map(len, windows)) > 1
    assert [step.loss for window in windows for step in window] == [step.loss for step in expected]
    assert torch.equal(weights(trainer), weights(by_one))
    for window in windows:
        assert len({step.seconds for step in window}) == 1


@pytest.mark.parametrize("optimizer", [AdamW(), Muon()], ids=lambda optimizer: optimizer.kind)
def test_a_step_that_is_not_finite_stops_the_run_in_the_state_before_it(
    optimizer: Optimizer, tiny_run: RunConfig, ahead: Callable[..., Trainer]
) -> None:
    tiny_run = replace(tiny_run, train=replace(tiny_run.train, optimizer=optimizer))
    whole = ahead(tiny_run)
    expected = [whole.step() for _ in range(3)]
    trainer = ahead(tiny_run, 8)
    calls = []
    parameter = dict(trainer.model.named_parameters())["blocks.1.ffn.maps.up.linear.weight"]
    parameter.register_hook(lambda gradient: calls.append(0) or gradient * (math.nan if len(calls) > 3 else 1))
    assert [step.loss for step in trainer.advance()] == [step.loss for step in expected]
    assert len(calls) == 8 + 1  # the window ran to its end; then the step's gradients were made again
    cause = r"loss \d\.\d+, gradient norm nan, first in blocks\.1\.ffn\.maps\.up\.linear\.weight \(1 of 38 parameters\)"
    for _ in range(2):
        with pytest.raises(NonFiniteLoss, match=cause):
            trainer.advance()
    assert trainer.steps_done == 3
    assert torch.equal(weights(trainer), weights(whole))
    states = [dict(enumerate(each.state.values())) for each in (*trainer._optimizers, *whole._optimizers)]
    many = len(trainer._optimizers)
    for one, other in zip(states[:many], states[many:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    first = ahead(tiny_run, 8)
    first.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLoss, match=r"gradient norm (inf|nan), first in norm\.weight"):
        first.advance()
    assert first.steps_done == 0


def test_a_checkpoint_goes_on_in_either_kind_of_step(
    tiny_run: RunConfig, dataset: Dataset, ahead: Callable[..., Trainer], tmp_path: Path
) -> None:
    straight = [step.loss for window in to_the_end(ahead(tiny_run, 4)) for step in window]
    first = ahead(tiny_run, 8)
    losses = [step.loss for step in first.advance()]
    assert len(losses) == 8
    checkpoints.save(tmp_path, first.state(), ALONE)
    for trainer, tolerance in ((ahead(tiny_run, 3), 0.0), (assemble(tiny_run, dataset, CPU, ALONE), 1e-5)):
        assert checkpoints.load_newest(tmp_path, tiny_run.run_id, trainer, ALONE) == []
        rest = [trainer.step().loss for _ in range(17)]
        assert losses + rest == pytest.approx(straight, rel=tolerance, abs=0)


def test_warming_up_changes_nothing(tiny_run: RunConfig, ahead: Callable[..., Trainer]) -> None:
    plain, warm = ahead(tiny_run), ahead(tiny_run)
    assert warm._engine is not None
    warm._engine.warm_up(capture=False)
    assert [warm.step().loss for _ in range(3)] == [plain.step().loss for _ in range(3)]
    assert torch.equal(weights(warm), weights(plain))


def test_a_trainer_frees_its_memory_when_it_is_dropped(tiny_run: RunConfig, ahead: Callable[..., Trainer]) -> None:
    """Without waiting for the garbage collector: the next run of a process needs the device."""
    trainer = ahead(tiny_run)
    trainer.step()
    engine = weakref.ref(trainer._engine)
    gc.disable()
    try:
        del trainer
        assert engine() is None
    finally:
        gc.enable()


def _train_in_company(rank: int, size: int, folder: Path, run: RunConfig, data: Path) -> None:
    meet(rank, size, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.training.trainer.runs_ahead", lambda *_: True)
        world = World(rank, size, torch.device("cpu"))
        trainer = assemble(run, Dataset.open(data), replace(CPU, micro_batch=2), world)
    windows = to_the_end(trainer)
    torch.save([[step.loss for step in window] for window in windows], folder / f"losses-{rank}.pt")
    del trainer
    part()


def test_three_processes_run_ahead_as_one(tiny_run: RunConfig, dataset: Dataset, tmp_path: Path) -> None:
    """Windows of the same lengths, whatever clock each has; the short last batch leaves one without a sequence."""
    run = replace(tiny_run, train=replace(tiny_run.train, tokens=16 * (8 * 6 + 2)))
    alone = assemble(run, dataset, CPU, ALONE)
    expected = [alone.step().loss for _ in range(run.train.steps)]
    mp.spawn(_train_in_company, (3, tmp_path, run, dataset.path), nprocs=3)
    got = [torch.load(tmp_path / f"losses-{rank}.pt") for rank in range(3)]
    assert got[0] == got[1] == got[2]
    assert [loss for window in got[0] for loss in window] == pytest.approx(expected, rel=1e-5)
