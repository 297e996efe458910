"""Atomic writes: a file appears completely or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, sync it to disk and rename it; so `path` is never partial."""
    # Processes on two hosts, or in two containers, may have the same id.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Raise ValueError if no file or folder can be made at `path`, of which folders may be missing. Makes nothing."""
    try:
        places = (*(() if path.is_file() else (path,)), *path.absolute().parents)
        tempfile.TemporaryFile(dir=next(each for each in places if each.exists())).close()
    except OSError as error:
        raise ValueError(f"{path} cannot be written ({error.strerror}); name a place that you can write to") from None


def sync_folder(folder: Path) -> None:
    """Sync a directory after a rename in it, so that files survive a power cut in the order of their writing."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically. Raises ValueError for NaN, which JSON cannot represent."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def write_parquet(path: Path, table: pa.Table) -> None:
    """Write a table atomically, with a checksum of each page, so that `read_parquet` finds damage of the disk."""
    from pyarrow import parquet

    write_atomically(path, lambda temporary: parquet.write_table(table, temporary, write_page_checksum=True))


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """A table, its checksums compared where it has any. Raises OSError or pyarrow.ArrowException if it is damaged."""
    from pyarrow import parquet

    return parquet.read_table(path, columns=columns, page_checksum_verification=True)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or ValueError naming the file."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is unreadable ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value
