"""`dynconv eval --lengths`: recall in longer sequences, of runs whose sweep did not name them."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from analysis.logs.store import load
from experiments.cli.main import main
from experiments.evaluation.recall import check_lengths
from experiments.tasks.mqar import MQAR

SWEEP = """
name = "recall"
ladder = "recall"
sizes = ["d32"]
arms = ["transformer", "lowrank-qkv", "lowrank-qkv-mismatched"]
baseline = "transformer"
seeds = [0]
steps = 8
match = "tokens"

[train]
batch_sequences = 8

[task.recall]
kind = "mqar"
sequence_length = 24
vocabulary = 32
pairs = 4
held_out_sequences = 21
"""
NAMES = ("loss", "accuracy", "exact", "success")


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The runs of the sweep, and the same runs of a sweep that names a longer length before training."""
    found = []
    for name, more in (("plain", ""), ("named", "evaluate_lengths = [40, 64]\n")):
        folder = tmp_path_factory.mktemp(name)
        (folder / "recall.toml").write_text(SWEEP + more)
        (folder / "here.toml").write_text('executor = "debug"\n[default]\ndevice = "cpu"\n')
        command = ["submit", str(folder / "recall.toml"), "--store", str(folder / "store")]
        assert main([*command, "--profile", str(folder / "here.toml")]) == 0
        found.append(folder / "store")
    return found[0], found[1]


def values(store: Path) -> dict[tuple[str, str], float]:
    evals = load(store).evals().merge(load(store).runs[["run_id", "arm"]], on="run_id")
    last = evals[evals["step"] == 8]
    return {(row["arm"], row["metric"]): row["value"] for _, row in last.iterrows()}


def test_the_values_are_those_of_a_sweep_that_named_the_lengths(
    stores: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    plain, named = stores
    before = values(plain)
    capsys.readouterr()
    for lengths in ("40,64", "64"):  # the second time in place of the first
        assert main(["eval", str(plain), "--lengths", lengths, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.partition("]\n")[2])
    assert [(row["arm"], row["metric"]) for row in rows] == [
        (arm, f"{name}@sequence_length=64")
        for arm in ("lowrank-qkv", "lowrank-qkv-mismatched", "transformer")
        for name in NAMES
    ]
    assert {row["task"] for row in rows} == {"recall"}
    after, wanted = values(plain), values(named)
    assert before.items() <= after.items(), "the run's own evaluations stay"
    assert after.keys() == wanted.keys()
    assert after == pytest.approx(wanted, rel=1e-6)
    assert len({value for (_, metric), value in after.items() if metric == "loss@sequence_length=64"}) == 3
    for run_dir in plain.iterdir():
        if run_dir.is_dir() and (run_dir / "evals.parquet").exists():
            keys = [
                tuple(row[k] for k in ("step", "task", "metric"))
                for row in pq.read_table(run_dir / "evals.parquet").to_pylist()
            ]
            assert len(set(keys)) == len(keys)


def test_tables_compare_arms_at_the_new_length(stores: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    plain, named = stores
    assert main(["eval", str(plain), "--lengths", "40"]) == 0
    compared = []
    for store in (plain, named):
        capsys.readouterr()
        assert main(["table", str(store), "--metric", "accuracy@sequence_length=40", "--format", "json"]) == 0
        compared.append([(row["arm"], row["mean"]) for row in json.loads(capsys.readouterr().out)["rows"]])
    assert compared[0] == compared[1]
    assert len(compared[0]) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["RECALL", "--lengths", "12"], "sequence_length must be at least 16 (4 pairs and as many keys"),
        (["RECALL", "--lengths", "24"], "a further held-out set at sequence_length=24 is the task's own; remove it"),
        (["NAMED", "--lengths", "48,64"], "have sequence_length=64 already; leave it out"),
        (["RECALL", "--lengths", "20000000"], "--lengths must be at most 16777216, beyond which RoPE cannot tell"),
        (["RECALL", "--lengths", "64x"], "--lengths must be numbers of tokens, as 512,1024; got 64x; correct it"),
        (["RECALL", "--lengths", ""], "--lengths must be numbers of tokens, as 512,1024; got nothing; correct it"),
        (["RECALL", "--lengths", "0"], "--lengths must be numbers of tokens, as 512,1024; got 0; correct it"),
        (["RECALL", "--lengths", "64", "--tasks", "wikitext"], "--text and --tasks are for runs on text; give one"),
        (["TEXT", "--lengths", "64"], "was trained on text; use --text"),
        (["EMPTY", "--lengths", "64"], "a store with finished runs on generated tasks; it has none; name another"),
        (["FROZEN", "--lengths", "64"], "is frozen, and has no weights to evaluate; name the"),
        (["nowhere", "--lengths", "64"], "nowhere does not exist; name a run's folder, STORE/RUN_ID, or a store"),
        (
            ["RECALL", "--text", "EMPTY"],
            "no tokenizer, as it was trained on recall; give a run on text, or `eval --len",
        ),
    ],
)
def test_a_length_that_cannot_be_evaluated_is_refused_in_one_line(
    arguments: list[str],
    said: str,
    stores: tuple[Path, Path],
    finished: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain, named = (next(store.glob("lowrank-qkv-d32-*")) for store in stores)
    (tmp_path / "a.txt").write_text("x = 1\n")
    places = {"RECALL": plain, "NAMED": named, "TEXT": finished(), "EMPTY": tmp_path}
    places["FROZEN"] = Path(__file__).parents[1] / "results/measured/h200/mini-rates"
    capsys.readouterr()
    assert main(["eval", *(str(places.get(word, word)) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_another_version_of_the_task_is_refused(stores: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sequences are not those that the run has learned."""
    monkeypatch.setattr(MQAR, "version", 2)
    with pytest.raises(ValueError, match="was trained on another version of the task recall; check out the code"):
        check_lengths(next(stores[0].glob("lowrank-qkv-d32-*")), [64])
