"""The report: one file, everything in it, and it works in a browser."""

from __future__ import annotations

import base64
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from browser import CHROMIUM, Browser
from planted import write_budgets, write_config, write_sweep

from analysis.logs.store import load
from analysis.pages.tables import ratio_text
from experiments.cli.main import main

in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
LARGEST = 4_000_000  # bytes of a page
HOSTILE = """</script><img src=x onerror="window.harmed=1">$$x$$ ' &lt;@{run}"""  # as the name of an arm
PLACE = """(([at, run]) => {  // where plot number `at` draws a run, and its row in the table
  const view = [...Bokeh.index.roots][at];
  view.el.scrollIntoView({ block: "center" });
  for (const renderer of view.model.renderers) {
    const data = renderer.data_source.data, place = [...(data.run ?? [])].indexOf(run);
    if (renderer.glyph.type !== "Scatter" || !renderer.view.filter.indices?.includes(place)) continue;
    const { frame, canvas_view } = view, box = canvas_view.el.getBoundingClientRect();
    const [x, y] = [data[renderer.glyph.x.field][place], data[renderer.glyph.y.field][place]];
    return [box.left + frame.x_scale.compute(x), box.top + frame.y_scale.compute(y), data.row[place]];
  }
})"""
TOOLTIPS = """(() => {  // the text of what hovering shows, from inside the charts' shadow trees
  const found = [], walk = root => {
    for (const item of root.querySelectorAll("*")) {
      if (item.classList.contains("bk-tooltip-content")) found.push(item.textContent);
      if (item.shadowRoot) walk(item.shadowRoot);
    }
  };
  walk(document);
  return found.join(" | ");
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    store = write_sweep(folder / "sweep", {"dyn<b>": 1.5, "static": 1.0}, sizes=4, seeds=1)
    write_config(store, "static", "s9")
    assert main(["report", str(store), "-o", str(folder / "report.html")]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium = Browser(tmp_path_factory.mktemp("profile"))
    yield chromium
    chromium.close()


def unpacked(text: str, name: str) -> str:
    (packed,) = re.findall(rf'id="{name}">([^<]*)<', text)
    return zlib.decompress(base64.b64decode(packed)).decode()


def without_payload(text: str) -> str:
    """The page less the library, the charts' data and pictures."""
    return re.sub(r'base64,[^"]*|(<script type="text/plain"[^>]*>)[^<]*', r"\1", text)


def test_the_page_is_self_contained_and_says_where_it_comes_from(page: Path) -> None:
    text = without_payload(page.read_text())
    assert page.stat().st_size < LARGEST / 2
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "http:" not in text
    assert "https:" not in text
    assert "dyn<b>" not in text
    for provenance in ("--convention exact", "c" * 40, "d" * 64, "2.13.0", "static-s9-0: unfinished", "12 of 13"):
        assert provenance in text
    assert text.count("<figure ") == text.count('<div class="still"><img ') == 5
    assert "dyn&lt;b&gt;" in text
    charts = json.loads(unpacked(page.read_text(), "charts"))
    assert len(charts["document"]["roots"]) == len(charts["places"]) == 7
    assert set(charts["places"].values()) <= set(re.findall(r'id="(plot-[^"]*)"', text))


def test_the_end_of_an_interval_without_1_is_not_told_as_1() -> None:
    found = [ratio_text(value, 2) for value in (1.004, 1.0004, 0.9996, 1.006, 1.0, 1.4, 123.4, 0.0001)]
    assert found == ["1.004", "1.0004", "0.9996", "1.01", "1.00", "1.40", "1.2e+02", "0.0001"]
    assert [ratio_text(value) for value in (1.0004, 0.99999, 1.01, 1.0)] == ["1.0004", "0.99999", "1.010", "1.000"]


def test_the_first_screen_claims_what_the_intervals_allow(page: Path) -> None:
    text = page.read_text()
    (headline,) = re.findall(r'<p class="headline">([^<]*)<', text)
    assert headline == "1 of 2 arms save compute over transformer; for 1 no difference is shown."
    found = {row["arm"]: row for row in json.loads(_printed("table", page.parent / "sweep"))}
    rows = re.findall(r'<tr class="(more|less|open)"><th scope=row>([^<]*)</th>(.*?)</tr>', text)
    assert [(kind, arm) for kind, arm, _ in rows] == [("more", "dyn&lt;b&gt;"), ("open", "static")]
    (low, high), row = found["dyn<b>"]["family_ci"], rows[0][2]
    assert f"transformer needs {low:.2f} to {high:.2f} times as much" in row
    assert f">{found['dyn<b>']['m']:.3f}</a>" in row
    assert f"<b>{found['dyn<b>']['wall_clock']['m']:.3f}</b>" in row
    assert "No difference from transformer is shown: anything from" in rows[1][2]


def _printed(verb: str, store: Path) -> str:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([verb, str(store), "--json"]) == 0
    return out.getvalue()


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


