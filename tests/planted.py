"""Stores with a planted truth, written through RunLog itself; shared by the tests of the analysis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from analysis.runlog import RunLog, next_attempt, write_json

ABOUT = {"device": "cpu", "gpus": 0, "dtype": "float32", "torch": "2.13.0", "job_id": None}


def write_config(store: Path, arm: str = "transformer", size: str = "1M", seed: int = 0, **changes: Any) -> Path:
    """A run directory with its config.json, and nothing else yet."""
    config = {
        "schema": 1,
        "run_id": f"{arm}-{size}-{seed}",
        "sweep": "planted",
        "arm": arm,
        "size": size,
        "seed": seed,
        "baseline": "transformer",
        "parameters": 1_000_000,
        "parameters_nonembedding": 800_000,
        "tokens": 20_000_000,
        "flops_exact": 1.3e14,
        "flops_6nd": 1.2e14,
        "flops_6n_nonemb_d": 0.96e14,
        "config": {"model": {"d_model": 64}},
        "execution": {"device": "cpu"},
        "data_dir": "data",
        "data_sha256": "d" * 64,
        "tokenizer_sha256": "t" * 64,
        "code_commit": "c" * 40,
        "submitted_at": 0.0,
    } | changes
    run_dir = store / str(config["run_id"])
    run_dir.mkdir(parents=True)
    write_json(run_dir / "config.json", config)
    return run_dir


def write_run(run_dir: Path, loss: float, *, steps: int = 4, tokens: int = 20_000_000) -> None:
    """Log a whole run that ends at `loss` after `steps` steps of a hundredth of a second."""
    log = RunLog(run_dir, attempt=next_attempt(run_dir), first_step=1, about=ABOUT)
    for step in range(1, steps + 1):
        log.step(step, tokens * step // steps, loss + 1 / step, 1.0, 3e-4, 0.01)
    log.evaluation(steps, tokens, loss, loss / 3, 0.02)
    log.finish({})
