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
from experiments.training.parallel import is_sharded

Optimizers = list[torch.optim.Optimizer]
Groups = Mapping[str, Mapping[str, nn.Parameter]]
# Parameters from which on one kernel for each parameter is faster than torch's kernels for many.
LARGE = 10**8


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
    undecayed = groups["undecayed"].values()
    decayed = [*groups["decayed"].values(), *groups["matrices"].values()]
    return [_adamw([(decayed, train.weight_decay), (undecayed, 0.0)], settings, train)]


def muon(groups: Groups, settings: Muon, train: TrainConfig) -> Optimizers:
    matrices = MuonMatrices(groups["matrices"].values(), train.learning_rate, settings.momentum, train.weight_decay)
    others = [(groups["decayed"].values(), train.weight_decay), (groups["undecayed"].values(), 0.0)]
    return [matrices, _adamw(others, settings, train)]


def _adamw(
    groups: Iterable[tuple[Iterable[nn.Parameter], float]],  # (parameters, weight decay) of each group
    settings: AdamW | Muon,
    train: TrainConfig,
) -> torch.optim.AdamW:
    named: list[dict[str, Any]] = [
        {"params": alike, "weight_decay": decay} for parameters, decay in groups for alike in _alike(list(parameters))
    ]
    betas = (settings.beta1, settings.beta2)
    parameters = [parameter for group in named for parameter in group["params"]]
    on_gpu = all(parameter.is_cuda for parameter in parameters)
    kind = torch.optim.AdamW
    if on_gpu and sum(parameter.numel() for parameter in parameters) >= LARGE and importlib.util.find_spec("triton"):
        from experiments.training.adamw import LargeAdamW

        kind = LargeAdamW
    return kind(named, lr=train.learning_rate, betas=betas, eps=settings.epsilon, fused=True, capturable=on_gpu)


def _alike(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The parameters in lists of sharded and of whole ones, which fused AdamW does not take in one group."""
    parts = ([p for p in parameters if is_sharded(p)], [p for p in parameters if not is_sharded(p)])
    return [part for part in parts if part] or [[]]


MAKERS: dict[str, Callable[..., Optimizers]] = {"adamw": adamw, "muon": muon}
