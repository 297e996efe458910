"""What exported models have in place of Qwen3's attention and MLP: Mamba-2, Gated DeltaNet, a mixture of experts.

This file travels with exported models, beside chunks.py. Their modules have the names and the arithmetic of
experiments/models, which tests/test_export.py holds them to.
Shapes: B batch, T time, D width, H heads.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, PretrainedConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

# Exported models have the file beside this one; here it is in experiments/models.
from .chunks import chunked  # type: ignore[import-not-found]


class ShortConvCache(DynamicCache):
    """Keys and values, and by name what else a layer keeps of the tokens before, [B, ...] each.

    These are the inputs that a convolution's next outputs still need, [B, W-1, channels], recurrences' states, and the
    position of the last token, [B].
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: dict[str, torch.Tensor] = {}

    def follow(self, inputs: torch.Tensor, mask: Any, positions: torch.Tensor | None) -> None:
        """Note the positions of tokens that are about to join the cache; the arguments are those of `rows_of`.

        Raises ValueError where a row's first token does not follow the one before it.
        """
        (batch, time), seen = inputs.shape[:2], self.get_seq_length()
        last = self.kept.get("position")
        if positions is None:  # those that Qwen3Model takes
            positions = torch.arange(seen, seen + time, device=inputs.device)[None]
        masked = isinstance(mask, torch.Tensor) and mask.shape == (batch, seen + time)
        if positions.shape not in ((batch, time), (1, time)) or (mask is not None and not masked):
            self.kept.pop("position", None)
            return  # only attention takes these, as it does in transformers
        positions = positions.expand(batch, time)
        if last is not None and len(last) == batch and not torch.compiler.is_compiling():
            wrong = positions[:, 0] != last.to(positions.device) + 1
            if masked:  # the positions of padding mean nothing
                wrong &= (mask[:, seen - 1 : seen + 1] != 0).all(1)
            if bool(wrong.any()):
                row = int(wrong.nonzero()[0])
                raise ValueError(
                    f"position_ids must go on after the cached tokens, here at {int(last[row]) + 1}; got "
                    f"{int(positions[row, 0])} in row {row}; give those that follow, or leave the cache out"
                )
        self.kept["position"] = positions[:, -1].clone()

    def _select(self, indices: torch.Tensor) -> None:
        self.kept = {name: kept.index_select(0, indices.to(kept.device)) for name, kept in self.kept.items()}

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.kept = {name: kept.repeat_interleave(repeats, 0) for name, kept in self.kept.items()}

    def reset(self) -> None:
        super().reset()
        self.kept = {}

    def crop(self, *_: Any, **__: Any) -> None:
        raise ValueError("this cache cannot be shortened; generate without an assistant model")


class Rows(NamedTuple):
    """What the rows of a batch hold besides one text each."""

    unpadded: torch.Tensor | None = None  # [B, T, 1]: False at padding, else True; None: no padding
    documents: torch.Tensor | None = None  # [B, T]: the number of each token's document, rising; None: one a row


def rows_of(
    inputs: torch.Tensor,  # [B, T] or [B, T, D]
    mask: Any,  # [B, all tokens so far]: 0 at padding; None: no padding
    positions: torch.Tensor | None,  # [B or 1, T]; None: those that follow the tokens so far
    seen: int,  # tokens of each row that came before, in a cache
    may_pack: bool,  # rows may hold packed documents: there is no cache
    strict: bool,  # refuse what attention alone would express
    others: Mapping[str, Any],  # the other arguments of the model
) -> Rows:
    """The padding that a mask says, or the packed documents that positions say which restart, as attention reads them.

    As in transformers, a document ends where the next position is not the next number, and only rows without a mask
    hold several. Raises ValueError for what would be kept apart by attention alone, and for a mask or positions of
    another shape.
    """
    if not strict and mask is not None:
        return Rows()
    told = [name for name in ("seq_idx", "cu_seq_lens_q") if others.get(name) is not None]
    if positions is None and told:
        raise ValueError(f"{told[0]} says where documents begin; give position_ids that restart there, too")
    shape = inputs.shape[:2]
    values = not torch.compiler.is_compiling()  # can be read
    unpadded = None
    if mask is not None:
        _check_padding(mask, (shape[0], seen + shape[1]), values)
        unpadded = mask[:, -shape[1] :, None] != 0  # as attention reads it
    if positions is not None and (positions.dim() != 2 or positions.shape[1] != shape[1]):
        raise ValueError(f"position_ids must be [B, T], here {[*shape]}; got {[*positions.shape]}; give each token one")
    if positions is None or shape[1] == 1:
        return Rows(unpadded)
    step = positions.expand(shape).diff(dim=1)
    if mask is None and may_pack:
        documents = F.pad((step != 1).cumsum(1), (1, 0))
        return Rows(documents=documents) if not values or bool(documents.any()) else Rows()
    if unpadded is not None:
        step = step.masked_fill(~(unpadded[:, 1:, 0] & unpadded[:, :-1, 0]), 1)
    if values and bool((step < 1).any()):
        extra = "a cache" if mask is None else "attention_mask"
        raise ValueError(
            f"position_ids restart within a row, as of packed documents, which {extra} does not tell apart; leave "
            f"{extra} out, or give each document a row"
        )
    return Rows(unpadded)


