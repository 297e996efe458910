"""The tensors of a model and its optimizers by name, as a checkpoint holds them: "model.NAME", "optimizer.NAME.KEY"."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from experiments.training.optimizers import Optimizers


def tensors_of(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    """All tensors of the model and its optimizers by name; of sharded ones this process's part.

    All processes must call this.
    """
    tensors = {f"model.{name}": tensor for name, tensor in _model_tensors(model).items()}
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, own in optimizer.state.items():
            tensors |= {f"optimizer.{names[parameter]}.{key}": tensor for key, tensor in own.items()}
    return tensors


def tensors_for(model: nn.Module, saved: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
    """The tensors into which a checkpoint is read, by name: the model's own, and new ones for the optimizers' state.

    `saved` maps each name in the checkpoint to (size, dtype). Optimizer state of a parameter's size is sharded like the
    parameter. Raises ValueError if the model and the checkpoint do not have the same parameters.
    """
    own = _model_tensors(model)
    missing = sorted({f"model.{name}" for name in own} - set(saved))
    if missing:
        raise ValueError(f"the checkpoint lacks {missing[0]}, which this model has; start the run anew")
    tensors = {}
    for name, (size, dtype) in saved.items():
        kind, _, rest = name.partition(".")
        owner = own.get(rest if kind == "model" else rest.rpartition(".")[0])
        if owner is None or (kind == "model" and owner.shape != size):
            raise ValueError(f"the checkpoint has {name} {list(size)}, which this model lacks; start the run anew")
        if kind == "model":
            tensors[name] = owner.detach()
        elif owner.shape == size:
            tensors[name] = torch.empty_like(owner, dtype=dtype)
        else:
            tensors[name] = torch.empty(size, dtype=dtype, device=owner.device)
    return tensors


def load_optimizers(tensors: Mapping[str, Tensor], model: nn.Module, optimizers: Optimizers) -> None:
    """Load the optimizers' state from the tensors of `tensors_for`, after a checkpoint was read into them.

    The model's tensors were read in place.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            parameter, _, key = name.removeprefix("optimizer.").rpartition(".")
            states.setdefault(parameter, {})[key] = tensor
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            optimizer.state.update({p: states[names[p]] for p in group["params"] if names[p] in states})


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each shared one under its first name only.

    `state_dict` also shards parameters again that FSDP left gathered after a forward pass.
    """
    tensors: dict[str, Tensor] = model.state_dict(keep_vars=True)
    once: dict[int, str] = {}
    return {name: tensor for name, tensor in tensors.items() if once.setdefault(id(tensor), name) == name}
