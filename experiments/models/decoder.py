"""A pre-norm decoder: an embedding, layers of a mixer and a feed-forward part, and an LM head.

Shapes: B batch, T time, D width, V vocabulary. Source: arXiv 2606.03825, section 4.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from experiments.design.model import ModelConfig
from experiments.models.barriers import add_barriers
from experiments.models.norm import RMSNorm
from experiments.models.packing import Documents, documents_of
from experiments.models.readout import LastTokenReadout
from experiments.models.recompute import Policy, recomputing
from experiments.models.short_convolution import InputConvolution
from experiments.parts.base import FFN_INPUT, MIXER_INPUT, Part

COMPILED_PROGRAMS = 128  # in one process; a model needs four: its block and its norm, with and without gradients
# What each layer's mixer and feed-forward part keep of the tokens before: tensors whose first dimension is the batch
Cache = list[tuple[dict[str, Tensor], dict[str, Tensor]]]
Criterion = Callable[[Tensor, Tensor], Tensor]  # (input [B, T, D] of the LM head, its weight [V, D]) -> loss []
Named = list[tuple[str, Tensor]]


class Output(NamedTuple):
    """The output of a model, as the trainer uses it."""

    logits: Tensor  # [B, T, V]
    losses: dict[str, Tensor]  # [B] each: auxiliary losses of each sequence by name, weighted already
    measures: dict[str, Tensor]  # [B, n] each: what an evaluation logs of each sequence besides, by name and layer


class Scored(NamedTuple):
    """The output of a model that was given a criterion."""

    loss: Tensor  # []: the criterion's
    losses: dict[str, Tensor]  # this and the next as in Output
    measures: dict[str, Tensor]


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
            if config.reads_last_token:
                self.readout = LastTokenReadout(config.width, config.norm_epsilon)
            self.norm = RMSNorm(config.width, eps=config.norm_epsilon)
            self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        if config.tied:
            self.head.weight = self.embedding.weight
        self._initialise(seed)
        self._apply_norm: Callable[[RMSNorm, Tensor], Tensor] = RMSNorm.forward

    def recompute(self, policy: Policy) -> None:
        """Compute activations of the blocks again in the backward pass. Call it before `compile`."""
        for block in self.blocks:
            cast(Block, block).program = recomputing(Block.compute, policy)

    def fuse(self, kernels: bool = True) -> tuple[str, ...]:
        """Compute convolutions and their neighbours in one kernel, where there is one. Call it before `compile`.

        Without `kernels`, as for packed documents, only what needs none of them is changed. Returns what each block
        then computes in one kernel, as "q, k, v, RoPE".
        """
        found: list[str] = []
        for block in self.blocks:
            for part in (cast(Block, block).mixer, cast(Block, block).ffn):
                if hasattr(part, "fuse"):
                    found += part.fuse(kernels)
        return tuple(dict.fromkeys(found))

    def waits_for_host(self, device: torch.device) -> bool:
        """Whether a part of it makes the host wait for the GPU, so that no CUDA graph can hold a pass."""
        parts = [part for block in self.blocks for part in (cast(Block, block).mixer, cast(Block, block).ffn)]
        return any(part.waits_for_host(device) for part in parts if hasattr(part, "waits_for_host"))

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile each block by itself, with the arguments of torch.compile.

        All layers share one program, which is compiled in seconds and runs as fast as a program of the whole model.
        """
        import torch._dynamo  # takes seconds to import

        from experiments.models.passes import compile_options
        from experiments.models.rotation_in_place import ROTATION_IN_PLACE
        from experiments.models.weight_gradients import WIDE_PRODUCTS

        add_barriers()
        if kwargs.get("backend", "inductor") == "inductor":
            kwargs["options"] = compile_options([ROTATION_IN_PLACE, WIDE_PRODUCTS]) | kwargs.get("options", {})
        # torch keeps at most eight programs of a function by default, and runs further ones uncompiled: here those of
        # models of other shapes in the same process.
        torch._dynamo.config.recompile_limit = max(COMPILED_PROGRAMS, torch._dynamo.config.recompile_limit)
        self._apply_norm = torch.compile(RMSNorm.forward, *args, **kwargs)
        program = torch.compile(cast(Block, self.blocks[0]).program, *args, **kwargs)
        for block in self.blocks:
            cast(Block, block).program = program

    def forward(
        self,
        tokens: Tensor,  # [B, T]
        criterion: Criterion | None = None,  # computes LM head and loss together, without storing all logits
        starts: Tensor | None = None,  # [B, K]: of packed documents, as `documents_of` takes them; None: one a sequence
    ) -> Output | Scored:
        """`Output`, or `Scored` if there is a criterion. No packed document sees another, nor any trace of one.

        Under autocast the residual stream is in autocast's dtype, and norms are computed in float32. Raises ValueError
        for a number of sequences that does not fill groups of which one sequence reads another, and for packed
        documents of such sequences.
        """
        group = self.config.sequence_group
        if len(tokens) % group or (group > 1 and starts is not None):
            packed = "" if starts is None else " of packed documents"
            raise ValueError(
                f"the sequences of this model read one another in groups of {group} (conv.mismatched), so it takes "
                f"multiples of {group} sequences, and neither decodes nor takes packed documents; got {len(tokens)}"
                f"{packed}; use the arm without mismatched"
            )
        documents = None if starts is None else documents_of(starts, tokens.shape[1])
        x = self._embed(tokens)
        losses: dict[str, Tensor] = {}
        measures: dict[str, Tensor] = {}
        for layer, module in enumerate(self.blocks):
            block = cast(Block, module)
            block.prepare(tokens.shape[1], tokens.device)
            x, own, measured = block(x, documents)
            for name, loss in own:
                losses[name] = losses[name] + loss if name in losses else loss
            measures |= {f"{name}.{layer}": value for name, value in measured}
        if self.config.reads_last_token:
            x = self.readout(x)
        x = self._apply_norm(self.norm, x)
        if criterion is not None:
            return Scored(criterion(x, self.head.weight), losses, measures)
        return Output(self.head(x), losses, measures)

    def decode(
        self,
        tokens: Tensor,  # [B, T]: they follow those that the cache was given before
        cache: Cache | None = None,  # None begins a text; updated in place
    ) -> tuple[Tensor, Cache]:  # [B, T, V]
        """Logits as those of `forward`, and the cache with which the next tokens' are computed alone.

        Raises ValueError if a part of the model cannot decode, or if sequences read one another.
        """
        assert not self.config.reads_last_token, "only models of text decode"
        if self.config.sequence_group > 1:
            raise ValueError("a model with conv.mismatched decodes no text; use its arm without mismatched")
        cache = [({}, {}) for _ in self.blocks] if cache is None else cache
        x = self._embed(tokens)
        for module, states in zip(self.blocks, cache, strict=True):
            x = cast(Block, module).decode(x, states)
        return self.head(self.norm(x)), cache

    def _embed(
        self,
        tokens: Tensor,  # [B, T]
    ) -> Tensor:  # [B, T, D]
        x: Tensor = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return x

    def _initialise(self, seed: int) -> None:
        """Draw weights from a normal distribution with standard deviation init_std.

        It is divided by sqrt(2 layers) for the maps into the residual stream, to which every layer adds twice.
        """
        generator = torch.Generator().manual_seed(seed)
        std = self.config.init_std
        nn.init.normal_(self.embedding.weight, std=std, generator=generator)
        residual_std = std * (2 * self.config.layers) ** -0.5
        parts: list[Any] = [part for block in self.blocks for part in (block.mixer, block.ffn)]
        for part in parts:
            for site, module in part.maps.items():
                own_std = residual_std if site in part.into_residual else std
                nn.init.normal_(module.linear.weight, std=own_std, generator=generator)
            if hasattr(part, "initialise"):
                part.initialise(generator, std, residual_std)
        if self.config.reads_last_token:
            for linear in self.readout.maps:
                nn.init.normal_(cast(nn.Linear, linear).weight, std=std, generator=generator)
        if not self.config.tied:
            nn.init.normal_(self.head.weight, std=std, generator=generator)


