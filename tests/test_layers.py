"""The modules: their start, their prefill and decoding, and the fused forms against the plain ones."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dynconv.layers import (
    FusedHeadwiseConv,
    FusedLowRankConv,
    HeadwiseDynamicConv,
    LowRankDynamicConv,
    StaticShortConv,
    optimizer_groups,
    project_together,
)
from dynconv.ops import static_convolution

CHANNELS, WIDTH, GENERATOR = 12, 4, 5


MODULES: dict[str, Callable[..., nn.Module]] = {
    "static": lambda **more: StaticShortConv(CHANNELS, WIDTH, **more),
    "headwise": lambda **more: HeadwiseDynamicConv(CHANNELS, GENERATOR, WIDTH, head_size=3, **more),
    "lowrank": lambda **more: LowRankDynamicConv(CHANNELS, GENERATOR, WIDTH, rank=2, **more),
    "fused headwise": lambda **more: FusedHeadwiseConv(CHANNELS, GENERATOR, WIDTH, head_size=3, **more),
    "fused lowrank": lambda **more: FusedLowRankConv((8, 4), GENERATOR, WIDTH, rank=3, **more),
}


def _module(kind: str, trained: bool = True) -> nn.Module:
    """Once trained, no parameter is zero, so that every path shows."""
    torch.manual_seed(0)
    module = MODULES[kind]()
    for parameter in module.parameters() if trained else ():
        nn.init.normal_(parameter)
    return module


def _inputs(module: nn.Module, batch: int = 2, time: int = 10) -> tuple[Tensor, Tensor]:
    columns = CHANNELS + getattr(module, "generator_columns", 0)
    return torch.randn(batch, time, columns), torch.randn(batch, time, GENERATOR)


@pytest.mark.parametrize("kind", ["static", "headwise", "lowrank", "fused lowrank"])
def test_a_new_module_is_identity_plus_its_static_filter(kind: str) -> None:
    module = _module(kind, trained=False)
    x, generator_input = _inputs(module)
    expected = static_convolution(x[..., :CHANNELS], module.static_filter, residual=True)
    torch.testing.assert_close(module(x, generator_input), expected)
    assert module.static_filter.abs().max() <= WIDTH**-0.5


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("chunks", [(7, 1, 1, 1), (1,) * 10, (2, 8), (10,)])
def test_prefill_and_steps_give_what_the_whole_gives(kind: str, chunks: tuple[int, ...]) -> None:
    module = _module(kind)
    x, generator_input = _inputs(module)
    parts, state = [], None
    for part, generators in zip(x.split(chunks, 1), generator_input.split(chunks, 1), strict=True):
        y, state = module.prefill(part, generators) if state is None else module.step(part, generators, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), module(x, generator_input))
    assert isinstance(state, Tensor)
    assert torch.equal(state, x[:, -(WIDTH - 1) :, :CHANNELS])


@pytest.mark.parametrize("kind", MODULES)
def test_packed_documents_are_separate(kind: str) -> None:
    module = _module(kind)
    x, generator_input = _inputs(module, batch=1)
    packed = module(x, generator_input, cu_seqlens=torch.tensor([0, 4, 10]))
    apart = [module(a, b) for a, b in zip(x.split([4, 6], 1), generator_input.split([4, 6], 1), strict=True)]
    torch.testing.assert_close(packed, torch.cat(apart, 1))
    prefilled, _ = module.prefill(x, generator_input, cu_seqlens=torch.tensor([0, 4, 10]))
    assert torch.equal(prefilled, packed)


def test_fused_low_rank_is_each_branch_alone() -> None:
    branches, rank = (8, 4), 3
    fused = _module("fused lowrank")
    projected, _ = _inputs(fused)
    got = fused(projected)
    x, z = projected.split([12, 6], 2)
    ups, statics = fused.up.unflatten(1, (WIDTH, 12)).split(branches, 2), fused.static_filter.split(branches, 1)
    for index, (part, generators) in enumerate(zip(x.split(branches, 2), z.split(rank, 2), strict=True)):
        alone = LowRankDynamicConv(branches[index], rank, WIDTH, rank)
        alone.down.weight.data = torch.eye(rank)
        alone.up.data, alone.static_filter.data = ups[index].flatten(1), statics[index]
        torch.testing.assert_close(got.split(branches, 2)[index], alone(part, generators))


def test_fused_headwise_starts_as_its_static_filter() -> None:
    fused = _module("fused headwise", trained=False)
    projected = fused.project(torch.randn(CHANNELS, GENERATOR), torch.randn(2, 7, GENERATOR))
    expected = static_convolution(projected[..., :CHANNELS], fused.static_filter, residual=True)
    torch.testing.assert_close(fused(projected), expected)


@pytest.mark.parametrize("kind", ["headwise", "lowrank"])
def test_a_fused_module_is_the_plain_one_with_its_parameters(kind: str) -> None:
    """The names of the parameters, their values and their groups for optimizers are the same."""
    plain = _module(kind)
    fused = _module("fused headwise") if kind == "headwise" else FusedLowRankConv((12,), GENERATOR, WIDTH, rank=2)
    fused.load_state_dict(plain.state_dict())
    weight, x = torch.randn(CHANNELS, GENERATOR), torch.randn(2, 7, GENERATOR)
    torch.testing.assert_close(fused(fused.project(weight, x)), plain(x @ weight.T, x))
    groups = [{name: list(group) for name, group in optimizer_groups(module).items()} for module in (plain, fused)]
    assert groups[0] == groups[1]
    assert groups[0]["matrices"] == []


class Model(nn.Module):
    """Every kind of convolution beside what else a model has: a tied embedding, gains, biases, a stack of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, CHANNELS)
        self.convolutions = nn.ModuleDict({kind.replace(" ", "_"): make() for kind, make in MODULES.items()})
        self.linear = nn.Linear(CHANNELS, CHANNELS)
        self.norm = nn.LayerNorm(CHANNELS)
        self.experts = nn.Parameter(torch.randn(3, CHANNELS, CHANNELS))
        self.tied, self.head = nn.Linear(CHANNELS, 7, bias=False), nn.Linear(CHANNELS, 7, bias=False)
        self.tied.weight = self.embedding.weight