def _check_padding(mask: Any, shape: tuple[int, int], values: bool) -> None:
    """Raises ValueError unless it is a mask of this shape, of 0 and 1 alone, of padding at the ends of rows.

    Without `values` they are not read.
    """
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        got = f"{mask.dim()} dimensions" if isinstance(mask, torch.Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"attention_mask must be [B, tokens]: convolutions and recurrences know padding and no other masks; got "
            f"{got}; for packed documents give position_ids that restart, and no mask"
        )
    if tuple(mask.shape) != shape:  # attention would read the first of a longer one, convolutions the last
        raise ValueError(
            f"attention_mask must be [B, tokens], here {[*shape]} with those in the cache; got {[*mask.shape]}; give "
            "each token one"
        )
    other = (mask != 0) & (mask != 1)
    if values and bool(other.any()):  # attention would read each as 1; document ids look like a mask, too
        raise ValueError(
            f"attention_mask must be 1 at tokens and 0 at padding; got {mask[other][0].item():g}; for packed documents "
            "give position_ids that restart, and no mask"
        )
    text = mask != 0
    text_before, text_after = text.cumsum(1) > 0, text.flip(1).cumsum(1).flip(1) > 0
    if values and bool((text_before & text_after & ~text).any()):
        raise ValueError(
            "attention_mask must have its zeros at the ends of a row; got some between tokens, which convolutions and "
            "recurrences would read; to generate, pad on the left (tokenizer.padding_side)"
        )


class Pass:
    """What the modules of a layer need to know of the forward pass that is under way."""

    def __init__(self, cache: ShortConvCache | None, rows: Rows) -> None:
        self.cache, self.rows = cache, rows
        self.part_input: torch.Tensor | None = None  # [B, T, D]: the normed input of the part that is computed


class Informed(nn.Module):
    """A module that its layer tells of the pass."""

    current: Any = None  # a Pass, while the layer computes


