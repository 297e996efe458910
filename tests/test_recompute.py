"""Activation checkpointing: the same gradients to the last bit, and what each policy keeps and computes again."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolutions import DEVICE, kernels
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from experiments.data.dataset import Dataset
from experiments.design.config import Execution, RunConfig
from experiments.models.decoder import Decoder
from experiments.parts.short_convolution import LowRankConvolution
from experiments.training.assembly import assemble
from experiments.training.parallel import World

POLICIES = ["none", "block", "attention-kept"]


class Calls(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.name().partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    def of(self, part: str) -> int:
        return sum(count for name, count in self.count.items() if part in name and "backward" not in name)


def decoder(run: RunConfig, policy: str) -> Decoder:
    config = replace(run.model, layers=1, conv=LowRankConvolution(("q",), rank=2))
    model = Decoder(config, 0).to(DEVICE)
    if policy != "none":
        model.recompute(policy)  # type: ignore[arg-type]  # one of the policies
    return model


def loss(model: Decoder) -> torch.Tensor:
    tokens = torch.randint(300, (1, 8), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return F.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten())


def gradients(model: Decoder, of: torch.Tensor | None = None) -> list[torch.Tensor]:
    (loss(model) if of is None else of).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("policy", POLICIES)
def test_gradients_are_equal_and_only_what_is_not_kept_is_computed_again(policy: str, tiny_run: RunConfig) -> None:
    """The model has one layer with one convolution."""
    plain = gradients(decoder(tiny_run, "none"))
    with kernels():
        once, calls = Calls(), Calls()
        with once:
            expected = gradients(decoder(tiny_run, "none"))
        with calls:
            got = gradients(decoder(tiny_run, policy))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    for a, b in zip(got, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    attention, convolutions = calls.of("scaled_dot_product"), calls.of("dynconv::convolve")
    assert (attention, convolutions) == {"block": (2, 2)}.get(policy, (1, 1))
    assert (calls.of("aten::mm") > once.of("aten::mm")) == (policy != "none")


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_attention_is_computed_again_as_it_was_computed(policy: str, tiny_run: RunConfig) -> None:
    """The trainer chooses attention's implementation in the forward pass; backward passes are outside of that."""
    plain, model = decoder(tiny_run, "none"), decoder(tiny_run, policy)
    with sdpa_kernel(SDPBackend.MATH):
        expected, of = gradients(plain), loss(model)
    again = Calls()
    with again:
        got = gradients(model, of)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    assert again.of("scaled_dot_product") == 0  # fused kernels
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_a_run_with_recomputed_activations_is_the_same_run(policy: str, tiny_run: RunConfig, dataset: Dataset) -> None:
    world = World(0, 1, torch.device("cpu"))
    plain = assemble(tiny_run, dataset, Execution(device="cpu"), world)
    other = assemble(tiny_run, dataset, Execution(device="cpu", recompute=policy), world)  # type: ignore[arg-type]
    assert [other.step().loss for _ in range(4)] == [plain.step().loss for _ in range(4)]
