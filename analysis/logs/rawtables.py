"""Reads the cells of a table, before columns are interpreted: CSV, TSV, JSON lines or Parquet, possibly compressed.

Cells of text files remain text here, since only the whole table shows which of them are numbers and which decimal mark
they use (numerals.py). A table whose rows do not match its header is refused with the row, never read shifted.
"""

from __future__ import annotations

import ast
import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.errors import first_line

if TYPE_CHECKING:
    import pandas as pd

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
TEXT_MISSING = frozenset(
    {"", "NA", "N/A", "NaN", "nan", "<NA>", "null", "NULL"}
)  # not "None", which may be the name of an arm
INDEX = "index"  # the name given to a column of row labels that has none


def read_raw(path: Path) -> pd.DataFrame:
    """The cells of a table, one row of the frame for each row of the table; messages count rows from 1.

    Text is stripped and missing cells are NA. Raises ValueError naming the file, and the row where there is one.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in OPENERS else None
    read = READERS.get(suffixes[-1]) if suffixes else None
    if read is None:
        raise ValueError(
            f"{path} is no table that is read here ({', '.join(READERS)}, each also {', '.join(OPENERS)}); "
            "give one of these, or a store's directory"
        )
    try:
        content = OPENERS[packing](path) if packing else path.read_bytes()
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is unreadable ({first_line(error)}); copy it again, or export it again") from None
    raw = read(path, content)
    if raw.empty:
        raise ValueError(f"{path} has no rows; give a table with a row for each run")
    return raw


def _unzstd(path: Path) -> bytes:
    import pyarrow as pa

    with pa.input_stream(str(path), compression="zstd") as stream:
        content: bytes = stream.read()
    return content


def _opener(module: Any) -> Callable[[Path], bytes]:
    def unpacked(path: Path) -> bytes:
        with module.open(path) as file:
            content: bytes = file.read()
        return content

    return unpacked


OPENERS: dict[str, Callable[[Path], bytes]] = {
    ".gz": _opener(gzip),
    ".bz2": _opener(bz2),
    ".xz": _opener(lzma),
    ".zst": _unzstd,
}


def _decoded(path: Path, content: bytes) -> str:
    """Decode text as UTF-8 or UTF-16. UTF-16 is recognised by its byte order mark, or by the zero bytes that Latin
    letters have in it."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    elif content[:2].count(0) == 1 and len(content) % 2 == 0:
        encoding = "utf-16-be" if content[0] == 0 else "utf-16-le"
    else:
        encoding = "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path} is unreadable: no {encoding.upper()} in line {line}; save it as UTF-8") from None
    if "\0" in text:
        raise ValueError(f"{path} is unreadable: it holds zero bytes, so it is no text; save it as UTF-8")
    return text


def _read_csv(path: Path, content: bytes) -> pd.DataFrame:
    text = _decoded(path, content)
    header = text.lstrip("\r\n").split("\n", 1)[0]
    present = [delimiter for delimiter in DELIMITERS if delimiter in header] or [","]
    if len(present) == 1:
        return _frame(path, *_lined_up(path, _rows(path, text, present[0])))
    fitting = {}
    for delimiter in present:
        try:
            names, rows = _lined_up(path, _rows(path, text, delimiter))
        except ValueError:
            continue
        if len(names) > 1:
            fitting[delimiter] = names, rows
    if len(fitting) != 1:
        signs = " and ".join(DELIMITERS[delimiter] for delimiter in fitting or present)
        how = "lines up" if fitting else "does not line up"
        raise ValueError(f"{path} {how} by {signs} alike; quote the cells and names that hold one of these signs")
    return _frame(path, *next(iter(fitting.values())))


def _read_tsv(path: Path, content: bytes) -> pd.DataFrame:
    return _frame(path, *_lined_up(path, _rows(path, _decoded(path, content), "\t")))


def _shown(text: str) -> str:
    """A cell as it is seen: composed letters, without spaces around them and without signs that take no place, such as
    zero-width spaces. Two spellings of a name that look the same would be two arms, or sizes without partners."""
    if not text.isascii() or not text.isprintable():
        text = unicodedata.normalize("NFC", text)
        text = "".join(sign for sign in text if sign.isspace() or unicodedata.category(sign) not in ("Cc", "Cf"))
    return text.strip()


def _rows(path: Path, text: str, delimiter: str) -> Iterator[list[str]]:
    """The rows with anything in them, their cells stripped."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        for row in reader:
            cells = [_shown(cell) for cell in row]
            if any(cells):
                yield cells
    except csv.Error as error:
        raise ValueError(f"{path} is unreadable: line {reader.line_num}: {error}; correct it") from None


def _lined_up(path: Path, rows: Iterator[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Names and rows of as many cells each; empty cells beyond the last name, as spreadsheets write them, are dropped.

    pandas would take the surplus of a longer row for an index and shift the others.
    """
    names = next(rows, [])
    if not names:
        raise ValueError(f"{path} is unreadable: it is empty; copy it again, or export it again")
    while names and not names[-1]:
        names.pop()
    kept = []
    for number, row in enumerate(rows, 1):
        extra = [cell for cell in row[len(names) :] if cell]
        if extra or len(row) < len(names):
            cause = "quote decimal commas, or use semicolons" if extra else "fill it up with empty cells"
            cause = cause if len(names) > 1 else "the first line must name the columns"
            shown = "; ".join(row[:12])
            raise ValueError(f"{path}: row {number} has {len(row)} cells for {len(names)} columns ({shown}); {cause}")
        kept.append(row[: len(names)])
    return names, kept


