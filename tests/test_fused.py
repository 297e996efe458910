"""Models whose convolutions run in one kernel with their neighbours: the same but for rounding."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from convolutions import GPU, relative_error
from torch import Tensor

from experiments.data.dataset import Dataset
from experiments.design.config import Execution, RunConfig
from experiments.design.model import ModelConfig
from experiments.models.attention import AttentionModule
from experiments.models.decoder import Decoder
from experiments.models.short_convolution import Maps
from experiments.parts.attention import Attention
from experiments.parts.short_convolution import (
    Convolution,
    HeadwiseConvolution,
    LowRankConvolution,
    NoConvolution,
    StaticConvolution,
)
from experiments.parts.swiglu import SwiGLU
from experiments.training.assembly import assemble
from experiments.training.parallel import World
from experiments.training.record import recorded_execution

QKV = ("q", "k", "v")
ALL = (*QKV, "o", "gate", "up", "down")
DEVICE = "cuda" if GPU else "cpu"


def model_of(conv: Convolution, attention: Attention | None = None, layers: int = 2, hidden: int = 48) -> Decoder:
    attention = attention or Attention(heads=2, kv_heads=2)
    model = Decoder(ModelConfig(layers, 128, 97, mixer=attention, ffn=SwiGLU(hidden), conv=conv), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("conv.up", "conv.generator.weight")):  # zero at first, so that there would be no effect
                # Filters of a third or so: a head-wise one is a sum over 128 inputs, and larger ones amplify rounding.
                parameter.normal_(std=0.3 if name.endswith("up") else 0.03, generator=torch.Generator().manual_seed(0))
    return model.to(DEVICE)


def outcome(model: Decoder, dtype: torch.dtype | None, sequences: int = 2) -> dict[str, Tensor]:
    """The logits, and the gradient of every parameter."""
    tokens = torch.randint(97, (sequences, 24), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        logits = model(tokens).logits  # type: ignore[union-attr]
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    return {"logits": logits.detach(), **dict(zip(names, gradients, strict=True))}


def gaps(
    conv: Convolution, dtype: torch.dtype | None = None, sequences: int = 2, layers: int = 2, hidden: int = 48
) -> dict[str, float]:
    plain = outcome(model_of(conv, layers=layers, hidden=hidden), dtype, sequences)
    fused = model_of(conv, layers=layers, hidden=hidden)
    fused.fuse()
    assert all(block.mixer.rotates_convolved for block in fused.blocks)  # type: ignore[union-attr]
    adds = "o" in conv.sites and not getattr(conv, "reads_part_input", False)
    assert all(part.adds_stream == adds for block in fused.blocks for part in (block.mixer, block.ffn))  # type: ignore[union-attr]
    found = outcome(fused, dtype, sequences)
    return {name: relative_error(found[name], plain[name].double()) for name in plain}


@pytest.mark.parametrize(
    "conv",
    [
        LowRankConvolution(QKV, rank=3),
        LowRankConvolution(ALL, rank=3, static_filter=False),
        LowRankConvolution(ALL, rank=3, generator_input="part"),  # o and down are not fused, and are added after it
        LowRankConvolution((*QKV, "gate", "o", "down"), rank=2, residual=False),  # without up, gate is by itself
        StaticConvolution(QKV, width=3),
        StaticConvolution(ALL, residual=False),
        HeadwiseConvolution(QKV, head_size=16),
        HeadwiseConvolution(ALL, head_size=8, static_filter=False),
        HeadwiseConvolution(ALL, head_size=4, width=2, generator_input="part"),
    ],
    ids=str,
)
def test_a_fused_model_is_the_same_function(conv: Convolution) -> None:
    found = gaps(conv)
    assert all(gap < 1e-5 for gap in found.values()), found


@pytest.fixture
def by_tensor_cores() -> Iterator[None]:
    pytest.importorskip("triton")
    from gluon_interpreter import fused_kernels

    with fused_kernels():
        yield


@pytest.mark.parametrize(
    "conv",
    [LowRankConvolution(ALL, rank=3), StaticConvolution(ALL), HeadwiseConvolution(ALL, head_size=8)],
    ids=lambda conv: conv.kind,
)
@pytest.mark.usefixtures("by_tensor_cores")
def test_a_model_fused_by_the_kernels_differs_by_rounding(conv: Convolution) -> None:
    found = gaps(conv, torch.bfloat16, sequences=1, layers=1)
    assert found["logits"] < 0.01
    assert all(gap < 0.05 for gap in found.values()), found  # of gradients of few tokens in 16 bits


@pytest.mark.parametrize(
    "conv",
    [
        LowRankConvolution(ALL, rank=3),
        StaticConvolution(ALL, residual=False),
        LowRankConvolution((*QKV, "gate", "up"), rank=2),
    ],
    ids=str,
)
def test_gate_and_up_of_any_width_are_padded_for_their_kernel(conv: Convolution) -> None:
    """As at 1M and 16M, whose hidden widths of 344 and 1032 are no multiples of 16."""
    assert "gate, up, SwiGLU" in model_of(conv, hidden=44).fuse()
    found = gaps(conv, hidden=44)
    assert all(gap < 1e-5 for gap in found.values()), found


@pytest.mark.parametrize("conv", [LowRankConvolution(ALL, rank=3), StaticConvolution(ALL)], ids=lambda conv: conv.kind)
@pytest.mark.usefixtures("by_tensor_cores")
def test_padded_by_the_kernels_the_model_differs_by_rounding(
    conv: Convolution, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []
    own = torch.ops.dynconv.gated.default
    monkeypatch.setattr(
        "dynconv.ops.fused_operator._gated_op", lambda *args: launched.append(args[0].shape) or own(*args)
    )
    found = gaps(conv, torch.bfloat16, sequences=1, layers=1, hidden=44)
    assert launched
    assert found["logits"] < 0.01
    assert all(gap < 0.05 for gap in found.values()), found


def test_only_what_fits_is_fused() -> None:
    lowrank = LowRankConvolution(QKV, rank=3)
    for conv, attention, fused in (
        (lowrank, Attention(heads=2, kv_heads=2), True),
        (LowRankConvolution(("q", "k"), rank=3), Attention(heads=2, kv_heads=2), False),
        (LowRankConvolution(QKV, rank=20), Attention(heads=2, kv_heads=2), False),
        (LowRankConvolution(QKV, rank=3, width=6), Attention(heads=2, kv_heads=2), False),
        (LowRankConvolution(QKV, rank=3, activation="silu"), Attention(heads=2, kv_heads=2), False),
        (LowRankConvolution(QKV, rank=3, mismatched=True), Attention(heads=2, kv_heads=2), False),
        (StaticConvolution(QKV), Attention(heads=2, kv_heads=2), True),
        (StaticConvolution(QKV, width=5), Attention(heads=2, kv_heads=2), False),
        (StaticConvolution(QKV, activation="silu"), Attention(heads=2, kv_heads=2), False),
        (StaticConvolution(QKV), Attention(heads=2, kv_heads=1), False),
        (HeadwiseConvolution(QKV, head_size=16), Attention(heads=2, kv_heads=2), True),
        (HeadwiseConvolution(QKV, head_size=32), Attention(heads=2, kv_heads=2), False),
        (HeadwiseConvolution(QKV, head_size=16, width=3), Attention(heads=2, kv_heads=2), False),
        (HeadwiseConvolution(QKV, head_size=16, mismatched=True), Attention(heads=2, kv_heads=2), False),
        (HeadwiseConvolution(QKV, head_size=4), Attention(heads=32, kv_heads=32), False),  # of 4 channels each
        (NoConvolution(), Attention(heads=2, kv_heads=2), False),
        (lowrank, Attention(heads=2, kv_heads=1), False),
        (lowrank, Attention(heads=2, kv_heads=2, qk_norm=True), False),
    ):
        model = model_of(conv, attention)
        found = model.fuse()
        mixers = [module for module in model.modules() if isinstance(module, AttentionModule)]
        assert [mixer.rotates_convolved for mixer in mixers] == [fused] * 2, conv
        assert ("q, k, v, RoPE" in found) == fused
        assert all(mixer.maps.in_one_product == isinstance(conv, NoConvolution) for mixer in mixers)
        assert outcome(model, None)["logits"].isfinite().all()


def test_a_model_says_what_is_one_kernel() -> None:
    every = LowRankConvolution(ALL, rank=3)
    kernels = ("q, k, v, RoPE", "o, residual stream", "gate, up, SwiGLU", "down, residual stream")
    assert model_of(every).fuse() == kernels
    assert model_of(every).fuse(kernels=False) == ()  # as for packed documents
    assert model_of(LowRankConvolution(QKV, rank=3)).fuse() == kernels[:1]
    assert model_of(every, Attention(heads=2, kv_heads=2, qk_norm=True)).fuse() == ("q, k, v", *kernels[1:])
    # Generators of o and down that read the part's input have columns in no product of o and down.
    assert model_of(LowRankConvolution(ALL, rank=3, generator_input="part")).fuse() == (kernels[0], kernels[2])
    assert model_of(NoConvolution()).fuse() == ()
    assert model_of(StaticConvolution(ALL)).fuse() == kernels
    assert model_of(StaticConvolution(QKV), Attention(heads=2, kv_heads=2, qk_norm=True)).fuse() == ("q, k, v",)
    # SwiGLU is in no kernel with head-wise filters, nor is RoPE on heads that a lane's four channels hold.
    headwise = HeadwiseConvolution(ALL, head_size=8)
    assert model_of(headwise).fuse() == (*kernels[:2], "gate, up", kernels[3])
    assert model_of(headwise, Attention(heads=32, kv_heads=32)).fuse()[0] == "q, k, v"
    assert model_of(HeadwiseConvolution(("gate", "up"), head_size=16)).fuse() == ()  # 24 columns of filters
    assert model_of(headwise).fuse(kernels=False) == ()


def test_a_cpu_fuses_nothing_although_that_is_the_default(tiny_run: RunConfig, dataset: Dataset) -> None:
    """There it would only change the order of sums, and so the last bits of losses."""
    assert Execution().fused
    assert "fused" in Execution().in_words(cuda=True)
    assert "fused" not in Execution().in_words(cuda=False)
    trainer = assemble(tiny_run, dataset, Execution("cpu"), World(0, 1, torch.device("cpu")))
    assert trainer.fused == ()
    assert not any(maps.fused for maps in trainer.model.modules() if isinstance(maps, Maps))


def test_records_from_before_this_setting_are_of_runs_that_were_not_fused() -> None:
    said = asdict(Execution("cuda"))
    assert recorded_execution({"execution": said}, Path("config.json")).fused
    del said["fused"]
    assert not recorded_execution({"execution": said}, Path("config.json")).fused


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler raises its own
@pytest.mark.parametrize(
    "conv",
    [LowRankConvolution(ALL, rank=3), StaticConvolution((*QKV, "gate", "up")), HeadwiseConvolution(QKV, head_size=16)],
    ids=lambda conv: conv.kind,
)
@pytest.mark.usefixtures("by_tensor_cores")
def test_a_fused_model_compiles_into_one_graph_a_block(conv: Convolution) -> None:
    torch.compiler.reset()
    plain, compiled = (model_of(conv, layers=1) for _ in range(2))
    for model in (plain, compiled):
        model.fuse()
    compiled.compile(backend="aot_eager", fullgraph=True)
    want, got = (outcome(model, torch.bfloat16, sequences=1) for model in (plain, compiled))
    assert all(relative_error(got[name], want[name].double()) < 0.02 for name in want)