def _assert_grouped(model: nn.Module) -> None:
    groups = optimizer_groups(model, embeddings=[model.head])
    names = {name: list(group) for name, group in groups.items()}
    assert names["matrices"] == ["linear.weight"]
    assert names["decayed"] == ["experts", "embedding.weight", "head.weight"]
    undecayed = [name for name, _ in model.named_parameters() if name.startswith(("convolutions", "norm"))]
    assert sorted(names["undecayed"]) == sorted([*undecayed, "linear.bias"])
    together = {name: p for group in groups.values() for name, p in group.items()}
    assert all(together[name] is p for name, p in model.named_parameters())
    assert names["undecayed"] == [name for name, _ in model.named_parameters() if name in groups["undecayed"]]


def test_the_types_of_modules_group_parameters_for_optimizers() -> None:
    _assert_grouped(Model())
    assert list(optimizer_groups(Model())["matrices"]) == ["linear.weight", "head.weight"]
    _assert_grouped(copy.deepcopy(Model()))
    with pytest.raises(ValueError, match="embeddings must be modules of the model; got Linear; pass its own"):
        optimizer_groups(Model(), embeddings=[nn.Linear(3, 3)])


def test_groups_outlive_what_replaces_parameters() -> None:
    with torch.device("meta"):
        model = Model()
    model.to_empty(device="cpu")
    for _ in range(2):
        model.tied.weight = model.embedding.weight  # which both have untied
        _assert_grouped(model)
        model.load_state_dict(Model().state_dict(), assign=True)


def test_muon_and_adamw_take_the_groups() -> None:
    model = Model()
    groups = optimizer_groups(model, embeddings=[model.head])
    muon = torch.optim.Muon(groups["matrices"].items(), weight_decay=0.1)
    decayed, undecayed = groups["decayed"].values(), groups["undecayed"].values()
    adamw = torch.optim.AdamW([{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}], weight_decay=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in (muon, adamw):
        optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"linear.weight", "experts", "embedding.weight", "tied.weight", "head.weight"}


