"""Sweep files: what they expand to, how compute is matched, and what each mistake says."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.design import flops, strict
from experiments.design.config import RunConfig
from experiments.design.sweep import Sweep, epochs, expand, load_sweep

SHIPPED = sorted((Path(__file__).parent.parent / "experiments" / "sweeps").glob("*.toml"))
TEXT = """
name = "test"
ladder = "nano"
sizes = ["25k", "110k"]
arms = ["transformer", "lowrank-qkv", "mine"]
baseline = "transformer"
seeds = [0, 1]
tokens_per_parameter = 20
match = "flops"

[data]
vocabulary = 512
train_tokens = 2_000_000
validation_tokens = 65_536

[arm.mine]
kind = "static"
sites = ["v"]
width = 2
kv_heads = 1
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def exact(run: RunConfig) -> int:
    return flops.count(run.model, run.train.tokens, run.train.sequence_length).flops_exact


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_are_matched_within_a_thousandth(path: Path) -> None:
    runs = load_sweep(path)
    assert len({run.run_id for run in runs}) == len(runs)
    budget = {run.size: exact(run) for run in runs if run.arm == run.baseline}
    for run in runs:
        assert abs(exact(run) / budget[run.size] - 1) <= 1e-3
        assert run.train.tokens % run.train.sequence_length == 0


def test_the_paper_sweep_is_the_papers() -> None:
    (path,) = [path for path in SHIPPED if path.stem == "paper-scaling"]
    runs = load_sweep(path)
    assert [(r.size, r.arm) for r in runs][:5] == [
        ("150M", arm) for arm in ("transformer", "static-qkv", "headwise-qkv", "lowrank-qkv", "lowrank-all")
    ]
    largest = {run.arm: flops.parameters(run.model) for run in runs if run.size == "2B"}
    assert largest["transformer"] == 1_824_655_360
    assert largest["lowrank-all"] == 1_880_000_512
    baseline = next(run for run in runs if run.size == "300M" and run.arm == "transformer")
    assert baseline.train.tokens == pytest.approx(50 * 305_169_408, rel=1e-4)


def test_a_sweep_expands_to_every_combination(tmp_path: Path) -> None:
    runs = load_sweep(write(tmp_path, TEXT))
    assert {(r.size, r.arm, r.seed) for r in runs} == {
        (size, arm, seed)
        for size in ("25k", "110k")
        for arm in ("transformer", "lowrank-qkv", "mine")
        for seed in (0, 1)
    }
    (mine,) = [run for run in runs if (run.size, run.arm, run.seed) == ("25k", "mine", 0)]
    assert (mine.model.conv.kind, mine.model.conv.sites, mine.model.conv.width) == ("static", ("v",), 2)
    assert (mine.model.heads, mine.model.kv_heads) == (2, 1)
    (lowrank,) = [run for run in runs if (run.size, run.arm, run.seed) == ("25k", "lowrank-qkv", 0)]
    assert lowrank.model.conv.rank == 4  # the ladder's


def test_match_tokens_gives_every_arm_the_baselines_tokens(tmp_path: Path) -> None:
    runs = load_sweep(write(tmp_path, TEXT.replace('"flops"', '"tokens"')))
    for size in ("25k", "110k"):
        of_size = [run for run in runs if run.size == size]
        baseline = next(run for run in of_size if run.arm == "transformer")
        assert {run.train.tokens for run in of_size} == {baseline.train.tokens}
        assert abs(baseline.train.tokens - 20 * flops.parameters(baseline.model)) <= baseline.train.sequence_length / 2


def test_arms_are_evaluated_at_the_same_tokens(tmp_path: Path) -> None:
    for run in load_sweep(write(tmp_path, TEXT)):
        assert run.train.evaluate_every % (run.train.batch_sequences * run.train.sequence_length) == 0
    intervals = {(run.size, run.train.evaluate_every) for run in load_sweep(write(tmp_path, TEXT))}
    assert len(intervals) == 2


