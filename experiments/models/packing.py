"""Packed documents: sequences that hold several, none of which sees another.

Shapes: B batch, T time, K the most documents of a sequence, N = B*K.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Documents(NamedTuple):
    """The documents of a batch. All shapes depend on B, T and K alone, so that a CUDA graph serves every batch."""

    # Where each document begins among the B*T tokens, and their number as the end. Sequences with fewer than K
    # documents have empty ones: their start is where the next sequence begins.
    cu_seqlens: Tensor  # [N + 1] int32
    numbers: Tensor  # [B, T]: the document of each token
    places: Tensor  # [B, T]: the index of each token within its document


def documents_of(
    starts: Tensor,  # [B, K]: where documents begin in each sequence, in order, the first at 0; T where there are fewer
    time: int,  # T
) -> Documents:
    batch = len(starts)
    rows = torch.arange(batch, device=starts.device)[:, None] * time
    end = torch.full((1,), batch * time, device=starts.device)
    edges = torch.cat([(starts + rows).flatten(), end])
    tokens = torch.arange(batch * time, device=starts.device)
    numbers = torch.searchsorted(edges, tokens, right=True) - 1  # of equal edges the last, after the empty documents
    places = tokens - edges[numbers]
    return Documents(edges.int(), numbers.unflatten(0, (batch, time)), places.unflatten(0, (batch, time)))


def apart(
    convolve: Callable[..., Tensor],  # takes tensors [1, T, ...] and `cu_seqlens`
    documents: Documents | None,  # None: each sequence is one document
    *tensors: Tensor | None,  # [B, T, ...] each
) -> Tensor:  # [B, T, ...]
    """Apply a convolution to the batch as one sequence of documents, none of which reads another."""
    if documents is None:
        return convolve(*tensors)
    flat = [None if tensor is None else tensor.flatten(0, 1)[None] for tensor in tensors]
    return convolve(*flat, cu_seqlens=documents.cu_seqlens)[0].unflatten(0, documents.numbers.shape)


def same_document(documents: Documents) -> Tensor:  # [B, 1, T, T]: queries, keys
    """A mask of attention: True where a token may see another one, which is of its document and not after it."""
    numbers = documents.numbers
    same = numbers[:, :, None] == numbers[:, None, :]
    return same.tril()[:, None]
