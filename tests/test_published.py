"""`table --published`: measured runs beside the paper's rows, matched by the facts that runs record."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
from planted import write_config, write_run

from analysis.advantage.published import Beside, PublishedRow, beside_published, read_published
from analysis.logs.record import sealed
from analysis.logs.store import Store, load
from analysis.pages.published_figures import published_panels
from experiments.cli.main import main
from experiments.design.config import RunConfig
from experiments.design.sweep import load_sweep

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "results" / "published"
SWEEPS = ROOT / "experiments" / "sweeps"
ROWS = read_published(PUBLISHED)
OF_SWEEP = {"width": "width", "rank": "rank", "head-size": "head size", "site": "site", "qk-norm": "QK-norm"}


def write_planned(
    store: Path,
    run: RunConfig,
    loss: float,
    name: str | None = None,
    vary: dict[str, float] | None = None,
    **facts: object,
) -> None:
    """A finished run with the record that `submit` would write of a planned one."""
    counts = {key: float(value) if "flops" in key else value for key, value in vars(run.counts).items()}
    arm = name or run.arm
    run_id = f"{arm}-{run.size}-{run.seed}-{'-'.join(map(str, (vary or {}).values()))}"
    own = {"run_id": run_id, "facts": run.facts() | facts, "vary": vary or {}}
    run_dir = write_config(store, arm, run.size, run.seed, **own, **counts)
    write_run(run_dir, loss, tokens=run.counts.tokens)


def published_loss(run: RunConfig, ablation: str) -> float | None:
    """The logarithm of the perplexity of the published row that is this run's, told by the sweep's own settings."""
    conv, norm = run.model.conv, getattr(run.model.mixer, "qk_norm", False)
    setting = {
        "width": "none" if conv.kind == "none" else f"W = {getattr(conv, 'width', 0)}",
        "rank": "none" if conv.kind == "none" else f"R = {getattr(conv, 'rank', 0)}",
        "head size": "none" if conv.kind == "none" else f"h = {getattr(conv, 'head_size', 0)}",
        "site": "".join(conv.sites).upper() or "none",
        "QK-norm": {"none": "none", "static": "static QKV", "headwise": "head-wise QKV", "lowrank": "low-rank QKV"}[
            conv.kind
        ],
    }[ablation]
    if norm != (ablation == "QK-norm"):
        return None
    return next((math.log(row.perplexity) for row in ROWS if (row.ablation, row.setting) == (ablation, setting)), None)


def of(found: list[Beside], ablation: str) -> list[Beside]:
    return [row for row in found if row.ablation == ablation]


@pytest.mark.parametrize("sweep", OF_SWEEP)
def test_every_row_finds_the_arm_of_the_shipped_sweep(sweep: str, tmp_path: Path) -> None:
    """Runs of the full-scale sweep that end at the published losses come out with the published differences. The arms
    are renamed, so that only their facts can tell."""
    ablation = OF_SWEEP[sweep]
    for place, run in enumerate(load_sweep(SWEEPS / f"ablation-{sweep}.toml")):
        loss = published_loss(run, ablation)
        write_planned(tmp_path, run, 3.1 if loss is None else loss, f"arm {place}")
    rows = of(beside_published(load(tmp_path).runs, ROWS), ablation)
    assert all(row.arm is not None for row in rows)
    for row in rows:
        if row.status == "reference":
            assert row.difference is None
        else:
            assert row.difference == pytest.approx(row.published_difference, abs=1e-12)
    assert {row.differs for row in rows} == {None}


OTHER_SYSTEMS = {  # sweep -> ablation, and the setting that each arm is
    "moe": ("arms at 7B/1B (MoE)", {"moe": "none", "moe-lowrank-qkv": "low-rank QKV"}),
    "mamba2": ("Mamba-2", {"mamba2-static": "static", "mamba2-lowrank": "low-rank"}),
    "gated-deltanet": ("Gated DeltaNet", {"gated-deltanet-static": "static", "gated-deltanet-lowrank": "low-rank"}),
}


@pytest.mark.parametrize("sweep", OTHER_SYSTEMS)
def test_other_systems_find_their_rows(sweep: str, tmp_path: Path) -> None:
    ablation, settings = OTHER_SYSTEMS[sweep]
    published = {row.setting: math.log(row.perplexity) for row in ROWS if row.ablation == ablation}
    for place, run in enumerate(load_sweep(SWEEPS / f"{sweep}.toml")):
        if run.seed == 0:
            loss = published[settings[run.arm]] if run.arm in settings else 4.0
            write_planned(tmp_path, run, loss, f"arm {place}")
    rows = of(beside_published(load(tmp_path).runs, ROWS), ablation)
    assert [row.setting for row in rows] == list(settings.values())
    assert [row.status for row in rows] == ["reference", "not resolved: one seed gives no interval"]
    assert rows[1].difference == pytest.approx(rows[1].published_difference, abs=1e-12)
    assert rows[1].differs is None


def mini(store: Path, sweep: str, arms: dict[str, float], **facts: object) -> Store:
    for run in load_sweep(SWEEPS / f"mini-ablation-{sweep}.toml"):
        if run.arm in arms:
            write_planned(store, run, arms[run.arm] + 0.01 * run.seed, **facts)
    return load(store)


def test_a_row_that_is_not_measured_shows_as_missing(tmp_path: Path) -> None:
    found = beside_published(mini(tmp_path, "width", {"transformer": 3.0, "width-2": 2.9, "width-6": 2.8}).runs, ROWS)
    rows = of(found, "width")
    assert [row.arm for row in rows] == ["transformer", None, "width-2", None, None, None, "width-6"]
    assert [row.status for row in rows if row.arm is None] == ["missing"] * 4
    assert {row.size for row in rows} == {"1M"}
    two = next(row for row in rows if row.arm == "width-2")
    assert (two.seeds, two.difference) == (5, pytest.approx(-0.1))
    assert two.differs == "conv.rank 2"  # the ladder's, where the paper has 16
    for ablation in ("head size", "QK-norm", "Mamba-2"):
        assert {(row.size, row.arm, row.status) for row in of(found, ablation)} == {(None, None, "missing")}


def test_other_settings_than_the_papers_do_not_match(tmp_path: Path) -> None:
    """An activation or an optimizer makes another arm. Where free facts differ, the arms count that make up most of the
    ablation."""
    arms = {"transformer": 3.0, "width-2": 2.9, "lowrank-qkv": 2.8}
    mini(tmp_path, "width", arms)
    for run in load_sweep(SWEEPS / "mini-ablation-width.toml"):
        if run.arm == "lowrank-qkv" and run.seed == 0:
            write_planned(tmp_path, run, 1.0, "a silu arm", **{"conv.activation": "silu"})
            write_planned(tmp_path, run, 1.0, "a rank arm", **{"conv.rank": 16})
            write_planned(tmp_path, run, 1.0, "a muon arm", **{"train.optimizer": "muon"})
    rows = of(beside_published(load(tmp_path).runs, ROWS), "width")
    assert [row.arm for row in rows if row.arm] == ["transformer", "width-2", "lowrank-qkv"]


@pytest.mark.parametrize(
    ("sweep", "row", "arm"), [("init", "low-rank QKV", "lowrank-qkv"), ("form", "all", "lowrank-all")]
)
def test_other_initial_filters_and_inputs_of_generators_do_not_match(
    sweep: str, row: str, arm: str, tmp_path: Path
) -> None:
    """The names of these arms come before the paper's arm in the alphabet."""
    for run in load_sweep(SWEEPS / f"mini-ablation-{sweep}.toml"):
        write_planned(tmp_path, run, 3.0 + 0.01 * run.seed)
    rows = of(beside_published(load(tmp_path).runs, ROWS), "arms at 2B")
    assert [found.arm for found in rows if row in found.setting] == [arm]


