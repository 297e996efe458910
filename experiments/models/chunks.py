"""Linear recurrences over a matrix of state, as in Mamba-2 (arXiv 2405.21060) and Gated DeltaNet (arXiv 2412.06464).

For each head, with decay a_t in (0, 1] and state S of shape [K, V]:

    S_t = a_t S_{t-1} + k_t u_t^T,    o_t = S_t^T q_t

where u_t is v_t, or with `beta` the delta rule's beta_t (v_t - a_t S_{t-1}^T k_t), which replaces what the state holds
under the key k_t. This file imports torch alone, because exported models take it with them.

Shapes: B batch, T time, H heads, K channels of a key, V channels of a value, N chunks of C tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64  # tokens; 16 to 64 took the same time on a CPU, 10 times less than one token after another


def chunked(
    q: Tensor,  # [B, T, H, K], or [B, T, 1, K] if all heads share it
    k: Tensor,  # as q
    v: Tensor,  # [B, T, H, V]
    log_decay: Tensor,  # [B, T, H]: ln a, in float32 or wider
    beta: Tensor | None = None,  # [B, T, H], in (0, 1)
    *,
    state: Tensor | None = None,  # [B, H, K, V]: S before the first token; None: zeros
    numbers: Tensor | None = None,  # [B, T]: each token's document, rising; S is zero before each. None: one document
) -> tuple[Tensor, Tensor]:  # [B, T, H, V]; [B, H, K, V], S after the last token
    """The recurrence with matrix products within chunks and between their states, in log_decay's dtype.

    The outputs are in the dtype of v. Sources: arXiv 2405.21060, section 6, and arXiv 2412.06464, section 3.3, whose
    notation the comments use.
    """
    time, dtype = v.shape[1], v.dtype
    length = min(CHUNK, time)
    with torch.autocast(v.device.type, enabled=False):  # It would round the state to 16 bits at every chunk.
        if beta is not None:
            q, k = (x.expand(-1, -1, v.shape[2], -1) for x in (q, k))
        q, k, v = (_chunks(x.to(log_decay.dtype), length) for x in (q, k, v))  # [N, B, H or 1, C, K or V]
        decay = _decays(_chunks(log_decay[..., None], length).squeeze(-1), numbers)
        if state is None:
            state = v.new_zeros(*v.shape[1:3], k.shape[-1], v.shape[-1])
        if beta is None:
            y, state = _added(q, k, v, decay, state)
        else:
            y, state = _replaced(q, k, v, decay, _chunks(beta[..., None].to(v.dtype), length), state)
        return y.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :time].to(dtype), state


class _Decays(NamedTuple):
    """Products of decays; 0 where no token sees the other one."""

    within: Tensor  # [N, B, H, C, C]: from a token to a later one of its chunk: Gamma
    before: Tensor  # [N, B, H, C, 1]: from before the chunk to a token
    after: Tensor  # [N, B, H, C, 1]: from a token to the end of its chunk
    through: Tensor  # [N, B, H, 1, 1]: through the chunk
    between: Tensor  # [B, H, N+1, N+1]: from before a chunk (the last index) to before a later one, or the end


def _decays(
    logs: Tensor,  # [N, B, H, C]
    numbers: Tensor | None,  # [B, T]
) -> _Decays:
    count, length = logs.shape[0], logs.shape[-1]
    total = logs.cumsum(-1)  # ln of gamma
    before, after, through = total.exp(), (total[..., -1:] - total).exp(), total[..., -1:].exp()
    seen, kept = (torch.ones(n, n, dtype=torch.bool, device=logs.device).tril() for n in (length, count + 1))
    if numbers is not None:
        seen, first, last, kept = _same_document(numbers, length)
        before, after, through = before * first, after * last, through * first[..., -1:]
    # Each sum by itself: a difference of two long ones has the error of the longer. [B, H, N, N+1]
    sums = total[..., -1].permute(1, 2, 0)[..., None].expand(-1, -1, -1, count + 1).tril().cumsum(-2)
    # What is not seen is masked before exp, which could overflow there.
    within = (total[..., :, None] - total[..., None, :]).masked_fill(~seen, -torch.inf).exp()
    between = F.pad(sums, (0, 0, 1, 0)).masked_fill(~kept, -torch.inf).exp()
    return _Decays(within, before[..., None], after[..., None], through[..., None], between)


def _added(
    q: Tensor,  # [N, B, G, C, K]: G is H, or 1 where all heads share keys and queries
    k: Tensor,  # [N, B, G, C, K]
    v: Tensor,  # [N, B, H, C, V]
    decay: _Decays,
    state: Tensor,  # [B, H, K, V]
) -> tuple[Tensor, Tensor]:  # [N, B, H, C, V]; [B, H, K, V]
    """Mamba-2's: a state is a sum over chunks, all of which are one product with the decays between them.

    The R = H / G heads that share a key are columns of one matrix, in which their values lie side by side.
    """
    groups = (k.shape[2], -1)
    own = torch.einsum("nbgck,nbgrcv->nbgrkv", k, (decay.after * v).unflatten(2, groups)).flatten(2, 3)
    states = torch.einsum("bhnm,mbhkv->nbhkv", decay.between, torch.cat([state[None], own]))
    read = torch.einsum("nbgck,nbgrkv->nbgrcv", q, states[:-1].unflatten(2, groups)).flatten(2, 3)
    return ((q @ k.mT) * decay.within) @ v + decay.before * read, states[-1]


def _replaced(
    q: Tensor,  # [N, B, H, C, K]
    k: Tensor,  # [N, B, H, C, K]
    v: Tensor,  # [N, B, H, C, V]
    decay: _Decays,
    beta: Tensor,  # [N, B, H, C, 1]
    state: Tensor,  # [B, H, K, V]
) -> tuple[Tensor, Tensor]:  # [N, B, H, C, V]; [B, H, K, V]
    """Gated DeltaNet's: a chunk makes M S + L of the state S before it, and the chunks follow one after another."""
    # T (U and W are its products) is the inverse of I + the strictly lower part of diag(b) (Gamma * K K^T): the WY form
    inverse = _inverse((beta * (k @ k.mT) * decay.within).tril(-1)) * beta.mT
    added, replaced = inverse @ v, inverse @ (decay.before * k)  # U and W
    to_end = (decay.after * k).mT
    kept = decay.through * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device) - to_end @ replaced
    states = [state.flatten(0, 1)]
    for m, own in zip(kept.flatten(1, 2), (to_end @ added).flatten(1, 2), strict=True):
        states.append(torch.baddbmm(own, m, states[-1]))
    weights = (q @ k.mT) * decay.within
    read = (decay.before * q - weights @ replaced) @ torch.stack(states[:-1]).unflatten(1, state.shape[:2])
    return weights @ added + read, states[-1].view_as(state)


