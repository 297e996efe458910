"""Optimizers by the kind of their settings.

To add one, write a function here, enter it in `MAKERS`, and define its settings in design/train.py.
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from dynconv.layers import optimizer_groups
from experiments.design.train import AdamW, Muon, TrainConfig
from experiments.training.muon import Muon as MuonMatrices
from experiments.training.parallel import by_sharding

Optimizers = list[torch.optim.Optimizer]
Groups = Mapping[str, Mapping[str, nn.Parameter]]
LARGE_MODEL = 10**8  # number of parameters from which LargeAdamW is faster than torch's fused kernels


def make_optimizers(
    model: nn.Module,
    train: TrainConfig,
    tables: Iterable[nn.Module] = (),  # embeddings and LM head: Muon must not update their weights as matrices
) -> Optimizers:
    """Optimizers that together update every parameter of the model exactly once, all with the same learning rate.

    Weight decay applies to linear maps and embeddings, and not to gains and parameters of short convolutions.
    """
    return MAKERS[train.optimizer.kind](optimizer_groups(model, tables), train.optimizer, train)


def adamw(groups: Groups, settings: AdamW, train: TrainConfig) -> Optimizers:
    """AdamW for every parameter."""
    undecayed = groups["undecayed"].values()
    decayed = [*groups["decayed"].values(), *groups["matrices"].values()]
    return [_adamw([(decayed, train.weight_decay), (undecayed, 0.0)], settings, train)]


def muon(groups: Groups, settings: Muon, train: TrainConfig) -> Optimizers:
    """Muon for the matrices of linear maps, and AdamW for everything else."""
    matrices = MuonMatrices(groups["matrices"].values(), train.learning_rate, settings.momentum, train.weight_decay)
    others = [(groups["decayed"].values(), train.weight_decay), (groups["undecayed"].values(), 0.0)]
    return [matrices, _adamw(others, settings, train)]


def _adamw(
    groups: Iterable[tuple[Iterable[nn.Parameter], float]],  # (parameters, weight decay) of each group
    settings: AdamW | Muon,
    train: TrainConfig,
) -> torch.optim.AdamW:
    """AdamW of these groups, by torch's fused kernels, or for a large model on a GPU by LargeAdamW."""
    # Fused AdamW does not take sharded and unsharded parameters in one group. A group without parameters stays one.
    named: list[dict[str, Any]] = [
        {"params": alike, "weight_decay": decay}
        for parameters, decay in groups
        for alike in [each for each in by_sharding(list(parameters)) if each] or [[]]
    ]
    betas = (settings.beta1, settings.beta2)
    parameters = [parameter for group in named for parameter in group["params"]]
    on_gpu = all(parameter.is_cuda for parameter in parameters)
    kind = torch.optim.AdamW
    large = sum(parameter.numel() for parameter in parameters) >= LARGE_MODEL
    if on_gpu and large and importlib.util.find_spec("triton"):
        from experiments.training.adamw import LargeAdamW

        kind = LargeAdamW
    return kind(named, lr=train.learning_rate, betas=betas, eps=settings.epsilon, fused=True, capturable=on_gpu)


MAKERS: dict[str, Callable[..., Optimizers]] = {"adamw": adamw, "muon": muon}
