"""The figure of the paper's ablations beside the measured ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from analysis.pages.style import BLACK, STYLE, budget_shades, printable, settled

if TYPE_CHECKING:
    from analysis.advantage.published import Beside

ACROSS = 3  # panels in a row
PUBLISHED = "published"


def published_panels(found: Sequence[Beside]) -> Figure:
    """A panel for each ablation of which something was measured: the difference that every setting makes, published
    (of log perplexity, in black) and measured (of the loss, by size, with 95% intervals over seeds).

    Raises ValueError where no published row was measured.
    """
    measured = [row for row in found if row.difference is not None]
    ablations = list(dict.fromkeys(row.ablation for row in measured))
    if not ablations:
        raise ValueError("no run has the facts of a published row, so there is no difference to draw")
    sizes = list(dict.fromkeys(row.size for row in measured))
    shades = dict(zip(sizes, budget_shades(max(len(sizes), 2)), strict=False))
    across = min(ACROSS, len(ablations))
    down = math.ceil(len(ablations) / across)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(0.8 + 2.4 * across, 0.4 + 2.4 * down), layout="constrained")
        panels = np.ravel(figure.subplots(down, across, squeeze=False))
        for axes, ablation in zip(panels, ablations, strict=False):
            rows = [row for row in found if row.ablation == ablation and row.published_difference is not None]
            settings = list(dict.fromkeys(row.setting for row in rows))
            theirs = {row.setting: row.published_difference for row in rows}
            places = range(len(settings))
            axes.plot(places, [theirs[name] for name in settings], color=BLACK, marker="o", ms=4, label=PUBLISHED)
            for size in sizes:
                mine = [row for row in rows if row.size == size and row.difference is not None]
                at = [settings.index(row.setting) for row in mine]
                y = [float(row.difference or 0.0) for row in mine]
                look = {"color": shades[size], "marker": "s", "ms": 4, "lw": 1}
                axes.plot(at, y, ls="--", label=printable(f"measured at {size}"), **look)
                for x, row in zip(at, mine, strict=True):
                    if row.ci is not None:
                        axes.plot([x, x], row.ci, color=shades[size], lw=1)
            axes.axhline(0, color=BLACK, lw=0.6, ls=":")
            axes.set_xticks(places, [printable(name, 20) for name in settings], rotation=45, ha="right", fontsize=7)
            axes.set_title(printable(ablation))
        for axes in panels[len(ablations) :]:
            axes.remove()
        figure.supylabel("difference from the reference (nats/token)", fontsize=9)
        by_label = {
            label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(list(by_label.values()), list(by_label), loc="outside upper left", ncols=2 * across, fontsize=7)
    return settled(figure)
