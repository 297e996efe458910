"""The verbs fit, table, plot and freeze, from the files they read to what they print."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from planted import write_config, write_sweep

from experiments.cli.main import main
from experiments.design.arms import ALL_LINEAR
from experiments.design.ladder import LADDERS
from experiments.design.model import ModelConfig
from experiments.parts.attention import Attention
from experiments.parts.registry import CONVOLUTIONS
from experiments.parts.swiglu import SwiGLU


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    arms = {"lowrank-qkv": 1.33, "static-qkv": 1.0}
    return write_sweep(tmp_path_factory.mktemp("stores") / "sweep", arms, seeds=3)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main([str(item) for item in arguments])
    out = capsys.readouterr()
    return code, out.out, out.err


def write_points(path: Path, rows: Sequence[str], header: str = "arm,size,C,loss") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_table_as_json_has_what_is_documented(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "table", sweep, "--json")
    lowrank, static = json.loads(out)
    assert (code, err) == (0, "")
    assert [lowrank["arm"], static["arm"]] == ["lowrank-qkv", "static-qkv"]
    assert lowrank["ci"][0] < 1.33 < lowrank["ci"][1]
    assert lowrank["ci"][0] < lowrank["m"] < lowrank["ci"][1]
    assert (lowrank["method"], lowrank["convention"], lowrank["status"]) == ("paired", "exact", "ok")
    assert (lowrank["n_sizes"], lowrank["n_seeds"], lowrank["excluded"]) == (5, 3, [])
    assert 0 < lowrank["constant_m_p"] <= 1
    assert lowrank["loso"][0] < lowrank["m"] < lowrank["loso"][1]
    assert lowrank["m_at_cmax"] == pytest.approx(1.33, rel=0.05)
    assert set(lowrank["conventions"]) == {"6ND", "6N_nonemb D"}
    assert lowrank["joint"]["ci"][0] < 1.33 < lowrank["joint"]["ci"][1]
    assert static["status"] == "not resolved: the interval holds 1"
    assert run(capsys, "table", sweep, "--format", "json")[1] == out


def test_the_same_answer_in_every_format(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    m = json.loads(run(capsys, "table", sweep, "--json")[1])[0]["m"]
    row = next(csv.DictReader(io.StringIO(run(capsys, "table", sweep, "--format", "csv")[1])))
    assert float(row["m"]) == m
    assert f"| {m:.3f} |" in run(capsys, "table", sweep)[1]
    latex = run(capsys, "table", sweep, "--format", "latex")[1]
    assert f"& {m:.3f} &" in latex
    assert latex.count(r"\\") == 3


def test_the_table_fits_a_terminal_and_its_notes_say_the_whole_status(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for store in (sweep, PUBLISHED):
        text = run(capsys, "table", store)[1]
        assert max(map(len, (line for line in text.splitlines() if line.startswith("|")))) <= 120
        noted = dict(re.findall(r"^\[(\d+)\] (.*)$", text, re.MULTILINE))
        rows = re.findall(
            r"^\| (.+?) +\|.*\| (ok|not resolved|see) *(?:\[([\d, ]+)\])? +\|$", text.partition("\n\n")[0], re.M
        )
        said = {arm: [noted[number] for number in numbers.split(", ") if number] for arm, _, numbers in rows}
        for item in json.loads(run(capsys, "table", store, "--json")[1]):
            remarks = [] if item["status"] == "ok" else item["status"].removeprefix("not resolved: ").split("; ")
            assert said[item["arm"]] == remarks


def test_frozen_and_live_stores_give_the_same_table(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "freeze", sweep, "-o", tmp_path / "frozen")
    assert (code, out.split()) == (0, [str(tmp_path / "frozen" / f"{name}.parquet") for name in ("evals", "runs")])
    for verb in ("table", "fit"):
        assert run(capsys, verb, tmp_path / "frozen")[:2] == run(capsys, verb, sweep)[:2]


def test_fit_prints_one_object_in_raw_units(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        f"{n},{d},{1.69 + 406.4 * n**-0.34 + 410.7 * d**-0.28}"
        for n in (1e7, 3e7, 1e8, 3e8, 1e9)
        for d in (1e9, 1e10, 1e11, 1e12)
    ]
    points = write_points(tmp_path / "grid.csv", rows, "N,D,loss")
    code, out, _ = run(capsys, "fit", points, "--form", "nd", "--loss", "huber", "--delta", "1e-3", "--json")
    law = json.loads(out)
    assert code == 0
    truth = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}
    assert {name: law[name] for name in truth} == pytest.approx(truth, rel=1e-6)
    assert set(law["ci"]) == set(truth)
    assert (law["status"], law["form"], law["loss"], law["delta"]) == ("ok", "nd", "huber", 1e-3)
    assert law["certificate"]["converged"] is True
    code, out, _ = run(capsys, "fit", points, "--loss", "lsq", "--bootstrap", "0", "--json")
    assert (json.loads(out)["ci"], json.loads(out)["delta"]) == (None, None)


def test_fit_of_several_arms_gives_each_its_multiplier(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    law = json.loads(run(capsys, "fit", sweep, "--json")[1])
    assert (law["baseline"], law["A"]) == ("transformer", law["arms"]["transformer"]["A"])
    assert law["arms"]["lowrank-qkv"]["m"] == pytest.approx(1.33, rel=0.05)
    assert law["arms"]["lowrank-qkv"]["ci"]["m"][0] < 1.33 < law["arms"]["lowrank-qkv"]["ci"]["m"][1]


PUBLISHED = Path(__file__).parents[1] / "results" / "published"
GOOD = [
    f"{arm},{size},1e{15 + size},{3 - 0.2 * size - gain}" for arm, gain in (("a", 0), ("b", 0.05)) for size in range(4)
]


@pytest.mark.parametrize(
    ("header", "rows", "message"),
    [
        ("arm,size,C,loss", ["a,0,1e15,3", "b,0,1e15,2.9"], "1 paired size with a"),
        ("arm,size,C", ["a,0,1e15", "b,0,1e15"], "no column loss"),
        ("size,C,loss", ["0,1e15,3"], "no arm"),
        ("arm,C,loss", ["a,1e15,3", "b,1e15,2.9"], "row 1, row 2 has neither; add a column size or N"),
        ("arm,size,loss", ["a,0,3", "b,0,2.9"], "no compute in every row"),
        ("arm,size,C,loss", [*GOOD, "a,9,1e20,nan"], "got nan in row 9"),
        ("arm,size,C,loss", [*GOOD, "a,9,1e20,-1"], "got -1.0 in row 9"),
        (
            "arm,size,C,loss,D",
            [*(f"{row}," for row in GOOD), "a,9,1e20,2,-5"],
            "D must be positive; got -5(.0)? in row 9",
        ),
        (
            "arm,size,C,loss,N",
            [*(f"{row}," for row in GOOD), "a,9,1e20,2,0"],
            "N must be positive; got 0(.0)? in row 9",
        ),
        ("arm,size,C,loss", [*GOOD, "a,9,-1e20,2", "b,9,1e20,2"], "compute must be positive; got -1e[+]20 in row 9"),
        (
            "arm,size,C,loss,tokenizer",
            [f"{row},{i % 2}" for i, row in enumerate(GOOD)],
            "tokenizers .*row 2, row 4",
        ),
        ("arm,size,C,loss,data", [f"{row},{i % 2}" for i, row in enumerate(GOOD)], "mix data"),
        (
            "arm,size,C,loss,convention",
            [f"{row},{('exact', '6ND')[i % 2]}" for i, row in enumerate(GOOD)],
            "mix FLOP conventions",
        ),
        ("arm,size,C,loss", ["b,0,1e15,3", "b,1,1e16,2"], "no arm 'a' to be the baseline; the arms are b"),
        ("arm,size,C,loss", ["a,0,1e15,3", "a,1,1e16,2"], "holds the baseline 'a' alone"),
    ],
)
def test_a_table_that_supports_no_claim_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], header: str, rows: list[str], message: str
) -> None:
    code, out, err = run(capsys, "table", write_points(tmp_path / "p.csv", rows, header), "--baseline", "a")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(message, err)


def test_what_arms_have_in_common_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Of five arms at their own best rates, whose runs shared a GPU, the baseline's rate was printed five times."""
    code, out, _ = run(capsys, "table", str(PUBLISHED.parent / "measured" / "h200" / "mini-rates"))
    (rates,) = [line for line in out.splitlines() if line.startswith("Each arm at its own best learning rate: ")]
    assert (code, rates.count("transformer at"), rates.count("x the ladder's rate")) == (0, 1, 6)
    (clock,) = [line for line in out.splitlines() if line.startswith("No wall clock: ")]
    _, losses, _ = run(capsys, "table", str(PUBLISHED.parent / "measured" / "h200" / "mini-rates"), "--metric", "loss")
    assert rates.lower() in [f"{line}." for line in losses.splitlines()]
    assert clock.endswith("shared their device; for 4 more reasons see --json.")


