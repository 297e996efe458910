"""Log-probabilities of given tokens, in batches.

Shapes: B batch, T time, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.evaluation.load import TrainedRun, precision
from experiments.models.decoder import Cache, Decoder

MOST_TOKENS = 2**14  # of one forward pass, padding included
MOST_LOGITS = 2**28  # of one forward pass; they take 1 GiB in float32


class Score(NamedTuple):
    """How likely one continuation is to a model."""

    log_probability: float  # of the whole continuation, in nats
    greedy: bool  # whether each of its tokens is the most likely one


class Request(NamedTuple):
    """Tokens to score, given those before them."""

    context: tuple[int, ...]  # at least one token
    continuation: tuple[int, ...]


@torch.inference_mode()
def score(run: TrainedRun, requests: Sequence[Request]) -> list[Score]:
    """The score of each request, in their order.

    Short continuations of one long context, such as the choices of a question, share its forward pass.
    """
    by_context: dict[tuple[int, ...], list[int]] = {}
    for number, request in enumerate(requests):
        by_context.setdefault(request.context, []).append(number)
    alone: list[int] = []
    scores: dict[int, Score] = {}
    tokens = most_tokens(run.config.model.vocabulary)
    with precision(run.device):
        for context, numbers in by_context.items():
            longest = max(len(requests[n].continuation) for n in numbers)
            if len(numbers) == 1 or longest >= len(context):
                alone += numbers
                continue
            for some in _batches(numbers, max(1, tokens // longest)):
                continuations = [requests[n].continuation for n in some]
                scores |= zip(some, _score_continuations(run.model, context, continuations), strict=True)
        alone.sort(key=lambda n: -_length(requests[n]))  # the longest first: memory that is too small shows at once
        while alone:
            count = max(1, tokens // _length(requests[alone[0]]))
            some, alone = alone[:count], alone[count:]
            scores |= zip(some, _score_batch(run.model, [requests[n] for n in some]), strict=True)
    return [scores[number] for number in range(len(requests))]


def most_tokens(vocabulary: int) -> int:
    """Of one forward pass, padding included."""
    return min(MOST_TOKENS, MOST_LOGITS // vocabulary)


def _length(request: Request) -> int:
    return len(request.context) + len(request.continuation)


def _batches(numbers: Sequence[int], count: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(numbers), count):
        yield numbers[start : start + count]


def _score_batch(model: Decoder, requests: Sequence[Request]) -> list[Score]:
    """Padding stands behind the tokens, where a causal model's earlier outputs do not see it."""
    inputs = _padded([(*r.context, *r.continuation)[:-1] for r in requests], model.embedding.weight.device)
    logits = model(inputs).logits
    return [_score_one(logits[row, len(r.context) - 1 :], r.continuation) for row, r in enumerate(requests)]


def _score_continuations(
    model: Decoder, context: tuple[int, ...], continuations: Sequence[tuple[int, ...]]
) -> list[Score]:
    device = model.embedding.weight.device
    first, cache = model.decode(torch.tensor([context], device=device))
    count = len(continuations)
    repeated: Cache = [
        tuple({name: kept.expand(count, *kept.shape[1:]) for name, kept in part.items()} for part in layer)  # type: ignore[misc]
        for layer in cache
    ]
    logits = first[:, -1:].expand(count, -1, -1)
    if max(map(len, continuations)) > 1:
        rest, _ = model.decode(_padded([c[:-1] for c in continuations], device), repeated)
        logits = torch.cat([logits, rest], 1)
    return [_score_one(logits[row], continuation) for row, continuation in enumerate(continuations)]


def _score_one(
    logits: Tensor,  # [T, V]: those of the continuation's tokens, then others
    continuation: tuple[int, ...],
) -> Score:
    tokens = torch.tensor(continuation, device=logits.device)
    logits = logits[: len(tokens)].to(torch.promote_types(logits.dtype, torch.float32))
    chosen = -F.cross_entropy(logits, tokens, reduction="sum")
    return Score(float(chosen), bool((logits.argmax(-1) == tokens).all()))


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:  # [B, longest]
    length = max(1, *map(len, rows))
    return torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=device)
