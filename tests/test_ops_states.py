"""Final states without a convolution."""

import pytest
import torch
from convolutions import DEVICE, GPU, Case
from torch import Tensor
from torch.autograd import forward_ad

from dynconv import ops
from dynconv.ops import documents

pytestmark = pytest.mark.usefixtures("implementation")
LENGTHS = (5, 0, 1, 12, 2)
EDGES = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0)


def apart(x: Tensor, width: int, before: Tensor | None) -> Tensor:
    """The last inputs of each document by itself."""
    states = []
    for number, document in enumerate(x[0].split([*LENGTHS, x.shape[1] - sum(LENGTHS)])[: len(LENGTHS)]):
        first = x.new_zeros(width - 1, x.shape[2]) if before is None else before[number]
        states.append(torch.cat([first.to(x.dtype), document])[len(document) :])
    return torch.stack(states)


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("width", [1, 2, 4, 21])
def test_states_of_packed_documents(width: int, started: bool, dtype: torch.dtype, integer: torch.dtype) -> None:
    """With padding after the last one, from a view of wider rows, and to the bit, the sign of zeros included."""
    x = torch.randn(1, 23, 300, device=DEVICE).to(dtype)[..., :270]
    x[0, 3:8] = -0.0
    before = torch.randn(5, width - 1, 270, device=DEVICE) if started else None
    with torch.no_grad():
        got = ops.final_state(x, width, cu_seqlens=EDGES.to(integer), initial_state=before)
    want = apart(x, width, before)
    assert got.dtype == dtype
    assert torch.equal(got, want)
    assert torch.equal(got.signbit(), want.signbit())


def test_states_of_a_batch() -> None:
    x, before = torch.randn(2, 5, 6, device=DEVICE), torch.randn(2, 3, 6, device=DEVICE)
    assert torch.equal(ops.final_state(x, 4), x[:, 2:])
    assert torch.equal(ops.final_state(x[:, :1], 4, initial_state=before), torch.cat([before[:, 1:], x[:, :1]], 1))


def test_its_gradient_is_that_of_what_is_kept() -> None:
    x = torch.randn(1, 20, 6, device=DEVICE, requires_grad=True)
    before = torch.randn(5, 3, 6, device=DEVICE, requires_grad=True)
    got = torch.autograd.grad(ops.final_state(x, 4, cu_seqlens=EDGES, initial_state=before).square().sum(), [x, before])
    want = torch.autograd.grad(apart(x, 4, before).square().sum(), [x, before])
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch raises its own where it first derives forward
def test_its_tangent_is_that_of_what_is_kept() -> None:
    values = torch.randn(2, 1, 20, 6, device=DEVICE), torch.randn(2, 5, 3, 6, device=DEVICE)
    with forward_ad.dual_level():
        x, before = (forward_ad.make_dual(*value) for value in values)
        got = forward_ad.unpack_dual(ops.final_state(x, 4, cu_seqlens=EDGES, initial_state=before))
    for derived, primal, state in zip((got.primal, got.tangent), *values, strict=True):
        assert torch.equal(derived, apart(primal, 4, state))


@pytest.mark.parametrize("kind", ["static", "headwise", "lowrank"])
def test_it_is_the_state_that_a_convolution_returns(kind: str) -> None:
    case = Case(kind, batch=1, time=20, documents=LENGTHS, state=True)
    inputs = {name: value.detach() for name, value in case.inputs().items()}
    _, state = case.run(inputs, return_final_state=True)
    got = ops.final_state(inputs["x"], 4, cu_seqlens=EDGES, initial_state=inputs["initial_state"])
    assert torch.equal(got, state)


def test_the_kernel_runs_where_kernels_do(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    calls = []
    original = documents.final_state
    monkeypatch.setattr(documents, "final_state", lambda *given: calls.append(1) or original(*given))
    ops.final_state(torch.randn(1, 20, 6, device=DEVICE), 4, cu_seqlens=EDGES)
    by_kernels = GPU or "[kernels]" in request.node.name
    assert len(calls) == (0 if by_kernels else 1)


@pytest.mark.parametrize(
    ("width", "options", "message"),
    [
        (0, {}, "width must be a whole number of at least 1; got 0"),
        (2.5, {}, "width must be a whole number of at least 1; got 2.5"),
        (4, {"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens needs B = 1; got B = 2"),
        (
            4,
            {"initial_state": torch.ones(2, 4, 6)},
            r"initial_state must be \[N, W-1, D\] = \[2, 3, 6\]; got \[2, 4, 6\]",
        ),
    ],
)
def test_errors_say_what_was_got(width: int, options: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.final_state(torch.ones(2, 5, 6), width, **options)
