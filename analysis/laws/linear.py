"""Laws that are linear in logs: N*(C) and D*(C) through a table of optima, and a loss in N and a further factor.

- "optima": ln N* = ln G + a ln C, and ln D* likewise, from points (C, N*, D*) that someone found;
- "bilinear": ln L = a ln N + b ln E + c ln N ln E + d, where E is a factor such as the number of experts, without an
  irreducible loss (arXiv 2202.01169, eq. 1, without its saturation).
Huber's function of the log residual, or least squares of it, by the solver of the power laws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from analysis.errors import Refusal
from analysis.laws.intervals import ENOUGH, LEVEL, Interval
from analysis.laws.rates import at_best_rates, notes, rate_column
from analysis.laws.solver import Floats, Loss, Problem
from analysis.logs.learning import Unlearned, unlearned
from analysis.logs.schema import CONVENTIONS
from analysis.logs.selection import alike, choose_convention, finished, require_positive

if TYPE_CHECKING:
    import pandas as pd

SQUARES = 1e6  # a delta of Huber's function so large that it amounts to least squares
SAME_RATIO = 0.02  # D/N of all rows counts as the same up to this share
MOST_APART = 1.5  # largest ratio between estimates of one arm's optimum at one compute


@dataclass(frozen=True)
class LinearFit:
    """The law of one target of one arm; `values` and 95% intervals by name."""

    arm: str
    target: str  # "N", "D" or "loss"
    values: dict[str, float]
    ci: dict[str, Interval] | None  # None without resamples or degrees of freedom
    objective: float  # a sum over the points
    points: int
    convention: str | None  # of C
    status: str
    notes: tuple[str, ...] = ()  # how rows were selected


def fit_optima(
    runs: pd.DataFrame,
    convention: str | None = None,
    *,
    delta: float | None = 1e-3,
    resamples: int = 1000,
    seed: int = 0,
) -> list[LinearFit]:
    """N* = G C^a and D* = G C^a of every arm in a table of optima, whose rows need no loss. Rows that did not learn are
    left out, and counted in the status. Raises Refusal where a column lacks or has one value."""
    failures = unlearned(runs)
    learned = runs["did_not_learn"].isna() & (runs["status"] == "complete")
    runs = runs[learned].assign(arm=lambda rows: rows["arm"].fillna("all"))
    if runs["sweep"].notna().any():
        raise Refusal(
            "these are the runs of a sweep, and --form optima takes a table of optima: the best N and D at each of "
            "several budgets, each found from several sizes of equal compute; `dynconv isoflop` finds them"
        )
    convention = choose_convention(runs, convention)
    targets = {name: column for name, column in (("N", "parameters"), ("D", "tokens")) if runs[column].notna().any()}
    if not targets:
        raise Refusal("a table of optima needs N* or D* beside C; add a column N or D, or name it with --columns")
    found = []
    for name, column in targets.items():
        require_positive(runs, column, name)
        for arm, rows in runs.drop_duplicates(["arm", CONVENTIONS[convention], column]).groupby("arm", sort=False):
            _require_optima(rows, CONVENTIONS[convention], column, name)
            x, y = (np.log(rows[of].to_numpy(float)) for of in (CONVENTIONS[convention], column))
            columns = {"ln_coefficient": np.ones_like(x), "exponent": x}
            law = _fit(str(arm), name, columns, y, delta, resamples, seed, convention)
            law = replace(law, status=_of_the_design(rows, law.status))
            found.append(_counting(law, failures))
    return found


def _counting(law: LinearFit, failures: Mapping[str, Unlearned]) -> LinearFit:
    """The law with the runs of its arm that did not learn in its status."""
    if (failed := failures.get(law.arm)) is None:
        return law
    return replace(law, status=failed.remark if law.status == "ok" else f"{failed.remark}; {law.status}")


def _of_the_design(rows: pd.DataFrame, status: str) -> str:
    """The status of a law, with a warning where D/N is the same in every row, as in runs that got the same tokens for
    each parameter: N and D then grow by the design, whatever is best."""
    ratio = (rows["tokens"] / rows["parameters"]).to_numpy(float, na_value=np.nan)
    if len(ratio) < 2 or not np.isfinite(ratio).all() or ratio.max() > (1 + SAME_RATIO) * ratio.min():
        return status
    warning = (
        f"D/N is {ratio.mean():.3g} in every row, so these exponents may be those of a design and not of optima, which "
        "need several sizes at each budget (dynconv isoflop)"
    )
    return warning if status == "ok" else f"{status}; {warning}"


def _require_optima(rows: pd.DataFrame, compute: str, column: str, name: str) -> None:
    """Raises Refusal where one arm's values at a compute differ by more than estimates of one optimum would."""
    of_arm = rows["arm"].to_numpy(str)
    for _, same in rows.groupby(alike(rows[compute].to_numpy(float), of_arm)):
        low, high = float(same[column].min()), float(same[column].max())
        if high > MOST_APART * low:
            raise Refusal(
                f"{of_arm[0]} has {len(same)} values of {name} from {low:.3g} to {high:.3g} at "
                f"C = {same[compute].mean():.3g}, where a table of optima has one; `dynconv isoflop` finds the optima "
                "of runs"
            )


