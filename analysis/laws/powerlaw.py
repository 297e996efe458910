"""Fit L = E + A C^-alpha ("c") or L = E + A N^-alpha + B D^-beta ("nd"), alone or for several arms at once.

Parameters not in `per_arm` are shared by all arms. With only the amplitudes per arm, form nd is the rho form: an arm
acts as if its N and D were multiplied by rho_N = (A_baseline / A_arm)^(1/alpha) and rho_D, defined likewise; and form c
gives the compute multiplier m = (A_baseline / A_arm)^(1/alpha) of the joint fit.

The objective is a sum over the points: Huber's function of log prediction minus log loss, as in Chinchilla (arXiv
2203.15556, D.2), or the squared residual of the raw loss. Starts come from a grid of exponents: given the exponents the
model is linear in the remaining parameters, which are solved for (variable projection). The solver then descends from
the best of these starts and from an even sample of the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from analysis.errors import Refusal
from analysis.laws.solver import ROUNDING, Bools, Floats, Indices, Loss, Problem, Solution

FORMS = {"c": (("A", "alpha", "C"),), "nd": (("A", "alpha", "N"), ("B", "beta", "D"))}
STARTS = 4500
POLISHED = 64  # starts that are descended from: half are the best, half an even sample of the others
EXPONENTS = (0.01, 3.0)  # bounds of the exponents
GRID = (0.02, 2.0)  # range of the exponents in the starts
LOG_LEVELS = (-16.0, 6.0)  # bounds of log E and log(A C^-alpha) at the mean log C, with losses of geometric mean 1
COLLINEAR = 0.05  # D within this share of a power of N does not tell the term of D from that of N
EQUAL = 0.01  # N, D or C closer than this share of them are no different ones, such as of arms of matched compute
SINGULAR = 1e10  # condition number of the curvature, beyond which the points do not determine all parameters
SAME = 1e-6  # two solutions are the same optimum if their objectives differ by less than this share


@dataclass(frozen=True)
class Points:
    """What is fitted: n points, each of one arm."""

    loss: Floats  # [n] nats a token
    x: Mapping[str, Floats]  # "C", or "N" and "D": [n], raw units
    arm: tuple[str, ...]  # [n]
    cluster: tuple[str, ...]  # [n] equal for points that share an error, such as the arms and seeds of a size
    baseline: str  # the arm whose amplitudes are reported first
    sizes: Floats | None = None  # [n] N, to test whether the residuals of form c depend on it (adequacy.py)
    missing: tuple[str, ...] = ()  # which runs are no points because they did not learn; the status repeats it


@dataclass(frozen=True)
class Line:
    """A line of ln D on ln N."""

    growth: float  # its slope
    middle: Mapping[str, Floats]  # by arm: a point on it, ln N and ln D

    def misses(self, x: Mapping[str, Floats], arm: str) -> Bools:
        """Which of x ("N" and "D", each [n] in raw units) are not within COLLINEAR of the arm's line."""
        N, D = (np.log(x[name]) - middle for name, middle in zip(("N", "D"), self.middle[arm], strict=True))
        off: Bools = np.abs(D - self.growth * N) > COLLINEAR
        return off


