"""The specification of a dataset. Only the standard library is imported here, so that `plan` starts at once."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from experiments.design.identity import OUTSIDE_ID

SPLITS = ("train", "validation")
SMALLEST_VOCABULARY = 257  # 256 bytes and the end-of-text token


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings from which a dataset is built: equal settings and equal text give equal shards.

    `train_tokens` and `validation_tokens` are exact: the build takes documents in the order of their content
    hash until it has that many and fails if the corpus has fewer. So the number of epochs of a run follows
    from the specification alone. A run's id does not cover paths of the text and the tokenizer: the hash of the built
    dataset is in the run's record, and is compared instead.
    """

    # "python", for the source files of the standard library; a folder of text (.txt, .jsonl, .json, each plain or with
    # .gz or .zst, .parquet, .arrow); or one such file
    source: str = field(default="python", metadata=OUTSIDE_ID)
    site_packages: bool = False  # add every .py file of site-packages; with source "python" only
    # the column or key that holds a document's text, or a list of messages with role and content; "a.b" is b within a
    text_field: str = "text"
    separator: str | None = None  # what stands between the documents of a .txt file; None: each file is a document
    vocabulary: int
    # path of a tokenizer.json to use instead of training one; it may have fewer tokens than `vocabulary`
    tokenizer: str | None = field(default=None, metadata=OUTSIDE_ID)
    end_of_text: str = "<|endoftext|>"  # the token that ends each document
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
        for name in ("separator", "end_of_text"):
            if getattr(self, name) == "":
                raise ValueError(f'{name} must not be empty; got ""; give what marks the end of a document')
        if self.site_packages and self.source != "python":
            raise ValueError(
                f'site_packages needs source = "python"; got source = "{self.source}"; remove site_packages'
            )


def default_cache() -> Path:
    """The folder in which datasets are built: $DYNCONV_CACHE, or else dynconv/data in the user's XDG cache folder."""
    if chosen := os.environ.get("DYNCONV_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "dynconv" / "data"
