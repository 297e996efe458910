"""The files of a corpus -> its documents on disk, in parts that as many processes as cores write.

So a build that was killed goes on with the parts that are missing.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from experiments.data import documents, processes
from experiments.data.corpus import CorpusFile
from experiments.data.documents import Documents
from experiments.data.formats import EXPANSION, read_documents
from experiments.design.data import SPLITS, DataConfig
from experiments.terminal import bar

PART_BYTES = 64 * 2**20  # of text: a second's work
MOST_PARTS = 128  # each has as many files as there are buckets


class Job(NamedTuple):
    """What one process does at a time."""

    folder: Path
    files: list[CorpusFile]
    spec: DataConfig
    buckets: int


def read_corpus(spill: Path, spec: DataConfig, files: list[CorpusFile]) -> tuple[Documents, dict[str, int]]:
    """The documents, and counts of what was read and left out; with the parts that an earlier process finished.

    Raises ValueError if there is no text, or none for one of the splits.
    """
    todo, text_bytes = jobs(spill, spec, files), sum(map(_text_bytes, files))
    for begun in spill.glob(".part-*"):  # by processes that were killed
        shutil.rmtree(begun, ignore_errors=True)
    counts = Counter(files=len(files), documents=0, bytes=0, empty=0, undecodable=0)
    with bar("reading the corpus", sum(file.bytes for file in files), "B") as done:
        if (workers := processes.count(len(todo), text_bytes)) > 1:
            for job, part in zip(todo, processes.in_order(read, todo, workers), strict=True):
                counts.update(part)
                done.update(sum(file.bytes for file in job.files))
        else:
            for job in todo:
                counts.update(read(job, done.update))
    found = documents.finish(spill, todo[0].buckets, held_out_by_name=spec.validation_source is not None)
    _refuse_too_little(found, counts, spec)
    return found, dict(counts)


def jobs(spill: Path, spec: DataConfig, files: list[CorpusFile]) -> list[Job]:
    """The work of reading a corpus, part by part."""
    text_bytes = sum(map(_text_bytes, files))
    buckets = documents.bucket_count(text_bytes)
    return [
        Job(spill / f"part-{number:03d}", part, spec, buckets)
        for number, part in enumerate(_parts(files, max(PART_BYTES, text_bytes // MOST_PARTS)))
    ]


def _text_bytes(file: CorpusFile) -> int:
    return file.bytes * EXPANSION.get(file.path.suffix, 1)


def _parts(files: list[CorpusFile], part_bytes: int) -> list[list[CorpusFile]]:
    """Neighbouring files, together of about so much text, or one that is larger."""
    parts: list[list[CorpusFile]] = [[]]
    size = 0
    for file in files:
        if size >= part_bytes:
            parts.append([])
            size = 0
        parts[-1].append(file)
        size += _text_bytes(file)
    return parts


def read(job: Job, report: Callable[[int], object] = lambda _: None) -> dict[str, int]:
    """Write the documents of a part, unless an earlier process has; returns its counts.

    The part appears whole, so that two processes may do the same: one that a lost node of a cluster still runs, say.
    """
    if counted := documents.finished_part(job.folder):
        return counted
    counts = Counter(documents=0, bytes=0, empty=0, undecodable=0)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    working = Path(tempfile.mkdtemp(prefix=f".{job.folder.name}-", dir=job.folder.parent))
    try:
        with documents.Part(working, job.buckets) as part:
            for file in job.files:
                for text in read_documents(file.path, job.spec):
                    if not text:
                        counts["undecodable" if text is None else "empty"] += 1
                        continue
                    part.add(text, file.split)
                    counts.update(documents=1, bytes=len(text))
                report(file.bytes)
        part.finish(counts)
        try:
            working.replace(job.folder)
        except OSError:  # there is one: another process's, or a torn one
            if documents.finished_part(job.folder) is None:
                shutil.rmtree(job.folder, ignore_errors=True)
                working.replace(job.folder)
    finally:
        shutil.rmtree(working, ignore_errors=True)
    return dict(counts)


def _refuse_too_little(found: Documents, counts: Counter[str], spec: DataConfig) -> None:
    if not counts["documents"]:
        raise ValueError(
            f"the corpus must hold text; got {counts['empty']} empty and {counts['undecodable']} undecodable "
            f'documents in {counts["files"]} files of "{spec.source}"; give UTF-8 text'
        )
    for split in SPLITS:
        if not found.text_bytes(split):
            raise ValueError(
                f"the corpus must hold documents for both splits; got {counts['documents']} documents in "
                f'{counts["files"]} files of "{spec.source}", none of them for {split}; split the text into more '
                "documents: one a .txt file, or one a row of .jsonl"
            )
