"""The convolutions as modules, initialised as in the paper.

With the default options each module starts as the identity (the residual) plus a random static filter, because the
dynamic filters start at zero.

A generator is the linear map that computes a token's filter, or in the low-rank form the filter's R coefficients z.
Shapes: B batch, T time, D channels of the convolved tensor, G width of the generator's input, W taps, R rank,
N sequences.
Source: arXiv 2606.03825, section 2 (initialisation: the generator's first map as in nn.Linear, its last map
zero, the static filter uniform on +-1/sqrt(W)).

Every module takes `device` and `dtype` with the same meaning as in torch.nn. After a module is built on the meta device
and given memory by `to_empty`, call `reset_parameters`, which draws initial values as the constructor does. With
activation "silu", silu is applied to the convolution before the residual x is added.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynconv.ops import headwise_dynamic_convolution, lowrank_dynamic_convolution, static_convolution
from dynconv.ops.checks import check, check_input
from dynconv.ops.sharded import any_sharded, check_all_sharded

Device = torch.device | str | int | None
_CACHE_LINE_VALUES = 64  # 16-bit values in a 128-byte cache line; rows of a multiple of this all start at one


class _ZeroLinear(nn.Linear):
    """A linear map whose weight starts at zero.

    Its own `reset_parameters` sets the zeros, so that code which resets every module of a model keeps them.
    """

    def reset_parameters(self) -> None:
        super().reset_parameters()  # still consumes random numbers: a seed must keep giving the same static filters
        nn.init.zeros_(self.weight)


def _check_positive(name: str, value: int) -> None:
    if not isinstance(value, Integral):
        raise ValueError(f"{name} must be a whole number; got {value!r}; choose one of at least 1")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}; choose another")


class _ShortConv(nn.Module):
    """Base of all modules: training, prefill and decoding all call one function of `dynconv.ops`."""

    static_filter: nn.Parameter | None  # [W, D]
    bias: nn.Parameter | None  # [D], added before the activation

    def __init__(
        self, function: Callable[..., Any], channels: int, width: int, residual: bool, activation: str | None
    ) -> None:
        _check_positive("channels", channels)
        _check_positive("width", width)
        if activation not in (None, "silu"):
            raise ValueError(f'activation must be None or "silu"; got {activation!r}; apply another one to the result')
        super().__init__()
        self.bias = None
        self._function = function
        self.channels, self.width, self.residual, self.activation = channels, width, residual, activation

    def reset_parameters(self) -> None:
        """Draw initial values, in the constructor's order."""
        if self.generator_map is not None:
            self.generator_map.reset_parameters()
        self._reset_filters()

    def _reset_filters(self) -> None:
        """Reset the parameters that this module holds directly, rather than through a submodule."""
        if self.static_filter is not None:
            bound = self.width**-0.5
            nn.init.uniform_(self.static_filter, -bound, bound)
            if self.bias is not None:  # as in nn.Conv1d, whose filters see W inputs
                nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        x: Tensor,  # [B, T, D]; for the fused modules [B, T, D + generator_columns], as `project` gives it
        generator_input: Tensor | None = None,  # [B, T, G]; the static and the fused modules need none
        cu_seqlens: Tensor | None = None,  # [N + 1]: packed documents' starts and the last one's end; B must be 1
        generated: Tensor | None = None,  # [B, T, columns]: an output of `project_together`, replaces generator_input
        seq_idx: Tensor | None = None,  # [B, T]: the number of each token's document, negative for padding; any B
    ) -> Tensor:  # [B, T, D]
        y: Tensor = self._convolve(x, generator_input, generated, cu_seqlens=cu_seqlens, seq_idx=seq_idx)
        return y

    def prefill(
        self,
        x: Tensor,  # as in `forward`
        generator_input: Tensor | None = None,  # as in `forward`
        state: Tensor | None = None,  # [N, W-1, D]: the inputs before x, oldest first; None means zeros
        cu_seqlens: Tensor | None = None,  # [N + 1]
    ) -> tuple[Tensor, Tensor]:  # [B, T, D], [N, W-1, D]
        """Return the outputs, and the state from which `step` continues."""
        options = {"cu_seqlens": cu_seqlens, "initial_state": state, "return_final_state": True}
        y, state = self._convolve(x, generator_input, None, **options)
        return y, state

    def step(
        self,
        x: Tensor,  # as in `forward`; T is 1, or the number of drafted tokens in speculative decoding
        generator_input: Tensor | None,  # as in `forward`
        state: Tensor,  # [B, W-1, D]
    ) -> tuple[Tensor, Tensor]:  # [B, T, D], [B, W-1, D]
        """Decode from a state: return the outputs and the next state."""
        if state is None:
            raise ValueError("state must be a tensor; got None; begin with prefill, or with zeros")
        return self.prefill(x, generator_input, state)

    @property
    def generator_map(self) -> nn.Linear | None:
        """The linear map that computes the filters (or z) from the generator's input; None if there is none."""
        return None

    def _convolve(self, x: Tensor, generator_input: Tensor | None, generated: Tensor | None, **options: Any) -> Any:
        columns = self.generator_columns if isinstance(self, _FusedConv) else 0
        if isinstance(x, Tensor) and x.shape[-1] != self.channels + columns:
            wanted = f"{self.channels} channels" + (f" and {columns} generator columns" if columns else "")
            raise ValueError(f"x must have {wanted}; got {x.shape[-1]} in all; mind the projection that computes x")
        generator = None if isinstance(self, _FusedConv) else self.generator_map
        if generator is None and generator_input is not None:  # not read: but cu_seqlens in its place must not get lost
            check_input(x)
            check(generator_input, (*x.shape[:2], None), "generator_input", "[B, T, G]", x)
        if generated is not None and generator is None:
            raise ValueError("generated must be None where filters are static or come with x; got one; leave it out")
        if generated is not None and generator_input is not None:
            raise ValueError("generated replaces generator_input; got both; give one of them")
        if generator is not None:
            if generated is None:
                generated = self._generate(x, generator_input, generator)
            _check_made("generated", generated, x, generator.out_features)
        inputs = self._inputs(x, generated)
        options |= {"activation": self.activation, "bias": self.bias}
        return self._function(*inputs, self.static_filter, self.residual, **options)

    def _generate(self, x: Tensor, generator_input: Tensor | None, generator: nn.Linear) -> Tensor:
        if generator_input is None:
            raise ValueError(
                "a dynamic filter needs generator_input [B, T, G]; got None; pass the tensor that the filters depend on"
            )
        _check_made("generator_input", generator_input, x, generator.in_features)
        check_all_sharded({"generator_input": generator_input, "the generator's weight": generator.weight})
        made: Tensor = generator(generator_input)
        return made

    def _inputs(self, x: Tensor, _: Any) -> tuple[Tensor, ...]:
        """The function's arguments before the static filter: x, then the tensors that define the dynamic filters."""
        return (x,)

    def extra_repr(self) -> str:
        static = self.static_filter is not None
        shown = f"channels={self.channels}, width={self.width}, residual={self.residual}, static_filter={static}"
        shown = shown if self.bias is None else f"{shown}, bias=True"
        return shown if self.activation is None else f"{shown}, activation={self.activation}"


