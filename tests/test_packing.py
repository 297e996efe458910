"""Packed documents: where they begin, and that a batch of them is learned from as if each stood alone."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from stepping import gpu_trainer, on_a_gpu, to_the_end
from test_decoder import CONVS, randomised
from test_systems import SYSTEMS
from torch import Tensor

from analysis.logs.files import read_json
from experiments.data.build import build
from experiments.data.dataset import Dataset
from experiments.data.packing import Packing, share_within_documents
from experiments.data.text import Text
from experiments.design.config import Execution, RunConfig
from experiments.design.data import DataConfig
from experiments.design.model import ModelConfig
from experiments.design.sweep import load_sweep
from experiments.evaluation.domains import evaluate_domain
from experiments.evaluation.load import load_run
from experiments.models import attention, short_convolution
from experiments.models.decoder import Decoder
from experiments.models.packing import documents_of
from experiments.parts.attention import Attention
from experiments.parts.short_convolution import LowRankConvolution
from experiments.parts.swiglu import SwiGLU
from experiments.training.assembly import assemble
from experiments.training.parallel import World
from experiments.training.record import check_store, data_sha256
from experiments.training.run import Run

CPU, ALONE = Execution(device="cpu"), World(0, 1, torch.device("cpu"))
LENGTHS = ((1, 70, 4), (75,), (2, 3, 64, 5, 1), (37, 38))  # of the documents of each sequence; 64 is a chunk
TIME, MOST = 75, 6
TOKENS = torch.randint(300, (len(LENGTHS), TIME), generator=torch.Generator().manual_seed(2))
MODELS = {
    **{
        f"attention, {name}": ModelConfig(
            2, width=16, vocabulary=300, mixer=Attention(2, 2), ffn=SwiGLU(24), conv=conv, tied=False
        )
        for name, conv in CONVS.items()
    },
    "grouped queries, QK-norm": ModelConfig(
        2,
        width=16,
        vocabulary=300,
        mixer=Attention(4, 2, qk_norm=True),
        ffn=SwiGLU(24),
        conv=LowRankConvolution(("q", "k", "v"), rank=2),
    ),
    **SYSTEMS,
}


@pytest.fixture(scope="module")
def lines(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Each line is a document: several in most sequences of 16 tokens."""
    data = DataConfig(
        source=str(text_folder), separator="\n", vocabulary=300, train_tokens=40_000, validation_tokens=2_000
    )
    return Dataset.open(build(data, tmp_path_factory.mktemp("cache")))


@pytest.fixture
def packed_run(tiny_run: RunConfig) -> RunConfig:
    return replace(tiny_run, packed=True)


def starts_of(lengths: tuple[tuple[int, ...], ...]) -> Tensor:  # [B, K]
    rows = [np.cumsum([0, *own])[:-1].tolist() for own in lengths]
    return torch.tensor([row + [TIME] * (MOST - len(row)) for row in rows])


def pieces() -> Iterator[tuple[Tensor, Tensor]]:
    """Each document's tokens, and where they lie in the batch."""
    place = torch.arange(TOKENS.numel()).view_as(TOKENS)
    for tokens, places, lengths in zip(TOKENS, place, LENGTHS, strict=True):
        yield from zip(tokens.split(lengths), places.split(lengths), strict=True)


def gradients(model: Decoder, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True))


@pytest.mark.parametrize("joined", [False, True], ids=["as on a CPU", "products as on a GPU"])
@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_packed_batch_is_the_documents_one_by_one(
    config: ModelConfig, joined: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits, the loss, and every parameter's gradient, in float64."""
    monkeypatch.setattr(short_convolution, "_shares_products", lambda _: joined)
    model = randomised(config, 0.2)
    packed = model(TOKENS, None, starts_of(LENGTHS)).logits.flatten(0, 1)
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    apart = torch.cat([model(tokens[None]).logits[0] for tokens, _ in pieces()])
    torch.testing.assert_close(packed, apart, rtol=1e-11, atol=1e-12)
    for got, want in zip(
        gradients(model, (packed * weights).sum()), gradients(model, (apart * weights).sum()), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11 * float(want.abs().max() + 1))
    mixed = model(TOKENS).logits.flatten(0, 1)
    assert not torch.allclose(mixed[71], apart[71])  # of the third document, which would see the two before it


def test_a_model_whose_sequences_read_one_another_takes_no_documents() -> None:
    conv = LowRankConvolution(("q",), rank=2, mismatched=True)
    model = Decoder(ModelConfig(1, width=16, vocabulary=300, mixer=Attention(2, 2), ffn=SwiGLU(24), conv=conv), 0)
    with pytest.raises(ValueError, match="nor takes packed documents; got 4 of packed documents"):
        model(TOKENS, None, starts_of(LENGTHS))


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("attention")])
def test_a_fused_model_keeps_documents_apart(name: str) -> None:
    """Kernels that compute convolutions with their neighbours know no documents, and are left out."""
    model = randomised(MODELS[name], 0.2)
    plain = model(TOKENS, None, starts_of(LENGTHS)).logits
    model.fuse()
    torch.testing.assert_close(model(TOKENS, None, starts_of(LENGTHS)).logits, plain, rtol=1e-11, atol=1e-12)


