"""Frozen configurations as plain values: whole, as `config.json` holds them, and reduced to what a run's id covers.

The id covers what decides a run's outcome and nothing else: values that differ from their defaults, so that a new
setting with a default moves no id, and the tag of every kind. A default is therefore never changed: a setting
whose default should change gets a new key.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

OUTSIDE_ID = {"outside_id": True}  # metadata of a field that decides no outcome: a name, a place, when to look


def to_dict(value: Any) -> Any:
    """A configuration as JSON takes it. One of several kinds carries its tag under "kind"."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        tag = {"kind": value.kind} if hasattr(value, "kind") else {}
        return tag | {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_dict(item) for item in value]
    return value


def content(value: Any) -> Any:
    """A configuration without defaults and what is outside the id."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return to_dict(value)
    kept: dict[str, Any] = {"kind": value.kind} if hasattr(value, "kind") else {}
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        # A value of several kinds stays even where it is the default, since tags always count.
        if not field.metadata.get("outside_id") and (own != default or hasattr(own, "kind")):
            kept[field.name] = content(own)
    return kept


def digest(value: Any) -> str:
    """Ten hexadecimal digits of a configuration's content."""
    text = json.dumps(content(value), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def differences(first: Any, second: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> the two values, where two plain values of configurations (as of `to_dict`) are not the same."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in dict.fromkeys([*first, *second]):
            found |= differences(first.get(key), second.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if first == second else {path: (first, second)}
