"""A pre-norm decoder: an embedding, layers of a mixer and a feed-forward part, an LM head.

Shapes: B batch, T time, D width, V vocabulary. Source: arXiv 2606.03825, section 4.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from experiments.design.model import ModelConfig
from experiments.models.norm import RMSNorm
from experiments.parts.base import Part

PROGRAMS = 128  # in one process: a model has a block's and a norm's, with gradients and without
Criterion = Callable[[Tensor, Tensor], Tensor]  # what the LM head reads [B, T, D], its weight [V, D] -> a loss []


class Output(NamedTuple):
    """What a model makes of tokens."""

    logits: Tensor  # [B, T, V]
    losses: dict[str, Tensor]  # auxiliary losses by name, weighted, means over tokens


class Scored(NamedTuple):
    """What a model makes of tokens and a criterion."""

    loss: Tensor  # []: the criterion's
    losses: dict[str, Tensor]  # as in Output


class Decoder(nn.Module):
    """Token ids to logits. The weights are a function of (config, seed) alone.

    Arms of one seed share the initial values of all weights that they have in common, which takes that part of
    the seed's noise out of their difference.
    """

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the convolutions draw their own initial values
            self.embedding = nn.Embedding(config.vocabulary, config.width)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
            self.norm = RMSNorm(config.width, eps=config.norm_epsilon)
            self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self._initialise(seed)
        self._run: Callable[[nn.Module, Tensor], Any] = _run

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile a block at a time, with the arguments of torch.compile: one program, built in seconds, serves every
        layer, and takes as long as a program of the whole model."""
        import torch._dynamo  # seconds, which only those who compile have to wait

        # A second model of the same shape finds its programs ready; past torch's eight one of another shape would find
        # no room, and run uncompiled.
        torch._dynamo.config.recompile_limit = max(PROGRAMS, torch._dynamo.config.recompile_limit)
        self._run = torch.compile(_run, *args, **kwargs)

    def forward(
        self,
        tokens: Tensor,  # [B, T]
        criterion: Criterion | None = None,  # takes the LM head and the loss as one, so that logits need not be stored
    ) -> Output | Scored:
        """Under autocast the residual stream is of its dtype, and each norm computes in float32."""
        x = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        losses: dict[str, Tensor] = {}
        for module in self.blocks:
            block = cast(Block, module)
            block.prepare(tokens.shape[1], tokens.device)
            x, own = self._run(block, x)
            for name, loss in own:
                losses[name] = losses[name] + loss if name in losses else loss
        x = self._run(self.norm, x)
        if criterion is not None:
            return Scored(criterion(x, self.head.weight), losses)
        return Output(self.head(x), losses)

    def _initialise(self, seed: int) -> None:
        """Normal at init_std; the maps back into the residual stream smaller by sqrt(2 layers)."""
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


def _run(module: nn.Module, x: Tensor) -> Any:
    return module(x)


class Block(nn.Module):
    """A mixer and a feed-forward part, each on a normed copy of the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixer: Any = build(config.mixer, config)  # with `maps` and `into_residual`
        self.ffn: Any = build(config.ffn, config)
        self.mixer_norm = RMSNorm(config.width, eps=config.norm_epsilon)
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_epsilon)

    def prepare(self, time: int, device: torch.device) -> None:
        """Let the parts that want to know make ready for inputs of this length."""
        for part in (self.mixer, self.ffn):
            if hasattr(part, "prepare"):
                part.prepare(time, device)

    def forward(
        self,
        x: Tensor,  # [B, T, D]
    ) -> tuple[Tensor, list[tuple[str, Tensor]]]:  # [B, T, D], the parts' auxiliary losses
        losses: list[tuple[str, Tensor]] = []
        for part, norm in ((self.mixer, self.mixer_norm), (self.ffn, self.ffn_norm)):
            y = part(norm(x))
            if isinstance(y, tuple):
                y, own = y
                losses += own.items()
            x = x + y
        return x, losses


def build(part: Part, model: ModelConfig) -> nn.Module:
    """The module of a part: made by `build` in the file here that has the name of the part's own file.

    It holds its linear maps as `maps` (a `Maps`) and names those that write into the residual stream, as
    `into_residual`.
    `forward` takes [B, T, D] and gives [B, T, D], or a pair of that and a dictionary of auxiliary losses.
    `prepare(time, device)`, if it has one, runs before every pass, and outside compiled code: the place for tables
    that are the same in all layers.
    """
    name = type(part).__module__.rpartition(".")[2]
    module: nn.Module = importlib.import_module(f"experiments.models.{name}").build(part, model)
    return module
