"""A pre-norm decoder: an embedding, layers of a mixer and a feed-forward part, and an LM head.

Shapes: B batch, T time, D width, V vocabulary. Source: arXiv 2606.03825, section 4.
"""

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from experiments.design.model import ModelConfig
from experiments.parts.base import Part


class Output(NamedTuple):
    """The output of a model, as the trainer uses it."""

    logits: Tensor  # [B, T, V]
    losses: dict[str, Tensor]  # auxiliary losses by name: means over tokens, weighted already


class Decoder(nn.Module):
    """Token ids to logits. The initial weights are a function of (config, seed) alone.

    Arms of one seed whose linear maps have the same shapes share the initial values of these maps and of the embedding,
    so that this part of the noise between seeds cancels in their difference.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # Modules of convolutions initialise themselves.
            self.embedding = nn.Embedding(config.vocabulary, config.width)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
            self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self._initialise(seed)

    def forward(
        self,
        tokens: Tensor,  # [B, T]
    ) -> Output:
        x = self.embedding(tokens)
        losses: dict[str, Tensor] = {}
        for block in self.blocks:
            x = block(x, losses)
        return Output(self.head(self.norm(x)), losses)

    def _initialise(self, seed: int) -> None:
        """Draw weights from a normal distribution with standard deviation init_std.

        It is divided by sqrt(2 layers) for the maps into the residual stream, to which every layer adds twice.
        """
        generator = torch.Generator().manual_seed(seed)
        std = self.config.init_std
        nn.init.normal_(self.embedding.weight, std=std, generator=generator)
        parts: list[Any] = [part for block in self.blocks for part in (block.mixer, block.ffn)]
        for part in parts:
            for site, module in part.maps.items():
                scale = (2 * self.config.layers) ** -0.5 if site in part.into_residual else 1.0
                nn.init.normal_(module.linear.weight, std=std * scale, generator=generator)
        if not self.config.tied:
            nn.init.normal_(self.head.weight, std=std, generator=generator)


class Block(nn.Module):
    """One layer: a mixer and a feed-forward part, each of which reads the normed residual stream and adds to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixer: Any = build(config.mixer, config)  # with `maps` and `into_residual`
        self.ffn: Any = build(config.ffn, config)
        self.mixer_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.ffn_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        losses: dict[str, Tensor],  # to which a part may add a loss of its own
    ) -> Tensor:  # [B, T, D]
        for part, norm in ((self.mixer, self.mixer_norm), (self.ffn, self.ffn_norm)):
            y = part(norm(x))
            if isinstance(y, tuple):
                y, own = y
                for name, loss in own.items():
                    losses[name] = losses[name] + loss if name in losses else loss
            x = x + y
        return x


def build(part: Part, model: ModelConfig) -> nn.Module:
    """The module of a part, from the function `build` of models/X.py for a part of parts/X.py.

    The module has its linear maps as `maps` (a `Maps`), and as `into_residual` the sites of those that write into the
    residual stream. Its `forward` maps [B, T, D] to [B, T, D], or to a pair of that and a dictionary of
    auxiliary losses.
    """
    name = type(part).__module__.rpartition(".")[2]
    module: nn.Module = importlib.import_module(f"experiments.models.{name}").build(part, model)
    return module
