"""Writes one split: its tokens in shards of bounded size, and where its documents start."""

from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from experiments.data.dataset import documents_name, shard_name

SHARD_TOKENS = 2**27  # 256 MiB of uint16: large enough to stream, small enough to copy and check one by one
AT_A_TIME = 2**22  # tokens


class SplitWriter:
    """Takes buckets of tokens until `wanted` are written; the last document may be cut short."""

    def __init__(self, folder: Path, split: str, wanted: int, token_bytes: NDArray[np.uint16]) -> None:
        self.tokens = 0
        self.bytes = 0  # UTF-8 bytes that the tokens stand for
        self.documents = 0
        self._folder, self._split, self._wanted, self._token_bytes = folder, split, wanted, token_bytes
        self._shard: BinaryIO | None = None

    def __enter__(self) -> Self:
        self._starts = (self._folder / documents_name(self._split)).open("wb")
        return self

    @property
    def full(self) -> bool:
        return self.tokens == self._wanted

    def add(self, ids: NDArray[Any], starts: NDArray[np.uint64]) -> None:
        """Append tokens, already of the dataset's type, with documents that start at these of their positions."""
        ids = ids[: self._wanted - self.tokens]
        starts = starts[starts < len(ids)]
        self._starts.write((starts + np.uint64(self.tokens)).astype("<u8").tobytes())
        self.documents += len(starts)
        while len(ids):
            shard, offset = divmod(self.tokens, SHARD_TOKENS)
            if offset == 0:
                self._next_shard(shard)
            assert self._shard is not None
            part, ids = np.split(ids, [min(AT_A_TIME, SHARD_TOKENS - offset)])
            self._shard.write(part.tobytes())
            self.bytes += int(self._token_bytes[part].sum(dtype=np.int64))
            self.tokens += len(part)

    def _next_shard(self, number: int) -> None:
        if self._shard is not None:
            self._shard.close()
        self._shard = (self._folder / shard_name(self._split, number)).open("wb")

    def __exit__(self, *_: object) -> None:
        if self._shard is not None:
            self._shard.close()
        self._starts.close()
