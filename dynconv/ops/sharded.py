"""The convolutions of DTensors: each device's share is a convolution by itself, as sequences and channels are.

Legend: B batch, T time, D channels, H heads, W taps, R rank, N sequences. On every dimension of the device mesh, how x
is placed says how all is: replicated; sharded by batch, with the parameters replicated; or sharded by channels, with
static_w and U's channels sharded likewise, weight [B, T, H, W] by heads, and z replicated. What is placed otherwise is
moved first.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_BATCH, _CHANNELS = 0, 2  # the dimensions of x [B, T, D] that may be sharded


def all_plain(tensors: Iterable[Any]) -> bool:  # each a Tensor or None
    """Whether all that are there have memory of their own, as fake tensors and wrapper subclasses have not."""
    for tensor in tensors:
        kind = type(tensor)
        if kind is not Tensor and kind is not Parameter and tensor is not None:
            return False
    return True


def any_sharded(tensors: Sequence[Any]) -> bool:  # each a Tensor or None
    """Whether one of them is a DTensor."""
    if all_plain(tensors):  # which takes no time
        return False
    wrapped = [t for t in tensors if is_traceable_wrapper_subclass(t)]
    if not wrapped or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # half a second of imports

    return any(isinstance(t, DTensor) for t in wrapped)


def check_all_sharded(tensors: dict[str, Any]) -> None:  # by their names in the caller's call
    """Raises ValueError where some are DTensors and others are not."""
    given = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    sharded = [name for name, t in given.items() if any_sharded([t])]
    plain = [name for name in given if name not in sharded]
    if sharded and plain:
        raise ValueError(
            f"all tensors must be DTensors, or none; got {sharded[0]} as one and {plain[0]} as a plain tensor; "
            "use distribute_tensor or full_tensor (of parameters of fully_shard: call the module that it was given)"
        )


def run(
    convolve: Callable[..., Any],  # of x, z, weight, static_w and initial_state: a device's share of each
    x: Any,  # [B, T, D]
    z: Any,  # [B, T, G*R]: low-rank
    weight: Any,  # [B, T, H, W]: head-wise; [R, W*D]: low-rank; None: static
    static_w: Any,  # [W, D]
    initial_state: Any,  # [N, W-1, D]
    segments: tuple[int, ...],
    packed: bool,
) -> Any:  # what `convolve` returns, as DTensors that are placed as x is
    """Raises ValueError, on every device, where a device's share is no convolution by itself."""
    from torch.distributed.tensor import DTensor, Replicate

    basis = "weight" if z is None else "U"
    named = {"x": x, "z": z, basis: weight, "weight" if weight is None else "static_w": static_w}
    check_all_sharded(named | {"initial_state": initial_state})
    _check_placements(x, None if weight is None or z is not None else weight.shape[2], segments, packed)
    if z is None:
        share = _share(weight, x, batch=0, channels=2)
    else:  # U's columns are the channels of one tap after the other's; only apart can channels be sharded
        whole = weight.redistribute(placements=[Replicate()] * x.device_mesh.ndim)
        share = _share(whole.unflatten(1, (-1, x.shape[2])), x, channels=2).flatten(1)
    results = convolve(
        _share(x, x, batch=0, channels=2),
        _share(z, x, batch=0),
        share,
        _share(static_w, x, channels=1),
        _share(initial_state, x, batch=0, channels=2),
    )
    together = [
        DTensor.from_local(result, x.device_mesh, x.placements, run_check=False)
        for result in (results if isinstance(results, tuple) else (results,))
    ]
    return tuple(together) if isinstance(results, tuple) else together[0]


def _check_placements(x: Any, heads: int | None, segments: Sequence[int], packed: bool) -> None:
    from torch.distributed.tensor import Replicate, Shard

    shards = {_BATCH: 1, _CHANNELS: 1}
    for placement, size in zip(x.placements, x.device_mesh.shape, strict=True):
        if type(placement) is Shard and placement.dim in shards:
            shards[placement.dim] *= size
        elif type(placement) is not Replicate:
            raise ValueError(f"x must be replicated, or sharded by batch or channels; got {placement}; redistribute it")
    sizes = {"B": (x.shape[0], shards[_BATCH]), "D": (x.shape[2], shards[_CHANNELS])}
    if heads is not None:
        sizes["H"] = (heads, shards[_CHANNELS])
    for name, (size, parts) in sizes.items():
        if size % parts:
            raise ValueError(f"{name} must be a multiple of its shards; got {size} in {parts}; replicate x there")
    if packed and shards[_BATCH] > 1:
        raise ValueError("packed documents are one sequence; got x sharded by batch; shard it by channels")
    if len(segments) > 1 and shards[_CHANNELS] > 1:
        raise ValueError(f"channels of one segment can be sharded; got segments {tuple(segments)}; pass them apart")


def _share(tensor: Any, x: Any, batch: int | None = None, channels: int | None = None) -> Any:
    """This device's part of a tensor whose sequences and channels (or heads) are these dimensions, if it has them.

    What is replicated where x is sharded gets a gradient on every device, of which the sum is its own.
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    if tensor is None:
        return None
    placements: list[Any] = []
    gradients: list[Any] = []
    for placement in x.placements:
        dim = {_BATCH: batch, _CHANNELS: channels}[placement.dim] if isinstance(placement, Shard) else None
        placements.append(Replicate() if dim is None else Shard(dim))
        gradients.append(Partial() if dim is None and isinstance(placement, Shard) else placements[-1])
    return tensor.redistribute(x.device_mesh, placements).to_local(grad_placements=gradients)
