"""Which files of a corpus are read where it holds far more than is wanted (`read_all = false`): enough, and no more.

Files are taken in the order of hashes of their names: that is a sample of the whole, unlike the first of a list by date
or by site, and the same wherever the files lie. How many are enough follows from their sizes and from the first.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from analysis.logs.files import write_atomically
from experiments.data import tokenizer as bpe
from experiments.data.corpus import CorpusFile, Found
from experiments.data.documents import VALIDATION_FRACTION
from experiments.data.formats import read_documents
from experiments.design.data import DataConfig

NOT_NEEDED = "files more than are needed"
MARGIN = 1.25  # files differ, and some documents are copies
SAMPLE_BYTES = 16 * 2**20  # of text are tokenized to measure bytes a token
MOST_BYTES_A_TOKEN = 6.0  # where the tokenizer is yet to be trained: more than 100,000 tokens get of English


def choose(spec: DataConfig, found: Found, tokenizer_json: bytes | None, cache: Path) -> Found:
    """The files that are likely to hold the tokens of the specification. Reads the first of them, unless it was read
    before and nobody wrote to it since."""
    wanted: dict[str | None, float]
    if spec.validation_source is None:
        wanted = {
            None: max(spec.train_tokens / (1 - VALIDATION_FRACTION), spec.validation_tokens / VALIDATION_FRACTION)
        }
    else:
        wanted = {"validation": spec.validation_tokens, "train": spec.train_tokens}
    chosen: list[CorpusFile] = []
    for split, tokens in wanted.items():
        files = [file for file in found.files if file.split == split]
        chosen += _prefix(spec, files, MARGIN * tokens, tokenizer_json, cache)
    chosen.sort(key=lambda file: (file.split == "train", file.name, file.path))  # as find_files has them
    left = len(found.files) - len(chosen)
    return Found(chosen, found.not_read | ({NOT_NEEDED: left} if left else {}))


def _prefix(
    spec: DataConfig, files: list[CorpusFile], tokens: float, tokenizer_json: bytes | None, cache: Path
) -> Iterator[CorpusFile]:
    in_order = sorted(files, key=lambda file: (hashlib.sha256(file.name.encode()).digest(), file.path))
    rate = 0.0
    for file in in_order:
        if tokens <= 0:
            return
        rate = rate or _tokens_a_byte(spec, file, tokenizer_json, cache)
        tokens -= rate * file.bytes
        yield file


def _tokens_a_byte(spec: DataConfig, file: CorpusFile, tokenizer_json: bytes | None, cache: Path) -> float:
    """Tokens for each byte that a file has on disk; 0 for a file without text."""
    key = json.dumps([str(file.path.resolve()), file.bytes, file.modified_ns, spec.text_field, spec.separator])
    digest = hashlib.sha256(key.encode() + (tokenizer_json or b"")).hexdigest()
    known = cache / f".{digest[:16]}.rate"
    if not known.exists():
        text_bytes, sample = 0, list[bytes]()
        for text in read_documents(file.path, spec):
            if text and text_bytes < SAMPLE_BYTES:
                sample.append(text)
            text_bytes += len(text or b"")
        bytes_a_token = MOST_BYTES_A_TOKEN
        if tokenizer_json is not None and sample:
            coder = bpe.load(tokenizer_json, spec.vocabulary, spec.end_of_text)
            made = sum(len(piece.ids) + piece.ends_document for piece in bpe.encode(coder, sample))
            bytes_a_token = sum(map(len, sample)) / made
        rate = text_bytes / bytes_a_token / max(1, file.bytes)
        write_atomically(known, lambda path: path.write_text(repr(rate)))
    return float(known.read_text())
