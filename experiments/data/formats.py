"""The formats of a corpus: the documents in one file, as UTF-8.

A document is one file of plain text, or a part of it between separators, or one row of the other formats.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from analysis.errors import first_line
from experiments.design.data import DataConfig

if TYPE_CHECKING:
    import pyarrow as pa

Documents = Iterator[bytes | None]

ROWS_AT_A_TIME = 1024
CHUNK_BYTES = 2**20
COMPRESSED = (".gz", ".zst")  # of the formats that are text
EXPANSION = {".gz": 4, ".zst": 5, ".parquet": 5}  # about how many bytes of text a byte of such a file holds


def suffix_of(name: str) -> str | None:
    """The longest ending of a file's name that a reader knows, such as ".jsonl.gz"."""
    return max((suffix for suffix in READERS if name.endswith(suffix)), key=len, default=None)


def read_documents(path: Path, spec: DataConfig) -> Documents:
    """The documents of one file, in order and with the empty ones; None for one that is not UTF-8.

    Raises ValueError naming the file, and where there are lines the line, that cannot be read.
    """
    try:
        yield from READERS.get(suffix_of(path.name) or "", _read_text)(path, spec)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> ValueError:
    cause = getattr(error, "strerror", None) or error  # a system call's error, or a library's
    return ValueError(f"the whole corpus must be readable; got {path}: {cause}; mend or remove it")


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path))  # which reads and iterates as one
    if path.suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(path, compression="zstd"))
    return path.open("rb")


def _utf8_or_none(raw: bytes) -> bytes | None:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return None
    return raw


def _read_text(path: Path, spec: DataConfig) -> Documents:
    with _open(path) as file:
        if spec.separator is None:
            yield _utf8_or_none(file.read())
            return
        separator, rest = spec.separator.encode(), b""
        while chunk := file.read(CHUNK_BYTES):
            *parts, rest = (rest + chunk).split(separator)
            yield from (_utf8_or_none(part.strip(b"\r\n")) for part in parts)
        yield _utf8_or_none(rest.strip(b"\r\n"))


def _read_jsonl(path: Path, spec: DataConfig) -> Documents:
    with _open(path) as lines:
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
            yield _text_of(row, spec.text_field, f"{path} line {number}", line)


def _read_json(path: Path, spec: DataConfig) -> Documents:
    """Objects a line, as large corpora have it under this name, too; or an array of objects, or one, read whole."""
    if _starts_with_an_object(path):
        yield from _read_jsonl(path, spec)
        return
    with _open(path) as file:
        raw = file.read()
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path} must hold JSON; got {error}; mend or remove it") from error
    for number, row in enumerate(content if isinstance(content, list) else [content], start=1):
        yield _text_of(row, spec.text_field, f"{path} entry {number}", row)


def _starts_with_an_object(path: Path) -> bool:
    with _open(path) as file:
        try:
            return isinstance(json.loads(file.readline()), dict)
        except (ValueError, RecursionError):
            return False


def _text_of(row: Any, text_field: str, where: str, shown: Any) -> bytes | None:
    """The text of a JSON object; None if UTF-8 cannot hold it."""
    try:
        text = _render(_at(row, text_field))
    except (LookupError, TypeError):
        got = shown if isinstance(shown, bytes) else json.dumps(shown).encode()
        raise ValueError(
            f'{where} must be an object with text, or a list of messages with role and content, under "{text_field}"; '
            f"got {got[:60]!r}; set text_field, or mend it"
        ) from None
    try:
        return text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no UTF-8 text holds
        return None


def _at(row: Any, text_field: str) -> Any:
    """The value of a key, or, for a field like "a.b" that is no key, of key b in the object under a."""
    if not isinstance(row, dict):
        raise TypeError
    if text_field in row:
        return row[text_field]
    first, _, rest = text_field.partition(".")
    return _at(row[first], rest)


def _render(value: Any) -> str:
    """A text as it is; messages as "role: content" with a blank line between them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise TypeError
    messages = [(message["role"], message["content"]) for message in value]
    if not all(isinstance(part, str) for message in messages for part in message):
        raise TypeError
    return "\n\n".join(f"{role}: {content}" for role, content in messages)


def _read_parquet(path: Path, spec: DataConfig) -> Documents:
    import pyarrow as pa  # 0.15 s that the embedded corpus does not pay
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            column = _Column(table.schema_arrow, spec.text_field, path)
            for batch in table.iter_batches(ROWS_AT_A_TIME, columns=[column.name]):
                yield from column.texts(batch)
    except pa.ArrowException as error:
        raise ValueError(f"{path} must be a readable parquet file; got {first_line(error)}; write it again") from error


def _read_arrow(path: Path, spec: DataConfig) -> Documents:
    """Arrow's IPC format: a file, or a stream such as the Hugging Face library keeps."""
    import pyarrow as pa

    try:
        with pa.memory_map(str(path)) as source:
            if source.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(source)
                batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            else:
                source.seek(0)
                batches = reader = pa.ipc.open_stream(source)
            column = _Column(reader.schema, spec.text_field, path)
            for batch in batches:
                for start in range(0, len(batch), ROWS_AT_A_TIME):
                    yield from column.texts(batch.slice(start, ROWS_AT_A_TIME))
    except pa.ArrowException as error:
        raise ValueError(f"{path} must be a readable Arrow file; got {first_line(error)}; write it again") from error


class _Column:
    """The column of a table that `text_field` names, or a field of its structs: "a.b" is b in column a."""

    def __init__(self, schema: "pa.Schema", text_field: str, path: Path) -> None:
        import pyarrow as pa

        self.name, self._nested = text_field, list[str]()
        if text_field not in schema.names:
            self.name, *self._nested = text_field.split(".")
        kind: Any = schema.field(self.name).type if self.name in schema.names else "no such column"
        for name in self._nested:
            inside = kind.get_field_index(name) if isinstance(kind, pa.StructType) else -1
            kind = kind.field(inside).type if inside >= 0 else "no such column"
        value = kind.value_type if isinstance(kind, pa.DictionaryType) else kind
        self._messages = isinstance(kind, pa.ListType | pa.LargeListType) and isinstance(kind.value_type, pa.StructType)
        if value not in (pa.string(), pa.large_string(), pa.string_view()) and not self._messages:
            raise ValueError(
                f'{path} must have text, or lists of messages, in column "{text_field}"; got {kind}, '
                f"columns {', '.join(schema.names)}; set text_field"
            )
        self._path, self._text_field = path, text_field

    def texts(self, batch: "pa.RecordBatch") -> Documents:
        import pyarrow as pa
        from pyarrow import compute

        column = batch.column(self.name)
        if self._nested:
            column = compute.struct_field(column, self._nested)
        if self._messages:
            for value in column.to_pylist():
                where = f'{self._path} column "{self._text_field}"'
                yield _text_of({self._text_field: value or ""}, self._text_field, where, value)
            return
        for text in column.cast(pa.large_string()).cast(pa.large_binary()).to_pylist():
            yield _utf8_or_none(text or b"")


_TEXT_READERS: dict[str, Callable[[Path, DataConfig], Documents]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
}
READERS: dict[str, Callable[[Path, DataConfig], Documents]] = {
    **{kind + packed: reader for kind, reader in _TEXT_READERS.items() for packed in ("", *COMPRESSED)},
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
