"""Laws and their predictions as text. No number is computed here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from analysis.pages.tables import Table, interval_text, render, to_json, value_table

if TYPE_CHECKING:
    from analysis.laws.linear import LinearFit
    from analysis.laws.powerlaw import Fit
    from analysis.logs.selection import Excluded

# Said below a law of several arms, whose m is another number than that of `dynconv table`
M_OF_A_LAW = (
    "m[arm] is that of this law, in which arms differ in amplitude alone; what an arm saves is answered by "
    "`dynconv table`, whose m compares runs of the same size and seed in pairs"
)


def fit_table(fit: Fit, form: str, excluded: Sequence[Excluded], notes: Sequence[str]) -> str:
    """A law's parameters in raw units with intervals, and its certificate. JSON also lists the `excluded` rows, and
    has `notes` on how the other rows were selected."""
    if form == "json":
        return to_json(fit_object(fit) | {"notes": notes, "excluded": excluded})
    text = render(*fit_cells(fit), form)
    if form != "md":
        return text
    certificate = ", ".join(f"{key} {_brief(value)}" for key, value in fit.certificate.items())
    objective = f"objective: {fit.objective:.6g} over {len(fit.points.loss)} points"
    tests = ", ".join(f"{name} {p:.2g}" for name, p in (fit.misfit or {}).items())
    misfit = f"\np of no lack of fit: {tests}" if tests else ""
    several = f"\n{M_OF_A_LAW}" if any(name.startswith("m[") for name in fit.values) else ""
    return f"{text}\n\nstatus: {fit.status}\n{objective}\n{certificate}{misfit}{several}"


def fit_cells(fit: Fit) -> Table:
    """Columns and rows of a law's parameters."""
    intervals = {"95% interval": fit.ci} | ({"by profile": fit.profile_ci} if fit.profile_ci else {})
    rows = [
        [
            name,
            f"{value:.6g}" + (" (held)" if name in fit.hold else "") if fit.determines(name) else "not determined",
            *(
                interval_text((ci or {}).get(name) if fit.determines(name) else None, "{:.4g}")
                for ci in intervals.values()
            ),
        ]
        for name, value in fit.values.items()
    ]
    return ["parameter", "value", *intervals], rows


def fit_object(fit: Fit) -> dict[str, Any]:
    """The JSON object of `dynconv fit`: with several arms, A (and B) at the top are the baseline's."""
    names = [name for name in ("E", "A", "alpha", "B", "beta") if name in "EAalpha" or fit.form == "nd"]
    arms = list(dict.fromkeys(fit.points.arm))
    base = {name: fit.parameter(name, fit.points.baseline) for name in names}

    def of(arm: str, keys: Iterable[str]) -> dict[str, dict[str, tuple[float, float] | None] | None]:
        """Both kinds of intervals of one arm's parameters."""
        both = {"ci": fit.ci, "profile_ci": fit.profile_ci}
        return {
            kind: {key: ci.get(f"{key}[{arm}]") or ci.get(key) for key in keys} if ci else None
            for kind, ci in both.items()
        }

    per_arm = {}
    for arm in arms if len(arms) > 1 else []:
        own: dict[str, Any] = {name: fit.parameter(name, arm) for name in names}
        ratios = [key for key in ("m", "rho_N", "rho_D") if f"{key}[{arm}]" in fit.values]
        known = [key for key in ratios if fit.determines(f"{key}[{arm}]")]
        own |= dict.fromkeys(ratios) | {key: fit.values[f"{key}[{arm}]"] for key in known}
        per_arm[arm] = own | of(arm, [key for key in own if key in known or key not in ratios])
    return base | {
        "objective": fit.objective,
        **of(fit.points.baseline, names),
        "certificate": fit.certificate,
        "lack_of_fit": fit.misfit,
        "hold": fit.hold,
        "status": fit.status,
        "form": fit.form,
        "loss": "lsq" if fit.loss.delta is None else "huber",
        "delta": fit.loss.delta,
        "points": len(fit.points.loss),
        "baseline": fit.points.baseline if len(arms) > 1 else None,
        "arms": per_arm,
    }


def linear_table(found: Sequence[LinearFit], form: str) -> str:
    """Laws that are linear in logs, one row for each parameter."""
    if form == "json":
        return to_json(found)
    columns = ["arm", "of", "parameter", "value", "95% interval", "points", "status"]
    rows = [
        [
            law.arm,
            law.target,
            name,
            f"{value:.6g}",
            interval_text((law.ci or {}).get(name), "{:.4g}"),
            law.points,
            law.status,
        ]
        for law in found
        for name, value in law.values.items()
    ]
    text = value_table(columns, rows, form)
    if form == "md" and found[0].convention is not None:
        text += f"\n\nFLOPs counted as {found[0].convention}"
    return text


def prediction_tables(
    law: Fit,
    found: Sequence[Any],
    tested: Sequence[Any],
    form: str,
    excluded: Sequence[Excluded],
    notes: Sequence[str],
) -> str:
    """Predictions (`prediction.Prediction` or `BestSize`), then the back-test, then the law's status; `excluded` and
    `notes` as of `fit_table`."""
    if form == "json":
        answer = {"form": law.form, "predictions": found, "back_test": tested, "status": law.status}
        return to_json(answer | {"notes": notes, "excluded": excluded})
    rows = [{key: value for item in fields(each) for key, value in _cells_of(each, item.name)} for each in found]
    tables = [value_table(list(rows[0]), [list(row.values()) for row in rows], form)]
    if tested:
        names = [item.name for item in fields(tested[0])]
        tables.append(value_table(names, [[getattr(row, name) for name in names] for row in tested], form))
    if form == "md":
        tables[1:] = ["back-test, the largest sizes predicted by the law of the others:", *tables[1:]] if tested else []
        tables.append(f"status of the law: {law.status}")
    return "\n\n".join(tables)


def _cells_of(item: Any, name: str) -> list[tuple[str, Any]]:
    value = getattr(item, name)
    return list(value.items()) if isinstance(value, dict) else [(name, value)]


def _brief(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
