"""The documents of a corpus -> the files of a dataset. What is done is noted, so that killed builds resume there."""

import dataclasses
import hashlib
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from analysis.logs.files import write_atomically, write_json
from experiments.data import encode, hub, shards
from experiments.data import tokenizer as bpe
from experiments.data.copies import find_near_copies
from experiments.data.corpus import Found
from experiments.data.dataset import SCHEMA, TOKEN_BYTES, TOKENIZER, sync_and_hash
from experiments.data.documents import Documents
from experiments.data.enough import NOT_NEEDED
from experiments.data.reading import read_corpus
from experiments.design.data import SPLITS, DataConfig
from experiments.terminal import bar

# Held-out text is looked through for near copies up to this many bytes for each token that is wanted: far more than is
# read, even if much of it is left out.
CHECKED_BYTES = 64
PREPARED = "prepared.json"


class Prepared(NamedTuple):
    """What there is of a build before its text is tokenized."""

    documents: Documents
    corpus: dict[str, int]  # counts of what was read and left out
    tokens: Path  # the folder with the tokenizer, where the tokens go


def prepare(working: Path, spec: DataConfig, found: Found, tokenizer_json: bytes | None) -> Prepared:
    """Read the corpus, leave out near copies and train the tokenizer, as far as the specification asks for it and an
    earlier process has not done it."""
    documents, corpus = read_corpus(working / "spill", spec, found.files)
    try:
        noted = json.loads((working / PREPARED).read_text())
        return Prepared(documents, noted["corpus"], working / noted["tokens"])
    except (OSError, ValueError, LookupError):
        pass
    if spec.drop_near_copies:
        corpus["near_copies"] = _leave_out_near_copies(documents, spec)
    if tokenizer_json is None:
        with bar("training the tokenizer", None, "document", documents.distinct("train")) as texts:
            tokenizer_json = bpe.train(texts, spec.vocabulary, spec.end_of_text)
    # The tokens of an earlier process are of the same tokenizer: training on the same text gives the same one.
    tokens = working / f"tokens-{hashlib.sha256(tokenizer_json).hexdigest()[:16]}"
    tokens.mkdir(exist_ok=True)
    write_atomically(tokens / TOKENIZER, lambda path: path.write_bytes(tokenizer_json))
    write_json(working / PREPARED, {"corpus": corpus, "tokens": tokens.name})
    return Prepared(documents, corpus, tokens)


def jobs(prepared: Prepared, spec: DataConfig, split: str) -> list[encode.Job]:
    """The work of tokenizing a split, bucket by bucket."""
    wanted = spec.train_tokens if split == "train" else spec.validation_tokens
    return [
        encode.Job(prepared.tokens, prepared.documents.folder, split, bucket, wanted, spec.vocabulary, spec.end_of_text)
        for bucket in range(prepared.documents.buckets)
    ]


def write(folder: Path, prepared: Prepared, spec: DataConfig, found: Found) -> dict[str, Any]:
    """Write every file of the dataset but the manifest; returns the manifest's content."""
    tokenizer_json = (prepared.tokens / TOKENIZER).read_bytes()
    (folder / TOKENIZER).write_bytes(tokenizer_json)
    coder = bpe.load(tokenizer_json, spec.vocabulary, spec.end_of_text)
    (folder / TOKEN_BYTES).write_bytes(coder.token_bytes.astype("<u2").tobytes())
    splits = {split: _write_split(folder, prepared, split, spec, found, coder) for split in SPLITS}
    corpus = dict(prepared.corpus)
    if spec.validation_source is not None:
        corpus["held_out"] = prepared.documents.count_held_out()
    left_out = corpus.get("near_copies", 0) + corpus.get("held_out", 0)
    distinct = sum(counts["distinct"] for counts in splits.values())
    return {
        "schema": SCHEMA,
        "spec": dataclasses.asdict(spec),
        "python": platform.python_version() if spec.source == "python" else None,
        "shard_tokens": shards.SHARD_TOKENS,
        "corpus": corpus | {"duplicates": corpus["documents"] - distinct - left_out},
        "origins": hub.origins(spec),
        "not_read": found.not_read,
        "splits": splits,
        "files": {path.name: sync_and_hash(path) for path in sorted(folder.iterdir())},
    }


def _leave_out_near_copies(documents: Documents, spec: DataConfig) -> int:
    """Leave out what of the held-out text stands, for the most part, in training documents; returns how many."""

    def candidates() -> Iterator[bytes]:
        size = 0
        for text in documents.distinct("validation", all_held_out=True):  # an earlier process may have found some
            yield text
            size += len(text)
            if size > CHECKED_BYTES * spec.validation_tokens:
                return

    with bar("looking for near copies", None, "document", documents.distinct("train")) as texts:
        digests = find_near_copies(candidates(), texts)
    documents.leave_out(digests)
    return len(digests)


def _write_split(
    folder: Path, prepared: Prepared, split: str, spec: DataConfig, found: Found, coder: bpe.Coder
) -> dict[str, int]:
    """Write documents until the split has its tokens; returns counts, of which `distinct` includes the rest."""
    wanted = spec.train_tokens if split == "train" else spec.validation_tokens
    documents, writer = prepared.documents, shards.SplitWriter(folder, split, wanted, coder.token_bytes)
    with writer, bar(f"tokenizing {split}", wanted, "token") as done:
        todo = jobs(prepared, spec, split)
        for bucket in encode.encode(todo, documents.text_bytes(split), lambda n: done.update(min(n, wanted - done.n))):
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
            + (", or set read_all = true, as only some of its files were read" if NOT_NEEDED in found.not_read else "")
        )
    return {
        "tokens": writer.tokens,
        "bytes": writer.bytes,
        "documents": writer.documents,
        "distinct": distinct,
    }