def test_arms_that_are_refused_for_one_reason_are_named_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = write_points(tmp_path / "p.csv", [f"{arm},0,1e15,3" for arm in "abc"], "arm,size,C,loss")
    code, _, err = run(capsys, "table", points, "--baseline", "a")
    assert (code, err.count("an interval needs at least two")) == (2, 1)
    assert err.startswith("dynconv table: b, c: 1 paired size with a;")


def test_rows_without_a_partner_are_left_out_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{row},complete" for row in GOOD]
    rows += ["a,9,1e19,2.0,complete", rows[5], "b,9,1e19,,unfinished", "c,0,1e15,3,complete"]
    points = write_points(tmp_path / "p.csv", rows, "arm,size,C,loss,status")
    code, out, err = run(capsys, "table", points, "--baseline", "a", "--json")
    (answer,) = json.loads(out)
    assert (code, answer["arm"], answer["n_sizes"]) == (0, "b", 4)
    assert {item["run_id"]: item["reason"] for item in answer["excluded"]} == {
        "row 9": "no partner of the same size and seed in b",
        "row 10": "repeats a run",
        "row 11": "unfinished",
    }
    assert "no answer for c: 1 paired size" in err


def test_sizes_and_seeds_behind_each_m_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Arms whose sizes or seeds differ stand side by side in a table, and their m at other computes."""
    rows = [
        f"{arm},{size},{c:g},{10 * c**-0.05 - gain + 0.001 * seed},{seed}"
        for arm, gain in (("base", 0.0), ("one", 0.01), ("two", 0.02))
        for size, c in (("1M", 1e15), ("3M", 4e15), ("9M", 16e15), ("27M", 64e15))
        for seed in (0, 1)
        if not (arm == "one" and size == "27M") and (arm, size, seed) != ("two", "3M", 1)
    ]
    header = "arm,size,C,loss,seed"
    whole = write_points(tmp_path / "whole.csv", [row for row in rows if row[:3] != "two"], header)
    assert "\nPaired at 1M, 3M, 9M (seeds: 2).\n" in run(capsys, "table", whole, "--baseline", "base")[1]
    store = write_points(tmp_path / "points.csv", rows, header)
    out = run(capsys, "table", store, "--baseline", "base")[1]
    assert "\nPaired: one at 1M, 3M, 9M (seeds: 2); two at 1M x 2, 3M x 1, 9M x 2, 27M x 2.\n" in out
    reasons = ["row 7, row 8 (no partner of the same size and seed in one)"]
    reasons += ["row 4 (no partner of the same size and seed in two)"]
    assert out.rstrip().endswith(f"Left out: 3 rows: {'; '.join(reasons)}")
    found = json.loads(run(capsys, "table", store, "--baseline", "base", "--json")[1])
    assert [[(row["size"], row["seeds"]) for row in item["local"]] for item in found] == [
        [("1M", 2), ("3M", 2), ("9M", 2)],
        [("1M", 2), ("3M", 1), ("9M", 2), ("27M", 2)],
    ]


def test_a_store_with_a_run_still_training_is_tabulated_without_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_sweep(tmp_path / "store", {"dyn": 1.5}, sizes=3, seeds=1)
    write_config(store, "dyn", "s9")
    (store / "foreign").mkdir()
    code, out, err = run(capsys, "table", store, "--json")
    assert (code, json.loads(out)[0]["excluded"]) == (
        0,
        [{"run_id": "dyn-s9-0", "arm": "dyn", "reason": "unfinished"}],
    )
    assert "foreign is left out" in err


def test_the_analysis_starts_without_torch_or_pandas() -> None:
    heavy = "{'torch', 'pandas', 'numpy', 'scipy', 'pyarrow', 'matplotlib'}"
    modules = "experiments.cli.claims, experiments.cli.pages, analysis.logs.writer"
    script = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_the_published_rows_are_tabulated_and_resolve_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: perplexities 19.12 and 11.71, exponent .0508 at E = 0, 1.39x at 2B on equal tokens."""
    code, out, _ = run(capsys, "table", PUBLISHED, "--convention", "6ND", "--json")
    found = {item["arm"]: item for item in json.loads(out)}
    assert code == 0
    assert all(item["status"].startswith("not resolved") for item in found.values())
    assert {row["E"] for item in found.values() for row in item["irreducible_loss_sensitivity"]} == {0.0, 1.6}
    exponent = math.log(math.log(19.12) / math.log(11.71)) / math.log(
        1824655360 * 91232768000 / 305169408 / 14999998464
    )
    all_linear = (math.log(11.71) / math.log(10.95)) ** (1 / exponent) * 1824655360 / 1880000512
    assert found["lowrank-all"]["m"] == pytest.approx(all_linear, rel=1e-5)
    assert found["lowrank-all"]["ci"] is None
    at_2b = found["lowrank-qkv"]["local"][1]
    assert at_2b["m"] * 1841170432 / 1824655360 == pytest.approx(1.39, abs=0.06)
    assert set(found["lowrank-qkv"]["conventions"]) == {"exact", "6N_nonemb D"}


