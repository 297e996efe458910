"""Read TOML files into frozen dataclasses. An unknown key or a wrong type is a ValueError that says how to correct it.

A field that may hold one of several classes is annotated with them, `Annotated[Base, (First, Second)]`, or with a
function that imports and returns them. Its table in the file chooses a class by the key `kind`, which must equal the
class's attribute `kind`.
"""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def load(path: Path, cls: type[T]) -> T:
    """Read a TOML file as `cls`. Raises ValueError with the file, the key, the legal values and the nearest of them."""
    return parse(read_toml(path), cls, str(path))


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises ValueError if the file is missing, cannot be read or is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except IsADirectoryError:
        raise ValueError(f"{path}: a folder; give the path of a .toml file in it") from None
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path}: no such file; give the path of a .toml file") from None
    except OSError as error:
        raise ValueError(f"{path}: must be readable; got {error.strerror}; give the path of a .toml file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None


def parse(table: Mapping[str, Any], cls: type[T], where: str, separator: str = ": ") -> T:
    """Convert `table` to an instance of the dataclass `cls`.

    Raises ValueError. Every message begins with `where`, such as the name of the file, and `separator`, which is "." if
    `where` ends with the key of a table.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]  # a dataclass
    hints = typing.get_type_hints(cls, include_extras=True)
    for key in table:
        if key not in fields:
            raise ValueError(
                f"{where}: unknown key {key!r}; {legal(key, fields) if fields else 'no keys are legal here'}"
            )
    missing = [
        name
        for name, field in fields.items()
        if name not in table and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: missing key {', '.join(map(repr, missing))}; add it")
    values = {key: _convert(value, hints[key], f"{where}{separator}{key}") for key, value in table.items()}
    try:
        return cls(**values)
    except ValueError as error:  # raised by `__post_init__` of the dataclass, which does not know the file's name
        raise ValueError(f"{where}: {error}") from None


def choose(value: str, options: Iterable[str], where: str) -> str:
    """`value` if it is one of `options`. Raises ValueError with the legal values and the nearest match otherwise."""
    options = list(options)
    if value not in options:
        raise ValueError(f"{where}: got {value!r}; {legal(value, options)}")
    return value


def legal(value: str, options: Iterable[str]) -> str:
    """A hint at what to write instead of `value`: the nearest option, and all options if they are at most 30."""
    options = list(dict.fromkeys(options))
    near = difflib.get_close_matches(value, options, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}legal: {', '.join(options)}" if len(options) <= 30 else f"{hint}{len(options)} values are legal"


def _convert(value: Any, hint: Any, where: str) -> Any:
    """`value` as the type `hint`. Raises ValueError, beginning with `where`, if it is of another type."""
    if isinstance(value, int) and abs(value) > 2**63:  # tomllib reads integers of any length; floats would overflow.
        raise ValueError(f"{where}: whole numbers must fit in 64 bits; got one of {len(str(abs(value)))} digits")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        classes = hint.__metadata__[0]
        if callable(classes):
            classes = classes()
        return _parse_kind(_expect(value, dict, where), {cls.kind: cls for cls in classes}, where)
    if origin is typing.Literal:
        return choose(_expect(value, str, where), arguments, where)
    if origin in (types.UnionType, typing.Union):  # X | None, or an array | a table. TOML has no null, but JSON has.
        choices = [argument for argument in arguments if argument is not type(None)]
        tables = [choice for choice in choices if typing.get_origin(choice) in (dict, Mapping)]
        (inner,) = choices if len(choices) == 1 else tables if isinstance(value, dict) else set(choices) - set(tables)
        return None if value is None else _convert(value, inner, where)
    if origin is tuple:
        items = _expect(value, (list, tuple), where)
        return tuple(_convert(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(items))
    if origin in (dict, Mapping):
        table = _expect(value, dict, where)
        return {key: _convert(item, arguments[1], f"{where}.{key}") for key, item in table.items()}
    if dataclasses.is_dataclass(hint):
        return parse(_expect(value, dict, where), typing.cast(type, hint), where, ".")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    return _expect(value, hint, where)


def _parse_kind(table: Mapping[str, Any], kinds: Mapping[str, type], where: str) -> Any:
    """Convert `table` to an instance of the class in `kinds` that its key `kind` names."""
    if "kind" not in table:
        raise ValueError(f"{where}: missing key 'kind'; legal: {', '.join(kinds)}")
    kind = choose(_expect(table["kind"], str, f"{where}.kind"), kinds, f"{where}.kind")
    settings = {key: value for key, value in table.items() if key != "kind"}
    keys_by_kind = {name: [field.name for field in dataclasses.fields(cls)] for name, cls in kinds.items()}
    for key in settings:
        others = [repr(name) for name, keys in keys_by_kind.items() if key in keys]
        if key not in keys_by_kind[kind] and others:
            raise ValueError(
                f"{where}: {key!r} is no key of kind {kind!r}, but of {' and '.join(others)}; remove it or change kind"
            )
    return parse(settings, kinds[kind], where, ".")


def _expect(value: Any, cls: Any, where: str) -> Any:
    """`value` if it has the type `cls`, else raises ValueError. A bool, although an int in Python, is not a number."""
    names = {
        str: "a string",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        dict: "a table",
    }
    if not isinstance(value, cls) or (isinstance(value, bool) and cls is not bool):
        want = names.get(cls, "an array")
        raise ValueError(f"{where}: got {value!r}; wanted {want}")
    return value
