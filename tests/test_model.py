"""Exact counts: against the paper's published ones, the built model, and torch's own FLOP counter."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_recurrence import token_by_token
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments.design.arms import ALL_LINEAR, ARMS, CANON, QKV
from experiments.design.ladder import LADDERS
from experiments.design.model import ModelConfig
from experiments.models.decoder import Decoder
from experiments.parts.attention import Attention
from experiments.parts.base import INPUT_SITES, Part
from experiments.parts.gated_deltanet import GatedDeltaNet
from experiments.parts.mamba2 import Mamba2
from experiments.parts.moe import MoE
from experiments.parts.registry import CONVOLUTIONS, FEED_FORWARDS, MIXERS
from experiments.parts.short_convolution import (
    Convolution,
    HeadwiseConvolution,
    LowRankConvolution,
    NoConvolution,
    StaticConvolution,
)
from experiments.parts.swiglu import SwiGLU

PAPER_VOCABULARY = 100_352
SMALL = ModelConfig(2, width=32, vocabulary=300, mixer=Attention(4, 2), ffn=SwiGLU(48))
PARTS: list[dict[str, Part]] = [
    {},
    {"mixer": Attention(4, 2, qk_norm=True)},
    {"ffn": MoE(experts=5, top_k=2, shared=3, hidden=8)},
    {"mixer": Mamba2(heads=3, head_size=5, state=8)},
    {"mixer": GatedDeltaNet(heads=2, key=8, value=16)},
]
CONVS = [
    NoConvolution(),
    StaticConvolution(QKV, width=3),
    HeadwiseConvolution(("q", "down"), width=4, head_size=8),
    HeadwiseConvolution(("k",), width=2, head_size=4, static_filter=False),
    LowRankConvolution(ALL_LINEAR, width=4, rank=3),
    LowRankConvolution(("v", "gate"), width=5, rank=7, static_filter=False, residual=False),
    StaticConvolution(CANON),
    LowRankConvolution((*CANON, "o", "down"), rank=3, activation="silu", mismatched=True),
    LowRankConvolution(ALL_LINEAR, rank=3, generator_input="part"),
    HeadwiseConvolution(("o", "down", "ffn_input"), head_size=8, generator_input="part"),
]


def with_parts(conv: Convolution, change: Mapping[str, Any]) -> ModelConfig:
    """The small model with other parts, and the convolution at those of its sites that these have."""
    config = replace(SMALL, **change)
    sites = tuple(site for site in conv.sites if site in (*config.linear_maps(), *INPUT_SITES))
    return replace(config, conv=replace(conv, sites=sites) if sites else NoConvolution())  # type: ignore[type-var]


def paper_model(size: str, conv: Convolution | None = None) -> ModelConfig:
    ladder = LADDERS["paper"]
    rung, shape = ladder.sizes[size], ladder.shape(size)
    parts = {"mixer": Attention().fitted(shape), "ffn": SwiGLU().fitted(shape), "conv": conv or NoConvolution()}
    return ModelConfig(rung.layers, width=rung.width, vocabulary=PAPER_VOCABULARY, **parts)


# arXiv 2606.03825, ablations at 300M: millions of parameters as printed there
PUBLISHED_300M = [
    *[
        (LowRankConvolution(QKV, w, rank=16), m)
        for w, m in zip(range(1, 7), (306.8, 307.6, 308.5, 309.3, 310.1, 311.0), strict=True)
    ],
    (LowRankConvolution(QKV, rank=128), 336.8),
    (HeadwiseConvolution(QKV, head_size=8), 330.5),
    (HeadwiseConvolution(QKV, head_size=128), 306.9),
]


@pytest.mark.parametrize(("conv", "millions"), PUBLISHED_300M)
def test_the_papers_ablation_counts_come_out(conv: Convolution, millions: float) -> None:
    assert round(paper_model("300M", conv).parameters() / 1e6, 1) == millions


def test_the_papers_model_counts_come_out_exactly() -> None:
    assert paper_model("300M").parameters() == 305_169_408
    assert paper_model("2B").parameters() == 1_824_655_360
    assert paper_model("2B", LowRankConvolution(QKV, rank=16)).parameters() == 1_841_170_432
    assert paper_model("2B", LowRankConvolution(ALL_LINEAR, rank=16)).parameters() == 1_880_000_512


def test_generators_that_read_the_parts_input_do_not_give_the_published_count() -> None:
    """Only down's input is wider than the part's: 32 layers of rank 16 times 5504 - 2048 parameters fewer at 2B."""
    other = paper_model("2B", LowRankConvolution(ALL_LINEAR, rank=16, generator_input="part"))
    assert other.parameters() == 1_880_000_512 - 32 * 16 * (5504 - 2048)


def test_canon_layers_cost_what_their_paper_says() -> None:
    """arXiv 2512.17351: width 4 on D, on q, k and v, on D again, and on both inner maps of the feed-forward part."""
    more = paper_model("300M", ARMS["static-canon"].conv).parameters() - paper_model("300M").parameters()
    assert more == 16 * 4 * (1024 + 3 * 1024 + 1024 + 2 * 2752)


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("change", [*PARTS, {"tied": False}])
def test_parameters_equal_those_of_the_built_model(conv: Convolution, change: dict[str, object]) -> None:
    config = with_parts(conv, change)
    with torch.device("meta"):
        model = Decoder(config, seed=0)
    assert config.parameters() == sum(p.numel() for p in model.parameters())
    tables = {id(model.embedding.weight): model.embedding.weight, id(model.head.weight): model.head.weight}
    body = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in tables.values())
    assert config.parameters_nonembedding() == body


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("change", PARTS)
def test_matrix_products_equal_torchs_count(
    conv: Convolution, change: dict[str, Part], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch counts attention in full, and no elementwise work: the convolution itself is checked by hand below.

    Recurrences are counted, and therefore computed here, token by token, as they are defined.
    """
    config, time = with_parts(conv, change), 24
    monkeypatch.setattr("experiments.models.recurrence.chunked", token_by_token)
    model = Decoder(config, seed=0)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # the fused kernels have no entry in torch's table on a CPU
        loss = model(torch.zeros(2, time, dtype=torch.long)).logits.sum()
        forward = counter.get_total_flops() // 2
        loss.backward()
    parts = config.forward_flops(time)
    elementwise = parts.get("convolution", 0) + parts.get("decay", 0)
    assert forward == sum(parts.values()) - elementwise + parts.get("attention", 0)
    assert counter.get_total_flops() == 3 * 2 * forward


