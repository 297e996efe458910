"""The sweep files of the package: published parameter counts, sisters at full and mini scale, and their axes."""

import csv
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments.cli.main import main
from experiments.design import strict
from experiments.design.arms import ARMS
from experiments.design.config import RunConfig
from experiments.design.model import ModelConfig
from experiments.design.sweep import expand, load_sweep
from experiments.design.sweep_file import Sweep, read_sweep
from experiments.tasks.registry import generators

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "experiments" / "sweeps"
ABLATIONS = ("width", "rank", "head-size", "site", "qk-norm", "init", "form")
# arXiv 2606.03825, ablations at 300M: millions of parameters where it prints them
PUBLISHED = {
    "width": {
        f"width-{w}" if w != 4 else "lowrank-qkv": m
        for w, m in enumerate((306.8, 307.6, 308.5, 309.3, 310.1, 311.0), 1)
    },
    "rank": {"lowrank-qkv": 309.3, "rank-128": 336.8},
    "head-size": {"head-size-8": 330.5, "head-size-128": 306.9},
}


def by_arm(name: str) -> dict[str, RunConfig]:
    """The runs of the first seed."""
    return {run.arm: run for run in load_sweep(FOLDER / f"{name}.toml") if run.seed == 0}


@pytest.mark.parametrize("name", PUBLISHED)
def test_ablations_have_the_published_numbers_of_parameters(name: str) -> None:
    runs = by_arm(f"ablation-{name}")
    assert {arm: round(runs[arm].model.parameters() / 1e6, 1) for arm in PUBLISHED[name]} == PUBLISHED[name]
    assert runs["transformer"].model.parameters() == 305_169_408


def test_every_published_ablation_is_a_run() -> None:
    """By what its sweep says of it: kind, sites, taps, rank or head size; the tokens to a millionth."""
    facts = ("conv.kind", "conv.sites", "conv.width", "conv.rank", "conv.head_size")
    text = (ROOT / "results" / "published" / "points.csv").read_text()
    rows = [row for row in csv.DictReader(text.splitlines()) if row["source"].startswith("ablation")]
    assert len(rows) == 24
    for row in rows:
        panel = row["arm"].rpartition(" ")[0].replace(" ", "-")
        wanted = [row[fact] for fact in facts]
        runs = by_arm(f"ablation-{panel}").values()
        (run,) = [run for run in runs if [str(run.facts().get(fact, "")) for fact in facts] == wanted]
        assert run.counts.parameters == int(row["N"])
        assert run.counts.tokens == pytest.approx(int(row["D"]), rel=1e-6)
        assert run.counts.flops_exact == pytest.approx(float(row["flops_exact"]), rel=1e-6)


@pytest.mark.parametrize("name", ABLATIONS)
def test_ablations_are_the_papers_in_tokens_and_settings_and_their_sisters_are_alike(name: str) -> None:
    full, mini = by_arm(f"ablation-{name}"), by_arm(f"mini-ablation-{name}")
    for run in full.values():
        assert (run.size, run.train.sequence_length, run.train.learning_rate) == ("300M", 4096, 3e-4)
        assert round(run.train.tokens / 1e9, 2) == 15.0
        if run.model.conv.kind == "lowrank" and name != "rank":
            assert run.facts()["conv.rank"] == 16
        if name != "width" and run.model.conv.sites:
            assert run.facts()["conv.width"] == 4
    assert sum(run.counts.flops_exact for run in mini.values()) < 4e15  # minutes at 10 TFLOP/s
    changed = ("conv.rank", "attention.kv_heads", "train.")
    facts = [
        {
            arm: {key: fact for key, fact in run.facts().items() if not key.startswith(changed)}
            for arm, run in runs.items()
        }
        for runs in (full, mini)
    ]
    if name == "rank":
        assert [run.facts().get("conv.rank") for run in full.values()] == [None, 4, 8, 16, 32, 64, 128]
        assert [run.facts().get("conv.rank") for run in mini.values()] == [None, 1, 2, 4, 8, 16]
    else:
        assert facts[0] == facts[1]
    assert len({str(run.model) for run in full.values()}) == len(full)  # no arm twice under two names


def test_the_swept_settings_are_the_papers() -> None:
    def swept(name: str, fact: str) -> list[object]:
        return [run.facts().get(fact) for run in by_arm(name).values()][1:]

    assert swept("ablation-width", "conv.width") == [1, 2, 3, 4, 5, 6]
    assert swept("ablation-head-size", "conv.head_size") == [8, 16, 32, 64, 128]
    assert swept("ablation-site", "conv.sites") == ["q", "k", "v", "qk", "qv", "kv", "qkv"]
    normed = by_arm("ablation-qk-norm")
    arms = [arm for arm in normed if not arm.endswith("-normed")]
    assert set(arms) == set(ARMS)
    assert list(normed) == [*arms, *(f"{arm}-normed" for arm in arms)]
    for arm, run in normed.items():
        facts, without = run.facts(), normed[arm.removesuffix("-normed")].facts()
        assert facts == without | {"attention.qk_norm": arm.endswith("-normed")}


