"""Fetches a corpus that anyone can rebuild: pinned public text, filtered by stated rules, one parquet file a package.

What to fetch is a file of sources/, or one like it. `dynconv data build` reads the folder that comes out.
"""

import hashlib
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from experiments.data import origins
from experiments.data.copies import RUN_LINES, NearCopies
from experiments.data.origins import Package, Repository
from experiments.design import strict

LISTS = Path(__file__).parent / "sources"
NOTE = "SOURCES.md"

ZSTD_LEVEL = 9  # 7 : 1 on Python at 90 MB a second; 19 gives 8 : 1 at 3 MB a second
# Compression restarts at each page, so a file is one page: half the bytes of parquet's usual pages of 1 MiB.
PAGE_BYTES = 2**29


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What a corpus is made of and which of its files are kept. A file of them is TOML with these keys."""

    suffixes: tuple[str, ...]
    omit: tuple[str, ...] = ()  # names of folders whose files are left out, such as copies of other projects
    smallest_bytes: int = 1
    largest_bytes: int = 200_000  # what is larger is mostly tables of data, or generated
    # Characters; longer ones mean data or generated code (Chen et al. 2021, arXiv 2107.03374, section 3.1).
    longest_line: int | None = None
    mean_line: int | None = None
    wheels: tuple[str, ...] = ()  # NAME==VERSION --hash=sha256:HEX
    repositories: tuple[Repository, ...] = ()
    documents_sha256: str | None = None  # of the corpus that must come out; None for a new list

    def __post_init__(self) -> None:
        if not self.wheels and not self.repositories:
            raise ValueError("the list must name wheels or repositories; got neither; add one")
        for requirement in self.wheels:
            origins.check_requirement(requirement)

    def reason_to_omit(self, path: str, raw: bytes) -> str | None:
        """Why a file is left out, by its path and content; None if it is kept."""
        if not set(path.split("/")[:-1]).isdisjoint(self.omit):
            return "in a folder left out"
        if len(raw) < self.smallest_bytes:
            return f"under {self.smallest_bytes:,} bytes"
        if len(raw) > self.largest_bytes:
            return f"over {self.largest_bytes:,} bytes"
        try:
            lines = raw.decode().splitlines()
        except UnicodeDecodeError:
            return "not UTF-8"
        lengths = [len(line) for line in lines]
        if self.longest_line and max(lengths, default=0) > self.longest_line:
            return f"a line over {self.longest_line:,} characters"
        if self.mean_line and sum(lengths) > self.mean_line * len(lengths):
            return f"lines over {self.mean_line} characters on average"
        return None


class Kept(NamedTuple):
    """What was kept of one package."""

    name: str
    version: str
    licence: str
    documents: int
    bytes: int


@dataclass
class _Corpus:
    """What was kept and left out so far."""

    kept: list[Kept] = field(default_factory=list)
    omitted: Counter[str] = field(default_factory=Counter)
    digests: set[bytes] = field(default_factory=set)
    near_copies: NearCopies = field(default_factory=NearCopies)

    def reason_to_omit(self, raw: bytes) -> str | None:
        """Why a document that the rules keep is left out beside those before it; None adds it to the corpus."""
        digest = hashlib.sha256(raw).digest()
        if digest in self.digests:
            return "a copy of another"
        if self.near_copies.add(raw):
            return f"a near copy: most runs of {RUN_LINES} lines in others"
        self.digests.add(digest)
        return None

    @property
    def sha256(self) -> str:
        """Identifies the documents, whatever their names and order."""
        return hashlib.sha256(b"".join(sorted(self.digests))).hexdigest()


def find_list(name: str) -> Path:
    """The file of a list by its name, such as "python", or by its path. Raises ValueError if there is none."""
    if "/" in name or name.endswith(".toml"):
        return Path(name).expanduser()
    strict.choose(name, sorted(path.stem for path in LISTS.glob("*.toml")), "data fetch: no such list")
    return LISTS / f"{name}.toml"


def fetch(name: str, target: Path) -> str:
    """Make the folder `target` with the text of a list and a note of whose it is; returns the note.

    The folder appears whole or not at all. Raises ValueError for a bad list or target, WorkFailed if the network fails
    or other documents come out than the list says.
    """
    path = find_list(name)
    sources = strict.load(path, Sources)
    if target.exists():
        raise ValueError(f"the target of a fetch must be a new folder; got {target}, which exists; give another name")
    working = target.with_name(f".{target.name}.partial")
    shutil.rmtree(working, ignore_errors=True)
    working.mkdir(parents=True)
    try:
        corpus = _Corpus()
        for package in _packages(sources):
            corpus.kept.append(last := _write(package, sources, corpus, working))
            print(f"{last.name} {last.version}: {last.documents:,} documents, {last.bytes:,} bytes", file=sys.stderr)
        if sources.documents_sha256 not in (None, corpus.sha256):
            raise ValueError(
                f"the documents of {path} must have SHA-256 {sources.documents_sha256}; got {corpus.sha256}; remove "
                "documents_sha256 if the list or its rules were meant to change"
            )
        note = _note(path.stem, corpus)
        (working / NOTE).write_text(note)
        working.replace(target)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return note


def _packages(sources: Sources) -> Iterator[Package]:
    if sources.wheels:
        yield from origins.wheels(sources.wheels)
    if sources.repositories:
        yield from origins.repositories(sources.repositories, sources.suffixes)


def _write(package: Package, sources: Sources, corpus: _Corpus, folder: Path) -> Kept:
    import pyarrow as pa  # 0.15 s that other verbs do not pay
    from pyarrow import parquet

    paths, texts = [], []
    for path, read in package.files:
        if not path.endswith(sources.suffixes):
            continue
        raw = read()
        if reason := sources.reason_to_omit(path, raw) or corpus.reason_to_omit(raw):
            corpus.omitted[reason] += 1
            continue
        paths.append(path)
        texts.append(raw)
    if texts:
        parquet.write_table(
            pa.table({"path": paths, "text": pa.array(texts, pa.binary()).cast(pa.string())}),
            folder / f"{package.name.replace('/', '-')}-{package.version}.parquet",
            compression="zstd",
            compression_level=ZSTD_LEVEL,
            use_dictionary=False,
            data_page_size=PAGE_BYTES,
        )
    return Kept(package.name, package.version, package.licence, len(texts), sum(map(len, texts)))


def _note(name: str, corpus: _Corpus) -> str:
    rows = [f"| {k.name} | {k.version} | {k.licence} | {k.documents:,} | {k.bytes:,} |" for k in corpus.kept]
    omitted = [f"- {count:,} {reason}" for reason, count in sorted(corpus.omitted.items())]
    return "\n".join(
        [
            f"# Corpus {name}",
            "",
            "Each text is under the licence of its project, which is named as the project names it.",
            "",
            f"- {sum(k.documents for k in corpus.kept):,} documents, {sum(k.bytes for k in corpus.kept):,} bytes",
            f"- SHA-256 of the documents' sorted SHA-256s: {corpus.sha256}",
            "",
            "Files left out:",
            "",
            *(omitted or ["- none"]),
            "",
            "| name | version | licence | documents | bytes |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
        ]
    )