class RecurrentMixer(Informed):
    """Base of the mixers around a recurrence."""

    sites: tuple[str, ...]  # of the linear maps of its input
    lowest_a: float  # of the initial decays
    # From the outputs [B, T, channels] of the linear maps: what `_output` takes besides the recurrence's outputs, and
    # the arguments of `chunked`.
    _inputs: Callable[..., tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]]
    o_proj: nn.Linear
    _output: Callable[..., torch.Tensor]  # the input [B, T, H*V] of the map o

    def __init__(self, config: PretrainedConfig, heads: int, shapes: dict[str, int], layer: int) -> None:
        super().__init__()
        for site, outputs in shapes.items():
            setattr(self, f"{site}_proj", nn.Linear(config.hidden_size, outputs, bias=False))
        conv = config.conv or {}
        self._activated = conv.get("sites", ()) if conv.get("activation") else ()  # by their own convolutions
        self._layer = layer
        self.log_a = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        with torch.no_grad():
            self.log_a.uniform_(self.lowest_a, 16.0).log_()
            step = self.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_()
            step.copy_(step + (-(-step).expm1()).log())  # the inverse of softplus

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        x, current = hidden_states, self.current
        rows = current.rows
        if rows.unpadded is not None:  # No map has a bias: where the input is zero, nothing enters the state.
            x = x * rows.unpadded.to(x.dtype)
        outputs = {site: getattr(self, f"{site}_proj")(x) for site in self.sites}
        kept, inputs = self._inputs(**outputs)
        if current.cache is None:
            y, _ = chunked(*inputs, numbers=rows.documents)
        else:
            name, place = f"{self._layer}.state", x.new_zeros(x.shape[0], 1, x.shape[1], 1)
            y, current.cache.kept[name] = chunked(*inputs, state=current.cache.kept.get(name))
            current.cache.update(place, place, self._layer)  # counts the tokens, which `generate` asks for
        return self.o_proj(self._output(y, *kept)), None

    def _silu(self, site: str, y: torch.Tensor) -> torch.Tensor:
        return y if site in self._activated else F.silu(y)

    def _wide(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def _log_decay(self, step: torch.Tensor) -> torch.Tensor:
        return -self._wide(self.log_a).exp() * step

    def _step(self, x: torch.Tensor) -> torch.Tensor:
        return F.softplus(self._wide(x) + self._wide(self.dt_bias))


class Mamba2(RecurrentMixer):
    """arXiv 2405.21060, section 7."""

    sites = ("z", "x", "b", "c", "dt")
    lowest_a = 1.0

    def __init__(self, config: PretrainedConfig, layer: int, heads: int, head_size: int, state: int) -> None:
        inner = heads * head_size
        super().__init__(config, heads, {"z": inner, "x": inner, "b": state, "c": state, "dt": heads}, layer)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=False)
        self.head_size = head_size
        self.skip = nn.Parameter(torch.ones(heads))
        self.norm = Qwen3RMSNorm(inner, eps=config.rms_norm_eps)

    def _inputs(
        self, z: torch.Tensor, x: torch.Tensor, b: torch.Tensor, c: torch.Tensor, dt: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        values = self._silu("x", x).unflatten(2, (-1, self.head_size))
        keys, queries = self._silu("b", b), self._silu("c", c)
        step = self._step(dt)  # [B, T, H]
        scaled = (values * step[..., None]).to(values.dtype)
        return (values, z), (queries[:, :, None], keys[:, :, None], scaled, self._log_decay(step))

    def _output(self, y: torch.Tensor, values: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        y = y + self.skip[:, None].to(y.dtype) * values
        normed: torch.Tensor = self.norm(y.flatten(2) * F.silu(z))
        return normed


class GatedDeltaNet(RecurrentMixer):
    """arXiv 2412.06464, section 3."""

    sites = ("q", "k", "v", "a", "b", "g")
    lowest_a = 0.0

    def __init__(self, config: PretrainedConfig, layer: int, heads: int, key: int, value: int) -> None:
        keys, values = heads * key, heads * value
        shapes = {"q": keys, "k": keys, "v": values, "a": heads, "b": heads, "g": values}
        super().__init__(config, heads, shapes, layer)
        self.o_proj = nn.Linear(values, config.hidden_size, bias=False)
        self.key, self.value = key, value
        self.norm = Qwen3RMSNorm(value, eps=config.rms_norm_eps)

    def _inputs(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        g: torch.Tensor,
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        queries, keys = (self._unit(self._silu(site, y)) for site, y in (("q", q), ("k", k)))
        values = self._silu("v", v).unflatten(2, (-1, self.value))
        return (g,), (queries * self.key**-0.5, keys, values, self._log_decay(self._step(a)), b.sigmoid())

    def _output(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = self.norm(y)
        return normed.flatten(2) * F.silu(gate)

    def _unit(self, x: torch.Tensor) -> torch.Tensor:
        wide = self._wide(x.unflatten(2, (-1, self.key)))
        return (wide * (wide.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).to(x.dtype)


class Experts(Qwen3MLP):
    """The MLP as the shared expert, plus the experts that the router chooses for each token.

    The auxiliary losses of training are not computed here.
    """

    def __init__(self, config: PretrainedConfig, experts: int, top_k: int, hidden: int) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.top_k = top_k
        self.router = nn.Linear(width, experts, bias=False)
        self.gate = nn.Parameter(torch.empty(experts, width, hidden))
        self.up = nn.Parameter(torch.empty(experts, width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        for weight in (self.gate, self.up, self.down):
            nn.init.normal_(weight, std=config.initializer_range)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shared: torch.Tensor = super().forward(x)
        rows = x.flatten(0, 1)
        wide = torch.promote_types(x.dtype, torch.float32)  # close logits would choose other experts
        weights, chosen = F.linear(rows.to(wide), self.router.weight.to(wide)).softmax(-1).topk(self.top_k)
        if self.top_k > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        routed = torch.zeros_like(rows, dtype=wide)
        for expert in chosen.unique().tolist():
            row, place = (chosen == expert).nonzero(as_tuple=True)
            y = (F.silu(rows[row] @ self.gate[expert]) * (rows[row] @ self.up[expert])) @ self.down[expert]
            routed.index_add_(0, row, y.to(wide) * weights[row, place, None])
        return shared + routed.to(x.dtype).view_as(x)


MIXERS = {"mamba2": Mamba2, "gated_deltanet": GatedDeltaNet}