def test_convolution_flops_by_hand() -> None:
    """Two per tap and channel; a third where the static filter is added to a dynamic one."""
    time, channels, layers = 10, 32, 2
    static = replace(SMALL, conv=StaticConvolution(("q",), width=4))
    dynamic = replace(static, conv=LowRankConvolution(("q",), width=4, rank=2))
    assert static.forward_flops(time)["convolution"] == time * layers * channels * 4 * 2
    assert dynamic.forward_flops(time)["convolution"] == time * layers * channels * 4 * 3


def test_conventions() -> None:
    config, tokens = paper_model("300M"), 4096 * 10
    counts = config.count(tokens, 4096)
    assert counts.flops_6nactive_d == counts.flops_6nd == 6 * 305_169_408 * tokens
    assert counts.flops_6n_nonemb_d == 6 * (305_169_408 - PAPER_VOCABULARY * 1024) * tokens
    # 6ND leaves out attention alone (norms are in N but are not matrix products: under one part in 10^4)
    attention = 3 * 10 * config.forward_flops(4096)["attention"]
    assert counts.flops_exact - attention == pytest.approx(counts.flops_6nd, rel=2e-4)


def test_every_part_of_the_registry_is_counted_here() -> None:
    """Whoever registers a part adds it to the cases above, which hold it to torch's counter and the built module."""
    assert {type(conv) for conv in CONVS} == set(CONVOLUTIONS)
    assert {type(replace(SMALL, **change).mixer) for change in PARTS} == set(MIXERS)
    assert {type(replace(SMALL, **change).ffn) for change in PARTS} == set(FEED_FORWARDS)
