"""Ids by tiktoken are those of the tokenizers library, or tiktoken is not used."""

import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import byte_fallback, granite_like, with_nfc
from texts import END_OF_TEXT, make_texts
from tokenizers import Tokenizer

from experiments.data import tokenizer as bpe
from experiments.data.fast import byte_alphabet, fast_encoder

pytest.importorskip("tiktoken")


@pytest.fixture(scope="module")
def trained() -> bpe.Coder:
    """On text in which many merges overlap."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcd", k=rng.randrange(2, 9))) for _ in range(300)]
    texts = [*make_texts(), *(" ".join(rng.choices(words, k=200)) for _ in range(50))]
    return bpe.load(bpe.train((text.encode() for text in texts), 700, END_OF_TEXT), 700, END_OF_TEXT)


ANY_TEXT = st.one_of(st.text(), st.text("abcd \n'"), st.text(" \t\n\r\x0b\u00a0\u2028ab1'sé数🙂<|>", max_size=200))


@settings(max_examples=400)
@given(ANY_TEXT)
def test_ids_are_the_same(trained: bpe.Coder, text: str) -> None:
    assert trained.fast is not None
    assert trained.fast(text).tolist() == trained.tokenizer.encode(text, add_special_tokens=False).ids


@settings(max_examples=200)
@given(ANY_TEXT)
def test_ids_are_the_same_with_a_pattern_of_its_own(text: str) -> None:
    made = granite_like()
    made.encode_special_tokens = True
    fast = fast_encoder(made)
    assert fast is not None
    assert fast(text).tolist() == made.encode(text, add_special_tokens=False).ids


@pytest.mark.slow
def test_every_character_is_split_alike(trained: bpe.Coder) -> None:
    """Beside a letter, a digit, a sign and a blank: the classes of characters are the same in both libraries.

    Of all planes but those without characters, and what is not assigned there, since the libraries' Unicode may differ.
    """
    assert trained.fast is not None
    planes = [*range(0xD800), *range(0xF900, 0x32400), *range(0xE0000, 0xE0200)]
    characters = [chr(c) for c in planes]
    for start in range(0, len(characters), 4096):
        text = "".join(f"a{c}1{c}. {c}\n" for c in characters[start : start + 4096])
        assert trained.fast(text).tolist() == trained.tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("letter", ["a", " ", "\n", "#", "é", "ab1 "])
def test_long_runs(trained: bpe.Coder, letter: str) -> None:
    text = letter * (bpe.PIECE_BYTES // len(letter.encode()))
    assert trained.fast is not None
    assert trained.fast(text).tolist() == trained.tokenizer.encode(text, add_special_tokens=False).ids


def ambiguous() -> Tokenizer:
    """A token that its own letters are not merged to: tiktoken would join "a" and "bc", which is no merge here."""
    content = json.loads(granite_like().to_str())
    content["model"]["vocab"] |= {"bc": 300, "ab": 301, "abc": 302}
    content["model"]["merges"] += [["b", "c"], ["a", "b"], ["ab", "c"]]
    return Tokenizer.from_str(json.dumps(content))


def edited(**changes: Any) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        content = json.loads(granite_like().to_str())
        content["model"] |= changes
        return Tokenizer.from_str(json.dumps(content))

    return make


@pytest.mark.parametrize(
    "make", [ambiguous, byte_fallback, with_nfc, edited(dropout=0.1), edited(end_of_word_suffix="</w>")]
)
def test_tokenizers_that_are_left_to_their_own_library(make: Callable[[], Tokenizer]) -> None:
    assert fast_encoder(make()) is None


def test_an_ambiguous_tokenizer_would_differ() -> None:
    """So the case above is one."""
    made = ambiguous()
    assert [made.id_to_token(i) for i in made.encode("abc").ids] == ["a", "bc"]


def test_a_difference_is_refused(trained: bpe.Coder) -> None:
    assert trained.fast is not None
    fast = trained.fast
    wrong = trained._replace(fast=lambda text: fast(text)[::-1])
    with pytest.raises(ValueError, match="tiktoken and tokenizers must give the same ids; got others from 'abc d"):
        list(bpe.encode(wrong, [b"abc def"]))


def test_byte_alphabet() -> None:
    assert sorted(byte_alphabet().values()) == list(range(256))
    assert byte_alphabet()["Ġ"] == ord(" ")
