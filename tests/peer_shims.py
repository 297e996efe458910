"""Stand-ins for other implementations' functions, with their arguments, around dynconv; for peers.py.

Each `install` puts modules into `sys.modules` under the names that the other implementation's tests import. They also
are the translation of its arguments, word for word; dynconv/README.md has it as a table.
"""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import dynconv
from dynconv import converters


def _module(name: str, path: Path | None = None, **attributes: Any) -> ModuleType:
    """A module under this name; with a path a package, whose other modules are read from there."""
    module = ModuleType(name)
    if path is not None:
        module.__path__ = [str(path)]
    vars(module).update(attributes)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)
    return module


def _activation(name: str | None) -> str | None:
    return "silu" if name in ("silu", "swish") else name


def _filters(weight: Tensor) -> Tensor:  # [D, W], or [D, 1, W] -> [W, D]
    return converters.from_conv1d({"weight": weight})["static_filter"]


# causal-conv1d: x [B, D, T], weight [D, W], states [B, D, W-1]


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False, final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:  # fmt: skip
    made = dynconv.static_convolution(
        x.transpose(1, 2),
        _filters(weight),
        bias=bias,
        seq_idx=seq_idx,
        initial_state=None if initial_states is None else initial_states.transpose(1, 2),
        return_final_state=return_final_states,
        activation=_activation(activation),
    )
    if not return_final_states:
        return made.transpose(1, 2)
    y, states = made[0].transpose(1, 2), made[1].transpose(1, 2)
    return y, states if final_states_out is None else final_states_out.copy_(states)


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None,
    cache_seqlens: Tensor | None = None, conv_state_indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """x [B, D] or [B, D, T]; conv_state [slots, D, L] is changed in place; index -1 stands for no sequence."""
    if x.dim() == 2:
        given = (conv_state, weight, bias, activation, cache_seqlens, conv_state_indices)
        return causal_conv1d_update(x[:, :, None], *given)[:, :, 0]
    length, time = conv_state.shape[2], x.shape[2]
    rows = torch.arange(len(x), device=x.device) if conv_state_indices is None else conv_state_indices.long()
    real = rows >= 0
    held = conv_state[rows.clamp(min=0)]
    ordered = held
    if cache_seqlens is not None:  # a circular buffer, whose next place to write is cache_seqlens % L
        places = (cache_seqlens[:, None] + torch.arange(-length, 0, device=x.device)) % length
        ordered = held.gather(2, places[:, None].long().expand_as(held))
    state = converters.state_from_channels_first(ordered, weight.shape[1])
    options: dict[str, Any] = {"bias": bias, "activation": _activation(activation)}
    y, _ = dynconv.static_convolution_step(x.transpose(1, 2), state, _filters(weight), **options)
    if cache_seqlens is None:
        after = torch.cat([held, x], 2)[:, :, -length:]
    else:
        after = held.clone()
        for step in range(time):
            place = ((cache_seqlens + step) % length).long()
            after[torch.arange(len(x), device=x.device), :, place] = x[:, :, step]
    conv_state[rows[real]] = after[real]
    return torch.where(real[:, None, None], y.transpose(1, 2), 0.0)


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:  # [T, D] -> [N, D, L]
    return dynconv.final_state(x[None], state_len + 1, cu_seqlens=cu_seqlens).transpose(1, 2)


def install_causal_conv1d(root: Path) -> None:
    def missing(*_: Any) -> None:
        raise AssertionError("the test reached the CUDA extension, past the shim")

    names = ("causal_conv1d_fwd_function", "causal_conv1d_bwd_function", "causal_conv1d_update_function")
    _module("causal_conv1d", root / "causal_conv1d")
    _module("causal_conv1d.cpp_functions", None, **dict.fromkeys(names, missing))
    interface: Any = importlib.import_module("causal_conv1d.causal_conv1d_interface")  # theirs, for its references
    interface.causal_conv1d_fn, interface.causal_conv1d_update = causal_conv1d_fn, causal_conv1d_update
    varlen: Any = importlib.import_module("causal_conv1d.causal_conv1d_varlen")
    varlen.causal_conv1d_varlen_states = causal_conv1d_varlen_states


# flash-linear-attention: x [B, T, D], weight [D, W], caches [N, D, W] of the last W inputs


def fla_causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None,
    initial_state: Tensor | None = None, output_final_state: bool = False, activation: str | None = None,
    backend: str = "triton", cu_seqlens: Tensor | None = None, **_: Any,  # noqa: ARG001
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    width = weight.shape[1]
    state = None if initial_state is None else converters.state_from_channels_first(initial_state, width)
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "initial_state": state, "activation": _activation(activation)}
    y = dynconv.static_convolution(x, _filters(weight), False if residual is None else residual, bias=bias, **options)
    if not output_final_state:
        return y, None
    before = None if initial_state is None else initial_state.transpose(1, 2)
    return y, dynconv.final_state(x, width + 1, cu_seqlens=cu_seqlens, initial_state=before).transpose(1, 2)