class Block(nn.Module):
    """One layer: a mixer and a feed-forward part, each of which reads the normed residual stream and adds to it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mixer: Any = build(config.mixer, config)  # with `maps` and `into_residual`
        self.ffn: Any = build(config.ffn, config)
        self.mixer_norm = RMSNorm(config.width, eps=config.norm_epsilon)
        self.ffn_norm = RMSNorm(config.width, eps=config.norm_epsilon)
        # Only `compute` is compiled, and not the call of the module, whose hooks gather the weights under FSDP.
        self.program: Callable[[Block, Tensor, Documents | None], Any] = Block.compute
        sites = config.conv.sites
        self.mixer_input = InputConvolution(config) if MIXER_INPUT in sites else nn.Identity()
        self.ffn_input = InputConvolution(config) if FFN_INPUT in sites else nn.Identity()

    def prepare(self, time: int, device: torch.device) -> None:
        """Call `prepare` of the parts that have it, before a pass over inputs of this length."""
        for part in (self.mixer, self.ffn):
            if hasattr(part, "prepare"):
                part.prepare(time, device)

    def forward(
        self,
        x: Tensor,  # [B, T, D]
        documents: Documents | None = None,
    ) -> tuple[Tensor, Named, Named]:  # [B, T, D]; names and values of auxiliary losses and of measures
        y: tuple[Tensor, Named, Named] = self.program(self, x, documents)
        return y

    def compute(self, x: Tensor, documents: Documents | None = None) -> tuple[Tensor, Named, Named]:
        """`forward`, uncompiled."""
        losses: Named = []
        measures: Named = []
        packing = () if documents is None else (documents,)
        for part, norm, convolution in self._parts():
            y = norm(x)
            if isinstance(convolution, InputConvolution):
                y = convolution(y, documents)
            if getattr(part, "adds_stream", False):
                x = part(y, documents, x)
                continue
            y = part(y, *packing)
            if isinstance(y, tuple):
                y, own, measured = y
                losses += own.items()
                measures += measured.items()
            x = x + y
        return x, losses, measures

    def decode(
        self,
        x: Tensor,  # [B, T, D]
        states: tuple[dict[str, Tensor], dict[str, Tensor]],  # of the mixer and of the feed-forward part
    ) -> Tensor:  # [B, T, D]
        for (part, norm, convolution), state in zip(self._parts(), states, strict=True):
            if not hasattr(part, "decode"):
                raise ValueError(f"{type(part).__name__} cannot decode token by token; give its module a `decode`")
            y = norm(x)
            if isinstance(convolution, InputConvolution):
                y = convolution.decode(y, state)
            x = x + part.decode(y, state)
        return x

    def _parts(self) -> list[tuple[Any, nn.Module, nn.Module]]:
        """Each part, its norm, and the convolution between them."""
        return [(self.mixer, self.mixer_norm, self.mixer_input), (self.ffn, self.ffn_norm, self.ffn_input)]


def build(part: Part, model: ModelConfig) -> nn.Module:
    """The module of a part, from the function `build` of models/X.py for a part of parts/X.py.

    The module has its linear maps as `maps` (a `Maps`), and as `into_residual` the sites of those that write into the
    residual stream. Its `forward(x)` maps [B, T, D] to [B, T, D], or to that and two dictionaries: the auxiliary losses
    [B] of each sequence, and measures [B, n] of each sequence that an evaluation logs. A part that `takes_documents`
    has a `forward(x, documents=None)`; it must carry nothing from one of the `Documents` to the next. If it has a
    method `prepare(time, device)`, this is called before every pass, outside compiled code, to make tables that all
    layers share. If it has a method `fuse(kernels)`, this has its convolutions computed in one kernel with what follows
    them, where there is one, and returns in words what is one kernel then; if it then has a true `adds_stream`, its
    `forward(x, documents, stream)` gives its sum with the residual stream. If it has a method
    `initialise(generator, std, residual_std)`, this draws the parameters that are not of `maps`; the second standard
    deviation is that of weights into the residual stream. If it has a method
    `waits_for_host(device)` that is true, steps are not captured as CUDA graphs. A part that can generate text has
    `decode(x, state)`, which continues a sequence: `state`, a dictionary of tensors that is empty at the start, is
    updated in place.
    """
    name = type(part).__module__.rpartition(".")[2]
    module: nn.Module = importlib.import_module(f"experiments.models.{name}").build(part, model)
    return module
