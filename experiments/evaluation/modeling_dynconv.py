"""A Llama-style decoder with short convolutions after its linear maps (arXiv 2606.03825), for transformers.

This file travels with exported models and is loaded with `trust_remote_code=True`. It needs torch, transformers and the
package `dynconv`. With attention and without convolutions or experts the model is Qwen3 of transformers, with or
without its QK-norm; modeling_parts.py has what takes the place of its attention and its MLP.
What a layer has to know besides its input, the padding and the packed documents of each row, is an argument of the
layer, so that gradient checkpointing computes it again with what it was given the first time.
Shapes: B batch, T time.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3PreTrainedModel

from dynconv.layers import HeadwiseDynamicConv, LowRankDynamicConv, StaticShortConv

# transformers 5.0 copies from a folder only the files that this one names.
from .chunks import chunked  # type: ignore[import-not-found]  # noqa: F401
from .modeling_parts import MIXERS, Experts, Informed, Pass, Rows, ShortConvCache, rows_of

# transformers renamed the argument of its models that takes the cache.
ARGUMENTS = tuple(inspect.signature(Qwen3ForCausalLM.forward).parameters)[1:]
CACHE = "cache" if "cache" in ARGUMENTS else "past_key_values"
CONVOLUTIONS = {"static": StaticShortConv, "headwise": HeadwiseDynamicConv, "lowrank": LowRankDynamicConv}
TELLS_DOCUMENTS_APART = ("eager", "sdpa", "flex_attention")  # in every row: they take a mask
MODULES = {  # where the linear map, or the norm, of a site is in a layer
    "mixer_input": "input_layernorm",
    "ffn_input": "post_attention_layernorm",
    **{site: f"self_attn.{site}_proj" for site in ("q", "k", "v", "o", "z", "x", "b", "c", "dt", "a", "g")},
    **{site: f"mlp.{site}_proj" for site in ("gate", "up", "down")},
}


class DynconvConfig(Qwen3Config):
    """Qwen3's configuration; `conv`: None, or the kind, sites and options of the convolutions; `mixer`: None for
    attention, or the kind and sizes of another; `moe`: None, or the sizes of a mixture of experts."""

    model_type = "dynconv"

    def __init__(
        self,
        conv: dict[str, Any] | None = None,
        qk_norm: bool = False,
        mixer: dict[str, Any] | None = None,
        moe: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.conv, self.qk_norm, self.mixer, self.moe = conv, qk_norm, mixer, moe
        super().__init__(**kwargs)


class WithConv(Informed):
    """A linear map, or a norm, and a convolution on its outputs.

    The filters of a linear map's are generated from its input, or from the normed input of the part, those of a norm's
    from its output.
    """

    def __init__(self, module: nn.Module, width: int, name: str, options: dict[str, Any]) -> None:
        super().__init__()
        options = dict(options)
        kind, self._reads_part = options.pop("kind"), options.pop("generator_input", "map") == "part"
        self._child = "linear" if isinstance(module, nn.Linear) else "norm"
        setattr(self, self._child, module)
        sizes = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else (width, width)
        sizes = (sizes[0], width) if self._reads_part else sizes
        self.conv = CONVOLUTIONS[kind](*(sizes[:1] if kind == "static" else sizes), **options)
        self._name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = getattr(self, self._child)(x)
        current = self.current
        read = (current.part_input if self._reads_part else x) if self._child == "linear" else y
        if current.rows.unpadded is not None:
            y = y * current.rows.unpadded.to(y.dtype)  # padding on the left is as no text at all
        if current.cache is None:
            return self.conv(y, read, seq_idx=current.rows.documents)
        y, current.cache.kept[self._name] = self.conv.prefill(y, read, current.cache.kept.get(self._name))
        return y


class DynconvDecoderLayer(Qwen3DecoderLayer):
    """Qwen3's layer with the parts and the convolutions of the configuration."""

    def __init__(self, config: DynconvConfig, number: int) -> None:
        super().__init__(config, number)
        if config.mixer is not None:
            sizes = dict(config.mixer)
            kind: Callable[..., nn.Module] = MIXERS[sizes.pop("kind")]
            self.self_attn = kind(config, number, **sizes)
        elif not config.qk_norm:
            self.self_attn.q_norm = self.self_attn.k_norm = nn.Identity()
        if config.moe is not None:
            self.mlp = Experts(config, **config.moe)
        conv = dict(config.conv or {})
        for site in conv.pop("sites", ()):
            part, _, own = MODULES[site].rpartition(".")
            owner = self.get_submodule(part)
            setattr(owner, own, WithConv(getattr(owner, own), config.hidden_size, f"{number}.{site}", conv))
        if conv.get("generator_input") == "part":
            self.self_attn.register_forward_pre_hook(_note_part_input, with_kwargs=True)
            self.mlp.register_forward_pre_hook(_note_part_input, with_kwargs=True)

    def forward(self, hidden_states: torch.Tensor, *args: Any, rows: Rows, **kwargs: Any) -> Any:
        self._inform(Pass(kwargs.get(CACHE), rows))
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:
            self._inform(None)

    def _inform(self, current: Pass | None) -> None:
        # Each module has it as its own attribute: copies of a model that run in threads, as those of
        # torch.nn.DataParallel, share all other objects.
        for module in self.modules():
            if isinstance(module, Informed):
                module.current = current


