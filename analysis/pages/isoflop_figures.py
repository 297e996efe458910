"""isoFLOP figures: any number of budgets by a colour scale, any number of arms by small multiples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, LogNorm
from matplotlib.figure import Figure

from analysis.pages.style import BLACK, BUDGETS, COLOURS, STYLE, grid_of_panels, loss_label, printable, settled

if TYPE_CHECKING:
    import pandas as pd

    from analysis.laws.isoflop import Allocation, Optimum

FEW_ARMS = 3  # up to this many arms have a row each, with N* and D* beside their budgets
FEW_BUDGETS = 7  # up to this many budgets are labelled at their curves; more are shown by the colour scale alone
GROWTH = {"N": "best N* (parameters)", "D": "best D* (tokens)"}


def isoflop_panels(
    rows: pd.DataFrame, optima: Sequence[Optimum], laws: Sequence[Allocation], convention: str
) -> Figure:
    """A row for each arm: loss against N at each budget with its curve, then N* and D* against compute.

    Optima are drawn as large markers, hollow where their status is not ok. `rows` are the finished runs, with compute
    in column "C". With more than FEW_ARMS arms, each has only a panel of its budgets; `isoflop_growth` draws N*.
    """
    with mpl.rc_context(STYLE):
        if len(laws) > FEW_ARMS:
            figure, panels = grid_of_panels([law.arm for law in laws], "parameters N", loss_label(rows))
            panels[0].set_xscale("log")
            for law, axes in zip(laws, panels, strict=True):
                _curves(axes, rows[rows["arm"] == law.arm], optima, law.arm)
            _budget_scale(figure, figure.add_axes((0.62, 1 - 0.13 / figure.get_figheight(), 0.35, 0.01)), optima)
            return settled(figure)
        figure = Figure(figsize=(8.4, 0.4 + 2.6 * len(laws)), layout="constrained")
        grid = figure.subplots(len(laws), 3, squeeze=False)
        for (curves, *growths), law in zip(grid, laws, strict=True):
            _curves(curves, rows[rows["arm"] == law.arm], optima, law.arm)
            curves.set(xscale="log", xlabel="parameters N", ylabel=loss_label(rows))
            curves.set_title(printable(law.arm) if len(laws) > 1 else "", loc="left")
            for axes, name in zip(growths, GROWTH, strict=True):
                _growth(axes, name, law, optima)
                axes.set(xscale="log", yscale="log", xlabel=f"training FLOPs ({convention})", ylabel=GROWTH[name])
            if law.ci and law.N_exponent:
                growths[0].set_title(f"N* ~ C^{law.N_exponent:.2f} [{law.ci[0]:.2f}, {law.ci[1]:.2f}]", loc="left")
        _budget_scale(figure, grid[:, 0], optima)
    return settled(figure)


def isoflop_growth(optima: Sequence[Optimum], laws: Sequence[Allocation], convention: str) -> Figure:
    """N* against compute, a panel for each arm, with its law."""
    with mpl.rc_context(STYLE):
        figure, panels = grid_of_panels([law.arm for law in laws], f"training FLOPs ({convention})", GROWTH["N"])
        panels[0].set(xscale="log", yscale="log")
        for law, axes in zip(laws, panels, strict=True):
            _growth(axes, "N", law, optima)
            if law.N_exponent is not None:
                ends = f" [{law.ci[0]:.2f}, {law.ci[1]:.2f}]" if law.ci else ""
                text: Any = {"transform": axes.transAxes, "fontsize": 6.5, "va": "top"}
                axes.text(0.04, 0.96, f"C^{law.N_exponent:.2f}{ends}", **text)
    return settled(figure)


def nearest_budget(compute: Any, optima: Sequence[Optimum]) -> Any:
    """For each compute, the index of the optimum whose budget is nearest."""
    budgets = np.log([item.compute for item in optima])
    return np.abs(np.log(np.asarray(compute, float))[:, None] - budgets).argmin(axis=1)


def curve_of(item: Optimum) -> tuple[Any, Any]:
    """A budget's fitted curve over the sizes it was fitted to: N and loss."""
    assert item.N is not None
    low, high = item.window or (item.N, item.N)
    grid = np.geomspace(min(low, item.N), max(high, item.N), 24)
    return grid, item.curve(grid)