def _frame(path: Path, names: list[str], rows: list[list[str]]) -> pd.DataFrame:
    import pandas as pd

    columns: dict[str, list[Any]] = {}
    for place, name in enumerate(names):
        if not name and place:
            raise ValueError(f"{path}: column {place + 1} has no name; give it one, or remove it")
        label = name or INDEX
        cells = [None if row[place] in TEXT_MISSING else row[place] for row in rows]
        if label in columns and columns[label] != cells:
            raise ValueError(f"{path} has two columns {label!r} that differ; rename or remove one")
        columns[label] = cells
    nested = [label for label in ("config", "summary") if label in columns]  # mappings, by W&B's recipe for an export
    for label in nested:
        columns[label] = [_mapping(cell) for cell in columns[label]]
    frame = pd.DataFrame(columns, dtype=object)
    return _plain(frame) if nested else frame


def _mapping(cell: str | None) -> Any:
    """The mapping that a cell spells out as JSON or as a Python literal, else the cell."""
    if cell is None or not cell.startswith("{"):
        return cell
    for read in (json.loads, ast.literal_eval):  # neither runs anything
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(cell)
    return cell


def _read_json_lines(path: Path, content: bytes) -> pd.DataFrame:
    """One object a line; what is nested in it becomes columns such as config.seed."""
    import pandas as pd

    records = []
    for number, line in enumerate(_decoded(path, content).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line, object_pairs_hook=_without_repeats)
            if not isinstance(record, dict):
                raise ValueError(f"it holds a {type(record).__name__}, not an object")
        except ValueError as error:
            raise ValueError(f"{path} is unreadable: line {number}: {first_line(error)}; correct it") from None
        records.append(_flat(record))
    return _plain(pd.DataFrame.from_records(records).astype(object))


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} stands there twice")
    return found


def _flat(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name.strip(): value}
    return flat


def _read_parquet(path: Path, content: bytes) -> pd.DataFrame:
    """A Parquet table; the index that pandas keeps beside the columns is read as columns, too."""
    import pandas as pd
    import pyarrow as pa
    from pyarrow import parquet

    try:
        frame = parquet.read_table(pa.BufferReader(content)).to_pandas()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise ValueError(f"{path} is unreadable ({first_line(error)}); copy it again, or export it again") from None
    frame.columns = [str(name).strip() for name in frame.columns]
    repeated = frame.columns[frame.columns.duplicated()]
    if len(repeated):
        raise ValueError(f"{path} has two columns {repeated[0]!r}; rename or remove one")
    labels = {}
    if not (isinstance(frame.index, pd.RangeIndex) and frame.index.name is None):
        for place, name in enumerate(frame.index.names):
            label = INDEX if name is None else str(name).strip()
            labels[label] = frame.index.get_level_values(place)
            if label in frame and list(frame[label]) != list(labels[label]):
                raise ValueError(f"{path} has an index and a column {label!r} that differ; rename or remove one")
    frame = frame.reset_index(drop=True).assign(**{name: list(cells) for name, cells in labels.items()})
    return _plain(frame)


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """Nested columns as columns such as config.seed, and text without the spaces around it."""
    import pandas as pd

    for name in [name for name in frame if frame[name].dtype == object]:
        cells = list(frame[name])
        if any(isinstance(cell, dict) for cell in cells):
            flat = pd.DataFrame.from_records(
                [_flat(cell, f"{name}.") if isinstance(cell, dict) else {} for cell in cells]
            )
            flat = flat.drop(columns=[column for column in flat if column in frame])
            frame = pd.concat([frame.drop(columns=name), flat], axis=1)
    texts = [name for name in frame if not pd.api.types.is_numeric_dtype(frame[name])]
    return frame.assign(**{name: [_cell(cell) for cell in frame[name].astype(object)] for name in texts}).astype(
        dict.fromkeys(texts, object)
    )


def _cell(value: Any) -> Any:
    """A cell of a typed file: text stripped, what is missing as None, lists as their JSON."""
    import pandas as pd

    if isinstance(value, str):
        text = _shown(value)
        return None if text in TEXT_MISSING else text
    if pd.api.types.is_list_like(value):
        return json.dumps(value.tolist() if hasattr(value, "tolist") else list(value), default=str)
    return None if pd.isna(value) else value


READERS: dict[str, Callable[[Path, bytes], pd.DataFrame]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json_lines,
    ".parquet": _read_parquet,
}
