"""Launches repeated by address: a repeated pass gives what the pass itself does. The kernels here are Python."""

import ctypes
import gc
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from convolutions import kernels, poisoned_memory
from torch import Tensor


@pytest.fixture(autouse=True)
def launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with kernels():
        from dynconv.ops import launch

        monkeypatch.setattr(launch.driver, "_active", Kernel)
        monkeypatch.setattr(launch, "_repeats", {})
        yield launch


class Kernel:
    """total = x + y over `size` float32 values, whose memory it knows by address alone."""

    function = packed_metadata = None

    def __init__(self) -> None:
        self.runs = 0
        self.hooked = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.first if len(grid) == 1 else self.with_hooks

    def first(self, *arguments: Any, **constants: Any) -> "Kernel":
        addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        self.add(*addresses, constants["SCALE"])
        return self

    def with_hooks(self, *arguments: Any, stream: int) -> None:  # noqa: ARG002
        self.hooked += 1
        self.add(*arguments)

    def run(self, *arguments: Any) -> None:
        """As Triton's compiled kernels: three sizes of the grid, the stream, five things for hooks, the arguments."""
        assert (arguments[:4], set(arguments[4:9])) == ((1, 1, 1, 0), {None})
        self.add(*arguments[9:])

    def add(self, x: int, y: int | None, total: int, size: int, scale: float) -> None:
        self.runs += 1
        values = [np.ctypeslib.as_array((ctypes.c_float * size).from_address(a)) for a in (x, y or x, total)]
        np.add(values[0], scale * values[1] if y else 0, out=values[2])

    @staticmethod
    def get_current_stream(device: int | None) -> int:  # noqa: ARG004
        return 0


def test_a_repeated_pass_is_as_the_pass(launch: Any) -> None:
    kernel = Kernel()
    runs = 0

    def run(x: Tensor, absent: None, y: Tensor) -> tuple[Tensor | None, ...]:
        nonlocal runs
        runs += 1
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

    for _ in range(4):
        x, y = torch.randn(2, 7)
        check(launch._repeated(run, (x, None, y), ()), x, y)
    assert (runs, kernel.runs) == (1, 16)


def test_hooks_are_called(launch: Any) -> None:
    """Hooks that are set after the recording, as Triton's profiler does, see every launch."""
    kernel = Kernel()

    def run(x: Tensor, y: Tensor) -> tuple[Tensor]:
        total: Tensor = launch.new(x, x.shape, x.dtype)
        launch.launch(kernel, 1, (x, y, total), (x.shape[0],), {"SCALE": 2.0})
        return (total,)

    def check() -> None:
        x, y = torch.randn(2, 4)
        (total,) = launch._repeated(run, (x, y), ())
        assert torch.allclose(total, x + 2 * y)

    hooks = launch.knobs.runtime
    for set_hook in (hooks.launch_enter_hook, hooks.launch_exit_hook):
        before = kernel.hooked
        check()
        set_hook.add(print)
        try:
            check()
            check()
        finally:
            set_hook.remove(print)
        check()
        assert kernel.hooked == before + 2


def test_memory_is_filled_where_algorithms_must_be_deterministic(launch: Any) -> None:
    def run(x: Tensor) -> tuple[Tensor]:
        total: Tensor = launch.new(x, x.shape, x.dtype)
        launch.launch(Kernel(), 1, (x, x, total), (2,), {"SCALE": 1.0})  # the first two elements only
        return (total,)

    x = torch.ones(4)
    launch._repeated(run, (x,), ())
    with poisoned_memory():
        (total,) = launch._repeated(run, (x,), ())
    assert total[:2].tolist() == [2, 2]
    assert total[2:].isnan().all()


def test_copies_of_inputs_are_made_again(launch: Any) -> None:
    kernel = Kernel()

    def run(x: Tensor, y: Tensor) -> tuple[Tensor]:
        total = launch.new(x, (4,), torch.float32)
        rows = launch.copied(x)
        launch.launch(kernel, 1, (launch.copied(rows), launch.copied(y, torch.float32), total), (4,), {"SCALE": 2.0})
        return (total,)

    for _ in range(3):
        x, y = torch.randn(8)[::2], torch.randn(4, dtype=torch.float64)
        (total,) = launch._repeated(run, (x, y), ())
        assert torch.allclose(total, x + 2 * y.float())
    (again,) = launch._repeats.values()
    assert again is not None


def test_other_signatures_run_the_pass(launch: Any) -> None:
    runs = 0

    def run(x: Tensor, y: Tensor, scale: float) -> tuple[Tensor]:
        nonlocal runs
        runs += 1
        total: Tensor = launch.new(x, x.shape, x.dtype)
        launch.launch(Kernel(), 1, (x, y, total), (x.shape[0],), {"SCALE": scale})
        return (total,)

    def check(x: Tensor, y: Tensor, scale: float, known: int) -> None:
        for _ in range(2):
            (total,) = launch._repeated(run, (x, y), (scale,))
            assert torch.allclose(total, x + scale * y)
        assert runs == known

    x, y = torch.randn(4), torch.randn(4)
    check(x, y, 1.0, known=1)
    check(torch.randn(5), torch.randn(5), 1.0, known=2)
    check(x, y, 3.0, known=3)
    check(torch.randn(5)[1:], y, 3.0, known=4)  # at no multiple of 16 bytes
    check(y, y.clone(), 3.0, known=4)
    check(x, x, 2.0, known=6)  # one tensor twice: neither recorded nor repeated
    check(x, y, 2.0, known=7)


