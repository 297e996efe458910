"""The modules: their start, their prefill and decoding, and the fused forms against the plain ones."""

import pytest
import torch
from torch import Tensor, nn

from dynconv.layers import (
    FusedHeadwiseConv,
    FusedLowRankConv,
    HeadwiseDynamicConv,
    LowRankDynamicConv,
    StaticShortConv,
)
from dynconv.ops import static_convolution

CHANNELS, WIDTH, GENERATOR = 12, 4, 5


def _modules() -> list[nn.Module]:
    torch.manual_seed(0)
    return [
        StaticShortConv(CHANNELS, WIDTH),
        HeadwiseDynamicConv(CHANNELS, GENERATOR, WIDTH, head_size=3),
        LowRankDynamicConv(CHANNELS, GENERATOR, WIDTH, rank=2),
    ]


def _trained(module: nn.Module) -> nn.Module:
    """With no parameter left at zero, so that every path shows."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_a_new_module_is_identity_plus_its_static_filter(kind: int) -> None:
    module = _modules()[kind]
    x, generator_input = torch.randn(2, 6, CHANNELS), torch.randn(2, 6, GENERATOR)
    expected = static_convolution(x, module.static_filter, residual=True)
    torch.testing.assert_close(module(x, generator_input), expected)
    assert module.static_filter.abs().max() <= WIDTH**-0.5


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize("chunks", [(7, 1, 1, 1), (1,) * 10, (2, 8), (10,)])
def test_prefill_and_steps_give_what_the_whole_gives(kind: int, chunks: tuple[int, ...]) -> None:
    module = _trained(_modules()[kind])
    x, generator_input = torch.randn(2, 10, CHANNELS), torch.randn(2, 10, GENERATOR)
    parts, state = [], None
    for part, generators in zip(x.split(chunks, 1), generator_input.split(chunks, 1), strict=True):
        y, state = module.prefill(part, generators) if state is None else module.step(part, generators, state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), module(x, generator_input))
    assert isinstance(state, Tensor)
    assert torch.equal(state, x[:, -(WIDTH - 1) :])


@pytest.mark.parametrize("kind", [0, 1, 2])
def test_packed_documents_are_separate(kind: int) -> None:
    module = _trained(_modules()[kind])
    x, generator_input = torch.randn(1, 10, CHANNELS), torch.randn(1, 10, GENERATOR)
    packed = module(x, generator_input, cu_seqlens=torch.tensor([0, 4, 10]))
    apart = [module(a, b) for a, b in zip(x.split([4, 6], 1), generator_input.split([4, 6], 1), strict=True)]
    torch.testing.assert_close(packed, torch.cat(apart, 1))


def test_fused_low_rank_is_each_branch_alone() -> None:
    branches, rank = (8, 4), 3
    fused = _trained(FusedLowRankConv(branches, WIDTH, rank))
    projected = torch.randn(2, 7, sum(branches) + fused.generator_columns)
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


def test_every_parameter_hints_the_optimizer() -> None:
    for module in (*_modules(), FusedLowRankConv((8, 4)), FusedHeadwiseConv(CHANNELS, head_size=3)):
        hints = {name: getattr(parameter, "optimizer_hint", None) for name, parameter in module.named_parameters()}
        assert "static_filter" in hints
        assert all(hint == {"weight_decay": 0.0, "muon": False} for hint in hints.values()), hints


def test_repr_says_what_it_is() -> None:
    assert "channels=12, width=4, residual=True, heads=4" in repr(_modules()[1])


def test_a_head_size_that_does_not_divide_raises() -> None:
    with pytest.raises(ValueError, match="head_size must divide the channels; got 5 and 12"):
        HeadwiseDynamicConv(12, 4, head_size=5)
