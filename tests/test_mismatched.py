"""The control whose filters are generated from another sequence: which one, causality, micro-batches and processes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from company import meet, part
from test_decoder import randomised

from experiments.bench.trials import Request, trials
from experiments.cli.main import main
from experiments.data.dataset import Dataset
from experiments.design.arms import ALL_LINEAR, ARMS, QKV
from experiments.design.config import Execution, RunConfig
from experiments.design.model import ModelConfig
from experiments.launching.profile import Job, Profile
from experiments.launching.submit import submit
from experiments.models import short_convolution
from experiments.models.decoder import Decoder
from experiments.models.short_convolution import Maps, partners
from experiments.parts.attention import Attention
from experiments.parts.short_convolution import Convolution, HeadwiseConvolution, LowRankConvolution
from experiments.parts.swiglu import SwiGLU
from experiments.tasks.base import Examples
from experiments.training.assembly import assemble
from experiments.training.parallel import World
from experiments.training.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
CPU = Execution(device="cpu")
LOWRANK = LowRankConvolution(ALL_LINEAR, rank=3, mismatched=True)
HEADWISE = HeadwiseConvolution(QKV, head_size=8, mismatched=True)
BOTH = pytest.mark.parametrize("conv", [LOWRANK, HEADWISE], ids=["lowrank", "headwise"])
TOKENS = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(2))


def made(conv: Convolution) -> Decoder:
    """In float64, with filters that depend on the generator's input."""
    config = ModelConfig(2, width=16, vocabulary=50, mixer=Attention(2, 2), ffn=SwiGLU(24), conv=conv)
    return randomised(config)


def mismatched(run: RunConfig) -> RunConfig:
    conv = LowRankConvolution(QKV, rank=2, mismatched=True)
    return replace(run, model=replace(run.model, conv=conv))


@BOTH
@pytest.mark.parametrize("shared", [False, True])
def test_filters_come_from_the_other_sequence_of_the_pair(
    conv: Convolution, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one convolution after the other, each given the partner's inputs; on a GPU products are shared."""
    monkeypatch.setattr(short_convolution, "_shares_products", lambda _: shared)
    maps = made(conv).blocks[0].mixer.maps
    assert isinstance(maps, Maps)
    x = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for site, y in zip(QKV, maps.apply_to(x, QKV, x), strict=True):
        module = maps[site]
        for sequence, partner in ((0, 1), (1, 0), (2, 3), (3, 2)):
            own, other = x[sequence : sequence + 1], x[partner : partner + 1]
            torch.testing.assert_close(y[sequence : sequence + 1], module.conv(module.linear(own), other))
            assert not torch.allclose(y[sequence : sequence + 1], module.conv(module.linear(own), own))


@BOTH
def test_a_sequence_paired_with_itself_gets_its_own_filters(conv: Convolution) -> None:
    control = made(conv)
    plain = Decoder(replace(control.config, conv=replace(conv, mismatched=False)), seed=0).double()  # type: ignore[call-arg]
    plain.load_state_dict(control.state_dict())
    twice = TOKENS[:2].repeat_interleave(2, 0)
    torch.testing.assert_close(control(twice).logits, plain(twice).logits)
    assert not torch.allclose(control(TOKENS).logits, plain(TOKENS).logits)
    assert control.config.parameters() == plain.config.parameters()
    assert control.config.forward_flops(12) == plain.config.forward_flops(12)


@BOTH
@pytest.mark.parametrize("changed_sequence", [0, 1])
def test_no_logit_depends_on_a_later_token_of_either_sequence(conv: Convolution, changed_sequence: int) -> None:
    model, changed = made(conv), TOKENS.clone()
    changed[changed_sequence, 7] = (TOKENS[changed_sequence, 7] + 1) % 50
    before, after = model(TOKENS).logits, model(changed).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert torch.equal(before[2:], after[2:])  # the other pair
    for sequence in range(2):
        assert not torch.equal(before[sequence, 7], after[sequence, 7])


def test_gradients_reach_the_partner() -> None:
    model, embedded = made(LOWRANK), []
    model.embedding.register_forward_hook(lambda _module, _inputs, x: embedded.append(x.retain_grad() or x) or x)
    model(TOKENS).logits[0, 5].square().sum().backward()
    gradient = embedded[0].grad.abs().amax(2)
    assert bool((gradient[:2, :6] > 0).all())
    assert not gradient[:2, 6:].any()
    assert not gradient[2:].any()


def test_a_single_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"multiples of 2 sequences, and neither decodes nor takes packed.*; got 1; "):
        made(LOWRANK)(TOKENS[:1])