@dataclass(frozen=True)
class Fit:
    """A fitted law, with diagnostics of its optimum in `certificate` and a summary of them in `status`. `values` are in
    raw units, by name: "E", "A[arm]", "m[arm]"."""

    form: str
    loss: Loss
    per_arm: tuple[str, ...]
    points: Points
    values: dict[str, float]
    objective: float  # a sum over the points
    certificate: dict[str, Any]
    status: str  # "ok", or what is wrong with the fit
    theta: Floats  # [P] the solver's parameters: exponents, and logs of E and of each term at the mean log N, D or C
    ci: dict[str, tuple[float, float]] | None = None  # 95%, by bootstrap
    profile_ci: dict[str, tuple[float, float]] | None = None  # 95%
    draws: tuple[dict[str, float], ...] | None = None  # `values` of each resample
    misfit: dict[str, float] | None = None  # p-values of tests for lack of fit (adequacy.py)
    hold: Mapping[str, float] = field(default_factory=dict)  # values that were given, not fitted

    def parameter(self, name: str, arm: str) -> float:
        """E, A, alpha, B or beta of one arm."""
        return self.values[_key(name, arm, self.per_arm)]

    def determines(self, name: str) -> bool:
        """Whether a multiplier, "m[arm]" or "rho_N[arm]", follows from the fit (see `separates`). True for all other
        parameters."""
        kind, _, arm = name.removesuffix("]").partition("[")
        variables = [variable for _, _, variable in FORMS[self.form] if kind in ("m", f"rho_{variable}")]
        return not variables or self.separates(variables, (arm, self.points.baseline))

    def separates(self, variables: Sequence[str], arms: Sequence[str]) -> bool:
        """Whether the fit determines these arms' terms of "C", or of "N" and "D".

        It does not where the search moved an exponent or amplitude of theirs to a bound, which is then all that they
        tell, nor where the points do not tell the parameters, or the terms of N and D, apart.
        """
        parts = [
            (name, arm) for *law, variable in FORMS[self.form] if variable in variables for name in law for arm in arms
        ]
        at_bound = any(_key(name, arm, self.per_arm) in self.certificate["bounds_hit"] for name, arm in parts)
        return not (at_bound or is_singular(self.certificate) or (self.form == "nd" and self.line() is not None))

    def line(self) -> Line | None:
        """The line of ln D on ln N that the points lie on, where they lie on one; of form nd only."""
        return _line(self.points, self.per_arm)

    def predict(self, x: Mapping[str, Floats], arm: str) -> Floats:
        """The law's loss at x ("C", or "N" and "D", each [n] in raw units) for one arm."""
        terms = [self.parameter(a, arm) * x[v] ** -self.parameter(e, arm) for a, e, v in FORMS[self.form]]
        return self.parameter("E", arm) + np.sum(terms, axis=0)


def _key(name: str, arm: str, per_arm: Sequence[str]) -> str:
    return f"{name}[{arm}]" if name in per_arm else name


def ratios(values: Mapping[str, float], form: str, per_arm: Sequence[str], arm: str, baseline: str) -> dict[str, float]:
    """The multipliers of `arm` over the baseline, by name: m in form c; rho_N, rho_D and m in form nd, where m is their
    product and refers to C = 6 N D with every arm at its own optimal size. Empty where an exponent is not shared."""
    found = {}
    for amplitude, exponent, variable in FORMS[form]:
        if amplitude not in per_arm or exponent in per_arm:
            return {}
        log_ratio = math.log(values[f"{amplitude}[{baseline}]"] / values[f"{amplitude}[{arm}]"]) / values[exponent]
        # A resample's exponent may be near 0, so that exp would overflow.
        found["m" if form == "c" else f"rho_{variable}"] = math.exp(min(max(log_ratio, -300), 300))
    return found if form == "c" else found | {"m": math.prod(found.values())}


