"""Other people's tables: read as they come where there is one way to read them, refused by row and column where not."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from planted import write_points
from pyarrow import parquet

from analysis.logs.columns import format_columns, loss_unit, parse_columns
from analysis.logs.numerals import decimal_mark, number
from analysis.logs.store import Store, freeze, load
from experiments.cli.main import main

HEADER = "arm,size,N,D,loss\n"


def read(tmp_path: Path, text: str | bytes, name: str = "points.csv", **columns: str) -> pd.DataFrame:
    return read_store(tmp_path, text, name, **columns).runs


def read_store(tmp_path: Path, text: str | bytes, name: str = "points.csv", **columns: str) -> Store:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return load(path, columns)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    packed: bytes = sink.getvalue().to_pybytes()
    return packed


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be")

# What a text cell may hold and stay itself: no spaces around it, no control characters, letters composed, none of the
# words for missing.
TEXTS = st.text(st.characters(exclude_categories=("C", "Z")) | st.sampled_from(" ,;'\""), min_size=1, max_size=12).map(
    lambda text: unicodedata.normalize("NFC", f"a{text}").strip()
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "arm": TEXTS,
            "size": TEXTS | st.none(),
            "seed": st.integers(0, 2**40) | st.none(),
            "N": st.integers(1, 2**53),
            "D": st.floats(1.0, 1e13),
            "loss": st.floats(1e-3, 1e3),
            "note": TEXTS,
        }
    ),
    min_size=1,
    max_size=6,
)


def written(rows: list[dict[str, Any]], form: str, encoding: str, comma: bool) -> bytes:
    """The table as a file: delimited text (decimal commas where semicolons or tabs divide it), JSON lines, Parquet."""
    if form == ".parquet":
        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(rows), sink)
        content: bytes = sink.getvalue().to_pybytes()
        return content
    if form == ".jsonl":
        return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode(encoding)
    frame = pd.DataFrame(rows).astype({"seed": "Int64"})
    delimiter = {".tsv": "\t", ".csv": ";" if comma else ","}[form]
    return frame.to_csv(index=False, sep=delimiter, decimal="," if comma else ".").encode(encoding)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=ROWS,
    form=st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet"]),
    packing=st.sampled_from(sorted(PACKINGS)),
    encoding=st.sampled_from(ENCODINGS),
    comma=st.booleans(),
    upper=st.booleans(),
)
def test_any_table_reads_back_equal_in_every_form(
    tmp_path: Path, rows: list[dict[str, Any]], form: str, packing: str, encoding: str, comma: bool, upper: bool
) -> None:
    content = PACKINGS[packing](written(rows, form, encoding, comma))
    suffix = f"{form}{packing}"
    try:
        runs = read(tmp_path, content, f"points{suffix.upper() if upper else suffix}")
    except ValueError as error:
        if "may be a decimal comma or a thousands separator" not in str(error):
            raise
        return  # every number has three decimals
    assert runs["arm"].tolist() == [row["arm"] for row in rows]
    assert runs["size"].astype(object).where(runs["size"].notna(), None).tolist() == [row["size"] for row in rows]
    assert runs["note"].tolist() == [row["note"] for row in rows]
    assert runs["seed"].astype(object).where(runs["seed"].notna(), None).tolist() == [row["seed"] for row in rows]
    assert runs["parameters"].tolist() == [row["N"] for row in rows]
    assert runs["tokens"].astype(float).tolist() == [row["D"] for row in rows]
    assert runs["loss"].tolist() == [row["loss"] for row in rows]


NUMERALS = ["1,234", "1.234", "3,50", "3.50", "1,234,567", "1.234.567", "1.234,5", "1,234.5", "12", "1,5e3", "1.2,3"]


@settings(deadline=None, max_examples=300)
@given(cells=st.lists(st.sampled_from(NUMERALS) | st.text("0123456789,. eMkB-", max_size=8), min_size=1))
def test_a_number_is_read_in_one_way_or_refused(cells: list[str]) -> None:
    """What is accepted agrees with a plain second reading of each cell by the mark that was found."""
    try:
        mark = decimal_mark({"loss": cells})
        values = [number(cell, mark) for cell in cells]
    except ValueError:
        return
    separator = {",": ".", ".": ","}[mark]
    for cell, value in zip(cells, values, strict=True):
        plain = cell.lower().replace(separator, "").replace(mark, ".").replace(" ", "")
        scale = {"k": 1e3, "m": 1e6, "b": 1e9}.get(plain[-1:], 1.0)
        assert not plain or value == float(plain.rstrip("kmb")) * scale


@pytest.mark.parametrize(
    ("cells", "mark", "values"),
    [
        (["1,234", "3,50"], ",", [1.234, 3.5]),
        (["1,234", "3.50"], ".", [1234.0, 3.5]),
        (["1,234", "1,234,567"], ".", [1234.0, 1234567.0]),
        (["1.234.567", "0,123"], ",", [1234567.0, 0.123]),
        (["1.234", "2.812"], ".", [1.234, 2.812]),
        (["91M", "1.3B", "15t", "2 k", "1 024"], ".", [91e6, 1.3e9, 15e12, 2e3, 1024.0]),
    ],
)
def test_how_decimals_are_written_is_told_by_the_whole_table(cells: list[str], mark: str, values: list[float]) -> None:
    assert decimal_mark({"loss": cells}) == mark
    assert [number(cell, mark) for cell in cells] == pytest.approx(values, rel=1e-15)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=60), form=st.sampled_from([".csv", ".tsv", ".jsonl", ".parquet", ".csv.gz", ".csv.zst"])
)
def test_bytes_that_are_no_table_are_refused_in_one_line(tmp_path: Path, content: bytes, form: str) -> None:
    told = f"noise{form}"
    try:
        read(tmp_path, content, f"noise{form}")
    except ValueError as error:
        told = str(error)
    assert f"noise{form}" in told
    assert "\n" not in told


@pytest.mark.parametrize("packing", [".gz", ".bz2", ".xz", ".zst"])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, packing: str) -> None:
    content = PACKINGS[packing]((HEADER + "".join(f"a{i},S,{i + 1}e8,2e9,3.5\n" for i in range(999))).encode())
    with pytest.raises(ValueError, match=rf"points\.csv\{packing} is unreadable"):
        read(tmp_path, content[: len(content) // 2], f"points.csv{packing}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + "a,S,1e8,2e9,3.5\nb,S,1e8,2e9,3,4\n", r"row 2 has 6 cells for 5 columns \(b; S; 1e8; 2e9; 3; 4\)"),
        (HEADER + "a,S,1e8,2e9\n", "row 1 has 4 cells for 5 columns .*; fill it up with empty cells"),
        (HEADER + 'a,S,"1,234",2e9,"3,512"\n', "'1,234' in row 1 of column N may be a decimal comma or a thousands"),
        (HEADER + 'a,S,1e8,2e9,"3,5"\nb,S,1e8,2e9,3.4\n', "points in '3.4' in row 2 .* commas in '3,5' in row 1"),
        (HEADER + "a,S,1e8,2e9,abc\n", "column loss must hold numbers; got 'abc' in row 1"),
        ("arm;size;loss, val\na;S;3,5\n", "lines up by commas and semicolons alike"),
        ("arm,loss,loss\na,1,2\n", "two columns 'loss' that differ"),
        ("arm,,loss\na,1,2\n", "column 2 has no name"),
        ('arm,loss\n"a,1\n', "line 2: unexpected end of data"),
        (b"arm,loss\n\xfc,1\n", "no UTF-8-SIG in line 2; save it as UTF-8"),
        ("arm,N,parameters,D,loss\na,5,6,1,2\n", "'parameters' and 'N' could both be N and differ; .*--columns N=..."),
        ("arm,C,loss,val_loss\na,5,6,1\n", "'loss' and 'val_loss' could both be loss and differ"),
        ("arm,C,val/loss,test/loss\na,5,6,1\n", "'val/loss' and 'test/loss' could both be loss and differ"),
        ("Step,a - loss,a - loss__MIN\n1,5,6\n", "is a chart's export"),
        ("arm,C,loss,seed\na,1,2,0.5\n", "column seed must hold whole numbers or names; got '0.5' in row 1"),
    ],
)
def test_what_could_be_read_wrongly_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        read(tmp_path, text)
    assert "points.csv" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_json_lines_that_are_none_are_refused_by_line(tmp_path: Path) -> None:
    for text, message in {
        '{"arm": "a"}\n{"arm": ': "line 2: Expecting value",
        "[1, 2]\n": "line 1: it holds a list, not an object",
        '{"arm": "a", "arm": "b"}': "line 1: the key 'arm' stands there twice",
    }.items():
        with pytest.raises(ValueError, match=f"points.jsonl is unreadable: {message}"):
            read(tmp_path, text, "points.jsonl")


def test_decimal_commas_and_spaces_and_letters_are_read(tmp_path: Path) -> None:
    head = "Arm ; size; N ; D; C; Val Loss\n"
    runs = read(tmp_path, head + "base ;S; 91M;1,3B;1,5e18; 3,50\nnew;S;91M;1,3B;1,5e18;3,44\n")
    assert runs["arm"].tolist() == ["base", "new"]
    assert runs["loss"].tolist() == [3.5, 3.44]
    assert runs[["parameters", "tokens", "flops_given"]].values.tolist() == [[91e6, 1.3e9, 1.5e18]] * 2
    with pytest.raises(ValueError, match=r"points in '1\.3B' in row 1 of column D and commas in '1,5e18' in row 1"):
        read(tmp_path, head + "base;S;91M;1.3B;1,5e18;3,50\n")


def test_names_and_seeds_in_any_spelling(tmp_path: Path) -> None:
    text = "Arm , Model Size,Num Params,training tokens,Val/Loss,Random Seed,lr\nbase,S,91M,1.3B,3.5,seed0,1e-3\n"
    row = read(tmp_path, text + "base,S,91M,1.3B,3.6,seed 1,1e-3\n").iloc[1]
    assert (row["arm"], row["size"], row["parameters"], row["tokens"]) == ("base", "S", 91e6, 1.3e9)
    assert (row["loss"], row["seed"], row["train.learning_rate"]) == (3.6, 1, 1e-3)
    assert read(tmp_path, "arm,C,loss,seed\na,1,2,-1\na,1,2,1\n")["seed"].tolist() == [-1, 1]
    seeds = read(tmp_path, "arm,C,loss,seed\na,1,2,alpha\nb,1,2,beta\nb,1,2,alpha\n")["seed"].tolist()
    assert seeds[0] == seeds[2] != seeds[1]
    assert seeds[1] == read(tmp_path, "arm,C,loss,seed\na,1,2,beta\n")["seed"].item()
    assert read(tmp_path, "arm,C,loss,seed\na,1,2,a1\na,1,2,b1\n")["seed"].nunique() == 2


def test_an_index_of_a_parquet_is_read_as_columns(tmp_path: Path) -> None:
    frame = pd.DataFrame({"arm": ["a", "b"], "size": ["S", "S"], "C": [1e18, 1e18], "loss": [3.5, 3.4]})
    frame.set_index(["arm", "size"]).to_parquet(tmp_path / "points.parquet")
    runs = load(tmp_path / "points.parquet").runs
    assert runs[["arm", "size", "loss"]].values.tolist() == [["a", "S", 3.5], ["b", "S", 3.4]]
    frame.set_index("arm", drop=False).rename_axis("arm").to_parquet(tmp_path / "points.parquet")
    assert load(tmp_path / "points.parquet").runs["arm"].tolist() == ["a", "b"]
    frame.set_index(pd.Index(["x", "y"], name="arm")).to_parquet(tmp_path / "points.parquet")
    with pytest.raises(ValueError, match="an index and a column 'arm' that differ"):
        load(tmp_path / "points.parquet")


def test_the_runs_table_of_a_tracker(tmp_path: Path) -> None:
    wandb = (
        '"Name","State","Notes","User","Tags","Created","Runtime","Sweep","config/arm","config/n_params",'
        '"config/D.value","config/seed","eval/loss","train/loss","_step"\n'
        '"brisk-sun-1","finished","","me","","2026-01-01T00:00:00.000Z","3600","","base","91M","2e9","0","3.5","3.1","900"\n'
        '"calm-sea-2","crashed","","me","","2026-01-01T00:00:00.000Z","60","","base","91M","2e9","1","7.5","7.4","20"\n'
        '"dry-hill-3","running","","me","","2026-01-01T00:00:00.000Z","60","","base","91M","2e9","2","6.5","6.4","30"\n'
        '"low-fog-4","killed","","me","","2026-01-01T00:00:00.000Z","60","","base","91M","2e9","3","","","30"\n'
        '"new-oak-5","strange","","me","","2026-01-01T00:00:00.000Z","60","","base","91M","2e9","4","3.5","3.1","900"\n'
    )
    runs = read(tmp_path, wandb, D="config/D.value")
    assert runs["status"].tolist() == ["complete", "failed", "unfinished", "cancelled", "strange"]
    assert runs["run_id"].tolist()[:2] == ["brisk-sun-1", "calm-sea-2"]
    assert runs["loss"].tolist()[:2] == [3.5, 7.5]
    mlflow = (
        "Run ID,Name,Status,params.arm,params.N,metrics.val_loss\nf00,x,FINISHED,a,1e8,3.5\nf01,x,FAILED,a,1e8,3.5\n"
    )
    runs = read(tmp_path, mlflow, N="params.N")
    assert runs[["run_id", "status"]].values.tolist() == [["f00", "complete"], ["f01", "failed"]]
    facts = read(tmp_path, "arm,C,metrics.loss,metrics.bleu,config.width,tags.x\na,1,2,3,4,5\n")
    assert facts.columns[facts.columns.str.contains(".", regex=False)].tolist() == ["config.width"]
    assert (facts["loss"].item(), facts["metrics/bleu"].item()) == (2, 3)
    optuna = "number,value,params_arm,params_seed,state\n0,3.5,a,1,COMPLETE\n1,3.6,a,2,PRUNED\n"
    runs = read(tmp_path, optuna, loss="value")
    assert runs["status"].tolist() == ["complete", "cancelled"]
    neptune = "sys/id,sys/failed,parameters/arm,eval/loss\nR-1,False,a,3.5\nR-2,True,a,9.5\n"
    assert read(tmp_path, neptune)["status"].tolist() == ["complete", "failed"]
    recipe = "\"{'eval/loss': 3.5, '_step': 9}\",\"{'arm': 'a', 'lr': 0.1, 'deep': {'seed': 3}}\",x\n"
    row = read(tmp_path, f",summary,config,name\n0,{recipe}").iloc[0]
    assert (row["arm"], row["loss"], row["train.learning_rate"], row["config.deep.seed"]) == ("a", 3.5, 0.1, 3)
    nested = '{"id": "q1", "state": "finished", "config": {"arm": "a", "seed": 3}, "summary": {"eval/loss": 3.5}}\n'
    row = read(tmp_path, nested, "runs.jsonl").iloc[0]
    assert (row["run_id"], row["arm"], row["seed"], row["loss"]) == ("q1", "a", 3, 3.5)


HISTORY = "run_id,arm,size,N,D,_step,eval/loss{more}\n"


def test_a_history_is_one_run_at_its_last_step(tmp_path: Path) -> None:
    rows = [f"{run},{run},S,1e8,2e9,{step},{9 - step / 200},finished" for step in (100, 1000, 500) for run in "ab"]
    store = read_store(tmp_path, HISTORY.format(more=",State") + "\n".join(rows))
    assert store.runs[["run_id", "loss", "status"]].values.tolist() == [["a", 4.0, "complete"], ["b", 4.0, "complete"]]
    assert store.problems[0].endswith("6 rows are 2 runs at several values of _step; of each run its last row is used")
    between = [row if row.split(",")[5] == "1000" else row.rpartition(",")[0] + ",running" for row in rows]
    assert read(tmp_path, HISTORY.format(more=",State") + "\n".join(between))["status"].tolist() == ["complete"] * 2
    with pytest.raises(ValueError, match="nothing says whether it finished; add a column status"):
        read(tmp_path, HISTORY.format(more="") + "\n".join(row.rpartition(",")[0] for row in rows))
    crashed = [row.replace("finished", "crashed") for row in rows]
    crashed = read(tmp_path, HISTORY.format(more=",State") + "\n".join(crashed))["status"].tolist()
    assert crashed == ["failed", "failed"]


def test_a_history_without_ids_is_one_run_only_where_that_is_certain(tmp_path: Path) -> None:
    header = "arm,size,N,D,step,loss,status\n"
    store = read_store(
        tmp_path, header + "a,S,1e8,2e9,10,5,complete\na,S,1e8,2e9,20,4,complete\nb,S,1e8,2e9,20,3,complete\n"
    )
    assert store.runs["loss"].tolist() == [4, 3]
    with pytest.raises(ValueError, match=r"rows 1 and 2 differ in step .* one run on its way, or two runs"):
        read(tmp_path, header + "a,S,1e8,1e9,10,5,complete\na,S,1e8,2e9,20,4,complete\n")
    with pytest.raises(ValueError, match="two of whose losses are at one step"):
        read(tmp_path, header + "a,S,1e8,2e9,10,5,complete\na,S,1e8,2e9,20,4,complete\na,S,1e8,2e9,20,3,complete\n")
    with pytest.raises(ValueError, match="has its last loss at step 10 of 20, which is not its final one"):
        read(tmp_path, header + "a,S,1e8,2e9,10,5,complete\na,S,1e8,2e9,20,,complete\n")
    with pytest.raises(ValueError, match="one run on its way, or two runs"):
        read(tmp_path, "lr," + header + "1e-3,a,S,1e8,2e9,10,5,complete\n2e-3,a,S,1e8,2e9,20,4,complete\n")
    rates = "run_id,lr," + header + "x,1e-3,a,S,1e8,2e9,10,5,complete\nx,1e-5,a,S,1e8,2e9,20,4,complete\n"
    (rate,) = read(tmp_path, rates)["train.learning_rate"]
    assert pd.isna(rate), "where the schedule came to is no setting"
    budgets = read(tmp_path, "arm,size,N,D,loss\na,S,1e8,2e9,3.5\na,S,1e8,8e9,3.2\n")
    assert len(budgets) == 2, "several budgets of a size are several runs"


def test_rows_of_one_id_that_differ_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows 1 and 2 are both of run x and differ in loss"):
        read(tmp_path, "run_id,arm,C,loss\nx,a,1,2\nx,a,1,3\n")
    with pytest.raises(ValueError, match="rows 1 and 2 are both of run 1 and differ in arm"):
        read(tmp_path, "id,arm,D,loss\n1,a,2,10\n1,b,3,20\n")
    assert len(read(tmp_path, "run_id,arm,C,loss\nx,a,1,2\nx,a,1,2\n")) == 2, "equal rows are the comparison's matter"


def test_tokens_that_are_not_whole_stay_and_survive_freezing(tmp_path: Path) -> None:
    tokens = 1e18 / 6 / 1e8 + 0.25
    store = read_store(tmp_path, HEADER + f"a,S,1e8,{tokens!r},3.5\n")
    assert (str(store.runs["tokens"].dtype), str(store.runs["parameters"].dtype)) == ("float64", "Int64")
    freeze(store, tmp_path / "frozen")
    frozen = load(tmp_path / "frozen").runs
    pd.testing.assert_frame_equal(frozen, store.runs)
    assert frozen["tokens"].item() == tokens
    assert frozen["flops_6nd"].item() == 6 * 1e8 * tokens


def test_the_unit_follows_the_column(tmp_path: Path) -> None:
    text = "arm,C,bits_per_byte,loss_bits,ppl,final\na,1e18,0.9,4.2,20,3\n"
    assert loss_unit(read(tmp_path, text, loss="final")) == "nats/token"
    assert loss_unit(read(tmp_path, text, loss="bits_per_byte")) == "bits/byte"
    assert loss_unit(read(tmp_path, text, loss="loss_bits")) == "bits/token"
    with pytest.raises(ValueError, match="'ppl' is a perplexity; add a column of its logarithm"):
        read(tmp_path, text, loss="ppl")
    with pytest.raises(ValueError, match="losses are in several units"):
        read(tmp_path, "arm,C,loss,loss_unit\na,1,2,bits/byte\na,1,2,\n")
    store = read_store(tmp_path, text, loss="bits_per_byte")
    freeze(store, tmp_path / "frozen")
    assert loss_unit(load(tmp_path / "frozen").runs) == "bits/byte"


@given(
    st.dictionaries(
        st.sampled_from(["N", "D", "C", "loss", "arm"]), st.text("ab ,;='\"/", min_size=1).map(lambda t: f"a{t}b")
    )
)
def test_columns_are_said_and_read_back(columns: dict[str, str]) -> None:
    flags = format_columns(columns)
    assert parse_columns(flags[1:]) == columns


def test_columns_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "p.csv"
    path.write_text('arm,C,"loss, final"\na,1e18,3.5\n')
    query = "select arm, loss, C from runs"
    flags = ["--columns", 'loss="loss, final"', "--columns", "arm=arm"]
    assert main(["query", str(path), *flags, query, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"arm": "a", "loss": 3.5, "C": 1e18}]
    for wrong, message in {
        "loss": "takes NAME=COLUMN",
        'loss="a': "quote that does not end",
        "N=a,N=b": "two columns",
    }.items():
        assert main(["query", str(path), "--columns", wrong, query]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("column", "unit", "said"), [("C", 1e12, "1e-12"), ("D", 1e9, "1e+09"), ("N", 1.0, None)])
def test_compute_in_another_unit_is_said(tmp_path: Path, column: str, unit: float, said: str | None) -> None:
    rows = [{"N": n, "D": 20 * n, "C": 120 * n**2} for n in (1e6, 1e7)]
    cells = [[f"{row[name] / (unit if name == column else 1)!r}" for name in ("N", "D", "C")] for row in rows]
    path = tmp_path / "points.csv"
    path.write_text("arm,size,N,D,C,loss\n" + "\n".join(f"a,s{i},{','.join(row)},3" for i, row in enumerate(cells)))
    told = [problem for problem in load(path).problems if "times 6 N D" in problem]
    assert [f"C is {said} times 6 N D in 2 of 2 rows" in problem for problem in told] == ([True] if said else [])


@pytest.mark.parametrize(
    ("loss", "more", "told"),
    [(250.0, "", True), (13.0, "", False), (250.0, ",status", False), (250.0, ",loss_unit", False)],
)
def test_losses_worse_than_guessing_are_named(loss: float, more: str, told: bool, tmp_path: Path) -> None:
    cell = {"": "", ",status": ",diverged", ",loss_unit": ",percent"}[more]
    path = tmp_path / "points.csv"
    path.write_text(f"arm,C,loss{more}\na,1e15,{loss}{cell}\na,2e15,{loss}{cell}\n")
    problems = load(path).problems
    assert [f"loss is {loss:g} in 2 of 2 rows, and guessing among a million" in each for each in problems] == [
        True
    ] * told


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_names_that_look_the_same_are_the_same(suffix: str, tmp_path: Path) -> None:
    """Composed and decomposed letters, a zero-width space, and what would colour a terminal."""
    arms = ["caf\u00e9", "cafe\u0301", "caf\u00e9\u200b", "\x1bcaf\u00e9", " caf\u00e9\u00a0"]
    table = pd.DataFrame({"arm": arms, "size": "1M", "C": 1e15, "loss": [3.0 + i / 10 for i in range(len(arms))]})
    path = write_points(table, tmp_path / f"points.{suffix}")
    assert load(path).runs["arm"].tolist() == ["caf\u00e9"] * len(arms)
