"""Run the Gluon kernels on a CPU: Triton's interpreter does not take Gluon.

`interpreted` imports the kernels' modules anew with a stand-in for the Gluon language, in which a tensor is a torch
tensor and a layout is nothing. It shows whether kernels compute the right values from the right addresses, and whether
they wait for asynchronous copies: until it is waited for, what is copied is NaN. It cannot show whether layouts fit
(the compiler does), or whether warps race. `gluon_kernels` sends the functions of `dynconv.ops` to these kernels.
"""

import importlib
import operator
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton.experimental

import dynconv.ops

_LAUNCHING = ("lowrank_mma", "fused_mma", "ring", "fused_ring")
_MODULES = (
    "gluon_pieces",
    "mma",
    "mma_halves",
    "fused_pieces",
    "lowrank_mma_kernels",
    "gated_kernels",
    "gated_backward_kernel",
    "ring_layouts",
    "ring_kernels",
    *_LAUNCHING,
)


class _DType:
    def __init__(self, torch_dtype: torch.dtype, pointer: bool = False) -> None:
        self.torch, self._pointer = torch_dtype, pointer

    def is_ptr(self) -> bool:
        return self._pointer

    @property
    def element_ty(self) -> "_DType":
        return _DType(self.torch)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _DType) and other.torch == self.torch

    __hash__ = None  # type: ignore[assignment]


def _raw(value: Any) -> Any:
    return value.data if isinstance(value, _Value) else value


class _Value:
    """A tensor or scalar of a kernel."""

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    @property
    def dtype(self) -> _DType:
        return _DType(self.data.dtype)

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def to(self, dtype: _DType, bitcast: bool = False) -> "_Value":
        return _Value(self.data.view(dtype.torch) if bitcast else self.data.to(dtype.torch))

    def reshape(self, shape: list[int]) -> "_Value":
        return _Value(self.data.reshape(shape))

    def permute(self, order: list[int]) -> "_Value":
        return _Value(self.data.permute(order))

    def broadcast_to(self, shape: list[int]) -> "_Value":
        return _Value(self.data.broadcast_to(shape))

    def split(self) -> tuple["_Value", "_Value"]:
        assert self.data.shape[-1] == 2
        return _Value(self.data[..., 0]), _Value(self.data[..., 1])

    def __add__(self, other: Any) -> Any:
        return other + self if isinstance(other, _Pointer) else _Value(self.data + _raw(other))

    __radd__ = __add__


def _binary(function: Any) -> Any:
    return lambda self, other: _Value(function(self.data, _raw(other)))


for _name in ("sub", "mul", "floordiv", "mod", "lt", "le", "gt", "ge", "eq", "ne", "and_", "or_", "lshift", "rshift"):
    _function = getattr(operator, _name)
    setattr(_Value, f"__{_name.strip('_')}__", _binary(_function))
    setattr(_Value, f"__r{_name.strip('_')}__", lambda self, other, f=_function: _Value(f(_raw(other), self.data)))
_Value.__neg__ = lambda self: _Value(-self.data)  # type: ignore[attr-defined]
_Value.__invert__ = lambda self: _Value(~self.data)  # type: ignore[attr-defined]
_Value.__bool__ = lambda self: bool(self.data)  # type: ignore[attr-defined]
_Value.__index__ = lambda self: int(self.data)  # type: ignore[attr-defined]


