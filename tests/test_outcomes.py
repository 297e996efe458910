"""`table --metric`: arms compared on any metric, by differences of means with intervals that suit few seeds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from planted import ABOUT, write_config
from scipy import stats

from analysis.advantage.outcomes import ALL_SIZES, Outcome, Outcomes, compare_metric
from analysis.advantage.shares import difference_interval, over_sizes, share_interval
from analysis.logs.learning import DIVERGED
from analysis.logs.metrics import final_metrics, values_of
from analysis.logs.store import Store, freeze, load
from analysis.logs.writer import RunLog, add_evaluations
from analysis.pages.metric_figures import accuracy_panels, accuracy_rows
from experiments.cli.main import main


def write_task_run(store: Path, arm: str, size: int, seed: int, accuracy: float | None, task: str = "mqar") -> None:
    """A run on a recall task, evaluated twice. None: it diverged."""
    facts = {"task.kind": task, "task.pairs": 4, "conv.kind": arm}
    flops = dict.fromkeys(("flops_exact", "flops_6nd", "flops_6n_nonemb_d"), 1000000000000.0 * size)
    counts = {"parameters": (1100 if arm == "dyn" else 1000) * size, "tokens": 10**6, **flops}
    run_id = f"{arm}-{size}-{task}-{seed}"
    names = {"run_id": run_id, "task": task, "data_sha256": task, "baseline": "static", "budget": "500 steps"}
    run_dir = write_config(store, arm, f"w{size}", seed, **names, facts=facts, **counts)
    log = RunLog(run_dir, attempt=1, first_step=1, about=ABOUT)
    log.step(1, 10**6, 3.0, 1.0, 1e-3, 0.1)
    if accuracy is None:
        log.fail(2, f"{DIVERGED}: loss nan")
        return
    for step, value in ((0, 0.0), (1, accuracy)):
        metrics = {"loss": 3.0 - 2 * value, "accuracy": value, "success": float(value >= 0.9)}
        metrics |= {"accuracy@key_length=2": value / 2, "loss@key_length=2": 4.0, "accuracy@key_length=1": value}
        if task == "mqar":
            metrics |= {"accuracy@pairs=2": value, "success@pairs=2": 0.0, "accuracy@pairs=16": value / 4}
        log.evaluation(step, 10**6 * step, task, metrics, 0.1)
    log.finish({})


def recall(store: Path, **arms: list[float | None]) -> Store:
    """Two sizes; each arm's accuracy by seed, a tenth higher at the second size, but never above 1."""
    for arm, accuracies in arms.items():
        for size in (1, 2):
            for seed, accuracy in enumerate(accuracies):
                value = None if accuracy is None else min(accuracy + 0.1 * (size - 1), 1.0)
                write_task_run(store, arm, size, seed, value)
    return load(store)


def compared(store: Store, metric: str = "accuracy") -> Outcomes:
    return compare_metric(store.runs, values_of(store, metric), final_metrics(store))


def row(found: Outcomes, arm: str, size: str) -> Outcome:
    (one,) = [each for each in found.rows if (each.arm, each.size) == (arm, size)]
    return one


def test_differences_are_paired_by_seed_with_the_interval_of_a_paired_t_test(tmp_path: Path) -> None:
    base, better = [0.3, 0.5, 0.2, 0.4, 0.35], [0.42, 0.58, 0.35, 0.49, 0.47]
    found = compared(recall(tmp_path, static=base, dyn=better))
    mine = row(found, "dyn", "w1")
    low, high = stats.ttest_rel(better, base).confidence_interval(0.95)
    assert mine.difference == pytest.approx(np.mean(better) - np.mean(base))
    assert mine.ci == pytest.approx((low, high))
    assert (mine.seeds, mine.median, mine.least, mine.most) == (5, pytest.approx(0.47), 0.35, 0.58)
    assert (mine.method, mine.status, mine.family) == ("t over seeds", "ok", 2)
    low, high = stats.ttest_rel(better, base).confidence_interval(0.975)
    assert mine.family_ci == pytest.approx((low, high))
    assert mine.loss == pytest.approx(3 - 2 * np.mean(better))
    assert mine.success is not None
    assert (mine.success.successes, mine.success.of) == (0, 5)
    assert mine.success.ci == pytest.approx(tuple(stats.binomtest(0, 5).proportion_ci(method="exact")))
    alone = row(found, "static", "w1")
    assert (alone.difference, alone.ci, alone.mean) == (None, None, pytest.approx(np.mean(base)))
    assert [each.size for each in found.rows].count(ALL_SIZES) == 0  # two sizes


