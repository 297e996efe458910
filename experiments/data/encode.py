"""Buckets of documents -> buckets of tokens, each a file that is complete or not there, in as many processes as cores.

So a build that was killed goes on with the buckets that are missing.
"""

import functools
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.logs.files import write_atomically, write_json
from experiments.data import processes
from experiments.data import tokenizer as bpe
from experiments.data.dataset import TOKENIZER, file_sha256, token_type
from experiments.data.documents import Documents


class Job(NamedTuple):
    """What one process does at a time."""

    folder: Path  # the tokenizer lies here, and the tokens go here
    spill: Path  # the documents lie here
    split: str
    bucket: int
    wanted: int  # tokens; the rest of the bucket may be left out
    vocabulary: int
    end_of_text: str

    @property
    def path(self) -> Path:
        return self.folder / f"{self.split}-bucket-{self.bucket:03d}"


class Bucket(NamedTuple):
    """The tokens of a bucket."""

    ids: NDArray[Any]
    starts: NDArray[np.uint64]  # the position of each document's first token


def encode(jobs: list[Job], text_bytes: int, report: Callable[[int], object]) -> Iterator[Bucket]:
    """The buckets of tokens in order, from earlier processes where they are whole; stop asking when there are enough.

    `report` is told how many tokens were made. Raises ValueError if the tokenizer loses something, and WorkFailed if
    a process was killed.
    """
    if (workers := processes.count(len(jobs), text_bytes)) > 1:
        for job, _ in zip(jobs, processes.in_order(encode_one, jobs, workers), strict=True):
            bucket = _read(job)
            report(len(bucket.ids))
            yield bucket
        return
    still_wanted = jobs[0].wanted
    for job in jobs:
        encode_one(job._replace(wanted=still_wanted), report)
        bucket = _read(job)
        still_wanted -= len(bucket.ids)
        yield bucket


def encode_one(job: Job, report: Callable[[int], object] = lambda _: None) -> None:
    """Write the tokens of a bucket, unless an earlier process has."""
    if is_whole(job):
        return
    coder = _coder(job.folder / TOKENIZER, job.vocabulary, job.end_of_text)
    documents = Documents(job.spill)
    starts, tokens, starts_document = array("Q"), 0, True

    def write(path: Path) -> None:
        nonlocal tokens, starts_document
        with path.open("wb") as file:
            for encoded in bpe.encode(coder, documents.texts(job.split, job.bucket)):
                if starts_document:
                    starts.append(tokens)
                starts_document = encoded.ends_document
                ids = np.append(encoded.ids, coder.end_of_text) if encoded.ends_document else encoded.ids
                file.write(ids.astype(token_type(job.vocabulary)).tobytes())
                tokens += len(ids)
                report(len(ids))
                if tokens >= job.wanted:
                    break

    write_atomically(job.path.with_suffix(".ids"), write)
    write_atomically(job.path.with_suffix(".starts"), lambda path: path.write_bytes(starts.tobytes()))
    hashes = {suffix: file_sha256(job.path.with_suffix(suffix)) for suffix in (".ids", ".starts")}
    write_json(job.path.with_suffix(".json"), hashes)


def is_whole(job: Job) -> bool:
    try:
        noted = json.loads(job.path.with_suffix(".json").read_text())
        return all(file_sha256(job.path.with_suffix(suffix)) == noted[suffix] for suffix in (".ids", ".starts"))
    except (OSError, ValueError, LookupError):
        return False


def count(job: Job) -> int:
    """The tokens of a bucket, without reading them; none if it is not there."""
    if not job.path.with_suffix(".json").exists():  # which is written last
        return 0
    return job.path.with_suffix(".ids").stat().st_size // token_type(job.vocabulary).itemsize


def _read(job: Job) -> Bucket:
    """Memory-mapped: a bucket of the largest builds is several gigabytes."""
    ids: NDArray[Any] = np.zeros(0, token_type(job.vocabulary))
    if job.path.with_suffix(".ids").stat().st_size:
        ids = np.memmap(job.path.with_suffix(".ids"), token_type(job.vocabulary), "r")
    return Bucket(ids, np.fromfile(job.path.with_suffix(".starts"), np.uint64))


@functools.lru_cache(maxsize=1)
def _coder(path: Path, vocabulary: int, end_of_text: str) -> bpe.Coder:
    return bpe.load(path.read_bytes(), vocabulary, end_of_text)
