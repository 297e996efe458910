"""Builds datasets: corpus -> distinct documents -> splits -> tokenizer -> shards -> manifest.

They are kept in a cache, in folders named by a hash of what they are built from.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from analysis.logs.files import write_atomically
from experiments.data import enough, hub, pretokenized, writing
from experiments.data import tokenizer as bpe
from experiments.data.corpus import CorpusFile, Found, describe, find_files, fingerprint
from experiments.data.dataset import MANIFEST, SCHEMA, Dataset, file_sha256, sync_and_hash
from experiments.data.formats import suffix_of, unreadable
from experiments.design.data import DataConfig
from experiments.terminal import bar

ABANDONED_SECONDS = 7 * 24 * 3600
DATASET = "dataset"


def build(spec: DataConfig, cache: Path) -> Path:
    """The folder in `cache` that holds the dataset of `spec`; it is built unless it is there already.

    Its name is a hash of the specification and the content of the corpus's files, wherever they lie and whatever their
    names: so copied, renamed or touched text is not built again. It appears whole or not at all, even if several
    processes build it at once or one is killed. Raises ValueError for a bad corpus, tokenizer or cache.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
        spec = hub.localise(spec, cache)
        target = (_build_text if spec.pretokenized is None else pretokenized.index)(spec, cache)
    except OSError as error:
        raise ValueError(
            f"the data cache must be a folder that takes files; "
            f"got {error.filename or cache}: {error.strerror}; "
            "choose another with DYNCONV_CACHE or make room"
        ) from error
    Dataset.open(target)
    return target


class Source(NamedTuple):
    """What a dataset of text is built from."""

    spec: DataConfig
    found: Found
    tokenizer_json: bytes | None


def look(spec: DataConfig, cache: Path) -> Source:
    """The files of the corpus that will be read, and the tokenizer. Raises ValueError if they are missing."""
    found, tokenizer_json = find_files(spec), None if spec.tokenizer is None else bpe.read(spec)
    if not spec.read_all:
        found = enough.choose(spec, found, tokenizer_json, cache)
    return Source(spec, found, tokenizer_json)


def target_of(source: Source, cache: Path) -> Path:
    """The folder of the dataset in the cache, whether it is there or not. Reads the corpus, if it is new."""
    _hash_files(source.found.files, cache)
    known = known_target(source, cache)
    assert known is not None, "the files' hash has just been noted"
    return known


def known_target(source: Source, cache: Path) -> Path | None:
    """`target_of`, if the corpus was read before and nobody wrote to it since; else None."""
    content = _hash_of(source.found.files, cache)
    if not content.exists():
        return None
    key = [*specification_key(source), content.read_text()]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    kind = "python" if source.spec.source == "python" else "text"
    return cache / f"{kind}-{source.spec.vocabulary}-{digest[:16]}"


def specification_key(source: Source) -> list[Any]:
    """What of the specification decides the dataset: its settings and tokenizer, and no places."""
    settings = dataclasses.asdict(source.spec) | {
        "source": source.spec.source == "python",
        "validation_source": None,
        "tokenizer": None,
    }
    del settings["pretokenized"]  # newer than the names of datasets that stand in caches, as is this:
    if settings["read_all"]:
        del settings["read_all"]
    raw = source.tokenizer_json
    return [SCHEMA, settings, raw and hashlib.sha256(raw).hexdigest()]


def _build_text(spec: DataConfig, cache: Path) -> Path:
    source = look(spec, cache)
    target = target_of(source, cache)
    if not target.exists():
        _remove_abandoned(cache)
        with _build_lock(target) as left_over:
            if not target.exists():
                _build_in_a_folder_of_its_own(target, source, left_over)
    return target


def _hash_of(files: list[CorpusFile], cache: Path) -> Path:
    """Where the hash of the files' content is kept, once they have been read: under their places, sizes and times."""
    places = [str(file.path.resolve()) for file in files]
    return cache / f".{hashlib.sha256(json.dumps([places, fingerprint(files)]).encode()).hexdigest()[:16]}.content"


def _hash_files(files: list[CorpusFile], cache: Path) -> None:
    """Keep a hash of the content of all files, in any order, unless it is there."""
    known = _hash_of(files, cache)
    if known.exists():
        return
    digests = []
    with bar("hashing the corpus", sum(file.bytes for file in files), "B") as done:
        for file in files:
            try:
                digests.append(f"{file.split} {suffix_of(file.name)} {file_sha256(file.path)}")
            except OSError as error:
                raise unreadable(file.path, error) from error
            done.update(file.bytes)
    content = hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
    write_atomically(known, lambda path: path.write_text(content))


@contextlib.contextmanager
def _build_lock(target: Path) -> Iterator[Path | None]:
    """Wait for another process that builds `target`; gives the folder of a builder killed on this machine, if any.

    The lock only saves work. Correctness rests on unique working folders and an atomic rename, because some cluster
    file systems have no locks, or none between hosts.
    """
    with (target.parent / f".{target.name}.lock").open("wb") as lock:
        try:
            _wait_for(lock, target)
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


def _wait_for(lock: BinaryIO, target: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{target}: another process builds it; waiting for that", file=sys.stderr)
        fcntl.flock(lock, fcntl.LOCK_EX)


def _working_prefix(target: Path) -> str:
    return f".{target.name}.{socket.gethostname()}."


def _build_in_a_folder_of_its_own(target: Path, source: Source, left_over: Path | None) -> None:
    """Build where nobody else does, and go on where a killed builder left off.

    The folder stays if this process is killed or interrupted, and goes if the build fails.
    """
    working = Path(tempfile.mkdtemp(prefix=_working_prefix(target), dir=target.parent))
    if left_over is not None:
        left_over.replace(working)  # another name, under which processes of the killed builder can write no more
    try:
        make(target, working, source)
    except (ValueError, OSError):
        shutil.rmtree(working, ignore_errors=True)
        raise
    shutil.rmtree(working, ignore_errors=True)


def make(target: Path, working: Path, source: Source) -> None:
    """Build in `working`, with what is there already, and rename the dataset to `target`."""
    spec, found, tokenizer_json = source
    if found.not_read:
        print(f"{spec.source}: not read: {describe(found.not_read)}", file=sys.stderr)
    for begun in working.glob(f"{DATASET}-*"):
        shutil.rmtree(begun, ignore_errors=True)
    # Of this process alone: Slurm may start a job again while a lost node still runs it.
    dataset = working / f"{DATASET}-{socket.gethostname()}-{os.getpid()}"
    dataset.mkdir()
    prepared = writing.prepare(working, spec, found, tokenizer_json)
    manifest = writing.write(dataset, prepared, spec, found)
    now = [file for file in find_files(spec).files if spec.read_all or file[:2] in {each[:2] for each in found.files}]
    if fingerprint(now) != fingerprint(found.files):
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
