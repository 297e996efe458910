"""The model against a second implementation in float64, its causality, and its initial values."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from convolutions import kernels
from torch import Tensor

from dynconv.layers import HeadwiseDynamicConv, LowRankDynamicConv
from experiments.design.arms import ALL_LINEAR, CANON, QKV
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
    "canon": StaticConvolution(CANON, width=2, residual=False),
    "lowrank everywhere": LowRankConvolution((*CANON, "o", "down"), rank=3, activation="silu"),
    "part input": LowRankConvolution(ALL_LINEAR, rank=3, generator_input="part"),
    "headwise, part input": HeadwiseConvolution(("o", "down"), head_size=8, generator_input="part"),
}


def randomised(config: ModelConfig, spread: float = 0.3) -> Decoder:
    """In float64, with every parameter away from its special initial value."""
    model = Decoder(config, seed=0).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def expected_logits(model: Decoder, tokens: list[int]) -> Tensor:  # [T, V]
    """The same model written position by position, with complex rotations and no fused operation."""
    config, weights = model.config, model.state_dict()
    attention = config.mixer
    head_size, kv_group = config.width // attention.heads, attention.heads // attention.kv_heads

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.norm_epsilon).sqrt() * gain

    def site(block: str, name: str, inputs: Tensor, part_input: Tensor | None = None) -> Tensor:  # [T, in] -> [T, out]
        if name.endswith("_input"):
            prefix, y = f"{block}.{name}", inputs
        else:
            prefix = f"{block}.{'mixer' if name in 'qkvo' else 'ffn'}.maps.{name}"
            y = inputs @ weights[f"{prefix}.linear.weight"].T
        conv = config.conv
        if name not in conv.sites:
            return y
        if getattr(conv, "generator_input", "map") == "part" and part_input is not None:
            inputs = part_input
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
        out = torch.zeros_like(y)
        for t in range(time):
            for w in range(min(conv.width, t + 1)):
                out[t] += taps[t, w] * y[t - w]
        if conv.activation == "silu":
            out = out * out.sigmoid()
        return y + out if conv.residual else out

    def rotate(x: Tensor, t: int) -> Tensor:  # [E]
        half = head_size // 2
        angle = torch.tensor([t * attention.rope_theta ** (-2 * i / head_size) for i in range(half)])
        turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half).double(), angle.double())
        return torch.cat([turned.real, turned.imag])

    x = weights["embedding.weight"][tokens]
    for layer in range(config.layers):
        block = f"blocks.{layer}"
        normed = site(block, "mixer_input", norm(x, weights[f"{block}.mixer_norm.weight"]))
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
        x = x + site(block, "o", torch.cat(heads, dim=1), normed)
        normed = site(block, "ffn_input", norm(x, weights[f"{block}.ffn_norm.weight"]))
        gate = site(block, "gate", normed)
        x = x + site(block, "down", gate * gate.sigmoid() * site(block, "up", normed), normed)
    return norm(x, weights["norm.weight"]) @ weights["head.weight"].T


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("kind", CONVS)
def test_logits_equal_a_second_implementation(kind: str, qk_norm: bool) -> None:
    model = randomised(replace(SMALL, conv=CONVS[kind], mixer=Attention(4, 2, qk_norm=qk_norm)))
    tokens = [3, 1, 4, 1, 5, 9, 2]
    got, want = model(torch.tensor([tokens])).logits[0], expected_logits(model, tokens)
    # RoPE's table is float32 by design: measured up to 1.4e-7 of the logits' size
    assert (got - want).norm() / want.norm() < 5e-7


SHARED = {
    "headwise": CONVS["headwise"],
    "lowrank": CONVS["lowrank"],
    "some sites": LowRankConvolution(("k", "o", "up", "down"), rank=3),
    "no static filter": LowRankConvolution(("q", "k", "v"), rank=3, static_filter=False),
    "static": StaticConvolution(("q", "up"), width=3),
    "static qkv": StaticConvolution(QKV, activation="silu"),
    "headwise, no static filter": HeadwiseConvolution(ALL_LINEAR, head_size=8, static_filter=False, residual=False),
    "canon": CONVS["canon"],
    "lowrank everywhere": CONVS["lowrank everywhere"],
    "part input": CONVS["part input"],
    "headwise, part input": CONVS["headwise, part input"],
    "mismatched": LowRankConvolution(ALL_LINEAR, rank=3, mismatched=True),
    "mismatched, part input": HeadwiseConvolution(ALL_LINEAR, head_size=8, generator_input="part", mismatched=True),
    "none": NoConvolution(),
}


@pytest.mark.parametrize(
    ("kind", "one_product", "width"),
    [
        *itertools.product(SHARED, [True, False], [16]),
        ("lowrank", True, 128),
        ("no static filter", True, 128),
        ("mismatched", True, 128),
    ],
)
def test_maps_that_share_a_product_make_the_same(
    kind: str, one_product: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU. For a low-rank convolution gate's and up's 24 channels are padded to 32; q, k and v of 128 channels
    each are convolved by one launch."""
    mixer = Attention(2, 2) if width == 128 else SMALL.mixer
    model = randomised(replace(SMALL, width=width, layers=1, conv=SHARED[kind], mixer=mixer))
    names = list(model.state_dict())
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(short_convolution, "ONE_PRODUCT_WIDTH", 512 if one_product else 8)
    outcomes = []
    for shared in (False, True):
        monkeypatch.setattr(short_convolution, "_shares_products", lambda x, shared=shared: shared)  # noqa: ARG005 - its signature
        logits = model(tokens).logits
        outcomes.append([logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))])
    for apart, together in zip(*outcomes, strict=True):
        torch.testing.assert_close(together, apart)
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("kind", ["static qkv", "headwise", "mismatched, part input"])
def test_one_launch_of_the_kernels_makes_what_the_reference_makes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On views of a shared product, by Triton's interpreter where there is no GPU."""
    model = randomised(replace(SMALL, layers=1, conv=SHARED[kind])).float()
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(2))
    parameters = list(model.parameters())

    def outcome() -> list[Tensor]:
        logits = model(tokens).logits
        return [logits, *torch.autograd.grad(logits.square().sum(), parameters)]

    expected = outcome()
    monkeypatch.setattr(short_convolution, "_shares_products", lambda _: True)
    with kernels():
        got = outcome()
    for one, other in zip(got, expected, strict=True):
        assert (one - other).norm() <= 2e-5 * other.norm()  # measured: 9e-7


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