@pytest.mark.parametrize("each", [False, True], ids=["the module's reset", "every module's own"])
@pytest.mark.parametrize("kind", MODULES)
def test_reset_gives_a_module_without_memory_its_start(kind: str, each: bool) -> None:
    """The bits of the constructor's values, where the generator that starts at zero is reset by itself, too."""
    torch.manual_seed(3)
    want = MODULES[kind]().state_dict()
    with torch.device("meta"):
        module = MODULES[kind]()
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.constant_(parameter, torch.nan)
    if each:
        for inside in module.modules():
            inside.reset_parameters()
        assert all(torch.equal(v, torch.zeros_like(v)) for k, v in module.state_dict().items() if not want[k].any())
    torch.manual_seed(3)
    module.reset_parameters()
    assert all(torch.equal(value, want[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("kind", MODULES)
def test_modules_are_made_where_and_of_what_they_are_asked_to_be(kind: str) -> None:
    for place in ({"device": "meta", "dtype": torch.float64}, {"dtype": torch.bfloat16}, {"device": "meta"}):
        made = {(p.device.type, p.dtype) for p in MODULES[kind](**place).parameters()}
        assert made == {(place.get("device", "cpu"), place.get("dtype", torch.float32))}


def test_the_first_draws_are_those_of_old() -> None:
    """Of the seed, so that runs repeat: a generator's, though it starts at zero, then the static filter's."""
    torch.manual_seed(5)
    generator, bound = nn.Linear(GENERATOR, CHANNELS // 3 * WIDTH, bias=False), WIDTH**-0.5
    static = torch.empty(WIDTH, CHANNELS).uniform_(-bound, bound)
    torch.manual_seed(5)
    module = HeadwiseDynamicConv(CHANNELS, GENERATOR, WIDTH, head_size=3)
    assert torch.equal(module.static_filter, static)
    assert generator.weight.any()
    assert not module.generator.weight.any()


@pytest.mark.parametrize("kind", MODULES)
def test_copies_and_pickles_are_the_same_module(kind: str) -> None:
    module = _module(kind)
    inputs = _inputs(module)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(*inputs), module(*inputs))
        assert repr(again) == repr(module)


def test_repr_says_what_it_is() -> None:
    assert "channels=12, width=4, residual=True, static_filter=True, heads=4" in repr(_module("headwise"))
    assert "residual=True, static_filter=True, rank=2" in repr(_module("lowrank"))
    assert "residual=True, static_filter=True, rank=3, branches=(8, 4)" in repr(_module("fused lowrank"))
    assert "static_filter=False, rank=16" in repr(FusedLowRankConv((8, 4), 5, static_filter=False))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HeadwiseDynamicConv(12, 4, head_size=5), "head_size must divide the channels; got 5 and 12"),
        (lambda: HeadwiseDynamicConv(12, 4, head_size=0), "head_size must be at least 1; got 0"),
        (lambda: FusedLowRankConv((), 5), "channels must be at least 1; got 0"),
        (lambda: FusedLowRankConv((8, -4), 5), "a branch must be at least 1; got -4"),
        (
            lambda: FusedLowRankConv((8, 4), 5, rank=3)(torch.ones(2, 5, 12)),
            "x must have 12 channels and 6 generator columns; got 12 in all; mind the",
        ),
        (
            lambda: FusedHeadwiseConv(12, 5, head_size=3)(torch.ones(2, 5, 12)),
            "and 16 generator columns; got 12",
        ),
        (
            lambda: FusedHeadwiseConv(12, 5, head_size=3).project(torch.ones(12, 4), torch.ones(2, 5, 4)),
            r"generator_input must be \[B, T, 5\]; got \[2, 5, 4\]; match the maps",
        ),
        (
            lambda: project_together(torch.ones(12, 5), [], torch.ones(2, 5, 4)),
            r"generator_input must be \[B, T, 5\]; got \[2, 5, 4\]; match the maps",
        ),
        (
            lambda: project_together(torch.ones(12, 4), [LowRankDynamicConv(6, 5)], torch.ones(2, 5, 4)),
            r"generator_input must be \[B, T, 5\]; got \[2, 5, 4\]; match the maps",
        ),
        (
            lambda: project_together(torch.ones(12, 4), [], torch.ones(5, 4)),
            r"generator_input must be \[B, T, 4\]; got \[5, 4\]; match the maps",
        ),
        (
            lambda: project_together(torch.ones(12), [], torch.ones(2, 5, 4)),
            r"must be \[D, G\].*; got \[12\]; pass",
        ),
        (
            lambda: project_together(torch.ones(12, 4), [StaticShortConv(6)], torch.ones(2, 5, 4)),
            "convolutions must be HeadwiseDynamicConv or LowRankDynamicConv; got StaticShortConv; leave it out",
        ),
        (
            lambda: LowRankDynamicConv(6, 4)(torch.ones(2, 5, 6), torch.ones(2, 5, 4), generated=torch.ones(2, 5, 16)),
            "generated replaces generator_input; got both; give one of them",
        ),
        (
            lambda: StaticShortConv(6)(torch.ones(2, 5, 6), generated=torch.ones(2, 5, 16)),
            "generated must be None where filters are static or come with x; got one; leave it out",
        ),
        (lambda: StaticShortConv(-6), "channels must be at least 1; got -6"),
        (lambda: StaticShortConv(6, width=0), "width must be at least 1; got 0"),
        (lambda: LowRankDynamicConv(6, 6, rank=0), "rank must be at least 1; got 0"),
        (lambda: LowRankDynamicConv(6, 6, rank=3.5), "rank must be a whole number; got 3.5; choose one of at least 1"),
        (lambda: FusedLowRankConv((4, 2.0), 5), "a branch must be a whole number; got 2.0"),
        (lambda: HeadwiseDynamicConv(6, 12 / 2, head_size=2), "generator_width must be a whole number; got 6.0"),
        (lambda: FusedLowRankConv((4, 2), 5, rank=0), "rank must be at least 1; got 0"),
        (lambda: LowRankDynamicConv(6, 6)(torch.ones(2, 5, 6)), "needs generator_input"),
        (lambda: StaticShortConv(6)(torch.ones(2, 5, 7)), "x must have 6 channels; got 7 in all"),
        (
            lambda: LowRankDynamicConv(6, 4)(torch.ones(2, 5, 6), torch.ones(2, 5, 3)),
            r"generator_input must be \[B, T, 4\] with x's B and T, \[2, 5\]; got \[2, 5, 3\]",
        ),
        (lambda: LowRankDynamicConv(6, 4)(torch.ones(2, 5, 6), torch.ones(2, 3, 4)), "generator_input must be .* got"),
        (
            lambda: HeadwiseDynamicConv(6, 4, head_size=3)(torch.ones(2, 5, 6), generated=torch.ones(2, 5, 7)),
            r"generated must be \[B, T, 8\] with .*; got \[2, 5, 7\]",
        ),
        (
            lambda: StaticShortConv(6).prefill(torch.ones(2, 5, 6), state=torch.ones(2, 2, 6)),
            r"initial_state \(of a step: state\) must be \[N, W-1, D\] = \[2, 3, 6\]; got \[2, 2, 6\]",
        ),
        (lambda: StaticShortConv(6).step(torch.ones(2, 5, 6), None, None), "state must be a tensor; got None"),
        (
            lambda: StaticShortConv(6)(torch.ones(1, 9, 6), torch.tensor([0, 4, 9])),
            r"generator_input must be .*; got torch\.int64",
        ),
        (
            lambda: StaticShortConv(6)(torch.ones(1, 9, 6), torch.ones(1, 6)),
            r"generator_input must be \[B, T, G\] = \[1, 9, 'any'\]; got \[1, 6\]",
        ),
        (lambda: StaticShortConv(6, activation="relu"), "activation must be None or \"silu\"; got 'relu'"),
    ],
)
def test_errors_say_what_was_got(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", MODULES)
def test_activation_is_of_the_convolution(kind: str) -> None:
    torch.manual_seed(0)
    plain, silu = MODULES[kind](), MODULES[kind](activation="silu")
    silu.load_state_dict(plain.state_dict())
    x, generator_input = _inputs(plain)
    own = x[..., :CHANNELS]
    expected = nn.functional.silu(plain(x, generator_input) - own) + own
    torch.testing.assert_close(silu(x, generator_input), expected)
    torch.testing.assert_close(silu.prefill(x, generator_input)[0], expected)
    assert "activation=silu" in repr(silu)
    assert "activation" not in repr(plain)


@pytest.mark.parametrize("kind", ["headwise", "lowrank"])
def test_projecting_together_is_as_each_alone(kind: str) -> None:
    first, second = _module(kind), _module(kind)
    nn.init.normal_(second.generator_map.weight)
    x, generator_input = _inputs(first)
    weight = torch.randn(CHANNELS, GENERATOR)
    y, *made = project_together(weight, [first, second], generator_input)
    torch.testing.assert_close(y, generator_input @ weight.T)
    assert y.stride(1) % 64 == 0  # rows start at cache lines
    for module, generated in zip((first, second), made, strict=True):
        torch.testing.assert_close(module(x, generated=generated), module(x, generator_input))
