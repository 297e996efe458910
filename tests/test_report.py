"""The report: one file, everything in it, and it works in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from planted import write_budgets, write_config, write_sweep

from experiments.cli.main import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    store = write_sweep(folder / "sweep", {"dyn<b>": 1.5, "static": 1.0}, sizes=4, seeds=1)
    write_config(store, "static", "s9")
    assert main(["report", str(store), "-o", str(folder / "report.html")]) == 0
    return folder / "report.html"


def browse(page: Path, tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_the_page_is_self_contained_and_says_where_it_comes_from(page: Path) -> None:
    text = page.read_text()
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert "dyn&lt;b&gt; has a 1." in text
    assert "dyn<b>" not in text
    for provenance in ("--convention exact", "c" * 40, "d" * 64, "2.13.0", "static-s9-0: unfinished", "12 of 13"):
        assert provenance in text
    assert text.count("<figure ") == 5


def cells(text: str, table: str) -> list[list[str]]:
    """The HTML of a table's cells, by row."""
    (body,) = re.findall(rf'<table id="{table}">.*?<tbody>(.*?)</tbody>', text, re.DOTALL)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in body.split("</tr>") if row]


def test_every_number_leads_to_the_runs_and_the_command_behind_it(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"href=#([\w-]+)", text))
    assert targets <= set(re.findall(r'id="?([\w-]+)', text))
    for table in ("multipliers", "checks", "law"):
        for row in cells(text, table):
            for cell in row:
                if re.search(r"\d", cell) and not re.match(r"A\[|m\[|not resolved|see|4 sizes", cell):
                    assert cell.startswith("<a href=#from-")
    shown = cells(text, "multipliers")[0][1]
    place, value = re.fullmatch(r"<a href=#([\w-]+)>([\d.]+)</a>", shown).groups()  # type: ignore[union-attr]
    ((_, printed, how, key),) = [row for row in cells(text, "from-0") if row[0] == "m"]
    assert f"<tr id={place}>" in text
    assert (printed, key) == (value, "m")
    assert "paired" in how
    block = text.partition("<h3>dyn&lt;b&gt;</h3>")[2].partition("<h3>")[0]
    runs = re.findall(r"<a href=#run-(\d+)>([^<]+)</a>", block)
    names = {f"{arm}-s{size}-0" for arm in ("dyn&lt;b&gt;", "transformer") for size in range(4)}
    assert {name for _, name in runs} == names
    for at, name in runs:
        assert f"<tr id=run-{at}><td>{name}</td>" in text
    for told in ("c" * 40, "d" * 64, "cpu", "float32", "2.13.0", "counted as exact", "dynconv table "):
        assert told in block


def test_a_store_without_a_comparison_gets_a_page_too(tmp_path: Path) -> None:
    points = write_budgets(tmp_path / "points.csv", np.linspace(-0.7, 0.7, 7), noise=1e-4)
    assert main(["report", str(points), "-o", str(tmp_path / "r.html")]) == 0
    text = (tmp_path / "r.html").read_text()
    assert len(cells(text, "optima")) == 4
    assert "dynconv isoflop" in text
    assert text.count("<figure ") == 1


def test_equal_stores_give_equal_pages(page: Path, tmp_path: Path) -> None:
    assert main(["report", str(page.parent / "sweep"), "-o", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_bytes() == page.read_bytes()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1200, 500])
def test_it_opens_without_errors_and_its_tables_sort(page: Path, tmp_path: Path, width: int) -> None:
    """A copy of the page clicks its own header twice, follows a number, and enlarges a figure, before it is read."""
    clicks = """<script>
    const heads = [...document.querySelectorAll("#runs th")];
    const loss = heads.find(head => head.textContent === "loss");
    const column = () => [...document.querySelectorAll("#runs tbody tr")].map(row => row.cells[7].textContent);
    loss.click(); document.body.dataset.up = column();
    loss.click(); document.body.dataset.down = column();
    document.querySelector("#multipliers td a").click();
    document.body.dataset.source = document.querySelector(":target").cells[0].textContent;
    const stops = [...document.querySelectorAll("th, figure")].map(item => item.querySelector("button").tabIndex);
    document.body.dataset.stops = Math.min(...stops);
    document.body.dataset.wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
    document.querySelector("figure img").click();
    document.body.dataset.open = document.querySelector("dialog").open;
    const key = new KeyboardEvent("keydown", { key: "+" });
    document.querySelector("dialog").dispatchEvent(key);
    document.body.dataset.zoom = document.querySelector("dialog img").style.width;
    </script></body>"""
    copy = tmp_path / "page.html"
    copy.write_text(page.read_text().replace("</body>", clicks))
    result = browse(copy, tmp_path, "--dump-dom", "--virtual-time-budget=2000", f"--window-size={width},900")
    assert "CONSOLE" not in result.stderr
    body = re.findall(r"<body([^>]*)>", result.stdout)[0]
    data = dict(re.findall(r'data-(\w+)="([^"]*)"', body))
    losses = [float(value) for value in data["up"].split(",") if value != "-"]
    assert len(losses) == 12
    assert losses == sorted(losses)
    assert data["down"].split(",")[-1] == "-"
    assert [float(value) for value in data["down"].split(",")[:-1]] == losses[::-1]
    assert (data["source"], data["stops"], data["wide"]) == ("m", "0", "0")
    assert (data["open"], data["zoom"]) == ("true", "115%")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_it_paints(page: Path, tmp_path: Path) -> None:
    browse(page, tmp_path, f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,2400")
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_a_torn_log_is_named_on_the_page_and_by_every_verb_that_reads_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_sweep(tmp_path / "sweep", {"dyn": 1.5}, sizes=3, seeds=1)
    (store / "dyn-s1-0" / "evals.parquet").write_bytes(b"torn")
    verbs = {
        "report": ("-o", str(tmp_path / "r.html")),
        "plot": ("-o", str(tmp_path / "figures")),
        "query": ("select count(*) from evals",),
        "freeze": ("-o", str(tmp_path / "frozen")),
    }
    for verb, options in verbs.items():
        assert main([verb, str(store), *options]) == 0
        assert re.search(r"dyn-s1-0/evals.parquet is unreadable .* left out", capsys.readouterr().err)
    assert "dyn-s1-0/evals.parquet is unreadable" in (tmp_path / "r.html").read_text()
    (tmp_path / "file").write_text("")
    for verb in ("plot", "freeze"):
        assert main([verb, str(store), "-o", str(tmp_path / "file")]) == 2
        assert "is a file; give a directory" in capsys.readouterr().err


def test_a_report_that_cannot_be_written_is_refused(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(page.parent / "sweep"), "-o", str(tmp_path / "no" / "r.html")]) == 2
    assert "give a file in a folder that exists" in capsys.readouterr().err
