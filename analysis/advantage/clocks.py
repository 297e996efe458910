"""The arm's speed relative to the baseline at each size, from a file of measured throughput or from the runs' clocks.

Clocks are used only if every run had its device to itself and all runs of a size were on one kind of device; otherwise
the result states why not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from analysis.laws.solver import Floats
from analysis.logs.selection import some
from analysis.logs.throughput import ONE_KIND, OPTIMIZER, RUNS_OPTIMIZER, SETTING

if TYPE_CHECKING:
    import pandas as pd

RUNS = "the runs' own clocks, each alone on its device"
TABLE = "the table's train seconds, of which it does not say that runs were alone on one kind of device"


@dataclass(frozen=True)
class Rates:
    """The arm's FLOP/s over the baseline's at each size [S]; NaN if not known."""

    wall: Floats  # [S] by wall-clock seconds
    gpu: Floats  # [S] by GPU seconds
    source: str  # in words, where the seconds were measured
    reason: str | None  # why `wall` has a NaN; None if it has none


def rates_of_runs(sizes: Sequence[pd.DataFrame], column: str) -> Rates:
    """Relative speed from the runs' train seconds. `sizes` has a frame of paired runs for each size, in which the
    baseline's columns end in _0 and the arm's in _1; `column` holds the compute."""
    reasons = [_unusable(rows) for rows in sizes]
    found = [
        (np.nan, np.nan) if reason else (_ratio(rows, column, per_gpu=False), _ratio(rows, column, per_gpu=True))
        for rows, reason in zip(sizes, reasons, strict=True)
    ]
    wall, gpu = np.array(found, dtype=float).reshape(-1, 2).T
    reason = next((text for text in reasons if text), None)
    if reason is None and np.isnan(wall).any():
        reason = "the arms were trained on different numbers of GPUs"
    recorded = any(rows["clock_0"].notna().any() for rows in sizes)
    return Rates(wall, gpu, (RUNS if recorded else TABLE) + _unlike_sizes(sizes), reason)


def _unlike_sizes(sizes: Sequence[pd.DataFrame]) -> str:
    """In words, the devices, ways of execution and numbers of GPUs that differ between sizes, for which m in seconds
    may change with size."""
    found = ""
    for name, what in (("device", "devices"), ("execution", "ways of execution"), ("gpus", "numbers of GPUs")):
        by_value: dict[str, list[str]] = {}
        for rows in sizes:
            for value in dict.fromkeys(map(str, rows[f"{name}_0"].dropna())):
                by_value.setdefault(value, []).append(str(rows["_size"].iloc[0]))
        if len(by_value) > 1:
            where = "; ".join(f"{value} at {some(at)}" for value, at in by_value.items())
            found += f", of several {what} ({where})"
    return found


def _unusable(rows: pd.DataFrame) -> str | None:
    """Why the clocks of one size's runs cannot be compared; None if they can."""
    import pandas as pd

    names, clocks, devices, seconds = (
        pd.concat([rows[f"{key}_0"], rows[f"{key}_1"]], ignore_index=True)
        for key in ("run_id", "clock", "device", "train_seconds")
    )
    executed, gpus = (
        pd.concat([rows[f"{key}_0"], rows[f"{key}_1"]], ignore_index=True) for key in ("execution", "gpus")
    )
    missing = ~(seconds.astype(float) > 0)
    if missing.all():
        return "the runs have no train seconds"
    if missing.any():
        return f"no train seconds of {some(names[missing])}"
    if clocks.notna().any():
        for kind, what in (
            ("shared", "shared their device"),
            ("mixed", "ran on several kinds of device or in several ways, or shared theirs part of the time"),
            ("unknown", "may have shared their device: nothing says"),
        ):
            if (clocks.fillna("unknown") == kind).any():
                return f"{some(names[clocks.fillna('unknown') == kind])} {what}"
    if devices.nunique() > 1:
        return f"runs to be compared were on {some(sorted(devices.dropna().unique()))}"
    if executed.nunique() > 1:
        return f"runs to be compared were executed in several ways: {some(sorted(executed.dropna().unique()))}"
    for fused in (rows["fused_0"], rows["fused_1"]):  # Arms may differ in what is fused; the runs of one arm must not.
        if (sets := fused.fillna("nothing")).nunique() > 1:
            return f"runs of one arm had different parts fused: {some(sorted(map(str, sets.unique())))}"
    for values, what in (
        (devices, "on which device"),
        (executed, "how, compiled or fused or not,"),  # Stores of older versions did not record it.
        (gpus, "on how many GPUs"),
    ):
        if values.isna().any() and values.notna().any():
            return f"nothing says {what} {some(names[values.isna()])} ran"
    return None


def _ratio(rows: pd.DataFrame, column: str, per_gpu: bool) -> float:
    """The arm's mean FLOP/s over the baseline's at one size; NaN if it is not known. Without `per_gpu`, it is also NaN
    if the arms used different numbers of GPUs."""
    counts = {*rows["gpus_0"].dropna(), *rows["gpus_1"].dropna()}
    rates = []
    for side in ("_0", "_1"):
        seconds = rows["train_seconds" + side].astype(float)
        if per_gpu:
            seconds = seconds * rows["gpus" + side].astype(float)
        elif len(counts) > 1:
            return np.nan
        rates.append((rows[column + side] / seconds).mean() if (seconds > 0).all() else np.nan)
    return float(rates[1] / rates[0])


