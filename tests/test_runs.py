"""Documents given by seq_idx: rows of a batch that hold several each, with padding between and after them."""

from dataclasses import replace
from itertools import groupby
from typing import Any

import pytest
import torch
from convolutions import BOUND, DEVICE, FUNCTIONS, Case, relative_error
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dynconv.layers import LowRankDynamicConv
from dynconv.ops import static_convolution

pytestmark = pytest.mark.usefixtures("implementation")
EACH_KIND = pytest.mark.parametrize("kind", FUNCTIONS)
ROWS = [
    [0] * 5 + [-1] * 2 + [1] + [2] * 9 + [-1],
    [3] * 2 + [0] * 4 + [3] * 12,  # a number may come again
    [-1] * 3 + [7] * 15,
    [-1] * 18,
]


def runs(row: list[int]) -> list[tuple[int, slice]]:
    """The value of each run, and where it lies."""
    found, begin = [], 0
    for value, same in groupby(row):
        length = len(list(same))
        found.append((value, slice(begin, begin + length)))
        begin += length
    return found


def oracle(case: Case, inputs: dict[str, Tensor]) -> Tensor:
    """Each document by itself; zeros where there is none."""
    rows = []
    for index, row in enumerate(ROWS):
        parts = []
        for value, window in runs(row):
            here = {n: v[index : index + 1, window] if n in case.per_token else v for n, v in inputs.items()}
            alone = replace(case, batch=1, time=window.stop - window.start)
            parts.append(alone.oracle(here) if value >= 0 else torch.zeros_like(here["x"]))
        rows.append(torch.cat(parts, 1))
    return torch.cat(rows)


