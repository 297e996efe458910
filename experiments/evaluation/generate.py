"""Sample text from a trained model, one token at a time, with caches of keys, values and convolutions' inputs.

Shapes: B batch, T time, V vocabulary.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tokenizers.decoders import DecodeStream
from torch import Tensor

from experiments.evaluation.load import TrainedRun, precision
from experiments.models.decoder import Decoder


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
        logits = logits.float() / self.temperature
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
