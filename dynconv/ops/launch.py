"""Launching kernels at a fraction of the host time that PyTorch's and Triton's Python takes.

What a pass allocates, copies and launches depends on its inputs' signature alone: their shapes, strides, dtypes and
alignment. So its Python runs once for a signature, and what it does is recorded; later calls repeat that, by addresses.
"""

import itertools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

_ALIGNED = 512  # bytes, as PyTorch's allocator aligns
_MOST = 4096  # signatures kept, of a few KB each
_state = threading.local()  # autograd's threads run backward passes
_repeats: dict[tuple[Any, ...], Callable[..., tuple[Any, ...]] | None] = {}


class _Record:
    """What one run of a pass allocates, copies and launches: all that it does to tensors.

    It keeps them alive for as long as it lives itself, the length of that run; what `repeat` returns must not. Kept
    scratch would be a leak, and under torch.compile(mode="reduce-overhead") memory in a CUDA graph's pool that is no
    output of the graph, which PyTorch refuses.
    """

    def __init__(self) -> None:
        self.made: list[tuple[Tensor, Any]] = []  # and torch.empty, torch.zeros, or the tensor that it is a copy of
        self.launched: list[tuple[Any, int, tuple[Tensor | None, ...], tuple[Any, ...]]] = []

    def repeat(
        self, inputs: tuple[Tensor | None, ...], results: tuple[Tensor | None, ...]
    ) -> Callable[..., tuple[Any, ...]] | None:
        """A function of other inputs that does the same; None if the pass used a tensor of unknown origin."""
        kept = {id(r) for r in results if r is not None}
        alone = [(t, how) for t, how in self.made if how is not torch.empty or id(t) in kept]
        shared = [t for t, how in self.made if how is torch.empty and id(t) not in kept]  # one buffer for all of them
        number = {id(t): n for n, t in enumerate([*inputs, *(t for t, _ in alone), *shared, None])}
        used = {id(t) for _, _, tensors, _ in self.launched for t in tensors}
        copies = [(t, how) for t, how in alone if isinstance(how, Tensor)]
        copyable = {id(t) for t in (*inputs, *(copy for copy, _ in copies))}  # before any launch
        known = used <= number.keys() and {id(source) for _, source in copies} <= copyable
        known &= kept <= {id(t) for t, _ in alone}
        interpreted = any(compiled is None for compiled, *_ in self.launched)
        if interpreted or not known:
            return None
        device = next(t.device for t in inputs if t is not None)
        makers = [
            (torch.zeros if how is torch.zeros else torch.empty, t.shape, t.dtype, number.get(id(how)))
            for t, how in alone
        ]
        sizes = (-(-t.nbytes // _ALIGNED) * _ALIGNED for t in shared)
        *offsets, size = itertools.accumulate(sizes, initial=0)
        launches = [
            (compiled[programs, 1, 1], [number[id(t)] for t in tensors], rest)
            for compiled, programs, tensors, rest in self.launched
        ]
        returned = [None if r is None else number[id(r)] for r in results]

        def again(*inputs: Tensor | None) -> tuple[Any, ...]:  # of Tensor and None
            tensors: list[Any] = [*inputs]
            for make, shape, dtype, source in makers:
                tensor = make(shape, dtype=dtype, device=device)
                tensors.append(tensor if source is None else tensor.copy_(tensors[source]))
            addresses = [None if t is None else t.data_ptr() for t in tensors]
            if offsets:
                scratch = torch.empty(size, dtype=torch.uint8, device=device)  # ours until this stream has passed it
                start = scratch.data_ptr()
                addresses += [start + offset for offset in offsets]
            addresses.append(None)
            stream = driver.active.get_current_stream(device.index)
            for run, numbers, rest in launches:
                run(*[addresses[n] for n in numbers], *rest, stream=stream)
            return tuple([None if n is None else tensors[n] for n in returned])

        return again


def repeated(
    run: Callable[..., tuple[Any, ...]],  # a pass, of `inputs` and `options`
    inputs: tuple[Tensor | None, ...],  # the first is on the device to run on
    options: tuple[Any, ...],  # hashable
) -> tuple[Any, ...]:  # of Tensor and None
    """run(*inputs, *options), by what was recorded where a run on inputs of this signature was."""
    first = inputs[0]
    assert first is not None
    if not first.is_cuda or torch.version.hip:  # AMD's backend specialises kernels on more than the signature
        return run(*inputs, *options)
    if first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            return _repeated(run, inputs, options)
    return _repeated(run, inputs, options)


def _repeated(
    run: Callable[..., tuple[Any, ...]], inputs: tuple[Tensor | None, ...], options: tuple[Any, ...]
) -> tuple[Any, ...]:
    """`repeated` on the current device."""
    device = inputs[0].device.index  # type: ignore[union-attr]
    facts = [None if t is None else (t.dtype, t.shape, t.stride(), t.data_ptr() % 16) for t in inputs]
    key = (run, device, options, *facts)
    again = _repeats.get(key)
    if again is not None:
        return again(*inputs)
    given = [id(t) for t in inputs if t is not None]
    if key in _repeats or len(set(given)) < len(given):  # of one tensor given twice it is unclear which is used where
        return run(*inputs, *options)
    if len(_repeats) >= _MOST:
        for oldest in list(_repeats)[: _MOST // 2]:
            _repeats.pop(oldest, None)  # another thread may be at it, too
    _state.record = record = _Record()
    try:
        results = run(*inputs, *options)
    finally:
        _state.record = None
    _repeats[key] = record.repeat(inputs, results)
    return results


def new(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, zero: bool = False) -> Tensor:
    """A contiguous tensor on a tensor's device: zeros, or uninitialised."""
    make: Any = torch.zeros if zero else torch.empty
    return _recorded(make(shape, dtype=dtype, device=like.device), make)


def copied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A contiguous copy of an input of the pass, or of such a copy."""
    copy = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=tensor.device).copy_(tensor)
    return _recorded(copy, tensor)


def _recorded(made: Tensor, how: Any) -> Tensor:
    record = getattr(_state, "record", None)
    if record is not None:
        record.made.append((made, how))
    return made


def launch(
    kernel: Any,  # its parameters are, in this order: the tensors, the integers, the constants
    programs: int,
    tensors: tuple[Tensor | None, ...],
    integers: tuple[int, ...],
    constants: dict[str, Any],
    **options: Any,  # the compiler's, num_warps and so on
) -> None:
    """Run `programs` programs of the kernel on the current device."""
    # Triton 3.9 warns that the default is about to change.
    options |= {"enable_fp_fusion": True}
    compiled = kernel[(programs,)](*tensors, *integers, **constants, **options)
    record = getattr(_state, "record", None)
    if record is not None:
        record.launched.append((compiled, programs, tensors, (*integers, *constants.values())))