def spoiled(case: Case, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs, with NaN wherever there is padding."""
    inside = torch.tensor(ROWS, device=DEVICE) >= 0

    def spoil(value: Tensor) -> Tensor:
        return torch.where(inside.view(*inside.shape, *[1] * (value.dim() - 2)), value.detach(), torch.nan)

    return {n: (spoil(v) if n in case.per_token else v.detach()).requires_grad_() for n, v in inputs.items()}


@pytest.mark.parametrize("integer", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@EACH_KIND
def test_documents_of_a_batch_of_rows(
    kind: str, dtype: torch.dtype, activation: str | None, integer: torch.dtype
) -> None:
    """Against float64, gradients included; what padding holds, and the gradients of its outputs, are NaN."""
    case = Case(kind, batch=4, time=18, activation=activation, dtype=dtype)
    inputs = case.inputs()
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    want = oracle(case, exact)
    dy = torch.randn_like(inputs["x"])
    inputs = spoiled(case, inputs)
    y = case.run(inputs, seq_idx=torch.tensor(ROWS, dtype=integer, device=DEVICE))
    inside = (torch.tensor(ROWS, device=DEVICE) >= 0)[..., None]
    got = [y, *torch.autograd.grad(y, list(inputs.values()), torch.where(inside, dy, torch.nan))]
    expected = [want, *torch.autograd.grad(want, list(exact.values()), torch.where(inside, dy.double(), 0.0))]
    measured = [relative_error(g, w) for g, w in zip(got, expected, strict=True)]
    assert all(error < 1.5 * BOUND[dtype] for error in measured), measured
    assert not y[~inside.expand_as(y)].any()


@EACH_KIND
def test_a_bias_and_the_residual_of_another_tensor(kind: str) -> None:
    case = Case(kind, batch=4, time=18, residual=False)
    inputs = case.inputs()
    more = {"bias": torch.randn(case.channels), "residual": torch.randn_like(inputs["x"], device="cpu")}
    more = {name: value.to(DEVICE).requires_grad_() for name, value in more.items()}
    exact = {name: value.detach().double().requires_grad_() for name, value in (inputs | more).items()}
    inside = (torch.tensor(ROWS, device=DEVICE) >= 0)[..., None]
    convolved = oracle(case, {name: exact[name] for name in inputs})
    want = torch.where(inside, torch.nn.functional.silu(convolved + exact["bias"]) + exact["residual"], 0.0)
    options: dict[str, Any] = {"seq_idx": torch.tensor(ROWS, device=DEVICE), "activation": "silu"}
    y = FUNCTIONS[kind](**spoiled(case, inputs), **more, **options)
    assert relative_error(y, want) < 2 * BOUND[torch.float32]
    got = torch.autograd.grad(y.square().sum(), list(more.values()))
    expected = torch.autograd.grad(want.square().sum(), [exact[name] for name in more])
    assert all(relative_error(g, w) < 2 * BOUND[torch.float32] for g, w in zip(got, expected, strict=True))


@EACH_KIND
def test_rows_of_one_document_are_as_without(kind: str) -> None:
    case = Case(kind, batch=2, time=18)
    inputs = {name: value.detach() for name, value in case.inputs().items()}
    got = case.run(inputs, seq_idx=torch.zeros(2, 18, dtype=torch.int32, device=DEVICE))
    torch.testing.assert_close(got, case.run(inputs), rtol=1e-6, atol=1e-6)


class HostReads(TorchDispatchMode):
    """Counts the operators that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "masked_select", "unique2", "unique_consecutive", "item"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@EACH_KIND
def test_no_value_is_read_on_the_host(kind: str) -> None:
    """With the other way to pack documents, too, where they begin from states."""
    case = Case(kind, batch=4, time=18)
    inputs = case.inputs()
    packed = Case(kind, batch=1, time=18, documents=(5, 0, 1, 12), state=True)
    values, edges = packed.inputs(), packed.options()["cu_seqlens"]
    with HostReads() as reads:
        case.run(inputs, seq_idx=torch.tensor(ROWS).to(DEVICE)).sum().backward()
        y, state = packed.run(values, cu_seqlens=edges, return_final_state=True)
        (y.sum() + state.sum()).backward()
    assert reads.found == []
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert case.run(inputs, seq_idx=torch.tensor(ROWS, device=DEVICE)).shape == inputs["x"].shape


@pytest.mark.parametrize(("batch", "time"), [(0, 5), (2, 0)])
def test_no_tokens(batch: int, time: int) -> None:
    seq_idx = torch.zeros(batch, time, dtype=torch.int32, device=DEVICE)
    y = static_convolution(torch.ones(batch, time, 6, device=DEVICE), torch.ones(4, 6, device=DEVICE), seq_idx=seq_idx)
    assert y.shape == (batch, time, 6)


def test_a_module_takes_them() -> None:
    torch.manual_seed(0)
    module = LowRankDynamicConv(6, 5, rank=3).to(DEVICE)
    torch.nn.init.normal_(module.up)
    x, made_from = torch.randn(1, 9, 6, device=DEVICE), torch.randn(1, 9, 5, device=DEVICE)
    seq_idx = torch.tensor([[4] * 3 + [2] * 6], device=DEVICE)
    want = module(x, made_from, cu_seqlens=torch.tensor([0, 3, 9], device=DEVICE))
    torch.testing.assert_close(module(x, made_from, seq_idx=seq_idx), want)


X, W = torch.randn(2, 5, 6, device=DEVICE), torch.ones(4, 6, device=DEVICE)
ONE = torch.zeros(2, 5, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_idx": [[0] * 5] * 2}, "seq_idx must be a tensor; got a list; pass torch.tensor"),
        ({"seq_idx": ONE[:1]}, r"seq_idx must be \[B, T\] = \[2, 5\], int32 or int64; got \[1, 5\] torch.int32;"),
        ({"seq_idx": ONE.float()}, r"int32 or int64; got \[2, 5\] torch.float32"),
        ({"seq_idx": ONE.to("meta")}, "seq_idx must be on .*; got meta; move it"),
        ({"seq_idx": ONE, "cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must be None where seq_idx is given"),
        ({"seq_idx": ONE, "initial_state": X[:, :3]}, "initial_state must be None where seq_idx is given; got both"),
        ({"seq_idx": ONE, "return_final_state": True}, "seq_idx has no final states; got return_final_state; pass"),
    ],
)
def test_errors_say_what_was_got(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        static_convolution(X, W, **options)