class StaticShortConv(_ShortConv):
    """The same filter at every position: y_t = sum_w filter[w] x_{t-w}, plus x_t with `residual`."""

    def __init__(
        self,
        channels: int,
        width: int = 4,
        residual: bool = True,
        *,
        bias: bool = False,
        activation: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(static_convolution, channels, width, residual, activation)
        self.static_filter = nn.Parameter(torch.empty(width, channels, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self._reset_filters()


class HeadwiseDynamicConv(_ShortConv):
    """Each token has its own filters: one for each head of `head_size` consecutive channels."""

    def __init__(
        self,
        channels: int,
        generator_width: int,
        width: int = 4,
        head_size: int = 16,
        residual: bool = True,
        static_filter: bool = True,
        *,
        activation: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(headwise_dynamic_convolution, channels, width, residual, activation)
        self.heads = _heads(channels, head_size)
        _check_positive("generator_width", generator_width)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.generator = _ZeroLinear(generator_width, self.heads * width, bias=False, **place)
        self.static_filter = nn.Parameter(torch.empty(width, channels, **place)) if static_filter else None
        self._reset_filters()

    @property
    def generator_map(self) -> nn.Linear:
        return self.generator

    def _inputs(self, x: Tensor, generated: Any) -> tuple[Tensor, ...]:
        return x, generated.unflatten(2, (self.heads, self.width))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, heads={self.heads}"


class LowRankDynamicConv(_ShortConv):
    """Each token has its own filter for every channel, a combination of `rank` learned basis filters."""

    def __init__(
        self,
        channels: int,
        generator_width: int,
        width: int = 4,
        rank: int = 16,
        residual: bool = True,
        static_filter: bool = True,
        *,
        activation: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(lowrank_dynamic_convolution, channels, width, residual, activation)
        _check_positive("rank", rank)
        _check_positive("generator_width", generator_width)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Linear(generator_width, rank, bias=False, **place)
        self.up = nn.Parameter(torch.empty(rank, width * channels, **place))  # [R, W*D]
        self.static_filter = nn.Parameter(torch.empty(width, channels, **place)) if static_filter else None
        self._reset_filters()

    def _reset_filters(self) -> None:
        nn.init.zeros_(self.up)
        super()._reset_filters()

    @property
    def generator_map(self) -> nn.Linear:
        return self.down

    def _inputs(self, x: Tensor, generated: Any) -> tuple[Tensor, ...]:
        return x, generated, self.up

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank={len(self.up)}"


class _FusedConv(_ShortConv):
    """Base of the modules whose input holds the generator's outputs, too, beside the channels to convolve."""

    @property
    def generator_columns(self) -> int:
        """How many outputs of the generator follow the channels in the input of `forward`."""
        assert self.generator_map is not None
        return self.generator_map.out_features

    def project(
        self,
        weight: Tensor,  # [D, G], as in nn.Linear: the projection that makes the channels
        generator_input: Tensor,  # [B, T, G]
    ) -> Tensor:  # [B, T, D + generator_columns]: the input of `forward`
        """Apply the projection and the generator to one input with a single matrix product.

        Raises ValueError for shapes that do not fit, and for DTensors: concatenate two products of these instead.
        """
        assert self.generator_map is not None
        return _one_product(weight, [self.generator_map], generator_input)[
            ..., : self.channels + self.generator_columns
        ]

    def _inputs(self, x: Tensor, _: Any) -> tuple[Tensor, ...]:
        """The same of the input's channels and the generator's outputs behind them."""
        return super()._inputs(*x.split([self.channels, self.generator_columns], -1))


class FusedLowRankConv(_FusedConv, LowRankDynamicConv):
    """The low-rank convolutions of several branches (for example Q, K and V, concatenated) in one kernel launch."""

    def __init__(
        self,
        branches: tuple[int, ...],  # each branch's channels
        generator_width: int,
        width: int = 4,
        rank: int = 16,
        residual: bool = True,
        static_filter: bool = True,
        *,
        activation: str | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for channels in branches:
            _check_positive("a branch", channels)
        function = partial(lowrank_dynamic_convolution, segments=tuple(branches))
        _ShortConv.__init__(self, function, sum(branches), width, residual, activation)
        _check_positive("rank", rank)
        _check_positive("generator_width", generator_width)
        self.branches = tuple(branches)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.down = nn.Linear(generator_width, len(branches) * rank, bias=False, **place)
        self.up = nn.Parameter(torch.empty(rank, width * self.channels, **place))  # [R, W*D]
        self.static_filter = nn.Parameter(torch.empty(width, self.channels, **place)) if static_filter else None
        self._reset_filters()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, branches={self.branches}"


class FusedHeadwiseConv(_FusedConv, HeadwiseDynamicConv):
    """The head-wise convolution whose filters come with its input, from one product with the caller's projection.

    Several branches (for example Q, K and V) can be concatenated without further options, because each head has its
    own filter.
    """


def optimizer_groups(
    model: nn.Module,
    embeddings: Iterable[nn.Module] = (),  # modules to treat as nn.Embedding, such as an untied output layer
) -> dict[str, dict[str, nn.Parameter]]:
    """Sort the model's parameters into three groups for the optimizer; each group maps names to parameters.

    "matrices": the weights of linear maps. They take weight decay, and Muon (torch.optim.Muon) can optimise them.
    "decayed": all other parameters of two or more dimensions, mainly embeddings. They take weight decay, under AdamW.
    "undecayed": gains, biases, and all parameters of short convolutions, generators included: weight decay and Muon are
    not meant for filters and their bases.

    The groups follow from the types of the modules. Call this after `fully_shard`, `to_empty` or
    `load_state_dict(assign=True)`, because these replace the parameters. A weight that a linear map shares with an
    embedding counts as the embedding's. Raises ValueError if one of `embeddings` is not in the model.
    """
    modules = list(model.modules())
    tables: list[nn.Module] = [m for m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    for module in embeddings:
        if not any(module is inside for inside in modules):
            raise ValueError(f"embeddings must be modules of the model; got {type(module).__name__}; pass its own")
        tables.append(module)
    convolutions = (m for m in modules if isinstance(m, _ShortConv))
    of_convolutions = {id(p) for m in convolutions for p in m.parameters()}
    of_maps = {id(p) for m in modules if isinstance(m, nn.Linear) for p in m.parameters(recurse=False)}
    of_maps -= {id(p) for m in tables for p in m.parameters()}
    groups: dict[str, dict[str, nn.Parameter]] = {"matrices": {}, "decayed": {}, "undecayed": {}}
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or id(parameter) in of_convolutions:
            groups["undecayed"][name] = parameter
        else:
            groups["matrices" if id(parameter) in of_maps else "decayed"][name] = parameter
    return groups


def project_together(
    weight: Tensor,  # [D, G], as in nn.Linear
    convolutions: Sequence[HeadwiseDynamicConv | LowRankDynamicConv],
    generator_input: Tensor,  # [B, T, G]
) -> tuple[Tensor, ...]:  # [B, T, D]; then for each convolution [B, T, columns], the `generated` of its `forward`
    """Apply a linear map and the convolutions' generators to one input with a single matrix product.

    A generator has few outputs, so a matrix product of its own is bound by reading the whole input, and its backward
    pass by writing and adding another gradient of the input's size. Raises ValueError if a tensor is a DTensor, for a
    module without a generator of its own, and for shapes that do not fit.
    """
    for convolution in convolutions:
        own = isinstance(convolution, HeadwiseDynamicConv | LowRankDynamicConv)
        if not own or isinstance(convolution, _FusedConv):
            got = type(convolution).__name__
            raise ValueError(f"convolutions must be HeadwiseDynamicConv or LowRankDynamicConv; got {got}; leave it out")
    generators = [convolution.generator_map for convolution in convolutions]
    widths = [len(weight), *(generator.out_features for generator in generators)]
    together = _one_product(weight, generators, generator_input)
    return together.split([*widths, together.shape[-1] - sum(widths)], 2)[:-1]


def _one_product(
    weight: Tensor,  # [D, G]
    generators: Sequence[nn.Linear],  # without bias
    generator_input: Tensor,  # [B, T, G]
) -> Tensor:  # [B, T, D + columns of all generators + padding], with rows that all start at a cache line
    weights = [weight, *(generator.weight for generator in generators)]
    if any_sharded([generator_input, *weights]):
        raise ValueError("one product of several maps takes no DTensors; got one; apply each map by itself")
    assert all(generator.bias is None for generator in generators)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [D, G], as in nn.Linear; got {list(weight.shape)}; pass the map's weight")
    for part in weights:
        if generator_input.dim() != 3 or generator_input.shape[2] != part.shape[1]:
            wanted, got = part.shape[1], list(generator_input.shape)
            raise ValueError(f"generator_input must be [B, T, {wanted}]; got {got}; match the maps")
    padding = -sum(len(part) for part in weights) % _CACHE_LINE_VALUES
    return F.linear(generator_input, torch.cat([*weights, weight.new_zeros(padding, weight.shape[1])]))


def _check_made(name: str, made: Tensor, x: Tensor, columns: int) -> None:
    if not isinstance(made, Tensor):
        raise ValueError(f"{name} must be a tensor; got a {type(made).__name__}; mind the order of the arguments")
    if isinstance(x, Tensor) and (made.dim() != 3 or made.shape[:2] != x.shape[:2] or made.shape[2] != columns):
        wanted = f"[B, T, {columns}] with x's B and T, {list(x.shape[:2])}"
        raise ValueError(f"{name} must be {wanted}; got {list(made.shape)}; match the module's sizes")


def _heads(channels: int, head_size: int) -> int:
    _check_positive("head_size", head_size)
    if channels % head_size:
        raise ValueError(f"head_size must divide the channels; got {head_size} and {channels}; choose a divisor")
    return channels // head_size
