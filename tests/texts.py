"""Documents with known content, and the definition of the data's splits in plain Python."""

import hashlib
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.data.dataset import Dataset
from experiments.design.data import DataConfig

END_OF_TEXT = DataConfig.end_of_text

# Many scripts, runs of white space, and the end-of-text token's own spelling, which is text in a document.
WORDS = [*["def", "return", "self", "café", "naïve", "数据", "λ", "🙂", "==", "("], "\n\n    ", "\t", END_OF_TEXT]


def make_texts(count: int = 150, words: list[str] = WORDS) -> list[str]:
    rng = random.Random(0)
    return [f"{i}\r\n" + " ".join(rng.choices(words, k=rng.randrange(20, 120))) for i in range(count)]


def write_txt(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True)
    for i, text in enumerate(texts):
        (folder / f"{i:04d}.txt").write_bytes(text.encode())
    return folder


def specify(source: Path | str, **changes: Any) -> DataConfig:
    base = DataConfig(source=str(source), vocabulary=300, train_tokens=12_000, validation_tokens=400)
    return replace(base, **changes)


def expected_documents(texts: list[str], split: str) -> list[str]:
    """The definition again, in plain Python: distinct, split by the hash's end, ordered by the hash."""
    digests = {hashlib.sha256(text.encode()).digest(): text for text in texts}
    chosen = [d for d in digests if (int.from_bytes(d[-8:], "big") < 2**64 / 20) == (split == "validation")]
    return [digests[digest] for digest in sorted(chosen)]


def all_tokens(dataset: Dataset, split: str) -> NDArray[np.int64]:
    return dataset.windows(split, np.zeros(1, np.int64), dataset.tokens(split))[0]


def visible(cache: Path) -> list[Path]:
    """What a build left, but for its lock and what it noted of a corpus's content."""
    return [path for path in cache.iterdir() if not path.name.endswith((".lock", ".content"))]


# A sweep of one run that takes a second, on a folder of text
CHEAP_SWEEP = """
name = "cheap"
ladder = "nano"
sizes = ["25k"]
arms = ["transformer"]
baseline = "transformer"
seeds = [0]
tokens_per_parameter = 1
match = "flops"
evaluations = 1

[data]
source = "{source}"
vocabulary = 300
train_tokens = 200_000
validation_tokens = 4_000
"""
