"""The functions on the Gluon kernels, on a CPU, against the float64 oracle; gluon_interpreter.py says what that shows.

tests/test_ops_gpu.py runs the kernels themselves where there is a GPU.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from convolutions import GPU, Case, assert_close, kernels
from gluon_interpreter import gluon_kernels

pytestmark = pytest.mark.skipif(GPU, reason="test_ops_gpu.py runs the kernels themselves")


@pytest.fixture(scope="module")
def gluon() -> Iterator[Any]:
    with kernels(), gluon_kernels() as loaded:
        yield loaded


@pytest.fixture
def launched(gluon: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the Gluon kernels that were launched."""
    names: list[str] = []
    for name in ("ring", "lowrank_mma"):
        original = getattr(gluon, name).launch

        def launch(kernel: Any, *rest: Any, original: Any = original, **named: Any) -> None:
            names.append(getattr(kernel, "function", kernel).__name__)
            original(kernel, *rest, **named)

        monkeypatch.setattr(getattr(gluon, name), "launch", launch)
    return names


BFLOAT16 = torch.bfloat16
WAYS: dict[str, dict[str, Any]] = {
    "apart": {"batch": 2, "time": 21},
    "packed": {"batch": 1, "time": 41, "documents": (1, 13, 2, 0, 25)},
}
EACH_WAY = pytest.mark.parametrize("way", WAYS)
EACH_ACTIVATION = pytest.mark.parametrize("activation", [None, "silu"])


def placed(case: Case, way: str) -> Case:
    return replace(case, **WAYS[way])


@EACH_ACTIVATION
@EACH_WAY
@pytest.mark.parametrize("width", range(1, 9))
def test_static(width: int, way: str, activation: str | None, launched: list[str]) -> None:
    case = Case("static", heads=9, head_size=16, width=width, activation=activation, dtype=BFLOAT16)
    assert_close(placed(case, way))
    assert "backward_kernel" in launched


@EACH_ACTIVATION
@EACH_WAY
@pytest.mark.parametrize(("width", "head_size"), [(2, 8), (3, 1), (4, 1), (4, 2), (4, 16), (5, 4), (6, 16), (8, 4)])
def test_headwise(width: int, head_size: int, way: str, activation: str | None, launched: list[str]) -> None:
    heads = (144 if head_size < 8 else 128) // head_size
    case = Case("headwise", heads=heads, head_size=head_size, width=width, activation=activation, dtype=BFLOAT16)
    assert_close(placed(case, way))
    # With 3, 5 or 6 taps these kernels copy the filters, which only silu is worth.
    assert ("backward_kernel" in launched) == (activation == "silu" or width in (2, 4, 8))


@EACH_ACTIVATION
@EACH_WAY
@pytest.mark.parametrize("width", [1, 2, 4, 5, 6, 8])
def test_lowrank(width: int, way: str, activation: str | None, launched: list[str]) -> None:
    case = Case(heads=9, head_size=16, width=width, rank=15, activation=activation, dtype=BFLOAT16)
    assert_close(placed(case, way))
    assert "backward_kernel" in launched


@EACH_WAY
@pytest.mark.parametrize("width", [4, 5, 8])
def test_more_ranks_than_a_launch_takes(width: int, way: str, launched: list[str]) -> None:
    assert_close(placed(Case(heads=9, head_size=16, width=width, rank=40, dtype=BFLOAT16), way))
    assert launched.count("forward_kernel") == (1 if width == 4 else 2)
    assert launched.count("backward_kernel") == (3 if width == 4 else 6)


@pytest.mark.parametrize("rank", [7, 9, 16])
@pytest.mark.parametrize("width", [4, 6])
def test_segments(width: int, rank: int, launched: list[str]) -> None:
    assert_close(Case(batch=1, time=21, segments=(256, 128), width=width, rank=rank, dtype=torch.float16))
    assert "backward_kernel" in launched


@pytest.mark.parametrize(("width", "activation"), [(4, None), (6, "silu"), (8, None)])
def test_short_sequences_that_share_programs(
    width: int, activation: str | None, gluon: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As documents of one length; some filters are wider than these sequences are long."""
    cuts = []
    original = gluon.lowrank_mma._cut

    def cut(*given: Any, **named: Any) -> Any:
        cuts.append(original(*given, **named))
        return cuts[-1]

    monkeypatch.setattr(gluon.lowrank_mma, "_cut", cut)
    monkeypatch.setattr(gluon.lowrank_mma, "multiprocessors", lambda _: 1)
    case = Case(batch=12, time=5, heads=8, head_size=16, width=width, rank=16, activation=activation, dtype=BFLOAT16)
    assert_close(case)
    assert {made.length for made in cuts} == {(case.time,)}


@EACH_ACTIVATION
@pytest.mark.parametrize("case", [Case("static"), Case("headwise"), Case()], ids=lambda case: case.kind)
def test_documents_that_start_late_and_end_past_the_last_token(
    case: Case, activation: str | None, launched: list[str]
) -> None:
    """Where nothing can be read of them, as under torch.compile."""
    case = replace(case, heads=8, head_size=16, rank=15, activation=activation, dtype=BFLOAT16)
    case = replace(case, batch=1, time=41, documents=(3, 11, 2, 25))
    inputs = case.inputs()
    edges = torch.tensor([3, 14, 16, 45])
    torch.compiler.reset()
    late = torch.compile(lambda inputs: case.run(inputs, cu_seqlens=edges), fullgraph=True, backend="eager")
    want, got = (
        [y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))] for y in (case.run(inputs), late(inputs))
    )
    assert launched.count("backward_kernel") == 2
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@EACH_ACTIVATION
@pytest.mark.parametrize("case", [Case("static"), Case("headwise"), Case()], ids=lambda case: case.kind)
def test_longer_runs(case: Case, activation: str | None, gluon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of as many time steps as on a device of one multiprocessor."""
    for name in ("ring", "lowrank_mma"):
        monkeypatch.setattr(getattr(gluon, name), "multiprocessors", lambda _: 1)
    for width in (4, 6 if case.kind != "headwise" else 8):
        more = {"batch": 1, "time": 140, "heads": 8, "head_size": 16, "activation": activation, "dtype": BFLOAT16}
        assert_close(replace(case, width=width, rank=16, **more))  # type: ignore[arg-type]  # a mix of types


@pytest.mark.parametrize("kind", ["static", "headwise", "lowrank"])
def test_a_wrong_tap_shows(kind: str, gluon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in for Gluon does not make everything agree."""

    def weakened(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(value * 0.9 for value in values[1:])

    for module in (gluon.ring, gluon.lowrank_mma):
        monkeypatch.setattr(module.kernels, "drop_first", weakened)
    with pytest.raises(AssertionError):
        assert_close(Case(kind, heads=8, head_size=16, dtype=BFLOAT16, activation="silu"))