@in_browser
@pytest.mark.parametrize(("width", "dark"), [(1400, False), (390, True)])
def test_it_opens_without_errors_or_requests_in_any_width_and_mode(
    page: Path, browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    browser.requests.clear()
    browser.errors.clear()
    browser.open(page, width=width, dark=dark)
    assert browser.errors == []
    assert {request.partition(":")[0] for request in browser.requests} <= {"file", "data", "blob"}
    assert sum(request.startswith("file:") for request in browser.requests) == 1
    assert browser.value("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert browser.value("document.querySelectorAll('.plots > div > *').length") == 7
    assert browser.value("[...document.querySelectorAll('.still')].every(still => still.offsetHeight === 0)")
    paper, ink = browser.value(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    assert (sum(_rgb(paper)) < sum(_rgb(ink))) == dark
    baseline = browser.value(
        "[...Bokeh.documents[0].all_models].filter(m => m.tags.includes('ink') && m.glyph.type === 'Line')"
        ".map(m => m.glyph.line_color.value)"
    )
    assert {sum(int(colour[at : at + 2], 16) for at in (1, 3, 5)) > 382 for colour in baseline} == {dark}
    browser.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 20_000


def _rgb(colour: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", colour)[:3]]


@in_browser
@pytest.mark.parametrize("run", ["dyn<b>-s0-0", "dyn<b>-s3-0"])
def test_pointing_at_a_run_shows_it_and_a_click_leads_to_its_row(page: Path, browser: Browser, run: str) -> None:
    browser.open(page)
    runs = load(page.parent / "sweep").runs.set_index("run_id").loc[run]
    for plot in (0, 5):  # loss against compute, and against the clock: by their place among the plots
        x, y, row = browser.value(f"{PLACE}({json.dumps([plot, run])})")
        browser.pause()
        browser.hover(x, y, f"{TOOLTIPS}.includes({json.dumps(f'run: {run}')})")
        shown = browser.value(TOOLTIPS)
        for told in (f"run: {run}", f"size: {runs['size']}", "seed: 0", f"loss: {runs['loss']:.4f}"):
            assert told in shown
        assert f"budget: {runs['flops_exact']:.3e} FLOPs" in shown
        browser.point(x, y, click=True)
        browser.wait(f"location.hash === '#run-{row}'")
        assert browser.value("document.querySelector(':target').cells[0].textContent") == run
        browser.point(5, 5)
        browser.value("history.replaceState(null, '', '#')")


@in_browser
def test_tables_sort_and_chips_hide_arms(page: Path, browser: Browser) -> None:
    browser.open(page)
    column = """(() => [...document.querySelectorAll("#runs tbody tr")].map(row => row.cells[%d].textContent))()"""
    heads = browser.value("""[...document.querySelectorAll("#runs th")].map(head => head.textContent)""")
    click = f"""document.querySelectorAll("#runs th")[{heads.index("loss")}].click()"""
    browser.value(click)
    up = browser.value(column % heads.index("loss"))
    browser.value(click)
    down = browser.value(column % heads.index("loss"))
    losses = [float(value) for value in up if value != "-"]
    assert len(losses) == 12
    assert losses == sorted(losses)
    assert (up[-1], down[-1]) == ("-", "-")
    assert [float(value) for value in down[:-1]] == losses[::-1]
    browser.value("""document.querySelector("#multipliers td a").click()""")
    assert browser.value("document.querySelector(':target').cells[0].textContent") == "m"
    seen = """(() => [0, 1, 2].map(arm => [...Bokeh.documents[0].all_models]
      .filter(model => model.tags.includes(`arm-${arm}`)).map(model => model.visible)))()"""
    assert all(all(arm) for arm in browser.value(seen))
    browser.value("""document.querySelector(".chips [data-arm='1']").click()""")
    assert [set(arm) for arm in browser.value(seen)] == [{True}, {False}, {True}]
    browser.value("""document.querySelector(".chips [data-all='0']").click()""")
    assert [set(arm) for arm in browser.value(seen)] == [{False}] * 3


@in_browser
def test_without_scripts_still_figures_stand_in(page: Path, browser: Browser) -> None:
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.ask("Page.navigate", url=page.as_uri())
        browser.wait("document.readyState === 'complete'")
        _require_stills(browser)
    finally:
        browser.ask("Emulation.setScriptExecutionDisabled", value=False)


@in_browser
def test_still_figures_are_seen_until_the_charts_are_drawn_and_where_they_cannot_be(
    page: Path, browser: Browser, tmp_path: Path
) -> None:
    """The library is unpacked and run before the first chart: a reader must not look at empty boxes meanwhile."""
    damaged = re.sub(r'(id="charts">)[^<]*', r"\1AAAA", page.read_text())
    (tmp_path / "damaged.html").write_text(damaged)
    browser.ask("Page.navigate", url=(tmp_path / "damaged.html").as_uri())
    browser.wait("document.readyState === 'complete' && typeof Bokeh === 'object'")
    _require_stills(browser)


def _require_stills(browser: Browser) -> None:
    shown = "[...document.querySelectorAll('figure img')].map(item => Math.min(item.naturalWidth, item.offsetWidth))"
    sizes = browser.value(shown)
    assert len(sizes) == 5
    assert min(sizes) > 100
    assert browser.value("getComputedStyle(document.querySelector('.plots')).display") == "none"


@in_browser
def test_names_in_the_data_do_no_harm(browser: Browser, tmp_path: Path) -> None:
    """Arms, sizes, runs and settings are text wherever they appear, and run nothing."""
    rows = [
        {"arm": arm, "size": f"{size}<i>", "run_id": f"{arm}{size}", "C": c, "D": c / 1e9, "N": 1e6 * 2**size}
        | {"loss": 3 - 0.3 * size - 0.1 * (arm != "base"), "conv.rank": None if arm == "base" else f"{arm[-9:]}$$r$$"}
        for arm in ("base", HOSTILE, f"{HOSTILE} b")
        for size, c in enumerate(np.geomspace(1e15, 1e18, 4))
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "points.csv", index=False)
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "points.csv"), "--baseline", "base", "-o", str(page)]) == 0
    text = without_payload(page.read_text())
    assert "<img src=x" not in text
    assert text.count("<script") == text.count("</script>") == 3
    browser.errors.clear()
    browser.requests.clear()
    browser.open(page)
    x, y, _ = browser.value(f"{PLACE}({json.dumps([0, f'{HOSTILE}3'])})")
    browser.pause()
    browser.hover(x, y, f"{TOOLTIPS}.includes({json.dumps(f'arm: {HOSTILE}')})")
    assert browser.value("window.harmed ?? null") is None
    assert browser.errors == []
    assert {request.partition(":")[0] for request in browser.requests} <= {"file", "data", "blob"}


def many_arms(path: Path) -> Path:
    """31 arms at six budgets: what a sweep of variants looks like."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for arm in range(31):
        for size, compute in enumerate(np.geomspace(1e17, 1e20, 6)):
            loss = 1.7 + 2 * ((1 + 0.02 * arm) * compute / 1e17) ** -0.15 + 0.004 * random.standard_normal()
            tokens = (compute / 6 * 20) ** 0.5
            name = f"variant {arm}" if arm else "base"
            row = {"arm": name, "size": f"s{size}", "seed": 0, "C": compute, "D": tokens, "N": tokens / 20}
            rows.append(row | {"loss": loss, "train_seconds": compute / 1e15})
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.mark.slow
@in_browser
def test_a_page_of_31_arms_is_small_and_works(browser: Browser, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    points = many_arms(tmp_path / "points.csv")
    assert main(["report", str(points), "--baseline", "base", "-o", str(page)]) == 0
    assert page.stat().st_size < LARGEST
    browser.errors.clear()
    browser.open(page, width=390)
    assert browser.errors == []
    assert browser.value("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    assert browser.value("document.querySelectorAll('#glance tbody tr').length") == 30


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


@pytest.mark.parametrize(
    "verb",
    [
        ("plot",),
        ("freeze",),
        ("report",),
        ("track", "--to", "tensorboard"),
    ],
    ids=lambda verb: verb[0],
)
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    verb: tuple[str, ...], page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = "/proc/there.html"  # where even root makes no files
    assert main([*verb, str(page.parent / "sweep"), "-o", target]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dynconv {verb[0]}: {target} cannot be written (")
    assert error.endswith("; name a place that you can write to\n")


def test_a_report_that_cannot_be_written_is_refused(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(page.parent / "sweep"), "-o", str(tmp_path / "no" / "r.html")]) == 2
    assert "give a file in a folder that exists" in capsys.readouterr().err
    assert main(["report", str(page.parent / "sweep"), "-o", str(tmp_path / "r.pdf")]) == 2
    assert "r.pdf; name a file that ends in .html" in capsys.readouterr().err
    assert not (tmp_path / "r.pdf").exists()


@pytest.mark.parametrize("arms", [{}, {"dyn": 1.5}], ids=["one arm", "two arms"])
def test_one_size_is_drawn_and_claims_nothing(
    arms: dict[str, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_sweep(tmp_path / "sweep", arms, sizes=1, seeds=1)
    assert main(["plot", str(store), "-o", str(tmp_path / "figures")]) == 0
    assert {path.stem for path in (tmp_path / "figures").iterdir()} >= {"loss-against-compute", "loss-against-tokens"}
    assert "no multipliers: " in capsys.readouterr().err
    assert main(["report", str(store), "-o", str(tmp_path / "report.html")]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "These runs allow no comparison of arms and no law yet; they are drawn below." in text
    assert "no law of loss in compute: " in text
