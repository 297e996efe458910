"""The answers of a model at the targets that count: the loss at each, and whether its likeliest token is the target.

Shapes: B sequences, T sequence length, N targets that count, D width, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.training.loss import CHUNK, IGNORED, means_over_sequences
from experiments.training.precision import mixed_precision


class Answers(NamedTuple):
    """The answers of a model to a micro-batch."""

    losses: Tensor  # [B, T] in nats, float64; 0 where no target counts
    correct: Tensor  # [B, T]: whether the likeliest token is the target; False where no target counts
    auxiliary: dict[str, Tensor]  # means of the model's auxiliary losses [] and measures [n], by name


def answers_of(
    model: nn.Module,
    device: torch.device,
    inputs: Tensor,  # [B, T]
    targets: Tensor,  # [B, T]: IGNORED where no target counts
) -> Answers:
    """The model's answers. Call this under torch.no_grad.

    A GPU computes only the logits of targets that count. Losses are computed from the logits in float64, because in
    float32 those of a solved task would be rounded to zero.
    """
    counted = targets != IGNORED
    losses = torch.zeros(targets.shape, dtype=torch.float64, device=device)
    correct = torch.zeros(targets.shape, dtype=torch.bool, device=device)

    def score(x: Tensor, head: Tensor) -> Tensor:  # [B, T, D], [V, D] -> []
        found = [
            _score(rows @ head.to(rows.dtype).T, wanted)
            for rows, wanted in zip(x[counted].split(CHUNK), targets[counted].split(CHUNK), strict=True)
        ]
        losses[counted], correct[counted] = (torch.cat(each) for each in zip(*found, strict=True))
        return losses.sum()

    if device.type == "cuda":
        with mixed_precision(device):
            _, auxiliary, measures = model(inputs, score)
    else:
        logits, auxiliary, measures = model(inputs)
        losses[counted], correct[counted] = _score(logits[counted], targets[counted])
    return Answers(losses, correct, means_over_sequences(auxiliary | measures, targets))


def _score(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:  # [N, V], [N] -> [N], [N]
    return F.cross_entropy(logits.double(), targets, reduction="none"), logits.argmax(1) == targets