def test_the_run_id_follows_the_content_alone(tmp_path: Path) -> None:
    first, again = (load_sweep(write(tmp_path, TEXT)) for _ in range(2))
    assert [run.run_id for run in first] == [run.run_id for run in again]
    renamed = load_sweep(write(tmp_path, TEXT.replace('name = "test"', 'name = "other"')))
    assert [run.run_id for run in renamed] == [run.run_id for run in first]
    run = first[0]
    assert run.run_id.startswith("transformer-25k-s0-")
    changed = [
        replace(run, seed=7),
        replace(run, model=replace(run.model, qk_norm=True)),
        replace(run, train=replace(run.train, learning_rate=1e-4)),
        replace(run, data=replace(run.data, train_tokens=1_000_000)),
    ]
    assert len({other.run_id for other in [run, *changed]}) == 5


def test_a_run_survives_its_own_json(tmp_path: Path) -> None:
    """A config read back is the config that was frozen: the id is the proof, as every field enters it."""
    import dataclasses
    import json

    for run in load_sweep(write(tmp_path, TEXT)):
        table = json.loads(json.dumps(dataclasses.asdict(run)))
        again = strict.parse(table, RunConfig, "config.json")
        assert again == run
        assert again.run_id == run.run_id


@given(
    tokens_per_parameter=st.floats(10, 200),
    rank=st.integers(1, 8),
    width=st.integers(1, 8),
    kind=st.sampled_from(["static", "headwise", "lowrank"]),
)
def test_matching_holds_for_any_arm(tokens_per_parameter: float, rank: int, width: int, kind: str) -> None:
    table = strict.tomllib.loads(TEXT) | {"tokens_per_parameter": tokens_per_parameter, "max_epochs": 1000}
    table["arm"] = {"mine": {"kind": kind, "sites": ["q", "down"], "width": width}}
    if kind == "lowrank":
        table["arm"]["mine"]["rank"] = rank
    runs = expand(strict.parse(table, Sweep, "test"))
    budget = {run.size: exact(run) for run in runs if run.arm == "transformer"}
    assert all(abs(exact(run) / budget[run.size] - 1) <= 1e-3 for run in runs)


