"""Our AdamW and Muon against torch's: the same weights and state after several steps, and the flag that skips one."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from convolutions import DEVICE, kernels
from torch import nn

from experiments.training.muon import Muon, orthogonalised

SHAPES = [(32, 32), (48, 32), (32, 48), (32, 32)]  # Muon updates the first and the last together, and the two between


def large_adamw(groups: Any) -> torch.optim.Optimizer:
    from experiments.training.adamw import LargeAdamW

    return LargeAdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-10, fused=True)


def torch_adamw(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-10, fused=True)


def muon(groups: Any) -> torch.optim.Optimizer:
    return Muon(groups, lr=1e-2, momentum=0.95, weight_decay=0.1)


def torch_muon(groups: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon(groups, lr=1e-2, momentum=0.95, adjust_lr_fn="match_rms_adamw")


def parameters(shapes: Sequence[tuple[int, ...]]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(DEVICE)) for shape in shapes]


def groups_of(matrices: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": matrices[:2], "weight_decay": 0.1}, {"params": matrices[2:], "weight_decay": 0.0}]


def step(
    optimizer: torch.optim.Optimizer, matrices: list[nn.Parameter], number: int, scale: float = 1.0, stop: bool = False
) -> None:
    generator = torch.Generator().manual_seed(number)
    for matrix in matrices:
        matrix.grad = (torch.randn(matrix.shape, generator=generator) * scale).to(DEVICE)
    if stop:
        matrices[1].grad[0, 0] = math.nan
    optimizer.grad_scale = torch.tensor(scale, device=DEVICE)
    optimizer.found_inf = torch.tensor(float(stop), device=DEVICE)
    optimizer.step()


@pytest.fixture(autouse=True)
def _interpreted() -> Any:
    with kernels():
        yield


PAIRS = pytest.mark.parametrize(("ours", "theirs"), [(large_adamw, torch_adamw), (muon, torch_muon)])
Make = Callable[[Any], torch.optim.Optimizer]


@PAIRS
def test_the_same_weights_and_state_as_torch_s(ours: Make, theirs: Make) -> None:
    """Gradients are clipped by 4 through `grad_scale` in ours, and are small from the start in torch's."""
    mine, other = parameters(SHAPES), parameters(SHAPES)
    initial = [each.detach().clone() for each in mine]
    one, two = ours(groups_of(mine)), theirs(groups_of(other))
    for number in range(6):
        step(one, mine, number, scale=4.0)
        step(two, other, number)
    bound = 1e-6 if DEVICE == "cpu" else 1e-2  # products of several matrices in bfloat16 are added in another order
    for before, a, b in zip(initial, mine, other, strict=True):
        assert (a - b).norm() < bound * (b - before).norm()
        assert one.state[a].keys() == two.state[b].keys()
        for name, value in one.state[a].items():
            torch.testing.assert_close(value, two.state[b][name], rtol=1e-5, atol=1e-7)


def test_matrices_beyond_the_largest_stack_are_updated_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = parameters(SHAPES), parameters(SHAPES)
    step(muon(groups_of(together)), together, 0)
    monkeypatch.setattr("experiments.training.muon._LARGEST_STACK", 1)
    step(muon(groups_of(apart)), apart, 0)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@PAIRS
def test_a_step_that_is_skipped_changes_nothing(ours: Make, theirs: Make) -> None:  # noqa: ARG001
    matrices = parameters(SHAPES)
    optimizer = ours(groups_of(matrices))
    step(optimizer, matrices, 0)

    def everything() -> list[torch.Tensor]:
        states = [value for matrix in matrices for value in optimizer.state[matrix].values()]
        return [each.detach().clone() for each in (*matrices, *states)]

    before = everything()
    step(optimizer, matrices, 1, stop=True)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    step(optimizer, matrices, 1)
    assert not any(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


def test_matrices_are_orthogonalised_each_by_itself() -> None:
    """Between the singular values 0.7 and 1.2, and close to the orthogonal matrix of the polar decomposition."""
    generator = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 24, 40, generator=generator) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    for matrix, result in zip(stack, orthogonalised(stack.to(DEVICE)).cpu().double(), strict=True):
        values = torch.linalg.svdvals(result)
        assert 0.65 < values.min() < values.max() < 1.25
        left, _, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        polar = left @ right
        assert (result * polar).sum() / (result.norm() * polar.norm()) > 0.97
