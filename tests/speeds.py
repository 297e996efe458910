"""CPU seconds of what users wait for, beside their bars: `python tests/speeds.py` prints the table, and exits 1 where a
bar is missed. Not among the tests: on a shared machine a clock fails now and then with nothing wrong."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from planted import ABOUT, write_config, write_run
from test_powerlaw import PUBLISHED, grid
from texts import END_OF_TEXT

from analysis.laws.intervals import bootstrap
from analysis.laws.powerlaw import fit
from analysis.logs.record import sealed
from analysis.logs.store import load
from analysis.logs.writer import RunLog
from experiments.data import tokenizer as bpe
from experiments.data.batches import Batches
from experiments.data.build import build
from experiments.data.dataset import Dataset
from experiments.design.data import DataConfig

Row = tuple[str, float, str, float, bool]  # what, figure, unit, bar, whether more is better


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this process, the least of three, as the machine may be shared."""
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def data(folder: Path) -> Iterator[Row]:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    spec = DataConfig(vocabulary=4096, train_tokens=2_000_000, validation_tokens=50_000)
    began = time.process_time()
    built = Dataset.open(build(spec, folder))
    yield "build 2M tokens of the embedded corpus", time.process_time() - began, "s", 15, False
    coder = bpe.load((built.path / "tokenizer.json").read_bytes(), 4096, END_OF_TEXT)
    texts = [path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))]
    slow = seconds(lambda: list(bpe.encode(coder._replace(fast=None), texts)))
    yield "encode, over tokenizers", slow / seconds(lambda: list(bpe.encode(coder, texts))), "times", 2.5, True
    batches = Batches(built, sequence_length=512, batch_sequences=64, seed=0)
    read = seconds(lambda: [batches.batch(step) for step in range(40)])
    yield "read batches", 40 * 64 * 512 / read / 1e6, "M tokens/s", 20, True


def log(folder: Path) -> Iterator[Row]:
    """Of 1,000 steps of 10 ms, and of the one flush that their 10 s bring."""
    first = RunLog(write_config(folder), attempt=1, first_step=1, about=ABOUT, flush_seconds=1e9)
    done = iter(range(3))

    def thousand_steps() -> None:
        start = 1000 * next(done)
        for step in range(start, start + 1000):
            first.step(step, step * 4096, 3.0, 1.0, 3e-4, 0.01)
        first.flush()

    yield "log 1,000 steps of 10 ms", seconds(thousand_steps) / 10 * 100, "% of them", 1, False


def store(folder: Path) -> Iterator[Row]:
    """A thousand runs of ten thousand steps, which share the files of one."""
    first = write_config(folder, seed=0)
    write_run(first, 3.0, steps=10_000)
    config, run = (json.loads((first / name).read_text()) for name in ("config.json", "run.json"))
    for seed in range(1, 1000):
        run_dir = folder / f"transformer-1M-{seed}"
        run_dir.mkdir()
        own = {"run_id": run_dir.name, "seed": seed}
        (run_dir / "config.json").write_text(json.dumps(config | own))
        (run_dir / "run.json").write_text(json.dumps(sealed(run | own)))
        for name in ("steps.parquet", "evals.parquet"):
            os.link(first / name, run_dir / name)
    yield "load 1,000 runs", seconds(lambda: load(folder)), "s", 2, False


def laws(_: Path) -> Iterator[Row]:
    points = grid(PUBLISHED, noise=0.01)
    law = fit(points, "nd")
    yield "fit a law of N and D", seconds(lambda: fit(points, "nd")), "s", 2, False
    yield "1,000 resamples of it", seconds(lambda: bootstrap(law, 1000)), "s", 5, False


if __name__ == "__main__":
    missed = False
    for part in (data, log, store, laws):
        with tempfile.TemporaryDirectory() as folder:
            for what, figure, unit, bar, more in part(Path(folder)):
                met = figure >= bar if more else figure <= bar
                missed |= not met
                limit = f"{'at least' if more else 'at most'} {bar:g}"
                print(f"{what:40} {figure:8.2f} {unit:12} {limit:14} {'' if met else 'MISSED'}", flush=True)
    sys.exit(missed)
