"""The files of a corpus: which are read, and what else lies there."""

import hashlib
import json
import os
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from experiments.data.formats import READERS, suffix_of, unreadable
from experiments.design.data import DataConfig

# The standard library's text should be much the same on every machine, so these are left out: folders that Debian
# does not ship or packages separately (tests, the Tk programs, distutils, lib2to3), and files that each installation
# writes, with its own paths and flags.
OMITTED_FOLDERS = frozenset({
    "test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo", "distutils", "lib2to3",
    "site-packages", "dist-packages", "__pycache__",
})  # fmt: skip
OMITTED_PREFIXES = ("_sysconfigdata", "config-")

# What the Hugging Face library writes beside its Arrow files.
METADATA = frozenset({"dataset_dict.json", "dataset_info.json", "state.json"})


class CorpusFile(NamedTuple):
    path: Path
    name: str  # relative to the folder it was found under, so that a corpus may move
    bytes: int
    modified_ns: int
    split: str | None = None  # which split has all of its documents; None: their hashes decide


class Found(NamedTuple):
    files: list[CorpusFile]  # sorted by name; held-out text of its own comes first
    not_read: dict[str, int]  # what else lies in the folder: how many files of which kind


def find_files(spec: DataConfig) -> Found:
    """Every file of the corpus, and what is not read; links to folders are not followed.

    Raises ValueError if there is none.
    """
    if spec.validation_source is None:
        return _find(spec)
    train, held_out = _find(spec), _find(replace(spec, source=spec.validation_source, site_packages=False))
    files = [file._replace(split="validation") for file in held_out.files]
    files += [file._replace(split="train") for file in train.files]
    return Found(files, dict(sorted((Counter(train.not_read) + Counter(held_out.not_read)).items())))


def _find(spec: DataConfig) -> Found:
    not_read: Counter[str] = Counter()
    if spec.source == "python":
        wanted = [".py"]
        roots = [Path(sysconfig.get_path("stdlib")).resolve()]
        files = list(_walk_python(roots[0], OMITTED_FOLDERS, OMITTED_PREFIXES, file_links=False))
        if spec.site_packages:
            roots += sorted({Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib")})
            files += [file for root in roots[1:] for file in _walk_python(root, file_links=False)]
    else:
        wanted = sorted(READERS)
        roots = [Path(spec.source).expanduser()]
        files = list(_walk_text(roots[0], not_read) if roots[0].is_dir() else _single_file(roots[0], spec))
    if not files:
        raise ValueError(
            f"the corpus must hold {', '.join(wanted[:-1])}{' or ' * (len(wanted) > 1)}{wanted[-1]} files; got none "
            f"under {', '.join(map(str, roots))}{describe(not_read, ', but ')}; put text there or give another source"
        )
    return Found(sorted(files, key=lambda file: (file.name, file.path)), dict(sorted(not_read.items())))


def describe(not_read: Mapping[str, int], before: str = "") -> str:
    """Such as "3 .csv, 1 hidden", most first; nothing for nothing."""
    kinds = sorted(not_read.items(), key=lambda item: (-item[1], item[0]))
    return before + ", ".join(f"{count:,} {kind}" for kind, count in kinds) if kinds else ""


def _single_file(path: Path, spec: DataConfig) -> Iterator[CorpusFile]:
    suffix = suffix_of(path.name)
    if spec.source.startswith("hub:"):
        raise ValueError(f"{spec.source} must be downloaded from the hub; got no copy; `dynconv data build` does it")
    if not path.is_file() or suffix is None:
        raise ValueError(
            f'the corpus must be a folder, or one file of {", ".join(READERS)}; got "{spec.source}", which is '
            f"{'another file' if path.exists() else 'not there'}; "
            'give the folder of the text, or source = "python" for the embedded corpus'
        )
    if suffix.startswith(".txt") and spec.separator is None and spec.validation_source is None:
        raise ValueError(
            f'a corpus of one file of text must have a separator; got "{spec.source}", which would be one document; '
            'set what stands between its documents, such as separator = "<|endoftext|>"'
        )
    yield _corpus_file(path, path.parent)


def _walk_text(root: Path, not_read: Counter[str]) -> Iterator[CorpusFile]:
    for folder, subfolders, names in os.walk(root, onerror=_refuse_folder):
        hidden = [name for name in (*subfolders, *names) if _is_hidden(name)]
        not_read.update(["hidden or an editor's"] * len(hidden))
        subfolders[:] = [name for name in subfolders if name not in hidden]
        for name in names:
            if name in hidden:
                continue
            if name in METADATA:
                not_read["metadata"] += 1
            elif suffix_of(name) is None:
                not_read[Path(name).suffix or "without a suffix"] += 1
            elif stat.S_ISREG(_stat(Path(folder, name)).st_mode):
                yield _corpus_file(Path(folder, name), root)
            else:
                not_read["not regular files"] += 1


def _is_hidden(name: str) -> bool:
    """Hidden, or an editor's backup, lock or swap file."""
    return name.startswith((".", "#")) or name.endswith("~")


def _walk_python(
    root: Path,
    omit: frozenset[str] = frozenset(),
    omit_prefixes: tuple[str, ...] = (),
    *,
    file_links: bool,
) -> Iterator[CorpusFile]:
    for folder, subfolders, names in os.walk(root, onerror=_refuse_folder):
        subfolders[:] = [n for n in subfolders if n not in omit and not n.startswith(omit_prefixes)]
        for path in (Path(folder, n) for n in names if n.endswith(".py")):
            if path.name.startswith(omit_prefixes) or (path.is_symlink() and not file_links):
                continue
            if stat.S_ISREG(_stat(path).st_mode):
                yield _corpus_file(path, root)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise unreadable(path, error) from error


def _corpus_file(path: Path, root: Path) -> CorpusFile:
    status = _stat(path)
    return CorpusFile(path, path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns)


def fingerprint(files: list[CorpusFile]) -> str:
    """Changes when a file is added, removed, renamed or written to; reads no file, so it is quick."""
    rows = [[file.name, file.bytes, file.modified_ns, file.split] for file in files]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _refuse_folder(error: OSError) -> None:
    raise unreadable(Path(error.filename), error)
