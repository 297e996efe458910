"""Sweep files: what they expand to, how compute is matched, and what each mistake says."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from analysis.advantage.planning import ladder_of
from experiments.design import plan, strict
from experiments.design.config import TRUNK, RunConfig
from experiments.design.identity import content, to_dict
from experiments.design.model import ModelConfig
from experiments.design.schedules import Linear
from experiments.design.sweep import Sweep, expand, load_sweep, notes, read_sweep
from experiments.design.train import AdamW, Muon
from experiments.parts.attention import Attention
from experiments.parts.swiglu import SwiGLU

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
mixer = { kind = "attention", kv_heads = 1 }
conv = { kind = "static", sites = ["v"], width = 2 }
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def exact(run: RunConfig) -> int:
    return run.counts.flops_exact


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_sweeps_are_matched_within_a_thousandth(path: Path) -> None:
    runs, match = load_sweep(path), read_sweep(path).match
    assert len({run.run_id for run in runs}) == len(runs)
    assert path.stem == runs[0].sweep
    baselines = {(run.task_name, run.size): run for run in runs if run.arm == run.baseline}
    for run in runs:
        baseline = baselines[run.task_name, run.size]
        if match == "flops":
            assert abs(exact(run) / exact(baseline) - 1) <= 1e-3
        else:
            assert run.train.tokens == baseline.train.tokens
        assert run.train.tokens % run.train.sequence_length == 0


def test_the_paper_sweep_is_the_papers() -> None:
    (path,) = [path for path in SHIPPED if path.stem == "paper-scaling"]
    runs = load_sweep(path)
    assert [(r.size, r.arm) for r in runs][:5] == [
        ("150M", arm) for arm in ("transformer", "static-qkv", "headwise-qkv", "lowrank-qkv", "lowrank-all")
    ]
    largest = {run.arm: run.model.parameters() for run in runs if run.size == "2B"}
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
    assert mine.model.mixer == Attention(heads=2, kv_heads=1)
    (lowrank,) = [run for run in runs if (run.size, run.arm, run.seed) == ("25k", "lowrank-qkv", 0)]
    assert lowrank.model.conv.rank == 4  # the ladder's


def test_match_tokens_gives_every_arm_the_baselines_tokens(tmp_path: Path) -> None:
    runs = load_sweep(write(tmp_path, TEXT.replace('"flops"', '"tokens"')))
    for size in ("25k", "110k"):
        of_size = [run for run in runs if run.size == size]
        baseline = next(run for run in of_size if run.arm == "transformer")
        assert {run.train.tokens for run in of_size} == {baseline.train.tokens}
        assert abs(baseline.train.tokens - 20 * baseline.model.parameters()) <= baseline.train.sequence_length / 2


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
        replace(run, model=replace(run.model, mixer=Attention(2, 2, qk_norm=True))),
        replace(run, train=replace(run.train, learning_rate=1e-4)),
        replace(run, data=replace(run.data, train_tokens=1_000_000)),
    ]
    assert len({other.run_id for other in [run, *changed]}) == 5


def test_the_order_of_sites_is_no_part_of_the_id(tmp_path: Path) -> None:
    ordered, turned = (
        load_sweep(write(tmp_path, TEXT.replace('["v"]', sites)))[-1] for sites in ('["q", "v"]', '["v", "q"]')
    )
    assert ordered.run_id == turned.run_id
    assert turned.model.conv.sites == ("q", "v")


def test_two_parts_of_a_model_name_no_linear_map_alike() -> None:
    class Gated(SwiGLU):
        """A mixer whose maps have the names of the feed-forward part's."""

    model = ModelConfig(layers=1, width=8, vocabulary=300, mixer=Gated(8), ffn=SwiGLU(8))
    with pytest.raises(AssertionError, match=r"both name a linear map \['down', 'gate', 'up'\]; rename one"):
        model.linear_maps()


