"""The Gluon kernels on a CPU: a stand-in for Gluon's language, on which their own source runs program by program.

Triton's interpreter knows no Gluon, so without this only a GPU would show what these kernels compute. Values are torch
tensors, and layouts are ignored, because they say where values lie, not what they are. Besides the results it checks:
- that no load or store lies outside a tensor's memory;
- that nothing is read from shared memory before it is written, or while an asynchronous copy into it is under way: until
  then it holds NaN, which shows in the result.
Not covered: the layouts themselves, races between warps, and two functions that exchange values between threads or
approximate, which are replaced by their meaning (`transpose` and inline assembly).
"""

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

_GLUON = "triton.experimental.gluon"
_MODULES = ["gluon_pieces", "ring_layouts", "ring_kernels", "ring", "mma", "lowrank_mma_kernels", "lowrank_mma"]


class Pointer:
    """Addresses in a tensor's memory: the tensor, and offsets from its first element."""

    def __init__(self, tensor: Tensor, offsets: Any = 0) -> None:
        self.tensor, self.offsets = tensor, torch.as_tensor(offsets)
        self.dtype = SimpleNamespace(element_ty=tensor.dtype, is_ptr=lambda: True)

    def __add__(self, offsets: Any) -> "Pointer":
        return Pointer(self.tensor, self.offsets + offsets)

    def memory(self) -> Tensor:
        begin = self.tensor.storage_offset()
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size() - begin
        return torch.as_strided(self.tensor, (size,), (1,), begin)

    def chosen(self, mask: Any, *more: Any) -> tuple[Tensor, ...]:
        """The offsets, the mask and other values, of one shape; no offset of the mask's may lie outside the memory."""
        offsets, mask, *rest = torch.broadcast_tensors(self.offsets, *map(torch.as_tensor, (mask, *more)))
        inside = offsets[mask]
        assert not inside.numel() or (inside.min() >= 0 and inside.max() < len(self.memory())), "outside the tensor"
        return offsets, mask, *rest


class Length(int):
    """An integer where a kernel may be given a pointer."""

    dtype = SimpleNamespace(is_ptr=lambda: False)

    def to(self, _: Any) -> int:
        return int(self)


