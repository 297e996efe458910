"""Convolutions of every kind and shape for the tests: their inputs, and an oracle that shares no code with them."""

import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from dynconv.ops import functions

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# Relative RMS error by dtype: the most that 2,000 of the cases below reached, and a third more; a tap scaled by
# 0.9, or a shift by one step, is at 2e-2 and more.
BOUND = {torch.float32: 1e-6, torch.float16: 8e-4, torch.bfloat16: 6.5e-3}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "static": functions.static_convolution,
    "headwise": functions.headwise_dynamic_convolution,
    "lowrank": functions.lowrank_dynamic_convolution,
}


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """Send tensors to the Triton kernels: on a CPU, in Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        if not GPU:  # Triton reads the variable when it is first imported, too; other tests are not to see it
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setattr(functions, "_INTERPRET", True)
        pytest.importorskip("triton")
        importlib.import_module("dynconv.ops.operator")
        yield


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors hold NaN until they are written: PyTorch does so where algorithms must be deterministic."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it, matrix products are refused
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.empty(1).isnan().all()
            yield
        finally:
            torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Case:
    kind: str = "lowrank"  # "static", "headwise" or "lowrank"
    batch: int = 2
    time: int = 37
    heads: int = 3
    head_size: int = 8
    width: int = 4
    rank: int = 5
    static: bool = True
    residual: bool = True
    documents: tuple[int, ...] = ()  # lengths
    segments: tuple[int, ...] = ()
    state: bool = False
    activation: str | None = None
    dtype: torch.dtype = torch.float32

    @property
    def channels(self) -> int:
        return sum(self.segments) or self.heads * self.head_size

    def inputs(self) -> dict[str, Tensor]:
        torch.manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape).to(DEVICE, self.dtype).requires_grad_()

        shape = (self.batch, self.time, self.channels)
        made = {"x": normal(*shape)}
        if self.state and self.width > 1:  # else it is empty, and has no gradient
            made["initial_state"] = normal(len(self.documents) or self.batch, self.width - 1, self.channels)
        if self.kind == "static":
            return made | {"weight": normal(self.width, self.channels)}
        if self.kind == "headwise":
            made["weight"] = normal(self.batch, self.time, self.heads, self.width)
        else:
            made["z"] = normal(self.batch, self.time, self.rank * max(1, len(self.segments)))
            made["U"] = normal(self.rank, self.width * self.channels) / self.rank**0.5
            made["U"] = made["U"].detach().requires_grad_()
        if self.static:
            made["static_w"] = normal(self.width, self.channels)
        return made

    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"residual": self.residual, "activation": self.activation}
        if self.documents:
            options["cu_seqlens"] = torch.tensor([0, *self.documents]).cumsum(0).to(DEVICE)
        if self.segments:
            options["segments"] = self.segments
        return options

    def run(self, inputs: dict[str, Tensor], **more: Any) -> Any:
        """The function of this kind; `more` overrides its options."""
        return FUNCTIONS[self.kind](**inputs, **(self.options() | more))

    @property
    def per_token(self) -> set[str]:
        """The inputs with a time."""
        return {"x", "z", "weight"} if self.kind == "headwise" else {"x", "z"}

    def oracle(self, inputs: dict[str, Tensor]) -> Tensor:
        """Straight from the definition: one token's filter times one earlier input, summed one by one."""
        filters = self.filters(inputs)
        x = inputs["x"]
        lengths = self.documents or (self.time,)
        rows = []
        for document, length in enumerate(lengths):
            begin = sum(lengths[:document])
            state = torch.zeros(self.batch, self.width - 1, self.channels).to(x)
            if "initial_state" in inputs:
                state = inputs["initial_state"][document : document + 1] if self.documents else inputs["initial_state"]
            past = torch.cat([state, x[:, begin : begin + length]], 1)
            for t in range(length):
                taps = [filters[:, begin + t, tap] * past[:, self.width - 1 + t - tap] for tap in range(self.width)]
                rows.append(torch.stack(taps).sum(0))
        y = torch.stack(rows, 1) if rows else torch.zeros_like(x)
        y = y if self.activation is None else torch.nn.functional.silu(y)
        return y + x if self.residual else y

    def filters(self, inputs: dict[str, Tensor]) -> Tensor:  # [B, T, W, D]
        shape = (self.batch, self.time, self.width, self.channels)
        static = inputs["weight"] if self.kind == "static" else inputs.get("static_w", torch.zeros(()))
        static = static.to(inputs["x"].device).expand(shape)
        if self.kind == "static":
            return static
        if self.kind == "headwise":
            spread = torch.arange(self.channels) // self.head_size
            return inputs["weight"][:, :, spread].transpose(2, 3) + static
        generators = inputs["z"].unflatten(2, (-1, self.rank))
        segment = torch.repeat_interleave(torch.tensor(self.segments or [self.channels]))
        basis = inputs["U"].unflatten(1, (self.width, self.channels))
        return torch.einsum("btdr,rwd->btwd", generators[:, :, segment], basis) + static


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm().clamp_min(1e-30))


