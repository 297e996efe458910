"""Mixtures of experts: against a second implementation token by token, their auxiliary losses, counts and loads."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from planted import write_sweep
from stepping import on_a_gpu
from torch import Tensor

from analysis.logs.store import load
from analysis.pages.drawing import Answers, draw, material
from analysis.pages.expert_load import expert_load
from experiments.data.dataset import Dataset
from experiments.design.arms import QKV
from experiments.design.config import Execution, RunConfig
from experiments.design.model import ModelConfig
from experiments.design.sweep import load_sweep
from experiments.models import moe as module
from experiments.models.decoder import Decoder
from experiments.parts.attention import Attention
from experiments.parts.base import Shape
from experiments.parts.moe import MoE
from experiments.parts.short_convolution import LowRankConvolution
from experiments.tasks.base import Examples
from experiments.training.assembly import assemble
from experiments.training.loss import losses_of
from experiments.training.parallel import World
from experiments.training.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
CPU = Execution(device="cpu")
SWEEPS = Path(__file__).parent.parent / "experiments" / "sweeps"
PART = MoE(experts=5, top_k=2, shared=1, hidden=8)
SMALL = ModelConfig(2, width=16, vocabulary=300, mixer=Attention(2, 2), ffn=PART)


def randomised(part: MoE, width: int = 16, dtype: torch.dtype = torch.float64) -> module.MoEModule:
    made = module.MoEModule(part, replace(SMALL, width=width, ffn=part))
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return made.to(dtype)


def token_by_token(made: module.MoEModule, x: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The published definitions, one token and one expert at a time."""
    state, experts, top_k = made.state_dict(), made.experts, made.top_k
    out = torch.zeros_like(x)
    balance, z = x.new_zeros(len(x)), x.new_zeros(len(x))
    load = x.new_zeros(len(x), experts)
    for b, sequence in enumerate(x):
        mean_probability = x.new_zeros(experts)
        for t, token in enumerate(sequence):
            scores = state["router.weight"] @ token
            probability = scores.exp() / scores.exp().sum()
            chosen = sorted(range(experts), key=lambda e: -probability[e])[:top_k]
            total = sum(probability[e] for e in chosen) if top_k > 1 else 1.0
            gate, up, down = (state[f"maps.{site}.linear.weight"] for site in ("gate", "up", "down"))
            out[b, t] = down @ (F.silu(gate @ token) * (up @ token))
            for e in chosen:
                hidden = F.silu(token @ state["gate"][e]) * (token @ state["up"][e])
                out[b, t] += probability[e] / total * (hidden @ state["down"][e])
                load[b, e] += experts / (len(sequence) * top_k)
            mean_probability += probability / len(sequence)
            z[b] += scores.exp().sum().log() ** 2 / len(sequence)
        balance[b] = sum(load[b, e] * mean_probability[e] for e in range(experts))
    return out, {"balance_loss": 0.01 * balance, "router_z_loss": 0.001 * z}, load


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_outputs_losses_and_loads_equal_a_second_implementation(top_k: int) -> None:
    made = randomised(replace(PART, top_k=top_k))
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y, losses, measures = made(x)
    want, want_losses, load = token_by_token(made, x)
    torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-12)
    for name, value in want_losses.items():
        torch.testing.assert_close(losses[name], value, rtol=1e-12, atol=0)
    torch.testing.assert_close(measures["expert_load"], load, rtol=1e-12, atol=0)


def outcomes(made: module.MoEModule, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y, losses, _ = made(x)
    total = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)).sum()
    return [y, *torch.autograd.grad(total + sum(map(torch.sum, losses.values())), [x, *made.parameters()])]


def test_the_gradient_is_that_of_the_values() -> None:
    """By central differences; the choice of experts is constant around a point."""
    made = randomised(PART)
    x = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: made(x)[0], (x,))