def fit_bilinear(
    runs: pd.DataFrame, factor: str, *, delta: float | None = 1e-3, resamples: int = 1000, seed: int = 0
) -> list[LinearFit]:
    """The bilinear law of every arm, fitted to the runs at the best learning rate of each N, D and factor; `factor` is
    a column of positive numbers. Raises Refusal where the law cannot be fitted."""
    if factor not in runs:
        raise Refusal(
            f"the table has no column {factor!r} to be the factor; it has {', '.join(map(str, runs.columns))}"
        )
    done, _ = finished(runs)
    done = done.assign(arm=done["arm"].fillna("all"))
    failures = unlearned(runs)
    require_positive(done, "parameters", "N")
    try:
        done = done.assign(**{factor: done[factor].astype(float)})
    except (ValueError, TypeError):
        raise Refusal(f"the factor {factor} must hold numbers; got {done[factor].iloc[0]!r}") from None
    require_positive(done, factor, factor)
    budget = done["tokens"].astype("string").fillna("") + " " + done[factor].astype("string")
    cells = done.assign(_size=done["parameters"].astype("string"), _budget=budget)
    done, tuned = at_best_rates(cells, rate_column(done), "parameters")
    lines = tuple(notes(tuned))
    found = []
    for arm, rows in done.groupby("arm", sort=False):
        log_n, log_e, y = (np.log(rows[name].to_numpy(float)) for name in ("parameters", factor, "loss"))
        columns = {"a": log_n, "b": log_e, "c": log_n * log_e, "d": np.ones_like(y)}
        law = _fit(str(arm), "loss", columns, y, delta, resamples, seed, None)
        found.append(replace(_counting(law, failures), notes=lines))
    return found


def _fit(
    arm: str,
    target: str,
    columns: Mapping[str, Floats],
    y: Floats,
    delta: float | None,
    resamples: int,
    seed: int,
    convention: str | None,
) -> LinearFit:
    """ln target [n] as a sum of parameters times columns [n]. The solver sees an orthonormal basis of the columns."""
    design = np.stack(list(columns.values()), axis=1)
    basis, mixing = np.linalg.qr(design)
    diagonal = np.abs(np.diag(mixing))
    if len(y) < design.shape[1] or (diagonal < 1e-9 * np.abs(mixing).max(axis=0)).any():
        raise Refusal(f"{arm}: {len(y)} points cannot tell {', '.join(columns)} apart; add points that differ in more")
    loss = Loss(SQUARES if delta is None else delta)
    unlimited = np.full(design.shape[1], np.inf)
    problem = Problem(basis.T[None], -unlimited, unlimited, np.zeros(len(unlimited), dtype=bool), loss)
    solution = problem.solve((basis.T @ y)[None], y)
    theta = solution.theta[0]
    ci, dof = None, len(y) - design.shape[1]
    if resamples and dof > 0:
        draws = _draws(problem, theta, y, dof, resamples, np.random.default_rng(seed))
        raw = np.linalg.solve(mixing, draws.T)
        low, high = np.quantile(raw, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=1)
        ci = {name: (float(a), float(b)) for name, a, b in zip(columns, low, high, strict=True)}
    status = "ok" if solution.converged[0] else "not converged"
    if dof == 0:
        status = "as many parameters as points"
    values = dict(zip(columns, np.linalg.solve(mixing, theta).tolist(), strict=True))
    return LinearFit(arm, target, values, ci, float(solution.objective[0]), len(y), convention, status)


def _draws(problem: Problem, theta: Floats, y: Floats, dof: int, resamples: int, random: np.random.Generator) -> Floats:
    """Parameters [resamples, P] of points drawn anew, where there are enough, else of normal errors with a spread that
    is drawn, too."""
    starts = np.tile(theta, (resamples, 1))
    if len(y) >= ENOUGH:
        weight = random.multinomial(len(y), np.full(len(y), 1 / len(y)), resamples).astype(float)
        return problem.solve(starts, y, weight).theta
    fitted = problem.predict(theta[None])[0]
    spread = np.sqrt(((y - fitted) ** 2).sum() / random.chisquare(dof, (resamples, 1)))
    return problem.solve(starts, fitted + spread * random.standard_normal((resamples, len(y)))).theta