class Shared:
    """Shared memory, or a part of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def index(self, index: Any) -> "Shared":
        return Shared(self.tensor[int(index)])

    def slice(self, start: int, length: int, dim: int) -> "Shared":
        return Shared(self.tensor.narrow(dim, start, length))

    def load(self, _: Any) -> Tensor:
        return self.tensor.clone()

    def store(self, value: Tensor) -> None:
        self.tensor.copy_(value)

    def spoil(self) -> None:
        self.tensor.fill_(torch.nan if self.tensor.is_floating_point() else 2**30)


class _Machine:
    """The program that runs, and its asynchronous copies, oldest group first."""

    def __init__(self) -> None:
        self.program = 0
        self.groups: list[list[tuple[Shared, Tensor]]] = []
        self.group: list[tuple[Shared, Tensor]] = []

    def begin(self, program: int) -> None:
        self.program, self.groups, self.group = program, [], []

    def async_load(self, slot: Shared, pointer: Pointer, mask: Any) -> None:
        slot.spoil()
        self.group.append((slot, load(pointer, mask, 0.0)))

    def commit_group(self) -> None:
        self.groups.append(self.group)
        self.group = []

    def wait_group(self, pending: int) -> None:
        while len(self.groups) > pending:
            for slot, value in self.groups.pop(0):
                slot.store(value)


_machine = _Machine()


def load(pointer: Pointer, mask: Any = True, other: float = 0.0) -> Tensor:
    offsets, mask = pointer.chosen(mask)
    values = pointer.memory()[torch.where(mask, offsets, 0)]
    return torch.where(mask, values, torch.full_like(values, other))


def store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    offsets, mask, value = pointer.chosen(mask, value)
    pointer.memory()[offsets[mask]] = value[mask].to(pointer.tensor.dtype)


def inline_asm_elementwise(asm: str, *_: Any, **__: Any) -> Tensor:
    arguments = _[1]
    if "ex2.approx" in asm:
        return torch.sigmoid(arguments[0])
    if "xor.b32" in asm:
        return arguments[0]  # with zero
    assert "fma.rn.bf16x2" in asm or "mul.rn.f16x2" in asm, asm
    return arguments[0] * arguments[1]


def allocate_shared_memory(dtype: torch.dtype, shape: list[int], _: Any) -> Shared:
    shared = Shared(torch.empty(shape, dtype=dtype))
    shared.spoil()
    return shared


def transpose(g: Tensor, *_: Any) -> Tensor:
    """What `mma.transpose` means: [warp, row, channel] -> [warp, column, row], of the matrix unit's columns."""
    column = torch.arange(16)
    return g.transpose(1, 2)[:, column % 8 // 2 * 4 + column // 8 * 2 + column % 2]


def mma_v2(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    assert a.dtype == b.dtype
    assert c.dtype == torch.float32
    return c + a.float() @ b.float()


def jit(function: Any = None, **_: Any) -> Any:
    return jit if function is None else function


def _language() -> dict[str, Any]:
    layouts = ["BlockedLayout", "SliceLayout", "SwizzledSharedLayout", "DistributedLinearLayout"]
    layouts += ["DotOperandLayout", "NVMMADistributedLayout"]
    made: dict[str, Any] = dict.fromkeys(layouts, lambda *_, **__: None)
    for name in ("float32", "float16", "bfloat16", "int32", "int64"):
        made[name] = getattr(torch, name)
    return made | {
        "constexpr": Any,
        "uint32": torch.int64,  # what is given is positive
        "static_range": range,
        "assume": lambda _: None,
        "static_assert": lambda *_: None,
        "program_id": lambda _: torch.tensor(_machine.program),
        "arange": lambda begin, end, _=None: torch.arange(begin, end),
        "zeros": lambda shape, dtype, _=None: torch.zeros(shape, dtype=dtype),
        "full": lambda shape, value, dtype, _=None: torch.full(shape, value, dtype=dtype),
        "zeros_like": torch.zeros_like,
        "where": torch.where,
        "minimum": lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
        "sum": lambda value, axis: value.sum(axis),
        "expand_dims": torch.unsqueeze,
        "convert_layout": lambda value, _: value,
        "split": lambda value: value.unbind(-1),
        "join": lambda a, b: torch.stack([a, b], -1),
        "load": load,
        "store": store,
        "inline_asm_elementwise": inline_asm_elementwise,
        "allocate_shared_memory": allocate_shared_memory,
    }


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    vars(module).update(attributes)
    return module


def _stand_ins() -> dict[str, ModuleType]:
    copies = SimpleNamespace(
        async_load=lambda slot, pointer, mask: _machine.async_load(slot, pointer, mask),
        commit_group=lambda: _machine.commit_group(),
        wait_group=lambda pending: _machine.wait_group(pending),
    )
    language = _module(f"{_GLUON}.language", **_language())
    ampere = _module(f"{_GLUON}.language.nvidia.ampere", async_copy=copies, mma_v2=mma_v2)
    nvidia = _module(f"{_GLUON}.language.nvidia", ampere=ampere)
    gluon = _module(_GLUON, jit=jit, constexpr_function=jit, language=language)
    return {module.__name__: module for module in (gluon, language, nvidia, ampere)}


def _launch(real: Callable[..., None]) -> Callable[..., None]:
    def launch(
        kernel: Any, programs: int, tensors: tuple[Tensor | None, ...], integers: tuple[int, ...],
        constants: dict[str, Any], **options: Any,
    ) -> None:  # fmt: skip
        if not inspect.isfunction(kernel):  # a Triton kernel, which Triton's interpreter runs
            real(kernel, programs, tensors, integers, constants, **options)
            return
        names = list(inspect.signature(kernel).parameters)
        given: list[Any] = [None if t is None else Pointer(t) for t in tensors]
        given += [
            Length(n) if name == "positions" else n for name, n in zip(names[len(given) :], integers, strict=False)
        ]
        for program in range(programs):
            _machine.begin(program)
            kernel(*given, **constants)

    return launch


def load_kernels() -> dict[str, ModuleType]:
    """The modules of the Gluon kernels, by name, with the stand-in for Gluon in place of it."""
    package = importlib.import_module("dynconv.ops")
    names = {name: f"dynconv.ops.{name}" for name in _MODULES}
    with pytest.MonkeyPatch.context() as patch:
        for name, module in _stand_ins().items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(importlib.import_module("triton.experimental"), "gluon", sys.modules[_GLUON], raising=False)
        for name, full in names.items():
            patch.delitem(sys.modules, full, raising=False)
            patch.delattr(package, name, raising=False)
        loaded = {}
        for name, full in names.items():
            loaded[name] = importlib.import_module(full)
            if name == "mma":
                vars(loaded[name])["transpose"] = transpose
        for name, full in names.items():  # so that the patch's end leaves none of them behind
            patch.delitem(sys.modules, full)
            patch.delattr(package, name)
    for name in ("ring", "lowrank_mma"):
        vars(loaded[name])["launch"] = _launch(vars(loaded[name])["launch"])
    return loaded


@contextlib.contextmanager
def gluon_kernels() -> Iterator[dict[str, ModuleType]]:
    """Within `convolutions.kernels`, run the Gluon kernels for all inputs that fit them, on the CPU."""
    loaded = load_kernels()
    ring, mma = loaded["ring"], loaded["lowrank_mma"]
    with pytest.MonkeyPatch.context() as patch:
        for user in ("static", "headwise", "operator"):
            patch.setattr(f"dynconv.ops.{user}.ring_fits", ring.fits)
        for user in ("static", "headwise"):
            patch.setattr(f"dynconv.ops.{user}.ring", ring)
        for user in ("lowrank", "operator"):
            patch.setattr(f"dynconv.ops.{user}.mma_fits", mma.fits)
        patch.setattr("dynconv.ops.lowrank.mma", mma)
        yield loaded