class _Pointer:
    """Addresses: offsets into a tensor's storage."""

    def __init__(self, storage: torch.Tensor, offsets: torch.Tensor) -> None:
        self.storage, self.offsets = storage, offsets
        self.dtype = _DType(storage.dtype, pointer=True)

    @classmethod
    def to_tensor(cls, tensor: torch.Tensor) -> "_Pointer":
        flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        return cls(flat, torch.tensor(tensor.storage_offset()))

    def __add__(self, other: Any) -> "_Pointer":
        return _Pointer(self.storage, self.offsets + _raw(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> "_Pointer":
        return _Pointer(self.storage, self.offsets - _raw(other))

    def read(self, mask: Any, other: float) -> torch.Tensor:
        offsets, inside = self._inside(mask)
        return torch.where(inside, self.storage[torch.where(inside, offsets, 0)], torch.tensor(other).to(self.storage))

    def write(self, value: Any, mask: Any) -> None:
        offsets, inside = self._inside(mask)
        offsets, inside, data = torch.broadcast_tensors(offsets, inside, torch.as_tensor(_raw(value)))
        self.storage[offsets[inside]] = data[inside].to(self.storage.dtype)

    def _inside(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        offsets, inside = torch.broadcast_tensors(self.offsets, torch.as_tensor(_raw(mask)))
        used = offsets[inside]
        assert not len(used) or (used.min() >= 0 and used.max() < len(self.storage)), "an address outside of memory"
        return offsets, inside


class _Shared:
    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    def index(self, place: Any) -> "_Shared":
        return _Shared(self.data[int(_raw(place))])

    def slice(self, start: int, length: int, dim: int = 0) -> "_Shared":
        return _Shared(self.data.narrow(dim, start, length))

    def permute(self, order: tuple[int, ...]) -> "_Shared":
        return _Shared(self.data.permute(order))

    def load(self, _: Any) -> _Value:
        return _Value(self.data.clone())

    def store(self, value: _Value) -> None:
        self.data.copy_(value.data)

    def spoil(self) -> "_Shared":
        """Fill it with what no kernel may read."""
        self.data.fill_(torch.nan if self.data.is_floating_point() else -(10**6))
        return self


class _Copies:
    """A program's asynchronous copies into shared memory, in groups, the oldest first."""

    def __init__(self) -> None:
        self.groups: list[list[tuple[_Shared, _Value]]] = [[]]

    def async_load(self, shared: _Shared, pointer: _Pointer, mask: Any = True) -> None:
        self.groups[-1].append((shared.spoil(), _Value(pointer.read(mask, 0.0))))

    def commit_group(self) -> None:
        self.groups.append([])

    def wait_group(self, pending: int) -> None:
        while len(self.groups) - 1 > pending:
            for shared, value in self.groups.pop(0):
                shared.store(value)


def _inline_assembly(asm: str, _: str, args: list[_Value], dtype: _DType, **__: Any) -> _Value:
    values = [argument.data for argument in args]
    if "movmatrix" in asm:  # each 8 x 8 block, of which a thread holds two adjacent columns of one row, is transposed
        if values[0].shape[2] == 8:
            return _Value(values[0].unflatten(1, (2, 8)).transpose(2, 3).flatten(1, 2))
        warps = len(values[0])
        blocks = values[0].reshape(warps, 2, 4, 2, 4, 2, 2)
        return _Value(blocks.permute(0, 1, 4, 6, 2, 5, 3).reshape(warps, 16, 16))
    if "shfl" in asm:  # a lane has four channels
        partner = torch.arange(len(values[0])) ^ 4 * int(asm.split(", ")[2])
        return _Value(values[0][partner])
    for part, function in (
        ("xor.b32", lambda a, _: a),
        ("and.b32", lambda a: a),
        ("ex2.approx", torch.sigmoid),
        ("sin.approx", torch.sin),
        ("cos.approx", torch.cos),
        ("x2", operator.mul),
    ):
        if part in asm:
            return _Value(function(*values).to(dtype.torch))
    raise AssertionError(f"no stand-in for {asm}")


def _language() -> types.ModuleType:
    gl: Any = types.ModuleType("triton.experimental.gluon.language")
    for name in ("float32", "float16", "bfloat16", "int16", "int32", "int64"):
        setattr(gl, name, _DType(getattr(torch, name)))
    gl.uint32 = gl.int64
    gl.constexpr = object
    gl.static_range = gl.range = range
    gl.assume = lambda _: None
    gl.static_assert = lambda *_: None
    for name in (
        "NVMMADistributedLayout",
        "DistributedLinearLayout",
        "BlockedLayout",
        "DotOperandLayout",
        "SliceLayout",
    ):
        setattr(gl, name, lambda *_, **__: None)
    gl.SwizzledSharedLayout = gl.PaddedSharedLayout = gl.SliceLayout
    gl.arange = lambda start, end, layout=None: _Value(torch.arange(start, end, dtype=torch.int64))  # noqa: ARG005
    gl.expand_dims = lambda value, dim: _Value(value.data.unsqueeze(dim))
    gl.zeros = lambda shape, dtype, layout=None: _Value(torch.zeros(shape, dtype=dtype.torch))  # noqa: ARG005
    gl.full = lambda shape, value, dtype, layout=None: _Value(torch.full(shape, _raw(value), dtype=dtype.torch))  # noqa: ARG005
    gl.zeros_like = lambda value: _Value(torch.zeros_like(value.data))
    gl.where = lambda condition, a, b: _Value(torch.where(_raw(condition), _raw(a), _raw(b)))
    gl.minimum = lambda a, b: _Value(torch.minimum(torch.as_tensor(_raw(a)), torch.as_tensor(_raw(b))))
    gl.floor = lambda value: _Value(value.data.floor())
    gl.fma = lambda a, b, c: _Value((_raw(a).double() * b + _raw(c).double()).to(a.data.dtype))
    gl.sum = lambda value, dim: _Value(value.data.sum(dim))
    gl.join = lambda a, b: _Value(torch.stack([a.data, b.data], -1))
    gl.split = lambda value: value.split()
    gl.convert_layout = lambda value, layout, assert_trivial=False: value  # noqa: ARG005
    gl.load = lambda pointer, mask=True, other=0.0: _Value(pointer.read(mask, other))
    gl.store = lambda pointer, value, mask=True: pointer.write(value, mask)
    gl.inline_asm_elementwise = _inline_assembly
    # Shared memory is not cleared on a GPU, so a value that was never copied must show.
    gl.allocate_shared_memory = lambda dtype, shape, layout: _Shared(torch.empty(shape, dtype=dtype.torch)).spoil()  # noqa: ARG005
    return gl


class _Kernel:
    """A kernel, or a function that kernels call."""

    def __init__(self, function: Any) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)


def _jit(function: Any = None, **_: Any) -> Any:
    return _Kernel if function is None else _Kernel(function)


@contextmanager
def interpreted() -> Iterator[Any]:
    """The modules dynconv.ops.lowrank_mma, fused_mma, ring and fused_ring, whose kernels run in this process."""
    gluon: Any = types.ModuleType("triton.experimental.gluon")
    gl: Any = _language()
    gluon.language, gluon.jit, gluon.constexpr_function = gl, _jit, lambda function: function
    ampere: Any = types.ModuleType("triton.experimental.gluon.language.nvidia.ampere")

    def product(a: _Value, b: _Value, start: _Value) -> _Value:
        return _Value(start.data + a.data.float() @ b.data.float())

    copies = _Copies()
    ampere.async_copy = types.SimpleNamespace(
        async_load=copies.async_load, commit_group=copies.commit_group, wait_group=copies.wait_group
    )
    ampere.mma_v2 = product
    stand_ins = {module.__name__: module for module in (gluon, gl, ampere)}

    def launch(
        kernel: Any, programs: int, tensors: Any, integers: Any, constants: dict[str, Any], **options: Any
    ) -> None:
        if not isinstance(kernel, _Kernel):
            kernel[(programs,)](*tensors, *integers, **constants, **options)
            return
        pointers = [None if t is None else _Pointer.to_tensor(t) for t in tensors]
        numbers = [_Value(torch.tensor(n)) for n in integers]
        for program in range(programs):
            gl.program_id = lambda _, program=program: _Value(torch.tensor(program))
            copies.groups = [[]]
            kernel(*pointers, *numbers, **constants)

    with pytest.MonkeyPatch.context() as patch:
        for name, module in stand_ins.items():
            patch.setitem(sys.modules, name, module)
        patch.setenv("TRITON_INTERPRET", "1")  # for the plain Triton kernels of these modules
        patch.setattr(triton.experimental, "gluon", gluon, raising=False)
        for name in _MODULES:  # both are put back in the end
            patch.delitem(sys.modules, f"dynconv.ops.{name}", raising=False)
            patch.delattr(dynconv.ops, name, raising=False)
        modules = {name: importlib.import_module(f"dynconv.ops.{name}") for name in _LAUNCHING}
        for module in modules.values():
            patch.setattr(module, "launch", launch)
        try:
            yield types.SimpleNamespace(**modules)
        finally:
            for name in _MODULES:
                sys.modules.pop(f"dynconv.ops.{name}", None)


@contextmanager
def gluon_kernels() -> Iterator[Any]:
    """Within `convolutions.kernels`: the functions of `dynconv.ops` run these kernels for all inputs that fit them."""
    with interpreted() as modules, pytest.MonkeyPatch.context() as patch:
        for user in ("static", "headwise", "operator"):
            patch.setattr(f"dynconv.ops.{user}.ring_fits", modules.ring.fits)
        for user in ("static", "headwise"):
            patch.setattr(f"dynconv.ops.{user}.ring", modules.ring)
        for user in ("lowrank", "operator"):
            patch.setattr(f"dynconv.ops.{user}.mma_fits", modules.lowrank_mma.fits)
        patch.setattr("dynconv.ops.lowrank.mma", modules.lowrank_mma)
        yield modules


@contextmanager
def fused_kernels() -> Iterator[None]:
    """Run the fused kernels here, too: by tensor cores where there is a GPU, else by this interpreter."""
    if torch.cuda.is_available():
        yield
        return
    from dynconv.ops import functions, fused_operator

    with interpreted() as modules, pytest.MonkeyPatch.context() as patch:
        patch.setattr(functions, "_INTERPRET", True)
        patch.setattr(fused_operator, "fused_mma", modules.fused_mma)
        patch.setattr(fused_operator, "fused_ring", modules.fused_ring)
        patch.setattr(fused_operator, "runs_gluon", lambda _: True)
        yield
