"""Packed documents, and the final states from which decoding continues.

Legend: B batch, T time, D channels, W taps, N sequences (the number of documents if cu_seqlens is given, else B).
"""

import itertools

import torch
from torch import Tensor

from dynconv.ops.checks import kind_of
from dynconv.ops.sharded import any_sharded


def find_documents(
    x: Tensor,  # [1, T, D]
    cu_seqlens: Tensor,  # [N + 1]
) -> tuple[Tensor, Tensor]:  # [T + 1] int32, [N + 1]
    """(positions, edges) of packed documents.

    `positions` has each token's index within its document (within the padding, for tokens after the last end), and then
    the padding's length. Tokens before the first start are a document of their own. `edges` are cu_seqlens clamped to
    0..T, so that they can be used as indices. Raises ValueError if cu_seqlens does not describe documents of x, as far
    as this can be known without a synchronisation.
    """
    batch, time, _ = x.shape
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be a tensor; got {kind_of(cu_seqlens)}; pass torch.tensor(cu_seqlens)")
    if any_sharded([cu_seqlens]):
        raise ValueError("cu_seqlens must be a plain tensor, whole on every device; got a DTensor; use full_tensor")
    if batch != 1:
        raise ValueError(f"cu_seqlens needs B = 1; got B = {batch}; pass x.reshape(1, B*T, D)")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be [N + 1] int32 or int64; got {list(cu_seqlens.shape)} {cu_seqlens.dtype}; "
            "pass the documents' starts and the last one's end"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens must be on {x.device}; got {cu_seqlens.device}; move it")
    # Fake tensors have no values to check, and reading those of a GPU would force a synchronisation.
    readable = cu_seqlens.is_cpu and type(cu_seqlens) is Tensor
    if readable and not torch.compiler.is_compiling():
        values = cu_seqlens.tolist()
        if values[0] != 0 or values[-1] > time or sorted(values) != values:
            decrease = next((f", {b} after {a}" for a, b in itertools.pairwise(values) if b < a), "")
            got = values if len(values) <= 8 else f"{len(values)} values from {values[0]} to {values[-1]}{decrease}"
            raise ValueError(
                f"cu_seqlens must rise from 0 to T = {time} at most; got {got}; pass the starts and the last one's end"
            )
    edges = cu_seqlens.clamp(0, time)
    steps = torch.arange(time + 1, dtype=edges.dtype, device=x.device)
    starts = torch.nn.functional.pad(edges, (1, 0))  # The added 0 is the start of tokens before the first document.
    return (steps - starts[torch.searchsorted(edges, steps, right=True)]).int(), edges


def check_runs(
    x: Tensor,  # [B, T, D]
    seq_idx: Tensor,  # [B, T]
) -> None:
    """Raise ValueError unless seq_idx can number the documents of x."""
    if not isinstance(seq_idx, Tensor):
        raise ValueError(f"seq_idx must be a tensor; got {kind_of(seq_idx)}; pass torch.tensor(seq_idx)")
    if any_sharded([seq_idx]):
        raise ValueError("seq_idx must be a plain tensor, whole on every device; got a DTensor; use full_tensor")
    if seq_idx.shape != x.shape[:2] or seq_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"seq_idx must be [B, T] = {list(x.shape[:2])}, int32 or int64; got {list(seq_idx.shape)} {seq_idx.dtype}; "
            "number the document of each token"
        )
    if seq_idx.device != x.device:
        raise ValueError(f"seq_idx must be on {x.device}; got {seq_idx.device}; move it")


def check_seq_idx(
    x: Tensor,  # [B, T, D]
    seq_idx: Tensor,  # [B, T]
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    return_final_state: bool,
) -> None:
    """Raise ValueError unless seq_idx can number the documents of x, and no argument excludes it."""
    check_runs(x, seq_idx)
    for name, given in (("cu_seqlens", cu_seqlens), ("initial_state", initial_state)):
        if given is not None:
            raise ValueError(f"{name} must be None where seq_idx is given; got both; pass documents by cu_seqlens")
    if return_final_state:
        raise ValueError("seq_idx has no final states; got return_final_state; pass documents by cu_seqlens")


def find_runs(
    seq_idx: Tensor,  # [B, T]
) -> tuple[Tensor, Tensor]:  # [B, T] bool, [B*T + 1] int32
    """(whether each token belongs to a document, positions as in `find_documents` for all rows one after the other).

    The last element of positions, the length of the padding at the end, is 0, because padding within the rows is
    treated as a document. No value is read on the host.
    """
    steps = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    # `roll` and not slices of T - 1, since a program of torch.export must work for every T.
    continues = (seq_idx == seq_idx.roll(1, 1)) & (steps > 0)
    starts = torch.where(continues, 0, steps).cummax(1).values
    return seq_idx >= 0, torch.nn.functional.pad((steps - starts).flatten(), (0, 1)).int()


def final_state(
    x: Tensor,  # [B, T, D]
    width: int,
    cu_seqlens: Tensor | None,  # [N + 1]
    initial_state: Tensor | None,  # [N, W-1, D]
) -> Tensor:  # [N, W-1, D]
    """The last W-1 inputs of every sequence, oldest first. A shorter sequence is preceded by its initial state, which
    is zeros by default."""
    count = width - 1
    if cu_seqlens is None or x.shape[1] == 0:
        sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        before = x.new_zeros(sequences, count, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
        if cu_seqlens is not None:  # T is 0, so all documents are empty, and their states stay as they were.
            return before.clone()
        recent = x if torch.compiler.is_exporting() else x[:, max(0, x.shape[1] - count) :]
        return torch.cat([before, recent], 1)[:, recent.shape[1] :]
    starts, ends = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    tokens = ends - count + torch.arange(count, device=x.device)  # [N, W-1]
    recent = x[0, tokens.clamp(min=0, max=x.shape[1] - 1)]
    if initial_state is None:
        before = torch.zeros((), dtype=x.dtype, device=x.device)
    else:
        places = (tokens - starts + count).clamp(min=0, max=max(0, count - 1))
        before = initial_state.to(x.dtype).gather(1, places[..., None].expand(-1, -1, x.shape[2]))
    return torch.where((tokens >= starts)[..., None], recent, before)
