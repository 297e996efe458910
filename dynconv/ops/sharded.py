"""The convolutions of DTensors. Sequences and channels are independent, so each device convolves its own shard.

Legend: B batch, T time, D channels, H heads, W taps, R rank, N sequences.
On each dimension of the device mesh, x's placement decides how all other tensors must be placed:
- x replicated: everything is replicated;
- x sharded by batch: z, weight [B, T, H, W] and initial_state are sharded by batch, static_w and U are replicated;
- x sharded by channels: static_w, U and initial_state are sharded by channels, weight [B, T, H, W] by heads, and z is
  replicated.
Tensors that are placed differently are redistributed first.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_BATCH, _CHANNELS = 0, 2  # the dimensions of x [B, T, D] that may be sharded


def all_plain(tensors: Iterable[Any]) -> bool:  # each a Tensor or None
    """Whether all are plain tensors or parameters. Kernels cannot be launched on fake tensors or wrapper subclasses."""
    for tensor in tensors:
        kind = type(tensor)
        if kind is not Tensor and kind is not Parameter and tensor is not None:
            return False
    return True


def any_sharded(tensors: Sequence[Any]) -> bool:  # each a Tensor or None
    """Whether one of them is a DTensor."""
    if all_plain(tensors):  # the common case, decided without importing DTensor
        return False
    wrapped = [t for t in tensors if is_traceable_wrapper_subclass(t)]
    if not wrapped or not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # imported only here, as it takes half a second

    return any(isinstance(t, DTensor) for t in wrapped)


def replicated(mask: Tensor, like: Any) -> Any:
    """The mask, as a DTensor if `like` is one: every device holds all of it."""
    if not any_sharded([like]):
        return mask
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(mask, like.device_mesh, [Replicate()] * like.device_mesh.ndim, run_check=False)


def check_all_sharded(tensors: dict[str, Any]) -> None:  # keyed by the name that the error message shall show
    """Raise ValueError if some are DTensors and others plain tensors."""
    given = {name: t for name, t in tensors.items() if isinstance(t, Tensor)}
    sharded = [name for name, t in given.items() if any_sharded([t])]
    plain = [name for name in given if name not in sharded]
    if sharded and plain:
        raise ValueError(
            f"all tensors must be DTensors, or none; got {sharded[0]} as one and {plain[0]} as a plain tensor; "
            "use distribute_tensor or full_tensor (of parameters of fully_shard: call the module that it was given)"
        )


def run(
    convolve: Callable[..., Any],  # called with the local shards of x, z, weight, static_w and initial_state
    x: Any,  # [B, T, D]
    z: Any,  # [B, T, G*R]: low-rank
    weight: Any,  # [B, T, H, W]: head-wise; [R, W*D]: low-rank; None: static
    static_w: Any,  # [W, D]
    initial_state: Any,  # [N, W-1, D]
    segments: tuple[int, ...],
    packed: bool,
) -> Any:  # what `convolve` returns, as DTensors with x's placements
    """Run `convolve` on every device's local shards.

    Raises ValueError, on every device alike, if the shards of x are not independent convolutions.
    """
    from torch.distributed.tensor import DTensor, Replicate

    basis = "weight" if z is None else "U"
    named = {"x": x, "z": z, basis: weight, "weight" if weight is None else "static_w": static_w}
    check_all_sharded(named | {"initial_state": initial_state})
    _check_placements(x, None if weight is None or z is not None else weight.shape[2], segments, packed)
    if z is None:
        local_weight = _local_shard(weight, x, batch=0, channels=2)
    else:  # U's columns are W blocks of D channels, so view U as [R, W, D] before sharding by channels
        whole = weight.redistribute(placements=[Replicate()] * x.device_mesh.ndim)
        local_weight = _local_shard(whole.unflatten(1, (-1, x.shape[2])), x, channels=2).flatten(1)
    results = convolve(
        _local_shard(x, x, batch=0, channels=2),
        _local_shard(z, x, batch=0),
        local_weight,
        _local_shard(static_w, x, channels=1),
        _local_shard(initial_state, x, batch=0, channels=2),
    )
    together = [
        DTensor.from_local(result, x.device_mesh, x.placements, run_check=False)
        for result in (results if isinstance(results, tuple) else (results,))
    ]
    return tuple(together) if isinstance(results, tuple) else together[0]


def _check_placements(x: Any, heads: int | None, segments: Sequence[int], packed: bool) -> None:
    """Raise ValueError unless the placement of x gives each device an independent convolution of equal size."""
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
        raise ValueError(
            f"only channels of one segment can be sharded; got segments {tuple(segments)}; call once per segment"
        )


def _local_shard(
    tensor: Any,
    x: Any,
    batch: int | None = None,  # the tensor's dimension of sequences; None if it has none
    channels: int | None = None,  # the tensor's dimension of channels or heads; None if it has none
) -> Any:
    """This device's part of a tensor, once it is placed as x's placement requires.

    If the tensor is replicated where x is sharded, each device's gradient holds only its own shard's contribution.
    Such a gradient is marked as Partial, so that DTensor sums it over the devices.
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
