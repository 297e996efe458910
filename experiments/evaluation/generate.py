"""Sample text from a trained model, one token at a time, with caches of keys, values and convolutions' inputs.

Shapes: B batch, T time, V vocabulary.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from experiments.evaluation.load import TrainedRun, precision
from experiments.models.decoder import Cache, Decoder


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 1.0  # the logits are divided by it; 0 takes the most likely token
    top_k: int | None = None  # only the k most likely tokens are drawn
    top_p: float | None = None  # only the most likely tokens are drawn whose probabilities add up to p (1904.09751)

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0; got {self.temperature}; 0 takes the most likely token")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1; got {self.top_k}; leave it out to draw from all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1; got {self.top_p}; leave it out to draw from all")

    def draw(
        self,
        logits: Tensor,  # [B, V]
        generator: torch.Generator,
    ) -> Tensor:  # [B]
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits.float()
        # The largest becomes 0, so that no temperature makes it infinite; float32 has none below `tiny`.
        logits = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, torch.finfo(torch.float32).tiny)
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.softmax(-1).sort(-1, descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.top_p  # the tokens before these have reached p already
            logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(
    model: Decoder,
    prompt: Tensor,  # [B, T] token ids, T at least 1
    sampling: Sampling,
    seed: int,
) -> Iterator[Tensor]:  # [B] each
    """The tokens that follow the prompts, without end. The same seed gives the same tokens on the same device.

    Raises ValueError if the prompt is empty.
    """
    if prompt.shape[1] == 0:
        raise ValueError("the prompt must have at least one token; got none; begin with the end-of-text token")
    generator = torch.Generator(prompt.device).manual_seed(seed)
    logits, cache = model.decode(prompt)
    while True:
        token = sampling.draw(logits[:, -1], generator)
        yield token
        logits, cache = model.decode(token[:, None], cache)


@torch.inference_mode()
def complete(
    model: Decoder,
    prompts: Sequence[Sequence[int]],  # B of them, of at least one token each
    sampling: Sampling,
    seed: int,
    most: int,
    ends: Callable[
        [int, Sequence[int]], bool
    ],  # whether the tokens drawn for the prompt of this index end with the last
) -> list[list[int]]:
    """At most `most` tokens that follow each prompt, as `generate` draws them for the prompt by itself.

    Nothing is padded: the first tokens of all prompts, as many as the shortest has, are one pass. Then rows take the
    next token of their prompt, as long as it has one, where others take the token that was drawn for them. Rows that
    have ended are dropped.
    """
    device = model.embedding.weight.device
    generators = [torch.Generator(device).manual_seed(seed) for _ in prompts]
    made: list[list[int]] = [[] for _ in prompts]
    rows, length = list(range(len(prompts))), min(map(len, prompts))
    logits, cache = model.decode(torch.tensor([prompt[:length] for prompt in prompts], device=device))
    while True:
        tokens = logits[:, -1].argmax(-1).tolist() if sampling.temperature == 0 else [0] * len(rows)
        going = []
        for place, row in enumerate(rows):
            if length < len(prompts[row]):
                tokens[place] = prompts[row][length]
            else:
                if sampling.temperature > 0:
                    tokens[place] = int(sampling.draw(logits[place : place + 1, -1], generators[row]))
                made[row].append(tokens[place])
                if len(made[row]) == most or ends(row, made[row]):
                    continue
            going.append(place)
        if not going:
            return made
        if len(going) < len(rows):
            rows, cache = [rows[place] for place in going], _select(cache, torch.tensor(going, device=device))
        length += 1
        logits, cache = model.decode(torch.tensor([[tokens[place]] for place in going], device=device), cache)


def _select(
    cache: Cache,
    rows: Tensor,  # [n]
) -> Cache:
    return [
        tuple({name: kept.index_select(0, rows) for name, kept in part.items()} for part in layer)  # type: ignore[misc]
        for layer in cache
    ]


def continue_text(run: TrainedRun, prompt: str, tokens: int, sampling: Sampling, seed: int) -> Iterator[str]:
    """The text that follows `prompt`, piece by piece, until the model ends the document or `tokens` are drawn.

    An empty prompt begins a document. Bytes that are no UTF-8 come out as replacement characters.
    """
    ids = run.tokenizer.encode(prompt, add_special_tokens=False).ids or [run.end_of_text]
    stream = DecodeStream(skip_special_tokens=True)
    held: list[int] = []  # tokens of a character whose bytes are not complete yet
    with precision(run.device):
        drawn = generate(run.model, torch.tensor([ids], device=run.device), sampling, seed)
        for token in itertools.islice(drawn, tokens):
            number = int(token)
            if number == run.end_of_text:
                break
            held.append(number)
            if piece := stream.step(run.tokenizer, number):
                held.clear()
                yield piece
    if held:
        yield run.tokenizer.decode(held)
