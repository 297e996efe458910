"""Mamba-2 and Gated DeltaNet: the recurrence against its definition, the mixers against the papers' formulas."""

import importlib.util
import runpy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.design.model import ModelConfig
from experiments.models import recurrence as module
from experiments.models.gated_deltanet import GatedDeltaNetModule
from experiments.models.mamba2 import Mamba2Module
from experiments.parts.base import Shape
from experiments.parts.gated_deltanet import GatedDeltaNet
from experiments.parts.mamba2 import Mamba2
from experiments.parts.short_convolution import Convolution, LowRankConvolution, NoConvolution, StaticConvolution
from experiments.parts.swiglu import SwiGLU

LIBRARY = importlib.util.find_spec("fla")  # not imported: without a GPU that takes seconds and warns


def token_by_token(
    q: Tensor,  # [B, T, H or 1, K]
    k: Tensor,
    v: Tensor,  # [B, T, H, V]
    log_decay: Tensor,  # [B, T, H]
    beta: Tensor | None = None,  # [B, T, H]
    *,
    state: Tensor | None = None,  # [B, H, K, V]
    numbers: Tensor | None = None,  # [B, T], of packed documents, each of which begins with a state of zeros
) -> tuple[Tensor, Tensor]:
    """The definition: arXiv 2405.21060, eq. 1 with A a scalar of each head; with beta arXiv 2412.06464, eq. 10."""
    if state is None:  # With a gradient, so that torch's counter meets every product of the first token, too.
        state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3], requires_grad=True)
    outputs = []
    for t in range(v.shape[1]):
        if numbers is not None and t > 0:
            state = torch.where((numbers[:, t] == numbers[:, t - 1])[:, None, None, None], state, 0)
        state = log_decay[:, t, :, None, None].exp() * state
        update = v[:, t, :, None]  # [B, H, 1, V]
        if beta is not None:
            update = beta[:, t, :, None, None] * (update - k[:, t, :, None] @ state)
        state = state + k[:, t, ..., None] @ update
        outputs.append((q[:, t, :, None] @ state)[:, :, 0])
    return torch.stack(outputs, 1), state


def drawn(
    time: int,
    heads: int,
    shared: bool,
    delta: bool,
    dtype: torch.dtype = torch.float64,
    sizes: tuple[int, int] = (5, 7),
) -> list[Tensor]:
    """q, k, v, ln decay and, with `delta`, beta. Keys have length 1."""
    generator = torch.Generator().manual_seed(time)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    key_heads = 1 if shared else heads
    q, k = (F.normalize(normal(2, time, key_heads, sizes[0]), dim=-1) for _ in "qk")
    made = [q, k, normal(2, time, heads, sizes[1]), -normal(2, time, heads).exp()]
    made += [normal(2, time, heads).sigmoid()] if delta else []
    return [x.to(dtype).requires_grad_() for x in made]


