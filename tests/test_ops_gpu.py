"""What a GPU alone runs: the Gluon kernels, and launches that are repeated."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from convolutions import (
    BOUND,
    DEVICE,
    GPU,
    Case,
    assert_close,
    errors,
    errors_beside_padding,
    poisoned_memory,
    relative_error,
)
from torch import Tensor

from dynconv.ops import headwise, launch, operator, tiles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPU, reason="needs a CUDA device"),
    pytest.mark.usefixtures("by_kernels"),
]


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No signature is known yet; what the test patches goes with it."""
    monkeypatch.setattr(launch, "_repeats", {})
    return monkeypatch


@pytest.fixture
def cuts(unknown: pytest.MonkeyPatch) -> list[Any]:
    """How the low-rank kernels' work was cut in the test, on a device of one multiprocessor."""
    from dynconv.ops import lowrank_mma

    found: list[Any] = []

    def spied(*arguments: Any, **named: Any) -> Any:
        found.append(original(*arguments, **named))
        return found[-1]

    original = lowrank_mma._cut
    unknown.setattr(lowrank_mma, "_cut", spied)
    unknown.setattr(lowrank_mma, "multiprocessors", lambda _: 1)
    return found


def results(case: Case, inputs: dict[str, Tensor], dy: Tensor) -> list[Tensor]:
    """The output, and the gradient of every input."""
    inputs = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    y = case.run(inputs)
    return [y, *torch.autograd.grad(y, list(inputs.values()), dy)]


def amid_nan(value: Tensor, joined: bool = False) -> Tensor:
    """The same values as a view of rows that need no copy, amid NaN on all sides; of all sequences, or of each."""
    flat = value.detach().flatten(2) if value.dim() > 2 else value.detach()
    flat = flat.flatten(0, 1) if joined and value.dim() > 2 else flat
    buffer = flat.new_full([size + 32 for size in flat.shape], torch.nan)
    view = buffer[tuple(slice(16, size + 16) for size in flat.shape)]
    view.copy_(flat)
    view = view.unflatten(0, value.shape[:2]) if joined and value.dim() > 2 else view
    return (view.unflatten(2, value.shape[2:]) if value.dim() > 3 else view).requires_grad_()


def assert_close_amid_nan(case: Case, joined: bool = False) -> None:
    """Inputs and dy amid NaN, and what the kernels are to fill full of it."""
    with poisoned_memory():
        measured = errors(case, prepare=lambda given: {name: amid_nan(value, joined) for name, value in given.items()})
    assert all(value < BOUND[case.dtype] for value in measured.values()), measured


