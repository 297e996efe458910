"""What building a dataset will cost, before anything is read. Without numpy, so that `plan` starts at once."""

import importlib.util
import os
import shutil
from pathlib import Path

from experiments.data.corpus import find_files
from experiments.data.formats import EXPANSION
from experiments.design.data import DataConfig
from experiments.terminal import short, span

# Measured on results/measured/corpora, in a core-second: bytes of text read and written again, and tokens made, by any
# number of processes; and bytes that one process alone hashes or copies.
READ_BYTES = 100e6
# With tiktoken, of a vocabulary of 100,352 (3.0e6 of one of 4096), and without it, of one of 4096
TOKENS = {True: 2.5e6, False: 0.86e6}
MOST_JOBS = 128  # pieces into which documents.py and reading.py cut the work at most
ALONE_BYTES = 0.5e9
BYTES_A_TOKEN = 3.2  # of those corpora
ENGLISH_BYTES_A_TOKEN = 4.5  # usual for English at vocabularies of 100,000
WORTH_A_WORD = 60.0  # seconds


def forecast(spec: DataConfig, cache: Path, jobs: int | None = None) -> str | None:
    """A line on the time and disk that a build into `cache` would take, and whether there is room for it: on the cores
    of this machine, or by so many jobs of a cluster side by side, each of one core.

    Of text that is not there, ENGLISH_BYTES_A_TOKEN is assumed. None for a build of a minute that fits
    and is of as many bytes as tokens at least.
    """
    if spec.pretokenized is not None:  # nothing is built, and what is read once is read at once
        return None
    wanted = spec.train_tokens + spec.validation_tokens
    try:
        files, assumed = find_files(spec).files, ""
        stored = sum(file.bytes for file in files)
        text = sum(file.bytes * EXPANSION.get(file.path.suffix, 1) for file in files)
    except ValueError:  # `plan` notes what is missing, and `submit` refuses it
        stored = text = int(ENGLISH_BYTES_A_TOKEN * wanted)
        assumed = f" (not there yet; {ENGLISH_BYTES_A_TOKEN} bytes a token are assumed)"
    if not spec.read_all:
        text = min(text, int(1.3 * BYTES_A_TOKEN * wanted))  # with the margin and the held-out share of enough.py
    width = 2 if spec.vocabulary <= 2**16 else 4
    cores = min(jobs, MOST_JOBS) if jobs else len(os.sched_getaffinity(0))
    fast = importlib.util.find_spec("tiktoken") is not None
    shared = text / READ_BYTES + wanted / TOKENS[fast]
    alone = (min(text, stored) + 2 * width * wanted) / ALONE_BYTES
    seconds = shared / cores + alone
    disk = text + 2 * width * wanted
    free = _free(cache)
    if seconds < WORTH_A_WORD and disk < free and text >= wanted:  # a token has a byte at least
        return None
    room = "" if disk < free else f"; {cache} has {_gigabytes(free)} free: choose another place with DYNCONV_CACHE"
    enough = "" if text > 0.8 * wanted * BYTES_A_TOKEN else "; that may be too little text"
    by = f"by {cores} jobs" if jobs else f"on {cores} cores"
    return (
        f"building the data, unless it is done: {short(wanted)} tokens of {_gigabytes(text)} of text{assumed}, about "
        f"{span(seconds / 3600)} {by} ({span((shared + alone) / 3600)} on one), "
        f"{_gigabytes(disk)} of disk meanwhile and {_gigabytes(width * wanted)} then{room}{enough}"
    )


def _free(cache: Path) -> int:
    """Free bytes where a folder is, or would be."""
    there = next(folder for folder in (cache.absolute(), *cache.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.0f} GB" if size >= 10e9 else f"{size / 1e9:.2g} GB"