def test_of_two_arms_with_the_same_published_facts_neither_is_taken(tmp_path: Path) -> None:
    """Such as another batch. The reference is the baseline of the sweep, where that is one of them."""
    for run in load_sweep(SWEEPS / "mini-ablation-width.toml"):
        if run.arm in ("transformer", "width-2", "width-6"):
            write_planned(tmp_path, run, 3.0 - 0.1 * len(run.model.conv.sites) + 0.01 * run.seed)
            if run.arm != "width-6":
                write_planned(tmp_path, run, 1.0, f"a {run.arm} with small batches")
    runs = load(tmp_path).runs
    rows = {row.setting: row for row in of(beside_published(runs.assign(baseline="transformer"), ROWS), "width")}
    assert (rows["none"].arm, rows["none"].status) == ("transformer", "reference")
    assert (rows["W = 6"].arm, rows["W = 6"].difference) == ("width-6", pytest.approx(-0.3))
    several = "several arms have its facts (a width-2 with small batches, width-2); choose one with --where"
    assert (rows["W = 2"].arm, rows["W = 2"].loss, rows["W = 2"].status) == (None, None, several)
    rows = {row.setting: row for row in of(beside_published(runs.assign(baseline="width-2"), ROWS), "width")}
    assert rows["none"].status.startswith("several arms have its facts (a transformer with small batches, transformer)")
    assert (rows["W = 6"].loss, rows["W = 6"].difference) == (None, None)
    assert rows["W = 6"].status.startswith("the reference: several arms")


