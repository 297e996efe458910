"""Launches repeated by address: a repeated pass gives what the pass itself does. The kernels here are Python."""

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from convolutions import kernels
from torch import Tensor


@pytest.fixture(autouse=True)
def launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with kernels():
        from dynconv.ops import launch

        monkeypatch.setattr(launch, "JITFunction", Kernel)
        monkeypatch.setattr(launch.driver, "_active", Kernel)
        yield launch


class Kernel:
    """total = x + y over `size` float32 values, whose memory it knows by address alone."""

    def __init__(self) -> None:
        self.runs = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.first if len(grid) == 1 else self.run

    def first(self, *arguments: Any, **constants: Any) -> "Kernel":
        addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        self.run(*addresses, constants["SCALE"], stream=0)
        return self

    def run(self, x: int, y: int | None, total: int, size: int, scale: float, stream: int) -> None:  # noqa: ARG002
        self.runs += 1
        values = [np.ctypeslib.as_array((ctypes.c_float * size).from_address(a)) for a in (x, y or x, total)]
        np.add(values[0], scale * values[1] if y else 0, out=values[2])

    @staticmethod
    def get_current_stream(device: int | None) -> int:  # noqa: ARG004
        return 0


def record(launch: Any, run: Callable[..., Any], *inputs: Tensor | None) -> tuple[Any, Any]:
    """The pass's results, and what repeats it."""
    launch._state.record = recorded = launch._Record()
    results = run(*inputs)
    launch._state.record = None
    return results, recorded.repeat(inputs, results)


def test_a_repeated_pass_is_as_the_pass(launch: Any) -> None:
    kernel = Kernel()

    def run(x: Tensor, absent: None, y: Tensor) -> tuple[Tensor | None, ...]:
        scratch, zeros = launch.new(x, (7,), torch.float32), launch.new(x, (7,), torch.float32, zero=True)
        a, b, c = (launch.new(x, (7,), torch.float32) for _ in range(3))
        launch.launch(kernel, 1, (x, y, scratch), (7,), {"SCALE": 2.0})
        launch.launch(kernel, 1, (scratch, y, a), (7,), {"SCALE": 1.0})
        launch.launch(kernel, 1, (y, absent, b), (7,), {"SCALE": 1.0})
        launch.launch(kernel, 1, (zeros, scratch, c), (7,), {"SCALE": 0.5})
        return b, None, a, c

    def check(results: tuple[Tensor | None, ...], x: Tensor, y: Tensor) -> None:
        wanted = (y, None, x + 3 * y, x / 2 + y)
        for got, want in zip(results, wanted, strict=True):
            assert (got is want) if want is None else torch.allclose(got, want)  # type: ignore[arg-type]

    x, y = torch.randn(2, 7)
    results, again = record(launch, run, x, None, y)
    check(results, x, y)
    for _ in range(3):
        x, y = torch.randn(2, 7)
        check(again(x, None, y), x, y)
    assert kernel.runs == 16


def test_a_pass_that_makes_tensors_of_its_own_is_not_repeated(launch: Any) -> None:
    def copies(x: Tensor) -> tuple[Tensor]:
        result: Tensor = launch.new(x, x.shape, x.dtype)
        launch.launch(Kernel(), 1, (x.clone(), None, result), (4,), {"SCALE": 1.0})
        return (result,)

    for run in (copies, lambda x: (torch.zeros_like(x),), lambda x: (x,)):
        assert record(launch, run, torch.ones(4))[1] is None
