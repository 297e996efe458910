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
    project_together,
)
from dynconv.ops import static_convolution

CHANNELS, WIDTH, GENERATOR = 12, 4, 5


MODULES: dict[str, Callable[[], nn.Module]] = {
    "static": lambda: StaticShortConv(CHANNELS, WIDTH),
    "headwise": lambda: HeadwiseDynamicConv(CHANNELS, GENERATOR, WIDTH, head_size=3),
    "lowrank": lambda: LowRankDynamicConv(CHANNELS, GENERATOR, WIDTH, rank=2),
    "fused headwise": lambda: FusedHeadwiseConv(CHANNELS, WIDTH, head_size=3),
    "fused lowrank": lambda: FusedLowRankConv((8, 4), WIDTH, rank=3),
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
    fused = FusedHeadwiseConv(CHANNELS, WIDTH, head_size=3)
    projection = nn.Linear(5, CHANNELS + fused.generator_columns, bias=False)
    fused.init_projection(projection.weight)
    projected = projection(torch.randn(2, 7, 5))
    expected = static_convolution(projected[..., :CHANNELS], fused.static_filter, residual=True)
    torch.testing.assert_close(fused(projected), expected)


@pytest.mark.parametrize("kind", MODULES)
def test_every_parameter_hints_the_optimizer(kind: str) -> None:
    parameters = dict(_module(kind).named_parameters())
    assert "static_filter" in parameters
    assert all(p.optimizer_hint == {"weight_decay": 0.0, "muon": False} for p in parameters.values())


@pytest.mark.parametrize("kind", MODULES)
def test_copies_and_pickles_are_the_same_module(kind: str) -> None:
    module = _module(kind)
    inputs = _inputs(module)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again(*inputs), module(*inputs))
        assert repr(again) == repr(module)
        assert all(p.optimizer_hint == {"weight_decay": 0.0, "muon": False} for p in again.parameters())


def test_repr_says_what_it_is() -> None:
    assert "channels=12, width=4, residual=True, static_filter=True, heads=4" in repr(_module("headwise"))
    assert "residual=True, static_filter=True, rank=2" in repr(_module("lowrank"))
    assert "residual=True, static_filter=True, rank=3, branches=(8, 4)" in repr(_module("fused lowrank"))
    assert "static_filter=False, rank=16" in repr(FusedLowRankConv((8, 4), static_filter=False))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HeadwiseDynamicConv(12, 4, head_size=5), "head_size must divide the channels; got 5 and 12"),
        (lambda: HeadwiseDynamicConv(12, 4, head_size=0), "head_size must be at least 1; got 0"),
        (lambda: FusedLowRankConv(()), "channels must be at least 1; got 0"),
        (lambda: FusedLowRankConv((8, -4)), "a branch must be at least 1; got -4"),
        (
            lambda: FusedLowRankConv((8, 4), rank=3)(torch.ones(2, 5, 12)),
            "x must have 12 channels and 6 generator columns; got 12 in all; widen",
        ),
        (
            lambda: FusedHeadwiseConv(12, head_size=3)(torch.ones(2, 5, 12)),
            "and 16 generator columns; got 12",
        ),
        (lambda: FusedHeadwiseConv(12, head_size=3).init_projection(torch.ones(12, 5)), "must have 28 rows; got 12"),
        (lambda: StaticShortConv(-6), "channels must be at least 1; got -6"),
        (lambda: StaticShortConv(6, width=0), "width must be at least 1; got 0"),
        (lambda: LowRankDynamicConv(6, 6, rank=0), "rank must be at least 1; got 0"),
        (lambda: FusedLowRankConv((4, 2), rank=0), "rank must be at least 1; got 0"),
        (lambda: LowRankDynamicConv(6, 6)(torch.ones(2, 5, 6)), "needs generator_input"),
    ],
)
def test_errors_say_what_was_got(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


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
