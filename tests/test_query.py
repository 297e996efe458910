"""SQL over a store, filters and groups."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from planted import write_config, write_run, write_sweep

from analysis.logs.merge import load_all
from analysis.logs.store import Store, freeze, load
from analysis.pages.query import cautions, chosen, grouped, sql
from analysis.pages.tables import value_table
from experiments.cli.main import main

ARMS = {"base": 1.0, "new": 1.5}  # and their multipliers


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = write_sweep(tmp_path_factory.mktemp("query") / "sweep", {"dyn": 1.33}, sizes=4, seeds=2)
    write_config(path, "dyn", "s9")
    return load(path)


def test_sql_sees_the_four_views(store: Store) -> None:
    columns, rows = sql(store, "select arm, count(*) as n, avg(loss) from runs group by arm order by arm")
    assert columns[:2] == ["arm", "n"]
    assert [row[:2] for row in rows] == [("dyn", 9), ("transformer", 8)]
    assert sql(store, "SELECT count(*), max(step) FROM steps")[1] == [(16 * 4, 4)]
    joined = (
        "select count(*) from evals join runs using (run_id, task) where metric = 'loss' and abs(value - loss) < 1e-12"
    )
    assert sql(store, joined)[1] == [(16,)]
    ((m, low, high),) = sql(store, "select m, ci_low, ci_high from multipliers where arm = 'dyn'")[1]
    assert low < m < high


def test_the_query_that_shows_what_a_shared_program_saves_later_seeds(tmp_path: Path) -> None:
    """The one of results/README.md, on two arms: the second seed of one found its program."""
    page = (Path(__file__).parent.parent / "results" / "README.md").read_text()
    (query,) = re.findall(r'dynconv query STORE "(select size, arm, seed, .*)"', page)
    store = load(write_sweep(tmp_path / "sweep", {"dyn": 1.33}, sizes=1, seeds=2))
    clocks = {("dyn", 0): (9.0, 30.0), ("dyn", 1): (3.0, 4.0), ("transformer", 0): (8.0, 20.0)}
    store.runs["startup_seconds"], store.runs["compile_seconds"] = zip(
        *(clocks.get(key, (7.0, 6.0)) for key in zip(store.runs["arm"], store.runs["seed"], strict=True)), strict=True
    )
    columns, rows = sql(store, query)
    assert columns == ["size", "arm", "seed", "startup", "compile"]
    assert [row[1:] for row in rows] == [
        ("dyn", 0, 9.0, 30.0),
        ("dyn", 1, 3.0, 4.0),
        ("transformer", 0, 8.0, 20.0),
        ("transformer", 1, 7.0, 6.0),
    ]


def test_n_d_and_c_stand_for_their_columns_in_conditions_and_queries(store: Store, tmp_path: Path) -> None:
    large = store.runs[store.runs["flops_exact"] > 1e16]
    assert len(chosen(store.runs, "C > 1e16")) == len(large) > 0
    assert len(chosen(store.runs, "C > 1e16", "6N_nonemb D")) == (store.runs["flops_6n_nonemb_d"] > 1e16).sum()
    assert len(chosen(store.runs, "N > 1e6 and D / N == 20")) == (store.runs["tokens"] > 20e6).sum()
    assert sql(store, "select count(*) from runs where C > 1e16")[1] == [(len(large),)]
    assert sql(store, "select max(abs(N - parameters) + abs(D - tokens)) from runs")[1] == [(0,)]
    assert sql(store, "select max(abs(C - flops_6nd)) from runs", convention="6ND")[1] == [(0.0,)]
    with pytest.raises(ValueError, match="no FLOP convention 'guess'"):
        chosen(store.runs, "C > 1", "guess")
    (tmp_path / "points.csv").write_text("arm,parameters,C,n,loss\na,1e6,1e15,7,3.5\n")
    with pytest.raises(ValueError, match="could both be N"):
        load(tmp_path / "points.csv")
    points = load(tmp_path / "points.csv", {"N": "parameters"})
    assert sql(points, "select N, C from runs")[1] == [(7, 1e15)], "the table's own n stays"


def test_arms_without_a_multiplier_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Else a query would read as if there were no such arm."""
    rows = [f"{arm},{size},{c:g},{5 - c / 1e16}" for arm in ARMS for size, c in (("1M", 1e15), ("3M", 4e15))]
    (tmp_path / "points.csv").write_text("\n".join(["arm,size,C,loss", *rows, "apart,9M,1e16,3"]))
    query = ["query", str(tmp_path / "points.csv"), "select arm from multipliers", "--baseline", "base", "--json"]
    assert main(query) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == [{"arm": "new"}]
    assert err.startswith("dynconv: no multiplier for apart: pairs are made on size, and none is in both arms")


