"""A build in steps that the jobs of a cluster share, in one folder on a file system that all of them see.

    read       parts of the corpus, side by side
    collect    what is in the corpus, the tokenizer, what is left out; ends the build if the dataset is there already
    tokenize   buckets of documents, side by side, until there are enough tokens
    publish    the shards and the manifest: the dataset

Every step leaves alone what is whole, so that each may be started again after a kill at any point, or twice at once.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import shutil
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from analysis.logs.files import read_json, write_json
from experiments.data import build, encode, hub, reading, writing
from experiments.data import tokenizer as bpe
from experiments.data.corpus import CorpusFile, Found, fingerprint
from experiments.design.data import SPLITS, DataConfig

STEPS = ("read", "collect", "tokenize", "publish")
RECORD = "build.json"
TARGET = "target.json"


class Shared(NamedTuple):
    """A build under way, by its folder in the cache; made by `begin`."""

    folder: Path

    @property
    def cache(self) -> Path:
        return self.folder.parent

    @property
    def target(self) -> Path | None:
        """Where the dataset will be, or is; None while that is not known."""
        path = self.folder / TARGET
        return self.cache / read_json(path)["name"] if path.exists() else None

    @property
    def done(self) -> bool:
        return self.target is not None and self.target.exists()

    def source(self) -> build.Source:
        record = read_json(self.folder / RECORD)
        files = [CorpusFile(Path(path), *rest) for path, *rest in record["files"]]
        spec = DataConfig(**record["spec"])
        tokenizer_json = None if spec.tokenizer is None else bpe.read(spec)
        return build.Source(spec, Found(files, record["not_read"]), tokenizer_json)

    def counts(self) -> dict[str, int]:
        """Step -> into how many pieces its work can be cut."""
        source = self.source()
        parts = reading.jobs(self.folder / "spill", source.spec, source.found.files)
        return {"read": len(parts), "collect": 1, "tokenize": len(SPLITS) * parts[0].buckets, "publish": 1}

    def progress(self) -> str:
        """In words, for people."""
        try:
            counts = self.counts()
        except (OSError, ValueError):  # the folder went meanwhile
            return "the dataset is published"
        parts = len(list(self.folder.glob("spill/part-*/counts.json")))
        buckets = len(list(self.folder.glob("tokens-*/*-bucket-*.json")))
        return f"{parts} of {counts['read']} parts read, {buckets} of up to {counts['tokenize']} buckets tokenized"


def begin(spec: DataConfig, cache: Path) -> Path | Shared:
    """The dataset, if it is known to be in the cache; else the build, which may be under way already.

    Raises ValueError for a bad corpus or tokenizer. The corpus itself is not read.
    """
    cache.mkdir(parents=True, exist_ok=True)
    source = _with_whole_places(spec, cache)
    known = build.known_target(source, cache)
    if known is not None and known.exists():
        return known
    shared = _of(source, cache)
    shared.folder.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "spec": dataclasses.asdict(source.spec),
        "files": _rows(source),
        "not_read": source.found.not_read,
    }
    write_json(shared.folder / RECORD, record)
    return shared


def under_way(spec: DataConfig, cache: Path) -> Shared | None:
    """The build of this dataset that was begun and has not ended."""
    if not any(cache.glob(".*.shared")):
        return None
    shared = _of(_with_whole_places(spec, cache), cache)
    return shared if (shared.folder / RECORD).exists() else None


def _with_whole_places(spec: DataConfig, cache: Path) -> build.Source:
    """Jobs may start in another folder, and without a network."""
    spec = hub.localise(spec, cache)
    places: dict[str, Any] = {
        name: str(Path(place).expanduser().absolute())
        for name in ("source", "validation_source", "tokenizer")
        if (place := getattr(spec, name)) not in (None, "python")
    }
    return build.look(dataclasses.replace(spec, **places), cache)


def _of(source: build.Source, cache: Path) -> Shared:
    key = [build.specification_key(source), _rows(source), fingerprint(source.found.files)]
    return Shared(cache / f".{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.shared")


def _rows(source: build.Source) -> list[list[Any]]:
    return [[str(file.path.absolute()), *file[1:]] for file in source.found.files]


def run(shared: Shared, step: str, worker: int, workers: int) -> None:
    """Do a worker's share of a step. Raises ValueError and OSError as `build` does."""
    source = shared.source()
    if step == "read":
        parts = reading.jobs(shared.folder / "spill", source.spec, source.found.files)
        for part in parts[worker::workers]:
            reading.read(part)
        return
    if step == "collect":
        name = build.target_of(source, shared.cache).name
        write_json(shared.folder / TARGET, {"name": name})
    if shared.done:
        return
    if step == "publish":
        assert shared.target is not None, "collect has noted it"
        build.make(shared.target, shared.folder, source)
        ended = shared.folder.with_suffix(".ended")  # another name, under which nobody writes any more
        shutil.rmtree(ended, ignore_errors=True)
        shared.folder.replace(ended)
        shutil.rmtree(ended, ignore_errors=True)
        return
    prepared = writing.prepare(shared.folder, source.spec, source.found, source.tokenizer_json)
    if step == "tokenize":
        for job in _share([writing.jobs(prepared, source.spec, split) for split in SPLITS], worker, workers):
            encode.encode_one(job)


def _share(splits: Iterable[Sequence[encode.Job]], worker: int, workers: int) -> Iterator[encode.Job]:
    """Every so many-th bucket, but for those that come after enough tokens."""
    numbered = itertools.count()
    for jobs in splits:
        for number, job in enumerate(jobs):
            mine = next(numbered) % workers == worker
            if mine and sum(map(encode.count, jobs[:number])) < job.wanted:
                yield job


def failure_of(folder: Path) -> Path:
    """The file that says why the last step that failed did."""
    return folder / "failure"


def main() -> None:
    """Do what Slurm's job is told to, and note why it fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("worker", type=int)
    parser.add_argument("workers", type=int)
    args = parser.parse_args()
    if not (args.folder / RECORD).exists():
        print(f"nothing to do: {args.folder} is not there, as the dataset is published, or this node does not see it")
        return
    try:
        run(Shared(args.folder), args.step, args.worker, args.workers)
    except Exception as error:
        if not (args.folder / RECORD).exists():
            return  # another job published the dataset meanwhile
        failure_of(args.folder).write_text(f"{args.step}: {error}")
        traceback.print_exc()
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