@on_a_gpu
@pytest.mark.parametrize(
    ("name", "tokens_a_document"),
    [
        ("attention, none", 0),
        ("attention, static", 0),
        ("attention, headwise", 0),
        ("attention, lowrank", 0),
        ("grouped queries, QK-norm", 0),
        ("grouped queries, QK-norm", TIME),  # too few for kernels that take no mask
        ("mamba2 lowrank", 0),
        ("gated deltanet lowrank", 0),
        ("moe lowrank", 0),
    ],
)
def test_packed_steps_on_a_gpu_are_captured_and_follow_float32(
    name: str, tokens_a_document: int, packed_run: RunConfig, lines: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The number of documents differs from step to step, and shapes do not."""
    monkeypatch.setattr(attention, "_TOKENS_A_DOCUMENT", tokens_a_document)
    run = replace(packed_run, model=MODELS[name])
    torch.compiler.reset()
    checked, trainer = assemble(run, lines, CPU, ALONE), gpu_trainer(run, lines)
    assert trainer.captured != trainer.model.waits_for_host(torch.device("cuda"))
    for step in [step for window in to_the_end(trainer) for step in window]:
        assert step.loss == pytest.approx(checked.step().loss, abs=4e-2)
    one, other = checked.evaluate(lambda: False), trainer.evaluate(lambda: False)
    assert one is not None
    assert other is not None
    assert other.metrics["loss"] == pytest.approx(one.metrics["loss"], abs=4e-2)


def test_documents_have_edges_that_convolutions_and_attention_take() -> None:
    found = documents_of(starts_of(LENGTHS), TIME)
    assert len(found.cu_seqlens) == len(LENGTHS) * MOST + 1  # whatever the number of documents
    assert found.cu_seqlens.dtype == torch.int32
    lengths = found.cu_seqlens.diff()
    assert lengths[lengths > 0].tolist() == [length for own in LENGTHS for length in own]
    for number, (_, places) in enumerate(pieces()):
        own = found.numbers.flatten()[places]
        assert own.unique().numel() == 1, number
        assert found.places.flatten()[places].tolist() == list(range(len(places)))


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("length", [16, 50, 333])
def test_starts_and_targets_follow_the_index_of_documents(lines: Dataset, split: str, length: int) -> None:
    """Against the index, token by token; and the end of text is in every other document's last place."""
    tokens, first = lines.tokens(split), set(lines.document_starts(split).tolist())
    packing = Packing(lines, split, length)
    count = (tokens - 1) // length
    windows = np.random.default_rng(1).permutation(count)
    starts, mask = packing.starts(windows, packing.most), packing.targets_that_count(windows)
    many = []
    for window, row, counts in zip(windows.tolist(), starts.tolist(), mask.tolist(), strict=True):
        begin = window * length
        inside = [i for i in range(length) if i == 0 or begin + i in first]
        many.append(len(inside))
        assert row == inside + [length] * (packing.most - len(inside))
        assert counts == [begin + i + 1 not in first for i in range(length)]
    assert max(many) == packing.most


def test_the_record_says_what_of_a_sequence_is_within_documents(
    dataset: Dataset, tiny_run: RunConfig, submitted: Callable[..., Path], tmp_path: Path
) -> None:
    """FLOPs are counted over whole sequences: what of attention's is real is beside them."""
    length = 16
    packing, count = Packing(dataset, "train", length), (dataset.tokens("train") - 1) // length
    starts = packing.starts(np.arange(count), packing.most)
    lengths = np.diff(starts, append=length)
    found = share_within_documents(dataset, length)
    assert found.documents_per_sequence == pytest.approx((lengths > 0).sum() / count)
    assert found.attention == pytest.approx((lengths.astype(float) ** 2).sum() / count / length**2)
    assert found.targets == pytest.approx(packing.targets_that_count(np.arange(count)).mean())
    run = replace(tiny_run, packed=True)
    record = read_json(submitted(run, tmp_path) / "config.json")
    assert record["within_documents"] == found._asdict()
    assert record["flops_exact"] == tiny_run.counts.flops_exact
    assert record["facts"]["task.packed"] is True


def apart_loss(model: Decoder, dataset: Dataset, window: int, length: int) -> tuple[float, int, int]:
    """The summed loss of a held-out window's documents one by one, its targets and their bytes."""
    tokens = dataset.windows("validation", np.array([window * length]), length + 1)[0]
    first = set(dataset.document_starts("validation").tolist())
    edges = [i for i in range(1, length + 1) if window * length + i in first]
    total, targets, size = 0.0, 0, 0
    for low, high in zip([0, *edges], [*edges, length + 1], strict=True):
        piece = torch.from_numpy(tokens[low:high].astype(np.int64))
        if len(piece) > 1:
            logits = model(piece[None, :-1]).logits[0].double()
            total += float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
            targets += len(piece) - 1
            size += int(dataset.token_bytes()[piece[1:]].sum())
    return total, targets, size


def test_an_evaluation_is_of_the_documents_apart(lines: Dataset, packed_run: RunConfig) -> None:
    """In float32; measured: 2e-8 apart."""
    run = packed_run
    trainer = assemble(run, lines, CPU, ALONE)
    trainer.step()
    evaluation = trainer.evaluate(lambda: False)
    assert evaluation is not None
    model = trainer.model
    assert isinstance(model, Decoder)
    with torch.no_grad():
        parts = [apart_loss(model, lines, window, 16) for window in range(run.train.held_out_sequences)]
    total, targets, size = (sum(each) for each in zip(*parts, strict=True))
    assert evaluation.metrics["loss"] == pytest.approx(total / targets, rel=1e-6)
    assert evaluation.metrics["bits_per_byte"] == pytest.approx(total / size / math.log(2), rel=1e-6)
    assert targets < 16 * run.train.held_out_sequences


@pytest.mark.parametrize("micro_batch", [0, 3])
def test_windows_of_packed_steps_follow_checked_ones(
    micro_batch: int, packed_run: RunConfig, lines: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With padded micro-batches, and the starts of documents in the window that a GPU uploads."""
    run, execution = packed_run, replace(CPU, micro_batch=micro_batch)
    checked = assemble(run, lines, execution, ALONE)
    expected = [checked.step() for _ in range(25)]
    again = assemble(run, lines, replace(execution, recompute="block"), ALONE)
    assert [again.step().loss for _ in range(3)] == [step.loss for step in expected[:3]]
    monkeypatch.setattr("experiments.training.trainer.runs_ahead", lambda *_: True)
    trainer = assemble(run, lines, execution, ALONE)
    trainer._window = 4
    got = [step for window in to_the_end(trainer) for step in window]
    for one, other in zip(expected, got, strict=True):
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
    assert expected[-1].loss < expected[0].loss - 0.5


def test_a_step_is_the_gradient_of_the_documents_apart(packed_run: RunConfig, lines: Dataset) -> None:
    """The trainer's first gradient norm, against the documents of the batch one by one, in float32."""
    run = packed_run
    trainer = assemble(run, lines, CPU, ALONE)
    task = Text(lines, run.train, run.seed, packed=True)
    examples = task.batch(0, 0, 8)
    assert examples.starts is not None
    assert examples.mask is not None
    wanted = torch.from_numpy(np.where(examples.mask, examples.targets, -100))
    model, total = Decoder(run.model, run.seed), torch.zeros(())
    for tokens, targets, row in zip(torch.from_numpy(examples.inputs), wanted, examples.starts, strict=True):
        for low, high in pairwise([*row[row < 16].tolist(), 16]):
            logits = model(tokens[None, low:high]).logits[0]
            total = total + torch.nn.functional.cross_entropy(logits, targets[low:high], reduction="sum")
    mean = total / examples.positions
    mean.backward()
    mean = mean.detach()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    step = trainer.step()
    assert step.loss == pytest.approx(float(mean), rel=1e-6)
    assert step.gradient_norm == pytest.approx(float(norm), rel=1e-5)


def test_packing_is_another_run_on_other_data(
    tiny_run: RunConfig, dataset: Dataset, submitted: Callable[..., Path], tmp_path: Path
) -> None:
    packed = replace(tiny_run, packed=True)
    assert packed.run_id != tiny_run.run_id
    assert replace(packed, packed=False).run_id == tiny_run.run_id
    assert data_sha256(tiny_run, dataset) == dataset.sha256 != data_sha256(packed, dataset)
    assert assemble(packed, dataset, CPU, ALONE).task.sha256 == data_sha256(packed, dataset)
    submitted(tiny_run, tmp_path)
    with pytest.raises(ValueError, match="was submitted with data"):
        check_store([replace(packed, seed=9)], tmp_path, data_sha256(packed, dataset))


def test_what_cannot_keep_documents_apart_is_refused(
    tiny_run: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    control = LowRankConvolution(("q",), rank=2, mismatched=True)
    with pytest.raises(ValueError, match=r"packed keeps documents apart, and .* \(conv.mismatched\)"):
        replace(tiny_run, packed=True, model=replace(tiny_run.model, conv=control))
    with pytest.raises(ValueError, match=r"packed is for documents of text, \[data\]; got text; remove it"):
        replace(tiny_run, packed=True, data=None)
    sweep = tmp_path / "sweep.toml"
    sweep.write_text(SWEEP)
    with pytest.raises(ValueError, match=r"sweep.toml: lowrank-qkv-mismatched 25k: packed keeps documents apart"):
        load_sweep(sweep)
    monkeypatch.setattr(SwiGLU, "takes_documents", False)
    with pytest.raises(ValueError, match=r"the part 'swiglu' does not \(takes_documents\)"):
        replace(tiny_run, packed=True)


SWEEP = """
name = "packed"
ladder = "nano"
sizes = ["25k"]
arms = ["transformer", "lowrank-qkv-mismatched"]
baseline = "transformer"
seeds = [0]
tokens_per_parameter = 4
match = "flops"
packed = true

[data]
source = "python"
vocabulary = 300
train_tokens = 400_000
validation_tokens = 4_000
"""


def test_text_that_is_one_document_is_refused(tiny_run: RunConfig, tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / split).mkdir()
        words = np.random.default_rng(len(split)).integers(10**6, size=6000)
        (tmp_path / split / "one.txt").write_text(" ".join(map(str, words)))
    places = {"source": str(tmp_path / "train"), "validation_source": str(tmp_path / "validation")}
    data = DataConfig(**places, vocabulary=300, train_tokens=5_000, validation_tokens=2_000)
    dataset = Dataset.open(build(data, tmp_path / "cache"))
    assemble(tiny_run, dataset, CPU, ALONE)
    with pytest.raises(ValueError, match="packed keeps documents apart, and these data are one document; give sep"):
        assemble(replace(tiny_run, packed=True), dataset, CPU, ALONE)


def test_a_packed_run_trains_resumes_and_is_evaluated_on_text(
    tiny_run: RunConfig, submitted: Callable[..., Path], tmp_path: Path
) -> None:
    """A text of one document in one window scores as the model alone does."""
    run_dir = submitted(replace(tiny_run, packed=True), tmp_path / "store")
    Run(run_dir)()
    trained = load_run(run_dir)
    folder = tmp_path / "text"
    folder.mkdir()
    for name, text in (("a", "def one"), ("b", "x = 2")):
        (folder / f"{name}.txt").write_text(text)
    total, count = 0.0, 0
    for text in ("def one", "x = 2"):
        ids = torch.tensor([[*trained.tokenizer.encode(text).ids, trained.end_of_text]])
        with torch.no_grad():
            logits = trained.model(ids).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits[:-1].double(), ids[0, 1:], reduction="sum"))
        count += ids.shape[1] - 1
    found = evaluate_domain(trained, folder)
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(total / count, rel=1e-6)
    for path in folder.iterdir():
        path.write_text("x")  # a token, and before its end nothing else to predict
    with pytest.raises(ValueError, match=r"must hold text after the first token of each document.*; got none; name an"):
        evaluate_domain(trained, folder)
