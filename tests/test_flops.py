"""Exact counts: against the paper's published ones, the built model, and torch's own FLOP counter."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from experiments.design import flops
from experiments.design.config import SITES, ConvConfig, ModelConfig
from experiments.design.ladder import LADDERS
from experiments.models.decoder import Transformer

PAPER_VOCABULARY = 100_352
SMALL = ModelConfig(layers=2, width=32, ffn=48, heads=4, kv_heads=2, vocabulary=300)
CONVS = [
    ConvConfig(),
    ConvConfig("static", ("q", "k", "v"), width=3),
    ConvConfig("headwise", ("q", "down"), width=4, head_size=8),
    ConvConfig("headwise", ("k",), width=2, head_size=4, static_filter=False),
    ConvConfig("lowrank", SITES, width=4, rank=3),
    ConvConfig("lowrank", ("v", "gate"), width=5, rank=7, static_filter=False, residual=False),
]


def paper_model(size: str, **conv: object) -> ModelConfig:
    rung = LADDERS["paper"].sizes[size]
    return ModelConfig(
        layers=rung.layers,
        width=rung.width,
        ffn=rung.ffn,
        heads=rung.heads,
        kv_heads=rung.heads,
        vocabulary=PAPER_VOCABULARY,
        conv=ConvConfig(**conv) if conv else ConvConfig(),  # type: ignore[arg-type]  # checked by the class
    )


def lowrank(rank: int = 16, width: int = 4, sites: tuple[str, ...] = ("q", "k", "v")) -> dict[str, object]:
    return {"kind": "lowrank", "rank": rank, "width": width, "sites": sites}


# arXiv 2606.03825, ablations at 300M: millions of parameters as printed there
PUBLISHED_300M = [
    *[(lowrank(width=w), m) for w, m in zip(range(1, 7), (306.8, 307.6, 308.5, 309.3, 310.1, 311.0), strict=True)],
    (lowrank(rank=128), 336.8),
    ({"kind": "headwise", "sites": ("q", "k", "v"), "head_size": 8}, 330.5),
    ({"kind": "headwise", "sites": ("q", "k", "v"), "head_size": 128}, 306.9),
]


@pytest.mark.parametrize(("conv", "millions"), PUBLISHED_300M)
def test_the_papers_ablation_counts_come_out(conv: dict[str, object], millions: float) -> None:
    assert round(flops.parameters(paper_model("300M", **conv)) / 1e6, 1) == millions


def test_the_papers_model_counts_come_out_exactly() -> None:
    assert flops.parameters(paper_model("300M")) == 305_169_408
    assert flops.parameters(paper_model("2B")) == 1_824_655_360
    assert flops.parameters(paper_model("2B", **lowrank())) == 1_841_170_432
    assert flops.parameters(paper_model("2B", **lowrank(sites=SITES))) == 1_880_000_512


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("change", [{}, {"qk_norm": True}, {"tied": False}])
def test_parameters_equal_those_of_the_built_model(conv: ConvConfig, change: dict[str, bool]) -> None:
    config = replace(SMALL, conv=conv, **change)
    with torch.device("meta"):
        model = Transformer(config, seed=0)
    assert flops.parameters(config) == sum(p.numel() for p in model.parameters())
    tables = {id(model.embedding.weight): model.embedding.weight, id(model.head.weight): model.head.weight}
    body = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in tables.values())
    assert flops.parameters_nonembedding(config) == body


@pytest.mark.parametrize("conv", CONVS)
def test_matrix_products_equal_torchs_count(conv: ConvConfig) -> None:
    """torch counts attention in full, and no elementwise work: the convolution itself is checked by hand below."""
    config, time = replace(SMALL, conv=conv), 24
    model = Transformer(config, seed=0)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:  # the fused kernels have no entry in torch's table on a CPU
        loss = model(torch.zeros(1, time, dtype=torch.long)).sum()
        forward = counter.get_total_flops()
        loss.backward()
    parts = flops.forward_flops(config, time)
    assert forward == parts["linear"] + parts["head"] + 2 * parts["attention"] + parts["generator"]
    assert counter.get_total_flops() == 3 * forward


def test_convolution_flops_by_hand() -> None:
    """Two per tap and channel; a third where the static filter is added to a dynamic one."""
    time, channels, layers = 10, 32, 2
    static = replace(SMALL, kv_heads=4, conv=ConvConfig("static", ("q",), width=4))
    dynamic = replace(static, conv=ConvConfig("lowrank", ("q",), width=4, rank=2))
    assert flops.forward_flops(static, time)["convolution"] == time * layers * channels * 4 * 2
    assert flops.forward_flops(dynamic, time)["convolution"] == time * layers * channels * 4 * 3


def test_conventions() -> None:
    config, tokens = paper_model("300M"), 4096 * 10
    counts = flops.count(config, tokens, 4096)
    assert counts.flops_6nd == 6 * 305_169_408 * tokens
    assert counts.flops_6n_nonemb_d == 6 * (305_169_408 - PAPER_VOCABULARY * 1024) * tokens
    # 6ND leaves out attention alone (norms are in N but are not matrix products: under one part in 10^4)
    attention = 3 * 10 * flops.forward_flops(config, 4096)["attention"]
    assert counts.flops_exact - attention == pytest.approx(counts.flops_6nd, rel=2e-4)
