"""The multiplier: planted ones come back, intervals cover as often as they say, and what is doubtful is said."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import pairs_of

from analysis.advantage.answers import Multiplier
from analysis.advantage.changing import reported
from analysis.advantage.clocks import Rates
from analysis.advantage.constancy import constancy_p
from analysis.advantage.joint import joint_interval, wild_cluster_interval
from analysis.advantage.multiplier import compare
from analysis.advantage.paired import changing_multipliers, local_multipliers, trend
from analysis.laws.solver import Floats
from analysis.pages.glance import compute_verdict, glance
from experiments.cli.main import main

TOP = 1e21
EXPONENT = 0.15


def simulate(
    count: int,
    sizes: int,
    seeds: int,
    m: float,
    *,
    change: float = 0.0,
    span: float = 100.0,
    noise: float = 0.002,
    random_seed: int = 0,
) -> tuple[Floats, Floats, Floats, Floats]:
    """Compute [S], baseline and arm losses [count, S] of seed means, and the true m [S].

    The design that `dynconv power` assumes: noise of each run .002, of each arm at a size .002, shared by the arms of
    a size .005; reducible loss 1.3 half-way, exponent .15, E = 1.7. m changes with compute as C^change.
    """
    random = np.random.default_rng(random_seed)
    compute = np.geomspace(TOP / span, TOP, sizes)
    middle = math.sqrt(compute[0] * compute[-1])
    true_m = m * (compute / middle) ** change
    reducible = 1.3 * (compute / middle) ** -EXPONENT
    shared = 2.5 * noise * random.standard_normal((count, sizes))

    def losses(factor: Floats | float) -> Floats:
        own = random.standard_normal((count, sizes)) + random.standard_normal((count, sizes, seeds)).mean(axis=2)
        result: Floats = 1.7 + reducible * factor + shared + noise * own
        return result

    return compute, losses(1.0), losses(true_m**-EXPONENT), true_m


def answer(m: float, sizes: int = 5, noise: float = 0.0005, change: float = 0.0) -> Multiplier:
    compute, y0, y1, _ = simulate(1, sizes, 1, m, noise=noise, change=change, random_seed=1)
    return compare(pairs_of(compute, y0[0], y1[0]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    m=st.floats(0.4, 4.0),
    floor=st.floats(0.0, 3.0),
    exponent=st.floats(0.03, 0.5),
    sizes=st.integers(3, 7),
    span=st.floats(30.0, 3000.0),
    mismatch=st.floats(0.8, 1.25),
)
def test_any_planted_multiplier_comes_back(
    m: float, floor: float, exponent: float, sizes: int, span: float, mismatch: float
) -> None:
    """Without noise; the arm's compute may differ from the baseline's."""
    c0 = np.geomspace(1e18, 1e18 * span, sizes)
    c1 = c0 * mismatch
    y0 = floor + (c0 / 1e19) ** -exponent
    y1 = floor + (m * c1 / 1e19) ** -exponent
    local = local_multipliers(c0, c1, y0[None], y1[None])
    assert local.mean[0] == pytest.approx(math.log(m), abs=2e-3)
    assert math.exp(local.ln_m[0, -1]) == pytest.approx(m, rel=5e-3)


@pytest.mark.parametrize("sizes", [4, 5, 6])
@pytest.mark.parametrize("seeds", [1, 3])
def test_the_headline_interval_covers_as_often_as_it_says(sizes: int, seeds: int) -> None:
    """6,000 designs: the share is known to .003, the bar is .93 to .97."""
    for m in (1.05, 1.33, 2.0):
        compute, y0, y1, _ = simulate(6000, sizes, seeds, m)
        local = local_multipliers(compute, compute, y0, y1)
        low, high = local.interval()
        covered = float(((low < math.log(m)) & (math.log(m) < high)).mean())
        print(f"m {m}, {sizes} sizes, {seeds} seeds: coverage {covered:.3f}, sd of ln m {local.mean.std():.4f}")
        assert 0.93 <= covered <= 0.97
        assert abs(local.mean.mean() - math.log(m)) < 0.1 * local.mean.std()


def _reported(compute: Floats, y0: Floats, y1: Floats, p: Floats) -> tuple[Floats, Floats, Floats]:
    local = local_multipliers(compute, compute, y0, y1)
    return reported(local, p, changing_multipliers(local))


@pytest.mark.parametrize(("sizes", "change"), [(4, 0.05), (5, 0.1), (5, 0.2), (6, -0.1), (6, 0.05)])
def test_the_interval_at_the_largest_compute_covers_a_changing_m(sizes: int, change: float) -> None:
    """2,000 designs. By the law of a constant m, five sizes cover .89 and .60 of the two stronger changes."""
    compute, y0, y1, true_m = simulate(2000, sizes, 3, 1.33, change=change)
    changing = changing_multipliers(local_multipliers(compute, compute, y0, y1))
    ln_m, low, high = trend(changing, compute[-1]).estimate()
    true = math.log(true_m[-1])
    covered = float(((low < true) & (true < high)).mean())
    print(f"{sizes} sizes, change {change}: coverage {covered:.3f}, bias {ln_m.mean() - true:.4f}")
    assert 0.93 <= covered <= 0.985
    assert ln_m.mean() == pytest.approx(true, abs=0.003)


@pytest.mark.slow
@pytest.mark.parametrize(("m", "span"), [(1.33, 100.0), (1.33, 1000.0), (2.0, 100.0)])
def test_the_constancy_test_has_its_size_and_power(m: float, span: float) -> None:
    """400 designs: 5% is seen as 2.5% to 8% with probability .99. The change of m from 0.79 to 1.26 of itself over
    two decades must be seen in most."""

    def rejected(change: float) -> float:
        compute, y0, y1, _ = simulate(400, 5, 3, m, change=change, span=span)
        return float(np.mean(constancy_p(compute, compute, y0, y1, 199, 0, until=0.05) < 0.05))

    size, power = rejected(0.0), rejected(0.1)
    print(f"m {m}, {span:.0f}x: size {size:.3f}, power {power:.3f}")
    assert 0.015 <= size <= 0.085
    assert power > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [4, 5, 6])
@pytest.mark.parametrize("m", [1.05, 2.0])
def test_the_reported_interval_covers_after_the_constancy_test_has_chosen(sizes: int, m: float) -> None:
    """What a reader takes away: 1,500 designs with a constant m. The interval covers more of these than it says, since
    it is for m at the largest compute where m may change, too (tests/test_constancy.py)."""
    compute, y0, y1, _ = simulate(1500, sizes, 2, m)
    p = constancy_p(compute, compute, y0, y1, 199, 0, until=0.05)
    _, low, high = _reported(compute, y0, y1, p)
    covered = float(((low < math.log(m)) & (math.log(m) < high)).mean())
    print(f"m {m}, {sizes} sizes: coverage of the reported interval {covered:.3f}, varying {(p < 0.05).mean():.3f}")
    assert covered >= 0.93


@pytest.mark.parametrize("sizes", [4, 5])
def test_an_m_that_clearly_changes_is_resolved_at_the_largest_compute(sizes: int) -> None:
    """200 designs of an m that doubles, 0.94 to 1.88. With the interval of a constant m, which spans the change, in the
    reported one, none would be told from 1."""
    compute, y0, y1, _ = simulate(200, sizes, 3, 1.33, change=0.1, span=1000.0)
    p = constancy_p(compute, compute, y0, y1, 199, 0, until=0.05)
    _, low, _ = _reported(compute, y0, y1, p)
    print(f"{sizes} sizes: resolved {(low > 0).mean():.3f}")
    assert (low > 0).mean() > 0.8


def test_a_p_that_is_not_needed_is_not_drawn_to_its_end() -> None:
    compute, y0, y1, _ = simulate(200, 5, 2, 1.33)
    whole = constancy_p(compute, compute, y0, y1, 199, 0)
    early = constancy_p(compute, compute, y0, y1, 199, 0, until=0.05)
    assert early.max() < 0.2 < whole.max()
    assert np.mean((early < 0.05) == (whole < 0.05)) > 0.95  # by other draws of the same noise


@pytest.mark.parametrize(("sizes", "expected"), [(4, 0.967), (5, 0.935), (6, 0.95)])
def test_the_wild_cluster_interval_covers_as_documented(sizes: int, expected: float) -> None:
    """400 designs: within .03 of what 1,500 gave, with probability .99; without the restriction it is .905 at four."""
    compute, y0, y1, _ = simulate(400, sizes, 2, 1.33)
    found = [wild_cluster_interval(local_multipliers(compute, compute, y0[[k]], y1[[k]])) for k in range(400)]
    covered = float(np.mean([low < 1.33 < high for low, high in found]))
    print(f"{sizes} sizes: wild cluster coverage {covered:.3f}")
    assert covered == pytest.approx(expected, abs=0.03)


def test_the_joint_interval_covers_more_than_it_says() -> None:
    """150 designs. It ignores the pairing and is wide, which is why it is not the headline."""
    compute, y0, y1, _ = simulate(150, 5, 3, 1.33)
    found = [joint_interval(pairs_of(compute, a, b))[1] for a, b in zip(y0, y1, strict=True)]
    assert np.mean([ci is not None and ci[0] < 1.33 < ci[1] for ci in found]) > 0.95


def test_the_checks_of_few_sizes_are_warned_about() -> None:
    assert "4 sizes: few for the wild cluster interval" in answer(1.33, sizes=4).status
    assert "few for" not in answer(1.33, sizes=5).status
    exact = np.geomspace(TOP / 100, TOP, 3)
    y0, y1 = (1.7 + (m * exact / 1e20) ** -0.15 for m in (1.0, 1.33))
    wild = compare(pairs_of(exact, y0, y1)).wild_cluster
    assert wild == pytest.approx((1.33, 1.33), rel=1e-3)


def test_arms_that_no_compute_makes_equal_get_a_finite_number_and_a_remark() -> None:
    compute = np.geomspace(1e18, 1e20, 4)
    y0 = 1.7 + (compute / 1e19) ** -0.1
    found = compare(pairs_of(compute, y0, y0 - 1.2), resamples=19)
    assert math.isfinite(found.m)
    assert "extrapolated: more than 10x apart" in found.status
    assert found.joint is not None
    assert found.joint.m == math.inf


@pytest.mark.parametrize("growth", [0.0, 0.1])
def test_losses_that_do_not_fall_show_no_multiplier(growth: float) -> None:
    compute = np.geomspace(1e18, 1e20, 4)
    y0 = 3 + growth * np.log10(compute / 1e18)
    found = compare(pairs_of(compute, y0, y0 - 0.001 * growth), resamples=19)
    assert found.status.startswith("not resolved: the exponent is at its bound (0.005)")
    assert found.joint is None  # every m fits them alike


def test_equal_arms_are_not_resolved() -> None:
    """Of 1,000 equal pairs about 5% may look resolved, and fewer where a changing m is seen in them."""
    compute, y0, y1, _ = simulate(1000, 5, 1, 1.0)
    p = constancy_p(compute, compute, y0, y1, 199, 0, until=0.05)
    _, low, high = _reported(compute, y0, y1, p)
    apart = (low > 0) | (high < 0)
    print(f"equal arms resolved: {apart.mean():.3f}")
    assert 0.02 < apart.mean() < 0.07
    for k in np.flatnonzero(~apart & (p >= 0.05))[:5]:
        assert compare(pairs_of(compute, y0[k], y1[k]), resamples=19).status.startswith("not resolved: the interval")


@pytest.mark.parametrize("sizes", [3, 5])
def test_arms_with_the_same_losses_are_not_resolved(sizes: int) -> None:
    """As of an arm that is a copy of the baseline: without any variance, the interval is m itself."""
    compute, y0, _, _ = simulate(1, sizes, 1, 1.0)
    found = compare(pairs_of(compute, y0[0], y0[0]), resamples=19)
    assert (found.m, found.ci, found.m_at_cmax_ci) == (1.0, (1.0, 1.0), (1.0, 1.0))
    assert found.status.startswith("not resolved: the interval holds 1")
    assert compute_verdict(found).kind == "open"
    remark = replace(found, status=f"{found.status}; m is not shown to be constant; errors go together")
    assert "m is not shown to be constant. Errors go together. " in glance([remark], ["there"])


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_units_of_loss_and_compute_do_not_matter(scale: float) -> None:
    compute, y0, y1, _ = simulate(1, 5, 1, 1.33)
    plain = compare(pairs_of(compute, y0[0], y1[0]), resamples=99)
    for pairs in (pairs_of(compute, scale * y0[0], scale * y1[0]), pairs_of(scale * compute, y0[0], y1[0])):
        found = compare(pairs, resamples=99)
        assert found.ci is not None
        assert plain.ci is not None
        assert (found.m, *found.ci) == pytest.approx((plain.m, *plain.ci), rel=1e-6)
        assert found.constant_m_p == pytest.approx(plain.constant_m_p, abs=0.011)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(losses=st.lists(st.floats(0.01, 20), min_size=4, max_size=12), span=st.floats(1.01, 1e4))
def test_any_losses_get_a_number_and_an_interval_around_it(losses: list[float], span: float) -> None:
    sizes = len(losses) // 2
    compute = np.geomspace(1e18, 1e18 * span, sizes)
    found = compare(pairs_of(compute, np.array(losses[:sizes]), np.array(losses[sizes : 2 * sizes])), resamples=19)
    assert found.ci is not None
    assert all(map(math.isfinite, (found.m, found.m_at_cmax, *found.ci)))
    assert found.ci[0] <= found.m <= found.ci[1]


HEADER = "arm,size,seed,C,N,D,loss,data,status"
ROWS = [f"{arm},s{i},0,{10**i}e18,,,{3 - i / 4 - 0.05 * (arm == 'b')},x,complete" for i in range(4) for arm in "ab"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({3: "b,s1,0,,,,2.7,x,complete"}, "compute must be positive; got nan in row 4"),
        ({3: "b,s1,0,1e19,,,2.7,,complete"}, "the runs mix data (unknown: row 4; x: row 1, row 2, row 3, row 5"),
        ({3: "b,s1,0,1e19,,,2.7,y,complete"}, "the runs mix data"),
        ({3: "b,s1,0,1e19,,,inf,x,complete"}, "loss must be positive; got inf in row 4"),
        ({3: "b,s1,0,1e19,,,-1,x,complete"}, "loss must be positive; got -1.0 in row 4"),
        ({k: row.replace("complete", "failed") for k, row in enumerate(ROWS)}, "status complete; got failed"),
        ({k: row.replace("complete", "") for k, row in enumerate(ROWS)}, "status complete; got no status"),
    ],
)
@pytest.mark.parametrize("verb", ["table", "fit"])
def test_rows_that_spoil_a_table_are_named(
    verb: str, changes: dict[int, str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [changes.get(k, row) for k, row in enumerate(ROWS)]
    (tmp_path / "p.csv").write_text("\n".join([HEADER, *rows]))
    assert main([verb, str(tmp_path / "p.csv"), "--baseline", "a"]) == 2
    assert message in capsys.readouterr().err


def test_a_clear_advantage_is_ok_and_its_checks_agree() -> None:
    found = answer(1.33)
    assert found.status == "ok"
    assert found.ci is not None
    assert found.loso is not None
    assert found.wild_cluster is not None
    assert found.joint is not None
    assert found.joint.ci is not None
    assert found.aicc is not None
    assert found.ci[0] < 1.33 < found.ci[1]
    assert found.ci[1] / found.ci[0] < 1.1
    assert found.loso[0] <= found.m <= found.loso[1]
    assert found.joint.ci[0] < 1.33 < found.joint.ci[1]
    assert found.joint.m == pytest.approx(found.m, rel=0.02)
    assert found.wild_cluster[0] < 1.33 < found.wild_cluster[1]
    assert min(found.aicc, key=found.aicc.__getitem__) == "shared"
    assert found.constant_m_p is not None
    assert found.constant_m_p > 0.05


def test_a_changing_m_is_flagged_and_reported_at_the_largest_compute() -> None:
    found = answer(1.33, sizes=6, change=0.1, noise=0.002)
    true_top = 1.33 * 10**0.1
    assert found.constant_m_p is not None
    assert found.constant_m_p < 0.05
    assert "not constant" in found.status
    assert found.method == "paired, at the largest compute"
    assert found.m == found.m_at_cmax == pytest.approx(true_top, rel=0.05)
    assert found.ci is not None
    assert found.ci[0] < true_top < found.ci[1]
    assert found.curve[0].m < found.curve[-1].m
    assert found.loso is not None
    assert found.loso[0] < found.m < found.loso[1] < 1.1 * found.m  # of m at the largest compute as well
    unmoved = next(row["m"] for row in found.irreducible_loss_sensitivity if row["E"] == found.irreducible_loss)
    assert unmoved == pytest.approx(found.m, rel=1e-3)
    assert found.curve[-1].compute == pytest.approx(10 * TOP)


def test_dropping_the_irreducible_loss_shows_in_the_irreducible_loss_sensitivity() -> None:
    """With E moved to 0 the local multipliers no longer agree, and the top one is too low: 1.23 for a true 1.33."""
    compute = np.geomspace(TOP / 1000, TOP, 5)
    y0, y1 = (1.7 + (m * compute / 1e20) ** -0.07 for m in (1.0, 1.33))
    found = compare(pairs_of(compute, y0, y1))
    assert found.irreducible_loss == pytest.approx(1.7, abs=1e-3)
    assert found.m == pytest.approx(1.33, rel=1e-3)
    stated = {round(row["E"], 2): row["m"] for row in found.irreducible_loss_sensitivity}
    assert stated[1.7] == pytest.approx(1.33, rel=1e-3)
    local = local_multipliers(compute, compute, y0[None], y1[None], irreducible_loss=0.0)
    assert math.exp(local.ln_m[0, -1]) < 1.3


def test_two_sizes_get_a_number_and_a_warning() -> None:
    found = answer(1.33, sizes=2)
    assert (found.constant_m_p, found.loso, found.joint, found.aicc) == (None, None, None, None)
    assert found.status.startswith("not resolved")
    assert "E = 0 assumed" in found.status
    compute, y0, y1, _ = simulate(1, 2, 1, 1.33, noise=0.0)
    stated = compare(pairs_of(compute, y0[0], y1[0]), irreducible_losses=[1.7])
    assert stated.m == pytest.approx(1.33, rel=1e-6)
    assert "E = 0" not in stated.status


def test_a_row_without_a_status_is_left_out_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row.replace("complete", "") if k == 0 else row for k, row in enumerate(ROWS)]
    (tmp_path / "p.csv").write_text("\n".join([HEADER, *rows]))
    assert main(["table", str(tmp_path / "p.csv"), "--baseline", "a", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["n_sizes"] == 3
    assert {"run_id": "row 1", "arm": "a", "reason": "no status"} in found["excluded"]


def test_a_column_has_one_source(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", "p.csv", "--columns", "loss=a,loss=b"]) == 2
    assert "--columns names two columns for loss; give one" in capsys.readouterr().err


@pytest.mark.parametrize("held", ["2.45", "-1", "nan"])
def test_a_held_irreducible_loss_must_be_below_every_loss(
    held: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an arm with one size too, whose exponent comes from the baseline's sizes."""
    (tmp_path / "p.csv").write_text("arm,size,C,loss\na,s,1e18,3\na,l,1e20,2.4\nb,s,1e18,2.9")
    assert main(["table", str(tmp_path / "p.csv"), "--baseline", "a", "--hold", f"E={held}"]) == 2
    assert f"below every loss (2.4); got {held}" in capsys.readouterr().err


