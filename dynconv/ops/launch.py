"""Launches kernels at a fraction of the host time that PyTorch's and Triton's Python code takes.

A pass is a Python function that runs one convolution forward or backward. What it allocates, copies and launches
depends only on its options and on its inputs' signature: their shapes, strides, dtypes and alignment. So its Python
runs once per signature while `new`, `copied` and `launch` record what it does. Later calls repeat the recorded
allocations, copies and launches, and hand the kernels the addresses of the new tensors.
"""

import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

_ALIGNMENT = 512  # bytes, to which PyTorch's allocator aligns its blocks
_MAX_SIGNATURES = 4096  # signatures that are kept; each takes a few KB
_state = threading.local()  # a record per thread, because autograd runs backward passes in threads of its own
_repeats: dict[tuple[Any, ...], Callable[..., tuple[Any, ...]] | None] = {}


class _Record:
    """What one run of a pass allocates, copies and launches: all that it does to tensors.

    The record holds the tensors of that run and is dropped when the run ends. The function that `repeat` returns lives
    on, and must hold none of them: that would leak memory. Under torch.compile(mode="reduce-overhead") the memory would
    even belong to a CUDA graph's pool, where PyTorch raises an error about tensors that are no outputs of the graph.
    """

    def __init__(self) -> None:
        # a tensor, and its origin: torch.empty, torch.zeros, or the tensor that it copies
        self.made: list[tuple[Tensor, Any]] = []
        # the compiled kernel, the number of programs, the tensors, and the other arguments
        self.launched: list[tuple[Any, int, tuple[Tensor | None, ...], tuple[Any, ...]]] = []

    def repeat(
        self, inputs: tuple[Tensor | None, ...], results: tuple[Tensor | None, ...]
    ) -> Callable[..., tuple[Any, ...]] | None:
        """A function that does the same to other inputs of the same signature.

        Returns None if the pass cannot be repeated: it used a tensor that is neither an input nor recorded here, it
        copied a tensor that a launch may have changed, or Triton's interpreter ran the kernels.
        """
        result_ids = {id(r) for r in results if r is not None}
        allocated = [(t, origin) for t, origin in self.made if origin is not torch.empty or id(t) in result_ids]
        # All other tensors are scratch memory, and share one buffer.
        scratch = [t for t, origin in self.made if origin is torch.empty and id(t) not in result_ids]
        index = {id(t): n for n, t in enumerate([*inputs, *(t for t, _ in allocated), *scratch, None])}
        used = {id(t) for _, _, tensors, _ in self.launched for t in tensors}
        # The repeating function makes all copies before the first launch, so a copy's source must exist by then.
        copies = [(t, origin) for t, origin in allocated if isinstance(origin, Tensor)]
        copyable = {id(t) for t in (*inputs, *(copy for copy, _ in copies))}
        known = used <= index.keys() and {id(source) for _, source in copies} <= copyable
        known &= result_ids <= {id(t) for t, _ in allocated}
        interpreted = any(compiled is None for compiled, *_ in self.launched)
        if interpreted or not known:
            return None
        device = next(t.device for t in inputs if t is not None)
        allocations = [
            (tuple(t.shape), t.stride(), t.dtype, origin is torch.zeros, index.get(id(origin)))
            for t, origin in allocated
        ]
        sizes = (-(-t.nbytes // _ALIGNMENT) * _ALIGNMENT for t in scratch)
        *offsets, size = itertools.accumulate(sizes, initial=0)
        launches = [
            (compiled, programs, [index[id(t)] for t in tensors], rest)
            for compiled, programs, tensors, rest in self.launched
        ]
        returned = [None if r is None else index[id(r)] for r in results]

        quick, filled = _allocations(device)

        def repeat_pass(*inputs: Tensor | None) -> tuple[Any, ...]:  # each result is a Tensor or None
            allocate = filled if torch.are_deterministic_algorithms_enabled() else quick
            tensors: list[Any] = [*inputs]
            for shape, strides, dtype, zero, source in allocations:
                tensor = allocate(shape, strides, dtype)
                if zero:
                    tensor.zero_()
                tensors.append(tensor if source is None else tensor.copy_(tensors[source]))
            addresses = [None if t is None else t.data_ptr() for t in tensors]
            if offsets:
                # Freed on return, which is safe: the allocator reuses it only for later work on the same stream.
                buffer = allocate((size,), (1,), torch.uint8)
                start = buffer.data_ptr()
                addresses += [start + offset for offset in offsets]
            addresses.append(None)
            stream = driver.active.get_current_stream(device.index)
            hooked = _hooked()
            for compiled, programs, indices, rest in launches:
                arguments = [addresses[n] for n in indices]
                if hooked:
                    compiled[programs, 1, 1](*arguments, *rest, stream=stream)
                else:
                    # The line above calls this after preparing for hooks. torch's compiled code calls this as well.
                    compiled.run(
                        programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
                        *arguments, *rest,
                    )  # fmt: skip
            return tuple([None if n is None else tensors[n] for n in returned])

        return repeat_pass


_Allocate = Callable[[Any, Any, torch.dtype], Tensor]  # of a shape, strides and dtype, on the current device


def _allocations(device: torch.device) -> tuple[_Allocate, _Allocate]:
    """Two functions that allocate an uninitialised tensor: a quick one, and one for deterministic algorithms.

    The first is the one that torch's compiled code calls, and takes a third of torch.empty's host time. It does not
    fill new memory, which PyTorch does where algorithms must be deterministic: torch.empty_strided is for that.
    """

    def filled(shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    return getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", filled), filled


def _hooked() -> bool:
    """Whether somebody, such as Triton's profiler, has set hooks that Triton is to call with every launch."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))  # each a chain, or one hook, or None


def repeated(
    run: Callable[..., tuple[Any, ...]],  # the pass, called as run(*inputs, *options)
    inputs: tuple[Tensor | None, ...],  # the first decides the device to run on
    options: tuple[Any, ...],  # hashable
) -> tuple[Any, ...]:  # each a Tensor or None
    """The results of run(*inputs, *options), by repeating a recorded run if there is one for this signature."""
    first = inputs[0]
    assert first is not None
    if not first.is_cuda or torch.version.hip:  # AMD's backend specialises kernels on more than this signature
        return run(*inputs, *options)
    if first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            return _repeated(run, inputs, options)
    return _repeated(run, inputs, options)


def _repeated(
    run: Callable[..., tuple[Any, ...]], inputs: tuple[Tensor | None, ...], options: tuple[Any, ...]
) -> tuple[Any, ...]:
    """`repeated`, for inputs on the current device."""
    device = inputs[0].device.index  # type: ignore[union-attr]
    signature = [None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16) for t in inputs]
    key = (run, device, options, *signature)
    repeat_pass = _repeats.get(key)
    if repeat_pass is not None:
        return repeat_pass(*inputs)
    ids = [id(t) for t in inputs if t is not None]
    # A record knows tensors by identity: if one is passed twice, it cannot tell which of the two a launch used.
    if key in _repeats or len(set(ids)) < len(ids):
        return run(*inputs, *options)
    if len(_repeats) >= _MAX_SIGNATURES:
        for oldest in list(_repeats)[: _MAX_SIGNATURES // 2]:
            _repeats.pop(oldest, None)  # with a default, as another thread may have removed it
    _state.record = record = _Record()
    try:
        results = run(*inputs, *options)
    finally:
        _state.record = None
    _repeats[key] = record.repeat(inputs, results)
    return results


def new(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, zero: bool = False) -> Tensor:
    """Allocate a contiguous tensor on the device of `like`: zeros, or uninitialised."""
    make: Any = torch.zeros if zero else torch.empty
    return _recorded(make(shape, dtype=dtype, device=like.device), make)


def copied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy of a tensor, which must be an input of the pass or itself a result of `copied`."""
    copy = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device).copy_(tensor)
    return _recorded(copy, tensor)


def _recorded(made: Tensor, origin: Any) -> Tensor:
    """Note the tensor and its origin in the record, if one is being made on this thread."""
    record = getattr(_state, "record", None)
    if record is not None:
        record.made.append((made, origin))
    return made


def launch(
    kernel: Any,  # its parameters must be, in this order: the tensors, the integers, the constants
    programs: int,
    tensors: tuple[Tensor | None, ...],
    integers: tuple[int, ...],
    constants: dict[str, Any],
    **options: Any,  # for Triton's compiler, such as num_warps
) -> None:
    """Run `programs` programs of the kernel on the current device."""
    # Set explicitly, because Triton 3.9 warns that the default will change.
    options |= {"enable_fp_fusion": True}
    compiled = kernel[(programs,)](*tensors, *integers, **constants, **options)
    record = getattr(_state, "record", None)
    if record is not None:
        record.launched.append((compiled, programs, tensors, (*integers, *constants.values())))