def test_success_that_is_bimodal(tmp_path: Path) -> None:
    """All seeds solve the task, or none does: t would give an interval of no width."""
    found = compared(recall(tmp_path, static=[0.1] * 5, dyn=[1.0] * 5), "success")
    mine = row(found, "dyn", "w1")
    assert mine.difference == 1.0
    assert mine.method == "Clopper-Pearson of both means"
    (low1, _), (_, high0) = (stats.binomtest(k, 5).proportion_ci(method="exact") for k in (5, 0))
    assert mine.ci == pytest.approx((1 - math.hypot(1 - low1, high0), 1.0))
    assert mine.status == "ok"
    few = compared(recall(tmp_path / "few", static=[0.1] * 2, dyn=[1.0] * 2), "success")
    assert row(few, "dyn", "w1").status == "not resolved: the interval of all 2 at once holds 0"
    assert compared(recall(tmp_path / "same", static=[0.1] * 5, dyn=[0.2] * 5)).rows[-1].method == (
        "Clopper-Pearson of both means"  # accuracies whose differences do not vary
    )


def test_a_share_has_clopper_and_pearsons_interval() -> None:
    for k, n in ((0, 3), (1, 5), (5, 5), (7, 20)):
        assert share_interval(k / n, n) == pytest.approx(tuple(stats.binomtest(k, n).proportion_ci(method="exact")))


def outcomes_of(random: np.random.Generator, p: float, seeds: int, solved: float) -> np.ndarray:
    """Values of runs that solve a task with probability p: 1 or 0 (solved = 1), or accuracies about .97 and .08."""
    won = random.random(seeds) < p
    if solved == 1:
        return won.astype(float)
    return np.where(won, 0.95 + 0.04 * random.random(seeds), 0.15 * random.random(seeds))


@pytest.mark.parametrize(("p", "seeds"), [(0.1, 2), (0.5, 2), (0.5, 3), (0.3, 5), (0.5, 5), (0.8, 5), (0.5, 10)])
@pytest.mark.parametrize("solved", [1, 0.97])
def test_equal_arms_are_seldom_called_different(p: float, seeds: int, solved: float) -> None:
    """Both arms solve the task with the same probability. At 5%, the share of wrong calls stays below 5%."""
    random = np.random.default_rng(3)
    wrong, runs = 0, 1000
    for _ in range(runs):
        y1, y0 = (outcomes_of(random, p, seeds, solved) for _ in range(2))
        ci, _ = difference_interval(y1, y0)
        wrong += ci is not None and not ci[0] <= 0 <= ci[1]
    assert wrong / runs < 0.05


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("solved", [1, 0.97])
def test_intervals_of_bimodal_outcomes_cover(seeds: int, solved: float) -> None:
    """Of arms that solve the task in 80% and in 20% of runs; by t alone, accuracies were covered in .70 and .88."""
    random = np.random.default_rng(4)
    truth = 0.6 if solved == 1 else 0.6 * (0.97 - 0.075)
    inside, runs = 0, 1000
    for _ in range(runs):
        ci, _ = difference_interval(*(outcomes_of(random, p, seeds, solved) for p in (0.8, 0.2)))
        inside += ci is not None and ci[0] <= truth <= ci[1]
    assert inside / runs > 0.94


def test_values_that_are_no_shares_and_do_not_vary_have_no_interval() -> None:
    assert difference_interval(np.array([7.0, 8.0]), np.array([5.0, 6.0])) == (None, None)
    assert difference_interval(np.array([0.7]), np.array([0.5])) == (None, None)
    assert over_sizes(np.array([0.5, 0.5, 0.5])) == (None, None)