BAD = {
    "unknown key": (
        "seeds =",
        "sedes =",
        r"sweep.toml: unknown key 'sedes'; did you mean 'seeds'\? legal: name, ladder",
    ),
    "unknown arm": ('"lowrank-qkv"', '"lowrank-qvk"', r"arms: got 'lowrank-qvk'; did you mean 'lowrank-qkv'\?"),
    "unknown size": ('"110k"', '"100k"', r"sizes of ladder 'nano': got '100k'; did you mean '110k'\? legal: 25k"),
    "unknown ladder": ('"nano"', '"nanno"', r"ladder: got 'nanno'; did you mean 'nano'\? legal: paper, mini, nano"),
    "wrong type": ("seeds = [0, 1]", 'seeds = ["0"]', r"seeds\[0\]: got '0'; wanted a whole number"),
    "not an array": ("seeds = [0, 1]", "seeds = 3", r"seeds: got 3; wanted an array"),
    "boolean as a number": ("seeds = [0, 1]", "seeds = [true]", r"seeds\[0\]: got True; wanted a whole number"),
    "illegal choice": ('"flops"', '"flop"', r"match: got 'flop'; did you mean 'flops'\? legal: tokens, flops"),
    "unknown site": ('["v"]', '["gat"]', r": arm.mine.sites\[0\]: got 'gat'; did you mean 'gate'\? legal: q, k, v"),
    "sites without a kind": ('kind = "static"', 'kind = "none"', r"arm.mine: width is for kind static or headwise"),
    "no kind": ('kind = "static"\nsites = ["v"]\nwidth = 2', 'sites = ["v"]', r"arm.mine at 25k: kind 'none' .*remove"),
    "no sites": ('sites = ["v"]\n', "", r"arm.mine at 25k: kind 'static' needs sites; got none; name some of q, k"),
    "rank of static": ("width = 2", "rank = 2", r"arm.mine: rank is for kind lowrank; got 2 with kind 'static'; rem"),
    "head size of static": ("width = 2", "head_size = 8", r"head_size is for kind headwise; got 8 with kind 'static'"),
    "filter of static": (
        "width = 2",
        "static_filter = false",
        r"static_filter is for .*; got False with kind 'static'",
    ),
    "arm left out": (
        "kv_heads = 1\n",
        "kv_heads = 1\n[arm.rest]\nkv_heads = 3\n",
        r"arm.rest at 25k: kv_heads must divide heads; got 3 and 2",
    ),
    "arm with a path": (
        "[arm.mine]",
        '[arm."../x/y"]\n[arm.mine]',
        r"arm must be letters, .*; got '../x/y'; rename it",
    ),
    "no name": ('name = "test"', 'name = ""', r"name must be letters, .*; got ''; rename it"),
    "infinitely many tokens": (
        "tokens_per_parameter = 20",
        "tokens_per_parameter = inf",
        r"at most 1e\+09; got inf",
    ),
    "too many tokens": ("tokens_per_parameter = 20", "tokens_per_parameter = 1e308", r"at most 1e\+09; got 1e\+308"),
    "not a number": ("tokens_per_parameter = 20", "tokens_per_parameter = nan", r"at most 1e\+09; got nan"),
    "validation without a sequence": (
        "validation_tokens = 65_536",
        "validation_tokens = 128",
        r"25k: data.validation_tokens must be above the sequence length, 128; got 128; raise it",
    ),
    "training without a sequence": (
        "train_tokens = 2_000_000",
        "train_tokens = 100",
        r"25k: data.train_tokens must be above the sequence length, 128; got 100; raise it",
    ),
    "baseline not an arm": ('baseline = "transformer"', 'baseline = "static-qkv"', r"baseline.*got 'static-qkv'"),
    "missing key": ('match = "flops"', "", r"missing key 'match'"),
    "nested unknown key": ("vocabulary", "vocabluary", r"data: unknown key 'vocabluary'; did you mean 'vocabulary'"),
    "too many epochs": ("train_tokens = 2_000_000", "train_tokens = 200_000", r"would read the data 10\.\d times"),
    "coarse matching": ("tokens_per_parameter = 20", "tokens_per_parameter = 1.2", r"match the baseline's only within"),
    "less than a batch": ("tokens_per_parameter = 20", "tokens_per_parameter = 0.01", r"one batch takes 8; raise it"),
    "negative": ("tokens_per_parameter = 20", "tokens_per_parameter = -1", r"must be above zero, .*; got -1"),
    "built-in redefined": ("[arm.mine]", "[arm.transformer]\n[arm.mine]", r"'transformer' is built in"),
    "heads that do not divide": ("kv_heads = 1\n", "kv_heads = 3\n", r"kv_heads must divide heads; got 3 and 2"),
    "name with a slash": ('name = "test"', 'name = "../test"', r"name must be letters, .*; got '../test'; rename it"),
    "not TOML": ("seeds = [0, 1]", "seeds = [0, 1", r"sweep.toml: not valid TOML"),
    "seed too large": (
        "seeds = [0, 1]",
        f"seeds = [{2**63}]",
        r"seeds must be 0 to 2\*\*63 - 1; got 9223372036854775808",
    ),
    "seed twice": ("seeds = [0, 1]", "seeds = [1, 1]", r"seeds names one twice"),
    "small vocabulary": ("vocabulary = 512", "vocabulary = 100", r"vocabulary must be at least 257"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_mistake_is_one_line_that_names_it(tmp_path: Path, name: str) -> None:
    before, after, message = BAD[name]
    assert before in TEXT
    path = write(tmp_path, TEXT.replace(before, after))
    with pytest.raises(ValueError, match=message) as caught:
        load_sweep(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.toml: no such file"):
        load_sweep(tmp_path / "nothing.toml")
    with pytest.raises(ValueError, match=r"a folder; give the path of a \.toml file in it"):
        load_sweep(tmp_path)


def test_a_file_that_cannot_be_read_is_named() -> None:
    with pytest.raises(ValueError, match=r"/proc/self/mem: must be readable; got Input/output error; give"):
        load_sweep(Path("/proc/self/mem"))


def test_epochs_allowed_by_the_sweep(tmp_path: Path) -> None:
    text = TEXT.replace("train_tokens = 2_000_000", "train_tokens = 200_000").replace(
        "[data]", "max_epochs = 12\n[data]"
    )
    assert max(epochs(run) for run in load_sweep(write(tmp_path, text))) > 10
