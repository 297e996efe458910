"""Builds datasets: corpus -> distinct documents -> splits -> tokenizer -> shards -> manifest.

They are kept in a cache, in folders named by a hash of what they are built from.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import platform
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from analysis.logs.files import write_atomically
from experiments.data import encode, pretokenized, shards
from experiments.data import tokenizer as bpe
from experiments.data.copies import find_near_copies
from experiments.data.corpus import CorpusFile, Found, describe, find_files, fingerprint
from experiments.data.dataset import MANIFEST, SCHEMA, TOKEN_BYTES, TOKENIZER, Dataset, file_sha256, sync_and_hash
from experiments.data.documents import Documents
from experiments.data.formats import suffix_of, unreadable
from experiments.data.reading import read_corpus
from experiments.design.data import SPLITS, DataConfig
from experiments.terminal import bar

# Held-out text is looked through for near copies up to this many bytes for each token that is wanted: far more than is
# read, even if much of it is left out.
CHECKED_BYTES = 64

ABANDONED_SECONDS = 7 * 24 * 3600


def build(spec: DataConfig, cache: Path, *, progress: bool = True) -> Path:
    """The folder in `cache` that holds the dataset of `spec`; it is built unless it is there already.

    Its name is a hash of the specification and the content of the corpus's files, wherever they lie and whatever their
    names: so copied, renamed or touched text is not built again. It appears whole or not at all, even if several
    processes build it at once or one is killed. Raises ValueError for a bad corpus, tokenizer or cache.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        target = (_build_text if spec.pretokenized is None else pretokenized.index)(spec, cache, progress)
    except OSError as error:
        raise ValueError(
            f"the data cache must be a folder that takes files; "
            f"got {error.filename or cache}: {error.strerror}; "
            "choose another with DYNCONV_CACHE or make room"
        ) from error
    Dataset.open(target)
    return target


def _build_text(spec: DataConfig, cache: Path, progress: bool) -> Path:
    found = find_files(spec)
    tokenizer_json = None if spec.tokenizer is None else bpe.read(spec)
    settings = dataclasses.asdict(spec) | {
        "source": spec.source == "python",
        "validation_source": None,
        "tokenizer": None,
    }
    del settings["pretokenized"]  # newer than the names of datasets that stand in caches
    key = [SCHEMA, settings, tokenizer_json and hashlib.sha256(tokenizer_json).hexdigest()]
    target = cache / _name(spec, [*key, _content_of(found.files, cache, progress)])
    if not target.exists():
        _remove_abandoned(cache)
        with _build_lock(target, progress) as left_over:
            if not target.exists():
                _build_and_publish(target, spec, found, tokenizer_json, progress, left_over)
    return target


def _name(spec: DataConfig, key: list[Any]) -> str:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return f"{'python' if spec.source == 'python' else 'text'}-{spec.vocabulary}-{digest[:16]}"


def _content_of(files: list[CorpusFile], cache: Path, progress: bool) -> str:
    """A hash of the content of all files, in any order. It is kept in the cache, under their places, sizes and times,
    so that files which nobody wrote to are not read again."""
    places = [str(file.path.resolve()) for file in files]
    known = cache / f".{hashlib.sha256(json.dumps([places, fingerprint(files)]).encode()).hexdigest()[:16]}.content"
    if not known.exists():
        digests = []
        with bar("hashing the corpus", sum(file.bytes for file in files), "B", progress) as done:
            for file in files:
                try:
                    digests.append(f"{file.split} {suffix_of(file.name)} {file_sha256(file.path)}")
                except OSError as error:
                    raise unreadable(file.path, error) from error
                done.update(file.bytes)
        content = hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
        write_atomically(known, lambda path: path.write_text(content))
    return known.read_text()


@contextlib.contextmanager
def _build_lock(target: Path, progress: bool) -> Iterator[Path | None]:
    """Wait for another process that builds `target`; gives the folder of a builder killed on this machine, if any.

    The lock only saves work. Correctness rests on unique working folders and an atomic rename, because some cluster
    file systems have no locks, or none between hosts.
    """
    with (target.parent / f".{target.name}.lock").open("wb") as lock:
        try:
            _wait_for(lock, target, progress)
        except OSError:
            yield None
            return
        left_over = sorted(target.parent.glob(f"{_working_prefix(target)}*"), key=lambda path: -path.stat().st_mtime)
        for older in left_over[1:]:
            shutil.rmtree(older, ignore_errors=True)
        yield next(iter(left_over), None)


