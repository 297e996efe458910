"""The trainer: its schedule, its independence of how the work is split, resuming bit for bit, and divergence."""

import math
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch

from experiments.data.dataset import Dataset
from experiments.data.text import Text
from experiments.design.arms import ALL_LINEAR
from experiments.design.config import Execution, RunConfig
from experiments.design.schedules import Constant, Cosine, Linear, WarmupStableDecay
from experiments.design.train import Muon, TrainConfig
from experiments.models.decoder import Decoder, Output
from experiments.parts.short_convolution import Convolution, HeadwiseConvolution, LowRankConvolution, StaticConvolution
from experiments.tasks.base import Examples, Task
from experiments.training import checkpoints as checkpoint
from experiments.training.assembly import assemble
from experiments.training.optimizers import make_optimizers
from experiments.training.parallel import World
from experiments.training.trainer import NonFiniteLoss, Step, Trainer

ALONE = World(0, 1, torch.device("cpu"))
CPU = Execution(device="cpu")


def never() -> bool:
    return False


def weights(trainer: Trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


def steps(trainer: Trainer, count: int) -> list[Step]:
    return [trainer.step() for _ in range(count)]


def test_the_rate_warms_up_linearly_and_falls_to_zero_as_a_cosine(tiny_run: RunConfig) -> None:
    config = replace(tiny_run.train, tokens=16 * 8 * 200, warmup_steps=20)
    rates = [config.learning_rate_at(index) for index in range(config.steps)]
    assert rates[:20] == pytest.approx([1e-2 * (i + 1) / 20 for i in range(20)])
    assert rates[20:] == pytest.approx([0.5e-2 * (1 + math.cos(math.pi * i / 180)) for i in range(180)])
    assert 0 < rates[-1] < 1e-5


@pytest.mark.parametrize("kind", [LowRankConvolution, HeadwiseConvolution, StaticConvolution])
def test_matrices_decay_and_gains_and_convolutions_do_not(
    tiny_run: RunConfig, dataset: Dataset, kind: type[Convolution]
) -> None:
    own = {LowRankConvolution: {"rank": 16}, HeadwiseConvolution: {"head_size": 8}}.get(kind, {})
    model = replace(tiny_run.model, conv=kind(("q", "down"), **own))
    trainer = assemble(replace(tiny_run, model=model), dataset, CPU, ALONE)
    model = trainer.model
    (optimizer,) = trainer._optimizers
    decayed, kept = optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    matrices = {
        f"blocks.{n}.{'mixer' if site in 'qkvo' else 'ffn'}.maps.{site}.linear.weight"
        for n in range(2)
        for site in ALL_LINEAR
    }
    assert {names[id(p)] for p in decayed["params"]} == {"embedding.weight", *matrices}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)  # the tied table once
    assert {names[id(p)].rsplit(".", 2)[-2] for p in kept["params"]} >= {"norm", "conv"}


def test_a_run_learns_real_text(tiny_run: RunConfig, dataset: Dataset) -> None:
    trainer = assemble(tiny_run, dataset, CPU, ALONE)
    log = steps(trainer, tiny_run.train.steps)
    assert trainer.finished
    assert log[0].loss == pytest.approx(math.log(300), abs=0.1)
    evaluation = trainer.evaluate(never)
    assert evaluation is not None
    assert evaluation.metrics["loss"] < math.log(300) - 0.5
    assert [step.tokens for step in log[-2:]] == [16 * 8 * 24, 16 * (8 * 24 + 5)]  # the last batch is short
    targets = trainer.task._held_out
    assert evaluation.metrics["bits_per_byte"] == pytest.approx(
        evaluation.metrics["loss"] * targets.examples.positions / targets.bytes_predicted / math.log(2)
    )


def test_micro_batches_change_rounding_only(tiny_run: RunConfig, dataset: Dataset) -> None:
    """8 = 3 + 3 + 2 and the short batch 5 = 3 + 2: padding must not enter the loss, the norm or the weights."""
    whole = assemble(tiny_run, dataset, CPU, ALONE)
    split = assemble(tiny_run, dataset, replace(CPU, micro_batch=3), ALONE)
    for one, other in zip(steps(whole, 25), steps(split, 25), strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-4)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=2e-3)
    one, other = whole.evaluate(never), split.evaluate(never)
    assert one is not None
    assert other is not None
    assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], rel=1e-5)