def test_torchs_grouped_product_makes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: one expert gets no token, and no expert's rows begin at a multiple of 8."""
    made = randomised(PART, dtype=torch.float32)
    with torch.no_grad():
        made.router.weight[3] = 0.0
        made.router.weight[:, 0] = torch.tensor([0.0, 0.0, 0.0, -50.0, 0.0])
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(2)).abs()
    apart = outcomes(made, x)
    assert made(x)[2]["expert_load"][:, 3].sum() == 0
    monkeypatch.setattr(module, "_has_grouped_kernels", lambda _: True)
    for one, other in zip(apart, outcomes(made, x), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


@on_a_gpu
@pytest.mark.parametrize(
    ("width", "experts", "top_k", "hidden"), [(128, 5, 2, 8), (128, 32, 4, 32), (192, 32, 4, 48), (128, 128, 8, 256)]
)
def test_a_gpu_makes_the_same_and_never_waits(
    width: int, experts: int, top_k: int, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch has one kernel for products up to 128 wide and another for wider ones."""
    made = randomised(MoE(experts, top_k, hidden=hidden), width, torch.float32).cuda()
    x = torch.randn(3, 75, width, generator=torch.Generator().manual_seed(2)).cuda().bfloat16()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            together = outcomes(made, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    monkeypatch.setattr(module, "_has_grouped_kernels", lambda _: False)
    with torch.autocast("cuda", torch.bfloat16):
        apart = outcomes(made, x)
    assert together[0].dtype == torch.bfloat16
    for one, other in zip(apart, together, strict=True):
        assert (one - other).float().norm() <= 1e-2 * one.float().norm()  # an H200 showed no difference


ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
IDLE = [  # rows of each of 32 experts: some have none, as in the first steps of real training
    [4 * 16 if expert in (3, 7, 20, 31) else 0 for expert in range(32)],
    [130, 1, 3, 0, 122, *[0] * 27],
    [0] * 31 + [256],
]


def grouped_outcomes(rows: list[int], width: int, hidden: int, device: str) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of the experts' products in bfloat16 by `_grouped_product`, and in float64 by a loop."""
    generator = torch.Generator().manual_seed(3)

    def drawn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device).bfloat16()

    x, gradient = drawn(sum(rows), width), drawn(sum(rows), width)
    matrices = [drawn(len(rows), width, hidden), drawn(len(rows), hidden, width)]
    ends = torch.tensor(rows).cumsum(0).to(device, torch.int32)
    given = [tensor.clone().requires_grad_() for tensor in (x, *matrices)]
    exact = [tensor.double().requires_grad_() for tensor in (x, *matrices)]
    # Memory that is not written must show: what is allocated next is likely to lie where these lay.
    for size in (x.numel(), x.numel(), matrices[0].numel(), matrices[1].numel(), sum(rows) * hidden):
        torch.full((size,), math.nan, dtype=torch.bfloat16, device=device)
    y = module._grouped_product(module._grouped_product(given[0], given[1], ends), given[2], ends)
    found = [y, *torch.autograd.grad(y, given, gradient)]
    want = torch.cat([part @ exact[1][e] @ exact[2][e] for e, part in enumerate(exact[0].split(rows))])
    return found, [want, *torch.autograd.grad(want, exact, gradient.double())]


@pytest.mark.parametrize("rows", IDLE)
@pytest.mark.parametrize(("width", "hidden"), [(128, 32), (192, 48)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def test_experts_without_tokens_get_no_gradient_and_leave_the_others_right(
    rows: list[int], width: int, hidden: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_has_grouped_kernels", lambda _: True)
    found, exact = grouped_outcomes(rows, width, hidden, device)
    for one, other in zip(exact, found, strict=True):
        assert (one - other.double()).norm() <= 1e-2 * one.norm()  # products are rounded to bfloat16: 2e-3 to 3e-3
    idle = torch.tensor(rows) == 0
    assert all(not gradient.cpu()[idle].any() for gradient in found[2:])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo does so
def test_a_captured_step_could_hold_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole block is one program: nothing in it depends on values, such as the number of an expert's tokens."""
    torch.compiler.reset()
    monkeypatch.setattr(module, "_has_grouped_kernels", lambda _: True)
    model = Decoder(SMALL, seed=0)
    tokens = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(tokens)

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        return graph.forward

    model.compile(backend=backend, fullgraph=True, dynamic=False)
    with torch.autocast("cpu", torch.bfloat16):
        got = model(tokens)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.losses["balance_loss"], expected.losses["balance_loss"])


def test_an_even_router_costs_the_weights_alone() -> None:
    """Load times probability is 1 then, in every layer, and the z-loss is the square of ln E."""
    made = randomised(replace(PART, experts=4, top_k=4))
    with torch.no_grad():
        made.router.weight.zero_()
    _, losses, measures = made(torch.randn(2, 6, 16, dtype=torch.float64))
    assert losses["balance_loss"].tolist() == pytest.approx([0.01] * 2)
    assert losses["router_z_loss"].tolist() == pytest.approx([0.001 * math.log(4) ** 2] * 2)
    assert measures["expert_load"].unique().tolist() == [1.0]


def test_padding_enters_no_auxiliary_loss() -> None:
    """A micro-batch is padded with sequences without targets; one may be padding alone."""
    model = Decoder(SMALL, seed=0)
    tokens = torch.randint(300, (5, 12), generator=torch.Generator().manual_seed(2))
    padding = torch.nn.functional.pad(tokens, (0, 0, 0, 3))
    ignored = torch.nn.functional.pad(tokens, (0, 0, 0, 3), value=-100)
    device = torch.device("cpu")
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            loss, whole = losses_of(model, device, tokens, tokens)
            padded_loss, padded = losses_of(model, device, padding, ignored)
            _, empty = losses_of(model, device, padding[5:], ignored[5:])
        assert padded_loss.item() == pytest.approx(loss.item(), rel=1e-6)
        for name, value in whole.items():
            torch.testing.assert_close(padded[name], value, rtol=1e-6, atol=0)
            assert not empty[name].any()
    assert {"balance_loss", "router_z_loss", "expert_load.0", "expert_load.1"} == set(whole)
    assert whole["expert_load.1"].sum().item() == pytest.approx(5)


@pytest.fixture
def run(tiny_run: RunConfig) -> RunConfig:
    return replace(tiny_run, model=replace(tiny_run.model, ffn=PART))


def gradients(trainer: Trainer, index: int) -> list[Tensor]:
    trainer._backward(index)
    return [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]


@on_a_gpu
def test_compiled_experts_have_the_gradients_of_uncompiled_ones_whatever_the_memory_held(
    run: RunConfig, dataset: Dataset
) -> None:
    """Of this width, torch's kernel of a norm reads back what other warps store: see experiments/models/barriers.py."""
    torch.compiler.reset()
    wide = replace(run, model=replace(run.model, width=192, mixer=Attention(3, 3)))
    trainer = assemble(wide, dataset, Execution(device="cuda"), World(0, 1, torch.device("cuda")))
    trainer.warm_up()
    assert trainer.captured != trainer.model.waits_for_host(torch.device("cuda"))
    trainer.check_captured()
    with torch.compiler.set_stance("force_eager"):
        expected = gradients(trainer, 0)
    trainer._zero_grad()
    for _ in range(20):
        stale = [torch.full((2**power,), math.nan, device="cuda") for power in range(8, 25) for _ in range(4)]
        del stale
        for got, want in zip(gradients(trainer, 0), expected, strict=True):
            assert (got - want).norm() <= 0.4 * want.norm()
        trainer._zero_grad()


def test_micro_batches_change_rounding_only(run: RunConfig, dataset: Dataset) -> None:
    """The balance is that of each sequence. The last batch, 5 = 3 + 2, is padded."""
    execution = replace(CPU, micro_batch=3)
    whole, split = (gradients(assemble(run, dataset, how, ALONE), 24) for how in (CPU, execution))
    assert len(whole) == len(split)
    for one, other in zip(whole, split, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    one, other = (assemble(run, dataset, how, ALONE).evaluate(lambda: False) for how in (CPU, execution))
    assert one is not None
    assert other is not None
    assert one.metrics == pytest.approx(other.metrics, rel=1e-5)


def test_an_evaluation_logs_the_load_of_every_expert(run: RunConfig, dataset: Dataset) -> None:
    evaluation = assemble(run, dataset, CPU, ALONE).evaluate(lambda: False)
    assert evaluation is not None
    loads = {name: value for name, value in evaluation.metrics.items() if name.startswith("expert_load.")}
    assert set(loads) == {f"expert_load.{layer}.{expert}" for layer in range(2) for expert in range(5)}
    for layer in range(2):
        assert sum(loads[f"expert_load.{layer}.{expert}"] for expert in range(5)) == pytest.approx(5)


def test_balancing_evens_the_load(run: RunConfig, dataset: Dataset) -> None:
    """Against a router that starts by sending most tokens to two of the five experts."""
    largest = []
    for weight in (0.0, 0.1):
        part = replace(PART, balance_weight=weight, router_z_weight=0.0)
        trainer = assemble(replace(run, model=replace(run.model, ffn=part)), dataset, CPU, ALONE)
        with torch.no_grad():
            for block in trainer.model.blocks:
                block.ffn.router.weight[:2] *= 5
        for _ in range(25):
            trainer.step()
        evaluation = trainer.evaluate(lambda: False)
        assert evaluation is not None
        largest.append(max(value for name, value in evaluation.metrics.items() if name.startswith("expert_load")))
    assert largest[1] < 0.8 * largest[0]


def test_convolutions_follow_attention_and_the_shared_expert() -> None:
    conv = LowRankConvolution((*QKV, "gate", "up", "down"), rank=2)
    model = Decoder(replace(SMALL, conv=conv), seed=0)
    assert model.config.facts()["conv.sites"] == "q+k+v+gate+up+down"
    assert all(model.blocks[0].ffn.maps[site].conv is not None for site in ("gate", "up", "down"))
    plain, other = Decoder(SMALL, seed=0).state_dict(), model.state_dict()
    assert all(torch.equal(other[name], value) for name, value in plain.items())  # experts and router, too


def test_the_papers_model_has_its_counts() -> None:
    """arXiv 2606.03825: 7B parameters, 1B active; 6.92B and 1.1B with the sibling configuration's shape."""
    baseline, *_, lowrank = load_sweep(SWEEPS / "moe.toml")
    model = baseline.model
    assert (model.layers, model.width, model.mixer.heads, model.ffn.hidden, model.tied) == (40, 1536, 24, 256, False)
    assert model.ffn.linear_maps(1536)["gate"].outputs == 1024
    counts = baseline.counts
    assert counts.parameters == 6_922_298_880
    # Layers with 8 of 128 experts, the LM head, and one row of the embedding.
    layer = 4 * 1536**2 + 3 * 1536 * (1024 + 8 * 256) + 128 * 1536 + 2 * 1536
    assert counts.parameters_active == 40 * layer + 1536 + 100_352 * 1536 + 1536 == 1_105_849_344
    assert counts.tokens == pytest.approx(100e9, rel=1e-3)
    assert counts.flops_6nactive_d == 6 * 1_105_849_344 * counts.tokens
    attention = 3 * model.forward_flops(4096)["attention"] * (counts.tokens // 4096)
    # What a matrix product does not use, in 6ND but not in the exact count: norms and the embedding's row.
    assert counts.flops_exact - attention == pytest.approx(counts.flops_6nactive_d, rel=2e-4)
    assert baseline.budget == "90.43 tokens per active parameter"
    assert lowrank.counts.parameters_active > counts.parameters_active


def test_tokens_are_counted_per_parameter_or_per_active_parameter(tmp_path: Path) -> None:
    text = (SWEEPS / "mini-moe.toml").read_text()
    runs = {}
    for name, changed in {"active": text, "total": text.replace('count = "active"', 'count = "total"')}.items():
        path = tmp_path / f"{name}.toml"
        path.write_text(changed)
        runs[name] = load_sweep(path)[0]
    for name, count in (("active", "parameters_active"), ("total", "parameters")):
        assert runs[name].train.tokens == pytest.approx(10 * getattr(runs[name].counts, count), abs=256)
    assert runs["total"].budget == "10 tokens per parameter"
    assert runs["total"].run_id != runs["active"].run_id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 4, "top_k": 5}, "top_k must be 1 to the number of experts; got 5 of 4; lower it"),
        ({"experts": 4, "top_k": 0}, "top_k must be 1 to the number of experts; got 0 of 4"),
        ({"experts": 4, "top_k": 2, "shared": 0}, "shared must be at least 1; got 0"),
        ({"experts": 4, "top_k": 2, "hidden": 12}, "hidden must be a multiple of 8.*got 12; choose another"),
        ({"experts": 4, "top_k": 3}, r"ffn must be a multiple of top_k \+ shared = 7.*got 64; give `hidden`"),
        ({"experts": 4, "top_k": 2, "balance_weight": -1.0}, "balance_weight must be at least zero"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoE(**settings).fitted(Shape(width=32, heads=2, ffn=64, rank=2, head_size=8))  # type: ignore[arg-type]


def test_the_load_of_experts_is_drawn_from_the_last_evaluation(tmp_path: Path) -> None:
    pytest.importorskip("bokeh")
    from analysis.pages.report import report

    store = load(write_sweep(tmp_path, {"moe": 1.5}, sizes=3, seeds=1))
    assert len(material(store).loads) == 0
    rows = [
        {"run_id": f"moe-{size}-0", "step": step, "task": "text", "tokens": 1}
        | {"metric": f"expert_load.{layer}.{expert}", "value": value + step * (expert - 1)}
        for size, value in (("s1", 1.0), ("s2", 3.0))
        for step in (0, 2)
        for layer in range(2)
        for expert in range(3)
    ]
    evals = pd.concat([store.evals(), pd.DataFrame(rows)], ignore_index=True)
    store.evals = lambda: evals  # type: ignore[method-assign]
    of = material(store)
    assert "expert-load" in draw(of, Answers("transformer", "exact", notes=[]))
    assert '<figure id="expert-load"><h3>Load of the experts</h3>' in report(store, convention="exact")
    figure = expert_load(of.loads, of.done)
    (image,) = figure.axes[0].images  # one arm, at its largest size
    np.testing.assert_array_equal(image.get_array(), [[1.0, 3.0, 5.0]] * 2)
    assert figure.axes[0].get_title() == "moe, s2: at most 5.00"


def test_a_padded_held_out_set_is_not_counted_twice(run: RunConfig, dataset: Dataset) -> None:
    """50 held-out sequences in micro-batches of 8: the mean is that of one pass over all."""
    trainer = assemble(run, dataset, CPU, ALONE)
    evaluation = trainer.evaluate(lambda: False)
    held_out: Examples = trainer.task.held_out
    with torch.no_grad():
        _, losses, measures = trainer.model(torch.from_numpy(held_out.inputs))
    assert evaluation is not None
    assert evaluation.metrics["balance_loss"] == pytest.approx(losses["balance_loss"].mean().item(), rel=1e-5)
    assert evaluation.metrics["expert_load.1.4"] == pytest.approx(
        measures["expert_load.1"][:, 4].mean().item(), rel=1e-5
    )
