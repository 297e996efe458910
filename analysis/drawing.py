"""From a store to its laws, answers and figures: what the verbs plot and report share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from analysis.intervals import bootstrap
from analysis.multiplier import Multiplier, multipliers
from analysis.pairs import Excluded, choose_baseline, choose_convention, finished
from analysis.powerlaw import Fit, Points, fit
from analysis.runlog import CONVENTIONS
from analysis.store import Store

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESAMPLES = 500  # of the bands


def fit_points(store: Store, form: str, baseline: str | None, convention: str | None) -> tuple[Points, list[Excluded]]:
    """The finished rows of a store as points of a law, and the rows left out."""
    runs = store.runs.assign(arm=store.runs["arm"].fillna("all"))
    done, excluded = finished(runs)
    columns = {"N": "parameters", "D": "tokens"}
    if form == "c":
        columns = {"C": CONVENTIONS[choose_convention(runs, convention)]}
    for name, column in columns.items():
        if done[column].isna().any():
            raise ValueError(f"form {form} needs {name} in every row; add a column {name}, or name it with --columns")
    several = done["arm"].nunique() > 1
    if baseline is not None or done["baseline"].notna().any():
        baseline = choose_baseline(done, baseline)
    cells = ["size"] if several and done["size"].notna().all() else ["size", *columns.values()]
    cluster = done[cells].astype("string").fillna("").agg(" ".join, axis=1)
    points = Points(
        loss=done["loss"].to_numpy(float),
        x={name: done[column].to_numpy(float) for name, column in columns.items()},
        arm=tuple(done["arm"]),
        cluster=tuple(cluster),
        baseline=baseline or str(done["arm"].iloc[0]),
    )
    return points, excluded


def figures(store: Store, baseline: str | None, convention: str | None) -> tuple[dict[str, Figure], list[str]]:
    """Every figure that the store has the data for, by name, and why others are missing."""
    found, law, notes = answers(store, baseline, convention)
    return draw(store, found, law), notes


def answers(
    store: Store, baseline: str | None, convention: str | None
) -> tuple[list[Multiplier], Fit | None, list[str]]:
    """Multipliers, the law of loss in compute if one can be fitted, and what there is no answer for.

    Raises ValueError if no arm can be compared.
    """
    convention = choose_convention(store.runs, convention)
    found, refused = multipliers(store.runs, baseline=baseline, convention=convention)
    notes = [f"no answer for {line}" for line in refused]
    shown = [found[0].baseline, *(item.arm for item in found if item.n_sizes > 2)]
    if len(shown) == 1:
        return found, None, [*notes, "no law of loss in compute: no arm has three sizes"]
    try:
        part = Store(store.path, store.runs[store.runs["arm"].isin(shown)], [])
        points, _ = fit_points(part, "c", found[0].baseline, convention)
        return found, bootstrap(fit(points, "c", delta=None), RESAMPLES), notes
    except ValueError as error:
        return found, None, [*notes, f"no law of loss in compute: {error}"]


def draw(store: Store, found: list[Multiplier], law: Fit | None) -> dict[str, Figure]:
    """Figures by name."""
    from analysis import figures as f

    done = store.runs[store.runs["status"] == "complete"]
    drawn = {"multipliers": f.forest(found)}
    if law is not None:
        drawn["loss-against-compute"] = f.loss_against_compute(law, found, found[0].convention)
    if any(item.local for item in found):
        drawn["multiplier-against-compute"] = f.local_multipliers([item for item in found if item.local])
    if done["train_seconds"].gt(0).all() and done["flops_exact"].notna().all():
        drawn["wall-clock"] = f.wall_clock(done)
    if {"panel", "setting"} <= set(done):
        loss = done[(done["arm"] == found[0].baseline) & done["size"].isin(done.loc[done["panel"].notna(), "size"])]
        drawn["ablations"] = f.ablation_panels(done[done["panel"].notna()], float(loss["loss"].mean()))
    evals = store.evals()
    if len(evals):
        drawn["loss-curves"] = f.loss_curves(evals, done)
    return drawn