def test_runs_that_differ_in_an_axis_are_not_mixed(tmp_path: Path) -> None:
    for run in load_sweep(SWEEPS / "mini-ablation-width.toml"):
        for decay in (0.1, 0.2):
            if run.arm in ("transformer", "width-2") and run.seed == 0:
                write_planned(tmp_path, run, 3.0, vary={"weight_decay": decay})
    (row,) = [row for row in of(beside_published(load(tmp_path).runs, ROWS), "width") if row.arm == "width-2"]
    assert row.difference is None
    assert row.status == "it has several budgets (weight_decay 0.1, weight_decay 0.2); choose one with --where"


def test_a_seed_that_did_not_learn_is_said(tmp_path: Path) -> None:
    for run in load_sweep(SWEEPS / "mini-ablation-width.toml"):
        if run.arm == "transformer" or (run.arm == "width-2" and run.seed > 0):
            write_planned(tmp_path, run, 3.0 + 0.01 * run.seed)
        elif run.arm == "width-2":
            write_planned(tmp_path, run, 9.0)
    for path in tmp_path.glob("*/*.json"):
        if path.name in ("config.json", "run.json"):
            path.write_text(json.dumps(sealed(json.loads(path.read_text()) | {"vocabulary": 4096})))
    (row,) = [row for row in of(beside_published(load(tmp_path).runs, ROWS), "width") if row.arm == "width-2"]
    assert row.status.startswith("not resolved: 1 of 5 runs of width-2 at 1M did not learn")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    mini(tmp_path / "live", "width", {"transformer": 3.0, "width-2": 2.9})
    monkeypatch.chdir(ROOT)
    assert main(["table", str(tmp_path / "live"), "--published", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(ROWS)
    assert [row["arm"] for row in rows if row["status"] not in ("missing", "reference")] == ["width-2"]
    assert main(["table", str(tmp_path / "live"), "--published", str(PUBLISHED)]) == 0
    assert "compare differences, not levels" in capsys.readouterr().out
    for form in ("csv", "latex"):
        assert main(["table", str(tmp_path / "live"), "--published", "--format", form]) == 0
        assert "width-2" in capsys.readouterr().out
    assert main(["table", str(tmp_path / "live"), "--published", str(tmp_path)]) == 2
    assert f"no ablations.csv in {tmp_path}; give the folder" in capsys.readouterr().err
    assert main(["table", str(tmp_path / "live"), "--published", "--metric", "loss"]) == 2
    assert "--metric and --published do not go together" in capsys.readouterr().err


def test_both_published_tables_have_the_same_perplexities() -> None:
    """points.csv repeats the rows of the dense Transformer, with its counts."""
    with (PUBLISHED / "points.csv").open() as file:
        points = [row for row in csv.DictReader(file) if row["source"].startswith("ablation table")]
    known = {
        (row.ablation, row.facts.get("conv.width"), row.facts.get("conv.rank"), row.facts.get("conv.head_size")): row
        for row in ROWS
        if row.ablation in ("width", "rank", "head size")
    }
    checked = 0
    for point in points:
        ablation = point["arm"].rpartition(" ")[0]
        key = (ablation, point["conv.width"], point["conv.rank"] or None, point["conv.head_size"] or None)
        if ablation == "site":
            site = next(r for r in ROWS if r.ablation == "site" and r.facts.get("conv.sites") == point["conv.sites"])
            assert site.perplexity == float(point["perplexity"])
        else:
            assert known[key].perplexity == float(point["perplexity"])
        checked += 1
    assert checked == 24


def test_an_ablation_has_one_reference(tmp_path: Path) -> None:
    header = "ablation,setting,reference,perplexity,free,source,conv.kind\n"
    (tmp_path / "ablations.csv").write_text(f"{header}a,x,true,19,,p,none\na,y,true,18,,p,static\n")
    with pytest.raises(ValueError, match="ablation 'a' has 2 references; give one"):
        read_published(tmp_path)
    assert isinstance(ROWS[0], PublishedRow)


def test_the_figure_of_published_and_measured_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {"transformer": 3.0, "width-2": 2.9, "width-6": 2.8}
    found = beside_published(mini(tmp_path / "live", "width", arms).runs, ROWS)
    figure = published_panels(found)
    (axes,) = figure.axes
    assert axes.get_title() == "width"
    published, measured = axes.lines[0], axes.lines[1]
    assert published.get_ydata() == pytest.approx([math.log(row.perplexity / 19.12) for row in of(found, "width")[1:]])
    assert (list(measured.get_xdata()), list(measured.get_ydata())) == ([1, 5], pytest.approx([-0.1, -0.2]))
    with pytest.raises(ValueError, match="no run has the facts of a published row"):
        published_panels([row for row in found if row.difference is None])
    out = str(tmp_path / "figures")
    assert main(["plot", str(tmp_path / "live"), "-o", out, "--published", str(PUBLISHED)]) == 0
    assert str(tmp_path / "figures" / "published.svg") in capsys.readouterr().out