@pytest.mark.parametrize("endless", [math.nan, math.inf])
def test_a_value_that_is_no_number_is_left_out_by_name(endless: float, tmp_path: Path) -> None:
    """A mean over it would be no number either, with the status "ok"."""
    store = recall(tmp_path, static=[0.3, 0.5, 0.2], dyn=[0.42, 0.58, 0.35])
    values = values_of(store, "accuracy")
    wrong = values["run_id"].eq("dyn-1-mqar-2")
    found = compare_metric(store.runs, values.assign(value=values["value"].mask(wrong, endless)))
    reasons = [(item.run_id, item.reason) for item in found.excluded]
    assert reasons == [("dyn-1-mqar-2", "its mqar/accuracy is no finite number")]
    assert row(found, "dyn", "w1").difference == pytest.approx(0.1)
    assert row(found, "dyn", "w1").seeds == 2


def test_over_three_sizes_the_sizes_are_the_replicates(tmp_path: Path) -> None:
    gains = (0.08, 0.12, 0.09)
    for size, gain in zip((1, 2, 4), gains, strict=True):
        write_task_run(tmp_path, "static", size, 0, 0.3)
        write_task_run(tmp_path, "dyn", size, 0, 0.3 + gain)
    mine = row(compared(load(tmp_path)), "dyn", ALL_SIZES)
    low, high = stats.ttest_1samp(gains, 0).confidence_interval(0.95)
    assert mine.ci == pytest.approx((low, high))
    assert (mine.method, mine.seeds, mine.status) == ("t over 3 sizes", 1, "ok")
    assert row(compared(load(tmp_path)), "dyn", "w1").status == "not resolved: one seed gives no interval"


def test_a_run_that_diverged_keeps_its_arm_from_being_resolved(tmp_path: Path) -> None:
    found = compared(recall(tmp_path, static=[0.1, 0.2, 0.1, 0.2, 0.1], dyn=[0.7, 0.6, 0.7, 0.6, None]))
    mine = row(found, "dyn", "w1")
    assert mine.status == "not resolved: 2 of 10 runs of dyn did not learn (1 of 5 at w1, 1 of 5 at w2)"
    assert [each.runs for each in found.did_not_learn] == [2]
    assert {item.reason for item in found.excluded} == {"did not learn: it diverged at step 2"}