def _inverse(
    lower: Tensor,  # [..., C, C], strictly lower triangular
) -> Tensor:  # [..., C, C]
    """(I + lower)^-1, by blocks, in a number of products that is the logarithm of C.

    With A and B the inverses of two neighbouring blocks on the diagonal, that of both is [[A, 0], [-B X A, B]], where X
    is what lies left of the second and below the first. GPUs take far longer for solving triangular systems.
    """
    length = lower.shape[-1]
    eye = torch.eye(length, dtype=lower.dtype, device=lower.device)
    with torch.no_grad():
        inverse, place, size = eye, torch.arange(length, device=lower.device), 1
        while size < length:
            block, pair = place // size, place // (2 * size)
            corner = (pair[:, None] == pair) & (block[:, None] > block)
            inverse = inverse - inverse @ (lower * corner) @ inverse
            size *= 2
    # Newton's step: it leaves an inverse as it is, and its derivative is that of the inverse.
    return 2 * inverse - inverse @ (lower + eye) @ inverse


def _same_document(
    numbers: Tensor,  # [B, T]
    length: int,  # C
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # [N, B, 1, C, C]; [N, B, 1, C]; [N, B, 1, C]; [B, 1, N+1, N+1]
    """Where a token of a chunk sees another one: one of its own document and not after it; where it sees what was
    before the chunk; where it is of the document of the chunk's last token, which the next chunk may see; and where
    what was before a chunk is of the document that ends just before a later one."""
    padding = numbers[:, -1:].expand(-1, -numbers.shape[1] % length)  # goes on with the last document
    own = torch.cat([numbers, padding], 1).unflatten(1, (-1, length)).transpose(0, 1)[:, :, None]  # [N, B, 1, C]
    ends = F.pad(own[..., -1], (0, 0, 0, 0, 1, 0))  # [N+1, B, 1]; the first chunk has a state of zeros before it
    seen = (own[..., :, None] == own[..., None, :]).tril()
    kept = (ends[:, None] == ends).permute(2, 3, 0, 1).tril()
    return seen, own == ends[:-1, ..., None], own == own[..., -1:], kept


def _chunks(
    x: Tensor,  # [B, T, H, X]
    length: int,  # C
) -> Tensor:  # [N, B, H, C, X]
    """Chunks, of which the last is padded with zeros: no key and no decay, so that the state stays as it is."""
    return F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % length)).unflatten(1, (-1, length)).permute(1, 0, 3, 2, 4)
