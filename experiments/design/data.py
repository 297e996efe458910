"""What a dataset is made from. Standard library only, so that a planner loads nothing to read it."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from experiments.design.identity import OUTSIDE_ID

SPLITS = ("train", "validation")
SMALLEST_VOCABULARY = 257  # 256 bytes and the end-of-text token


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The specification of a dataset: equal specifications over equal text give equal shards.

    `train_tokens` and `validation_tokens` are exact: the build takes documents in the order of their content
    hash until it has that many and fails if the corpus has fewer. So the number of epochs of a run follows
    from the specification alone. Where the text lies is no part of a run's id: its content is compared instead,
    by the dataset's hash in the run's record.
    """

    # "python", which is the standard library's source files, or a folder of .txt, .jsonl and .parquet
    source: str = field(default="python", metadata=OUTSIDE_ID)
    site_packages: bool = False  # add every .py file of site-packages; with source "python" only
    text_field: str = "text"  # the column of .jsonl and .parquet that holds a document's text
    vocabulary: int
    # path of a byte-level tokenizer.json to use instead of training one
    tokenizer: str | None = field(default=None, metadata=OUTSIDE_ID)
    train_tokens: int
    validation_tokens: int

    def __post_init__(self) -> None:
        if self.vocabulary < SMALLEST_VOCABULARY:
            raise ValueError(
                f"vocabulary must be at least {SMALLEST_VOCABULARY} (256 bytes and the end of text); "
                f"got {self.vocabulary}; raise it"
            )
        for name in ("train_tokens", "validation_tokens"):
            if getattr(self, name) < 2:
                raise ValueError(
                    f"{name} must be at least 2 (an input and a target); got {getattr(self, name)}; raise it"
                )
        if self.site_packages and self.source != "python":
            raise ValueError(
                f'site_packages needs source = "python"; got source = "{self.source}"; remove site_packages'
            )


def default_cache() -> Path:
    """Where datasets are built: $DYNCONV_CACHE, else dynconv/data in the user's cache folder (XDG)."""
    if chosen := os.environ.get("DYNCONV_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "dynconv" / "data"
