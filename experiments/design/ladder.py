"""Ladders of model sizes. Add a size as an entry of a ladder's `sizes`, and a ladder as an entry of `LADDERS`."""

from dataclasses import dataclass, replace

from experiments.parts.base import Shape


@dataclass(frozen=True)
class Rung:
    """One size: the shape of its models and the settings with which they are trained."""

    layers: int
    width: int
    ffn: int  # hidden width of the feed-forward part
    heads: int  # of attention: the same number for queries, keys and values
    rank: int  # of low-rank convolutions
    sequence_length: int
    batch_sequences: int
    learning_rate: float


@dataclass(frozen=True)
class Ladder:
    """Sizes that are compared with one another, and the defaults that all of them share."""

    sizes: dict[str, Rung]
    head_size: int  # of head-wise convolutions
    warmup_fraction: float  # share of the steps in which the learning rate rises to its peak
    init_std: float  # standard deviation of the initial weights
    tied: bool = True  # the LM head uses the weights of the embedding

    def shape(self, size: str) -> Shape:
        """The settings of a size from which parts take the values that they leave open."""
        rung = self.sizes[size]
        return Shape(rung.width, rung.heads, rung.ffn, rung.rank, self.head_size)


# arXiv 2606.03825 trains every size with AdamW at a learning rate of 3e-4, with 10% warm-up and sequences of 4096
# tokens. The shapes of 300M and 2B reproduce the paper's parameter counts exactly. 400M is that of Mamba-2 and Gated
# DeltaNet in a sibling configuration. We chose the shapes of 150M, 600M and 1B (at the same ratio of FFN width to model
# width, 2.69), the head sizes (64 up to width 1024, 128 above) and the batches (0.5M tokens, 1M from 600M up). The rank
# of 300M, 16, reproduces the published counts at 2B, too.
_PAPER = Ladder(
    sizes={
        "150M": Rung(12, 768, 2048, 12, rank=16, sequence_length=4096, batch_sequences=128, learning_rate=3e-4),
        "300M": Rung(16, 1024, 2752, 16, rank=16, sequence_length=4096, batch_sequences=128, learning_rate=3e-4),
        "400M": Rung(24, 1024, 2752, 16, rank=16, sequence_length=4096, batch_sequences=128, learning_rate=3e-4),
        "600M": Rung(24, 1280, 3440, 10, rank=16, sequence_length=4096, batch_sequences=256, learning_rate=3e-4),
        "1B": Rung(30, 1536, 4128, 12, rank=16, sequence_length=4096, batch_sequences=256, learning_rate=3e-4),
        "2B": Rung(32, 2048, 5504, 16, rank=16, sequence_length=4096, batch_sequences=256, learning_rate=3e-4),
    },
    head_size=16,
    warmup_fraction=0.1,
    init_std=0.02,
)

# The paper's recipe made small enough for minutes on one GPU, at a vocabulary of 4096. We chose the learning rates,
# which fall as 1/sqrt(width) from 4e-3 at width 128. The rank is width / 64, as in the paper at 300M (16 at width
# 1024): with rank 16 at width 128, an arm with convolutions after all linear maps would get 22% fewer
# tokens at equal FLOPs.
_MINI = Ladder(
    sizes={
        "1M": Rung(4, 128, 344, 2, rank=2, sequence_length=512, batch_sequences=32, learning_rate=4.0e-3),
        "3M": Rung(6, 192, 516, 3, rank=3, sequence_length=512, batch_sequences=32, learning_rate=3.3e-3),
        "7M": Rung(8, 256, 688, 4, rank=4, sequence_length=512, batch_sequences=64, learning_rate=2.8e-3),
        "11M": Rung(8, 320, 860, 5, rank=5, sequence_length=512, batch_sequences=64, learning_rate=2.5e-3),
        "16M": Rung(8, 384, 1032, 6, rank=6, sequence_length=512, batch_sequences=64, learning_rate=2.3e-3),
        "21M": Rung(8, 448, 1204, 7, rank=7, sequence_length=512, batch_sequences=64, learning_rate=2.1e-3),
    },
    head_size=16,
    warmup_fraction=0.1,
    init_std=0.02,
)

