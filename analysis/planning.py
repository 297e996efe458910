"""Before a sweep is paid for: which advantage its sizes and seeds could resolve, by simulation of the estimator."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.paired import local_multipliers
from analysis.runlog import CONVENTIONS
from analysis.solver import Floats
from analysis.store import load

if TYPE_CHECKING:
    import pandas as pd

PLAN = "`dynconv plan SWEEP --format json`"
FEWEST_SIZES = 3
SIMULATIONS = 1000
POWER = 0.8
LN_M = np.log(np.array([1.01, 1.02, 1.03, 1.04, 1.05, 1.07, 1.1, 1.15, 1.2, 1.3, 1.5, 2.0]))


@dataclass(frozen=True)
class Ladder:
    """What a design would train: the baseline's FLOPs at each size, smallest first, and one arm's GPU hours."""

    sizes: tuple[str, ...]
    compute: Floats  # [S]
    gpu_hours: Floats  # [S] of one run; NaN where unknown


@dataclass(frozen=True)
class World:
    """The truth that is simulated. Losses in nats a token; standard deviations of the errors."""

    irreducible_loss: float = 1.7
    reducible_loss: float = 1.3  # at the geometric middle of the ladder's compute
    exponent: float = 0.15
    seed_noise: float = 0.002  # of each run
    arm_noise: float = 0.002  # of each arm at a size, which more seeds do not average out
    shared_noise: float = 0.005  # of a size, shared by the arms


@dataclass(frozen=True)
class Prospect:
    """What the first `sizes` of the ladder with `seeds` seeds would tell about one arm."""

    sizes: int
    seeds: int
    power: float  # chance to resolve the asked m
    smallest_m: float | None  # the least m resolved with 80% power, by interpolation; None beyond 2
    coverage: float  # of the 95% interval at the asked m
    half_width: float  # median, of the interval of ln m
    gpu_hours: float  # of both arms


def prospects(
    ladder: Ladder, m: float, seeds: Sequence[int], world: World, simulations: int = SIMULATIONS, seed: int = 0
) -> Iterator[Prospect]:
    """Each number of sizes from three, the cheap ones first, with each number of seeds."""
    if len(ladder.sizes) < FEWEST_SIZES:
        raise ValueError(f"a design needs {FEWEST_SIZES} sizes; got {len(ladder.sizes)}")
    if m <= 0 or m == 1:
        raise ValueError(f"--m must be positive and not 1; got {m}")
    for sizes in range(FEWEST_SIZES, len(ladder.sizes) + 1):
        for repeats in seeds:
            part = Ladder(ladder.sizes[:sizes], ladder.compute[:sizes], ladder.gpu_hours[:sizes])
            yield _prospect(part, m, repeats, world, simulations, seed)


def _prospect(ladder: Ladder, m: float, seeds: int, world: World, simulations: int, seed: int) -> Prospect:
    low, high = _simulate(ladder, np.log(m), seeds, world, simulations, seed)
    powers = []
    for ln_m in LN_M:
        ends = _simulate(ladder, ln_m, seeds, world, simulations, seed)
        powers.append(float((ends[0] > 0).mean()))
        if powers[-1] >= POWER:
            break
    smallest = np.exp(np.interp(POWER, powers, LN_M[: len(powers)])) if powers[-1] >= POWER else None
    return Prospect(
        sizes=len(ladder.sizes),
        seeds=seeds,
        power=float(((low > 0) | (high < 0)).mean()),
        smallest_m=None if smallest is None else float(smallest),
        coverage=float(((low < np.log(m)) & (np.log(m) < high)).mean()),
        half_width=float(np.median(high - low) / 2),
        gpu_hours=float(2 * seeds * ladder.gpu_hours.sum()),
    )


def _simulate(
    ladder: Ladder, ln_m: float, seeds: int, world: World, simulations: int, seed: int
) -> tuple[Floats, Floats]:
    """Ends of the interval of ln m in each simulated sweep."""
    random = np.random.default_rng(seed)
    compute = ladder.compute
    shape = (simulations, len(compute))
    reducible = world.reducible_loss * (compute / np.exp(np.log(compute).mean())) ** -world.exponent
    shared = world.shared_noise * random.standard_normal(shape)
    losses = []
    for factor in (1.0, np.exp(-world.exponent * ln_m)):
        own = world.arm_noise * random.standard_normal(shape)
        own += world.seed_noise / np.sqrt(seeds) * random.standard_normal(shape)
        losses.append(world.irreducible_loss + reducible * factor + shared + own)
    return local_multipliers(compute, compute, *losses).interval()


def read_ladder(path: Path, baseline: str | None, gpu_flops: float | None) -> Ladder:
    """The ladder of a plan (`dynconv plan SWEEP --format json`), a store or a table of points, by one of its arms.

    GPU hours are FLOPs over `gpu_flops` a second, else the plan's forecast or the store's measured train seconds.
    """
    import pandas as pd

    table = pd.DataFrame.from_records(_read_plan(path)) if path.suffix == ".json" else load(path).runs
    missing = [name for name in ("arm", "size") if name not in table or table[name].isna().any()]
    compute = next((name for name in CONVENTIONS.values() if name in table and table[name].notna().all()), None)
    if missing or compute is None:
        raise ValueError(f"{path} lacks {', '.join([*missing, *([] if compute else ['compute'])])} in some rows")
    arm = baseline or str(table["baseline"].dropna().iloc[0] if _any(table, "baseline") else table["arm"].iloc[0])
    rows = table[table["arm"] == arm]
    if rows.empty:
        raise ValueError(f"no arm {arm!r}; the arms are {', '.join(table['arm'].unique())}")
    if gpu_flops:
        hours = rows[compute] / gpu_flops / 3600
    elif _any(rows, "hours"):
        hours = rows["hours"] * rows["gpus"]
    elif _any(rows, "train_seconds") and _any(rows, "gpus"):
        hours = rows["train_seconds"] / 3600 * rows["gpus"]
    else:
        hours = rows[compute] * np.nan
    sizes = rows.assign(_hours=hours).groupby("size")[[compute, "_hours"]].mean().sort_values(compute)
    return Ladder(
        tuple(map(str, sizes.index)), sizes[compute].to_numpy(float), sizes["_hours"].astype(float).to_numpy()
    )


def _any(table: pd.DataFrame, name: str) -> bool:
    return name in table and bool(table[name].notna().any())


def _read_plan(path: Path) -> list[dict[str, Any]]:
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
