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
from experiments.design.sweep import expand, load_sweep, notes
from experiments.design.sweep_file import Sweep, read_sweep
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


def test_the_run_id_changes_with_the_content(tmp_path: Path) -> None:
    run = load_sweep(write(tmp_path, TEXT))[0]
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


def test_arms_that_are_alike_and_rates_at_which_nothing_learns_are_noted(tmp_path: Path) -> None:
    """Two arms of one architecture have a multiplier of 1 by construction; 3e4 is a 3e-4 that lost its sign."""
    copy = TEXT.replace('"mine"]', '"mine", "copy"]') + "[arm.copy]" + TEXT.partition("[arm.mine]")[2]
    (alike,) = notes(read_sweep(write(tmp_path, copy)))
    assert alike == "arms mine and copy differ in their names alone; change one, or remove it"
    (high,) = notes(read_sweep(write(tmp_path, f"{TEXT}\n[train]\nlearning_rate = 3e4\n")))
    assert high.startswith("no model learns at a learning rate above 1; got 30000 of transformer ")
    assert high.endswith(" and 5 more")
    for rates in ("[3e4, 1e-3]", "[1e-3, 3e4]"):
        (high,) = notes(read_sweep(write(tmp_path, f"{TEXT}\n[vary]\nlearning_rate = {rates}\n")))
        assert high.endswith(" and 5 more")
    assert not [note for path in SHIPPED for note in notes(read_sweep(path)) if "alone" in note or "no model" in note]


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
