"""The specification of a dataset. Only the standard library is imported here, so that `plan` starts at once."""

import hashlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from experiments.design.identity import OUTSIDE_ID

SPLITS = ("train", "validation")
SMALLEST_VOCABULARY = 257  # 256 bytes and the end-of-text token


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Settings from which a dataset is built: equal settings and equal text give equal shards.

    `train_tokens` and `validation_tokens` are exact: the build takes documents in the order of their content
    hash until it has that many, and fails if the corpus has fewer. So the number of epochs of a run follows
    from the specification alone. A run's id does not cover the paths of the text and the tokenizer; the hash of the
    built dataset is in the run's record and is compared instead.
    """

    # "python", for the source files of the standard library; a folder of text (.txt, .jsonl, .json, each plain or with
    # .gz or .zst, .parquet, .arrow); or one such file
    source: str = field(default="python", metadata=OUTSIDE_ID)
    site_packages: bool = False  # add every .py file of site-packages; with source "python" only
    # the column or key that holds a document's text, or a list of messages with role and content; "a.b" is b within a
    text_field: str = "text"
    # False: read only as many files as are likely to have enough tokens, in the order of the hashes of their names
    read_all: bool = True
    # a source of held-out text; None: one in twenty documents of `source` is held out
    validation_source: str | None = field(default=None, metadata=OUTSIDE_ID)
    # leave out held-out documents most of whose runs of five lines also occur in training documents, such as vendored
    # or edited copies
    drop_near_copies: bool = False
    # the format of .bin files with tokens of another project: "uint16" and "uint32" hold only tokens, like nanoGPT's;
    # "llm.c" has a header, like modded-nanogpt's; "megatron" is Megatron-LM's with an .idx file; None: not tokenized
    pretokenized: Literal["uint16", "uint32", "llm.c", "megatron"] | None = field(default=None, metadata=OUTSIDE_ID)
    separator: str | None = None  # the text between two documents of a .txt file; None: each file is a document
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
        if self.validation_source == "python":
            raise ValueError('validation_source must be a folder or a file of text; got "python"; give your own text')
        if self.site_packages and self.source != "python":
            raise ValueError(
                f'site_packages needs source = "python"; got source = "{self.source}"; remove site_packages'
            )
        if self.pretokenized is not None:
            self._check_pretokenized()

    def _check_pretokenized(self) -> None:
        """Raises ValueError if settings do not apply to text that is tokenized already."""
        if self.source == "python":
            raise ValueError(
                f'pretokenized = "{self.pretokenized}" needs a source of .bin files; got "python"; name them'
            )
        if self.tokenizer is None:
            raise ValueError(
                f'pretokenized = "{self.pretokenized}" needs the tokenizer that made the tokens, for bits per byte and '
                "for text that is generated; got none; set tokenizer to its tokenizer.json"
            )
        if self.separator is not None or self.drop_near_copies or not self.read_all:
            raise ValueError(
                f'pretokenized = "{self.pretokenized}" takes tokens as they are; got separator, drop_near_copies or '
                "read_all = false; remove it"
            )


def text_sha256(dataset_sha256: str, packed: bool) -> str:
    """The content hash of text as a run reads it.

    Packed runs get a hash of their own, since their losses have other targets and contexts, and do not compare.
    """
    return hashlib.sha256(f"{dataset_sha256} packed".encode()).hexdigest() if packed else dataset_sha256


def relative_to(data: DataConfig, folder: Path) -> DataConfig:
    """The same data, with relative paths that exist in `folder` taken from there. Others stay as they are."""
    places: dict[str, Any] = {
        name: str(folder / place) for name, place in _own_places(data).items() if _is_there(folder / place, data)
    }
    return replace(data, **places)


def missing(data: DataConfig) -> dict[str, str]:
    """Key -> path, for each path of text or a tokenizer that does not exist on this machine."""
    return {name: place for name, place in _own_places(data).items() if not _is_there(Path(place).expanduser(), data)}


def _own_places(data: DataConfig) -> dict[str, str]:
    """Key -> path, without the built-in source "python" and the sources on the Hugging Face hub ("hub:...")."""
    places = {name: getattr(data, name) for name in ("source", "validation_source", "tokenizer")}
    return {name: place for name, place in places.items() if place not in (None, "python") and place[:4] != "hub:"}


def _is_there(path: Path, data: DataConfig) -> bool:
    """Whether the path exists. For tokenized data it may also be a pattern or, like Megatron's, a prefix of names."""
    return path.exists() or (data.pretokenized is not None and any(path.parent.glob(f"{path.name}*")))


def default_cache() -> Path:
    """The folder in which datasets are built: $DYNCONV_CACHE, or else dynconv/data in the user's XDG cache folder."""
    if chosen := os.environ.get("DYNCONV_CACHE"):
        return Path(chosen)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "dynconv" / "data"
