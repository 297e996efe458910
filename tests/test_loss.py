"""The chunked cross-entropy against one whole cross-entropy in float64."""

import pytest
import torch
import torch.nn.functional as F
from convolutions import DEVICE, kernels
from torch import Tensor

from experiments.training.loss import IGNORED, _add_product, _chunk, linear_cross_entropy

GPU = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)
devices = pytest.mark.parametrize("device", ["cpu", GPU])


def inputs(device: str, dtype: torch.dtype, vocabulary: int = 300) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, D], weight [V, D] in at least float32, targets [N] of which one in seven is ignored."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(101, 32, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(vocabulary, 32, generator=generator) * 0.3
    weight = weight.to(device, torch.promote_types(dtype, torch.float32)).requires_grad_()
    targets = torch.randint(vocabulary, (101,), generator=generator)
    targets[::7] = IGNORED
    return x, weight, targets.to(device)


def outcome(loss: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, [x, weight])]


def errors(got: list[Tensor], want: list[Tensor]) -> list[float]:
    return [((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want, strict=True)]


def test_small_vocabularies_take_more_tokens_at_a_time() -> None:
    """At most as many logits as of the paper's vocabulary, in chunks of a multiple of 8192 tokens."""
    assert [_chunk(v) // 8192 for v in (4096, 32_000, 50_304, 100_352, 262_144)] == [24, 3, 1, 1, 1]


@devices
@pytest.mark.parametrize("chunk", [1, 32, 101, 8192])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradients_equal_those_of_whole_logits_in_float64(device: str, dtype: torch.dtype, chunk: int) -> None:
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("the kernel computes in float32")
    x, weight, targets = inputs(device, dtype)
    divisor = torch.tensor(3.0, device=device, dtype=torch.promote_types(dtype, torch.float32))
    got = outcome(linear_cross_entropy(x, weight, targets, chunk, divisor), x, weight)
    assert [each.dtype for each in got[1:]] == [x.dtype, weight.dtype]
    exact_x, exact_weight = (each.detach().double().requires_grad_() for each in (x, weight))
    rounded = exact_weight if dtype == torch.float64 else exact_weight.to(dtype).double()
    whole = F.cross_entropy(exact_x @ rounded.T, targets, ignore_index=IGNORED, reduction="sum")
    want = outcome(whole / 3, exact_x, exact_weight)
    # bfloat16: logits, their gradients and the products' results are rounded to 8 bits
    float32 = [1e-6 if device == "cpu" else 1e-5] * 3  # a GPU's exponential is an approximation
    bounds = {torch.float64: [1e-14] * 3, torch.float32: float32, torch.bfloat16: [1e-3, 5e-3, 5e-3]}[dtype]
    assert all(error < bound for error, bound in zip(errors(got, want), bounds, strict=True)), errors(got, want)


@devices
def test_ignored_targets_give_neither_loss_nor_gradient(device: str) -> None:
    x, weight, targets = inputs(device, torch.float32)
    loss, dx, dweight = outcome(linear_cross_entropy(x, weight, targets, 16), x, weight)
    counted = targets != IGNORED
    assert not dx[~counted].any()
    assert dx[counted].any(1).all()
    kept = outcome(linear_cross_entropy(x[counted], weight, targets[counted], 16), x, weight)
    torch.testing.assert_close(kept[0], loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(kept[2], dweight, rtol=1e-5, atol=1e-5)
    nothing = linear_cross_entropy(x, weight, torch.full_like(targets, IGNORED), 16)
    assert outcome(nothing, x, weight)[0] == 0


@devices
def test_without_gradients_the_loss_is_the_same(device: str) -> None:
    x, weight, targets = inputs(device, torch.float32)
    divisor = torch.tensor(3.0, device=device)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, targets, 16, divisor)
    assert loss == linear_cross_entropy(x, weight, targets, 16, divisor).detach()


def test_a_factor_that_the_gradients_would_not_have_is_refused() -> None:
    """On a GPU the same check would end the process."""
    x, weight, targets = inputs("cpu", torch.float32)
    with pytest.raises(RuntimeError, match="give it as `divisor`"):
        (linear_cross_entropy(x, weight, targets) * 0.25).backward()
    other = x.square().sum()
    (linear_cross_entropy(x, weight, targets) + other).backward()  # A sum is no factor.
    (want,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), x)
    torch.testing.assert_close(x.grad, want + 2 * x.detach())


def test_the_gradient_of_the_weight_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd copies gradients that something else still holds."""
    made = []

    def add_product(*args: Tensor) -> Tensor:
        made.append(_add_product(*args))
        return made[-1]

    monkeypatch.setattr("experiments.training.loss._add_product", add_product)
    x, weight, targets = inputs("cpu", torch.float32)
    loss = linear_cross_entropy(x, weight, targets)
    (memory,) = (product.data_ptr() for product in made)
    made.clear()
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() == memory


@devices
@pytest.mark.parametrize("target", [300, -1])
def test_a_target_outside_the_vocabulary_is_not_passed_over(device: str, target: int) -> None:
    x, weight, targets = inputs(device, torch.float32)
    targets[5] = target
    if device == "cpu":
        with pytest.raises(IndexError, match="out of bounds"):
            linear_cross_entropy(x, weight, targets)
    else:
        assert linear_cross_entropy(x, weight, targets).isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [5, 97, 1000, 1024, 40_000])
def test_the_kernel_agrees_with_float64(vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that fit in 256 logits, two in blocks of as many, a large one as it is; on a CPU by Triton's interpreter."""
    with kernels():
        from experiments.training import loss_kernel

        monkeypatch.setattr(loss_kernel, "_SMALL", loss_kernel._Launch(block=256, warps=4))
        generator = torch.Generator().manual_seed(0)
        logits = (4 * torch.randn(11, vocabulary, generator=generator)).to(DEVICE, dtype)
        logits[3] -= 300.0
        targets = torch.randint(vocabulary, (11,), generator=generator).to(DEVICE)
        targets[::5] = IGNORED
        exact = logits.double().requires_grad_()
        want = F.cross_entropy(exact, targets, ignore_index=IGNORED, reduction="sum")
        (want / 3).backward()
        divisor = torch.tensor(3.0, device=DEVICE)
        got = loss_kernel.loss_and_gradient(logits, targets, divisor, IGNORED)
        assert exact.grad is not None
        rounding = {torch.float32: 5e-5, torch.bfloat16: 5e-3}[dtype]  # by the interpreter towards zero
        assert abs(got.item() / want.item() - 1) < 1e-5
        assert ((logits.double() - exact.grad).norm() / exact.grad.norm()).item() < rounding
        assert not logits[::5].any()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf, -torch.inf, "target"])
@pytest.mark.parametrize("block", [256, 512])  # smaller than a row, and larger
def test_the_kernel_hides_nothing_that_is_not_finite(
    spoiled: float | str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kernels():
        from experiments.training import loss_kernel

        monkeypatch.setattr(loss_kernel, "_SMALL", loss_kernel._Launch(block=block, warps=4))
        logits, targets = torch.zeros(3, 300, device=DEVICE), torch.zeros(3, dtype=torch.int64, device=DEVICE)
        if isinstance(spoiled, str):
            targets[1] = 300
        else:
            place = slice(None) if spoiled == -torch.inf else 7  # One logit may be -inf: its probability is zero.
            logits[1, place] = spoiled
        divisor = torch.ones((), device=DEVICE)
        assert loss_kernel.loss_and_gradient(logits, targets, divisor, IGNORED).isnan()