def test_the_arm_differs_from_low_rank_in_its_input_alone() -> None:
    control, lowrank = ARMS["lowrank-qkv-mismatched"].conv, ARMS["lowrank-qkv"].conv
    assert replace(control, mismatched=False) == lowrank  # type: ignore[call-arg]
    model = made(LOWRANK).config
    assert model.facts()["conv.mismatched"] is True
    assert replace(model, conv=replace(LOWRANK, mismatched=False)).facts()["conv.mismatched"] is False


@pytest.mark.parametrize(("count", "pairs"), [(6, [(0, 3), (1, 4), (2, 5)]), (5, [(0, 3), (1, 4), (2, 0)])])
def test_held_out_partners_are_far_apart_and_every_target_counts_once(count: int, pairs: list[tuple[int, int]]) -> None:
    inputs = np.repeat(np.arange(count)[:, None], 3, 1)
    mask = np.ones((count, 3), bool)
    mask[1, 0] = False
    for given in (None, mask):
        paired = Examples(inputs, inputs + 10, given).in_pairs()
        assert paired.inputs[:, 0].reshape(-1, 2).tolist() == [list(pair) for pair in pairs]
        assert (paired.targets == paired.inputs + 10).all()
        assert paired.mask is not None
        assert paired.positions == count * 3 - (given is not None)
        assert not paired.mask[2 * len(pairs) - 1].any() or count % 2 == 0
        if given is not None:
            assert paired.mask[2].tolist() == [False, True, True]  # sequence 1


@pytest.mark.parametrize("size", range(1, 8))
@pytest.mark.parametrize("count", [1, 2, 7, 8, 13])
def test_shares_hold_whole_pairs(size: int, count: int) -> None:
    shares = [World(rank, size, torch.device("cpu")).share(count, 2) for rank in range(size)]
    assert [number for first, length in shares for number in range(first, first + length)] == list(range(count))
    assert all(first % 2 == 0 or length == 0 for first, length in shares)


def losses(trainer: Trainer) -> list[float]:
    trained = [trainer.step().loss for _ in range(trainer.config.steps)]
    evaluation = trainer.evaluate(lambda: False)
    assert evaluation is not None
    return [*trained, evaluation.metrics["loss"]]


@pytest.fixture
def odd_run(tiny_run: RunConfig) -> RunConfig:
    """Two batches of 10 and one of 5 sequences, and 31 held-out ones."""
    train = replace(tiny_run.train, tokens=16 * 25, batch_sequences=10, held_out_sequences=31, learning_rate=0.1)
    return mismatched(replace(tiny_run, train=train))


def test_micro_batches_change_rounding_only(odd_run: RunConfig, dataset: Dataset) -> None:
    whole = losses(assemble(odd_run, dataset, CPU, ALONE))
    for micro_batch in (2, 4, 6, 8):
        split = losses(assemble(odd_run, dataset, replace(CPU, micro_batch=micro_batch), ALONE))
        assert split == pytest.approx(whole, rel=2e-6)  # measured: 3e-7
    plain = replace(odd_run, model=replace(odd_run.model, conv=LowRankConvolution(QKV, rank=2)))
    assert max(np.abs(np.subtract(losses(assemble(plain, dataset, CPU, ALONE)), whole))) > 1e-4