@contextlib.contextmanager
def longer_runs(module: Any) -> Iterator[None]:
    """Programs of as many time steps as on a device of one multiprocessor, where small inputs fill it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_repeats", {})
        patch.setattr(module, "multiprocessors", lambda _: 1)
        yield


def assert_close_in_all_runs(case: Case, module: Any) -> None:
    """In short and longer ones, with silu and without."""
    for activation in (None, "silu"):
        way = replace(case, activation=activation)
        assert_close(way)
        with longer_runs(module):
            assert_close(way)
            assert_close_amid_nan(way)


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
        Case(batch=9, time=37, rank=48, heads=9, head_size=16),
        Case(batch=2, time=150, rank=16, heads=9, head_size=16, width=5),
        Case(batch=1, time=300, rank=15, segments=(256, 128), width=6, documents=(1, 40, 2, 3, 190, 64)),
        Case(batch=2, time=131, rank=16, heads=9, head_size=16, width=8),
        Case(batch=1, time=199, rank=40, segments=(256, 128), width=7, documents=(70, 0, 129), residual=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_tensor_core_kernels_agree_with_the_oracle(case: Case, dtype: torch.dtype) -> None:
    from dynconv.ops import lowrank_mma

    case = replace(case, dtype=dtype)
    inputs = case.inputs()
    silu = case.rank <= 16 and case.width <= 6  # of more ranks or taps, PyTorch applies it
    assert lowrank_mma.fits(inputs["x"], inputs["U"], case.segments or (case.channels,), silu=silu)
    assert_close_in_all_runs(case, lowrank_mma)


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=90, time=33, heads=9, head_size=16, rank=16),
        Case(batch=70, time=2, heads=9, head_size=16, rank=3, static=False),
        Case(batch=30, time=3, rank=16, segments=(128, 256), residual=False),
        Case(batch=20, time=33, rank=40, heads=8, head_size=16, width=3),
        Case(batch=7, time=130, rank=15, segments=(256, 128)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_short_sequences_share_programs(case: Case, dtype: torch.dtype, cuts: list[Any]) -> None:
    case = replace(case, dtype=dtype)
    for activation in (None, "silu"):
        assert_close(replace(case, activation=activation))
        assert_close_amid_nan(replace(case, activation=activation), joined=True)
    inputs = case.inputs()
    dy = torch.randn(case.channels, device=DEVICE, dtype=dtype).expand(case.batch, case.time, -1)
    got, want = results(case, inputs, dy), results(case, inputs, dy.contiguous())
    assert all(relative_error(g, w.double()) < BOUND[dtype] for g, w in zip(got, want, strict=True))
    assert {(cut.batch, cut.time, cut.length) for cut in cuts} == {(1, case.batch * case.time, (case.time,))}


@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["static", "headwise", "lowrank"])
def test_documents_that_start_late_and_end_past_the_last_token(kind: str, dtype: torch.dtype, state: bool) -> None:
    """The host cannot know. The tokens before the first start are a document; nothing beyond x is read."""
    case = Case(kind, batch=1, time=41, heads=8, head_size=16, documents=(3, 11, 2, 25), state=state, dtype=dtype)
    inputs = {name: value.detach() for name, value in case.inputs().items()}
    late = {name: value.clone() for name, value in inputs.items()}
    if state:
        inputs["initial_state"][0] = 0.0
        late["initial_state"] = inputs["initial_state"][1:]
    edges = torch.tensor([3, 14, 16, 45], device=DEVICE)
    y, end = case.run(inputs, return_final_state=True)
    got, got_end = case.run(late, return_final_state=True, cu_seqlens=edges)
    assert torch.equal(got_end, end[1:])
    assert relative_error(got, y.double()) < BOUND[dtype]  # a document's first tokens with a state are the reference's
    dy = torch.randn_like(y)
    leaves = inputs["x"].requires_grad_(), late["x"].requires_grad_()
    (want,) = torch.autograd.grad(case.run(inputs), [leaves[0]], dy)
    (dx,) = torch.autograd.grad(case.run(late, cu_seqlens=edges), [leaves[1]], dy)
    assert relative_error(dx, want.double()) < BOUND[dtype]


@pytest.mark.parametrize("activation", [None, "silu"])
def test_sequences_that_share_programs_are_apart(activation: str | None, cuts: list[Any]) -> None:
    """NaN in the second of them, and in its gradient, is in no result of the others, to the bit."""
    case = Case(batch=50, time=9, heads=9, head_size=16, rank=16, dtype=torch.bfloat16, activation=activation)
    inputs = case.inputs()
    dy = torch.randn_like(inputs["x"])
    want = dict(zip(["y", *inputs], results(case, inputs, dy), strict=True))
    spoiled = {name: value.detach().clone() for name, value in (inputs | {"dy": dy}).items()}
    for name in ("x", "z", "dy"):
        spoiled[name][1] = torch.nan
    got = dict(zip(["y", *inputs], results(case, spoiled, spoiled.pop("dy")), strict=True))
    for name in ("y", "x", "z"):
        assert got[name][1].isnan().all()
        assert torch.equal(got[name][2:], want[name][2:])
        assert torch.equal(got[name][0], want[name][0])
    assert {cut.length for cut in cuts} == {(case.time,)}


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
        Case("headwise", batch=2, time=300, heads=36, head_size=4, width=8),
        Case("headwise", batch=2, time=300, heads=12, head_size=16, width=3),
        Case("headwise", batch=1, time=130, heads=80, head_size=4, width=5, static=False),
        Case("headwise", batch=1, time=300, heads=12, head_size=16, width=6, documents=(1, 40, 2, 3, 190, 64)),
        Case("headwise", batch=1, time=300, heads=12, head_size=32, width=8, documents=(1, 40, 2, 3, 190, 64)),
        *[Case("static", batch=2, time=300, heads=9, head_size=16, width=width) for width in (1, 3, 5, 6, 7, 8)],
        Case("static", batch=1, time=300, heads=12, head_size=16, width=8, documents=(1, 40, 2, 3, 190, 64)),
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
        assert_close_in_all_runs(case, ring)


@pytest.mark.parametrize("padding", [1, 77, 900])
@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize(
    "case",
    [
        Case("static"),
        Case("static", width=3),
        Case("static", width=8),
        Case("headwise", width=3),  # by plain kernels without silu
        Case("headwise"),
        Case("lowrank", rank=16),
        Case("lowrank", rank=15, static=False),
        Case("lowrank", rank=40),
        Case("lowrank", rank=96, width=3),
        Case("lowrank", rank=16, width=6),
        Case("lowrank", rank=16, width=8),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_padding_is_neither_read_nor_written(
    case: Case, dtype: torch.dtype, activation: str | None, padding: int, unknown: pytest.MonkeyPatch
) -> None:
    """By the Gluon kernels, too, wherever they fit."""
    unknown.setattr(headwise, "_by_ring", lambda *_, **__: True)
    lengths = (1, 40, 0, 2, 3, 190, 64)
    case = replace(case, batch=1, time=300, documents=lengths, heads=12, head_size=16, dtype=dtype)
    for state in (False, True):
        with poisoned_memory():
            measured = errors_beside_padding(replace(case, activation=activation, state=state), padding)
        assert all(error < BOUND[dtype] for error in measured.values()), measured


@pytest.mark.parametrize(
    "case",
    [
        Case("static", heads=9, head_size=16, dtype=torch.bfloat16),
        Case("headwise", heads=9, head_size=16, dtype=torch.bfloat16),
        Case("headwise", heads=9, head_size=7),
        Case("lowrank", rank=15, segments=(256, 128), dtype=torch.bfloat16),
        Case("lowrank", rank=40, segments=(128, 128), dtype=torch.bfloat16),
        Case("lowrank", rank=16, heads=2),
        Case("lowrank", batch=90, time=33, rank=16, heads=9, head_size=16, dtype=torch.bfloat16),  # joined
    ],
    ids=str,
)
def test_repeated_launches_give_the_same_bits(case: Case, unknown: pytest.MonkeyPatch) -> None:
    """Of the calls after the first one with a signature only launches are repeated."""
    inputs = case.inputs()
    dy = torch.ones_like(inputs["x"])
    results(case, inputs, dy)
    assert [callable(again) for again in launch._repeats.values()] == [True, True]
    others = {name: torch.randn_like(value) for name, value in inputs.items()}
    got = results(case, others, dy)
    for run in ("_forward", "_backward"):  # known no more, so nothing is repeated
        unknown.setattr(operator, run, functools.partial(getattr(operator, run)))
    assert all(torch.equal(a, b) for a, b in zip(got, results(case, others, dy), strict=True))


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


@pytest.mark.parametrize("change", [expanded, of_one_projection, wider_generators, transposed])
def test_passes_that_copy_inputs_are_repeated(change: Callable[..., Any], unknown: pytest.MonkeyPatch) -> None:
    from dynconv.ops import lowrank_mma

    case = Case(heads=9, head_size=16, rank=16, dtype=torch.bfloat16)
    made = copies = 0

    def copied(*arguments: Any) -> Tensor:
        nonlocal copies
        copies += 1
        return launch.copied(*arguments)

    for module in (operator, tiles, lowrank_mma):
        unknown.setattr(module, "copied", copied)
    for _ in range(3):
        inputs = {name: torch.randn_like(value) for name, value in case.inputs().items()}
        changed, dy = change(inputs, torch.randn_like(inputs["x"]))
        got = results(case, changed, dy)
        made = made or copies  # by Python, at the first call only
        assert copies == made > 0
        with pytest.MonkeyPatch.context() as apart:
            apart.setattr(launch, "_repeats", {})
            want = results(case, inputs, dy.contiguous())
        assert copies == made
        measured = [relative_error(g, w.double()) for g, w in zip(got, want, strict=True)]
        assert all(error < BOUND[torch.bfloat16] for error in measured), measured
    assert [callable(again) for again in launch._repeats.values()] == [True, True]


@pytest.mark.usefixtures("unknown")
def test_one_tensor_given_twice_is_told_from_two() -> None:
    case = Case("static", heads=9, head_size=16, dtype=torch.bfloat16)
    inputs = case.inputs()
    alike = torch.autograd.grad(case.run(inputs), list(inputs.values()), inputs["x"])
    apart = torch.autograd.grad(case.run(inputs), list(inputs.values()), inputs["x"].detach().clone())
    other = torch.autograd.grad(case.run(inputs), list(inputs.values()), 2 * inputs["x"].detach())
    assert all(torch.equal(a, b) for a, b in zip(alike, apart, strict=True))
    assert all(torch.equal(2 * a, b) for a, b in zip(alike, other, strict=True))