def test_strides_and_dtypes_tell_signatures_apart(launch: Any) -> None:
    copies = 0

    def run(x: Tensor) -> tuple[Tensor]:
        nonlocal copies
        copies += not x.is_contiguous() or x.dtype != torch.float32
        rows = launch.copied(x, torch.float32) if not x.is_contiguous() or x.dtype != torch.float32 else x
        total: Tensor = launch.new(x, x.shape, torch.float32)
        launch.launch(Kernel(), 1, (rows, rows, total), (4,), {"SCALE": 1.0})
        return (total,)

    for x in (torch.randn(4), torch.randn(8)[::2], torch.randn(4).double(), torch.randn(12)[::3]) * 2:
        (total,) = launch._repeated(run, (x,), ())
        assert torch.allclose(total, 2 * x.float())
    assert copies == 3


def test_a_pass_that_raises_leaves_nothing_recorded(launch: Any) -> None:
    def run(x: Tensor) -> tuple[Tensor]:
        launch.new(x, (4,), torch.float32)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        launch._repeated(run, (torch.ones(4),), ())
    assert launch._state.record is None
    assert not launch._repeats


def test_old_signatures_go_and_new_ones_stay(launch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_MAX_SIGNATURES", 4)

    def run(x: Tensor, _: int) -> tuple[Tensor]:
        return (launch.new(x, x.shape, x.dtype),)

    for option in range(5):
        launch._repeated(run, (torch.ones(4),), (option,))
    assert [key[2] for key in launch._repeats] == [(2,), (3,), (4,)]


def test_a_pass_that_makes_tensors_of_its_own_is_not_repeated(launch: Any) -> None:
    def clones(x: Tensor) -> tuple[Tensor]:
        result: Tensor = launch.new(x, x.shape, x.dtype)
        launch.launch(Kernel(), 1, (x.clone(), None, result), (4,), {"SCALE": 1.0})
        return (result,)

    def copies(x: Tensor) -> tuple[Tensor]:
        result: Tensor = launch.new(x, x.shape, x.dtype)
        launch.launch(Kernel(), 1, (launch.copied(x.clone()), None, result), (4,), {"SCALE": 1.0})
        return (result,)

    def copies_results(x: Tensor) -> tuple[Tensor]:  # which the launches of a repeated pass would come too late for
        result: Tensor = launch.new(x, x.shape, x.dtype)
        launch.launch(Kernel(), 1, (x, None, result), (4,), {"SCALE": 1.0})
        return (launch.copied(result),)

    runs = (clones, copies, copies_results, lambda x: (torch.zeros_like(x),), lambda x: (x,))
    for run in runs:
        for _ in range(2):
            launch._repeated(run, (torch.ones(4),), ())
    assert list(launch._repeats.values()) == [None] * len(runs)


def reachable_tensors(start: Any) -> list[Tensor]:
    """The tensors that an object keeps alive, however far down; modules and types lead everywhere, and are left out."""
    found, seen, ahead = [], set(), [start]
    while ahead:
        thing = ahead.pop()
        if id(thing) in seen or isinstance(thing, (types.ModuleType, type)):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            found.append(thing)
        elif isinstance(thing, types.FunctionType):  # whose globals are a module's
            ahead += [cell.cell_contents for cell in thing.__closure__ or ()] + [thing.__defaults__]
        else:
            ahead += gc.get_referents(thing)
    return found


def test_a_record_keeps_no_tensor_alive(launch: Any) -> None:
    """Scratch that outlives the call leaks, and is memory of a CUDA graph that PyTorch's graph trees do not know of."""
    kernel = Kernel()
    made: list[weakref.ref[Tensor]] = []

    def run(x: Tensor) -> tuple[Tensor]:
        scratch, zeros = launch.new(x, (7,), torch.float32), launch.new(x, (7,), torch.float32, zero=True)
        copy, result = launch.copied(x), launch.new(x, (7,), torch.float32)
        made.extend(weakref.ref(tensor) for tensor in (scratch, zeros, copy, result))
        launch.launch(kernel, 1, (copy, zeros, scratch), (7,), {"SCALE": 2.0})
        launch.launch(kernel, 1, (scratch, x, result), (7,), {"SCALE": 1.0})
        return (result,)

    gc.disable()  # a cycle would keep them until some later collection
    try:
        for _ in range(3):
            x = torch.randn(7)
            (result,) = launch._repeated(run, (x,), ())
            assert torch.allclose(result, 2 * x)
            del result
            assert [reference() for reference in made] == [None] * 4
    finally:
        gc.enable()
    assert reachable_tensors(list(launch._repeats.items())) == []
    (again,) = launch._repeats.values()
    assert again is not None


def test_interpreted_kernels_are_not_repeated(launch: Any) -> None:
    def run(x: Tensor) -> tuple[Tensor]:
        result: Tensor = launch.new(x, x.shape, x.dtype)
        launch.launch({(1,): lambda *_, **__: None}, 1, (x, result), (4,), {})
        return (result,)

    launch._repeated(run, (torch.ones(4),), ())
    assert list(launch._repeats.values()) == [None]
