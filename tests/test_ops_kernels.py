"""The kernels against a float64 oracle: on the GPU where there is one, else in Triton's interpreter."""

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from convolutions import BOUND, DEVICE, FUNCTIONS, GPU, Case, assert_close, cases, errors, relative_error
from hypothesis import given, settings
from torch import Tensor

from dynconv.ops import reference

pytestmark = pytest.mark.usefixtures("by_kernels")
CASES = 12 if GPU else 60  # on a GPU each compiles its kernels anew


@settings(max_examples=CASES, deadline=None, derandomize=True)
@given(cases())
def test_any_shape_agrees_with_the_oracle(case: Case) -> None:
    assert_close(case, slack=2.0)  # a sum of a few terms can be unlucky


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_each_kind_and_dtype_agrees_with_the_oracle(kind: str, dtype: torch.dtype) -> None:
    assert_close(Case(kind, heads=9, time=70, rank=16, dtype=dtype))


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_each_width_agrees_with_the_oracle(kind: str, width: int) -> None:
    assert_close(Case(kind, width=width, dtype=torch.bfloat16))


@pytest.mark.parametrize("head_size", [250, 256])
def test_large_heads_agree_with_the_oracle(head_size: int) -> None:
    assert_close(Case("headwise", heads=2, head_size=head_size))


@dataclass(frozen=True)
class Poisoned(Case):
    """The output, or the gradient of an input, is NaN at one place."""

    where: str = "y"

    def inputs(self) -> dict[str, Tensor]:
        made = super().inputs()
        if self.where in made:
            made[self.where].register_hook(self.spoiled)
        return made

    def run(self, inputs: dict[str, Tensor], **more: Any) -> Any:
        y = super().run(inputs, **more)
        return self.spoiled(y) if self.where == "y" else y

    @staticmethod
    def spoiled(value: Tensor) -> Tensor:
        poison = torch.zeros_like(value)
        poison.view(-1)[3] = torch.nan
        return value + poison