def fit(
    points: Points,
    form: str = "c",
    *,
    delta: float | None = 1e-3,
    per_arm: Sequence[str] = ("A", "B"),
    starts: int = STARTS,
    polished: int = POLISHED,
    hold: Mapping[str, float] | None = None,
) -> Fit:
    """Fit by Huber's function with `delta`, or by least squares (None), descending from `polished` of the `starts`.
    `hold` gives raw values of parameters that are then not fitted: E, A, alpha, B or beta, for all arms, or for one arm
    as "A[arm]".

    Raises Refusal where the points cannot determine the parameters.
    """
    hold = dict(hold or {})
    _refuse_undetermined(points, form, hold)
    model = Model(points, form, delta, per_arm, hold)
    if len(points.loss) < model.free:
        raise Refusal(f"{len(points.loss)} points cannot determine {model.free} parameters; add points")
    candidates = model.starts(starts)
    value = model.problem.objective(candidates, model.log_y)
    order = np.argsort(value)
    half = max(1, polished // 2)
    spread = order[half:][:: max(1, (len(order) - half) // half)]
    chosen = np.concatenate([order[:half], spread])
    solution = model.problem.solve(candidates[chosen], model.log_y)
    best = int(np.argmin(solution.objective))
    certificate = model.certificate(solution, best) | {"starts": len(candidates), "polished": len(chosen)}
    theta = solution.theta[best]
    return Fit(
        form,
        model.problem.loss,
        model.per_arm,
        points,
        model.raw(theta),
        model.raw_objective(float(solution.objective[best])),
        certificate,
        _status(certificate, points, model),
        theta,
        hold=hold,
    )


def _refuse_undetermined(points: Points, form: str, hold: Mapping[str, float]) -> None:
    for amplitude, exponent, variable in FORMS[form]:
        values = points.x[variable]
        if not (np.isfinite(values) & (values > 0)).all():
            raise Refusal(f"{variable} must be positive in every row; got {values.min()}")
        needed = max(1, 3 - len({"E", amplitude, exponent} & set(hold)))
        different = 1 + int((np.diff(np.log(np.sort(values))) > EQUAL).sum())
        if different < needed:
            raise Refusal(
                f"form {form} needs {needed} different {variable} to tell E, amplitude and exponent apart; "
                f"got {different}"
            )


def _status(certificate: Mapping[str, Any], points: Points, model: Model) -> str:
    faults = [*points.missing]
    if model.form == "nd" and (line := _line(points, model.per_arm)) is not None:
        faults.append(
            f"N and D are collinear (D grows as N^{line.growth:.2f}), so their terms cannot be told apart: add runs "
            "with other D at some of the N, or use --form c"
        )
    faults += [f"{name} is at a bound" for name in certificate["bounds_hit"]]
    if not certificate["converged"]:
        faults.append("not converged")
    if certificate["starts_agree"] < 3:
        faults.append("fewer than 3 starts agree")
    if is_singular(certificate):
        faults.append("the points do not determine all parameters")
    if len(points.loss) <= model.free:
        faults.append("as many parameters as points")
    return "; ".join(faults) or "ok"


def is_singular(certificate: Mapping[str, Any]) -> bool:
    """Whether the points do not determine all parameters, by a fit's certificate."""
    return (certificate["condition_number"] or 0) > SINGULAR


def _line(points: Points, per_arm: Sequence[str]) -> Line | None:
    """The line of ln D on ln N, where all points lie within COLLINEAR of it.

    Arms with amplitudes of their own have a height of their own: amplitudes absorb that an arm gets fewer tokens for
    each parameter at every size, so that this tells nothing of the exponents.
    """
    own = {"A", "B"} <= set(per_arm)
    arms = np.array(points.arm if own else (points.baseline,) * len(points.arm))
    logs = np.log([points.x["N"], points.x["D"]])
    middle = {str(arm): logs[:, arms == arm].mean(axis=1) for arm in np.unique(arms)}
    N, D = logs - np.stack([middle[arm] for arm in arms], axis=1)
    growth = float(N @ D / max(float(N @ N), 1e-300))
    if float(np.abs(D - growth * N).max()) > COLLINEAR:
        return None
    return Line(growth, {arm: middle[arm if own else points.baseline] for arm in dict.fromkeys(points.arm)})


class Model:
    """A law in the solver's parameters. Losses, N, D and C are divided by their geometric means, so that the fit does
    not depend on their units; a level is E, or the amplitude of a term at these means."""

    def __init__(
        self,
        points: Points,
        form: str,
        delta: float | None,
        per_arm: Sequence[str],
        hold: Mapping[str, float] | None = None,
    ) -> None:
        laws = FORMS[form]
        known = ["E", *(name for amplitude, exponent, _ in laws for name in (amplitude, exponent))]
        unknown = sorted({*per_arm} - {"E", *(name for form in FORMS.values() for law in form for name in law[:2])})
        if unknown:
            raise Refusal(f"no parameter {unknown[0]!r} to have for each arm; there are E, A, alpha, B, beta")
        arms = sorted(set(points.arm), key=lambda arm: (arm != points.baseline, arm))
        self.per_arm = tuple(name for name in known if name in per_arm) if len(arms) > 1 else ()
        for amplitude, exponent, _ in laws:
            if exponent in self.per_arm and amplitude not in self.per_arm:
                raise Refusal(f"{exponent} per arm needs {amplitude} per arm: a shared one would depend on the unit")
        self.form, self.laws, self.arms = form, laws, arms
        self.names = list(dict.fromkeys(_key(name, arm, self.per_arm) for name in known for arm in arms))
        self.levels = [i for i, name in enumerate(self.names) if name[0] in "EAB"]
        self.middle_loss = float(np.log(points.loss).mean())
        self.middle = {variable: float(np.log(points.x[variable]).mean()) for _, _, variable in laws}
        self.log_y = np.log(points.loss) - self.middle_loss

        def index(name: str) -> Indices:  # [n] for each point, the index in theta of its arm's parameter
            return np.array([self.names.index(_key(name, arm, self.per_arm)) for arm in points.arm])

        # For each term: the indices in theta of its level and of its exponent, and log x of the points. E is treated
        # as a term with x = 1.
        self.terms = [(index("E"), index(laws[0][1]), np.zeros(len(points.loss)))]
        self.terms += [(index(a), index(e), np.log(points.x[v]) - self.middle[v]) for a, e, v in laws]
        matrix = np.zeros((len(self.terms), len(self.names), len(points.loss)))
        each = np.arange(len(points.loss))
        for t, (level, power, log_x) in enumerate(self.terms):
            matrix[t, level, each] = 1
            matrix[t, power, each] -= log_x
        low = [LOG_LEVELS[0] if i in self.levels else EXPONENTS[0] for i in range(len(self.names))]
        high = [LOG_LEVELS[1] if i in self.levels else EXPONENTS[1] for i in range(len(self.names))]
        is_level = np.isin(np.arange(len(self.names)), self.levels)
        self.problem = Problem(matrix, np.array(low), np.array(high), is_level, Loss(delta))
        self._conditions: list[tuple[int, Floats, float]] = []
        for name, value in (hold or {}).items():
            self._hold(name, value, known, points)

    @property
    def free(self) -> int:
        """How many parameters are fitted."""
        return len(self.names) - len(self._conditions)

    def is_held(self, name: str) -> bool:
        return name in self.names and self.names.index(name) in [pivot for pivot, _, _ in self._conditions]

    def at_bound(self, theta: Floats) -> Bools:
        """Which of the fitted parameters [.., P] are at a bound of the search."""
        low, high = self.problem.low, self.problem.high
        return ((theta <= low) | (theta >= high)) & (low < high)

    def _hold(self, name: str, value: float, known: Sequence[str], points: Points) -> None:
        """Hold a raw value in every fit of this model; for all arms where `name` does not name one. Raises Refusal
        for an unknown name, and for a value outside the bounds."""
        kind = name.partition("[")[0]
        if kind not in known or (name != kind and name not in self.names):
            there_are = ", ".join(dict.fromkeys([*known, *self.names]))
            raise Refusal(f"no parameter {name!r} to hold; there are {there_are}")
        low, high = EXPONENTS if kind in ("alpha", "beta") else (0.0, math.inf)
        if kind == "E":  # a term of the law is positive, so that E is below every loss
            high = min(
                float(loss) for loss, arm in zip(points.loss, points.arm, strict=True) if name in (kind, f"E[{arm}]")
            )
        if not low < value < high:
            raise Refusal(f"{name} must be between {low:g} and {high:g} to be held; got {value:g}")
        for own in self.names:
            if own in (name, kind) or (name == kind and own.partition("[")[0] == kind):
                condition = self._condition(own, value)
                self.problem = self._held(*condition)
                self._conditions.append(condition)

    def holding(self, name: str, value: float) -> Problem:
        """The problem with one of the raw `values` held, E, A, alpha, B, beta, m (form c) or rho of an arm.

        A held value is a linear condition weights @ theta = total. It is used to eliminate one parameter, the pivot, in
        favour of the others; the pivot's entry of theta then holds the constant `total`.
        """
        return self._held(*self._condition(name, value))

    def _condition(self, name: str, value: float) -> tuple[int, Floats, float]:
        """The linear condition that holds a raw value: its pivot, weights [P] and total (see `holding`)."""
        kind, _, arm = name.removesuffix("]").partition("[")
        arm = arm or self.arms[0]
        weights = np.zeros(len(self.names))

        def place(parameter: str, arm: str) -> int:
            return self.names.index(_key(parameter, arm, self.per_arm))

        amplitudes = {a: (e, self.middle[v]) for a, e, v in self.laws}
        if kind in ("m", *(f"rho_{v}" for _, _, v in self.laws)):  # ln(A_baseline / A_arm) = alpha ln m
            amplitude, exponent, _ = next(law for law in self.laws if kind in ("m", f"rho_{law[2]}"))
            pivot, total = place(amplitude, arm), 0.0
            weights[[place(amplitude, self.arms[0]), place(exponent, arm)]] = -1.0, math.log(value)
        elif kind in amplitudes:
            exponent, middle = amplitudes[kind]
            pivot, total = place(kind, arm), math.log(value) - self.middle_loss
            weights[place(exponent, arm)] = middle
        else:
            pivot = place(kind, arm)
            total = value if pivot not in self.levels else math.log(value) - self.middle_loss
        for other, of_other, other_total in self._conditions:  # an eliminated pivot must not appear in a new one
            if weights[other]:
                total -= weights[other] * other_total
                weights = weights - weights[other] * (of_other + np.eye(len(weights))[other])
        return pivot, weights, total

    def _held(self, pivot: int, weights: Floats, total: float) -> Problem:
        terms = self.problem.terms - weights[:, None] * self.problem.terms[:, [pivot]]
        low, high = self.problem.low.copy(), self.problem.high.copy()
        low[pivot] = high[pivot] = total
        return replace(self.problem, terms=terms, low=low, high=high)

    def starts(self, count: int) -> Floats:
        """Starting points [at least count, P]: a grid of exponents, equal in all arms, with the levels that weighted
        linear least squares gives for them."""
        axis = np.geomspace(*GRID, max(2, math.ceil(count ** (1 / len(self.laws)))))
        grid = np.stack(np.meshgrid(*[axis] * len(self.laws), indexing="ij"), axis=-1).reshape(-1, len(self.laws))
        theta = np.zeros((len(grid), len(self.names)))
        for column, (_, exponent, _) in enumerate(self.laws):
            places = [i for i, name in enumerate(self.names) if name.partition("[")[0] == exponent]
            theta[:, places] = np.clip(grid[:, [column]], self.problem.low[places], self.problem.high[places])
        for part in np.array_split(np.arange(len(grid)), max(1, len(grid) // 500)):
            theta[part[:, None], self.levels] = self._solve_levels(theta[part])
        return np.clip(theta, self.problem.low, self.problem.high)

    def _solve_levels(self, theta: Floats) -> Floats:
        """Logs of the levels [K, levels] given the exponents in `theta`; levels that are not positive are replaced by a
        small positive one."""
        place = np.zeros(len(self.names), dtype=int)
        place[self.levels] = np.arange(len(self.levels))
        features = np.zeros((len(theta), len(self.levels), len(self.log_y)))
        weight = np.exp(-self.log_y)  # minimises relative residuals, which approximate log residuals
        for level, exponent, log_x in self.terms:
            features[:, place[level], np.arange(len(level))] = np.exp(-theta[:, exponent] * log_x) * weight
        gram = features @ features.transpose(0, 2, 1)
        gram += 1e-12 * np.eye(len(self.levels)) * np.trace(gram, axis1=1, axis2=2)[:, None, None]
        solved = np.linalg.solve(gram, features.sum(axis=2)[:, :, None])[:, :, 0]
        return np.log(np.maximum(solved, 1e-3))

    def raw(self, theta: Floats) -> dict[str, float]:
        """Parameters [P] in raw units of loss, N, D and C, by name."""
        theta = theta.copy()
        for pivot, weights, total in self._conditions:
            theta[pivot] = total - weights @ theta
        values = dict(zip(self.names, theta.tolist(), strict=True))
        for arm in self.arms:
            values[_key("E", arm, self.per_arm)] = self._level(theta, "E", arm)
            for amplitude, exponent, variable in self.laws:
                power = theta[self.names.index(_key(exponent, arm, self.per_arm))] * self.middle[variable]
                values[_key(amplitude, arm, self.per_arm)] = self._level(theta, amplitude, arm) * math.exp(power)
        for arm in self.arms[1:]:
            found = ratios(values, self.form, self.per_arm, arm, self.arms[0])
            values |= {f"{name}[{arm}]": value for name, value in found.items()}
        return values

    def _level(self, theta: Floats, name: str, arm: str) -> float:
        return math.exp(theta[self.names.index(_key(name, arm, self.per_arm))] + self.middle_loss)

    def raw_objective(self, value: float) -> float:
        """The objective in raw units: the sum of Huber's function of log residuals, or of squared raw residuals."""
        return value if self.problem.loss.delta is not None else 2 * value * math.exp(2 * self.middle_loss)

    def certificate(self, solution: Solution, best: int) -> dict[str, Any]:
        """Diagnostics by which a reader can judge the optimum: gradient, convergence, bounds that were reached, how
        many starts agree, the next best optimum, and the condition number."""
        theta, least = solution.theta[best], float(solution.objective[best])
        limit = least * (1 + SAME) + len(self.log_y) * ROUNDING**2
        others = solution.objective[(solution.objective > limit) & solution.converged]
        at_bound = self.at_bound(theta)
        held = at_bound | (self.problem.low >= self.problem.high)
        curvature = self.problem.curvature(theta[None], self.log_y)[0][np.ix_(~held, ~held)]
        unit = np.sqrt(np.diag(curvature))
        return {
            "gradient": float(solution.gradient[best]),
            "converged": bool(solution.converged[best]),
            "bounds_hit": [name for name, at in zip(self.names, at_bound, strict=True) if at],
            "starts_agree": int((solution.objective <= limit).sum()),
            "runner_up": self.raw_objective(float(others.min())) if len(others) else None,
            "condition_number": float(np.linalg.cond(curvature / np.outer(unit, unit))) if len(unit) else None,
        }