# A run takes seconds on one CPU core, at a vocabulary of at most 512. These sizes show that the whole loop works; they
# support no claims. We chose the learning rates and `init_std` as the best of a few that we tried on the baseline:
# rates of 0.005 to 0.04, and standard deviations of 0.02 to 0.1.
_NANO = Ladder(
    sizes={
        "25k": Rung(2, 24, 56, 2, rank=4, sequence_length=128, batch_sequences=8, learning_rate=1e-2),
        "45k": Rung(2, 32, 96, 2, rank=4, sequence_length=128, batch_sequences=8, learning_rate=2e-2),
        "70k": Rung(2, 48, 104, 3, rank=4, sequence_length=128, batch_sequences=16, learning_rate=1e-2),
        "110k": Rung(3, 48, 128, 3, rank=4, sequence_length=128, batch_sequences=16, learning_rate=1e-2),
    },
    head_size=8,
    warmup_fraction=0.1,
    init_std=0.05,
)

# Mixtures of experts. `ffn` is the hidden width that one token uses: of the shared expert and the chosen ones.
# arXiv 2606.03825 names 7B parameters, 1B active; the shape is that of a sibling configuration with 128 experts of
# 256, 8 of them chosen, beside a shared one of 1024: 6.92B parameters, 1.11B active. We chose the batch, 1M tokens.
_PAPER_MOE = Ladder(
    sizes={"7B": Rung(40, 1536, 3072, 24, rank=16, sequence_length=4096, batch_sequences=256, learning_rate=3e-4)},
    head_size=16,
    warmup_fraction=0.1,
    init_std=0.02,
    tied=False,
)

# The shapes and rates of the ladder "mini", with the ratio of `ffn` to width of the 7B model, 2. Sizes are named after
# their parameters with 32 experts, 4 of them chosen, at a vocabulary of 4096; active are 1.2M to 13M.
_MINI_MOE = replace(
    _MINI,
    sizes={
        name: replace(_MINI.sizes[dense], ffn=2 * _MINI.sizes[dense].width)
        for name, dense in {"3M": "1M", "8M": "3M", "18M": "7M", "28M": "11M", "40M": "16M"}.items()
    },
    tied=False,
)

# Two layers, as in the experiments on recall of arXiv 2312.04927, whose widths are 64 to 512, and of arXiv 2403.17844.
# arXiv 2606.03825 does not give its shapes and ranks for recall. We chose heads of 64 channels, ranks of width / 16 but
# at least 4, the ratio of FFN width to model width of the paper's language models, and the learning rates. The sequence
# length is the task's.
_RECALL = Ladder(
    sizes={
        "d32": Rung(2, 32, 88, 1, rank=4, sequence_length=64, batch_sequences=64, learning_rate=4e-3),
        "d64": Rung(2, 64, 172, 1, rank=4, sequence_length=64, batch_sequences=64, learning_rate=2.8e-3),
        "d128": Rung(2, 128, 344, 2, rank=8, sequence_length=64, batch_sequences=64, learning_rate=2e-3),
        "d256": Rung(2, 256, 688, 4, rank=16, sequence_length=64, batch_sequences=64, learning_rate=1.4e-3),
        "d512": Rung(2, 512, 1376, 8, rank=32, sequence_length=64, batch_sequences=64, learning_rate=1e-3),
    },
    head_size=16,
    warmup_fraction=0.1,
    init_std=0.02,
)

LADDERS = {
    "paper": _PAPER,
    "mini": _MINI,
    "nano": _NANO,
    "recall": _RECALL,
    "paper-moe": _PAPER_MOE,
    "mini-moe": _MINI_MOE,
}
