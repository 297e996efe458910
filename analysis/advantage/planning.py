"""Power analysis before a sweep is run: simulates which advantage its sizes and seeds could resolve.

Every simulated sweep is analysed as `multiplier.compare` would: the paired estimator, the bootstrap test that m is
constant, the switch to m at the largest compute where that test rejects, the interval of all the design's arms at once,
and the bound set by seed noise, below which no m counts as resolved.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.advantage.changing import reported
from analysis.advantage.constancy import SIGNIFICANCE, constancy_p
from analysis.advantage.family import LEVEL
from analysis.advantage.paired import changing_multipliers, local_multipliers, seed_noise
from analysis.advantage.pairs import size_key
from analysis.advantage.seeds import by_power
from analysis.laws.solver import Bools, Floats
from analysis.logs.schema import AXIS_PREFIX, CONVENTIONS, RUN_COLUMNS, TRUNK
from analysis.logs.selection import choose_convention

if TYPE_CHECKING:
    import pandas as pd

UNNAMED = "all"  # name of the arm in a table that names none
FEWEST_SIZES = 3
SIMULATIONS = 1000
RESAMPLES = 199  # of the bootstrap test that m is constant
POWER = 0.8  # the chance of resolving m at which a design counts as sufficient
LN_M = np.log(np.array([1.01, 1.02, 1.03, 1.04, 1.05, 1.07, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0]))


@dataclass(frozen=True)
class Ladder:
    """The sizes that a design would train, smallest first."""

    sizes: tuple[str, ...]
    compute: Floats  # [S] FLOPs of one run of the baseline
    gpu_hours: Floats  # [S] of one run; NaN if unknown
    seeds: tuple[int, ...] = ()  # [S] number of seeds at each size in the design
    seed_noise: tuple[float, ...] = ()  # [S] nats a token, of a run at each size, in place of World's

    def smallest(self, sizes: int) -> Ladder:
        """The design with only its smallest `sizes` sizes."""
        return Ladder(*(getattr(self, item.name)[:sizes] for item in fields(self)))


@dataclass(frozen=True)
class World:
    """The true law of a simulation, and the standard deviations of its errors; losses and errors in nats a token."""

    irreducible_loss: float = 1.7
    reducible_loss: float = 1.3  # at the geometric mean of the compute of all the ladder's sizes
    exponent: float = 0.15
    seed_noise: float | tuple[float, ...] = 0.002  # of each run, or of a run at each size
    arm_noise: float = 0.002  # of each arm at a size, which more seeds do not average out
    shared_noise: float = 0.005  # of a size, shared by the arms
    correlation: float = 0.0  # of the arm noise, and of the shared noise, between neighbouring sizes


@dataclass(frozen=True)
class Prospect:
    """The simulated result of a sweep over the smallest `sizes` of the ladder with `seeds` seeds, at a constant m."""

    sizes: int
    seeds: int | tuple[int, ...]  # at every size, or at each
    power: float  # chance of resolving the requested m, by the simultaneous interval of all arms
    smallest_m: float | None  # the smallest m resolved with 80% power, by interpolation; None above 2
    coverage: float  # how often the reported 95% interval contains the requested m
    half_width: float  # of the reported interval of ln m, median over simulations
    called_varying: float  # how often the test wrongly rejects that m is constant
    flops: float  # of both arms
    gpu_hours: float  # of both arms; NaN if unknown


def cheapest(found: Sequence[Prospect]) -> Prospect | None:
    """The design with the fewest GPU hours (FLOPs if hours are not known) among those that resolve the requested m with
    a power of at least POWER; None if there is none."""
    able = [item for item in found if item.power >= POWER]
    return min(able, key=lambda item: item.flops if np.isnan(item.gpu_hours) else item.gpu_hours, default=None)


def prospects(
    ladder: Ladder,
    m: float,
    seeds: Sequence[int | None],
    world: World,
    simulations: int = SIMULATIONS,
    seed: int = 0,
    arms: int = 1,
) -> Iterator[Prospect]:
    """Simulate designs: the smallest FEWEST_SIZES sizes, then one more size each time, each with every number of
    `seeds`, in which None stands for the seeds that each size of the ladder has.

    One arm is simulated. It is resolved as one of `arms` that are compared with the baseline (family.py). Raises
    ValueError for fewer than FEWEST_SIZES sizes, and for an m that is 1 or not positive.
    """
    if len(ladder.sizes) < FEWEST_SIZES:
        raise ValueError(f"a design needs {FEWEST_SIZES} sizes; got {len(ladder.sizes)}")
    if not 0 < m < np.inf or m == 1:
        raise ValueError(f"--m must be positive and not 1; got {m}")
    for sizes in range(FEWEST_SIZES, len(ladder.sizes) + 1):
        for repeats in seeds:
            part = ladder.smallest(sizes)
            # Keep the law: `reducible_loss` is given at the mean compute of all sizes, and is larger at that of fewer.
            reducible = world.reducible_loss * (middle(part.compute) / middle(ladder.compute)) ** -world.exponent
            yield _prospect(part, m, repeats, replace(world, reducible_loss=reducible), simulations, seed, arms)


def middle(compute: Floats) -> float:
    """The geometric mean of computes [S]."""
    return float(np.exp(np.log(compute).mean()))


def _prospect(
    ladder: Ladder, m: float, repeats: int | None, world: World, simulations: int, seed: int, arms: int
) -> Prospect:
    """Simulate one design with `repeats` seeds at every size, or with the ladder's own."""
    seeds = ladder.seeds if repeats is None else (repeats,) * len(ladder.sizes)
    world = replace(world, seed_noise=ladder.seed_noise or world.seed_noise)
    asked = Simulated(ladder.compute, np.log(m), seeds, world, simulations, seed)
    p = asked.constancy(np.ones(simulations, dtype=bool))
    _, low, high = reported(asked.local, p, asked.changing)

    def power(ln_m: float) -> float:
        return Simulated(ladder.compute, ln_m, seeds, world, simulations, seed).power(arms)

    return Prospect(
        sizes=len(ladder.sizes),
        seeds=repeats or seeds,
        power=float(asked.resolved(p, arms).mean()),
        smallest_m=_smallest(power),
        coverage=float(((low < np.log(m)) & (np.log(m) < high)).mean()),
        half_width=float(np.median(high - low) / 2),
        called_varying=float((p < SIGNIFICANCE).mean()),
        flops=float(2 * np.dot(seeds, ladder.compute)),
        gpu_hours=float(2 * np.dot(seeds, ladder.gpu_hours)),
    )


