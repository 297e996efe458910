"""Stores with a planted truth, written through RunLog itself, and pairs; shared by the tests of the analysis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.advantage.clocks import Rates
from analysis.advantage.pairs import Pairs
from analysis.laws.solver import Floats
from analysis.logs.files import write_json
from analysis.logs.writer import RunLog, next_attempt

E, A, ALPHA, B, BETA = 1.69, 406.4, 0.34, 410.7, 0.28  # of L = E + A N^-ALPHA + B D^-BETA, for isoFLOP budgets
ABOUT = {
    "device": "cpu",
    "gpus": 0,
    "dtype": "float32",
    "torch": "2.13.0",
    "triton": None,
    "python": "3.12.3",
    "job_id": None,
    "code_commit": "c" * 40,
    "sharing": 1,
}


def write_config(store: Path, arm: str = "transformer", size: str = "1M", seed: int = 0, **changes: Any) -> Path:
    """A run directory with its config.json, and nothing else yet."""
    config = {
        "schema": 2,
        "run_id": f"{arm}-{size}-{seed}",
        "sweep": "planted",
        "arm": arm,
        "size": size,
        "budget": "20 tokens per parameter",
        "seed": seed,
        "baseline": "transformer",
        "task": "text",
        "trunk": None,
        "parameters": 1_000_000,
        "parameters_nonembedding": 800_000,
        "tokens": 20_000_000,
        "flops_exact": 1.3e14,
        "flops_6nd": 1.2e14,
        "flops_6n_nonemb_d": 0.96e14,
        "facts": {"conv.kind": "none", "attention.qk_norm": False, "attention.kv_heads": 2},
        "vary": {},
        "config": {},
        "execution": {"device": "cpu"},
        "data_dir": "data",
        "data_sha256": "d" * 64,
        "tokenizer_sha256": "t" * 64,
        "code_commit": "c" * 40,
        "submitted_at": 0.0,
    } | changes
    config = {  # without experts, unless the changes say otherwise
        "parameters_active": config["parameters"],
        "flops_6nactive_d": config["flops_6nd"],
    } | config
    run_dir = store / str(config["run_id"])
    run_dir.mkdir(parents=True)
    write_json(run_dir / "config.json", config)
    return run_dir


def write_run(
    run_dir: Path, loss: float, *, steps: int = 4, tokens: int = 20_000_000, gradient_norm: float = 1.0
) -> None:
    """Log a whole run that ends at `loss` after `steps` steps of a hundredth of a second, the last of which has the
    `gradient_norm`."""
    log = RunLog(run_dir, attempt=next_attempt(run_dir), first_step=1, about=ABOUT)
    for step in range(1, steps + 1):
        norm = gradient_norm if step == steps else 1.0
        log.step(step, tokens * step // steps, loss + 1 / step, norm, 3e-4, 0.01)
    log.evaluation(steps, tokens, "text", {"loss": loss, "bits_per_byte": loss / 3}, 0.02)
    log.finish({})


def write_sweep(
    store: Path,
    arms: dict[str, float],
    *,
    sizes: int = 5,
    seeds: int = 2,
    noise: float = 0.002,
    floor: float = 1.7,
    exponent: float = 0.1,
    random_seed: int = 0,
) -> Path:
    """A finished sweep in which each arm's true multiplier is arms[arm], the baseline being "transformer".

    L = floor + (m C / C_middle)^-exponent over two decades of C, plus noise of each run, and twice that shared by the
    arms and seeds of a size.
    """
    random = np.random.default_rng(random_seed)
    computes = np.geomspace(1e15, 1e17, sizes)
    for i, compute in enumerate(computes):
        shared = 2 * noise * random.standard_normal()
        for arm, m in {"transformer": 1.0, **arms}.items():
            for seed in range(seeds):
                loss = floor + (m * compute / 1e16) ** -exponent + shared + noise * random.standard_normal()
                flops = {"flops_exact": compute, "flops_6nd": 0.9 * compute, "flops_6n_nonemb_d": 0.8 * compute}
                parameters = round((compute / 120) ** 0.5)
                run_dir = write_config(
                    store, arm, f"s{i}", seed, parameters=parameters, tokens=20 * parameters, **flops
                )
                write_run(run_dir, float(loss), tokens=20 * parameters)
    return store


def best_size(compute: float) -> float:
    """arXiv 2203.15556, eq. 4: N* = G (C/6)^(beta / (alpha + beta)), G = (alpha A / beta B)^(1 / (alpha + beta))."""
    return float((ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA)) * (compute / 6) ** (BETA / (ALPHA + BETA)))


def write_budgets(path: Path, shifts: np.ndarray, noise: float = 0.0, seed: int = 0) -> Path:
    """Sizes at each budget around the optimum, moved by exp(shifts)."""
    random = np.random.default_rng(seed)
    rows = []
    for compute in (1e18, 1e19, 1e20, 1e21):
        for size in best_size(compute) * np.exp(shifts):
            tokens = compute / 6 / size
            loss = E + A * size**-ALPHA + B * tokens**-BETA + noise * random.standard_normal()
            rows.append({"N": size, "D": tokens, "C": compute, "loss": loss})
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def pairs_of(compute: Floats, y0: Floats, y1: Floats) -> Pairs:
    """One seed at each size, no clocks; equal compute of both arms."""
    sizes = len(compute)
    return Pairs(
        arm="dyn",
        baseline="base",
        convention="exact",
        sizes=tuple(f"s{i}" for i in range(sizes)),
        c0=compute,
        c1=compute,
        y0=y0,
        y1=y1,
        seeds=(1,) * sizes,
        differences=tuple(np.array([d]) for d in y0 - y1),
        rates=Rates(np.full(sizes, np.nan), np.full(sizes, np.nan), "", "none"),
        excluded=(),
    )


def write_points(points: pd.DataFrame, path: Path) -> Path:
    """The table in the form that the suffix names: .csv, .jsonl or .parquet."""
    if path.suffix == ".csv":
        points.to_csv(path, index=False)
    elif path.suffix == ".jsonl":
        points.to_json(path, orient="records", lines=True)
    else:
        points.to_parquet(path)
    return path


STUDY = Path(__file__).parents[1] / "experiments/sweeps/mini-scaling.toml"
STUDY_M = {
    "transformer": 1.0,
    "static-qkv": 1.25,
    "headwise-qkv": 1.28,
    "lowrank-qkv": 1.33,
    "lowrank-qkv-mismatched": 1.25,
    "lowrank-all": 1.6,
}
STUDY_BEST = {arm: 1.5 if arm == "headwise-qkv" else 2.0 if m == 1 else 3.0 for arm, m in STUDY_M.items()}
STUDY_SEED_NOISE = {"1M": 0.010, "3M": 0.004, "7M": 0.003, "11M": 0.0025, "16M": 0.002, "21M": 0.002}
FIRST_SEEDS = {"3M": 3, "11M": 1}  # those that try every rate
SEEDS_AFTER = {  # of each size after each session, as results/measured/README.md has them
    1: {"1M": 16, "3M": 3, "11M": 1},
    2: {"1M": 16, "3M": 3, "7M": 3, "11M": 1, "16M": 1, "21M": 1},
    3: {"1M": 16, "3M": 8, "7M": 3, "11M": 3, "16M": 2, "21M": 1},
    4: {"1M": 16, "3M": 8, "7M": 5, "11M": 3, "16M": 3, "21M": 2},
    5: {"1M": 16, "3M": 8, "7M": 5, "11M": 3, "16M": 3, "21M": 3},
}


def study(
    session: int = 5,
    *,
    m: dict[str, float] | None = None,
    slope: float = 0.0,
    noise: float = 1.0,
    scatter: float = 0.001,
    singles: dict[tuple[str, str], float] | None = None,
    random_seed: int = 0,
) -> pd.DataFrame:
    """The runs of the counted study (mini-scaling.toml) after a session, as a table of points with a planted truth.

    L = 1.7 + .39 (m C / 6.8e15)^-.3 + .02 ln(f / best)^2, plus `scatter` of an arm at a size and `noise` times
    STUDY_SEED_NOISE of each run; 6.8e15 FLOPs are the geometric middle. An arm's best factor is STUDY_BEST there and
    grows as C^slope. Later seeds of 3M and 11M have the best tried rate of the first ones alone, and 21M has no
    head-wise filters. `singles` are factors of sizes with one rate, in place of the file's.
    """
    from experiments.cli.plan import planned

    random = np.random.default_rng(random_seed)
    true_m = STUDY_M | (m or {})
    errors: dict[tuple[str, str], float] = {}
    rows = []
    for run in planned(STUDY):
        arm, size, seed, compute = run["arm"], run["size"], run["seed"], float(run["flops_exact"])
        error = errors.setdefault((arm, size), scatter * random.standard_normal())
        of_run = noise * STUDY_SEED_NOISE[size] * random.standard_normal()
        if seed >= SEEDS_AFTER[session].get(size, 0) or (arm, size) == ("headwise-qkv", "21M"):
            continue
        factor = (singles or {}).get((arm, size), float(run["vary"]["learning_rate_factor"]))
        off = np.log(factor / STUDY_BEST[arm]) - slope * np.log(compute / 6.8e15)
        loss = 1.7 + 0.39 * (true_m[arm] * compute / 6.8e15) ** -0.3 + 0.02 * off**2 + error + of_run
        names = ("run_id", "arm", "baseline", "size", "seed", "parameters", "tokens", "flops_exact")
        rate = run["learning_rate"] / run["vary"]["learning_rate_factor"] * factor
        rates = {"train.learning_rate": rate, "vary.learning_rate_factor": factor}
        rows.append({name: run[name] for name in names} | rates | {"loss": float(loss)})
    table = pd.DataFrame(rows)
    first = table[table["seed"] < table["size"].map(FIRST_SEEDS).fillna(99)]
    means = first.groupby(["arm", "size", "vary.learning_rate_factor"])["loss"].mean()
    best = {key: of_cell.idxmin()[2] for key, of_cell in means.groupby(["arm", "size"])}
    later = table["seed"] >= table["size"].map(FIRST_SEEDS).fillna(99)
    keys = zip(table["arm"], table["size"], table["vary.learning_rate_factor"], strict=True)
    kept = [
        not is_later or best[arm, size] == factor for is_later, (arm, size, factor) in zip(later, keys, strict=True)
    ]
    return table[kept].reset_index(drop=True)
