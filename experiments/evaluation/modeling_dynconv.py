"""A Llama-style decoder with short convolutions after its linear maps (arXiv 2606.03825), for transformers.

This file travels with exported models and is loaded with `trust_remote_code=True`. It needs torch, transformers and the
package `dynconv`. With attention and without convolutions or experts the model is Qwen3 of transformers, with or
without its QK-norm; modeling_parts.py has what takes the place of its attention and its MLP.
Shapes: B batch, T time.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from dynconv.layers import HeadwiseDynamicConv, LowRankDynamicConv, StaticShortConv

from .modeling_parts import MIXERS, Experts, Pass, ShortConvCache

# transformers renamed the argument of its models that takes the cache.
CACHE = "cache" if "cache" in inspect.signature(Qwen3ForCausalLM.forward).parameters else "past_key_values"
CONVOLUTIONS = {"static": StaticShortConv, "headwise": HeadwiseDynamicConv, "lowrank": LowRankDynamicConv}
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


class WithConv(nn.Module):
    """A linear map, or a norm, and a convolution on its outputs.

    The filters of a linear map's are generated from its input, or from the normed input of the part, those of a norm's
    from its output.
    """

    def __init__(self, module: nn.Module, width: int, name: str, options: dict[str, Any], current: Pass) -> None:
        super().__init__()
        options = dict(options)
        kind, self._reads_part = options.pop("kind"), options.pop("generator_input", "map") == "part"
        self._child = "linear" if isinstance(module, nn.Linear) else "norm"
        setattr(self, self._child, module)
        sizes = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else (width, width)
        sizes = (sizes[0], width) if self._reads_part else sizes
        self.conv = CONVOLUTIONS[kind](*(sizes[:1] if kind == "static" else sizes), **options)
        self._name, self._current = name, current

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = getattr(self, self._child)(x)
        current = self._current
        read = (current.part_input if self._reads_part else x) if self._child == "linear" else y
        if current.unpadded is not None:
            y = y * current.unpadded.to(y.dtype)  # padding on the left is as no text at all
        if current.cache is None:
            return self.conv(y, read)
        y, current.cache.kept[self._name] = self.conv.prefill(y, read, current.cache.kept.get(self._name))
        return y


class DynconvForCausalLM(Qwen3ForCausalLM):
    config_class = DynconvConfig

    def __init__(self, config: DynconvConfig) -> None:
        super().__init__(config)
        self._current = Pass()
        conv = dict(config.conv or {})
        sites = conv.pop("sites", ())
        for number, layer in enumerate(self.model.layers):
            if config.mixer is not None:
                sizes = dict(config.mixer)
                kind: Callable[..., nn.Module] = MIXERS[sizes.pop("kind")]
                layer.self_attn = kind(config, number, self._current, **sizes)
            elif not config.qk_norm:
                layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
            if config.moe is not None:
                layer.mlp = Experts(config, **config.moe)
            for site in sites:
                part, _, own = MODULES[site].rpartition(".")
                owner = layer.get_submodule(part)
                module = WithConv(getattr(owner, own), config.hidden_size, f"{number}.{site}", conv, self._current)
                setattr(owner, own, module)
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.register_forward_hook(self._note_part_input)
        self.post_init()

    def _note_part_input(self, _: nn.Module, __: Any, normed: torch.Tensor) -> None:
        self._current.part_input = normed

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, tuple(CONVOLUTIONS.values())):
            module.reset_parameters()  # type: ignore[operator]
        else:
            super()._init_weights(module)

    def forward(
        self, input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        cache = kwargs.pop("past_key_values", None) if CACHE != "past_key_values" else None
        cache = kwargs.pop(CACHE, cache)
        use_cache = kwargs.get("use_cache")
        if cache is None and (self.config.use_cache and not self.training if use_cache is None else use_cache):
            cache = ShortConvCache(config=self.config)
        if cache is not None and not isinstance(cache, ShortConvCache):
            raise ValueError(f"the cache must be a ShortConvCache; got a {type(cache).__name__}; leave it to the model")
        self._current.cache = cache
        self._current.unpadded = _unpadded(
            attention_mask, input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        )
        try:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **{CACHE: cache}, **kwargs)
        finally:
            self._current.cache = self._current.unpadded = self._current.part_input = None

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


def _unpadded(mask: torch.Tensor | None, inputs: torch.Tensor | None) -> torch.Tensor | None:
    """The part of a mask [B, all tokens so far] that belongs to the tokens of this pass, as [B, T, 1]."""
    if mask is None or inputs is None or mask.dim() != 2:
        return None
    return mask[:, -inputs.shape[1] :, None]


AutoConfig.register("dynconv", DynconvConfig, exist_ok=True)
AutoModelForCausalLM.register(DynconvConfig, DynconvForCausalLM, exist_ok=True)