Prepare = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def errors(case: Case, spoil: Prepare = dict, prepare: Prepare = dict) -> dict[str, float]:
    """The relative error of the output and of every gradient.

    `spoil` alters what the oracle is given; `prepare` what both are given, and the gradient of the output.
    """
    inputs = prepare(case.inputs())
    y = case.run(inputs)
    dy = prepare({"x": torch.randn(y.shape, device=DEVICE).to(y.dtype)})["x"].detach()
    gradients = torch.autograd.grad(y, list(inputs.values()), dy)
    exact = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    y_exact = case.oracle(spoil(exact))
    exact_gradients = torch.autograd.grad(y_exact, list(exact.values()), dy.double())
    assert [y.dtype, *(g.dtype for g in gradients)] == [value.dtype for value in (inputs["x"], *inputs.values())]
    pairs = zip(inputs, gradients, exact_gradients, strict=True)
    return {"y": relative_error(y, y_exact)} | {name: relative_error(g, e) for name, g, e in pairs}


def assert_close(case: Case, slack: float = 1.0) -> None:
    measured = errors(case)
    assert all(value < slack * BOUND[case.dtype] for value in measured.values()), measured


def errors_beside_padding(case: Case, padding: int) -> dict[str, float]:
    """The errors of a case of packed documents with so much padding after the last one, against it without.

    All that belongs to the padding is NaN, and its output's gradient; its outputs and gradients must be zeros.
    """

    def padded(value: Tensor, fill: float = torch.nan) -> Tensor:  # [1, T, ...]
        sides = (0, 0) * (value.dim() - 2) + (0, padding)
        return torch.nn.functional.pad(value.detach(), sides, value=fill)

    inputs = case.inputs()
    longer = {name: padded(v) if name in case.per_token else v.detach() for name, v in inputs.items()}
    longer = {name: value.requires_grad_() for name, value in longer.items()}
    dy = torch.randn_like(inputs["x"])
    outcomes = []
    for values, gradient in ((inputs, dy), (longer, padded(dy))):
        y, end = case.run(values, return_final_state=True)
        ends = [end] if end.requires_grad else []  # the state of an empty x is a constant
        weights = [gradient, *map(torch.ones_like, ends)]
        gradients = torch.autograd.grad([y, *ends], list(values.values()), weights)
        outcomes.append(dict(zip(["y", "end", *values], (y, end, *gradients), strict=True)))
    want, got = outcomes
    for name in case.per_token & inputs.keys() | {"y"}:
        got[name], rest = got[name].split([case.time, padding], 1)
        assert not rest.any(), name
    return {name: relative_error(value, want[name].double()) for name, value in got.items()}


@st.composite
def cases(draw: st.DrawFn, kinds: Sequence[str] = tuple(FUNCTIONS)) -> Case:
    kind = draw(st.sampled_from(kinds))
    segmented = kind == "lowrank" and draw(st.booleans())
    packed = draw(st.booleans())
    documents = tuple(draw(st.lists(st.integers(0, 12), min_size=1, max_size=4))) if packed else ()
    documents = documents if sum(documents) else ()
    return Case(
        kind=kind,
        batch=1 if documents else draw(st.integers(1, 2)),
        time=sum(documents) or draw(st.integers(1, 80)),
        heads=draw(st.integers(1, 5)),
        head_size=draw(st.sampled_from([1, 2, 4, 7, 16, 24])),
        width=draw(st.integers(1, 8)),
        rank=draw(st.sampled_from([1, 3, 15, 16, 20])),
        static=draw(st.booleans()),
        residual=draw(st.booleans()),
        documents=documents,
        segments=tuple(draw(st.lists(st.integers(1, 70), min_size=2, max_size=3))) if segmented else (),
        state=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "silu"])),
        dtype=draw(st.sampled_from(list(BOUND))),
    )
