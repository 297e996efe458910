"""RoPE and SwiGLU on maps side by side: kernels and operators against plain torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from convolutions import DEVICE, kernels
from torch import Tensor

from experiments.design.model import ModelConfig
from experiments.models import joined as operators
from experiments.models.attention import _rotation
from experiments.models.decoder import Decoder
from experiments.parts.attention import Attention
from experiments.parts.short_convolution import LowRankConvolution, NoConvolution
from experiments.parts.swiglu import SwiGLU

CPU = torch.device("cpu")


def rotated(joined: Tensor, heads: int, kv_heads: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, channels i and i + E/2 as one complex number that is multiplied by exp(i t theta^(-2i/E))."""
    batch, time, _ = joined.shape
    q, k, v = joined.double().split([heads * size, kv_heads * size, kv_heads * size], 2)
    frequency = 10_000.0 ** (-torch.arange(0, size, 2, dtype=torch.float64, device=joined.device) / size)
    angle = torch.arange(time, dtype=torch.float64, device=joined.device)[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]  # [T, 1, E/2]

    def turned(x: Tensor, many: int) -> Tensor:
        first, second = x.view(batch, time, many, size).chunk(2, 3)
        y = torch.complex(first, second) * turn
        return torch.cat([y.real, y.imag], 3)

    return turned(q, heads), turned(k, kv_heads), v.view(batch, time, kv_heads, size)


def inputs(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


BOUND = {torch.float32: 1e-6, torch.bfloat16: 4.5e-3}  # a result is rounded once, by Triton's interpreter towards zero
DTYPES = pytest.mark.parametrize("dtype", list(BOUND), ids=str)


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(3, 3, 8), (4, 2, 16), (1, 1, 64)])
def test_rotation_by_kernels(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    """Rows of a wider tensor, and a number of heads that does not fill the last program."""
    with kernels():
        from experiments.models import joined_kernels

        width = (heads + 2 * kv_heads) * size
        joined = inputs(2, 13, width + 8, dtype=dtype)[..., :width]
        cosine, sine = _rotation(13, size, 10_000.0, torch.device(DEVICE))
        q, k, v = joined_kernels.rotate(joined, cosine, sine, heads, kv_heads)
        exact = joined.double().requires_grad_()
        want = rotated(exact, heads, kv_heads, size)
        assert relative(q, want[0]) < BOUND[dtype]
        assert relative(k, want[1]) < BOUND[dtype]
        assert torch.equal(v.double(), want[2])
        gradients = [inputs(*each.shape, dtype=dtype, seed=1) for each in want]
        gradients[0] = gradients[0].transpose(1, 2).contiguous().transpose(1, 2)  # as attention may return it
        got = joined_kernels.rotate_backward(*gradients, cosine, sine)
        (expected,) = torch.autograd.grad(want, exact, [each.double() for each in gradients])
        assert relative(got, expected) < BOUND[dtype]


def test_the_operators_agree_with_autograd() -> None:
    joined = inputs(2, 5, 32, dtype=torch.float64).cpu().requires_grad_()
    table = _rotation(5, 8, 10_000.0, CPU)
    table = (table[0].double(), table[1].double())
    assert torch.autograd.gradcheck(lambda x: operators.rotate_joined(x, table, 2, 1), joined)
    arguments = (joined.detach(), *table, 2, 1)
    torch.library.opcheck(torch.ops.experiments.rotate.default, arguments)
    torch.library.opcheck(torch.ops.experiments.rotate_in_place.default, arguments)


@DTYPES
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(3, 3, 8), (4, 2, 16), (5, 1, 2)])
def test_rotation_in_place_by_kernels(heads: int, kv_heads: int, size: int, dtype: torch.dtype) -> None:
    """Neither values nor what lies beside them may be touched."""
    with kernels():
        from experiments.models import joined_kernels

        rotated_width, width = (heads + kv_heads) * size, (heads + 2 * kv_heads) * size
        wide = inputs(2, 13, width + 8, dtype=dtype)
        before = wide.clone()
        joined = wide[..., :width]
        want = rotated(joined.clone(), heads, kv_heads, size)
        joined_kernels.rotate_in_place(joined, *_rotation(13, size, 10_000.0, torch.device(DEVICE)), heads, kv_heads)
        q, k, _ = joined.split([heads * size, kv_heads * size, kv_heads * size], 2)
        assert relative(q, want[0].flatten(2)) < BOUND[dtype]
        assert relative(k, want[1].flatten(2)) < BOUND[dtype]
        assert torch.equal(wide[..., rotated_width:], before[..., rotated_width:])