def test_one_size_is_refused() -> None:
    with pytest.raises(ValueError, match="1 paired size with base; an interval needs at least two"):
        answer(1.33, sizes=1)


def test_seed_noise_hides_a_small_advantage() -> None:
    """Local values that agree by luck, from seeds that do not: the spread over sizes alone would call it resolved."""
    compute = np.geomspace(TOP / 100, TOP, 5)
    y0, y1 = (1.7 + (m * compute / 1e20) ** -0.07 for m in (1.0, 1.02))
    quiet = pairs_of(compute, y0, y1)
    noisy = replace(quiet, seeds=(2,) * 5, differences=tuple(d + np.array([-0.01, 0.01]) for d in y0 - y1))
    assert compare(quiet).status == "ok"
    found = compare(noisy)
    assert found.noise_floor is not None
    assert found.noise_floor > 1.02
    assert found.status.startswith("not resolved: smaller than the seed noise")


def test_wall_clock_is_m_times_relative_throughput() -> None:
    compute, y0, y1, _ = simulate(1, 5, 1, 1.33, noise=0.0005)
    rates = Rates(np.full(5, 0.9), np.full(5, 0.45), "measured", None)
    pairs = replace(pairs_of(compute, y0[0], y1[0]), rates=rates)
    found = compare(pairs)
    assert found.wall_clock is not None
    assert found.gpu_cost is not None
    assert found.wall_clock.m == pytest.approx(0.9 * found.m)
    assert found.gpu_cost.m == pytest.approx(0.45 * found.m)
    assert compare(pairs_of(compute, y0[0], y1[0])).wall_clock is None


def test_a_convention_that_disagrees_is_a_remark() -> None:
    compute, y0, y1, _ = simulate(1, 5, 1, 1.33, noise=0.0005)
    pairs = pairs_of(compute, y0[0], y1[0])
    other = replace(pairs, convention="6ND", c1=compute * 0.8)
    found = compare(pairs, {"6ND": other})
    assert found.conventions["6ND"].m == pytest.approx(found.m / 0.8, rel=0.05)
    assert "depends on the FLOP convention" in found.status
