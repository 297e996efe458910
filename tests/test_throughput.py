"""Measured throughput in use: multipliers in seconds from the rows of `bench train`, and their figure."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text
from test_bench_training import SWEEPS, TWO, WHERE, chosen

from analysis.logs.throughput import read_throughput
from analysis.pages.throughput_figures import throughput_panels
from experiments.bench.stepping import Outcome
from experiments.bench.throughput import COLUMNS, rows_of, table
from experiments.bench.training import render
from experiments.cli.main import main


def test_throughput_of_several_commits_is_not_averaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [trial for size in ("25k", "45k", "70k") for trial in chosen(size)]
    rows = [
        row | {"commit": commit}
        for commit in ("abc", "def")
        for pair in (found[0:2], found[2:4], found[4:6])
        for row in rows_of(pair, [Outcome([1.0]), Outcome([1.5])], None, WHERE)
    ]
    counts = {"25k": 1e3, "45k": 2e3, "70k": 4e3}
    points = [f"{arm},{size},{count},1e6,{3 - count / 1e4}" for size, count in counts.items() for arm in TWO]

    def answer(rows: list[dict[str, Any]], columns: str = "", cells: str = "") -> Any:
        (tmp_path / "p.csv").write_text("\n".join([f"arm,size,N,D,loss{columns}", *(row + cells for row in points)]))
        table(rows).to_parquet(tmp_path / "t.parquet")
        command = ["table", str(tmp_path / "p.csv"), "--baseline", "transformer", "--json"]
        assert main([*command, "--throughput", str(tmp_path / "t.parquet")]) == 0
        return json.loads(capsys.readouterr().out)[0]

    assert answer(rows)["no_clock"] == "at 25k the throughput is of several commits (abc, def)"
    split = [row for row in rows if (row["commit"] == "abc") == (row["arm"] == "transformer")]
    words = (
        "is at no equal batch, sequence, gpus, parallel, micro_batches, recompute, fused, vocabulary, "
        "device, versions, commit"
    )
    assert words in answer(split)["no_clock"]
    by_size = [row for row in rows if (row["commit"] == "abc") == (row["size"] == "25k")]
    found = answer(by_size)
    assert found["wall_clock"]["source"] == "throughput measured on A card, of several commits (abc, def)"
    muon = [row | {"optimizer": "muon"} for row in rows[:6]]
    reason = "at 25k the throughput is of several optimizers, and the runs do not say which they used"
    assert answer(rows[:6] + muon)["no_clock"] == reason
    known = answer(rows[:6] + muon, ",train.optimizer", ",muon")
    assert known["wall_clock"]["m"] == pytest.approx(known["m"] / 1.5)
    unfused = [row | {"fused": False} for row in rows[:6]]
    found = answer(rows[:6] + unfused)["no_clock"]
    assert found == "at 25k the throughput is of several settings of fused (False, True)"
    assert answer(unfused)["wall_clock"]["source"] == "throughput measured on A card, not fused"
    slower = [row | {"gpus": 2, "tokens_per_second": 1.0} for row in rows[:6]]
    on_one = answer(rows[:6] + slower, ",gpus", ",1")["wall_clock"]
    assert (on_one["m"], on_one["source"]) == (pytest.approx(known["m"] / 1.5), "throughput measured on A card")
    source = "throughput measured on A card, gpus 1, 2, mean over several settings (gpus) at 25k, 45k, 70k"
    assert answer(rows[:6] + slower)["wall_clock"]["source"] == source


def _drawn() -> pd.DataFrame:
    """Rows of three sizes, the first without an MFU, at two commits."""
    made = []
    for size, peak in (("1M", 989e12), ("16M", 989e12), ("300M", 989e12)):
        found = chosen(size, ("transformer", "lowrank-qkv", "lowrank-all"))
        outcomes = [Outcome([f * 0.1, f * 0.102, f * 0.099]) for f in (1.0, 1.1, 1.4)]
        made += rows_of(found, outcomes, peak, WHERE | {"commit": "a" * 40 if size == "1M" else "b" * 40})
    return table(made)


def test_the_figure_shows_utilisation_and_slowdowns_with_intervals() -> None:
    rows = _drawn()
    left, right = throughput_panels(rows).axes
    assert [text.get_text() for text in left.get_xticklabels()] == ["1M", "16M", "300M"]
    heights = {line.get_label(): line.get_ydata() for line in left.lines}
    want = rows[rows["arm"] == "lowrank-qkv"]["mfu"] * 100
    assert heights["lowrank-qkv"] == pytest.approx(want.tolist())
    assert "transformer" not in {line.get_label() for line in right.lines}
    (_, bars) = right.collections
    ends = [tuple(segment[:, 1]) for segment in bars.get_segments()]
    others = rows[rows["arm"] == "lowrank-all"]
    assert ends == [pytest.approx(pair) for pair in zip(others["slowdown_low"], others["slowdown_high"], strict=True)]
    assert left.get_title(loc="left") == "A card, adamw\ncommits aaaaaaaaaa: 1M; bbbbbbbbbb: 16M, 300M"
    unknown = throughput_panels(rows.assign(mfu=np.nan)).axes[0]
    assert (unknown.get_ylabel(), unknown.get_yscale()) == ("thousand tokens a second", "log")
    several = throughput_panels(pd.concat([rows, rows.assign(gpus=2, parallel="ddp")])).axes
    assert [axes.get_title(loc="left").split("\n")[0] for axes in several] == [
        "A card, adamw",
        "",
        "A card, 2 GPUs (ddp), adamw",
        "",
        "transformer, A card",
    ]
    with pytest.raises(ValueError, match=r"transformer at 1M, .* was measured several times on A card, 1, none, adamw"):
        throughput_panels(pd.concat([rows, rows.assign(batch=3)]))


def test_the_figure_names_every_arm_in_the_order_of_the_table() -> None:
    rows = _drawn()
    two = rows[(rows["size"] != "1M") & (rows["arm"] != "lowrank-all")]  # the first panel lacks an arm of the second
    figure = throughput_panels(pd.concat([two.assign(fused=False), rows.assign(fused=True)]))
    (legend,) = (legend for part in figure.subfigs for legend in part.legends)
    assert [text.get_text() for text in legend.get_texts()] == ["transformer", "lowrank-qkv", "lowrank-all"]


def test_what_is_compared_with_no_arm_has_a_line_beside_its_other_settings() -> None:
    rows = _drawn()
    alone = rows[(rows["arm"] == "transformer") & (rows["size"] == "300M")].assign(optimizer="muon", mfu=0.25)
    (_, right, lines) = throughput_panels(pd.concat([rows, alone])).axes
    assert right.collections
    assert [text.get_text() for text in lines.get_yticklabels()] == ["300M: adamw", "300M: muon"]
    drawn = [line.get_xdata()[0] for line in lines.lines if line.get_marker() == "o"]
    assert drawn == pytest.approx([rows["mfu"][rows["size"] == "300M"].iloc[0] * 100, 25])

    (single,) = throughput_panels(alone).axes
    assert single.get_title(loc="left") == "transformer, A card\ncommit bbbbbbbbbb"
    assert [text.get_text() for text in single.get_yticklabels()] == ["300M: muon"]

    other = alone.assign(device="Another", commit=None)  # two devices and one commit of two known: both are named
    (both,) = throughput_panels(pd.concat([alone, other])).axes
    assert [text.get_text() for text in both.get_yticklabels()] == ["300M: A card, muon", "300M: Another, muon"]
    texts = [text.get_text() for text in both.texts]
    assert texts == ["25.0", "commit bbbbbbbbbb", "25.0", "commit unknown"]


def test_no_text_of_the_figure_overlaps_another() -> None:
    rows = _drawn()
    settings = [
        rows.assign(device=device, gpus=gpus, parallel="fsdp" if gpus > 1 else "none", fused=fused, commit=name * 40)
        for device, gpus, fused, name in (("A card", 1, False, "c"), ("B card", 2, True, "d"))
    ]
    alone = rows[rows["arm"] == "transformer"].assign(optimizer="muon")
    figure = throughput_panels(pd.concat([rows, *settings, alone]))
    found = [text for part in (*figure.axes, *figure.subfigs[0].legends) for text in part.findobj(Text)]
    # Numbers are left out: among them are labels of ticks beyond the axes, which are not drawn.
    shown = [text for text in found if isinstance(text, Text) and text.get_visible()]
    texts = [text for text in shown if text.get_text().strip("0123456789.")]
    boxes = [text.get_window_extent() for text in texts]
    pairs = itertools.combinations(zip(texts, boxes, strict=True), 2)
    assert [(a.get_text(), b.get_text()) for (a, one), (b, two) in pairs if one.overlaps(two)] == []


def test_plot_draws_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _drawn().to_parquet(tmp_path / "t.parquet")
    assert main(["plot", str(tmp_path / "t.parquet"), "-o", str(tmp_path / "figures")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'figures' / 'training.svg'}\n"
    for verb in (["table"], ["freeze", "-o", str(tmp_path / "frozen")]):
        assert main([*verb, str(tmp_path / "t.parquet")]) == 2
        assert "t.parquet holds throughput of training, not runs; `dynconv plot` draws it" in capsys.readouterr().err
    rows = _drawn()
    rows.assign(tokens_per_second=rows["tokens_per_second"].where(rows.index != 0, np.nan)).to_parquet(
        tmp_path / "t.parquet"
    )
    assert main(["plot", str(tmp_path / "t.parquet"), "-o", str(tmp_path / "figures")]) == 2
    assert "t.parquet: tokens_per_second must be positive; got nan in " in capsys.readouterr().err


def test_the_measured_file_is_one_that_bench_train_merges_with_and_plot_draws() -> None:
    path = SWEEPS.parents[1] / "results" / "measured" / "h200" / "training.parquet"
    rows = pd.read_parquet(path)
    assert list(rows.columns) == list(COLUMNS)
    assert rows["commit"].notna().all()
    throughput_panels(rows)
    assert len(read_throughput(path)) == len(rows)


def test_processes_on_a_cpu_are_not_called_gpus() -> None:
    found = chosen("25k", optimizers=("adamw", "muon"), gpus=2)
    outcomes = [Outcome([1.0, 1.1, 1.2])] * len(found)
    rows = rows_of(found, outcomes, None, WHERE | {"device": "cpu"})
    text = render([row | {"kernels": [{"name": "gemm", "milliseconds": 0.5, "share": 0.25}]} for row in rows])
    assert "gpu" not in text.lower()
    assert "batch 8 in each process" in text
    assert "muon against adamw, lowrank-qkv in 2 processes: " in text
    (heading,) = {line for line in text.splitlines() if line.startswith("arm ")}
    assert heading.split()[:3] == ["arm", "optimizer", "processes"]
    assert "on 2 GPUs" in render(rows_of(found, outcomes, None, WHERE))
    labels = [each.get_text() for each in throughput_panels(table(rows)).findobj(Text)]
    assert any("2 processes (ddp)" in label for label in labels)
    assert not any("GPU" in label for label in labels)