def _smallest(power: Callable[[float], float]) -> float | None:
    """The m whose power is POWER, interpolated between two of LN_M that bisection finds; None if the last of LN_M has
    less power. `power` is a function of ln m."""
    below, above = -1, len(LN_M) - 1
    powers = {-1: 0.0, above: power(LN_M[above])}
    if powers[above] < POWER:
        return None
    while above - below > 1:
        middle = (below + above) // 2
        powers[middle] = power(LN_M[middle])
        below, above = (middle, above) if powers[middle] < POWER else (below, middle)
    ends = (LN_M[below] if below >= 0 else 0.0), LN_M[above]
    return float(np.exp(np.interp(POWER, (powers[below], powers[above]), ends)))


class Simulated:
    """K simulated sweeps with a constant ln m, and the paired estimates from them."""

    def __init__(
        self,
        compute: Floats,
        ln_m: float,
        seeds: int | Sequence[int],  # at every size, or at each
        world: World,
        simulations: int,
        seed: int,
    ) -> None:
        repeats, noise = (np.broadcast_to(each, len(compute)).astype(float) for each in (seeds, world.seed_noise))
        random = np.random.default_rng(seed)
        shape = (simulations, len(compute))
        reducible = world.reducible_loss * (compute / middle(compute)) ** -world.exponent
        shared = world.shared_noise * in_order(random.standard_normal(shape), world.correlation)
        losses = []
        for factor in (1.0, np.exp(-world.exponent * ln_m)):
            own = world.arm_noise * in_order(random.standard_normal(shape), world.correlation)
            own += noise / np.sqrt(repeats) * random.standard_normal(shape)
            losses.append(world.irreducible_loss + reducible * factor + shared + own)
        self.compute, self.losses, self.seed = compute, losses, seed
        dof = repeats - 1
        squares = 2 * noise**2 * 2 * random.standard_gamma(dof / 2, shape)  # chi-squared; 0 without repeated seeds
        self.noise = by_power(compute, squares, repeats, dof)
        self.local = local_multipliers(compute, compute, losses[0], losses[1], noise=self.noise)
        self.changing = changing_multipliers(self.local)
        least = seed_noise(self.local)
        self.noise_floor = np.zeros(simulations) if least is None else least  # [K] the smallest |ln m| above seed noise

    def constancy(self, asked: Bools) -> Floats:
        """p-value [K] of the test that m is constant; 1 where the mask `asked` [K] is false. A p above SIGNIFICANCE is
        only a lower bound, since resampling stops once the test cannot reject any more."""
        y0, y1 = (losses[asked] for losses in self.losses)
        p = np.ones(len(asked))
        noise = self.noise and self.noise.of_rows(asked)
        p[asked] = constancy_p(
            self.compute, self.compute, y0, y1, RESAMPLES, self.seed, until=SIGNIFICANCE, noise=noise
        )
        return p

    def resolved(self, p: Floats, arms: int = 1) -> Bools:
        """Whether the simultaneous interval of `arms` arms excludes 1 and m exceeds the bound set by seed noise [K]."""
        ln_m, low, high = reported(self.local, p, self.changing, level=LEVEL / arms)
        return ((low > 0) | (high < 0)) & (np.abs(ln_m) >= self.noise_floor)

    def power(self, arms: int = 1) -> float:
        """The share of sweeps that resolve m. The interval hardly depends on the test of constancy, so this slow test
        is run only where the interval excludes 1; it then decides which m is compared with the seed noise."""
        _, low, high = reported(self.local, np.ones(len(self.noise_floor)), self.changing, level=LEVEL / arms)
        return float(self.resolved(self.constancy((low > 0) | (high < 0)), arms).mean())