def outcomes(function: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs, last state, and the gradients of a sum over both in which no two numbers have the same weight."""
    y, state = function(*inputs)
    total = sum((x * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in (y, state))
    return [y, state, *torch.autograd.grad(total, inputs)]


@pytest.mark.parametrize(("shared", "delta"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize("time", [1, 3, 64, 65, 150])
def test_chunks_make_the_same_as_token_by_token(time: int, shared: bool, delta: bool) -> None:
    inputs = drawn(time, 3, shared, delta)
    for got, want in zip(outcomes(module.chunked, inputs), outcomes(token_by_token, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("shared", "delta"), [(True, False), (False, False), (False, True)])
def test_documents_within_and_over_chunks_make_the_same_as_token_by_token(shared: bool, delta: bool) -> None:
    """They begin at a chunk's first and last token, beside each other, and some cross chunks; each row has its own."""
    begins = torch.zeros(2, 150, dtype=torch.int64)
    begins[0, [0, 5, 63, 64, 65, 130]] = 1
    begins[1, [0, 40, 149]] = 1
    numbers = begins.flatten().cumsum(0).view(2, 150) - 1
    packed, plain = (partial(function, numbers=numbers) for function in (module.chunked, token_by_token))
    inputs = drawn(150, 3, shared, delta)
    for got, want in zip(outcomes(packed, inputs), outcomes(plain, inputs), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("delta", [False, True])
def test_a_sequence_continues_from_its_state(delta: bool) -> None:
    inputs = drawn(150, 3, False, delta)
    whole, last = module.chunked(*inputs)
    state, parts = None, []
    for part in zip(*(x.split([70, 1, 79], 1) for x in inputs), strict=True):
        y, state = module.chunked(*part, state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(state, last, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("decay", [0.0, -1e-6, -200.0, -1e5])
def test_a_state_that_never_decays_or_at_once_stays_finite(decay: float, delta: bool) -> None:
    """In float32, with equal keys, under which the delta rule's system is worst conditioned."""
    q, k, v, log_decay, *beta = drawn(130, 2, False, delta, torch.float32)
    k = k[:, :1].expand_as(k)
    inputs = [q, k, v, torch.full_like(log_decay, decay).requires_grad_(), *beta]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    for got, want in zip(outcomes(module.chunked, inputs), outcomes(token_by_token, wide), strict=True):
        assert got.isfinite().all()
        assert (got - want).norm() <= 2e-5 * want.norm() + 1e-6  # measured: up to 3e-6


@pytest.mark.parametrize("delta", [False, True])
def test_a_chunk_that_forgets_at_once_leaves_the_later_decays_exact(delta: bool) -> None:
    """Sums of ln decay over chunks as differences of longer sums, of -6e6 here, would be wrong by 0.5 in float32."""
    q, k, v, log_decay, *beta = drawn(300, 2, False, delta, torch.float32)
    log_decay = torch.where(torch.arange(300)[:, None] < 64, -1e5, 1e-3 * log_decay.detach()).requires_grad_()
    inputs = [q, k, v, log_decay, *beta]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    for got, want in zip(outcomes(module.chunked, inputs), outcomes(token_by_token, wide), strict=True):
        assert (got - want).norm() <= 2e-6 * want.norm()


def test_the_rule_with_beta_one_replaces_what_a_key_holds() -> None:
    """And Mamba-2's recurrence adds to it."""
    key = torch.eye(4, dtype=torch.float64)[:1].expand(1, 2, 1, 4)
    v = torch.tensor([[[[3.0]], [[5.0]]]], dtype=torch.float64)
    no_decay, beta = torch.zeros(1, 2, 1, dtype=torch.float64), torch.ones(1, 2, 1, dtype=torch.float64)
    assert module.chunked(key, key, v, no_decay, beta)[0].flatten().tolist() == [3.0, 5.0]
    assert module.chunked(key, key, v, no_decay)[0].flatten().tolist() == [3.0, 8.0]


CONFIG = ModelConfig(2, width=12, vocabulary=50, ffn=SwiGLU(16))
CONVS = ("none", "static", "lowrank")


def convolution(kind: str, sites: tuple[str, ...]) -> Convolution:
    if kind == "static":
        return StaticConvolution(sites, width=3, residual=False, activation="silu")
    return LowRankConvolution((*sites[1:], "o"), rank=2) if kind == "lowrank" else NoConvolution()


def built(part: Mamba2 | GatedDeltaNet, conv: str) -> Mamba2Module | GatedDeltaNetModule:
    """In float64, with every parameter away from its special initial value."""
    sites = ("x", "b", "c") if isinstance(part, Mamba2) else ("q", "k", "v")
    model = replace(CONFIG, mixer=part, conv=convolution(conv, sites))
    made = (Mamba2Module if isinstance(part, Mamba2) else GatedDeltaNetModule)(part, model)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return made.double()


def convolved(made: torch.nn.Module, site: str, x: Tensor) -> Tensor:
    """The output of a linear map of one sequence [T, D], and of its convolution, tap by tap, without an activation."""
    state = {name.removeprefix(f"maps.{site}."): value for name, value in made.state_dict().items()}
    y = x @ state["linear.weight"].T
    conv = made.conv
    if site in conv.sites:
        taps = state["conv.static_filter"].expand(len(x), -1, -1)
        if conv.kind == "lowrank":
            taps = taps + (x @ state["conv.down.weight"].T @ state["conv.up"]).view(len(x), conv.width, -1)
        padded = F.pad(y, (0, 0, conv.width - 1, 0))
        result = sum(taps[:, w] * padded[conv.width - 1 - w : len(padded) - w] for w in range(conv.width))
        y = y + result if conv.residual else result
    return y


def rms(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + CONFIG.norm_epsilon).sqrt() * gain


@pytest.mark.parametrize("conv", CONVS)
def test_mamba2_is_the_papers(conv: str) -> None:
    """arXiv 2405.21060, section 7.1 and figure 6: silu after the convolutions, one group, gated norm before o."""
    part = Mamba2(heads=3, head_size=2, state=4)
    made = built(part, conv)
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    p = made.state_dict()
    values, keys, queries = (F.silu(convolved(made, site, x)) for site in ("x", "b", "c"))
    step = F.softplus(convolved(made, "dt", x) + p["dt_bias"])
    heads = []
    for h in range(3):
        own, state, rows = values[:, 2 * h : 2 * h + 2], torch.zeros(4, 2, dtype=torch.float64), []
        for t in range(9):
            state = (step[t, h] * -p["log_a"][h].exp()).exp() * state + step[t, h] * torch.outer(keys[t], own[t])
            rows.append(queries[t] @ state + p["skip"][h] * own[t])
        heads.append(torch.stack(rows))
    y = rms(torch.cat(heads, 1) * F.silu(convolved(made, "z", x)), p["norm.weight"])
    torch.testing.assert_close(made(x[None])[0], convolved(made, "o", y), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("conv", CONVS)
def test_gated_deltanet_is_the_papers(conv: str) -> None:
    """arXiv 2412.06464, eq. 10 and figure 1: S_t = S_{t-1} alpha_t (I - beta_t k_t k_t^T) + beta_t v_t k_t^T."""
    part = GatedDeltaNet(heads=2, key=3, value=5)
    made = built(part, conv)
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    p = made.state_dict()
    q, k, v = (F.silu(convolved(made, site, x)) for site in ("q", "k", "v"))
    alpha = (-p["log_a"].exp() * F.softplus(convolved(made, "a", x) + p["dt_bias"])).exp()
    beta, gate = convolved(made, "b", x).sigmoid(), F.silu(convolved(made, "g", x))
    heads = []
    for h in range(2):
        own_q, own_k = (y[:, 3 * h : 3 * h + 3] for y in (q, k))
        own_q, own_k = (y / (y.square().sum(1, keepdim=True) + 1e-6).sqrt() for y in (own_q, own_k))
        own_v, state, rows = v[:, 5 * h : 5 * h + 5], torch.zeros(5, 3, dtype=torch.float64), []
        for t in range(9):
            kept = torch.eye(3, dtype=torch.float64) - beta[t, h] * torch.outer(own_k[t], own_k[t])
            state = alpha[t, h] * state @ kept + beta[t, h] * torch.outer(own_v[t], own_k[t])
            rows.append(state @ own_q[t] / 3**0.5)
        heads.append(rms(torch.stack(rows), p["norm.weight"]) * gate[:, 5 * h : 5 * h + 5])
    y = torch.cat(heads, 1)
    torch.testing.assert_close(made(x[None])[0], convolved(made, "o", y), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("part", [Mamba2(heads=200, head_size=2, state=4), GatedDeltaNet(heads=200, key=2, value=2)])
def test_decays_start_as_published(part: Mamba2 | GatedDeltaNet) -> None:
    """exp(log_a) is uniform up to 16, from 1 in Mamba-2; softplus(dt_bias) log-uniform from 0.001 to 0.1."""
    made = built(part, "none").float()
    made.initialise(torch.Generator().manual_seed(0), 0.02, 0.01)
    a, step = made.log_a.detach().exp(), F.softplus(made.dt_bias.detach()).log10()
    lowest = 1.0 if isinstance(part, Mamba2) else 0.0
    assert lowest <= a.min() < lowest + 0.5
    assert 15.5 < a.max() <= 16
    assert -3.001 < step.min() < -2.95
    assert -1.05 < step.max() < -0.999
    assert step.mean().item() == pytest.approx(-2, abs=0.15)


def test_the_papers_shapes_follow_from_its_width() -> None:
    """Mamba-2: 64 heads, intermediate 1216, state 216. Gated DeltaNet: 2 heads, key 256, value 512 (400M models)."""
    shape = Shape(width=1024, heads=16, ffn=2752, rank=16, head_size=16)
    mamba, delta = Mamba2().fitted(shape), GatedDeltaNet().fitted(shape)
    assert (mamba.heads, mamba.linear_maps(1024)["x"].outputs, mamba.state) == (64, 1216, 216)
    assert (delta.heads, delta.key, delta.value) == (2, 256, 512)
    # As many parameters as multi-head attention, and states of equal size.
    assert mamba.parameters(1024) == pytest.approx(4 * 1024**2, rel=0.015)
    assert delta.parameters(1024) == pytest.approx(4 * 1024**2, rel=0.002)
    states = [64 * 19 * 216, 2 * 256 * 512]
    assert states[0] == pytest.approx(states[1], rel=0.002)


@pytest.mark.parametrize("settings", [{"heads": 0}, {"state": -1}, {"head_size": 0}])
def test_sizes_below_one_are_refused(settings: dict[str, int]) -> None:
    shape = Shape(width=32, heads=2, ffn=64, rank=2, head_size=8)
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be at least 1"):
        Mamba2(**settings).fitted(shape)


def test_a_gpu_without_the_library_says_what_to_install_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module.library_trains.cache_clear()
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: None)
    assert not module.library_trains(torch.device("cpu"))
    assert capsys.readouterr().err == ""
    for _ in range(2):
        assert not module.library_trains(torch.device("cuda"))
    assert capsys.readouterr().err.count('flash-linear-attention is not installed: pip install "dynconv[fla]"') == 1
    module.library_trains.cache_clear()


@pytest.mark.parametrize(
    ("capability", "version", "refused"),
    [((9, 0), "3.6.0", True), ((9, 0), "3.7.1", False), ((8, 0), "3.6.0", False), ((9, 0), "3.3.1", False)],
)
def test_a_triton_that_the_library_refuses_is_named(
    capability: tuple[int, int], version: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import triton

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(triton, "__version__", version)
    problem = module.library_problem()
    assert (problem is not None) == refused
    assert not refused or "upgrade to torch 2.12.1 or newer, which bring Triton 3.7.1" in str(problem)


@pytest.mark.skipif(LIBRARY is None, reason="flash-linear-attention is not installed: pip install 'dynconv[fla]'")
@pytest.mark.parametrize("delta", [False, True])
def test_chunks_agree_with_the_librarys_own_definition(delta: bool) -> None:
    """On a CPU, by the recurrences of plain torch operations that flash-linear-attention holds its kernels to."""
    assert LIBRARY is not None
    assert LIBRARY.origin is not None
    name = "gated_delta_rule" if delta else "simple_gla"
    naive = runpy.run_path(str(Path(LIBRARY.origin).parent / "ops" / name / "naive.py"))[f"naive_recurrent_{name}"]
    q, k, v, log_decay, *beta = drawn(150, 2, not delta, delta, sizes=(32, 64))
    q, k = (x.expand(-1, -1, v.shape[2], -1) for x in (q, k))
    arguments = {"q": q, "k": k, "v": v, "g": log_decay, "scale": 1.0} | ({"beta": beta[0]} if delta else {})
    got, want = naive(**arguments)[0], module.chunked(q, k, v, log_decay, *beta)[0]
    assert (got - want).norm() < 1e-6 * want.norm()  # the library's is in float32: measured up to 1.4e-7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("delta", "sizes"), [(False, (24, 19)), (True, (32, 64)), (True, (256, 512))])
def test_the_library_agrees_with_the_chunks_on_a_gpu(delta: bool, sizes: tuple[int, int]) -> None:
    if problem := module.library_problem():
        pytest.skip(problem)
    inputs = [x.detach().cuda() for x in drawn(200, 2, not delta, delta, sizes=sizes)]
    narrow = [x.to(torch.float32 if i == 3 else torch.bfloat16).requires_grad_() for i, x in enumerate(inputs)]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    y, want = module.recurrence(*narrow, by_library=True), module.chunked(*wide)[0]
    weights = torch.linspace(-1, 1, want.numel(), device="cuda").view_as(want)
    pairs = [(y, want)]
    gradients = (torch.autograd.grad((out * weights).sum(), of) for out, of in ((y.float(), narrow), (want, wide)))
    pairs += list(zip(*gradients, strict=True))
    for got, expected in pairs:
        assert (got.double() - expected).norm() / expected.norm() < 2e-2
