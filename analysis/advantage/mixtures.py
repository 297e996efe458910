"""Where the two runs of a pair were not trained by the same code, on the same device, in the same precision and by the
same version of torch: what of a difference in loss may come from that, no statistic tells, so it is said."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from analysis.logs.provenance import SEVERAL, short_commits
from analysis.logs.selection import some

if TYPE_CHECKING:
    import pandas as pd

ON = ["_size", "_budget", "_seed"]  # what runs are paired on
KINDS = ("code", "torch", "dtype", "device")
MIXED = "several in one run"  # whose attempts differ


def mixtures(runs: pd.DataFrame, arm: str, baseline: str) -> list[str]:
    """A remark for each kind in which pairs of the two arms differ, with their number, the values and the pairs.

    `runs` are those of both arms that are compared, with the columns that pairs are made on. What is not known of a
    run is not compared.
    """
    return list(_remarks(runs[runs["arm"].isin([arm, baseline])], arm, baseline))


def _remarks(runs: pd.DataFrame, arm: str, baseline: str) -> Iterator[str]:
    for kind in KINDS:
        values = _values(runs, kind)
        if values is None:
            continue
        by_key: dict[tuple[str, str, float], dict[str, set[str]]] = {}
        for key, side, value in zip(zip(*(runs[name] for name in ON), strict=True), runs["arm"], values, strict=True):
            by_key.setdefault(key, {}).setdefault(side, set()).add(value)
        pairs = {key: of[arm] | of[baseline] for key, of in by_key.items() if arm in of and baseline in of}
        known = {key: {value for value in both if value} for key, both in pairs.items()}
        unlike = [key for key, both in known.items() if len(both) > 1 or MIXED in both or SEVERAL in "".join(both)]
        if unlike:
            names = sorted({short_commits(value) for key in unlike for value in known[key]})
            yield (
                f"{kind} is not the same within {len(unlike)} of {len(pairs)} pairs ({some(names)}): "
                f"{some(_name(key) for key in unlike)}"
            )


def _values(runs: pd.DataFrame, kind: str) -> list[str] | None:
    """What each run was trained by; "" where it is not known, and None where no run says. Runs of the same commit or
    of the same deciding modules have the same code."""
    column = "code_commit" if kind == "code" else kind
    if column not in runs or runs[column].isna().all():
        return None
    found = runs[column].astype("string")
    if kind == "code":
        if "code_sha256" in runs:
            sha256 = runs["code_sha256"].astype("string")
            first = found.groupby(sha256).transform("first")  # one commit stands for all that share these modules
            found = found.where(sha256.isna() | found.str.contains(SEVERAL, regex=False), first)
    elif "clock" in runs:
        found = found.mask(found.isna() & runs["clock"].eq("mixed").fillna(False), MIXED)
    return [str(value) for value in found.fillna("")]


def _name(key: tuple[str, str, float]) -> str:
    size, budget, seed = key
    return " ".join([size, *([budget] if budget else []), *([f"seed {seed:g}"] if seed >= 0 else [])])
