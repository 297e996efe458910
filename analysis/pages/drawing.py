"""From a store to its laws, multipliers and figures: the code that the verbs plot and report share."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from analysis.advantage.answers import Multiplier
from analysis.advantage.multiplier import multipliers
from analysis.errors import Refusal
from analysis.laws.adequacy import with_lack_of_fit
from analysis.laws.intervals import bootstrap
from analysis.laws.isoflop import Allocation, Optimum, isoflop
from analysis.laws.powerlaw import Fit, Points, fit
from analysis.laws.rates import for_a_law, rate_column
from analysis.logs.learning import failed_runs, uncounted, unlearned
from analysis.logs.metrics import final_metrics
from analysis.logs.schema import CONVENTIONS
from analysis.logs.selection import (
    Excluded,
    choose_baseline,
    choose_convention,
    finished,
    require_positive,
)
from analysis.logs.store import Store
from analysis.pages.ablations import ablations, baseline_loss
from analysis.pages.expert_load import expert_load, expert_loads
from analysis.pages.style import loss_label

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass
class Answers:
    """All results that the data of a store allow; `notes` has a line for each result that they do not allow."""

    baseline: str
    convention: str
    found: list[Multiplier] = field(default_factory=list)
    law: Fit | None = None
    optima: list[Optimum] = field(default_factory=list)
    allocations: list[Allocation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def fit_points(
    store: Store, form: str, baseline: str | None, convention: str | None
) -> tuple[Points, list[Excluded], list[str]]:
    """The finished rows of a store, at the best learning rate of their size and budget, as points of a law; the rows
    left out; and lines for the reader on how rows were selected."""
    done, excluded = finished(store.runs)
    done = done.assign(arm=done["arm"].fillna("all"))
    columns = {"N": "parameters", "D": "tokens"}
    if form == "c":
        columns = {"C": CONVENTIONS[choose_convention(done, convention)]}
    for name, column in columns.items():
        if done[column].isna().all():
            raise Refusal(f"form {form} needs {name} in every row; add a column {name}, or name it with --columns")
        require_positive(done, column, name)
    several = done["arm"].nunique() > 1
    if baseline is not None or done["baseline"].notna().any():
        baseline = choose_baseline(done, baseline)
    baseline = baseline or str(done["arm"].iloc[0])
    compute = next(iter(columns.values())) if form == "c" else "tokens"
    done, others, lines = for_a_law(done, compute, failed_runs(store.runs))
    missing = unlearned(store.runs, done, rate_column(done))
    lines += uncounted(store.runs, missing)
    # Resamples are drawn in the order of the points; sort, so that results do not depend on the order of the rows.
    done = done.sort_values(["arm", *columns.values(), "loss", "run_id"])
    cells = ["size"] if several and done["size"].notna().all() else ["size", *columns.values()]
    cluster = done[cells].astype("string").fillna("").agg(" ".join, axis=1)
    points = Points(
        loss=done["loss"].to_numpy(float),
        x={name: done[column].to_numpy(float) for name, column in columns.items()},
        arm=tuple(done["arm"]),
        cluster=tuple(cluster),
        baseline=baseline,
        sizes=done["parameters"].to_numpy(float, na_value=np.nan),
        missing=tuple(each.remark for each in missing.values()),
    )
    return points, excluded + others, lines


def answers(store: Store, baseline: str | None, convention: str | None) -> Answers:
    """Multipliers, the law of loss in compute as `dynconv fit` gives it, and isoFLOP optima.

    Where none of the three is possible, as with one size of one arm, `notes` says why, and the runs can still be drawn.
    Raises Refusal on data that support no claim, and for runs on several tasks, whose losses belong in no figure
    together.
    """
    runs, _ = finished(store.runs.assign(arm=store.runs["arm"].fillna("all")))
    convention = choose_convention(runs, convention)
    if baseline is not None:
        choose_baseline(runs, baseline)
    with tqdm(total=2, desc="fitting", delay=1, leave=False) as bar:
        found, notes = _multipliers(store.runs, baseline, convention)
        answer = Answers(found[0].baseline if found else baseline or str(runs["arm"].iloc[0]), convention, found)
        answer.notes = notes + [each.remark for each in unlearned(store.runs).values()]
        bar.update()
        with contextlib.suppress(Refusal):  # most stores are not isoFLOP designs
            optima, allocations = isoflop(store.runs, convention)
            if any(item.N for item in optima):
                answer.optima, answer.allocations = optima, allocations
        if answer.optima:
            notes.append("no law of loss in compute: a budget has several sizes; `dynconv fit --form nd` has one")
        else:
            answer.law = _law(store, answer)
        bar.update()
    if not (found or answer.law or answer.optima) and runs["task"].nunique() > 1:
        raise Refusal("; ".join(answer.notes))
    return answer


def _multipliers(runs: pd.DataFrame, baseline: str | None, convention: str) -> tuple[list[Multiplier], list[str]]:
    if runs["arm"].nunique() < 2:
        return [], ["no multipliers: there is one arm"]
    try:
        found, refused = multipliers(runs, baseline=baseline, convention=convention)
    except Refusal as error:
        return [], [f"no multipliers: {error}"]
    return found, [f"no answer for {line}" for line in refused]


def _law(store: Store, answer: Answers) -> Fit | None:
    """The law of the baseline and the arms whose multiplier rests on at least three sizes; where no arm has a
    multiplier, of all arms. None, with a note, where there is no such law."""
    shown = [answer.baseline, *(item.arm for item in answer.found if item.n_sizes > 2)]
    if answer.found and len(shown) == 1:
        answer.notes.append("no law of loss in compute: no arm has three sizes")
        return None
    part = store.runs[store.runs["arm"].isin(shown)] if answer.found else store.runs
    try:
        points, _, lines = fit_points(Store(store.path, part, []), "c", answer.baseline, answer.convention)
        answer.notes += [f"law of loss in compute: {line}" for line in lines]
        return with_lack_of_fit(bootstrap(fit(points, "c")))
    except Refusal as error:
        answer.notes.append(f"no law of loss in compute: {error}")
        return None


@dataclass(frozen=True)
class Material:
    """The data of the figures: the finished runs that learned (a missing arm is called "all"), their evaluations, the
    runs of the ablation panels, and the load of each expert in mixtures of experts."""

    done: pd.DataFrame
    evals: pd.DataFrame
    ablated: pd.DataFrame
    accuracies: pd.DataFrame  # metric_figures.accuracy_rows
    loads: pd.DataFrame  # expert_load.expert_loads


def material(store: Store) -> Material:
    """The data of a store's figures. Reads the evaluations, which may add to `store.problems`. Runs that did not learn
    are not drawn, as their losses would hide the others'."""
    learned = store.runs["did_not_learn"].isna()
    done = store.runs[learned & (store.runs["status"] == "complete")].assign(arm=lambda rows: rows["arm"].fillna("all"))
    from analysis.pages.metric_figures import accuracy_rows

    metrics = final_metrics(store)
    return Material(done, store.loss_curves(), ablations(done), accuracy_rows(metrics, done), expert_loads(metrics))