def test_a_run_survives_its_own_json(tmp_path: Path) -> None:
    """A config read back is the config that was frozen: the id is the proof, as every field enters it."""
    for run in load_sweep(write(tmp_path, TEXT)):
        table = json.loads(json.dumps(to_dict(run)))
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
    conv = {"kind": kind, "sites": ["q", "down"], "width": width} | ({"rank": rank} if kind == "lowrank" else {})
    table["arm"] = {"mine": {"conv": conv}}
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
    "unknown site": (
        '["v"]',
        '["gat"]',
        r"arm.mine at 25k: conv.sites: got 'gat'; did you mean 'gate'\? legal: mixer_input, q, k, v, o, ffn_input, ga",
    ),
    "sites without a kind": (
        'kind = "static", ',
        "",
        r"arm.mine.conv: missing key 'kind'; legal: none, static, headwise",
    ),
    "sites of none": (
        'kind = "static"',
        'kind = "none"',
        r"arm.mine.conv: 'sites' is no key of kind 'none', but of 'static' and 'headwise' and 'lowrank'; remove it or",
    ),
    "unknown kind": (
        '"static"',
        '"statik"',
        r"arm.mine.conv.kind: got 'statik'; did you mean 'static'\? legal: none, st",
    ),
    "no sites": (', sites = ["v"]', "", r"arm.mine.conv: missing key 'sites'; add it"),
    "empty sites": ('["v"]', "[]", r"arm.mine.conv: sites is empty; name some of the model's linear maps"),
    "site twice": ('["v"]', '["v", "v"]', r"arm.mine.conv: sites must name each linear map once; got \['v', 'v'\]"),
    "rank of static": (
        "width = 2",
        "rank = 2",
        r"arm.mine.conv: 'rank' is no key of kind 'static', but of 'lowrank'; rem",
    ),
    "head size of static": ("width = 2", "head_size = 8", r"'head_size' is no key of kind 'static', but of 'headwise'"),
    "filter of static": ("width = 2", "static_filter = false", r"'static_filter' is no key of kind 'static', but of "),
    "no such mixer": ('"attention"', '"atention"', r"arm.mine.mixer.kind: got 'atention'; did you mean 'attention'\?"),
    "a key of another part": (
        "kv_heads = 1",
        "hidden = 3",
        r"arm.mine.mixer: unknown key 'hidden'; legal: heads, kv_hea",
    ),
    "a schedule without its keys": (
        "[data]",
        '[train]\nschedule = { kind = "wsd" }\n[data]',
        r"train.schedule: missing key 'decay_fraction'; add it",
    ),
    "a rate of an arm below zero": (
        "[arm.mine]",
        "[arm.mine.train]\nlearning_rate = -1.0\n[arm.mine]",
        r"arm.mine.train: learning_rate must be above zero; got -1.0; correct it",
    ),
    "an axis that is not the run's": (
        "[data]",
        "[vary]\nmicro_batch = [1, 2]\n[data]",
        r"vary: an axis must be a setting of the runs: got 'micro_batch'; .*legal: learning_rate, learning_rate_factor",
    ),
    "an axis that is set as well": (
        "[data]",
        "[vary]\nclip_norm = [1, 2]\n[arm.mine.train]\nclip_norm = 1\n[data]",
        r"clip_norm is in \[vary\] and in \[arm.mine.train\]; remove one of the two",
    ),
    "an axis of one value twice": (
        "[data]",
        "[vary]\nclip_norm = [1, 1.0]\n[data]",
        r"vary.clip_norm must list different",
    ),
    "an axis of fractions": (
        "[data]",
        "[vary]\nbatch_sequences = [1.5]\n[data]",
        r"vary.batch_sequences must hold whole",
    ),
    "budgets twice": (
        "[data]",
        "[vary]\ntokens_per_parameter = [1, 2]\n[data]",
        r"tokens_per_parameter is given twice",
    ),
    "no budget": (
        "tokens_per_parameter = 20\n",
        "",
        r"tokens_per_parameter is given nowhere; give a number, or a list",
    ),
    "arm left out": (
        "width = 2 }\n",
        'width = 2 }\n[arm.rest]\nmixer = { kind = "attention", kv_heads = 3 }\n',
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
    "heads that do not divide": ("kv_heads = 1", "kv_heads = 3", r"kv_heads must divide heads; got 3 and 2"),
    "name with a slash": ('name = "test"', 'name = "../test"', r"name must be letters, .*; got '../test'; rename it"),
    "not TOML": ("seeds = [0, 1]", "seeds = [0, 1", r"sweep.toml: not valid TOML"),
    "seed too large": (
        "seeds = [0, 1]",
        f"seeds = [{2**63}]",
        r"seeds must be 0 to 2\*\*63 - 1; got 9223372036854775808",
    ),
    "seed twice": ("seeds = [0, 1]", "seeds = [1, 1]", r"seeds must not list a value twice; got \[1, 1\]; remove"),
    "a weight of an average above one": (
        "[data]",
        '[train]\noptimizer = { kind = "adamw", beta1 = 1.5 }\n[data]',
        r"train.optimizer: beta1 must be at least 0 and below 1; got 1.5; correct it",
    ),
    "an epsilon that is not a number": (
        "[data]",
        '[train]\noptimizer = { kind = "muon", epsilon = nan }\n[data]',
        r"train.optimizer: epsilon must be at least 0 and finite; got nan; correct it",
    ),
    "a rate that overflows": (
        "[data]",
        "[train]\nlearning_rate = 1e308\nlearning_rate_factor = 1e10\n[data]",
        r"learning_rate times learning_rate_factor must be above zero and finite; got 1e\+308 times 1e\+10",
    ),
    "a base of RoPE": ("kv_heads = 1", "rope_theta = inf", r"arm.mine.mixer: rope_theta must be above zero and finite"),
    "a number beyond 64 bits": (
        "vocabulary = 512",
        f"vocabulary = 1{'0' * 400}",
        r"data.vocabulary: whole numbers must fit in 64 bits; got one of 401 digits",
    ),
    "a fraction beyond 64 bits": (
        "tokens_per_parameter = 20",
        f"tokens_per_parameter = 1{'0' * 400}",
        r"tokens_per_parameter: whole numbers must fit in 64 bits; got one of 401 digits",
    ),
    "odd heads": ("kv_heads = 1", "heads = 8", r"even number of channels, .*; got 8 heads and width 24"),
    "two points that are one run": (
        "[data]",
        "[vary]\nwarmup_fraction = [0.1, 0.1001]\n[data]",
        r"transformer 25k: the points {'warmup_fraction': 0.1} and {'warmup_fraction': 0.1001} of \[vary\]",
    ),
    "a decay that begins in the warm-up": (
        "[data]",
        "[train]\nwarmup_fraction = 0.5\nschedule = { kind = 'wsd', decay_fraction = 0.9 }\n[data]",
        r"begins to decay after step 49, and the warm-up takes 245; lower warmup_fraction or decay_fraction",
    ),
    "the default spelt otherwise": (
        '"static", sites = ["v"], width = 2',
        '"lowrank", sites = ["v", "gate", "mixer_input"], generator_input = "part"',
        r"arm.mine at 25k: generator_input = \"part\" changes nothing at the sites v, gate, mixer_input, whose",
    ),
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
    assert max(run.epochs for run in load_sweep(write(tmp_path, text))) > 10


# The id: golden values. A change here means that every finished run of every user reads as pending.

GOLDEN = {
    "transformer": "5a8247d1a6",
    "lowrank-qkv": "0d07873f9e",
    "mine": "04127cb180",
}


def test_ids_are_what_they_have_been(tmp_path: Path) -> None:
    runs = {run.arm: run.run_id for run in load_sweep(write(tmp_path, TEXT)) if (run.size, run.seed) == ("25k", 0)}
    assert runs == {arm: f"{arm}-25k-s0-{digest}" for arm, digest in GOLDEN.items()}


def test_names_and_places_are_no_part_of_the_id(tmp_path: Path) -> None:
    run = load_sweep(write(tmp_path, TEXT))[0]
    moved = replace(run, sweep="other", baseline="x", ladder="y", data=replace(run.data, source=str(tmp_path)))
    assert moved.run_id == run.run_id
    looked_at_more_often = replace(run, train=replace(run.train, evaluate_every=128))
    assert looked_at_more_often.run_id == run.run_id
    renamed = replace(run, arm="a", size="b")
    assert renamed.run_id.split("-")[-1] == run.run_id.split("-")[-1]


def test_a_new_setting_with_a_default_moves_no_id(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Tomorrow(RunConfig):
        """With a setting of its own, and one of several kinds in a field of the model's."""

        dropout: float = 0.0

    run = load_sweep(write(tmp_path, TEXT))[0]
    values = {field.name: getattr(run, field.name) for field in fields(run)}
    assert Tomorrow(**values).run_id == run.run_id
    assert Tomorrow(**values, dropout=0.1).run_id != run.run_id


def test_the_tag_of_a_kind_counts_even_where_it_is_the_default(tmp_path: Path) -> None:
    model = content(load_sweep(write(tmp_path, TEXT))[0])["model"]
    assert (model["mixer"]["kind"], model["ffn"]["kind"], model["conv"]["kind"]) == ("attention", "swiglu", "none")
    assert "tied" not in model


# [train] and [vary]


def test_training_settings_of_the_sweep_and_of_an_arm(tmp_path: Path) -> None:
    text = TEXT + (
        "[arm.mine.train]\nlearning_rate_factor = 2.0\noptimizer = { kind = 'muon', momentum = 0.9 }\n"
        "[train]\nlearning_rate = 1e-3\nbatch_sequences = 4\nschedule = { kind = 'linear' }\nwarmup_fraction = 0.2\n"
    )
    runs = {run.arm: run for run in load_sweep(write(tmp_path, text)) if (run.size, run.seed) == ("25k", 0)}
    plain, mine = runs["transformer"].train, runs["mine"].train
    assert (plain.learning_rate, mine.learning_rate) == (1e-3, 2e-3)
    assert (plain.optimizer, mine.optimizer) == (AdamW(), Muon(momentum=0.9))
    assert plain.batch_sequences == mine.batch_sequences == 4
    assert plain.schedule == Linear()
    assert plain.warmup_steps == round(0.2 * plain.steps)
    assert plain.learning_rate_at(plain.warmup_steps - 1) == 1e-3


def test_axes_make_a_grid(tmp_path: Path) -> None:
    text = TEXT.replace("tokens_per_parameter = 20\n", "")
    text += "[vary]\nlearning_rate_factor = [0.5, 1, 2]\ntokens_per_parameter = [10, 20]\n"
    runs = load_sweep(write(tmp_path, text))
    assert len(runs) == 2 * 3 * 2 * 6
    assert len({run.run_id for run in runs}) == len(runs)
    mine = [run for run in runs if (run.arm, run.size, run.seed) == ("mine", "110k", 1)]
    assert [run.train.learning_rate for run in mine] == [5e-3, 5e-3, 1e-2, 1e-2, 2e-2, 2e-2]
    assert [run.vary["tokens_per_parameter"] for run in mine] == [10, 20] * 3
    assert {run.budget for run in mine} == {"10 tokens per parameter", "20 tokens per parameter"}
    single = load_sweep(write(tmp_path, TEXT))
    assert {run.run_id for run in single} <= {run.run_id for run in runs}  # the point in the middle is the same run


def test_budgets_of_warmup_stable_decay_share_a_trunk(tmp_path: Path) -> None:
    text = TEXT.replace("tokens_per_parameter = 20\n", "")
    text += "[train]\nschedule = { kind = 'wsd', decay_fraction = 0.25 }\n[vary]\ntokens_per_parameter = [10, 20, 40]\n"
    runs = [run for run in load_sweep(write(tmp_path, text)) if (run.arm, run.size, run.seed) == ("mine", "25k", 0)]
    trunk, *branches = runs
    assert (trunk.budget, trunk.trunk, [run.trunk for run in branches]) == (TRUNK, None, [trunk.run_id] * 3)
    assert trunk.train.steps == branches[-1].branch_step == max(trunk.train.branch_steps)
    assert [run.branch_step for run in branches] == list(trunk.train.branch_steps)
    for branch in branches:
        train = branch.train
        assert branch.branch_step == train.steps - round(0.25 * train.steps)
        for step in range(branch.branch_step):
            assert train.learning_rate_at(step) == trunk.train.learning_rate_at(step)
        rates = [train.learning_rate_at(step) for step in range(branch.branch_step - 1, train.steps)]
        assert rates[0] == train.learning_rate
        assert np.diff(rates) == pytest.approx(-train.learning_rate / (train.steps - branch.branch_step + 1))
        assert 0 < rates[-1] < rates[0]
    # A branch's C holds all that it took to get there; the sweep pays for what branches share once.
    assert branches[0].own_flops < branches[0].counts.flops_exact == pytest.approx(exact(branches[1]) / 2, rel=1e-2)
    paid = sum(run.own_flops for run in runs)
    assert exact(branches[-1]) < paid < sum(exact(run) for run in branches)
    # Trained from its first step it would be the same run.
    assert replace(branches[0], trunk=None, branch_step=0).run_id == branches[0].run_id


def test_the_plan_names_the_trunk_of_branches_alone(tmp_path: Path) -> None:
    text = TEXT.replace("tokens_per_parameter = 20\n", "") + "[vary]\ntokens_per_parameter = [10, 20]\n"
    text += "[arm.mine.train]\nschedule = { kind = 'wsd', decay_fraction = 0.25 }\n"
    runs = [run for run in load_sweep(write(tmp_path, text)) if (run.size, run.seed) == ("25k", 0)]
    rows = plan.rows(runs, {"25k": 1})
    column = {row["run_id"]: plan._branch(row) for row in rows}
    trunk = next(run for run in runs if run.budget == TRUNK)
    of_branches = {run.run_id: trunk.run_id.rpartition("-")[2] for run in runs if run.trunk}
    assert len(of_branches) == 2
    assert column == dict.fromkeys(column, "") | {trunk.run_id: "trunk"} | of_branches


def test_a_trunk_must_reach_its_peak_before_a_branch_begins(tmp_path: Path) -> None:
    text = TEXT.replace("tokens_per_parameter = 20\n", "")
    text += "[train]\nwarmup_fraction = 0.9\nschedule = { kind = 'wsd', decay_fraction = 0.5 }\n"
    text += "[vary]\ntokens_per_parameter = [10, 20]\n"
    with pytest.raises(ValueError, match=r"begins to decay after step \d+, and the warm-up takes \d+; lower"):
        load_sweep(write(tmp_path, text))


def test_what_is_legal_and_perhaps_not_meant_is_noted(tmp_path: Path) -> None:
    text = TEXT.replace(', "mine"]', "]").replace("[data]", f'[data]\nsource = "{tmp_path}/x"')
    sweep = read_sweep(write(tmp_path, text))
    unused, missing = notes(sweep)
    assert unused == "[arm.mine] makes no run; name it in `arms`, or remove it"
    assert missing.startswith(f"data.source = '{tmp_path}/x' is not there; `submit` will refuse")
    assert notes(read_sweep(write(tmp_path, TEXT))) == []


def test_text_beside_the_sweep_file_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "elsewhere" / "more").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    path = write(tmp_path, TEXT.replace("[data]", '[data]\nsource = "text"\ntokenizer = "more"'))
    data = read_sweep(Path("..") / path.name).data
    assert data is not None
    assert data.source == str(tmp_path / "text")
    assert data.tokenizer == "more"  # which lies in the working directory, and not beside the file
    plain = load_sweep(write(tmp_path, TEXT))
    assert [run.run_id for run in load_sweep(path)] == [run.run_id for run in plain]


def test_the_plan_shows_where_a_run_stands_and_pays_for_a_trunk_once(tmp_path: Path) -> None:
    text = TEXT.replace("tokens_per_parameter = 20\n", "").replace('"lowrank-qkv", "mine"', '"mine"')
    text += "[train]\nschedule = { kind = 'wsd', decay_fraction = 0.25 }\n"
    text += "[vary]\nclip_norm = [0.5, 2]\ntokens_per_parameter = [10, 20]\n"
    runs = load_sweep(write(tmp_path, text))
    rows = plan.rows(runs, {"25k": 1, "110k": 1})
    assert sum(row["flops_own"] for row in rows) < sum(row["flops_exact"] for row in rows if row["trunk"])
    heading, trunk, branch, *_ = plan.render(rows).splitlines()
    assert heading.split()[:5] == ["run", "clip_norm", "tokens_per_parameter", "branch", "of"]
    assert trunk.split()[:3] == [runs[0].run_id, "0.5", "trunk"]
    assert branch.split()[:4] == [runs[1].run_id, "0.5", "10", runs[0].run_id.split("-")[-1]]
    with pytest.raises(ValueError, match=r"power simulates one budget a size; the design has 10 tokens per param"):
        ladder_of(pd.DataFrame.from_records(rows))