def test_the_study_has_a_control_and_every_arm_its_own_rates() -> None:
    runs = load_sweep(FOLDER / "mini-scaling.toml")
    sizes = list(dict.fromkeys(run.size for run in runs))
    assert sizes == ["1M", "3M", "7M", "11M", "16M", "21M"]
    cells = dict.fromkeys((run.arm, run.size) for run in runs)
    seeds = {(arm, size): len({run.seed for run in runs if (run.arm, run.size) == (arm, size)}) for arm, size in cells}
    assert {size: {seeds[arm, size] for arm, at in cells if at == size} for size in sizes} == {
        **{size: {3} for size in sizes},
        "1M": {16},
        "3M": {8},
        "7M": {5},
    }
    rates_of = Counter((run.arm, run.size) for run in runs if run.seed == 0)
    assert all((count >= 3) == (size in ("1M", "3M", "11M")) for (_, size), count in rates_of.items())
    compute = {run.size: run.counts.flops_exact for run in runs if run.arm == "transformer"}
    assert compute["21M"] / compute["1M"] > 230
    for run in runs:
        if run.model.conv.kind == "lowrank":
            assert run.facts()["conv.rank"] == run.model.width // 64
    pairs = {run.arm: run for run in runs if run.size == "21M" and run.seed == 0}
    control, lowrank = pairs["lowrank-qkv-mismatched"], pairs["lowrank-qkv"]
    assert (control.counts, control.train) == (lowrank.counts, lowrank.train)
    assert control.run_id.split("-")[-1] != lowrank.run_id.split("-")[-1]
    rates = load_sweep(FOLDER / "mini-rates.toml")
    tried = {arm: {run.vary["learning_rate_factor"] for run in rates if run.arm == arm} for arm in pairs}
    assert tried.pop("headwise-qkv") == {0.5, 1, 2}
    assert set(map(frozenset, tried.values())) == {frozenset({1, 2, 4, 8})}
    # The studies' runs at the rates tried before are those runs.
    assert {run.run_id for run in runs} & {run.run_id for run in rates}


def test_the_look_at_150m_is_what_its_page_says() -> None:
    """88M parameters at vocabulary 4096, whatever the rung is called; every arm reads the same tokens, on the study's
    data."""
    runs = by_arm("look-150M")
    assert list(runs) == ["transformer", "static-qkv", "lowrank-qkv", "lowrank-all"]
    assert {round(run.model.parameters() / 1e6) for run in runs.values()} == {88, 90, 96}
    assert round(runs["transformer"].model.parameters() / 1e6) == 88
    assert {(round(run.counts.tokens / 1e6), run.train.sequence_length) for run in runs.values()} == {(100, 4096)}
    assert len({run.train for run in runs.values()}) == 1
    paper = {run.size: run for run in load_sweep(FOLDER / "paper-scaling.toml") if run.arm == "transformer"}
    assert round(paper["150M"].model.parameters() / 1e6) == 162
    assert read_sweep(FOLDER / "look-150M.toml").data == read_sweep(FOLDER / "mini-scaling.toml").data
    for page in (ROOT / "results/measured/README.md", FOLDER / "look-150M.toml"):
        assert "88M" in page.read_text()


def test_an_arm_has_its_own_values_of_an_axis_and_a_size_its_own_seeds() -> None:
    table = strict.read_toml(FOLDER / "mini-rates.toml")
    table |= {"sizes": ["1M", "3M"], "arms": ["transformer", "headwise-qkv"], "seeds_by_size": {"3M": [7]}}
    table["vary"] = {"learning_rate_factor": [1, 2], "weight_decay": [0.1, 0.2]}
    runs = expand(strict.parse(table, Sweep, "test"))
    points = {(run.arm, run.size, run.seed, *run.vary.values()) for run in runs}
    assert points == {
        (arm, size, seed, factor, decay)
        for arm, factors in (("transformer", (1, 2)), ("headwise-qkv", (0.5, 1, 2)))
        for size, seed in (("1M", 0), ("3M", 7))
        for factor in factors
        for decay in (0.1, 0.2)
    }
    assert len(points) == len(runs)