def swiglu(joined: Tensor) -> Tensor:
    gate, other = joined.chunk(2, 2)
    return gate / (1 + (-gate).exp()) * other


@DTYPES
@pytest.mark.parametrize("hidden", [8, 24, 129])
def test_swiglu_by_kernels(hidden: int, dtype: torch.dtype) -> None:
    """Rows of a wider tensor, written into rows of wider ones, of which nothing else may be touched."""
    with kernels():
        from experiments.models import joined_kernels

        joined = inputs(2, 13, 2 * hidden + 8, dtype=dtype)[..., : 2 * hidden]
        exact = joined.double().requires_grad_()
        want = swiglu(exact)
        wide = torch.full((2, 13, hidden + 8), 7.0, dtype=dtype, device=DEVICE)
        joined_kernels.swiglu(joined, wide[..., :hidden])
        assert relative(wide[..., :hidden], want) < BOUND[dtype]
        assert (wide[..., hidden:] == 7).all()
        dy = inputs(2, 13, hidden + 16, dtype=dtype, seed=1)[..., :hidden]
        (expected,) = torch.autograd.grad(want, exact, dy.double())
        wide = torch.full((2, 13, 2 * hidden + 8), 7.0, dtype=dtype, device=DEVICE)
        joined_kernels.swiglu_backward(dy, joined, wide[..., : 2 * hidden])
        for got, part in zip(wide[..., : 2 * hidden].chunk(2, 2), expected.chunk(2, 2), strict=True):
            assert relative(got, part) < BOUND[dtype]
        assert (wide[..., 2 * hidden :] == 7).all()


def test_the_operator_of_swiglu_agrees_with_autograd() -> None:
    joined = inputs(2, 5, 24, dtype=torch.float64).cpu().requires_grad_()
    assert relative(operators.swiglu_joined(joined), swiglu(joined)) < 1e-15
    assert torch.autograd.gradcheck(operators.swiglu_joined, joined)
    torch.library.opcheck(torch.ops.experiments.swiglu.default, (joined.detach(),))
    torch.library.opcheck(torch.ops.experiments.swiglu_backward.default, (joined.detach()[..., :12], joined.detach()))


@pytest.mark.parametrize("conv", [NoConvolution(), LowRankConvolution(("q", "k", "v", "gate", "up"), rank=2)])
@pytest.mark.filterwarnings("default")  # torch's compiler warns about itself
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_a_model_with_outputs_side_by_side_is_the_same_model(
    conv: NoConvolution | LowRankConvolution, compiled: bool, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """128 channels, which one launch of the low-rank kernels takes, and a hidden width that is padded."""
    torch.compiler.reset()
    config = ModelConfig(1, 128, 64, Attention(2, kv_heads), SwiGLU(120), conv)
    tokens = torch.randint(64, (2, 8), generator=torch.Generator().manual_seed(0))
    calls = []
    joined = operators.rotate_joined
    monkeypatch.setattr("experiments.models.attention.rotate_joined", lambda *a: calls.append(0) or joined(*a))

    def gradients() -> list[Tensor]:
        model = Decoder(config, 0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("conv.up"):
                    parameter.normal_(generator=torch.Generator().manual_seed(1))
        if compiled:
            model.compile(dynamic=False, backend="aot_eager")
        F.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten()).backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    want = gradients()
    assert not calls
    monkeypatch.setattr("experiments.models.short_convolution._shares_products", lambda _: True)
    got = gradients()
    assert calls or (isinstance(conv, LowRankConvolution) and kv_heads == 1)  # 64 channels of keys take another launch
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
