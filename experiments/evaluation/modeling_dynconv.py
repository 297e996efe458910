"""A Llama-style decoder with short convolutions after its linear maps (arXiv 2606.03825), for transformers.

This file travels with exported models and is loaded with `trust_remote_code=True`. It needs torch, transformers and the
package `dynconv`. Without convolutions the model is Qwen3 of transformers, with or without its QK-norm.
Shapes: B batch, T time.
"""

import inspect
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Qwen3Config, Qwen3ForCausalLM

from dynconv.layers import HeadwiseDynamicConv, LowRankDynamicConv, StaticShortConv

# transformers renamed the argument of its models that takes the cache.
CACHE = "cache" if "cache" in inspect.signature(Qwen3ForCausalLM.forward).parameters else "past_key_values"
CONVOLUTIONS = {"static": StaticShortConv, "headwise": HeadwiseDynamicConv, "lowrank": LowRankDynamicConv}
MODULES = {  # where the linear map, or the norm, of a site is in a layer
    "mixer_input": "input_layernorm",
    "ffn_input": "post_attention_layernorm",
    **{site: f"self_attn.{site}_proj" for site in ("q", "k", "v", "o")},
    **{site: f"mlp.{site}_proj" for site in ("gate", "up", "down")},
}


class DynconvConfig(Qwen3Config):
    """Qwen3's configuration, and `conv`: None, or the kind, sites and options of the convolutions."""

    model_type = "dynconv"

    def __init__(self, conv: dict[str, Any] | None = None, qk_norm: bool = False, **kwargs: Any) -> None:
        self.conv = conv
        self.qk_norm = qk_norm
        super().__init__(**kwargs)


class ShortConvCache(DynamicCache):
    """Keys and values, and of each convolution the inputs that its next outputs still need, [B, W-1, channels]."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.inputs: dict[str, torch.Tensor] = {}

    def _select(self, indices: torch.Tensor) -> None:
        self.inputs = {name: kept.index_select(0, indices.to(kept.device)) for name, kept in self.inputs.items()}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.inputs = {name: kept.repeat_interleave(repeats, 0) for name, kept in self.inputs.items()}

    def reset(self) -> None:
        super().reset()
        self.inputs = {}

    def crop(self, *_: Any, **__: Any) -> None:
        raise ValueError("a cache with short convolutions cannot be shortened; generate without an assistant model")


class Pass:
    """What the convolutions need to know of the forward pass that is under way."""

    cache: ShortConvCache | None = None
    kept: torch.Tensor | None = None  # [B, T, 1]: 0 at padding, else 1; None: no padding


class WithConv(nn.Module):
    """A linear map, or a norm, and a convolution on its outputs.

    The filters of a linear map's are generated from its input, those of a norm's from its output.
    """

    def __init__(self, module: nn.Module, width: int, name: str, options: dict[str, Any], current: Pass) -> None:
        super().__init__()
        options = dict(options)
        kind = options.pop("kind")
        self._child = "linear" if isinstance(module, nn.Linear) else "norm"
        setattr(self, self._child, module)
        sizes = (module.out_features, module.in_features) if isinstance(module, nn.Linear) else (width, width)
        self.conv = CONVOLUTIONS[kind](*(sizes[:1] if kind == "static" else sizes), **options)
        self._name, self._current = name, current

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = getattr(self, self._child)(x)
        read = x if self._child == "linear" else y
        current = self._current
        if current.kept is not None:
            y = y * current.kept.to(y.dtype)  # padding on the left is as no text at all
        if current.cache is None:
            return self.conv(y, read)
        y, current.cache.inputs[self._name] = self.conv.prefill(y, read, current.cache.inputs.get(self._name))
        return y


class DynconvForCausalLM(Qwen3ForCausalLM):
    config_class = DynconvConfig

    def __init__(self, config: DynconvConfig) -> None:
        super().__init__(config)
        self._current = Pass()
        conv = dict(config.conv or {})
        sites = conv.pop("sites", ())
        for number, layer in enumerate(self.model.layers):
            if not config.qk_norm:
                layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()
            for site in sites:
                part, _, own = MODULES[site].rpartition(".")
                owner = layer.get_submodule(part)
                module = WithConv(getattr(owner, own), config.hidden_size, f"{number}.{site}", conv, self._current)
                setattr(owner, own, module)
        self.post_init()

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
        self._current.kept = _kept(attention_mask, input_ids if input_ids is not None else kwargs.get("inputs_embeds"))
        try:
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **{CACHE: cache}, **kwargs)
        finally:
            self._current.cache = self._current.kept = None

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


def _kept(mask: torch.Tensor | None, inputs: torch.Tensor | None) -> torch.Tensor | None:
    """The part of a mask [B, all tokens so far] that belongs to the tokens of this pass, as [B, T, 1]."""
    if mask is None or inputs is None or mask.dim() != 2:
        return None
    return mask[:, -inputs.shape[1] :, None]


AutoConfig.register("dynconv", DynconvConfig, exist_ok=True)
AutoModelForCausalLM.register(DynconvConfig, DynconvForCausalLM, exist_ok=True)