def _note_part_input(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for module in part.modules():
        if isinstance(module, Informed):
            module.current.part_input = args[0] if args else kwargs["hidden_states"]


class DynconvPreTrainedModel(Qwen3PreTrainedModel):
    config_class = DynconvConfig
    _no_split_modules = ("DynconvDecoderLayer",)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, tuple(CONVOLUTIONS.values())):
            module.reset_parameters()  # type: ignore[operator]
        else:
            super()._init_weights(module)


class DynconvModel(DynconvPreTrainedModel, Qwen3Model):
    """The decoder without its LM head."""

    def __init__(self, config: DynconvConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(DynconvDecoderLayer(config, number) for number in range(config.num_hidden_layers))
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,  # [B, T]
        attention_mask: torch.Tensor | None = None,  # [B, tokens so far]: 0 at padding, which may be at the rows' ends
        position_ids: torch.Tensor | None = None,  # [B, T]; without a mask, each document of a row has its own
        inputs_embeds: torch.Tensor | None = None,  # [B, T, D], in place of input_ids
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """As Qwen3Model's. Raises ValueError for rows that the convolutions and recurrences cannot tell apart as
        attention would, for a mask or positions of another shape, for a cache of another kind, and for positions that
        do not follow those in the cache."""
        cache = kwargs.pop("past_key_values", None) if CACHE != "past_key_values" else None
        cache = kwargs.pop(CACHE, cache)
        if cache is not None and not isinstance(cache, ShortConvCache):
            raise ValueError(f"the cache must be a ShortConvCache; got a {type(cache).__name__}; leave it to the model")
        inputs = input_ids if input_ids is not None else inputs_embeds
        rows = Rows()
        if inputs is not None:
            if 0 in inputs.shape[:2]:
                raise ValueError(f"the input [B, T] must have tokens; got {[*inputs.shape[:2]]}; give one or more")
            may_pack = cache is None and not (use_cache and torch.compiler.is_compiling())
            mixes = self.config.conv is not None or self.config.mixer is not None  # tokens, besides attention
            seen = 0 if cache is None else cache.get_seq_length()
            rows = rows_of(inputs, attention_mask, position_ids, seen, may_pack, mixes, kwargs)
        if rows.documents is not None:
            self._check_packed(len(rows.documents), use_cache)
            use_cache = False  # Qwen3's attention would not tell documents apart where it makes a cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if cache is None and use_cache:
            cache = ShortConvCache(config=self.config)
        if cache is not None and inputs is not None:
            cache.follow(inputs, attention_mask, position_ids)
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            rows=rows,
            **{CACHE: cache},
            **kwargs,
        )

    def _check_packed(self, rows: int, use_cache: bool | None) -> None:
        if use_cache:
            raise ValueError(
                "position_ids restart within a row, as of packed documents, which one cache cannot continue; pass "
                "use_cache=False, or give each document a row"
            )
        attention = self.config._attn_implementation
        if rows > 1 and attention not in TELLS_DOCUMENTS_APART and not torch.compiler.is_compiling():
            raise ValueError(
                f"{attention} tells packed documents apart in batches of one row alone; got {rows} rows; put the "
                "documents into one, or load the model with attn_implementation='sdpa'"
            )


class DynconvForCausalLM(DynconvPreTrainedModel, Qwen3ForCausalLM):
    def __init__(self, config: DynconvConfig) -> None:
        super(Qwen3ForCausalLM, self).__init__(config)  # its own would draw the weights of a Qwen3 first
        self.model = DynconvModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_forward_pre_hook(_leave_out_targets_after_padding, with_kwargs=True)  # keeps forward's signature
        self.post_init()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation must be dynamic; got {generation_config.cache_implementation}; leave it out"
            )
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = ShortConvCache(config=self.config)
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


def _leave_out_targets_after_padding(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """The first token of a row is no target, on whichever side the row is padded: nothing is known at padding."""
    given = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
    labels, mask = given.get("labels"), given.get("attention_mask")
    if labels is not None and isinstance(mask, torch.Tensor) and mask.shape == labels.shape:
        first = F.pad((mask[:, 1:] != 0) & (mask[:, :-1] == 0), (1, 0))
        given["labels"] = labels.masked_fill(first.to(labels.device), -100)
    return (), given


AutoConfig.register("dynconv", DynconvConfig, exist_ok=True)
AutoModelForCausalLM.register(DynconvConfig, DynconvForCausalLM, exist_ok=True)
