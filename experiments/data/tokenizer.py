"""Byte-level BPE: 256 bytes, one end-of-text token, and merges. Every UTF-8 text comes back exactly."""

import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Tokenizer

END_OF_TEXT = "<|endoftext|>"

SAMPLE_BYTES = 16 * 2**20  # merges are learnt from this much; more text changes them little and costs minutes
# The library needs some 100 bytes of memory a token while it encodes, so it gets BATCH_BYTES at a time, and long
# documents in pieces. The pieces of a batch are encoded in parallel.
PIECE_BYTES = 2**17
BATCH_BYTES = 2**20


class Piece(NamedTuple):
    text: bytes
    ends_document: bool


class Encoded(NamedTuple):
    ids: NDArray[np.int64]  # [tokens]; the end-of-text token is not among them
    ends_document: bool


def train(texts: Iterable[bytes], vocabulary: int) -> bytes:
    """A tokenizer.json with `vocabulary` - 257 merges learnt from the first SAMPLE_BYTES of `texts`.

    The same texts give the same bytes. Raises ValueError if the texts have fewer merges to learn.
    """
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    if tokenizer.get_vocab_size() < vocabulary:
        raise ValueError(
            f"the vocabulary must be one that the corpus can fill; got {vocabulary}, its text yields "
            f"{tokenizer.get_vocab_size()}; lower the vocabulary or add text"
        )
    return tokenizer.to_str(pretty=True).encode()


def _sample(texts: Iterable[bytes]) -> Iterator[str]:
    left = SAMPLE_BYTES
    for piece in pieces(texts):
        yield piece.text.decode()
        left -= len(piece.text)
        if left <= 0:
            return


def load(raw: bytes, vocabulary: int) -> Tokenizer:
    """Read a tokenizer.json.

    Raises ValueError unless it is byte-level, has END_OF_TEXT, and numbers its tokens 0..vocabulary-1.
    """
    try:
        tokenizer = Tokenizer.from_str(raw.decode())
        parts = json.loads(raw)
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise ValueError(f"must be a Hugging Face tokenizer.json; got {error}; give another file") from error
    # Otherwise a token would not stand for known bytes, or a text's tokens not for the whole text.
    for part, wanted in (("decoder", "ByteLevel"), ("normalizer", None)):
        got = parts[part]["type"] if parts.get(part) else None
        if got != wanted:
            raise ValueError(f"must have {part} {wanted}, so that bits per byte are exact; got {got}; give another")
    numbers = tokenizer.get_vocab()
    if sorted(numbers.values()) != list(range(vocabulary)):
        raise ValueError(
            f"must have the vocabulary of the specification, {vocabulary}; got {len(numbers)} tokens, "
            f"the last numbered {max(numbers.values(), default=-1)}; set vocabulary to match"
        )
    if END_OF_TEXT not in numbers:
        raise ValueError(f"must have the token {END_OF_TEXT}; got none; add it to the file")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a document is text, not an end
    return tokenizer


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.uint16]:  # [vocabulary]
    """The UTF-8 bytes that each token stands for; none for special tokens, which stand for no text."""
    added = tokenizer.get_added_tokens_decoder()
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.uint16)
    for token, number in tokenizer.get_vocab().items():
        if number not in added:
            lengths[number] = len(token)  # the byte-level alphabet spells each byte as one character
        elif not added[number].special:
            lengths[number] = len(token.encode())
    return lengths


def pieces(texts: Iterable[bytes]) -> Iterator[Piece]:
    """Cut each text after the last newline within PIECE_BYTES, else between two characters."""
    for text in texts:
        start = 0
        while len(text) - start > PIECE_BYTES:
            stop = text.rfind(b"\n", start, start + PIECE_BYTES) + 1
            if stop <= start:
                stop = start + PIECE_BYTES
                while text[stop] & 0xC0 == 0x80:  # inside a character: continuation bytes are 10xxxxxx
                    stop -= 1
            yield Piece(text[start:stop], ends_document=False)
            start = stop
        yield Piece(text[start:], ends_document=True)


def encode(tokenizer: Tokenizer, texts: Iterable[bytes], lengths: NDArray[np.uint16]) -> Iterator[Encoded]:
    """The ids of each piece of each text, in order. Raises ValueError if they do not stand for all of its bytes."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces(texts):
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_BYTES:
            yield from _encode_batch(tokenizer, batch, lengths)
            batch, size = [], 0
    yield from _encode_batch(tokenizer, batch, lengths)


def _encode_batch(tokenizer: Tokenizer, batch: list[Piece], lengths: NDArray[np.uint16]) -> Iterator[Encoded]:
    encodings = tokenizer.encode_batch_fast([piece.text.decode() for piece in batch], add_special_tokens=False)
    for piece, encoding in zip(batch, encodings, strict=True):
        ids = np.array(encoding.ids, dtype=np.int64)
        kept = int(lengths[ids].sum(dtype=np.int64))
        if kept != len(piece.text):
            raise ValueError(
                f"the tokenizer must keep every byte; got {kept} bytes of {len(piece.text)} "
                f"from {piece.text[:40]!r}; give one that adds and removes nothing"
            )
        yield Encoded(ids, piece.ends_document)
