"""Write a trained run as a model of Hugging Face's transformers (an extra: `pip install 'dynconv[hf]'`)."""

import json
import re
import shutil
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from experiments.design.config import RunConfig
from experiments.evaluation.load import TrainedRun
from experiments.parts.attention import Attention
from experiments.parts.base import INPUT_SITES
from experiments.parts.gated_deltanet import GatedDeltaNet
from experiments.parts.mamba2 import Mamba2
from experiments.parts.moe import MoE
from experiments.parts.short_convolution import Convolution, NoConvolution
from experiments.parts.swiglu import SwiGLU

_HERE = Path(__file__).parent
CODE = (  # the first imports the others
    _HERE / "modeling_dynconv.py",
    _HERE / "modeling_parts.py",
    _HERE.parent / "models" / "chunks.py",
)
_OPTIONS = ("sites", "width", "residual", "static_filter", "head_size", "rank", "activation", "generator_input")
_MIXERS = (Attention, Mamba2, GatedDeltaNet)
_OF_TRAINING = ("static_init", "generator_init")
# Names of our parameters in a layer -> theirs in transformers' Qwen3; what is not among them keeps its own
_NAMES = {
    r"mixer\.maps\.(\w+)": r"self_attn.\1_proj",
    r"ffn\.maps\.(\w+)": r"mlp.\1_proj",
    r"mixer": "self_attn",
    r"ffn": "mlp",
    r"mixer_norm": "input_layernorm",
    r"ffn_norm": "post_attention_layernorm",
    r"mixer_input\.conv": "input_layernorm.conv",
    r"ffn_input\.conv": "post_attention_layernorm.conv",
}


def export(run: TrainedRun, folder: Path) -> None:
    """Fill a new folder with the weights (safetensors), the configuration, the model's code and the tokenizer.

    Raises ValueError if the model has a part that CODE does not have.
    """
    settings = configuration(run.config)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        save_file(_weights(run), temporary / "model.safetensors", metadata={"format": "pt"})
        for code in CODE:
            shutil.copyfile(code, temporary / code.name)
        shutil.copymode(
            temporary / CODE[0].name, temporary / "model.safetensors"
        )  # safetensors hides it from all others
        run.tokenizer.save(str(temporary / "tokenizer.json"))
        end = run.end_of_text
        files = {
            "config.json": settings | {"bos_token_id": end, "eos_token_id": end, "pad_token_id": None},
            "generation_config.json": {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end},
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "eos_token": run.data.end_of_text,
                "bos_token": run.data.end_of_text,
                "pad_token": run.data.end_of_text,
                "model_max_length": run.config.train.sequence_length,
                "padding_side": "left",  # from which generation goes on
                "clean_up_tokenization_spaces": False,
            },
        }
        for name, content in files.items():
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def configuration(run: RunConfig) -> dict[str, Any]:
    """The content of config.json. Raises ValueError for a model that CODE cannot express."""
    model = run.model
    for part, known in ((model.mixer, _MIXERS), (model.ffn, (SwiGLU, MoE))):
        if type(part) not in known:
            kinds = ", ".join(kind.kind for kind in known)
            raise ValueError(f"export knows {kinds} here; {run.arm} has {part.kind}; export another run")
    mixer, ffn = model.mixer, model.ffn
    conv = None if isinstance(model.conv, NoConvolution) else _convolution(model.conv)
    attention = isinstance(mixer, Attention)
    # Without attention Qwen3's table of RoPE is of any size, and not used.
    heads, kv_heads, head_size, theta, qk_norm = (
        (*mixer.head_counts(), mixer.head_size(model.width), mixer.rope_theta, mixer.qk_norm)
        if isinstance(mixer, Attention)
        else (1, 1, 2, 10_000.0, False)
    )
    return {
        "architectures": ["DynconvForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_dynconv.DynconvConfig",
            "AutoModelForCausalLM": "modeling_dynconv.DynconvForCausalLM",
        },
        "model_type": "dynconv",
        "dtype": "float32",
        "vocab_size": model.vocabulary,
        "hidden_size": model.width,
        "intermediate_size": ffn.linear_maps(model.width)["up"].outputs,
        "num_hidden_layers": model.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_size,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "max_position_embeddings": run.train.sequence_length,
        "tie_word_embeddings": model.tied,
        "initializer_range": model.init_std,
        "attention_bias": False,
        "hidden_act": "silu",
        "qk_norm": qk_norm,
        "conv": conv,
        "mixer": None if attention else {"kind": mixer.kind, **mixer.facts()},
        "moe": {"experts": ffn.experts, "top_k": ffn.top_k, "hidden": ffn.hidden} if isinstance(ffn, MoE) else None,
    }


def _convolution(conv: Convolution) -> dict[str, Any]:
    """The kind, the sites, and the options of the module in dynconv.layers."""
    settings: dict[str, Any] = {"kind": conv.kind}
    for each in fields(conv):  # type: ignore[arg-type]
        value = getattr(conv, each.name)
        if each.name in _OPTIONS:
            settings[each.name] = value
        elif each.name not in _OF_TRAINING and value != each.default:
            raise ValueError(f"export knows no convolution with {each.name} = {value!r}; export another run")
    return settings


def _weights(run: TrainedRun) -> dict[str, Tensor]:
    """The parameters by the names that transformers gives them."""
    tied = run.config.model.tied
    return {
        _name(name, run.config.model.conv.sites): tensor.detach().cpu().contiguous()
        for name, tensor in run.model.state_dict().items()
        if not (tied and name == "head.weight")
    }


def _name(name: str, sites: Collection[str]) -> str:
    """Our name of a parameter -> transformers'. A map or norm without a convolution is a plain one there."""
    if name == "head.weight":
        return "lm_head.weight"
    name = name.replace("embedding.", "model.embed_tokens.")
    if name.startswith("norm."):
        return f"model.{name}"
    name = re.sub(r"^blocks\.", "model.layers.", name)
    name = re.sub(r"\.(\w+)\.linear\.", lambda m: m[0] if m[1] in sites else f".{m[1]}.", name)
    for site in INPUT_SITES:
        if site in sites:
            own = site.replace("_input", "_norm")
            name = name.replace(f".{own}.", f".{own}.norm.")
    for ours, theirs in _NAMES.items():
        name = re.sub(rf"\.{ours}\.", rf".{theirs}.", name)
    return name