def test_a_resumed_run_continues_bit_for_bit(tiny_run: RunConfig, dataset: Dataset, tmp_path: Path) -> None:
    straight = assemble(tiny_run, dataset, CPU, ALONE)
    expected = [step.loss for step in steps(straight, 25)]
    first = assemble(tiny_run, dataset, CPU, ALONE)
    losses = [step.loss for step in steps(first, 11)]
    checkpoint.save(tmp_path, first.state(), ALONE)
    resumed = assemble(tiny_run, dataset, CPU, ALONE)
    assert checkpoint.load_newest(tmp_path, tiny_run.run_id, resumed, ALONE) == []
    losses += [step.loss for step in steps(resumed, 14)]
    assert losses == expected
    assert torch.equal(weights(resumed), weights(straight))


def test_divergence_stops_before_anything_is_updated(tiny_run: RunConfig, dataset: Dataset) -> None:
    trainer = assemble(tiny_run, dataset, CPU, ALONE)
    steps(trainer, 2)
    named = dict(trainer.model.named_parameters())
    named["blocks.1.ffn.maps.up.linear.weight"].register_hook(lambda gradient: gradient * math.nan)
    before = weights(trainer)
    cause = r"loss \d\.\d+, gradient norm nan, first in blocks\.1\.ffn\.maps\.up\.linear\.weight \(1 of 38 parameters\)"
    with pytest.raises(NonFiniteLoss, match=cause):
        trainer.step()
    assert torch.equal(weights(trainer), before)
    assert trainer.steps_done == 2


def test_a_held_out_loss_that_is_not_finite_is_divergence(tiny_run: RunConfig, dataset: Dataset) -> None:
    trainer = assemble(tiny_run, dataset, CPU, ALONE)
    trainer.step()
    with torch.no_grad():
        trainer.model.norm.weight[0] = math.inf
    with pytest.raises(NonFiniteLoss, match="held-out loss nan"):
        trainer.evaluate(never)


def test_tokens_that_the_model_has_not_are_refused(tiny_run: RunConfig, dataset: Dataset) -> None:
    run = replace(tiny_run, model=replace(tiny_run.model, vocabulary=299))
    with pytest.raises(ValueError, match="the data have 300 tokens, and the model's vocabulary is 299; make them eq"):
        assemble(run, dataset, CPU, ALONE)


