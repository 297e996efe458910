"""The figure of kernels: a bar for each kernel and provider, and the floor where it is known."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.logs.store import load
from analysis.pages import kernel_figures
from experiments.cli.main import main

ROOT = Path(__file__).parents[1]


def test_kernel_bars_are_one_a_kernel_and_provider_with_the_floor_where_it_is_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paper = ROOT / "results" / "published" / "kernels.csv"
    axes = kernel_figures.kernel_bars(pd.read_csv(paper)).axes[0]
    widths = [patch.get_width() for patch in axes.patches if patch.get_width() > 0]
    assert sorted(widths) == [143, 161, 184, 242, 382, 421, 484, 697, 946]
    assert not any(text.get_text().startswith("floor") for text in axes.get_legend().get_texts())
    measured = ROOT / "results" / "measured" / "h200" / "kernels.parquet"
    rows = pd.read_parquet(measured)
    axes = kernel_figures.kernel_bars(rows[rows["provider"] == "dynconv"]).axes[0]
    (floors,) = axes.collections
    lengths = [bar.get_width() for bar in axes.patches]
    marks = [line[0][0] for line in floors.get_segments()]
    assert len(marks) == len(lengths) == 10
    assert all(0 < mark < length for mark, length in zip(marks, lengths, strict=True))
    assert "floor: bytes at the copy bandwidth" in [text.get_text() for text in axes.get_legend().get_texts()]
    assert main(["plot", str(measured), "-o", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'kernels.svg'}\n"
    with pytest.raises(ValueError, match="holds times of kernels, not runs; `dynconv plot` draws them"):
        load(measured)
    rows.assign(us=rows["us"].where(rows.index != 0, -1.0)).to_parquet(tmp_path / "k.parquet")
    assert main(["plot", str(tmp_path / "k.parquet"), "-o", str(tmp_path)]) == 2
    assert "k.parquet: us must be positive; got -1.0 in 1 rows; remove these" in capsys.readouterr().err
    with pytest.raises(ValueError, match="need rows with pass fwd"):
        kernel_figures.kernel_bars(pd.read_csv(paper).assign(**{"pass": "fwd"}))


def test_kernel_bars_leave_no_place_for_who_timed_nothing() -> None:
    """Three providers, of which the second kernel has one, and the third two: each group around its kernel's place."""
    shape = {"pass": "fwd+bwd", "B": 4, "T": 64, "D": 32, "W": 4, "dtype": "bfloat16", "op": "lowrank", "fraction": 0.5}
    timed = [(1, "a"), (1, "b"), (1, "c"), (2, "b"), (3, "c"), (3, "a")]
    rows = pd.DataFrame([shape | {"R": rank, "provider": name, "us": 10.0 * rank} for rank, name in timed])
    axes = kernel_figures.kernel_bars(rows).axes[0]
    height = 0.8 / 3
    middles = sorted((bar.get_width(), round((bar.get_y() + bar.get_height() / 2) / height, 6)) for bar in axes.patches)
    place = 1 / height
    want = [(10, -1), (10, 0), (10, 1), (20, place), (30, 2 * place - 0.5), (30, 2 * place + 0.5)]
    assert middles == [(width, pytest.approx(at)) for width, at in want]
    (floors,) = axes.collections
    lengths = [(line[1][1] - line[0][1]) / height for line in floors.get_segments()]
    assert lengths == pytest.approx([3 + 0.1 / height, 1 + 0.1 / height, 2 + 0.1 / height])