def rates_of_throughput(
    sizes: Sequence[pd.DataFrame], column: str, measured: pd.DataFrame, baseline: str, arm: str
) -> Rates:
    """Relative speed from measured tokens a second (`logs.throughput.read_throughput`), compared at equal SETTING.

    Each arm's rows are those with the optimizer of its runs, and with their number of GPUs if that was measured.
    Repeated measurements are averaged, and the ratios at several batches and sequence lengths are combined by their
    geometric mean. There is no ratio over several devices or commits (ONE_KIND).
    """
    found, reason, used = [], None, []
    averaged: dict[str, set[str]] = {}  # size -> names of settings that differ among those that were averaged
    for rows in sizes:
        size = str(rows["_size"].iloc[0])
        at_size = measured[measured["size"] == size]
        sides = [_of_its_runs(at_size, name, rows, end) for name, end in ((baseline, "_0"), (arm, "_1"))]
        settings, value = _measured_ratio(sides, baseline, arm)
        why = value if isinstance(value, str) else None
        per_token = [(rows[column + side] / rows["tokens" + side].astype(float)).mean() for side in ("_0", "_1")]
        if why is None and not np.isfinite(per_token).all():
            why = "FLOPs a second cannot be computed from tokens a second without the runs' tokens; add a column D"
        found.append(np.nan if isinstance(value, str) or why else value * per_token[1] / per_token[0])
        reason = reason or (why and f"at {size} {why}")
        used += settings
        if len(settings) > 1:
            averaged[size] = {name for name in SETTING if len({setting[name] for setting in settings}) > 1}
    wall = np.array(found, dtype=float)
    return Rates(wall, wall, _source(used, averaged) + _other_vocabulary(used, sizes), reason)


def _of_its_runs(measured: pd.DataFrame, arm: str, runs: pd.DataFrame, end: str) -> pd.DataFrame:
    """The measured rows of an arm that apply to its runs: with the same optimizer, unless one side does not record it,
    and with the same number of GPUs if there are such rows. `end` is the ending of the arm's columns in `runs`."""
    mine = measured[measured["arm"] == arm]
    optimizers = set(runs[RUNS_OPTIMIZER + end].dropna())
    if optimizers:
        mine = mine[mine[OPTIMIZER].isna() | mine[OPTIMIZER].isin(optimizers)]
    counts = {f"{count:.0f}" for count in runs["gpus" + end].dropna()}
    alike = mine[mine["gpus"].isin(counts)]
    return mine if alike.empty else alike


Settings = list[dict[str, str]]  # the values of SETTING at which throughput was compared


def _measured_ratio(sides: Sequence[pd.DataFrame], baseline: str, arm: str) -> tuple[Settings, float | str]:
    """(settings that were compared, the arm's tokens a second over the baseline's or why there is no ratio). `sides`
    are the rows of the baseline and of the arm."""
    if lacking := [name for name, rows in zip((baseline, arm), sides, strict=True) if rows.empty]:
        return [], f"the throughput file has no {' and no '.join(lacking)}"
    keyed = [rows.fillna(dict.fromkeys((*SETTING, OPTIMIZER), "")).groupby(list(SETTING)) for rows in sides]
    theirs, mine = (groups["tokens_per_second"].mean() for groups in keyed)
    common = theirs.index.intersection(mine.index)
    if common.empty:
        return [], f"the throughput of {arm} and {baseline} is at no equal {', '.join(SETTING)}"
    for name in ONE_KIND:
        if (values := common.get_level_values(name)).nunique() > 1:
            return [], f"the throughput is of several {ONE_KIND[name]} ({some(values.unique())})"
    if any((groups[OPTIMIZER].nunique()[common] > 1).any() for groups in keyed):
        return [], "the throughput is of several optimizers, and the runs do not say which they used"
    ratio = float(np.exp(np.log(mine[common] / theirs[common]).mean()))
    return [dict(zip(SETTING, setting, strict=True)) for setting in common], ratio


def _source(used: Settings, averaged: Mapping[str, set[str]]) -> str:
    """In words, where throughput was measured, which settings differ between sizes, and which were averaged over."""
    values = {name: sorted({setting[name] for setting in used} - {""}) for name in SETTING}
    text = f"throughput measured on {some(values['device']) or 'an unnamed device'}"
    text += ", not fused" if values["fused"] == ["False"] else ""
    for name in ("versions", "commit", "fused"):
        if len(values[name]) > 1:
            text += f", of several {ONE_KIND[name]} ({some(values[name])})"
    for name in ("gpus", "parallel"):
        if len(values[name]) > 1:
            text += f", {name} {some(values[name])}"
    if averaged:
        over = [name for name in SETTING if name in set().union(*averaged.values())]
        text += f", mean over several settings ({', '.join(over)}) at {some(averaged)}"
    return text


def _other_vocabulary(used: Settings, sizes: Sequence[pd.DataFrame]) -> str:
    """A remark if throughput was measured at another vocabulary than the runs', else "".

    The LM head, which is the same for all arms, then takes another share of the time.
    """
    measured = {setting["vocabulary"] for setting in used} - {""}
    runs = {f"{value:.0f}" for rows in sizes for side in ("_0", "_1") for value in rows[f"vocabulary{side}"].dropna()}
    if not measured or not runs or measured == runs:
        return ""
    return f", of vocabulary {some(sorted(measured))} where the runs have {some(sorted(runs))}"
