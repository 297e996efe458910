"""What `bench train` does with memory: arms lend theirs between turns, and a batch that does not fit is halved."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_bench_training import ALONE, TWO, bench, chosen

from experiments.bench import stepping
from experiments.bench.weights import Lendable, RepeatedDraws
from experiments.models.decoder import Decoder
from experiments.training.assembly import make_trainer
from experiments.training.memory import gpu_memory
from experiments.training.trainer import Trainer

__all__ = ["bench"]  # a fixture


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_arm_lends_its_memory_between_its_turns(optimizer: str) -> None:
    (trial,) = chosen(arms=("lowrank-qkv",), optimizers=(optimizer,))
    runner = stepping._Runner(trial, ALONE, 0.0, alone=False)
    parameters = [parameter.detach() for parameter in runner._trainer.model.parameters()]
    fresh = Decoder(trial.run.model, trial.run.seed)
    for _ in range(2):
        assert {parameter.untyped_storage().nbytes() for parameter in parameters} == {0}
        runner._lendable.take_back()
        for mine, theirs in zip(parameters, fresh.parameters(), strict=True):
            assert float(mine.std()) == pytest.approx(float(theirs.detach().std()), rel=0.3)
            assert theirs.min() <= mine.min()
            assert mine.max() <= theirs.max()
        runner._lendable.lend()
        runner.turn()
    assert len(runner.outcome.seconds) == 2


def test_memory_that_was_lent_comes_back_with_the_same_spread() -> None:
    state = {"weights": 0.02 * torch.randn(300, 400) + 0.1, "squares": torch.rand(5000) ** 8, "gains": torch.ones(9)}
    state |= {"zeros": torch.zeros(2, 3), "step": torch.tensor(7.0), "tokens": torch.arange(4)}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    lendable = Lendable()
    lendable.add(state.values())
    lendable.lend()
    assert state["weights"].untyped_storage().nbytes() == 0
    lendable.take_back()
    for name in ("gains", "zeros", "step", "tokens"):
        assert torch.equal(state[name], kept[name])
    assert not torch.equal(state["weights"], kept["weights"])
    assert float(state["weights"].mean()) == pytest.approx(0.1, abs=1e-3)
    assert float(state["weights"].std()) == pytest.approx(0.02, rel=0.02)
    assert state["squares"].min() >= 0


def test_large_matrices_repeat_their_first_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.bench.weights._DRAWN", 64)
    run = chosen(arms=("lowrank-all",))[0].run
    plain = Decoder(run.model, 0)
    with RepeatedDraws():
        quick = Decoder(run.model, 0)
    large = [p for p in quick.parameters() if p.dim() == 2 and p.numel() > 64]
    assert large
    for (name, mine), theirs in zip(quick.named_parameters(), plain.parameters(), strict=True):
        assert mine.shape == theirs.shape
        assert float(mine.detach().std()) == pytest.approx(float(theirs.detach().std()), rel=0.5), name
    rows = 64 // run.model.width
    assert torch.equal(quick.embedding.weight[:rows], quick.embedding.weight[rows : 2 * rows])
    with RepeatedDraws(), torch.device("meta"):
        assert {parameter.device.type for parameter in Decoder(run.model, 0).parameters()} == {"meta"}


def fitting(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers of batches beyond `most` sequences run out of memory."""

    def made(run: Any, *others: Any) -> Trainer:
        if run.train.batch_sequences > most:
            raise torch.OutOfMemoryError
        return make_trainer(run, *others)

    monkeypatch.setattr(stepping, "make_trainer", made)


def test_a_batch_that_does_not_fit_is_halved_and_told(
    bench: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitting(3, monkeypatch)
    code, out, err = bench("25k", "--arms", *TWO, "--rounds", "1", "--json")
    assert code == 0
    assert {row["batch"] for row in json.loads(out)} == {2}
    assert "25k lowrank-qkv adamw: a batch of 8 sequences of 128 tokens does not fit" in err
    assert "; 2 fit and are measured" in err
    code, out, err = bench("25k", "--arms", *TWO, "--batch", "6", "--rounds", "1")
    assert (code, out) == (2, "")
    assert "a batch of 6 sequences of 128 tokens does not fit; 3 fit: --batch 3" in err
    fitting(0, monkeypatch)
    code, _, err = bench("25k", "--arms", *TWO)
    assert code == 1
    assert "nor does any smaller one; give a shorter --sequence" in err


def test_memory_that_other_programs_hold_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 79 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2**29)
    assert gpu_memory(torch.device("cuda", 0)) == "80 GiB"  # the rest is this program's context
    free = 10 * 2**30
    assert gpu_memory(torch.device("cuda", 0)) == "80 GiB, of which other programs hold about 70 GiB"