def _remove_abandoned(cache: Path) -> None:
    """Delete what killed builders on this machine left long ago and nobody went on with."""
    for folder in cache.glob(f".*.{socket.gethostname()}.*/"):
        with contextlib.suppress(OSError):  # in use, or no locks here: it stays
            if time.time() - folder.stat().st_mtime < ABANDONED_SECONDS:
                continue
            name = folder.name.removeprefix(".").split(f".{socket.gethostname()}.")[0]
            with (cache / f".{name}.lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def _wait_for(lock: BinaryIO, target: Path, progress: bool) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if progress:
            print(f"{target}: another process builds it; waiting for that", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _working_prefix(target: Path) -> str:
    return f".{target.name}.{socket.gethostname()}."


def _build_and_publish(
    target: Path,
    spec: DataConfig,
    found: Found,
    tokenizer_json: bytes | None,
    progress: bool,
    left_over: Path | None,
) -> None:
    """Build in a folder of its own, which goes on where a killed builder left off, and rename it to `target`.

    The folder stays if this process is killed or interrupted, and goes if the build fails.
    """
    if found.not_read:
        print(f"{spec.source}: not read: {describe(found.not_read)}", file=sys.stderr)
    working = Path(tempfile.mkdtemp(prefix=_working_prefix(target), dir=target.parent))
    if left_over is not None:
        left_over.replace(working)  # another name, under which processes of the killed builder can write no more
    try:
        dataset = working / "dataset"
        shutil.rmtree(dataset, ignore_errors=True)
        dataset.mkdir()
        manifest = _write_dataset(dataset, working, spec, found, tokenizer_json, progress)
        if fingerprint(find_files(spec).files) != fingerprint(found.files):
            raise ValueError(
                f'the corpus must stay as it is while it is read; got changes under "{spec.source}"; '
                "build again when nothing writes to it"
            )
        (dataset / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        sync_and_hash(dataset / MANIFEST)
        try:
            dataset.replace(target)
        except OSError:  # a builder on another host was faster
            if not target.exists():
                raise
    except (ValueError, OSError):
        shutil.rmtree(working, ignore_errors=True)
        raise
    shutil.rmtree(working, ignore_errors=True)


def _write_dataset(
    folder: Path,
    working: Path,
    spec: DataConfig,
    found: Found,
    tokenizer_json: bytes | None,
    progress: bool,
) -> dict[str, Any]:
    """Write every file but the manifest; returns the manifest's content."""
    documents, corpus = read_corpus(working / "spill", spec, found.files, progress)
    if spec.drop_near_copies:
        corpus["near_copies"] = _leave_out_near_copies(documents, spec, progress)
    if tokenizer_json is None:
        with bar("training the tokenizer", None, "document", progress, documents.distinct("train")) as texts:
            tokenizer_json = bpe.train(texts, spec.vocabulary, spec.end_of_text)
    (folder / TOKENIZER).write_bytes(tokenizer_json)
    coder = bpe.load(tokenizer_json, spec.vocabulary, spec.end_of_text)
    (folder / TOKEN_BYTES).write_bytes(coder.token_bytes.astype("<u2").tobytes())
    # The tokens of an earlier process are of the same tokenizer: training on the same text gives the same one.
    tokens = working / f"tokens-{hashlib.sha256(tokenizer_json).hexdigest()[:16]}"
    tokens.mkdir(exist_ok=True)
    write_atomically(tokens / TOKENIZER, lambda path: path.write_bytes(tokenizer_json))
    splits = {split: _write_split(folder, tokens, split, spec, documents, coder, progress) for split in SPLITS}
    if spec.validation_source is not None:
        corpus["held_out"] = documents.count_held_out()
    left_out = corpus.get("near_copies", 0) + corpus.get("held_out", 0)
    distinct = sum(counts["distinct"] for counts in splits.values())
    return {
        "schema": SCHEMA,
        "spec": dataclasses.asdict(spec),
        "python": platform.python_version() if spec.source == "python" else None,
        "shard_tokens": shards.SHARD_TOKENS,
        "corpus": corpus | {"duplicates": corpus["documents"] - distinct - left_out},
        "not_read": found.not_read,
        "splits": splits,
        "files": {path.name: sync_and_hash(path) for path in sorted(folder.iterdir())},
    }


def _leave_out_near_copies(documents: Documents, spec: DataConfig, progress: bool) -> int:
    """Leave out what of the held-out text stands, for the most part, in training documents; returns how many."""

    def candidates() -> Iterator[bytes]:
        size = 0
        for text in documents.distinct("validation"):
            yield text
            size += len(text)
            if size > CHECKED_BYTES * spec.validation_tokens:
                return

    documents.leave_out([])  # an earlier process may have found some
    with bar("looking for near copies", None, "document", progress, documents.distinct("train")) as texts:
        digests = find_near_copies(candidates(), texts)
    documents.leave_out(digests)
    return len(digests)


def _write_split(
    folder: Path,
    tokens: Path,
    split: str,
    spec: DataConfig,
    documents: Documents,
    coder: bpe.Coder,
    progress: bool,
) -> dict[str, int]:
    """Write documents until the split has its tokens; returns counts, of which `distinct` includes the rest."""
    wanted = spec.train_tokens if split == "train" else spec.validation_tokens
    writer = shards.SplitWriter(folder, split, wanted, coder.token_bytes)
    jobs = [
        encode.Job(tokens, documents.folder, split, bucket, wanted, spec.vocabulary, spec.end_of_text)
        for bucket in range(documents.buckets)
    ]
    with writer, bar(f"tokenizing {split}", wanted, "token", progress) as done:
        for bucket in encode.encode(jobs, documents.text_bytes(split), lambda n: done.update(min(n, wanted - done.n))):
            writer.add(bucket.ids, bucket.starts)
            if writer.full:
                break
    distinct = documents.count(split)
    if not writer.full:
        raise ValueError(
            f"{split}_tokens must be at most what the corpus holds; got {wanted}, "
            f"the corpus has {writer.tokens} {split} tokens at vocabulary {spec.vocabulary} "
            f"in {distinct} documents; "
            f"lower {split}_tokens or add text"
            + (" (site_packages = true)" if spec.source == "python" and not spec.site_packages else "")
        )
    return {
        "tokens": writer.tokens,
        "bytes": writer.bytes,
        "documents": writer.documents,
        "distinct": distinct,
    }