def draw(of: Material, answer: Answers) -> dict[str, Figure]:
    """Every figure that the store has the data for, by name. Raises ValueError if there is none."""
    from analysis.pages import figures, isoflop_figures, metric_figures, run_figures

    done, law, found, base = of.done, answer.law, answer.found, answer.baseline
    column = CONVENTIONS[answer.convention]
    todo: dict[str, Callable[[], Figure]] = {}
    if found:
        todo["multipliers"] = lambda: figures.forest(found)
    if law is not None:
        axes = (answer.convention, loss_label(done))
        todo["loss-against-compute"] = lambda: figures.loss_against_compute(law, found, *axes)
    elif not answer.optima and _all_positive(done[column]):
        compute = f"training FLOPs ({answer.convention})"
        todo["loss-against-compute"] = lambda: run_figures.loss_against(done, column, compute, base)
    if local := [item for item in found if item.local]:
        todo["multiplier-against-compute"] = lambda: figures.local_multipliers(local)
    if answer.optima:
        design = (answer.optima, answer.allocations, answer.convention)
        todo["isoflop"] = lambda: isoflop_figures.isoflop_panels(done.assign(C=done[column]), *design)
        if len(answer.allocations) > isoflop_figures.FEW_ARMS:
            todo["isoflop-growth"] = lambda: isoflop_figures.isoflop_growth(*design)
    if _all_positive(done["tokens"]) and not answer.optima:  # where a budget has many sizes, isoFLOP says more
        todo["loss-against-tokens"] = lambda: run_figures.loss_against(done, "tokens", "training tokens D", base)
    if _all_positive(done["train_seconds"]):
        todo["wall-clock"] = lambda: run_figures.wall_clock(done, column, answer.convention, base)
    if len(of.ablated):
        todo["ablations"] = lambda: run_figures.ablation_panels(of.ablated, baseline_loss(done, of.ablated, base))
    if len(of.accuracies):
        todo["accuracy"] = lambda: metric_figures.accuracy_panels(of.accuracies, base)
    if len(of.evals):
        todo["loss-curves"] = lambda: run_figures.loss_curves(of.evals, done, base)
    if of.loads["run_id"].isin(done["run_id"]).any():
        todo["expert-load"] = lambda: expert_load(of.loads, done)
    if not todo:
        raise Refusal("; ".join(answer.notes) or "there is nothing to draw")
    return {name: make() for name, make in tqdm(todo.items(), desc="figures", delay=2, leave=False)}


def _all_positive(column: pd.Series) -> bool:
    """Whether all values are positive; a missing value is not, though pandas would skip it."""
    return bool((column.astype(float) > 0).all())