@pytest.mark.parametrize("kind", [StaticConvolution, HeadwiseConvolution, LowRankConvolution])
def test_other_initial_filters(kind: type[Convolution]) -> None:
    own = {HeadwiseConvolution: {"head_size": 8}, LowRankConvolution: {"rank": 3}}.get(kind, {})

    def first(**settings: str) -> Decoder:
        return Decoder(replace(SMALL, width=64, conv=kind(ALL_LINEAR, **own, **settings)), seed=0)

    tokens = torch.randint(50, (1, 12), generator=torch.Generator().manual_seed(2))
    plain = Decoder(replace(SMALL, width=64), seed=0)(tokens).logits
    torch.testing.assert_close(first(static_init="zero")(tokens).logits, plain, rtol=0, atol=1e-6)
    assert not torch.allclose(first()(tokens).logits, plain, atol=1e-3)
    if kind is StaticConvolution:
        return
    usual, linear = first(), first(generator_init="linear")
    name, bound = ("generator.weight", 64**-0.5) if kind is HeadwiseConvolution else ("up", 3**-0.5)
    weight = linear.state_dict()[f"blocks.0.ffn.maps.up.conv.{name}"]
    assert weight.abs().max() <= bound
    assert weight.std() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not usual.state_dict()[f"blocks.0.ffn.maps.up.conv.{name}"].any()
    assert not torch.allclose(linear(tokens).logits, usual(tokens).logits, atol=1e-3)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
@pytest.mark.parametrize("kind", ["lowrank", "static", "headwise"])
@pytest.mark.parametrize("shared", [False, True])
def test_compiled_block_by_block_all_layers_share_one_program(
    shared: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And make the same; under autocast the programs take a residual stream of its dtype."""
    torch.compiler.reset()
    monkeypatch.setattr(short_convolution, "_shares_products", lambda x: shared)  # noqa: ARG005 - its signature
    model = Decoder(replace(SMALL, layers=3, conv=CONVS[kind], mixer=Attention(4, 2, qk_norm=True)), seed=0)
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(2))
    expected = model(tokens).logits
    streams = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        streams.append({each.dtype for each in inputs if isinstance(each, Tensor) and each.shape == (2, 12, 16)})
        return graph.forward

    model.compile(backend=backend, fullgraph=True, dynamic=False)
    assert torch.equal(model(tokens).logits, expected)
    assert streams == [{torch.float32}] * 2  # a block's and the last norm's
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(tokens).logits
    assert streams[2:] == [{torch.bfloat16}] * 2
    assert narrow.dtype == torch.bfloat16
    assert 1e-4 < (narrow - expected).norm() / expected.norm() < 2e-2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
def test_models_of_one_process_are_all_compiled_and_of_one_shape_once() -> None:
    torch.compiler.reset()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(2))
    counts = []
    for hidden in (8, 16, 24, 32, 40, 48, 56, 64, 72, 72):
        model = Decoder(replace(SMALL, layers=2, ffn=SwiGLU(hidden)), seed=0)
        model.compile(backend=backend, fullgraph=True, dynamic=False)
        model(tokens)
        counts.append(len(graphs))
    assert counts == [2, 3, 4, 5, 6, 7, 8, 9, 10, 10]  # the last norm's program once, a block's for each hidden width


def test_a_criterion_gets_what_the_head_would() -> None:
    model = randomised(SMALL)
    tokens = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(2))
    loss, *_ = model(tokens, lambda x, weight: (x @ weight.T).square().sum())
    assert loss == model(tokens).logits.square().sum()


def test_initial_scale_and_loss() -> None:
    model = Decoder(replace(SMALL, width=64, ffn=SwiGLU(128), vocabulary=500), seed=0)
    q, o = (model.state_dict()[f"blocks.0.mixer.maps.{site}.linear.weight"] for site in ("q", "o"))
    assert q.std() == pytest.approx(0.02, rel=0.05)
    assert o.std() == pytest.approx(0.02 / math.sqrt(2 * 2), rel=0.05)
    tokens = torch.randint(500, (4, 33), generator=torch.Generator().manual_seed(0))
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(500), abs=0.05)
