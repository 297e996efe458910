"""Writes one split: its tokens in shards of bounded size, and where its documents start."""

from array import array
from pathlib import Path
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from experiments.data.dataset import documents_name, shard_name, token_type
from experiments.data.tokenizer import Encoded

SHARD_TOKENS = 2**27  # 256 MiB of uint16: large enough to stream, small enough to copy and check one by one


class SplitWriter:
    """Takes encoded documents until `wanted` tokens are written; the last document may be cut short."""

    def __init__(
        self,
        folder: Path,
        split: str,
        wanted: int,
        end_of_text: int,
        token_bytes: NDArray[np.uint16],  # [vocabulary]
    ) -> None:
        self.tokens = 0
        self.bytes = 0  # UTF-8 bytes that the tokens stand for
        self.starts = array("Q")  # the position of each document's first token
        self._folder, self._split, self._wanted = folder, split, wanted
        self._end_of_text, self._token_bytes = end_of_text, token_bytes
        self._type = token_type(len(token_bytes))
        self._shard: BinaryIO | None = None
        self._starts_document = True

    def __enter__(self) -> Self:
        return self

    @property
    def full(self) -> bool:
        return self.tokens == self._wanted

    def add(self, encoded: Encoded) -> None:
        if self._starts_document:
            self.starts.append(self.tokens)
        self._starts_document = encoded.ends_document
        ids = np.append(encoded.ids, self._end_of_text) if encoded.ends_document else encoded.ids
        ids = ids[: self._wanted - self.tokens]
        self.bytes += int(self._token_bytes[ids].sum(dtype=np.int64))
        while len(ids):
            shard, offset = divmod(self.tokens, SHARD_TOKENS)
            if offset == 0:
                self._next_shard(shard)
            assert self._shard is not None
            part, ids = np.split(ids, [SHARD_TOKENS - offset])
            self._shard.write(part.astype(self._type).tobytes())
            self.tokens += len(part)

    def _next_shard(self, number: int) -> None:
        if self._shard is not None:
            self._shard.close()
        self._shard = (self._folder / shard_name(self._split, number)).open("wb")

    def __exit__(self, *_: object) -> None:
        if self._shard is not None:
            self._shard.close()
        starts = np.frombuffer(self.starts, dtype=np.uint64).astype("<u8")
        (self._folder / documents_name(self._split)).write_bytes(starts.tobytes())