def in_order(errors: Floats, correlation: float) -> Floats:
    """Independent normal errors [..., S] turned into a first-order autoregression over sizes of the same variance."""
    found = errors.copy()
    for i in range(1, errors.shape[-1]):
        found[..., i] = correlation * found[..., i - 1] + np.sqrt(1 - correlation**2) * errors[..., i]
    return found


def _as_finished(table: pd.DataFrame) -> pd.DataFrame:
    """Planned runs as a table of finished runs with all its columns, without trunks, which branches include."""
    import pandas as pd

    table = table.assign(**{name: None for name in ("run_id", *RUN_COLUMNS) if name not in table})
    table = table[table["budget"].astype("string").ne(TRUNK).fillna(True)]
    return table.assign(
        arm=table["arm"].fillna(UNNAMED), run_id=table["run_id"].fillna("a run"), status="complete"
    ).set_axis(pd.RangeIndex(len(table)))


def _in_every_arm(rows: pd.DataFrame) -> pd.Series[bool]:
    """For each row of `_as_finished`, whether every arm has its size and seed."""
    cells = rows.assign(_size=size_key(rows), _seed=rows["seed"].astype("Float64").fillna(-1.0))
    return cells.groupby(["_size", "_seed"])["arm"].transform("nunique") == cells["arm"].nunique()


def unpaired(table: pd.DataFrame) -> str | None:
    """A line on the sizes and seeds that do not count because some arm lacks them; None if there are none."""
    rows = _as_finished(table)
    shared, sizes = _in_every_arm(rows), size_key(rows)
    if shared.all():
        return None
    kept = set(sizes[shared])
    at = [f"{size}{'' if size not in kept else ' (some seeds)'}" for size in dict.fromkeys(sizes[~shared])]
    return f"only sizes and seeds that every arm has count, so without {', '.join(at)}; --where chooses arms"


