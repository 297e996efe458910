"""Builds a corpus at once, and again with a builder that is killed at random; both must be the same, byte for byte.

    nice -n 19 taskset -c 0 python tests/killed_build.py /var/tmp/killed --bytes 2_000_000_000

The corpus is made from the Python source of this machine, repeated with seeded edits. What is printed is JSON: seconds,
CPU seconds, memory and disk of the build, and of each of the others how long it lived and what it left.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from texts import CHEAP_SWEEP

ROOT = Path(__file__).resolve().parent.parent
FILE_BYTES = 2**27  # of the corpus
BYTES_A_TOKEN = 4  # wanted tokens are the corpus's bytes over this: below what it holds, above what a part holds


def make_corpus(folder: Path, size: int, seed: int = 0) -> None:
    """Write `size` bytes of text to .jsonl files: the Python files of this machine, and then again and again with
    their halves, cut at a random line, in the other order, so that no document is the same."""
    places = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
    paths = sorted({path for place in places for path in Path(place).rglob("*.py") if path.stat().st_size < 200_000})
    folder.mkdir(parents=True)
    texts, written = _edited(paths, random.Random(seed)), 0
    for number in itertools.count():
        with (folder / f"{number:04d}.jsonl").open("w") as file:
            while file.tell() < FILE_BYTES:
                if written >= size:
                    return
                text = next(texts)
                written += len(text.encode())
                file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")


def _edited(paths: list[Path], rng: random.Random) -> Iterator[str]:
    for copy in itertools.count():
        for path in paths:
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if copy and text:
                cut = text.find("\n", rng.randrange(len(text))) + 1
                text = f"# {copy} of {path.stem}\n{text[cut:]}{text[:cut]}"
            yield text


class Builder:
    """`dynconv data build` in a process of its own, whose folder in the cache is watched for its size."""

    def __init__(self, sweep: Path, cache: Path) -> None:
        command = [sys.executable, "-m", "experiments.cli.main", "data", "build", str(sweep)]
        environment = {**os.environ, "DYNCONV_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
        self.largest, self._cache, self._ended = 0, cache, threading.Event()
        self._started, self._before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        self._process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
        )
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.5):
            self.largest = max(self.largest, disk(self._cache))

    def end(self, after: float | None = None) -> dict[str, Any]:
        """Wait until it ends, or kill it after some seconds; returns what it took."""
        try:
            _, errors = self._process.communicate(timeout=after)
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGKILL)
            _, errors = self._process.communicate()
        self._ended.set()
        self._watcher.join()
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = now.ru_utime + now.ru_stime - self._before.ru_utime - self._before.ru_stime
        if self._process.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"the build failed: {errors.decode()[-2000:]}")
        return {
            "killed": self._process.returncode != 0,
            "seconds": round(time.monotonic() - self._started, 1),
            "cpu_seconds": round(used, 1),
            "largest_resident_mb": round(now.ru_maxrss / 1024),  # of all builders so far
            "largest_disk_mb": round(self.largest / 1e6),
        }


def disk(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):  # which passes over folders that are renamed or removed meanwhile
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(place, name).stat().st_size
    return total


def left_by(cache: Path) -> dict[str, int]:
    """What is whole of a build under way."""
    return {
        "parts_read": len(list(cache.glob(".*/spill/part-*/counts.json"))),
        "buckets_tokenized": len(list(cache.glob(".*/tokens-*/*.json"))) - len(list(cache.glob(".*/tokens-*/tok*"))),
    }


def content(cache: Path) -> dict[str, str]:
    """Name -> checksum, by the manifest, of every file of the only dataset in the cache, after comparing each."""
    from experiments.data.dataset import Dataset

    (path,) = [path for path in cache.iterdir() if path.is_dir()]  # nothing of the working folders is left
    data = Dataset.open(path)
    data.verify()
    return {name: entry["sha256"] for name, entry in data.manifest["files"].items()}


def show(folder: Path, size: int, *, vocabulary: int = 4096, kills: int = 5, seed: int = 0) -> dict[str, Any]:
    """Raises AssertionError if the two datasets differ."""
    source, sweep = folder / "corpus", folder / "sweep.toml"
    make_corpus(source, size, seed)
    settings = {
        "vocabulary": vocabulary,
        "train_tokens": size // BYTES_A_TOKEN,
        "validation_tokens": size // BYTES_A_TOKEN // 50,
    }
    text = CHEAP_SWEEP.format(source=source)
    for key, value in settings.items():
        text = re.sub(rf"^{key} = .*$", f"{key} = {value}", text, flags=re.MULTILINE)
    sweep.write_text(text)
    at_once = Builder(sweep, folder / "at-once").end()
    print(json.dumps({"at_once": at_once}), file=sys.stderr, flush=True)
    rng, interrupted = random.Random(seed), []
    while sum(attempt["killed"] for attempt in interrupted) < kills:
        attempt = Builder(sweep, folder / "killed").end(after=rng.uniform(0, 2 / kills) * at_once["seconds"])
        interrupted.append(attempt | left_by(folder / "killed"))
        print(json.dumps(interrupted[-1]), file=sys.stderr, flush=True)
        if not attempt["killed"]:
            break
    last = Builder(sweep, folder / "killed").end()
    same = content(folder / "at-once") == content(folder / "killed")
    assert same, "the two builds differ"
    return settings | {"bytes": size, "at_once": at_once, "interrupted": interrupted, "last": last, "same": same}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a new folder for all of it; some five times as large")
    parser.add_argument("--bytes", type=int, default=2_000_000_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    sys.path.insert(0, str(ROOT))
    chosen = parser.parse_args()
    print(json.dumps(show(chosen.folder, chosen.bytes, kills=chosen.kills, seed=chosen.seed), indent=1))