def test_held_out_sequences_are_conditioned_on_the_other_half_of_the_set(odd_run: RunConfig, dataset: Dataset) -> None:
    """Each scored beside its partner, by hand; beside its neighbour in the text it would score otherwise."""
    trainer = assemble(odd_run, dataset, replace(CPU, micro_batch=4), ALONE)
    for _ in range(3):
        trainer.step()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    evaluation = trainer.evaluate(lambda: False)
    assert evaluation is not None
    inputs, targets = (torch.from_numpy(each) for each in trainer.task.held_out[:2])

    def loss(partner: Callable[[int], int]) -> float:
        with torch.no_grad():
            logits = [trainer.model(inputs[[i, partner(i)]]).logits[0] for i in range(31)]
        return float(torch.nn.functional.cross_entropy(torch.cat(logits), targets.flatten()))

    by_hand = loss(lambda i: (i + 16) % 32 % 31)  # pairs (0, 16), ..., (14, 30), and 15 beside 0 again
    assert evaluation.metrics["loss"] == pytest.approx(by_hand, rel=1e-6)
    assert abs(by_hand - loss(lambda i: min(i ^ 1, 30))) > 1e-4


def _train_in_company(rank: int, size: int, folder: Path, run: RunConfig, data: Path) -> None:
    meet(rank, size, folder)
    trainer = assemble(run, Dataset.open(data), replace(CPU, micro_batch=2), World(rank, size, torch.device("cpu")))
    torch.save(losses(trainer), folder / f"losses-{rank}.pt")
    del trainer
    part()


def test_two_processes_train_as_one(odd_run: RunConfig, dataset: Dataset, tmp_path: Path) -> None:
    """Ten sequences are five pairs: shares of 4 and 6. The last batch, 4 and 1, ends beside padding."""
    mp.spawn(_train_in_company, (2, tmp_path, odd_run, dataset.path), nprocs=2)
    alone = losses(assemble(odd_run, dataset, CPU, ALONE))
    for rank in range(2):
        assert torch.load(tmp_path / f"losses-{rank}.pt") == pytest.approx(alone, rel=2e-6)


def test_what_would_part_a_pair_is_refused(odd_run: RunConfig, dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^micro_batch must be a multiple of 2 .*; got 3; change it in the profile$"):
        assemble(odd_run, dataset, replace(CPU, micro_batch=3), ALONE)
    profile = Profile("debug", default=Job(device="cpu", micro_batch=5))
    with pytest.raises(ValueError, match=r"^micro_batch must be a multiple of 2 .*; got 5; change it in the profile$"):
        submit([odd_run], profile, tmp_path, cache=tmp_path)
    with pytest.raises(ValueError, match=r"tiny: .* so batch_sequences must be a multiple of 2; got 9; change it$"):
        replace(odd_run, train=replace(odd_run.train, batch_sequences=9))
    with pytest.raises(ValueError, match=r"the held-out set needs 2 sequences; got 1; raise validation_tokens"):
        replace(odd_run, train=replace(odd_run.train, held_out_sequences=1))


def test_timings_take_whole_pairs_and_name_the_flag_of_a_batch_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    arms = ("transformer", "lowrank-qkv-mismatched")
    for tokens, batch in ((128, 2), (3 * 128, 2), (4 * 128, 4)):
        found = trials(Request(("1M",), arms, sequence=128), "1M", tokens)
        assert {trial.batch for trial in found} == {batch}  # all arms take one
    assert {trial.batch for trial in trials(Request(("1M",), ("transformer",), sequence=128), "1M", 128)} == {1}
    assert main(["bench", "train", "1M", "--arms", *arms, "--batch", "3", "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert "--batch must be a multiple of 2, as the sequences of lowrank-qkv-mismatched read one another" in error
    assert "got 3; change it, or leave the arm out of --arms\n" in error
    assert error.count("\n") == 1


def test_a_sequences_partner_is_the_one_beside_it() -> None:
    assert partners(torch.arange(6)[:, None]).flatten().tolist() == [1, 0, 3, 2, 5, 4]


@pytest.mark.parametrize("micro_batch", [0, 4])
def test_engine_steps_follow_checked_ones(
    micro_batch: int, odd_run: RunConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The windows that are launched ahead on a GPU, with products shared as there."""
    execution = replace(CPU, micro_batch=micro_batch)
    expected = losses(assemble(odd_run, dataset, execution, ALONE))
    monkeypatch.setattr(short_convolution, "_shares_products", lambda _: True)
    monkeypatch.setattr("experiments.training.trainer.runs_ahead", lambda *_: True)
    assert losses(assemble(odd_run, dataset, execution, ALONE)) == pytest.approx(expected, rel=1e-5)