def _budget_scale(figure: Figure, place: Any, optima: Sequence[Optimum]) -> None:
    """Draw the colour scale of budgets, in given axes or beside the panels; skip it if curves have labels instead."""
    if len({(item.arm, item.compute) for item in optima}) <= FEW_BUDGETS * len({item.arm for item in optima}):
        return
    shades, norm = _shades(optima)
    if isinstance(place, Axes):
        bar = figure.colorbar(ScalarMappable(norm, shades), cax=place, orientation="horizontal")
        bar.ax.set_ylabel("FLOPs of a budget", fontsize=7, rotation=0, ha="right", va="center")
    else:
        bar = figure.colorbar(
            ScalarMappable(norm, shades), ax=place, aspect=50, pad=0.02, location="right", shrink=0.95
        )
        bar.set_label("FLOPs of a budget", fontsize=7)
    bar.ax.tick_params(labelsize=6, pad=1)
    bar.outline.set_visible(False)


def _shades(optima: Sequence[Optimum]) -> tuple[LinearSegmentedColormap, LogNorm]:
    budgets = [item.compute for item in optima]
    return LinearSegmentedColormap.from_list("budgets", BUDGETS), LogNorm(
        min(budgets), max(*budgets, 1.01 * budgets[0])
    )


def _curves(axes: Axes, rows: pd.DataFrame, optima: Sequence[Optimum], arm: str) -> None:
    """Runs of one arm, each in the shade of the budget whose compute is nearest."""
    shades, norm = _shades(optima)
    mine = [item for item in optima if item.arm == arm]
    nearest = nearest_budget(rows["C"], mine)
    few = len(mine) <= FEW_BUDGETS
    for place, item in enumerate(mine):
        part, shade = rows[nearest == place], shades(norm(item.compute))
        axes.plot(part["parameters"], part["loss"], ls="", marker="o", ms=3.5 if few else 1.5, color=shade, mew=0)
        if item.N is None or item.loss is None:
            continue
        axes.plot(*curve_of(item), color=shade, lw=1 if few else 0.6)
        look: Any = {"color": shade, "mec": BLACK, "mew": 0.6 if few else 0.3, "mfc": _face(item, shade)}
        axes.plot(item.N, item.loss, "*", ms=10 if few else 4, **look)
        if few:
            last = part.sort_values("parameters").iloc[-1]
            place_of_text: Any = {"xytext": (3, 0), "textcoords": "offset points", "fontsize": 6.5, "va": "center"}
            text = f"{item.compute:.0e}".replace("e+", "e")
            axes.annotate(text, (last["parameters"], last["loss"]), color=shade, **place_of_text)


def _growth(axes: Axes, name: str, law: Allocation, optima: Sequence[Optimum]) -> None:
    """N* or D* of every budget with its interval, and the law through those whose status is ok."""
    mine = [item for item in optima if item.arm == law.arm]
    exponent = {"N": law.N_exponent, "D": law.D_exponent}[name]
    size = 10 if len(mine) <= FEW_BUDGETS else 5
    for item in mine:
        value: float | None = getattr(item, name)
        if value is None or item.N is None or item.ci is None:
            continue
        # N D is fixed by the budget, so the interval of D follows from that of N.
        ends = [item.N * value / end if name == "D" else end for end in item.ci]
        axes.plot([item.compute] * 2, ends, color=BLACK, lw=1 if size == 10 else 0.5)
        axes.plot(item.compute, value, "*", ms=size, color=BLACK, mew=0.6, mfc=_face(item, BLACK))
    good = [item for item in mine if item.status == "ok"]
    if exponent is not None and good:
        compute = np.array([item.compute for item in good])
        height = np.mean(np.log([getattr(item, name) for item in good]) - exponent * np.log(compute))
        axes.plot(compute, np.exp(height) * compute**exponent, color=COLOURS[0], lw=1.2, ls="--")


def _face(item: Optimum, shade: Any) -> Any:
    return shade if item.status == "ok" else "white"
