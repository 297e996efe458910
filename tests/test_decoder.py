"""The model against a second implementation in float64, its causality, and its initial values."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dynconv.layers import HeadwiseDynamicConv, LowRankDynamicConv
from experiments.design.arms import ALL_LINEAR, QKV
from experiments.design.model import ModelConfig
from experiments.models import short_convolution
from experiments.models.decoder import Decoder
from experiments.parts.attention import Attention
from experiments.parts.short_convolution import (
    Convolution,
    HeadwiseConvolution,
    LowRankConvolution,
    NoConvolution,
    StaticConvolution,
)
from experiments.parts.swiglu import SwiGLU

SMALL = ModelConfig(2, width=16, vocabulary=50, mixer=Attention(4, 2), ffn=SwiGLU(24))
CONVS = {
    "none": NoConvolution(),
    "static": StaticConvolution(QKV, width=3),
    "headwise": HeadwiseConvolution(ALL_LINEAR, width=4, head_size=8),
    "lowrank": LowRankConvolution(ALL_LINEAR, width=4, rank=3),
}


def randomised(config: ModelConfig) -> Decoder:
    """In float64, with every parameter away from its special initial value."""
    model = Decoder(config, seed=0).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def expected_logits(model: Decoder, tokens: list[int]) -> Tensor:  # [T, V]
    """The same model written position by position, with complex rotations and no fused operation."""
    config, weights = model.config, model.state_dict()
    attention = config.mixer
    head_size, kv_group = config.width // attention.heads, attention.heads // attention.kv_heads

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * gain

    def site(block: str, name: str, inputs: Tensor) -> Tensor:  # [T, in] -> [T, out]
        prefix = f"{block}.{'mixer' if name in 'qkvo' else 'ffn'}.maps.{name}"
        y = inputs @ weights[f"{prefix}.linear.weight"].T
        conv = config.conv
        if name not in conv.sites:
            return y
        time, channels = y.shape
        taps = torch.zeros(time, conv.width, channels, dtype=y.dtype)
        if f"{prefix}.conv.static_filter" in weights:
            taps += weights[f"{prefix}.conv.static_filter"]
        if conv.kind == "lowrank":
            z = inputs @ weights[f"{prefix}.conv.down.weight"].T
            taps += (z @ weights[f"{prefix}.conv.up"]).reshape(time, conv.width, channels)
        if conv.kind == "headwise":
            made = inputs @ weights[f"{prefix}.conv.generator.weight"].T  # [T, H*W]
            for channel in range(channels):
                head = channel // conv.head_size
                taps[:, :, channel] += made[:, head * conv.width : (head + 1) * conv.width]
        out = y.clone() if conv.residual else torch.zeros_like(y)
        for t in range(time):
            for w in range(min(conv.width, t + 1)):
                out[t] += taps[t, w] * y[t - w]
        return out

    def rotate(x: Tensor, t: int) -> Tensor:  # [E]
        half = head_size // 2
        angle = torch.tensor([t * attention.rope_theta ** (-2 * i / head_size) for i in range(half)])
        turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half).double(), angle.double())
        return torch.cat([turned.real, turned.imag])

    x = weights["embedding.weight"][tokens]
    for layer in range(config.layers):
        block = f"blocks.{layer}"
        normed = norm(x, weights[f"{block}.mixer_norm.weight"])
        q, k, v = (site(block, name, normed).unflatten(1, (-1, head_size)) for name in ("q", "k", "v"))
        if attention.qk_norm:
            q = norm(q, weights[f"{block}.mixer.q_norm.weight"])
            k = norm(k, weights[f"{block}.mixer.k_norm.weight"])
        heads = []
        for h in range(attention.heads):
            rows = []
            for t in range(len(tokens)):
                query = rotate(q[t, h], t)
                scores = torch.stack([query @ rotate(k[s, h // kv_group], s) for s in range(t + 1)])
                probabilities = (scores / math.sqrt(head_size)).softmax(0)
                rows.append(probabilities @ v[: t + 1, h // kv_group])
            heads.append(torch.stack(rows))
        x = x + site(block, "o", torch.cat(heads, dim=1))
        normed = norm(x, weights[f"{block}.ffn_norm.weight"])
        gate = site(block, "gate", normed)
        x = x + site(block, "down", gate * gate.sigmoid() * site(block, "up", normed))
    return norm(x, weights["norm.weight"]) @ weights["head.weight"].T


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kind", CONVS)
def test_logits_equal_a_second_implementation(kind: str, qk_norm: bool) -> None:
    model = randomised(replace(SMALL, conv=CONVS[kind], mixer=Attention(4, 2, qk_norm=qk_norm)))
    tokens = [3, 1, 4, 1, 5, 9, 2]
    got, want = model(torch.tensor([tokens])).logits[0], expected_logits(model, tokens)
    # RoPE's table is float32 by design: measured up to 1.4e-7 of the logits' size
    assert (got - want).norm() / want.norm() < 5e-7


@pytest.mark.parametrize(
    "conv", [CONVS["headwise"], CONVS["lowrank"], LowRankConvolution(("k", "o", "up", "down"), rank=3)], ids=str
)
def test_generators_that_share_a_product_make_the_same(conv: Convolution, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    model = randomised(replace(SMALL, conv=conv))
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(2))
    outcomes = []
    for shared in (False, True):
        monkeypatch.setattr(short_convolution, "_shares_products", lambda x, shared=shared: shared)  # noqa: ARG005 - its signature
        logits = model(tokens).logits
        outcomes.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    for apart, together in zip(*outcomes, strict=True):
        torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("kind", CONVS)
def test_no_logit_depends_on_a_later_token(kind: str) -> None:
    model = randomised(replace(SMALL, conv=CONVS[kind]))
    tokens = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % 50
    before, after = model(tokens).logits[0], model(changed).logits[0]
    assert torch.equal(before[:7], after[:7])
    assert not torch.equal(before[7], after[7])


def test_arms_of_a_seed_share_their_common_initial_weights() -> None:
    plain = Decoder(SMALL, seed=5).state_dict()
    for conv in CONVS.values():
        state = Decoder(replace(SMALL, conv=conv), seed=5).state_dict()
        assert all(torch.equal(state[name], value) for name, value in plain.items())
    other = Decoder(SMALL, seed=6).state_dict()
    assert not torch.equal(other["blocks.0.mixer.maps.q.linear.weight"], plain["blocks.0.mixer.maps.q.linear.weight"])


@pytest.mark.parametrize("kind", ["headwise", "lowrank"])
def test_a_dynamic_convolution_starts_as_identity_plus_static(kind: str) -> None:
    """The paper's initialisation: what makes the dynamic part is zero at first, and is reached by the gradient."""
    model = Decoder(replace(SMALL, conv=CONVS[kind]), seed=0)
    for module in model.modules():
        if isinstance(module, HeadwiseDynamicConv):
            assert not module.generator.weight.any()
        if isinstance(module, LowRankDynamicConv):
            assert not module.up.any()
            assert module.down.weight.any()
        if isinstance(module, HeadwiseDynamicConv | LowRankDynamicConv):
            assert module.residual
            assert module.static_filter is not None
            assert module.static_filter.abs().max() <= 4**-0.5
    model(torch.randint(50, (1, 12))).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        zero_at_first = name.endswith("conv.down.weight")  # its gradient passes through the zero `up`
        assert parameter.grad is not None, name
        assert zero_at_first or parameter.grad.any(), name


def test_initial_scale_and_loss() -> None:
    model = Decoder(replace(SMALL, width=64, ffn=SwiGLU(128), vocabulary=500), seed=0)
    q, o = (model.state_dict()[f"blocks.0.mixer.maps.{site}.linear.weight"] for site in ("q", "o"))
    assert q.std() == pytest.approx(0.02, rel=0.05)
    assert o.std() == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.05)
    tokens = torch.randint(500, (4, 33), generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(500), abs=0.05)
