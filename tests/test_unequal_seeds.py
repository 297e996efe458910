"""Arms whose learning rates were tried by unequal numbers of seeds, as where later seeds train the best rate alone."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis.laws.rates import at_best_rates
from experiments.cli.main import main

SIZES = 60  # simulated cells of each arm
SEEDS = 8
NOISE = 0.004  # nats, of a run
BEND = 0.02  # nats a squared e-fold
TRIED = {"base": 3, "arm": 5}  # learning rates, a factor of 2 apart


def two_stages(shared: float) -> pd.DataFrame:
    """The runs of SIZES sizes: seed 0 tries all rates, later seeds the best of these alone. `shared` is the share of
    the noise's variance that all rates and arms of a seed have in common. At the best rate all losses are 3."""
    random = np.random.default_rng(0)
    rows = []
    for size in range(SIZES):
        of_seed = math.sqrt(shared) * random.standard_normal(SEEDS)
        for arm, tried in TRIED.items():
            x = math.log(2) * (np.arange(tried) - (tried - 1) / 2)
            law = 3 + BEND * (x - 0.2 * random.standard_normal()) ** 2
            own = math.sqrt(1 - shared) * random.standard_normal((SEEDS, tried))
            loss = law + NOISE * (of_seed[:, None] + own)
            best = int(loss[0].argmin())
            runs = [(0, rate) for rate in range(tried)] + [(seed, best) for seed in range(1, SEEDS)]
            rows += [(arm, f"s{size}", seed, loss[seed, rate], math.exp(x[rate])) for seed, rate in runs]
    runs = pd.DataFrame(rows, columns=["arm", "_size", "seed", "loss", "train.learning_rate"])
    return runs.assign(size=runs["_size"], _budget="", flops_exact=1e15, run_id=runs.index.astype(str))


def test_a_choice_by_unequal_numbers_of_seeds_biases_no_difference() -> None:
    """A single seed that is lucky at another rate may beat the mean of eight, and is then compared alone. What is given
    back for that is more than the later seeds need, and alike in both arms (analysis/README.md)."""
    for shared in (0.0, 0.6):
        found, tuned = at_best_rates(two_stages(shared), "train.learning_rate", "flops_exact")
        assert min(item.runs for item in tuned) == (1, SEEDS)
        means = found.groupby(["arm", "_size"])["loss"].mean()
        for arm in TRIED:
            assert abs(means[arm].mean() - 3) < 0.35 * NOISE
        difference = means["base"] - means["arm"]
        assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(SIZES)


def lucky(path: Path) -> Path:
    """Eight seeds at the middle of three rates, one at the others, of which the arm's highest is best at the last size
    by its luck."""
    random = np.random.default_rng(4)
    rows = []
    for size, compute in enumerate(np.geomspace(1e16, 1e18, 4)):
        for arm, m in (("base", 1.0), ("arm", 1.3)):
            for seed in range(SEEDS):
                for rate in (0.001, 0.002, 0.004) if seed == 0 else (0.002,):
                    law = 1.7 + 1.2 * (m * compute / 1e17) ** -0.15
                    loss = law + BEND * math.log(rate / 0.002) ** 2 + 0.002 * random.standard_normal()
                    if (arm, size, rate) == ("arm", 3, 0.004):
                        loss = law - NOISE
                    rows.append((arm, f"s{size}", 10**6 * 4**size, compute, seed, rate, loss))
    columns = ["arm", "size", "N", "C", "seed", "learning_rate", "loss"]
    pd.DataFrame(rows, columns=columns).to_csv(path, index=False)
    return path


def test_the_reader_is_told_of_a_best_rate_with_few_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = str(lucky(tmp_path / "points.csv"))
    assert main(["table", store, "--baseline", "base"]) == 0
    out = capsys.readouterr().out
    assert "Paired at s0 x 8, s1 x 8, s2 x 8, s3 x 1." in out
    assert "Fewer runs at the best rate, which alone count, than at another rate: arm at s3 (1 of 8)." in out
    assert main(["fit", store, "--loss", "lsq", "--bootstrap", "0"]) == 0
    assert "than at another rate: arm at 64000000 (1 of 8)" in capsys.readouterr().err