def test_each_published_row_is_shown_by_every_convention_at_every_stated_floor(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = run(capsys, "table", PUBLISHED)[1].partition("\n\n")[2]
    columns = [cell.strip() for cell in text.splitlines()[0].split("|")[2:-1]]
    shown = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.split("\n\n")[0].splitlines()[2:]}
    assert len(shown) == 26
    for name in ("exact", "6ND", "6N_nonemb D"):
        for floor in ("0", "1.6"):
            column = columns.index(f"E={floor} {name}")
            asked = ("--convention", name, "--hold", f"E={floor}", "--json")
            for item in json.loads(run(capsys, "table", PUBLISHED, *asked)[1]):
                assert float(shown[item["arm"]][column]) == pytest.approx(item["m"], abs=6e-4)


def test_the_published_counts_are_those_of_the_described_models() -> None:
    ladder = LADDERS["paper"]
    for row in csv.DictReader((PUBLISHED / "points.csv").read_text().splitlines()):
        shape = ladder.shape(row["size"])
        keys = ("width", *{"lowrank": ("rank",), "headwise": ("head_size",)}.get(row["conv.kind"], ()))
        numbers = {name: int(row[f"conv.{name}"]) for name in keys if row[f"conv.{name}"]}
        sites = {"all-linear": ALL_LINEAR}.get(row["conv.sites"], tuple(row["conv.sites"]))
        (kind,) = [kind for kind in CONVOLUTIONS if kind.kind == row["conv.kind"]]
        model = ModelConfig(
            ladder.sizes[row["size"]].layers,
            width=shape.width,
            vocabulary=100_352,
            mixer=Attention().fitted(shape),
            ffn=SwiGLU().fitted(shape),
            conv=kind(sites, **numbers) if sites else kind(),
        )
        tokens = int(row["D"])
        assert model.parameters() == int(row["N"])
        exact = model.training_flops_per_sequence(4096) * tokens / 4096
        assert float(row["flops_exact"]) == pytest.approx(exact, rel=1e-6)
        assert float(row["loss"]) == pytest.approx(math.log(float(row["perplexity"])), abs=1e-6)
