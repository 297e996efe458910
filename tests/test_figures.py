"""Figures: what they show, that it can be told apart, and that equal input gives equal bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from planted import write_sweep

from analysis import figures
from analysis.drawing import answers, draw
from analysis.multiplier import Multiplier
from analysis.powerlaw import Fit
from analysis.store import Store, load


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list[Multiplier], Fit, dict[str, Figure]]:
    store = load(write_sweep(tmp_path_factory.mktemp("figures") / "sweep", {"dyn": 1.5, "static": 1.0}, sizes=4))
    found, law, notes = answers(store, None, None)
    assert law is not None
    assert notes == []
    return store, found, law, draw(store, found, law)


def texts(figure: Figure) -> str:
    return "\n".join(item.get_text() for axes in figure.axes for item in axes.texts)


def test_loss_against_compute_shows_every_run_every_law_and_the_multiplier(
    drawn: tuple[Store, list[Multiplier], Fit, dict[str, Figure]],
) -> None:
    store, found, law, by_name = drawn
    top, bottom = by_name["loss-against-compute"].axes
    dots = [line for line in top.lines if line.get_linestyle() == "None"]
    assert sorted(np.concatenate([line.get_ydata() for line in dots])) == sorted(store.runs["loss"])
    assert len(top.collections) == 3
    for name in ("transformer", "dyn", "static", f"{found[0].m:.2f}x"):
        assert name in texts(by_name["loss-against-compute"])
    residuals = np.concatenate([line.get_ydata() for line in bottom.lines if line.get_linestyle() == "None"])
    pairs = zip(law.points.x["C"], law.points.arm, strict=True)
    predicted = [law.predict({"C": np.array([compute])}, arm)[0] for compute, arm in pairs]
    assert sorted(residuals) == pytest.approx(sorted(100 * np.log(law.points.loss / predicted)))


def test_the_forest_is_hollow_where_nothing_is_resolved(
    drawn: tuple[Store, list[Multiplier], Fit, dict[str, Figure]],
) -> None:
    _, found, _, by_name = drawn
    lines = [line for line in by_name["multipliers"].axes[0].lines if line.get_marker() == "o"]
    dots = {line.get_xdata()[0]: line.get_markerfacecolor() for line in lines}
    for item in found:
        assert dots[item.m] == ("white" if item.status.startswith("not resolved") else "#000000")


def test_a_store_with_clocks_and_evaluations_gets_all_its_figures(
    drawn: tuple[Store, list[Multiplier], Fit, dict[str, Figure]],
) -> None:
    assert set(drawn[3]) == {
        "multipliers",
        "loss-against-compute",
        "multiplier-against-compute",
        "wall-clock",
        "loss-curves",
    }
    assert len(drawn[3]["loss-curves"].axes) == 4


def test_the_papers_figures_are_drawn_from_what_is_typed_in() -> None:
    store = load(Path(__file__).parents[1] / "results" / "published")
    found, law, notes = answers(store, None, None)
    assert (law, notes) == (None, ["no law of loss in compute: no arm has three sizes"])
    panels = draw(store, found, law)["ablations"].axes
    assert [axes.get_xlabel() for axes in panels] == ["width", "rank", "head size", "site"]
    assert np.exp(panels[1].lines[0].get_ydata()) == pytest.approx([18.26, 18.19, 18.10, 18.04, 17.87, 17.85], rel=1e-5)
    kernels = pd.read_csv(store.path.parent / "other.csv").query("metric == 'forward and backward ms'")
    bars = figures.kernel_bars(kernels).axes[0]
    assert sorted(patch.get_width() for patch in bars.patches if patch.get_width() > 0) == sorted(kernels["value"])


def test_every_arm_has_its_own_colour_and_marker() -> None:
    styles = figures.arm_styles([f"arm{i}" for i in range(7)] + ["base"], "base")
    assert len(set(styles.values())) == len({colour for colour, _ in styles.values()}) == 8
    assert len({marker for _, marker in styles.values()}) == 8


@pytest.mark.parametrize("kind", ["svg", "png", "pdf"])
def test_equal_figures_are_equal_files(
    drawn: tuple[Store, list[Multiplier], Fit, dict[str, Figure]], tmp_path: Path, kind: str
) -> None:
    store, found, law, by_name = drawn
    again = draw(store, found, law)
    for name, figure in by_name.items():
        figures.save(figure, tmp_path / f"{name}-1.{kind}")
        figures.save(again[name], tmp_path / f"{name}-2.{kind}")
        assert (tmp_path / f"{name}-1.{kind}").read_bytes() == (tmp_path / f"{name}-2.{kind}").read_bytes()


def test_unknown_kinds_of_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="figures are written as svg, pdf, png"):
        figures.save(Figure(), tmp_path / "figure.gif")