def test_several_tasks_are_compared_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A store may hold runs of several tasks; a metric of one task alone is named TASK/METRIC."""
    for task, gain in (("mqar", 0.3), ("copying", 0.0)):
        for arm, own in (("static", 0.0), ("dyn", gain)):
            for seed in range(4):
                write_task_run(tmp_path / "live", arm, 1, seed, 0.4 + own + 0.01 * seed * (1 + own), task)
    store = load(tmp_path / "live")
    found = compared(store)
    assert [(each.task, each.status.partition(":")[0]) for each in found.rows if each.arm == "dyn"] == [
        ("copying", "not resolved"),
        ("mqar", "ok"),
    ]
    freeze(store, tmp_path / "frozen")
    command = ["table", str(tmp_path / "frozen"), "--metric", "mqar/accuracy@key_length=2"]
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(each["task"], each["arm"]) for each in rows] == [("mqar", "static"), ("mqar", "dyn")]
    assert rows[1]["difference"] == pytest.approx(0.3 / 2 * (1 + 0.01 * 1.5))
    assert rows[1]["loss"] == 4.0  # of the same keys
    assert rows[1]["success"] is None
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "the difference is from static, paired by size and seed" in text
    assert main([*command, "--format", "csv"]) == 0
    table = pd.read_csv(pd.io.common.StringIO(capsys.readouterr().out))
    assert table["ci_low"].notna().tolist() == [False, True]
    assert main([*command, "--format", "latex"]) == 0
    assert r"\toprule" in capsys.readouterr().out


def test_a_domain_of_text_is_a_task_whose_name_has_a_slash(tmp_path: Path) -> None:
    """`eval --text` writes the results of the folder NAME as the task text/NAME."""
    write_task_run(tmp_path, "static", 1, 0, 0.4, "text")
    results = {"text/code": {"accuracy": 0.5}, "text/prose": {"accuracy": 0.6}}
    add_evaluations(tmp_path / "static-1-text-0", results, 0.1)
    for task, value in (("text/code", 0.5), ("text/prose", 0.6), ("text", 0.4)):
        found = values_of(load(tmp_path), f"{task}/accuracy")
        assert found[["task", "value"]].to_numpy().tolist() == [[task, value]]
    with pytest.raises(ValueError, match="no metric 'text/code/loss'"):
        values_of(load(tmp_path), "text/code/loss")


def test_a_domain_that_was_another_text_for_some_runs_is_refused(tmp_path: Path) -> None:
    for seed, size in ((0, 1000.0), (1, 1000.0), (2, 900.0)):
        write_task_run(tmp_path, "static", 1, seed, 0.4, "text")
        add_evaluations(tmp_path / f"static-1-text-{seed}", {"text/code": {"loss": 2.0, "bytes": size}}, 0.1)
    with pytest.raises(ValueError, match=r"not the same text in all runs \(1000 bytes: 2, 900 bytes: 1\); run"):
        values_of(load(tmp_path), "text/code/loss")
    assert len(values_of(load(tmp_path), "text/accuracy")) == 3


def test_what_cannot_be_compared_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recall(tmp_path, static=[0.1, 0.2], dyn=[0.5, 0.7])
    for arguments, message in (
        (["--metric", "nothing"], "no metric 'nothing' in"),
        (["--metric", "accuracy", "--by", "arm"], "--metric and --by do not go together"),
        (["--metric", "accuracy", "--where", "arm == 'dyn'", "--baseline", "static"], "no arm 'static'"),
        (["--metric", "accuracy", "--where", "arm == 'static'"], "the runs hold one arm"),
    ):
        assert main(["table", str(tmp_path), *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_column_of_a_table_of_points(tmp_path: Path) -> None:
    rows = [
        {"arm": arm, "size": "s", "seed": seed, "C": 1e18, "loss": 3.0 - gain, "glue": 50 + gain + seed}
        for arm, gain in (("base", 0.0), ("dyn", 2.0))
        for seed in range(3)
    ]
    rows[-1]["glue"] = None
    pd.DataFrame(rows).to_csv(tmp_path / "points.csv", index=False)
    store = load(tmp_path / "points.csv")
    found = compare_metric(store.runs, values_of(store, "glue"), final_metrics(store), baseline="base")
    assert row(found, "dyn", "s").difference == pytest.approx(2.0)
    assert [item.reason for item in found.excluded] == ["it has no glue"]


def test_the_figure_of_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Against size and against key length, by arm; of a store of several tasks, too, which has no multipliers."""
    recall(tmp_path / "live", static=[0.1, 0.2, 0.7], dyn=[0.5, 0.7, 0.9])
    for seed in range(2):
        write_task_run(tmp_path / "live", "dyn", 1, seed, 0.3, "copying")
    store = load(tmp_path / "live")
    rows = accuracy_rows(final_metrics(store), store.runs)
    assert rows.groupby("panel").size().to_dict() == {
        "copying": 2,
        "copying by key length": 4,
        "mqar": 12,
        "mqar by key length": 12,  # 2 lengths of 6 runs at the larger size
        "mqar by pairs": 18,  # 2 further sets and the task's own, of 4 pairs
    }
    lengths = rows[rows["panel"] == "mqar by key length"]
    assert sorted(lengths["x"].unique()) == [1.0, 2.0]
    assert set(lengths["arm"]) == {"static", "dyn"}  # whose N differ at the larger size
    assert sorted(lengths["value"][lengths["x"] == 2]) == pytest.approx([0.1, 0.15, 0.3, 0.4, 0.4, 0.5])
    pairs = rows[(rows["panel"] == "mqar by pairs") & (rows["arm"] == "static")]
    assert {x: sorted(part["value"]) for x, part in pairs.groupby("x")} == {
        2.0: pytest.approx([0.2, 0.3, 0.8]),
        4.0: pytest.approx([0.2, 0.3, 0.8]),
        16.0: pytest.approx([0.05, 0.075, 0.2]),
    }
    figure = accuracy_panels(rows, "static")
    by_title = {axes.get_title(): axes for axes in figure.axes}
    assert list(by_title) == list(rows["panel"].unique())
    medians = [line.get_ydata().tolist() for line in by_title["mqar"].lines if line.get_linestyle() != "None"]
    assert medians == [pytest.approx([0.7, 0.8]), pytest.approx([0.2, 0.3])]
    command = [str(tmp_path / "live"), "--where", "task == 'mqar'"]
    assert main(["plot", str(tmp_path / "live"), "-o", str(tmp_path / "figures")]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(tmp_path / "figures" / "accuracy.svg")
    assert "accuracy alone is drawn: the runs are of several tasks (copying, mqar)" in captured.err
    assert main(["report", *command, "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "Accuracy on the task" in page
    assert "--where &#x27;task == &#x27;&quot;&#x27;&quot;&#x27;mqar" in page


def test_a_metric_that_the_baseline_has_not_keeps_no_answer_from_other_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after `eval --text` on one run that is not the baseline's."""
    for arm in ("static", "dyn", "other"):
        for seed in range(2):
            write_task_run(tmp_path, arm, 1, seed, 0.4 + 0.1 * seed, "text")
    add_evaluations(tmp_path / "dyn-1-text-0", {"text/txt": {"loss": 2.0, "bits": 1.0}}, 0.1)
    command = ["table", str(tmp_path), "--metric"]
    assert main([*command, "loss"]) == 0
    text = capsys.readouterr().out
    assert [line.split("|")[3].strip() for line in text.splitlines()[2:5]] == ["static", "dyn", "other"]
    said = "no answer for dyn, other: static has no text/txt/{} in any finished run"
    assert said.format("loss") in text.splitlines()
    assert main([*command, "bits"]) == 2
    assert capsys.readouterr().err == f"dynconv table: {said.format('bits')}\n"
    add_evaluations(tmp_path / "static-1-text-0", {"text/prose": {"bits": 1.0}}, 0.1)
    assert main([*command, "text/prose/bits"]) == 2
    assert "no answer for dyn, other: dyn, other have no text/prose/bits in" in capsys.readouterr().err


def test_arms_of_which_no_pair_has_the_metric_are_refused_for_that_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The baseline was evaluated at another seed than the arms: its values alone are no answer, and that a setting
    changes with size is no reason."""
    for arm in ("static", "dyn", "other"):
        for size in (1, 2):
            for seed in range(2):
                write_task_run(tmp_path, arm, size, seed, 0.4 + 0.1 * seed, "text")
    for run_id in ("static-1-text-1", "dyn-1-text-0", "other-1-text-0"):
        add_evaluations(tmp_path / run_id, {"text/txt": {"bits": 1.0}}, 0.1)
    command = ["table", str(tmp_path), "--metric", "bits"]
    seeds = "pairs are made on seed, and none is in both arms (static has 1; {} has 0)"
    said = "no answer for {}: of the runs with text/txt/bits, " + seeds
    assert main(command) == 2
    error = capsys.readouterr().err
    assert all(said.format(arm, arm) in error for arm in ("dyn", "other"))
    lacking = "dyn-1-text-1, dyn-2-text-0, dyn-2-text-1, static-1-text-0 and 2 more"
    assert f"; give it to more runs, of which {lacking} lack it" in error
    assert "one arm" not in error
    add_evaluations(tmp_path / "static-2-text-1", {"text/txt": {"bits": 1.0}}, 0.1)
    store = load(tmp_path)
    changing = store.runs["task.pairs"].mask(store.runs["run_id"].str.startswith("static-2"), 8)
    with pytest.raises(ValueError, match=r"pairs are made on seed, .*dyn has 0") as refusal:
        compare_metric(store.runs.assign(**{"task.pairs": changing}), values_of(store, "bits"))
    assert "not the same at all sizes" not in str(refusal.value)
