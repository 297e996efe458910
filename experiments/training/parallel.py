"""The processes that train a run together: how they share a model and average gradients.

"ddp": every process holds the whole model (torch.nn.parallel.DistributedDataParallel). "fsdp": every process holds a
part of each matrix, of its gradient and of its optimizer state, in float32. The processes gather the matrices of one
layer at a time, in bfloat16 on a GPU (torch.distributed.fsdp.fully_shard; ZeRO stage 3, arXiv 1910.02054).
"""

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dynconv.layers import optimizer_groups

_PEER_LOST = re.compile(
    r"gloo/transport/|ncclRemoteError|communicator was aborted|collective operation timeout|"
    r"closed by (remote )?peer|reset by peer|connection refused|no route to host|timed out waiting",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class World:
    """The processes that train a run together, each on a device of its own."""

    rank: int
    size: int
    device: torch.device
    parallel: Literal["ddp", "fsdp"] = "ddp"

    @property
    def sharded(self) -> bool:
        """Whether each process holds only a part of every matrix."""
        return self.size > 1 and self.parallel == "fsdp"

    def share(self, count: int, group: int = 1) -> tuple[int, int]:
        """This process's share of `count` sequences, as (index of the first, number of sequences).

        Shares hold whole groups of `group` neighbouring sequences, the last of which may have fewer.
        """
        groups = -(-count // group)
        first, end = (min(count, group * (groups * rank // self.size)) for rank in (self.rank, self.rank + 1))
        return first, end - first

    def largest_share(self, count: int, group: int = 1) -> int:
        """The most sequences that a process has to take so that all processes together take `count`."""
        return -(-count // (group * self.size)) * group

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor`, replaced in place by its sum over all processes."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def wait_for_all(self) -> None:
        """Return once every process has called this."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Whether any process passes True. Every process gets the same answer."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, by rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def place(self, model: nn.Module, parts: Iterable[nn.Module] = ()) -> None:
        """Move the model to this process's device. Under "fsdp" this process keeps only its part of every matrix.

        `parts` are the submodules whose matrices are gathered together, in the order of their use. The parameters of
        norms and convolutions, and those that a module's method `in_float32` returns, are few. They are not sharded
        and stay in float32, as in training by one process. Sharding replaces parameters, so make the optimizers after
        this.
        """
        if not self.sharded:
            model.to(self.device)
            return
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        kept = list(optimizer_groups(model)["undecayed"].values())
        for module in model.modules():
            kept += cast(Any, module).in_float32() if hasattr(module, "in_float32") else []
        for parameter in kept:
            parameter.data = parameter.data.to(self.device)
            dist.broadcast(parameter.data, 0)
        mesh = dist.device_mesh.DeviceMesh.from_group(cast(dist.ProcessGroup, dist.group.WORLD), self.device.type)
        # Autocast rounds matrices to bfloat16 in each product anyway, so gathering them in bfloat16 loses nothing.
        dtype = torch.bfloat16 if self.device.type == "cuda" else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        for module in (*parts, model):
            fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=set(kept))

    def replicate(self, model: nn.Module) -> nn.Module:
        """The model, wrapped so that a backward pass averages gradients over the processes."""
        if self.size == 1 or self.sharded:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    @contextlib.contextmanager
    def without_averaging(self, model: nn.Module) -> Iterator[None]:
        """A context in which backward passes accumulate gradients without averaging them over the processes.

        The next backward pass outside of it averages what was accumulated.
        """
        if self.sharded:
            sharded = cast(Any, model)
            sharded.set_requires_gradient_sync(False)
            yield
            sharded.set_requires_gradient_sync(True)
        elif isinstance(model, DistributedDataParallel):
            with model.no_sync():
                yield
        else:
            yield

    def average_unsharded(self, model: nn.Module) -> None:
        """Under "fsdp", average the gradients of unsharded parameters, which the backward pass does not average."""
        if not self.sharded:
            return
        gradients = []
        for parameter in model.parameters():
            if not is_sharded(parameter):
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        together = self.sum(torch.cat([gradient.flatten() for gradient in gradients])) / self.size
        sizes = [gradient.numel() for gradient in gradients]
        averages = [part.view_as(g) for part, g in zip(together.split(sizes), gradients, strict=True)]
        torch._foreach_copy_(gradients, averages)

    def total_norm(self, gradients: Sequence[Tensor]) -> Tensor:  # []
        """The Euclidean norm of all gradients together."""
        if not self.sharded:
            return nn.utils.get_total_norm(gradients)
        parts, whole = by_sharding(gradients)
        squared = self.sum(nn.utils.get_total_norm([local(part) for part in parts]).square())
        return (squared + nn.utils.get_total_norm(whole).square()).sqrt()

    def clip(self, parameters: Sequence[nn.Parameter], most: float, norm: Tensor) -> None:
        """Scale the gradients, whose total norm is `norm` [], so that it becomes at most `most`."""
        for alike in by_sharding(parameters) if self.sharded else (parameters,):
            nn.utils.clip_grads_with_norm_(alike, most, norm)


class PeersMissing(RuntimeError):
    """The other processes of the job were not found."""


def lost_peer(error: BaseException) -> bool:
    """Whether an error only says that another process of the job is gone or does not answer.

    The cause lies with that process: it may have failed, been killed, or been on a node that went down. Messages are
    searched because types do not tell: gloo raises a plain RuntimeError, and NCCL raises DistBackendError for errors of
    this process's own GPU as well.
    """
    if isinstance(error, PeersMissing | dist.DistNetworkError | dist.DistStoreError):
        return True
    raised_by_torch = type(error) is RuntimeError or isinstance(error, dist.DistError)
    return raised_by_torch and _PEER_LOST.search(str(error)) is not None


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """The part of the tensor that this process holds."""
    return cast(Tensor, cast(Any, tensor).to_local()) if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all processes if it is sharded. All of them must call this."""
    return cast(Tensor, cast(Any, tensor).full_tensor()) if is_sharded(tensor) else tensor


def by_sharding(tensors: Sequence[Tensor]) -> tuple[list[Any], list[Any]]:
    """(sharded tensors, unsharded ones). One call of torch's foreach functions does not take both kinds."""
    return [t for t in tensors if is_sharded(t)], [t for t in tensors if not is_sharded(t)]
