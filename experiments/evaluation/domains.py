"""Loss on folders of text, each of which is a domain."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from experiments.data.corpus import describe, find_files
from experiments.data.formats import read_documents, suffix_of
from experiments.data.tokenizer import encode
from experiments.design.data import SMALLEST_VOCABULARY, DataConfig
from experiments.evaluation.load import TrainedRun
from experiments.evaluation.scoring import Request, score
from experiments.terminal import bar, warn

WINDOWS_AT_ONCE = 256


def find_domains(folder: Path) -> dict[str, Path]:
    """The folders in `folder` by name, or `folder` itself where it has none. Raises ValueError if it is no folder."""
    if not folder.is_dir():
        raise ValueError(f"--text must be a folder of text; got {folder}, which is none; name another")
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return {path.name: path for path in inside} or {folder.resolve().name: folder}


def beside_domains(folder: Path) -> list[str]:
    """The names of the files of text in `folder` that no domain holds: none where the folder itself is the domain."""
    if folder.resolve() in (path.resolve() for path in find_domains(folder).values()):
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_file() and suffix_of(path.name) is not None)


def passed_over(folder: Path) -> list[str]:
    """A line for each domain in `folder` that holds files which are not read, with their numbers by reason.

    Raises ValueError if a domain holds no text.
    """
    lines = []
    for domain in find_domains(folder).values():
        # The whole path: a folder that is called python is not the source "python". What is found depends on no more.
        spec = DataConfig(
            source=str(domain.resolve()), vocabulary=SMALLEST_VOCABULARY, train_tokens=2, validation_tokens=2
        )
        if not_read := find_files(spec).not_read:
            lines.append(f"{domain}: not read: {describe(not_read)}")
    return lines


def evaluate_domain(run: TrainedRun, folder: Path) -> Mapping[str, float]:
    """The mean loss in nats a token, bits per UTF-8 byte, and the numbers of both, over all documents of a folder.

    As in the held-out text of the training, the documents follow one another, each ended by the end-of-text token, and
    are cut into windows of the training's sequence length; unlike there, the text begins after an end of text. For a
    run on packed documents each is scored by itself, from its second token on. Documents that are not UTF-8 are left
    out, with a line on standard error.
    Raises ValueError if the folder holds no text.
    """
    loss, tokens, text_bytes = 0.0, 0, 0
    undecodable: Counter[Path] = Counter()
    lengths = run.coder.token_bytes
    windows: list[Request] = []
    with bar(f"scoring {folder.name}", None, " tokens") as progress:
        for window in _windows(run, folder, undecodable):
            windows.append(window)
            tokens += len(window.continuation)
            text_bytes += int(lengths[list(window.continuation)].sum())
            if len(windows) == WINDOWS_AT_ONCE:
                loss -= sum(each.log_probability for each in score(run, windows))
                progress.update(sum(len(each.continuation) for each in windows))
                windows.clear()
        loss -= sum(each.log_probability for each in score(run, windows))
    if undecodable:
        first, count = next(iter(undecodable)), undecodable.total()
        warn(f"{folder}: {count} document{'s' * (count > 1)} left out, not UTF-8; the first is in {first}")
    if not text_bytes:
        unscored = " after the first token of each document, where a run on packed documents scores none"
        raise ValueError(f"{folder} must hold text{unscored * run.config.packed}; got none; name another folder")
    return {
        "loss": loss / tokens,
        "bits_per_byte": loss / (math.log(2) * text_bytes),
        "tokens": float(tokens),
        "bytes": float(text_bytes),
    }


def _windows(run: TrainedRun, folder: Path, undecodable: Counter[Path]) -> Iterator[Request]:
    """The text as one token to begin with and up to T that follow it, T being the sequence length of the training.

    Documents that are not UTF-8 are counted by file in `undecodable`.
    """
    packed = run.config.packed
    end = run.end_of_text
    length = run.config.train.sequence_length
    assert run.data is not None, "load_run refuses runs that were not trained on text"
    # The whole path: a folder that is called python is not the source "python".
    spec = replace(
        run.data, source=str(folder.resolve()), site_packages=False, validation_source=None, pretokenized=None
    )

    def texts() -> Iterator[bytes]:
        for file in find_files(spec).files:
            for text in read_documents(file.path, spec):
                if text:
                    yield text
                elif text is None:
                    undecodable[file.path] += 1

    before, held = (None if packed else end), list[int]()
    for piece in encode(run.coder, texts()):
        held += piece.ids.tolist()
        if piece.ends_document:
            held.append(end)
        if before is None:
            before, *held = held
        while len(held) >= length or (packed and piece.ends_document and held):
            window, held = held[:length], held[length:]
            yield Request((before,), tuple(window))
            before = window[-1]
        if packed and piece.ends_document:
            before = None
    if held:
        assert before is not None
        yield Request((before,), tuple(held))
