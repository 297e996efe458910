"""Which documents are near copies of earlier ones: vendored and edited text, which no hash of the whole finds.

Like shingles of words (Broder 1997, "On the resemblance and containment of documents"), but with runs of lines: quick
to count, and what is copied in source text and documentation is copied by lines.
"""

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

RUN_LINES = 5
SAMPLE = 4  # one run in so many is remembered, by its hash: 0.3 GB for a corpus of 0.5 GB
CONTAINED = 0.5  # a document with more of its runs than this in earlier ones is a near copy

# Odd multipliers of 64 bits, from the digits of pi after the point, make one hash of the hashes of a run's lines.
_MULTIPLIERS = np.array(
    [0x243F6A8885A308D3, 0x13198A2E03707345, 0xA4093822299F31D1, 0x082EFA98EC4E6C89, 0x452821E638D01377], np.uint64
)


class NearCopies:
    """The runs of lines of the documents added so far."""

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def add(self, text: bytes) -> bool:
        """Whether `text` is a near copy of what was added before; unless it is, add it."""
        runs = _runs(text)
        if runs and sum(run in self._seen for run in runs) > CONTAINED * len(runs):
            return True
        self._seen.update(runs)
        return False


def find_near_copies(held_out: Iterable[bytes], train: Iterable[bytes]) -> list[bytes]:
    """The hashes of held-out documents that stand for the most part in training documents; only the held-out text's
    runs are kept in memory."""
    runs_of = {hashlib.sha256(text).digest(): _runs(text) for text in held_out}
    held = {run for runs in runs_of.values() for run in runs}
    seen: set[int] = set()
    for text in train:
        seen.update(held.intersection(_runs(text)))
    return [
        digest for digest, runs in runs_of.items() if runs and sum(run in seen for run in runs) > CONTAINED * len(runs)
    ]


def _runs(text: bytes) -> list[int]:
    """Hashes of a sample of the runs of RUN_LINES lines, blank lines and indentation left out.

    The sample depends on the runs alone, so that equal runs are in it or out of it in every document.
    """
    lines = [line for line in map(bytes.strip, text.splitlines()) if line]
    if len(lines) < RUN_LINES:
        return []
    digests = b"".join(hashlib.blake2b(line, digest_size=8).digest() for line in lines)
    hashes: NDArray[np.uint64] = np.frombuffer(digests, "<u8").astype(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(hashes, RUN_LINES)
    runs = (windows * _MULTIPLIERS).sum(axis=1, dtype=np.uint64)  # modulo 2^64
    sampled = (runs >> np.uint64(32)) % np.uint64(SAMPLE) == 0
    return [int(run) for run in runs[sampled]]
