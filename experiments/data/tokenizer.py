"""Byte-level BPE, trained here: 256 bytes, one end-of-text token, and merges. Or any tokenizer.json that loses nothing.

Every text comes back from its tokens exactly, and each token stands for a known number of bytes: that is checked.
"""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import Tokenizer

from experiments.data.fast import FastEncoder, fast_encoder
from experiments.design.data import DataConfig

SAMPLE_BYTES = 16 * 2**20  # merges are learnt from this much; more text changes them little and costs minutes
# The library needs some 100 bytes of memory a token while it encodes, so it gets BATCH_BYTES at a time, and long
# documents in pieces. The pieces of a batch are encoded in parallel.
PIECE_BYTES = 2**17
BATCH_BYTES = 2**20
SAMPLE_CHARACTERS = 8192  # of each batch are encoded by both libraries, where tiktoken encodes the rest


class Piece(NamedTuple):
    text: bytes
    ends_document: bool


class Encoded(NamedTuple):
    ids: NDArray[np.int64]  # [tokens]; the end-of-text token is not among them
    ends_document: bool


BYTE_FALLBACK = re.compile("<0x[0-9A-F]{2}>")  # how tokenizers with byte fallback spell a byte


class Coder(NamedTuple):
    """A tokenizer that is ready to encode."""

    tokenizer: Tokenizer
    end_of_text: int
    token_bytes: NDArray[
        np.uint16
    ]  # [vocabulary]: UTF-8 bytes of each token; none for special tokens, which are no text
    exact: bool  # whether tokens with the right number of bytes are sure to be the right text
    fast: FastEncoder | None  # the same ids sooner, or None


def train(texts: Iterable[bytes], vocabulary: int, end_of_text: str) -> bytes:
    """A tokenizer.json with `vocabulary` - 257 merges learnt from the first SAMPLE_BYTES of `texts`.

    The same texts give the same bytes. Raises ValueError if the texts have fewer merges to learn.
    """
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[end_of_text],
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


def read(spec: DataConfig) -> bytes:
    """The tokenizer.json that a specification names. Raises ValueError if it is not fit for it."""
    path = Path(str(spec.tokenizer)).expanduser()
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"tokenizer must be a readable file; got {path}: {error.strerror}; mend the path or leave it out"
        ) from error
    try:
        load(raw, spec.vocabulary, spec.end_of_text)
    except ValueError as error:
        raise ValueError(f"tokenizer {path} {error}") from error
    return raw


def load(raw: bytes, vocabulary: int, end_of_text: str) -> Coder:
    """Read a tokenizer.json.

    Raises ValueError unless it has the token `end_of_text` and numbers its tokens below `vocabulary`.
    """
    try:
        tokenizer = Tokenizer.from_str(raw.decode())
        parts = json.loads(raw)
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        raise ValueError(f"must be a Hugging Face tokenizer.json; got {error}; give another file") from error
    numbers = tokenizer.get_vocab()
    if (largest := max(numbers.values(), default=-1)) >= vocabulary:
        raise ValueError(
            f"must have no more tokens than the vocabulary of the specification, {vocabulary}; got {len(numbers)} "
            f"tokens, the last numbered {largest}; set vocabulary to {largest + 1} or more"
        )
    if end_of_text not in numbers:
        special = sorted(str(t.content) for t in tokenizer.get_added_tokens_decoder().values() if t.special)
        raise ValueError(
            f"must have the token {end_of_text}; got none; set end_of_text to one of its special tokens "
            f"({', '.join(special[:20]) or 'it has none'}), or add it to the file"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "<|endoftext|>" in a document is text, not an end
    decoder = (parts.get("decoder") or {}).get("type")
    exact = decoder == "ByteLevel" and not parts.get("normalizer")
    fast = fast_encoder(tokenizer) if exact else None
    return Coder(tokenizer, numbers[end_of_text], _token_bytes(tokenizer, vocabulary, decoder), exact, fast)


def _token_bytes(tokenizer: Tokenizer, vocabulary: int, decoder: str | None) -> NDArray[np.uint16]:  # [vocabulary]
    added = tokenizer.get_added_tokens_decoder()
    lengths = np.zeros(vocabulary, dtype=np.uint16)
    for token, number in tokenizer.get_vocab().items():
        if number in added:
            lengths[number] = 0 if added[number].special else len(token.encode())
        elif decoder == "ByteLevel":
            lengths[number] = len(token)  # its alphabet spells each byte as one character
        elif BYTE_FALLBACK.fullmatch(token):
            lengths[number] = 1
        else:
            lengths[number] = len(tokenizer.decoder.decode([token]).encode()) if decoder else len(token.encode())
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


def encode(coder: Coder, texts: Iterable[bytes]) -> Iterator[Encoded]:
    """The ids of each piece of each text, in order. Raises ValueError if they do not stand for all of its bytes."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces(texts):
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH_BYTES:
            yield from _encode_batch(coder, batch)
            batch, size = [], 0
    yield from _encode_batch(coder, batch)


def _encode_batch(coder: Coder, batch: list[Piece]) -> Iterator[Encoded]:
    texts = [piece.text.decode() for piece in batch]
    for piece, text, ids in zip(batch, texts, _ids(coder, texts), strict=True):
        kept = int(coder.token_bytes[ids].sum(dtype=np.int64))
        if kept != len(piece.text):
            raise ValueError(
                f"the tokenizer must keep every byte; got {kept} bytes of {len(piece.text)} "
                f"from {piece.text[:40]!r}; give one that adds and removes nothing"
            )
        if not coder.exact and (back := coder.tokenizer.decode(ids.tolist(), skip_special_tokens=False)) != text:
            first = next((i for i, pair in enumerate(zip(text, back, strict=False)) if pair[0] != pair[1]), len(back))
            raise ValueError(
                f"the tokenizer must give back every character; got {back[first : first + 20]!r} for "
                f"{text[first : first + 20]!r}; give one whose normalizer changes nothing in this text"
            )
        yield Encoded(ids, piece.ends_document)


def _ids(coder: Coder, texts: list[str]) -> Iterator[NDArray[np.int64]]:
    if coder.fast is None:
        for encoding in coder.tokenizer.encode_batch_fast(texts, add_special_tokens=False):
            yield np.array(encoding.ids, dtype=np.int64)
        return
    for number, text in enumerate(texts):
        if number == 0:  # of each batch, that is of each MiB
            sample = text[:SAMPLE_CHARACTERS]
            if coder.fast(sample).tolist() != coder.tokenizer.encode(sample, add_special_tokens=False).ids:
                raise ValueError(
                    f"tiktoken and tokenizers must give the same ids; got others from {text[:40]!r}; report it, and "
                    "uninstall tiktoken until it is mended"
                )
        yield coder.fast(text)