def test_an_arm_may_have_its_own_values_at_one_size() -> None:
    table = strict.read_toml(FOLDER / "mini-rates.toml")
    table |= {"sizes": ["1M", "3M"], "arms": ["transformer", "lowrank-qkv"], "seeds_by_size": {}}
    table["vary"] = {"learning_rate_factor": [2]}
    table["vary_by_arm"] = {"lowrank-qkv": {"learning_rate_factor": {"3M": [3, 4]}}}
    runs = expand(strict.parse(table, Sweep, "test"))
    assert [(run.arm, run.size, run.vary["learning_rate_factor"]) for run in runs] == [
        ("transformer", "1M", 2),
        ("lowrank-qkv", "1M", 2),
        ("transformer", "3M", 2),
        ("lowrank-qkv", "3M", 3),
        ("lowrank-qkv", "3M", 4),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds_by_size": {"7M": [0]}}, "seeds_by_size: one of this sweep's sizes is wanted: got '7M'; legal: 1M, 3M"),
        ({"seeds_by_size": {"1M": [0, 0]}}, r"seeds_by_size.1M must not list a value twice; got \[0, 0\]; remove"),
        ({"seeds_by_size": {"1M": []}}, "seeds_by_size.1M is empty; name at least one"),
        ({"seeds_by_size": {"1M": [-1]}}, r"seeds_by_size.1M must be 0 to 2\*\*63 - 1; got -1; choose another"),
        (
            {"vary_by_arm": {"static": {"learning_rate_factor": [1]}}},
            "vary_by_arm: one of this sweep's arms is wanted: got 'static'; did you mean 'static-qkv'",
        ),
        (
            {"vary_by_arm": {"static-qkv": {"clip_norm": [1]}}},
            r"vary_by_arm.static-qkv.clip_norm gives one arm's values of an axis, which \[vary\] must have for the",
        ),
        (
            {"vary_by_arm": {"static-qkv": {"learning_rate_factor": [-1]}}},
            "by_arm.static-qkv.learning_rate_factor must",
        ),
        (
            {"vary_by_arm": {"static-qkv": {"learning_rate_factor": {"3M": [1, 1]}}}},
            "by_arm.static-qkv.learning_rate_factor must list different numbers",
        ),
        (
            {"vary_by_arm": {"static-qkv": {"learning_rate_factor": {"2M": [1]}}}},
            "static-qkv.learning_rate_factor: one of this sweep's sizes is wanted: got '2M'; legal: 1M, 3M, 11M",
        ),
        (
            {"vary_by_arm": {"static-qkv": {"learning_rate_factor": 1}}},
            "static-qkv.learning_rate_factor: got 1; wanted an array",
        ),
    ],
)
def test_mistakes_in_what_differs_by_arm_or_size(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        strict.parse(strict.read_toml(FOLDER / "mini-rates.toml") | change, Sweep, "test")


def test_every_wiring_and_form_is_in_a_sweep() -> None:
    """What the kernels offer has a user: silu, no residual, no static filter, all initial filters, both inputs."""
    models: list[ModelConfig] = [run.model for path in FOLDER.glob("*.toml") for run in load_sweep(path)]
    facts = [model.facts() for model in models]
    for fact, values in {
        "conv.activation": {"none", "silu"},
        "conv.residual": {True, False},
        "conv.static_filter": {True, False},
        "conv.static_init": {"uniform", "zero"},
        "conv.generator_init": {"zero", "linear"},
        "conv.generator_input": {"map", "part"},
        "conv.mismatched": {True, False},
        "attention.qk_norm": {True, False},
    }.items():
        assert {each[fact] for each in facts if fact in each} == values, fact


def test_files_that_share_a_text_share_its_dataset() -> None:
    data = {read_sweep(path).data for path in FOLDER.glob("*.toml") if path.stem != "demo"} - {None}
    assert len(data) == len({each.source for each in data}) == 3  # None: generated tasks


def test_the_page_of_all_systems_has_what_plan_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code of the page, run on every sweep at full scale; each has its row, with its sister."""
    page = (ROOT / "results" / "measured" / "systems.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)

    def run(command: list[str], **_: object) -> SimpleNamespace:
        assert command[0] == "dynconv"
        assert main(command[1:]) == 0
        return SimpleNamespace(stdout=capsys.readouterr().out)

    names["subprocess"] = SimpleNamespace(run=run)
    monkeypatch.chdir(ROOT)
    sisters = {path.stem.removeprefix("mini-") for path in FOLDER.glob("mini-*.toml")} - {"rates", "english", "scaling"}
    for sweep in (*sorted(sisters), "paper-scaling"):
        (row,) = [line for line in page.splitlines() if f"| [{sweep}](" in line]
        assert names["cells"](sweep) in row
        sister = "mini-scaling" if sweep == "paper-scaling" else f"mini-{sweep}"
        assert f"| [{sister}](../../experiments/sweeps/{sister}.toml) |" in row


def test_sweeps_on_recall_have_every_arm_five_seeds_and_the_suites_tasks() -> None:
    for name in ("mqar", "mini-mqar", "mad", "mini-mad"):
        sweep = read_sweep(FOLDER / f"{name}.toml")
        assert set(sweep.arms) == set(ARMS)
        assert len(sweep.seeds) == 5
    mad = {run.task_name: run for run in load_sweep(FOLDER / "mad.toml")}
    assert [run.task.kind for run in mad.values()] == [task.replace("-", "_") for task in mad]
    assert {run.task.kind for run in mad.values()} == {cls.kind for cls in generators() if cls.kind != "mqar"}
    assert {run.epochs for run in mad.values()} == {200}  # as in arXiv 2403.17844, with batches of 128
    assert {run.train.batch_sequences for run in mad.values()} == {128}
    mqar = load_sweep(FOLDER / "mqar.toml")
    assert sorted({run.task.key_length for run in mqar}) == [1, 2, 4, 8]