def whole_cost(table: pd.DataFrame) -> str | None:
    """A line on the cost of all runs of a design, if an arm has several of a size and seed, for example at other
    learning rates; else None."""
    rows = _as_finished(table)
    if not rows[rows["seed"].notna()].assign(_size=size_key(rows)).duplicated(["arm", "_size", "seed"]).any():
        return None
    total = rows[CONVENTIONS[choose_convention(rows)]].sum()
    return (
        "FLOPs and GPU hours above are of two arms with one run for each size and seed, at the best rate alone: "
        f"all {len(rows)} runs of this design take {total:.3e} FLOPs"
    )


def ladder_of(table: pd.DataFrame, baseline: str | None = None, gpu_flops: float | None = None) -> Ladder:
    """The ladder of planned or finished runs, taken from the arm `baseline`, or else from the sweep's baseline, at the
    sizes and seeds that every arm has, since only these are paired.

    GPU hours are FLOPs over `gpu_flops` (FLOPs a second) if given, else the plan's forecast, else the measured train
    seconds. Raises ValueError for an unknown arm, for a named arm without another, and for sizes with several budgets.
    """
    table = _as_finished(table)
    column = CONVENTIONS[choose_convention(table)]
    arms = list(dict.fromkeys(table["arm"]))
    named = table["baseline"].dropna().unique()
    arm = baseline or (str(named[0]) if len(named) else arms[0])
    if arm not in arms:
        raise ValueError(f"no arm {arm!r}; the arms are {', '.join(arms)}")
    rows = table[table["arm"] == arm]
    budgets = rows.groupby(size_key(rows))["budget"].nunique()
    if (budgets > 1).any():
        several = sorted(rows["budget"].dropna().unique())
        raise ValueError(
            f"power simulates one budget a size; the design has {', '.join(several)}; give a design with one of them"
        )
    if arms == [arm] and arm != UNNAMED:
        raise ValueError(f"power is that of a comparison, and {arm} is the only arm; give a design of two or more")
    rows = rows[_in_every_arm(table)[rows.index]]
    if rows.empty:
        raise ValueError(
            f"no size and seed is in every arm ({', '.join(arms)}); choose arms that are paired by --where"
        )
    if gpu_flops:
        hours = rows[column] / gpu_flops / 3600
    elif _any(rows, "hours"):
        hours = rows["hours"] * rows["gpus"]
    elif _any(rows, "train_seconds") and _any(rows, "gpus"):
        hours = rows["train_seconds"] / 3600 * rows["gpus"]
    else:
        hours = rows[column] * np.nan
    groups = rows.assign(_hours=hours, _size=size_key(rows)).groupby("_size")
    sizes = groups[[column, "_hours"]].mean().assign(_seeds=groups["seed"].nunique().clip(lower=1))
    sizes = sizes.sort_values(column)
    return Ladder(
        tuple(map(str, sizes.index)),
        sizes[column].to_numpy(float),
        sizes["_hours"].astype(float).to_numpy(),
        tuple(map(int, sizes["_seeds"])),
    )


def _any(table: pd.DataFrame, name: str) -> bool:
    """Whether the table has a value in this column."""
    return name in table and bool(table[name].notna().any())


def plan_table(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows of `dynconv plan SWEEP --format json` as a table, with a column vary.AXIS for each axis of the sweep."""
    import pandas as pd

    axes = [{f"{AXIS_PREFIX}{axis}": value for axis, value in (row.get("vary") or {}).items()} for row in rows]
    return pd.DataFrame.from_records([{**row, **own} for row, own in zip(rows, axes, strict=True)])


def read_plan(path: Path) -> list[dict[str, Any]]:
    """The rows in a file that `dynconv plan SWEEP --format json` printed. Raises ValueError for any other file."""
    try:
        plan = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is unreadable ({error}); give what `dynconv plan SWEEP --format json` prints"
        ) from None
    if not (isinstance(plan, list) and plan and all(isinstance(run, dict) for run in plan)):
        raise ValueError(
            f"{path} is no plan: it must hold a list of runs, as `dynconv plan SWEEP --format json` prints"
        )
    return plan
