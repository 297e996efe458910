"""The data room's progress bar, on standard error."""

from collections.abc import Iterable

from tqdm import tqdm

QUIET_SECONDS = 2.0  # a step that takes less draws none


def bar(name: str, total: int | None, unit: str, progress: bool, items: Iterable[bytes] | None = None) -> "tqdm[bytes]":
    return tqdm(items, desc=name, total=total, unit=unit, unit_scale=True, delay=QUIET_SECONDS, disable=not progress)