def fla_causal_conv1d_update(
    x: Tensor, cache: Tensor, residual: Tensor | None = None, weight: Tensor | None = None,
    bias: Tensor | None = None, activation: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One token of each sequence, x [N, D], [N, 1, D] or [1, N, D]; the cache is changed in place."""
    assert weight is not None
    tokens = x.reshape(-1, 1, x.shape[-1])
    added = None if residual is None else residual.reshape(tokens.shape)
    y, after = fla_causal_conv1d(tokens, weight, bias, added, cache, True, activation)
    return y.reshape(x.shape), cache.copy_(after)


class ShortConvolution(nn.Conv1d):
    """Its parameters, as it names them, and its forward and step."""

    def __init__(
        self, hidden_size: int, kernel_size: int, bias: bool = False, activation: str | None = "silu",
        backend: str = "triton", device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        more = {"groups": hidden_size, "bias": bias, "padding": kernel_size - 1, "device": device, "dtype": dtype}
        super().__init__(hidden_size, hidden_size, kernel_size, **more)
        self.activation, self.backend = activation, backend

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor | None = None, mask: Tensor | None = None, cache: Tensor | None = None,
        output_final_state: bool = False, cu_seqlens: Tensor | None = None, **_: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        x = x if mask is None else x * mask[..., None]
        sequences = len(x) if cu_seqlens is None else len(cu_seqlens) - 1
        if x.shape[0] * x.shape[1] == sequences:
            return self.step(x, residual, cache, output_final_state, cu_seqlens)
        options = (residual, cache, output_final_state, self.activation, self.backend, cu_seqlens)
        return fla_causal_conv1d(x, self.weight[:, 0], self.bias, *options)

    def step(
        self, x: Tensor, residual: Tensor | None, cache: Tensor | None, output_final_state: bool = False,
        cu_seqlens: Tensor | None = None,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if cache is None:
            cache = x.new_zeros(x.shape[0] * x.shape[1], x.shape[2], self.kernel_size[0])
        y, cache = fla_causal_conv1d_update(x, cache, residual, self.weight[:, 0], self.bias, self.activation)
        return y, cache if output_final_state else None


def install_fla(root: Path) -> None:
    """Its `fla.utils` is its own; nothing else of the package is imported."""
    _module("fla", root / "fla", __version__="0")
    _module("fla.modules", root / "fla" / "modules")
    _module(
        "fla.modules.convolution",
        causal_conv1d=fla_causal_conv1d,
        causal_conv1d_update=fla_causal_conv1d_update,
        fast_causal_conv1d_fn=fla_causal_conv1d,
        ShortConvolution=ShortConvolution,
    )
    _module("causal_conv1d", causal_conv1d_fn=causal_conv1d_fn)  # the tests of its CUDA backend ask whether it is there


# attention-gym: x [B, T, C], weight [C, W], states [N, W-1, C]


def attention_gym_conv1d(
    x: Tensor, weight: Tensor, *, activation: str | None = None, cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None, return_final_state: bool = False, **_: Any,
) -> Any:  # fmt: skip
    options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "initial_state": initial_state, "activation": activation}
    return dynconv.static_convolution(x, _filters(weight), return_final_state=return_final_state, **options)


def attention_gym_decode(
    x: Tensor, weight: Tensor, state: Tensor, *, activation: str | None = None, state_indices: Tensor | None = None,
    **_: Any,
) -> Tensor:  # fmt: skip
    """x [N, C]; state [slots, W-1, C] is changed in place; slots of 0 and below stand for no sequence."""
    rows = torch.arange(1, len(x) + 1, device=x.device) if state_indices is None else state_indices.long()
    real = rows > 0
    slots = rows - 1 if state_indices is None else rows
    held = state[slots.clamp(min=0)]
    y, after = dynconv.static_convolution_step(x[:, None], held, _filters(weight), activation=activation)
    state.index_copy_(0, slots[real], after[real])
    return torch.where(real[:, None], y[:, 0], 0.0)


def install_attention_gym(root: Path) -> None:
    """Its tests skip themselves below compute capability 10.0; the shims run on any device."""
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: (10, 0)
    _module("cutlass")
    for name in ("attn_gym", "attn_gym.linear", "attn_gym.linear.kda", "attn_gym.linear.kda.short_conv"):
        _module(name, root.joinpath(*name.split(".")))
    inside = ("ShortConvTunedConfig", "_candidate_configs", "tune_causal_conv1d", "_decode_op", "_forward_op")
    inside += ("_backward_op", "_configured_backward_op", "_configured_backward_with_state_grad_op")
    inside += ("_configured_decode_op", "_configured_forward_op")
    functions = {"causal_conv1d": attention_gym_conv1d, "causal_conv1d_decode": attention_gym_decode}
    config = {"ShortConvConfig": lambda *sizes: sizes}
    _module("attn_gym.linear.kda.short_conv.cute", None, **functions, **config, **dict.fromkeys(inside))
    _module("attn_gym.linear.kda.short_conv.activations")


# The paper's functions have the arguments of dynconv's


def install_paper(root: Path) -> None:
    sys.path.insert(0, str(root))  # for its `reference`
    _module("headwise", headwise_dynamic_convolution=dynconv.headwise_dynamic_convolution)
    _module("lowrank", lowrank_dynamic_convolution=dynconv.lowrank_dynamic_convolution)


INSTALL: dict[str, Callable[[Path], None]] = {
    "dynamic-conv1d": install_paper,
    "causal-conv1d": install_causal_conv1d,
    "flash-linear-attention": install_fla,
    "attention-gym": install_attention_gym,
}