def test_multipliers_are_of_the_baseline_that_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{arm},s{i},{10.0**i},{2 * (m * 10.0**i) ** -0.1 + 1.7}" for i in range(15, 19) for arm, m in ARMS.items()]
    (tmp_path / "points.csv").write_text("arm,size,C,loss\n" + "\n".join(rows))
    query = ["query", str(tmp_path / "points.csv"), "select arm, m from multipliers", "--json"]
    assert main(query) == 2
    assert "choose one of base, new with --baseline" in capsys.readouterr().err
    assert main([*query, "--baseline", "base"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["arm"], row["m"]) == ("new", pytest.approx(1.5, rel=1e-3))
    assert main([*query, "--baseline", "new"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["arm"], row["m"]) == ("base", pytest.approx(1 / 1.5, rel=1e-3))


def test_steps_that_a_store_does_not_keep_are_not_counted_as_none(store: Store, tmp_path: Path) -> None:
    freeze(store, tmp_path / "frozen")
    assert sql(load(tmp_path / "frozen"), "select count(*) > 0 from evals")[1] == [(True,)]
    with pytest.raises(ValueError, match="frozen holds no steps of its runs"):
        sql(load(tmp_path / "frozen"), "select count(*) from steps")
    (tmp_path / "points.csv").write_text("arm,size,C,loss\na,s,1e9,3.0\na,t,1e10,2.0\n")
    with pytest.raises(ValueError, match=r"points.csv holds no evals of its runs: a table of points has none"):
        sql(load(tmp_path / "points.csv"), "select count(*) from evals")
    freeze(store, tmp_path / "whole", steps=True)
    assert sql(load(tmp_path / "whole"), "select count(*) from steps")[1] == [(16 * 4,)]
    with pytest.raises(ValueError, match=r"whole has steps\.parquet of an earlier freeze"):
        freeze(store, tmp_path / "whole")
    write_run(write_config(tmp_path / "live", "dyn", "s8"), 3.0)
    merged = load_all([tmp_path / "frozen", tmp_path / "live"])
    sql(merged, "select count(*) from steps")
    assert any("steps lack 16 of 17 finished runs, as dyn-s0-0" in problem for problem in merged.problems)


def test_a_wrong_query_is_the_users_mistake(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="the views are runs, steps, evals, multipliers"):
        sql(store, "select nothing from runs")
    assert main(["query", str(store.path), "selec 1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_null_is_null_in_json_and_empty_in_csv(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    query = "select run_id, loss, gpus from runs where status = 'unfinished'"
    main(["query", str(store.path), query, "--json"])
    assert json.loads(capsys.readouterr().out) == [{"run_id": "dyn-s9-0", "loss": None, "gpus": None}]
    main(["query", str(store.path), query, "--format", "csv"])
    assert capsys.readouterr().out == "run_id,loss,gpus\ndyn-s9-0,,\n"


def test_filters_and_groups(store: Store) -> None:
    columns, rows = grouped(chosen(store.runs, 'size == "s1"'), ["arm", "size"])
    assert columns == ["arm", "size", "runs", "loss", "loss_sd", "tokens_per_second", "train_hours"]
    mine = store.runs[(store.runs["size"] == "s1") & (store.runs["arm"] == "dyn")]["loss"]
    dyn = next(row for row in rows if row[0] == "dyn")
    assert dyn[1:5] == ("s1", 2, pytest.approx(mine.mean()), pytest.approx(mine.std()))
    with pytest.raises(ValueError, match="leaves no row of 17"):
        chosen(store.runs, "loss > 99")
    with pytest.raises(ValueError, match="name 'los' is not defined; write conditions as in"):
        chosen(store.runs, "los > 99")
    for wrong in ("loss", "size = 3", "@runs", "1 +", "", "__import__('os')"):
        with pytest.raises(ValueError, match="--where") as refused:
            chosen(store.runs, wrong)
        assert "\n" not in str(refused.value)
    assert len(chosen(store.runs, "gpus == 0")) == 16  # the unfinished run's are missing
    for wrong in ("sites", "loss", ""):
        with pytest.raises(ValueError, match=f"no column '{wrong}' to group by; there are run_id((?!trunk).)*$"):
            grouped(store.runs, [wrong])


def test_groups_of_unlike_sizes_are_said(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """A group with more of the small models has a higher mean loss, whatever tells the groups apart."""
    assert cautions(store.runs, ["arm"]) == []  # every arm has the same runs, each alone on its device
    lacking = store.runs.drop(store.runs.query("arm == 'dyn' and size == 's0'").index)
    (line,) = cautions(lacking, ["arm"])
    assert "unlike shares of sizes" in line
    assert cautions(lacking, ["arm", "size"]) == []
    assert cautions(lacking.query("size == 's1'"), ["arm"]) == []
    assert main(["table", str(store.path), "--by", "seed", "--where", "arm == 'dyn' or size == 's1' or seed == 0"]) == 0
    assert "unlike shares of sizes" in capsys.readouterr().err


def test_runs_that_are_in_no_mean_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["base,1M,0,3.0,9,complete,a", "base,1M,1,nan,9,complete,a", "base,1M,2,inf,-7200,complete,a"]
    rows += ["new,1M,0,2.0,9,complete,b", "new,1M,0,2.0,9,complete,b", "new,1M,1,,9,running,b"]
    header = "arm,size,seed,loss,train_seconds,status,tokenizer,C"
    (tmp_path / "points.csv").write_text("\n".join([header, *(f"{row},1e15" for row in rows)]))
    assert main(["table", str(tmp_path / "points.csv"), "--by", "arm", "--json"]) == 0
    out, err = capsys.readouterr()
    assert [(row["runs"], row["loss"], row["train_hours"]) for row in json.loads(out)] == [
        (3, 3.0, pytest.approx(18 / 3600)),
        (2, 2.0, pytest.approx(18 / 3600)),
    ]
    for line in (
        "row 6 left out (unfinished)",
        "the loss of row 2, row 3 is in no mean, as it is no positive number",
        "the train_seconds of row 3 are in no sum, as they are no positive number",
        "row 5 repeat a run and count as another: remove them from the table",
        "the groups hold unlike shares of tokenizers, whose losses differ: add tokenizer_sha256 to --by",
    ):
        assert f"dynconv: {line}" in err


def test_groups_of_unlike_budgets_rates_and_clocks_are_said(store: Store) -> None:
    """Speeds of runs that shared a device were averaged without a word, as were losses over unlike learning rates."""
    runs = store.runs
    of_dyn = runs["arm"].eq("dyn")
    (line,) = cautions(runs.assign(budget=runs["budget"].mask(of_dyn & runs["seed"].eq(0), "40")), ["arm", "size"])
    assert "unlike shares of budgets" in line
    (line,) = cautions(runs.assign(**{"vary.learning_rate_factor": np.where(of_dyn, 2.0, 1.0)}), ["arm", "size"])
    assert "unlike shares of the values of vary.learning_rate_factor" in line
    shared = runs.assign(clock=runs["clock"].mask(of_dyn & runs["clock"].notna(), "shared"))
    (line,) = cautions(shared, ["arm", "size"])
    assert line.startswith("tokens_per_second and train_hours do not compare: 8 of 16 runs shared their device")


def test_groups_by_site_keep_the_runs_that_have_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arm, sites in {"base": None, "kq": "qk", "all": "all-linear"}.items():
        facts = {"conv.kind": "lowrank", "conv.sites": sites, "conv.rank": 8} if sites else {"conv.kind": "none"}
        write_run(write_config(tmp_path, arm, facts=facts), 3.0)
    assert main(["table", str(tmp_path), "--by", "conv.sites,conv.rank", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["conv.sites"], row["conv.rank"], row["runs"]) for row in found] == [
        ("all-linear", 8, 1),
        (None, None, 1),
        ("qk", 8, 1),
    ]


def test_facts_are_named_with_their_dots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for width in (2, 4):
        write_run(write_config(tmp_path, f"w{width}", facts={"conv.width": width}, vary={"rate": 0.5}), 1.0 + width)
    store = load(tmp_path)
    assert sql(store, 'select arm from runs where "conv.width" = 4 and "vary.rate" = 0.5')[1] == [("w4",)]
    assert list(chosen(store.runs, "`conv.width` == 4 and `vary.rate` < 1")["arm"]) == ["w4"]
    assert [row[:3] for row in grouped(store.runs, ["conv.width", "size"])[1]] == [(2, "1M", 1), (4, "1M", 1)]
    assert main(["table", str(tmp_path), "--where", "conv.width == 4"]) == 2
    assert "a name with a dot in backquotes, as in '`conv.width` == 4'" in capsys.readouterr().err
    assert main(["table", str(tmp_path), "--by", "arm,size,arm"]) == 2
    assert capsys.readouterr().err == "dynconv table: --by names arm more than once; name each column once\n"


@pytest.mark.parametrize(
    "query",
    [
        "select * from read_csv('{file}')",
        "select * from '{file}'",
        "select * from glob('/*')",
        "copy (select 1) to '{file}.out'",
        "attach '{file}.db' as other",
        "install httpfs",
        "select * from 'https://example.org/a.parquet'",
        "set enable_external_access = true",
        "select * from store",  # a variable of the program
        "select 1; select 2",
        "",
        "-- nothing",
    ],
)
def test_a_query_reaches_nothing_but_the_views(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], query: str
) -> None:
    (tmp_path / "secret.csv").write_text("secret\n1\n")
    assert main(["query", str(store.path), query.format(file=tmp_path / "secret.csv")]) == 2
    out = capsys.readouterr()
    assert (out.out, out.err.count("\n")) == ("", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["secret.csv"]


HOSTILE = 'a|b & 50% $x_1$ #{y} ~^\\ <"c">, d'


def test_any_text_leaves_each_format_whole(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = f"select '{HOSTILE}\nsecond line' as \"a|b\", [1.5] as list, '-' as dash, 'nan' as text, null as nothing, "
    query += "1e400::double as infinite, 2.50::decimal(4, 2) as exact"

    def printed(form: str) -> str:
        assert main(["query", str(store.path), query, "--format", form]) == 0
        return capsys.readouterr().out

    assert json.loads(printed("json")) == [
        {
            "a|b": f"{HOSTILE}\nsecond line",
            "list": [1.5],
            "dash": "-",
            "text": "nan",
            "nothing": None,
            "infinite": None,
            "exact": 2.5,
        }
    ]
    (row,) = csv.DictReader(io.StringIO(printed("csv")))
    assert (row["a|b"], row["dash"], row["text"], row["nothing"]) == (f"{HOSTILE}\nsecond line", "-", "nan", "")
    markdown = printed("md").splitlines()
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in markdown} == {8}
    latex = printed("latex").splitlines()
    body = [line.removesuffix(r" \\") for line in latex if line.endswith(r" \\")]
    assert [len(re.findall(r"(?<!\\)&", line)) for line in body] == [6, 6]
    if shutil.which("pdflatex"):
        document = [r"\documentclass{article}\usepackage{booktabs}\begin{document}", *latex, r"\end{document}"]
        (tmp_path / "t.tex").write_text("\n".join(document))
        command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout
    known = re.sub(r"\\text\w+\{\}|\\[&%$#_{}]", "", body[1])
    assert not set(known.replace("&", "")) & set('\\%$#_{}~^<>|"')


def test_a_latex_row_that_begins_with_a_bracket_is_no_option() -> None:
    assert "\n{}[1, 2] & 3" in value_table(["a", "b"], [((1, 2), 3)], "latex")


def test_two_columns_of_one_name_are_refused_in_json_alone(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["query", str(store.path), "select 1 as a, 2 as a", "--json"]) == 2
    assert "two columns are named 'a'" in capsys.readouterr().err
    assert main(["query", str(store.path), "select 1 as a, 2 as a", "--format", "csv"]) == 0
    assert capsys.readouterr().out == "a,a\n1,2\n"


def test_laws_take_the_condition_that_tables_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of fit, predict and isoflop, --where leaves the same rows as a table without the others."""
    rows = [f"a,{10.0**i},{2 * 10.0 ** (-0.1 * i) + 1.7}" for i in range(4, 9)]
    (tmp_path / "one.csv").write_text("arm,C,loss\n" + "\n".join(rows))
    (tmp_path / "two.csv").write_text("arm,C,loss\n" + "\n".join([*rows, "b,1e5,4.0", "b,1e6,3.9"]))
    for verb in (["fit", "--bootstrap", "0"], ["predict", "--C", "1e9", "--bootstrap", "100"]):
        found = []
        for arguments in ([str(tmp_path / "one.csv")], [str(tmp_path / "two.csv"), "--where", "arm == 'a'"]):
            assert main([verb[0], *arguments, *verb[1:], "--json"]) == 0
            found.append(json.loads(capsys.readouterr().out))
        assert found[0] == found[1]
    for verb in (["fit"], ["predict", "--C", "1e9"], ["isoflop"], ["plot", "-o", str(tmp_path / "figures")]):
        assert main([verb[0], str(tmp_path / "two.csv"), *verb[1:], "--where", "arm == 'c'"]) == 2
        assert "leaves no row of 7" in capsys.readouterr().err