def test_a_micro_batch_is_no_larger_than_the_share(
    tiny_run: RunConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = assemble(tiny_run, dataset, replace(CPU, micro_batch=64), ALONE)
    shapes = []
    forward = trainer.model.forward
    monkeypatch.setattr(trainer.model, "forward", lambda tokens: shapes.append(tokens.shape) or forward(tokens))
    trainer.step()
    assert shapes == [(8, 16)]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_share_every_batch_without_gap_or_overlap(size: int) -> None:
    for count in range(1, 12):
        shares = [World(rank, size, torch.device("cpu")).share(count) for rank in range(size)]
        covered = np.concatenate([np.arange(first, first + many) for first, many in shares])
        assert covered.tolist() == list(range(count))
        assert max(many for _, many in shares) - min(many for _, many in shares) <= 1


class Recall:
    """A task that asks at one position of each sequence only: repeat its first token at its end."""

    name = "recall"
    sha256 = "0" * 64

    def __init__(self) -> None:
        self.held_out = self.batch(10**6, 0, 32)

    def batch(self, step: int, first: int, count: int) -> Examples:
        inputs = np.random.default_rng([step, first]).integers(300, size=(count, 16))
        mask = np.zeros(inputs.shape, bool)
        mask[:, -1] = True
        return Examples(inputs, np.broadcast_to(inputs[:, :1], inputs.shape), mask)

    def metrics(self, loss: float) -> dict[str, float]:
        return {"loss": loss, "perplexity": math.exp(loss)}


def trainer_of(model: torch.nn.Module, task: Task, config: TrainConfig, execution: Execution = CPU) -> Trainer:
    return Trainer(model, task, make_optimizers(model, config), config, execution, ALONE, {"run_id": "x"})


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_a_masked_task_is_divided_by_its_own_positions(tiny_run: RunConfig, micro_batch: int) -> None:
    task, config = Recall(), replace(tiny_run.train, batch_sequences=8)
    trainer = trainer_of(Decoder(tiny_run.model, 0), task, config, replace(CPU, micro_batch=micro_batch))
    with torch.no_grad():
        examples = [task.batch(0, low, min(3, 8 - low)) for low in (0, 3, 6)] if micro_batch else [task.batch(0, 0, 8)]
        inputs, targets = (torch.from_numpy(np.concatenate([e[i] for e in examples])) for i in (0, 1))
        want = torch.nn.functional.cross_entropy(trainer.model(inputs).logits[:, -1], targets[:, -1])
    assert trainer.step().loss == pytest.approx(want.item(), rel=1e-5)
    evaluation = trainer.evaluate(never)
    assert evaluation is not None
    assert evaluation.task == "recall"
    assert evaluation.metrics == {"loss": pytest.approx(math.log(300), abs=0.3), "perplexity": ANY}
    assert evaluation.metrics["perplexity"] == math.exp(evaluation.metrics["loss"])


def test_auxiliary_losses_train_and_are_metrics(tiny_run: RunConfig, dataset: Dataset) -> None:
    """One that pulls a weight to a value must get it there, whatever the micro-batches, and leave the loss apart."""

    class Pulled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.decoder = Decoder(tiny_run.model, 0)
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, tokens: torch.Tensor) -> Output:
            logits, losses, measures = self.decoder(tokens)
            return Output(logits, losses | {"pull": (self.weight - 0.05).square().expand(len(tokens))}, measures)

    config = replace(tiny_run.train, clip_norm=1e9, weight_decay=0.0)
    gradients = []
    for micro_batch in (0, 4):
        task = Text(dataset, config, 3)
        trainer = trainer_of(Pulled(), task, config, replace(CPU, micro_batch=micro_batch))
        trainer._backward(0)
        gradients.append(trainer.model.weight.grad.item())
    assert gradients == pytest.approx([-0.1, -0.1])
    plain = assemble(tiny_run, dataset, CPU, ALONE)
    assert trainer.step().loss == pytest.approx(plain.step().loss, abs=0.5)
    steps(trainer, 20)
    evaluation = trainer.evaluate(never)
    assert evaluation is not None
    assert evaluation.metrics["pull"] == pytest.approx((trainer.model.weight.item() - 0.05) ** 2)
    assert evaluation.metrics["pull"] < 0.05**2 / 4
    assert evaluation.metrics["loss"] < math.log(300)


def test_muon_updates_matrices_orthogonally_and_adamw_the_rest(tiny_run: RunConfig, dataset: Dataset) -> None:
    config = replace(tiny_run.train, optimizer=Muon(), weight_decay=0.0)
    trainer = assemble(replace(tiny_run, train=config), dataset, CPU, ALONE)
    matrices, rest = trainer._optimizers
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    of = [{names[id(p)] for group in each.param_groups for p in group["params"]} for each in (matrices, rest)]
    assert of[0] == {
        f"blocks.{n}.{part}.maps.{site}.linear.weight"
        for n in range(2)
        for part, sites in (("mixer", "q k v o"), ("ffn", "gate up down"))
        for site in sites.split()
    }
    assert of[0] | of[1] == set(names.values())
    assert not of[0] & of[1]
    weight = trainer.model.blocks[0].mixer.maps["q"].linear.weight
    before = weight.detach().clone()
    steps(trainer, 1)
    sizes = torch.linalg.svdvals((weight.detach() - before).double())
    assert sizes.max() / sizes.min() < 2.5  # Newton-Schulz leaves singular values between .7 and 1.2 or so
    log = steps(trainer, 24)
    assert log[-1].loss < math.log(300) - 0.3


def test_schedules() -> None:
    for schedule in (Cosine(), Linear(), WarmupStableDecay(0.2), Constant()):
        factors = [schedule.factor(step, 10, 110) for step in range(10, 110)]
        assert factors[0] == 1.0
        assert all(0 < factor <= 1 for factor in factors)
        assert sorted(factors, reverse=True) == factors
    assert [WarmupStableDecay(0.2).factor(step, 10, 110) < 1 for step in range(110)] == [False] * 88 + [True] * 22
    assert Linear().factor(60, 10, 110) == Cosine().factor(60, 10, 110) == pytest.approx(0.5)
