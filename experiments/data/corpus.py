"""The files of a corpus, and the documents in them.

A document is one file of Python or plain text, or one row of .jsonl or .parquet.
"""

import hashlib
import json
import os
import stat
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from analysis.errors import first_line
from experiments.design.data import DataConfig

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
ROWS_AT_A_TIME = 1024

# The standard library's text should be much the same on every machine, so these are left out: folders that Debian
# does not ship or packages separately (tests, the Tk programs, distutils, lib2to3), and files that each installation
# writes, with its own paths and flags.
OMITTED_FOLDERS = frozenset({
    "test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo", "distutils", "lib2to3",
    "site-packages", "dist-packages", "__pycache__",
})  # fmt: skip
OMITTED_PREFIXES = ("_sysconfigdata", "config-")


class CorpusFile(NamedTuple):
    path: Path
    name: str  # relative to the folder it was found under, so that a corpus may move
    bytes: int
    modified_ns: int


def find_files(spec: DataConfig) -> list[CorpusFile]:
    """Every file of the corpus, sorted by name; links to folders are not followed.

    Raises ValueError if there is none.
    """
    if spec.source == "python":
        suffixes: tuple[str, ...] = (".py",)
        roots = [Path(sysconfig.get_path("stdlib")).resolve()]
        files = list(_walk(roots[0], suffixes, OMITTED_FOLDERS, OMITTED_PREFIXES, file_links=False))
        if spec.site_packages:
            roots += sorted({Path(sysconfig.get_path(key)).resolve() for key in ("purelib", "platlib")})
            files += [file for root in roots[1:] for file in _walk(root, suffixes, file_links=False)]
    else:
        suffixes = TEXT_SUFFIXES
        roots = [Path(spec.source).expanduser()]
        if not roots[0].is_dir():
            raise ValueError(
                f'the corpus must be a folder; got "{spec.source}", which is '
                f"{'a file' if roots[0].exists() else 'not there'}; "
                'give the folder of the text, or source = "python" for the embedded corpus'
            )
        files = list(_walk(roots[0], suffixes))
    if not files:
        raise ValueError(
            f"the corpus must hold {' or '.join(suffixes)} files; got none under "
            f"{', '.join(map(str, roots))}; put text there or give another source"
        )
    return sorted(files, key=lambda file: (file.name, file.path))


def _walk(
    root: Path,
    suffixes: tuple[str, ...],
    omit: frozenset[str] = frozenset(),
    omit_prefixes: tuple[str, ...] = (),
    file_links: bool = True,
) -> Iterator[CorpusFile]:
    for folder, subfolders, names in os.walk(root, onerror=_refuse_folder):
        subfolders[:] = [n for n in subfolders if n not in omit and not n.startswith(omit_prefixes)]
        for path in (Path(folder, n) for n in names if n.endswith(suffixes)):
            if path.name.startswith(omit_prefixes) or (path.is_symlink() and not file_links):
                continue
            try:
                status = path.stat()
            except OSError as error:
                raise _unreadable(path, error) from error
            if stat.S_ISREG(status.st_mode):
                name = path.relative_to(root).as_posix()
                yield CorpusFile(path, name, status.st_size, status.st_mtime_ns)


def fingerprint(files: list[CorpusFile]) -> str:
    """Changes when a file is added, removed, renamed or written to; reads no file, so it is quick."""
    rows = [[file.name, file.bytes, file.modified_ns] for file in files]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def read_documents(file: CorpusFile, text_field: str) -> Iterator[bytes | None]:
    """The documents of one file as UTF-8, in order and with the empty ones; None for one that is not UTF-8."""
    reader = {".jsonl": _read_jsonl, ".parquet": _read_parquet}.get(file.path.suffix)
    try:
        if reader is None:
            yield _utf8_or_none(file.path.read_bytes())
        else:
            yield from reader(file.path, text_field)
    except OSError as error:
        raise _unreadable(file.path, error) from error


def _utf8_or_none(raw: bytes) -> bytes | None:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return None
    return raw


def _read_jsonl(path: Path, text_field: str) -> Iterator[bytes | None]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                yield None
                continue
            except (ValueError, RecursionError) as error:
                raise ValueError(
                    f"{path} line {number} must be a JSON object; got {error}; mend or remove the line"
                ) from error
            text = row.get(text_field) if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise ValueError(
                    f'{path} line {number} must be an object with text under "{text_field}"; '
                    f"got {line[:60]!r}; set text_field, or mend the line"
                )
            try:
                yield text.encode()
            except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no UTF-8 text holds
                yield None


def _read_parquet(path: Path, text_field: str) -> Iterator[bytes | None]:
    import pyarrow as pa  # 0.15 s that the embedded corpus does not pay
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            schema = table.schema_arrow
            kind = schema.field(text_field).type if text_field in schema.names else "no such column"
            if kind not in (pa.string(), pa.large_string()):
                raise ValueError(
                    f'{path} must have text in column "{text_field}"; got {kind}, '
                    f"columns {', '.join(schema.names)}; set text_field"
                )
            for batch in table.iter_batches(ROWS_AT_A_TIME, columns=[text_field]):
                for text in batch.column(0).cast(pa.large_binary()).to_pylist():
                    yield _utf8_or_none(text or b"")
    except pa.ArrowException as error:
        raise ValueError(f"{path} must be a readable parquet file; got {first_line(error)}; write it again") from error


def _refuse_folder(error: OSError) -> None:
    raise _unreadable(Path(error.filename), error)


def _unreadable(path: Path, error: OSError) -> ValueError:
    cause = error.strerror or error  # a system call's error, or the parquet library's
    return ValueError(f"the whole corpus must be readable; got {path}: {cause}; mend or remove it")