@pytest.mark.parametrize("where", ["", "y", "x", "z", "U", "static_w"])
def test_the_bound_rejects_nan(where: str) -> None:
    with pytest.raises(AssertionError) if where else contextlib.nullcontext():
        assert_close(Poisoned(where=where))


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_bound_rejects_a_wrong_tap_and_a_shift(kind: str) -> None:
    case = Case(kind, dtype=torch.bfloat16, heads=9, time=70)
    name = {"static": "weight", "headwise": "weight", "lowrank": "U"}[kind]

    def scale_a_tap(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        value = inputs[name]
        scale = torch.ones(case.width, device=DEVICE, dtype=torch.float64)
        scale[2] = 0.9
        wide = scale[:, None] if kind == "static" else scale
        if kind == "lowrank":
            wide = scale.repeat_interleave(case.channels)
        return inputs | {name: value * wide}

    def shift(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs | {"x": inputs["x"].roll(1, 1)}

    of_filters = case.inputs().keys() - {"x"}
    for spoil, spoiled in ((scale_a_tap, {"x", "z"} & case.per_token), (shift, of_filters)):
        measured = errors(case, spoil)
        assert measured["y"] > 2e-2, measured
        assert all(measured[name] > 2e-2 for name in spoiled & measured.keys()), measured


PACKED = [Case(kind, batch=1, documents=(9, 1, 27)) for kind in FUNCTIONS]
if GPU:  # the kernels that a GPU alone runs
    ways = [{"activation": activation, "dtype": torch.bfloat16} for activation in (None, "silu")]
    PACKED += [replace(case, heads=12, head_size=16, rank=16, **way) for case in PACKED for way in ways]


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_nothing_reads_the_future_or_another_document(case: Case) -> None:
    inputs = {name: value.detach() for name, value in case.inputs().items()}
    before = case.run(inputs)
    poisoned = dict(inputs, x=inputs["x"].clone())
    poisoned["x"][:, 9] = torch.nan
    poisoned["x"][:, 20:] = torch.nan
    after = case.run(poisoned)
    assert torch.equal(after[:, :9], before[:, :9])
    assert torch.equal(after[:, 10:20], before[:, 10:20])


@pytest.mark.parametrize("case", PACKED, ids=str)
def test_gradients_do_not_leak_across_documents(case: Case) -> None:
    inputs = case.inputs()
    dy = torch.zeros(1, 37, case.channels, device=DEVICE)
    dy[:, 9:] = torch.nan
    (dx,) = torch.autograd.grad(case.run(inputs), [inputs["x"]], dy)
    assert torch.equal(dx[:, :9], torch.zeros_like(dx[:, :9]))


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_final_states_of_packed_documents(kind: str) -> None:
    case = Case(kind, batch=1, documents=(9, 1, 27), state=True)
    inputs = case.inputs()
    edges = torch.tensor([0, 9, 10, 37], device=DEVICE)
    _, states = FUNCTIONS[kind](**inputs, cu_seqlens=edges, return_final_state=True)
    x, before = inputs["x"][0], inputs["initial_state"]
    assert torch.equal(states[0], x[6:9])
    assert torch.equal(states[1], torch.cat([before[1, 1:], x[9:10]]))
    assert torch.equal(states[2], x[34:37])


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_two_runs_give_the_same_bits(kind: str) -> None:
    case = Case(kind, dtype=torch.bfloat16, time=70)
    inputs = case.inputs()
    first, second = (torch.autograd.grad(case.run(inputs).float().sum(), list(inputs.values())) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


KINDS = [Case(kind, activation=activation) for kind in FUNCTIONS for activation in (None, "silu")]
KINDS += [replace(case, static=False) for case in KINDS if case.kind != "static"]
SUBSETS = [*KINDS]
if GPU:  # the kernels that a GPU alone runs
    of_gpu = {"heads": 9, "head_size": 16, "dtype": torch.bfloat16}
    SUBSETS += [Case(kind, activation=a, **of_gpu) for kind in ("static", "headwise") for a in (None, "silu")]
    SUBSETS += [Case(rank=rank, **of_gpu) for rank in (15, 16, 20)]
    SUBSETS += [Case(activation="silu", **of_gpu)]


@pytest.mark.parametrize("case", SUBSETS, ids=str)
def test_gradients_only_where_asked(case: Case) -> None:
    """Each alone, and all but each; as they are with all of them."""
    full = case.inputs()
    y = case.run(full)
    dy = torch.randn_like(y)
    gradients = dict(zip(full, torch.autograd.grad(y, list(full.values()), dy), strict=True))
    for wanted in {subset for name in full for subset in (frozenset({name}), frozenset(full.keys() - {name}))}:
        inputs = {name: value.detach().requires_grad_(name in wanted) for name, value in full.items()}
        case.run(inputs).backward(dy)
        assert {name for name, value in inputs.items() if value.grad is not None} == wanted
        for name in wanted:
            error = relative_error(inputs[name].grad, gradients[name].double())  # type: ignore[arg-type]
            assert error < BOUND[case.dtype], (name, wanted, error)


def arguments(case: Case, inputs: dict[str, Tensor], positions: Tensor | None = None) -> tuple[Any, ...]:
    """Of the operator and of the reference."""
    weight = {"static": None, "headwise": inputs.get("weight"), "lowrank": inputs.get("U")}[case.kind]
    static = inputs["weight"] if case.kind == "static" else inputs.get("static_w")
    options = (case.segments or (case.channels,), case.residual, case.activation == "silu")
    return (inputs["x"], inputs.get("z"), weight, static, positions, *options)


@pytest.mark.parametrize("case", KINDS, ids=str)
def test_the_custom_op_passes_opcheck(case: Case) -> None:
    small = replace(case, time=9, heads=2)
    torch.library.opcheck(torch.ops.dynconv.convolve.default, arguments(small, small.inputs()))


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_empty_inputs(kind: str) -> None:
    for batch, time in ((0, 5), (2, 0)):
        case = Case(kind, batch=batch, time=time)
        inputs = case.inputs()
        y = case.run(inputs)
        assert y.shape == (batch, time, case.channels)
        y.sum().backward()
        assert all(value.grad is not None and not value.grad.any() for value in inputs.values())


def test_the_reference_agrees_with_the_oracle() -> None:
    for kind in FUNCTIONS:
        case = Case(kind, batch=1, documents=(9, 1, 27), segments=(5, 30) if kind == "lowrank" else ())
        inputs = {name: value.detach().double() for name, value in case.inputs().items()}
        positions = torch.cat([*map(torch.arange, case.documents), torch.zeros(1)]).to(DEVICE)
        y = reference.convolve(*arguments(case, inputs, positions))
        assert relative_error(y, case.oracle(inputs)) < 1e-14
