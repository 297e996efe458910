"""Static and head-wise convolutions fused with their neighbours, against float64, by their kernels and composed.

Without a GPU the kernels run in the stand-in of gluon_interpreter.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from convolutions import BOUND, DEVICE, GPU, Case, poisoned_memory, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dynconv.ops import (
    headwise_joined_convolution,
    headwise_rotary_convolution,
    static_gated_convolution,
    static_joined_convolution,
    static_rotary_convolution,
)
from dynconv.ops.flops import forward as convolution_flops

pytest.importorskip("triton")
from dynconv.ops import launch as launching

BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(scope="module")
def by_kernels() -> Iterator[None]:
    from gluon_interpreter import fused_kernels

    with fused_kernels():
        yield


@dataclass(frozen=True)
class Neighbours:
    """A convolution of `parts` parts of D channels each, and what is computed with it."""

    kind: str  # "static" or "headwise"
    then: str = ""  # "rope", "rope halves", "stream", "swiglu"
    parts: int = 1
    channels: int = 32  # D
    size: int = 16  # E, channels of a head that RoPE rotates
    head_size: int = 16  # channels that share a head-wise filter
    batch: int = 2
    time: int = 37
    width: int = 4
    padding: int = 0
    static: bool = True
    residual: bool = True
    dtype: torch.dtype = BFLOAT16

    @property
    def case(self) -> Case:
        heads = self.parts * self.channels // self.head_size
        names = ("kind", "batch", "time", "width", "static", "residual", "dtype")
        same: dict[str, Any] = {name: getattr(self, name) for name in names}
        return Case(heads=heads, head_size=self.head_size, **same)

    @property
    def frequencies(self) -> Tensor:
        return 10_000.0 ** (-torch.arange(0, self.size, 2, device=DEVICE, dtype=FLOAT32) / self.size)

    def tensors(self) -> dict[str, Tensor]:
        """`joined`, the static filter, if there is one, and the tensor to add, if there is one."""
        made = {name: value.detach() for name, value in self.case.inputs().items()}
        dynamic = [made["weight"].flatten(2)] if self.kind == "headwise" else []
        columns = torch.randn(self.batch, self.time, self.padding).to(made["x"])
        tensors = {"joined": torch.cat([made["x"], *dynamic, columns], 2)}
        if self.kind == "static":
            tensors["static_w"] = made["weight"]
        elif self.static:
            tensors["static_w"] = made["static_w"]
        if self.then == "stream":
            tensors["added"] = torch.randn(self.batch, self.time, self.channels).to(made["x"])
        return {name: value.requires_grad_() for name, value in tensors.items()}

    def run(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        joined, static = tensors["joined"], tensors.get("static_w")
        heads, halves = self.channels // self.size, self.then == "rope halves"
        own = (self.head_size, self.width)
        options: dict[str, Any] = {"parts": self.parts, "added": tensors.get("added")}
        if self.kind == "static":
            assert static is not None
            if self.then == "swiglu":
                return (static_gated_convolution(joined, static, self.channels, self.residual),)
            if self.then.startswith("rope"):
                return static_rotary_convolution(joined, static, self.frequencies, heads, self.residual, halves=halves)
            return static_joined_convolution(joined, static, self.channels, self.residual, **options)
        if self.then.startswith("rope"):
            arguments = (joined, static, self.frequencies, heads, *own, self.residual)
            return headwise_rotary_convolution(*arguments, halves=halves)
        return headwise_joined_convolution(joined, static, self.channels, *own, self.residual, **options)

    def oracle(self, exact: dict[str, Tensor], spoil: float = 1.0) -> list[Tensor]:
        """The convolution's oracle; then SwiGLU from its definition, or pairs as complex numbers times exp(i t f)."""
        total = self.parts * self.channels
        given = {"x": exact["joined"][..., :total]}
        if self.kind == "headwise":
            filters = exact["joined"][..., total : total + total // self.head_size * self.width]
            given["weight"] = filters.unflatten(2, (-1, self.width))
        if "static_w" in exact:
            given["weight" if self.kind == "static" else "static_w"] = exact["static_w"]
        parts = list(self.case.oracle(given).split(self.channels, 2))
        if self.then == "swiglu":
            return [parts[0] / (1 + torch.exp(-parts[0])) * parts[1]]
        if self.then == "stream":
            return [parts[0] + exact["added"]]
        if self.then.startswith("rope"):
            time = torch.arange(self.time, device=DEVICE, dtype=torch.float64)
            angle = time[:, None] * self.frequencies.double() * spoil
            turn = torch.polar(torch.ones_like(angle), angle)[:, None]
            parts[:2] = (self.turned(part, turn) for part in parts[:2])
            parts = [part.unflatten(2, (-1, self.size)) for part in parts]
        return parts

    def turned(self, part: Tensor, turn: Tensor) -> Tensor:
        heads = part.unflatten(2, (-1, self.size))
        if self.then == "rope halves":
            points = torch.complex(*heads.chunk(2, 3)) * turn
            return torch.cat([points.real, points.imag], 3).flatten(2)
        points = torch.view_as_complex(heads.unflatten(3, (-1, 2)).contiguous()) * turn
        return torch.view_as_real(points).flatten(2)

    def errors(self, spoil: float = 1.0) -> dict[str, float]:
        """The relative errors of the outputs and of all gradients; of `joined` also that of the convolved alone."""
        tensors = self.tensors()
        outputs = self.run(tensors)
        dys = [torch.randn(y.shape, device=DEVICE).to(y.dtype) for y in outputs]
        gradients = torch.autograd.grad(outputs, list(tensors.values()), dys)
        exact = {name: value.detach().double().requires_grad_() for name, value in tensors.items()}
        want = self.oracle(exact, spoil)
        expected = torch.autograd.grad(want, list(exact.values()), [dy.double() for dy in dys])
        assert [y.shape for y in outputs] == [w.shape for w in want]
        found = {f"y{n}": relative_error(y, w) for n, (y, w) in enumerate(zip(outputs, want, strict=True))}
        for name, gradient, wanted in zip(tensors, gradients, expected, strict=True):
            assert gradient.dtype == tensors[name].dtype
            found[name] = relative_error(gradient, wanted)
        convolved = self.parts * self.channels
        whole = gradients[0].shape[2]
        assert not gradients[0][..., whole - self.padding :].any()
        found["x"] = relative_error(gradients[0][..., :convolved], expected[0][..., :convolved])
        return found


def assert_close(what: Neighbours, launched: list[str]) -> None:
    launched.clear()
    launching._repeats.clear()  # a launch that is repeated would not be in the list
    found = what.errors()
    assert all(value < BOUND[what.dtype] for value in found.values()), found
    assert "backward_kernel" in launched


@pytest.fixture
def launched(by_kernels: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:  # noqa: ARG001
    """The names of the kernels that were launched."""
    from dynconv.ops import fused_operator

    names: list[str] = []
    for module in (fused_operator.fused_ring, fused_operator.fused_mma):
        original = module.launch

        def launch(kernel: Any, *rest: Any, original: Any = original, **named: Any) -> None:
            names.append(getattr(kernel, "function", getattr(kernel, "fn", kernel)).__name__)
            original(kernel, *rest, **named)

        monkeypatch.setattr(module, "launch", launch)
    monkeypatch.setattr(launching, "_repeats", {})
    return names


KERNEL_CASES = [
    Neighbours("static", "rope", 3, 128, 64, time=300),  # runs longer than the ring, several chunks
    Neighbours("static", "rope", 3, 48, 48, padding=16, width=3, dtype=FLOAT16),  # a block's last channels do not exist
    Neighbours("static", "rope halves", 3, 144, 16, time=150, residual=False),  # heads cross no block of 128
    Neighbours("static", "rope halves", 3, 256, 128, batch=1, time=21, width=2),
    Neighbours("static", "", 2, 272, batch=1, width=1, padding=1),
    Neighbours("static", "stream", 1, 144, time=150),
    Neighbours("static", "stream", 1, 16, padding=13, residual=False, width=3, dtype=FLOAT16),
    Neighbours("headwise", "rope halves", 3, 128, 64, time=300),
    Neighbours("headwise", "rope halves", 3, 64, 8, head_size=4, batch=1, padding=16),
    Neighbours("headwise", "rope", 3, 512, 64, head_size=8, batch=1, time=9, width=2, static=False),
    Neighbours("headwise", "rope halves", 3, 256, 32, batch=1, time=33, residual=False, dtype=FLOAT16),
    Neighbours("headwise", "", 2, 32, padding=3, time=150),
    Neighbours("headwise", "stream", 1, 128, head_size=8, static=False),
]


@pytest.mark.parametrize("what", KERNEL_CASES, ids=str)
def test_the_kernels_agree_with_the_oracle(what: Neighbours, launched: list[str]) -> None:
    with poisoned_memory():
        assert_close(what, launched)


GATED_CASES = [
    Neighbours("static", "swiglu", 2, 48, time=300, padding=32),
    Neighbours("static", "swiglu", 2, 80, batch=1, width=3, residual=False, dtype=FLOAT16),  # a narrow last block
    Neighbours("static", "swiglu", 2, 16, batch=1, time=9, width=1),
]


@pytest.mark.parametrize("what", GATED_CASES, ids=str)
def test_swiglu_in_the_same_kernel_agrees_with_the_oracle(what: Neighbours, launched: list[str]) -> None:
    with poisoned_memory():
        assert_close(what, launched)
    assert launched.count("gated_kernel") == 2


@st.composite
def fitting(draw: st.DrawFn) -> Neighbours:
    """Random cases that the kernels take."""
    kind = draw(st.sampled_from(["static", "headwise"]))
    then = draw(st.sampled_from(["rope", "rope halves", "stream", "swiglu", ""]))
    if kind == "headwise" and then == "swiglu":
        then = ""
    parts = {"rope": 3, "rope halves": 3, "stream": 1, "swiglu": 2, "": draw(st.integers(1, 3))}[then]
    size = draw(st.sampled_from([8, 16, 32, 64, 128] if then == "rope halves" else [2, 4, 16, 48]))
    width = draw(st.sampled_from([2, 4] if kind == "headwise" else [1, 2, 3, 4]))
    head_size = draw(st.sampled_from([4, 8, 16] if width == 4 else [4, 8]))
    least = 64 if kind == "headwise" else max(16, size)
    whole = size if size % 16 == 0 else 16
    channels = max(least, size) if kind == "headwise" else whole * draw(st.integers(1, 9))
    channels = channels * draw(st.sampled_from([1, 3])) if kind == "headwise" else channels
    channels = channels if channels % size == 0 else channels * size
    return Neighbours(
        kind=kind,
        then=then,
        parts=parts,
        channels=channels,
        size=size,
        head_size=head_size if kind == "headwise" else 1,
        batch=draw(st.integers(1, 2)),
        time=draw(st.integers(1, 150)),
        width=width,
        padding=draw(st.sampled_from([0, 5, 16])),
        static=draw(st.booleans()),
        residual=draw(st.booleans()),
        dtype=draw(st.sampled_from([BFLOAT16, FLOAT16])),
    )


def test_any_fitting_shape_agrees_with_the_oracle(launched: list[str]) -> None:
    @settings(max_examples=14, deadline=None, derandomize=True)  # a GPU's kernels are compiled for each
    @given(fitting())
    def check(what: Neighbours) -> None:
        assert_close(what, launched)

    with poisoned_memory():
        check()


@pytest.mark.parametrize("kind", ["static", "headwise"])
@pytest.mark.parametrize("then", ["rope", "rope halves"])
def test_the_bound_notices_a_slightly_wrong_angle(kind: str, then: str, launched: list[str]) -> None:
    found = Neighbours(kind, then, 3, 64, 32, batch=1, time=150).errors(spoil=1.001)
    assert min(found[name] for name in ("y0", "y1", "joined")) > BOUND[BFLOAT16], found
    assert found["y2"] < BOUND[BFLOAT16]
    assert launched


def test_angles_stay_exact_over_a_long_sequence(launched: list[str]) -> None:
    """The recurrence that gives the next angle starts after hundreds of turns."""
    assert_close(Neighbours("static", "rope halves", 3, 16, 8, batch=1, time=2500, width=1, dtype=FLOAT16), launched)


UNFIT = [
    Neighbours("static", "rope", 3, 20, 4, head_size=1),  # D is no multiple of 16
    Neighbours("static", "rope halves", 3, 96, 48),  # pairs that are no power of two of channels apart
    Neighbours("static", "swiglu", 2, 32, width=6),
    Neighbours("static", "stream", 1, 32, width=5),
    Neighbours("headwise", "rope halves", 3, 64, 64, head_size=32),
    Neighbours("headwise", "rope", 3, 64, 64, head_size=2),
    Neighbours("headwise", "", 3, 64, width=3),
]


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("what", UNFIT, ids=str)
def test_other_shapes_are_composed(what: Neighbours, dtype: torch.dtype) -> None:
    """They round after each step, and so are less exact in 16 bits."""
    from dynconv.ops import fused_operator

    what = replace(what, dtype=dtype, padding=2)
    found = what.errors()
    assert all(value < (2e-6 if dtype == FLOAT32 else 2 * BOUND[dtype]) for value in found.values()), found
    joined, half = what.tensors()["joined"], what.size // 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_operator, "runs_gluon", lambda _: True)
        rotates = what.then.startswith("rope")
        own = (what.channels, what.parts, what.width, what.head_size if what.kind == "headwise" else 0)
        frequencies = torch.ones(half) if rotates else None
        assert not fused_operator.fits(joined, None, frequencies, *own, what.then == "rope halves")


def test_the_two_orders_of_pairs_are_one_function() -> None:
    """RoPE by halves is that on adjacent channels of `interleaved` queries and keys, if filters move with channels."""
    from dynconv.ops import interleaved

    what = Neighbours("static", "rope halves", 3, 32, 16, dtype=torch.float64)
    tensors = {name: value.detach() for name, value in what.tensors().items()}
    q, k, v = what.run(tensors)

    def arranged(value: Tensor) -> Tensor:
        parts = value.split(what.channels, -1)
        return torch.cat([*(interleaved(part, 2, -1) for part in parts[:2]), parts[2]], -1)

    moved = {name: arranged(value) for name, value in tensors.items()}
    found = replace(what, then="rope").run(moved)
    for got, straight in zip(found, (q, k), strict=False):
        torch.testing.assert_close(got, interleaved(straight.flatten(2), 2, -1).unflatten(2, (2, -1)))
    torch.testing.assert_close(found[2], v)


def test_frequencies_that_are_learned_or_rounded_give_the_same_function(launched: list[str]) -> None:
    what = Neighbours("static", "rope", 3, 16, 8, batch=1, time=600)
    tensors = {name: value.detach() for name, value in what.tensors().items()}
    joined, static = tensors["joined"], tensors["static_w"]
    rounded = what.frequencies.bfloat16()
    fast = static_rotary_convolution(joined, static, rounded, 2)
    assert launched
    launched.clear()
    learned = rounded.clone().requires_grad_()
    composed = static_rotary_convolution(joined, static, learned, 2)
    assert not launched
    for got, want in zip(composed, fast, strict=True):
        assert relative_error(got.detach(), want.double()) < 2 * BOUND[BFLOAT16]
    (gradient,) = torch.autograd.grad(composed[0].float().sum(), learned)
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("kind", ["static", "headwise"])
def test_the_operator_is_what_torch_wants(kind: str) -> None:
    what = Neighbours(kind, "rope halves", 3, 64, 32, batch=1, time=9, padding=16)
    tensors = what.tensors()
    arguments = (tensors["joined"], None, tensors["static_w"], what.frequencies, None)
    head_size = 16 if kind == "headwise" else 0
    torch.library.opcheck(torch.ops.dynconv.joined.default, (*arguments, 64, 3, 4, head_size, True, True, False))
    q, k, v = what.run(tensors)
    (gradient,) = torch.autograd.grad(q.sum() + k.sum() + v.sum(), tensors["joined"], create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(gradient.sum(), tensors["joined"])
    with FlopCounterMode(display=False) as counter:
        sum(y.sum() for y in what.run(tensors)).backward()
    once = convolution_flops((1, 9, 192), None, (1, 9, 12, 4) if kind == "headwise" else None, (4, 192))
    assert counter.get_total_flops() == 3 * once  # the outputs, and the gradients of the inputs and of the filters


@pytest.mark.usefixtures("launched")
def test_swiglus_operator_is_what_torch_wants() -> None:
    what = Neighbours("static", "swiglu", 2, 16, batch=1, time=9)
    tensors = what.tensors()
    inputs = (tensors["joined"], None, tensors["static_w"])
    torch.library.opcheck(torch.ops.dynconv.gated.default, (*inputs, 16, 4, True, False))
    dy = torch.randn(1, 9, 16, device=DEVICE).to(BFLOAT16)
    inputs = tuple(None if tensor is None else tensor.detach() for tensor in inputs)
    torch.library.opcheck(torch.ops.dynconv.gated_backward.default, (dy, *inputs, 16, 4, True, False, [True] * 3))


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("kind", ["static", "headwise"])
def test_views_gradients_of_other_strides_and_those_not_wanted(kind: str) -> None:
    what = Neighbours(kind, "rope halves", 3, 64, 32)
    tensors = {name: value.detach() for name, value in what.tensors().items()}
    tensors["static_w"].requires_grad_()
    straight = what.run(tensors)
    wide = torch.cat([tensors["joined"]] * 2, 2)[..., : tensors["joined"].shape[2]]
    for joined in (wide, tensors["joined"].transpose(1, 2).contiguous().transpose(1, 2)):
        outputs = what.run(tensors | {"joined": joined})
        assert all(torch.equal(a, b) for a, b in zip(outputs, straight, strict=True))
        # As attention lays them out: heads before time for one, and one expanded.
        dq = torch.randn(2, 2, 37, 32, device=DEVICE).to(BFLOAT16).transpose(1, 2)
        dys = (dq, torch.randn_like(dq), torch.ones(1, 1, 1, 1, device=DEVICE, dtype=BFLOAT16).expand_as(dq))
        (got,) = torch.autograd.grad(outputs, tensors["static_w"], dys)
        dense = [dy.contiguous() for dy in dys]
        (want,) = torch.autograd.grad(straight, tensors["static_w"], dense, retain_graph=True)
        assert torch.equal(got, want)
    joined = tensors["joined"].clone().requires_grad_()
    fixed = tensors | {"joined": joined, "static_w": tensors["static_w"].detach()}
    assert torch.autograd.grad(what.run(fixed), joined, dense)[0].isfinite().all()


def test_tiles_are_a_matter_of_speed_alone(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from dynconv.ops import fused_operator

    kernels = fused_operator.fused_ring
    monkeypatch.setattr(kernels, "FORWARD_TILE", kernels.Tile(4, 3, None, 4))
    monkeypatch.setattr(kernels, "BACKWARD_TILE", kernels.Tile(2, 3, None, 3))
    for kind in ("static", "headwise"):
        assert_close(Neighbours(kind, "rope halves", 3, 64, 32, batch=1, time=150), launched)


@pytest.mark.usefixtures("launched")
@pytest.mark.parametrize("kind", ["static", "headwise"])
def test_repeated_launches_give_the_same_bits(kind: str) -> None:
    """Of the calls after the first one with a signature only launches are repeated, also into padding's zeros."""
    what = Neighbours(kind, "rope halves", 3, 64, 32, padding=16)
    dys = [torch.randn(2, 37, 2, 32, device=DEVICE).to(BFLOAT16) for _ in range(3)]

    def results(tensors: dict[str, Tensor]) -> list[Tensor]:
        outputs = what.run(tensors)
        return [*outputs, *torch.autograd.grad(outputs, list(tensors.values()), dys)]

    results(what.tensors())
    assert [callable(again) for again in launching._repeats.values()] == [True, True] * GPU
    others = {name: torch.randn_like(value).requires_grad_() for name, value in what.tensors().items()}
    got = results(others)
    launching._repeats.clear()
    assert all(torch.equal(a, b) for a, b in zip(got, results(others), strict=True))
