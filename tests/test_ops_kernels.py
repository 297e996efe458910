"""The kernels against a float64 oracle: on the GPU where there is one, else in Triton's interpreter."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from convolutions import BOUND, DEVICE, FUNCTIONS, GPU, Case, assert_close, cases, errors, kernels, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynconv.ops import headwise, launch, operator, reference, tiles

CASES = 12 if GPU else 60  # on a GPU each compiles its kernels anew


@pytest.fixture(scope="module", autouse=True)
def by_kernels() -> Iterator[None]:
    with kernels():
        yield


@settings(max_examples=CASES, deadline=None, derandomize=True)
@given(cases())
def test_any_shape_agrees_with_the_oracle(case: Case) -> None:
    assert_close(case, slack=2.0)  # a sum of a few terms can be unlucky


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_each_kind_and_dtype_agrees_with_the_oracle(kind: str, dtype: torch.dtype) -> None:
    assert_close(Case(kind, heads=9, time=70, rank=16, dtype=dtype))


@contextlib.contextmanager
def longer_runs(module: Any) -> Iterator[None]:
    """Programs of as many time steps as on a device of one multiprocessor, where small inputs fill it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_repeats", {})
        patch.setattr(module, "multiprocessors", lambda _: 1)
        yield


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, time=300, heads=4, head_size=16, rank=16),
        Case(batch=2, time=77, heads=3, head_size=16, rank=15, static=False),
        Case(batch=3, time=1, heads=1, head_size=16, rank=1, width=1, residual=False),
        Case(batch=1, time=200, heads=172, head_size=16, rank=16, width=3),  # D = 2752, a model's FFN
        Case(batch=2, time=150, rank=5, segments=(256, 128), width=2),
        Case(batch=1, time=190, rank=16, segments=(128, 128, 128)),
        Case(batch=1, heads=12, head_size=16, rank=16, documents=(1, 40, 2, 3, 190, 64), time=300),
        Case(batch=1, rank=9, segments=(256, 128), documents=(70, 0, 129), time=199, static=False, width=3),
        Case(batch=2, time=130, heads=9, head_size=16, rank=40),
        Case(batch=1, time=190, rank=20, segments=(256, 128, 128)),
        Case(batch=1, time=170, rank=32, segments=(128, 256), residual=False),
        Case(batch=1, rank=15, segments=(256, 128), documents=(70, 0, 129), time=199),
        Case(batch=2, time=300, rank=64, segments=(128, 256)),
        Case(batch=1, time=131, rank=80, heads=9, head_size=16, static=False),
        Case(batch=1, time=199, rank=100, segments=(256, 128), documents=(70, 0, 129), residual=False),
        Case(batch=1, time=190, rank=128, heads=12, head_size=16),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_tensor_core_kernels_agree_with_the_oracle(case: Case, dtype: torch.dtype) -> None:
    from dynconv.ops import lowrank_mma

    case = replace(case, dtype=dtype)
    inputs = case.inputs()
    assert lowrank_mma.fits(inputs["x"], inputs["U"], case.segments or (case.channels,))
    assert_close(case)
    with longer_runs(lowrank_mma):
        assert_close(case)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(
    "case",
    [
        Case("headwise", batch=2, time=300, heads=40, head_size=16),
        Case("headwise", batch=1, time=77, heads=12, head_size=8, static=False),
        Case("headwise", batch=2, time=9, heads=48, head_size=1),
        Case("headwise", batch=1, time=130, heads=80, head_size=4, residual=False),
        Case("headwise", batch=3, time=1, heads=8, head_size=2, width=2),
        Case("headwise", batch=1, time=300, heads=12, head_size=16, documents=(1, 40, 2, 3, 190, 64)),
        Case("static", batch=2, time=555, heads=9, head_size=16),
        Case("static", batch=1, time=300, heads=12, head_size=16, documents=(1, 40, 2, 3, 190, 64), residual=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_ring_kernels_agree_with_the_oracle(case: Case, dtype: torch.dtype) -> None:
    from dynconv.ops import ring

    case = replace(case, dtype=dtype)
    inputs = case.inputs()
    assert ring.fits(inputs["x"], inputs["weight"] if case.kind == "headwise" else None, case.width)
    with pytest.MonkeyPatch.context() as patch:  # wherever they fit, whether or not they are the faster there
        patch.setattr(launch, "_repeats", {})
        patch.setattr(headwise, "_by_ring", lambda *_, **__: True)
        for activation in (None, "silu"):
            assert_close(replace(case, activation=activation))
            with longer_runs(ring):
                assert_close(replace(case, activation=activation))


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

    for spoil in (scale_a_tap, shift):
        measured = errors(case, spoil)
        assert min(measured.values()) > BOUND[torch.bfloat16] or measured["y"] > 2e-2, measured


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_nothing_reads_the_future_or_another_document(kind: str) -> None:
    case = Case(kind, batch=1, documents=(9, 1, 27))
    inputs = {name: value.detach() for name, value in case.inputs().items()}
    before = case.run(inputs)
    poisoned = dict(inputs, x=inputs["x"].clone())
    poisoned["x"][:, 9] = torch.nan
    poisoned["x"][:, 20:] = torch.nan
    after = case.run(poisoned)
    assert torch.equal(after[:, :9], before[:, :9])
    assert torch.equal(after[:, 10:20], before[:, 10:20])


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_gradients_do_not_leak_across_documents(kind: str) -> None:
    case = Case(kind, batch=1, documents=(9, 28))
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


SUBSETS = [Case(kind, activation=activation) for kind in FUNCTIONS for activation in (None, "silu")]
SUBSETS += [Case(kind, static=False) for kind in ("headwise", "lowrank")]
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
    for name in full:
        for wanted in ({name}, full.keys() - {name}):
            inputs = {n: value.detach().requires_grad_(n in wanted) for n, value in full.items()}
            case.run(inputs).backward(dy)
            assert {n for n, value in inputs.items() if value.grad is not None} == wanted
            for n in wanted:
                error = relative_error(inputs[n].grad, gradients[n].double())  # type: ignore[arg-type]
                assert error < BOUND[case.dtype], (n, wanted, error)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize(
    "case",
    [
        Case("static", heads=9, head_size=16, dtype=torch.bfloat16),
        Case("headwise", heads=9, head_size=16, dtype=torch.bfloat16),
        Case("headwise", heads=9, head_size=7),
        Case("lowrank", rank=15, segments=(256, 128), dtype=torch.bfloat16),
        Case("lowrank", rank=40, segments=(128, 128), dtype=torch.bfloat16),
        Case("lowrank", rank=16, heads=2),
    ],
    ids=str,
)
def test_repeated_launches_give_the_same_bits(case: Case) -> None:
    """Of the calls after the first one with a signature only launches are repeated."""

    def results(inputs: dict[str, Tensor]) -> list[Tensor]:
        y = case.run(inputs)
        return [y, *torch.autograd.grad(y, list(inputs.values()), torch.ones_like(y))]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_repeats", {})
        results(case.inputs())
        assert [callable(again) for again in launch._repeats.values()] == [True, True]
        others = {name: torch.randn_like(value).requires_grad_() for name, value in case.inputs().items()}
        got = results(others)
        for run in ("_forward", "_backward"):  # known no more, so nothing is repeated
            patch.setattr(operator, run, functools.partial(getattr(operator, run)))
        assert all(torch.equal(a, b) for a, b in zip(got, results(others), strict=True))


def expanded(inputs: dict[str, Tensor], dy: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return inputs, dy[:1, :1, :1].expand_as(dy)


def of_one_projection(inputs: dict[str, Tensor], dy: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    rows = torch.cat([inputs["x"], inputs["z"], inputs["z"][..., :1]], 2).detach()  # at no multiple of 16 bytes
    channels, ranks = inputs["x"].shape[2], inputs["z"].shape[2]
    return inputs | {"x": rows[..., :channels], "z": rows[..., channels : channels + ranks]}, dy


def wider_generators(inputs: dict[str, Tensor], dy: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return inputs | {"z": inputs["z"].float()}, dy


def transposed(inputs: dict[str, Tensor], dy: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    return inputs | {name: inputs[name].t().contiguous().t() for name in ("U", "static_w")}, dy


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("change", [expanded, of_one_projection, wider_generators, transposed])
def test_passes_that_copy_inputs_are_repeated(change: Callable[..., Any]) -> None:
    from dynconv.ops import lowrank_mma

    case = Case(heads=9, head_size=16, rank=16, dtype=torch.bfloat16)
    copies = 0

    def copied(*arguments: Any) -> Tensor:
        nonlocal copies
        copies += 1
        return launch.copied(*arguments)

    def results(inputs: dict[str, Tensor], dy: Tensor) -> list[Tensor]:
        inputs = {name: value.detach().requires_grad_() for name, value in inputs.items()}
        y = case.run(inputs)
        return [y, *torch.autograd.grad(y, list(inputs.values()), dy)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_repeats", {})
        for module in (operator, tiles, lowrank_mma):
            patch.setattr(module, "copied", copied)
        made = 0
        for _ in range(3):
            inputs = {name: torch.randn_like(value) for name, value in case.inputs().items()}
            dy = torch.randn_like(inputs["x"])
            changed, changed_dy = change(inputs, dy)
            got = results(changed, changed_dy)
            made = made or copies  # by Python, at the first call only
            assert copies == made > 0
            with pytest.MonkeyPatch.context() as apart:
                apart.setattr(launch, "_repeats", {})
                want = results(inputs, changed_dy.contiguous())
            assert copies == made
            measured = [relative_error(g, w.double()) for g, w in zip(got, want, strict=True)]
            assert all(error < BOUND[torch.bfloat16] for error in measured), measured
        assert [callable(again) for again in launch._repeats.values()] == [True, True]


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_one_tensor_given_twice_is_told_from_two() -> None:
    case = Case("static", heads=9, head_size=16, dtype=torch.bfloat16)
    inputs = case.inputs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_repeats", {})
        alike = torch.autograd.grad(case.run(inputs), list(inputs.values()), inputs["x"])
        apart = torch.autograd.grad(case.run(inputs), list(inputs.values()), inputs["x"].detach().clone())
        other = torch.autograd.grad(case.run(inputs), list(inputs.values()), 2 * inputs["x"].detach())
    assert all(torch.equal(a, b) for a, b in zip(alike, apart, strict=True))
    assert all(torch.equal(2 * a, b) for a, b in zip(alike, other, strict=True))


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_double_backward_raises(kind: str) -> None:
    case = Case(kind)
    inputs = case.inputs()
    (dx,) = torch.autograd.grad(case.run(inputs).square().sum(), [inputs["x"]], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate"):
        dx.sum().backward()


def operator_arguments(case: Case) -> tuple[object, ...]:
    inputs = case.inputs()
    low_rank = case.kind == "lowrank"
    weight = inputs["U"] if low_rank else inputs["weight"] if case.kind == "headwise" else None
    static = inputs["weight"] if case.kind == "static" else inputs.get("static_w")
    options = ((case.channels,), case.residual, case.activation == "silu")
    return (inputs["x"], inputs.get("z"), weight, static, None, *options)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("kind", FUNCTIONS)
def test_the_custom_op_passes_opcheck(kind: str, static: bool, activation: str | None) -> None:
    arguments = operator_arguments(Case(kind, static=static, time=9, heads=2, activation=activation))
    torch.library.opcheck(torch.ops.dynconv.convolve.default, arguments)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_empty_inputs(kind: str) -> None:
    for batch, time in ((0, 5), (2, 0)):
        case = Case(kind, batch=batch, time=time)
        inputs = case.inputs()
        y = case.run(inputs)
        assert y.shape == (batch, time, case.channels)
        y.sum().backward()
        assert all(value.grad is not None and not value.grad.any() for value in inputs.values())


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_packed_documents_may_all_be_empty(kind: str) -> None:
    case = Case(kind, batch=1, time=0, state=True)
    inputs = case.inputs()
    y, state = case.run(inputs, cu_seqlens=torch.zeros(2, dtype=torch.int32, device=DEVICE), return_final_state=True)
    assert y.shape == (1, 0, case.channels)
    assert torch.equal(state, inputs["initial_state"])


@pytest.mark.parametrize("parts", [3, 70])
@pytest.mark.parametrize(("first", "rank"), [(0, 40), (16, 40), (32, 40), (32, 48)])
def test_sums_go_to_their_place(parts: int, first: int, rank: int) -> None:
    """16 columns of each row: into those from `first` on, of which the last may not exist; the other sums whole."""
    columns = torch.randn(parts, 37, 16, device=DEVICE)
    total, others = torch.full((37, rank), 7.0, device=DEVICE), torch.randn(5, 300, device=DEVICE)
    other = torch.empty(300, device=DEVICE)
    tiles.sum_parts((columns, total), (others, other), place=(16, rank, first))
    last = min(first + 16, rank)
    assert relative_error(total[:, first:last], columns.double().sum(0)[:, : last - first]) < BOUND[torch.float32]
    assert (total[:, :first] == 7).all()
    assert (total[:, last:] == 7).all()
    assert relative_error(other, others.double().sum(0)) < BOUND[torch.float32]
    tiles.sum_parts((None, None), (others, other.zero_()), place=(16, rank, first))
    assert relative_error(other, others.double().sum(0)) < BOUND[torch.float32]


@given(
    time=st.integers(1, 10_000),
    rows=st.sampled_from([1, 16]),
    programs_a_chunk=st.integers(1, 300),
    at_once=st.integers(1, 2_000),
    step=st.sampled_from([4, 8, 16]),
    longest=st.sampled_from([32, 128, 160]),
    alone=st.booleans(),
)
def test_runs_are_what_the_kernels_take(**asked: int) -> None:
    run = tiles.run_length(**asked)
    assert run % asked["step"] == 0
    assert 8 <= run <= asked["longest"]


@pytest.mark.parametrize(("time", "run"), [(1, 8), (3000, 96), (4096, 128), (4099, 132)])
def test_runs_fill_the_device(time: int, run: int) -> None:
    """B=4 D=2048 on an H100, whose 132 multiprocessors run a low-rank backward program each: two chunks are 128."""
    assert tiles.run_length(time, rows=16, programs_a_chunk=64, at_once=132, step=4, longest=160, alone=True) == run


def test_runs_reckon_with_programs_that_share() -> None:
    """On an H100: with fewer beside them the last programs are faster, if any were beside them at all."""
    asked = {"rows": 16, "step": 4}
    assert tiles.run_length(5000, programs_a_chunk=16, at_once=132, longest=160, alone=True, **asked) == 40
    assert tiles.run_length(5000, programs_a_chunk=16, at_once=132, longest=160, **asked) == 48
    assert tiles.run_length(1024, programs_a_chunk=128, at_once=396, longest=32, **asked) == 32
    assert tiles.run_length(1024, programs_a_chunk=128, at_once=396, longest=32, alone=True, **asked) == 24
    assert tiles.run_length(4096, programs_a_chunk=64, at_once=396, longest=32, **asked) == 24


def test_rows_that_cp_async_cannot_copy_are_moved() -> None:
    buffer = torch.randn(2 * 5 * 32 + 8).bfloat16()
    for offset, moved in ((0, False), (8, False), (1, True)):
        view = buffer[offset : offset + 320].view(2, 5, 32)
        rows = tiles.aligned(view)
        assert torch.equal(rows, view)
        assert rows.data_ptr() % 16 == 0
        assert (rows is not view) == moved
    odd = torch.randn(2, 5, 40).bfloat16()[..., :32]
    assert tiles.aligned(odd).stride() == (160, 32, 1)


def test_rows_beyond_32_bit_offsets_are_moved() -> None:
    for channels, moved in ((2**9 - 1, False), (2**9, True)):
        time_major = torch.empty(64, 2**10, channels, dtype=torch.bfloat16, device="meta").transpose(0, 1)
        assert (operator._rows_contiguous(time_major) is not time_major) == moved


def test_the_reference_agrees_with_the_oracle() -> None:
    for kind in FUNCTIONS:
        case = Case(kind, batch=1, documents=(9, 1, 27), segments=(5, 30) if kind == "lowrank" else ())
        inputs = {name: value.detach().double() for name, value in case.inputs().items()}
        positions = torch.cat([torch.arange(n) for n in case.documents]).to(DEVICE)
        low_rank = kind == "lowrank"
        y = reference.convolve(
            inputs["x"],
            inputs.get("z"),
            inputs["U"] if low_rank else inputs["weight"] if kind == "headwise" else None,
            inputs["weight"] if kind == "static" else inputs["static_w"],
            positions,
            case.segments,
            case.residual,
        )
        assert relative_error(y, case.oracle(inputs)) < 1e-14
