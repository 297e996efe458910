"""Configurations as plain values: complete, for `config.json`, and reduced to the content that a run's id covers.

The id covers what decides a run's outcome and nothing else. Values that equal their default are left out, so that
adding a setting with a default changes no id; the name of a kind is always included. A default must therefore never be
changed: if another default is wanted, add a setting under a new key.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

OUTSIDE_ID = {"outside_id": True}  # metadata of a field that does not change what is learned, such as a name or a path


def to_dict(value: Any) -> Any:
    """A configuration as values that JSON can hold. If its class has a kind, the key "kind" names it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = {"kind": value.kind} if hasattr(value, "kind") else {}
        return kind | {field.name: to_dict(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_dict(item) for item in value]
    return value


def content(value: Any) -> Any:
    """The part of a configuration that the id covers: no values that equal their defaults, no fields outside the id."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return to_dict(value)
    kept: dict[str, Any] = {"kind": value.kind} if hasattr(value, "kind") else {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        # A part with a kind is kept even if it equals the default, since the name of its kind is always included.
        if not field.metadata.get("outside_id") and (item != default or hasattr(item, "kind")):
            kept[field.name] = content(item)
    return kept


def digest(value: Any) -> str:
    """Ten hexadecimal digits of a configuration's content."""
    text = json.dumps(content(value), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def differences(first: Any, second: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> the two values, for every difference between two configurations in the form of `to_dict`."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in dict.fromkeys([*first, *second]):
            found |= differences(first.get(key), second.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if first == second else {path: (first, second)}
