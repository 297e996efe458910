"""Interactive charts for the report: hovering shows a run, a click goes to its row in the table of runs.

They are drawn by Bokeh and share one table of runs, so that a run selected in one chart is highlighted in all. Names
from the data are never used as labels or titles in Bokeh, which would read `$$...$$` as mathematics; they appear as
text in tooltips and in the page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from bokeh.models import CDSView, ColorBar, ColumnDataSource, GlyphRenderer, IndexFilter, LogColorMapper

from analysis.laws.intervals import band
from analysis.logs.schema import CONVENTIONS
from analysis.pages.ablations import baseline_loss
from analysis.pages.chart_style import INK, Plot, answers_to_pointer, colour, dots, plot, rule, stroke
from analysis.pages.figures import TALLEST
from analysis.pages.isoflop_figures import curve_of
from analysis.pages.run_figures import time_of
from analysis.pages.style import budget_shades, loss_label, marks
from analysis.pages.tables import is_missing, short

if TYPE_CHECKING:
    import pandas as pd

    from analysis.laws.isoflop import Optimum
    from analysis.pages.drawing import Answers, Material

MOST_POINTS = 40  # of one run's loss curve; more would be indistinguishable and make the page larger
RUN_TIPS = ("run", "arm", "size", "seed", "budget", "loss")


class Charts:
    """The charts of one store. `rows` are its finished runs.

    All glyphs of an arm have the tag "arm-0", "arm-1", ..., in the order of `mark_of`, so that the page can hide an
    arm in every chart.
    """

    def __init__(self, rows: pd.DataFrame, answer: Answers) -> None:
        self.rows, self.answer = rows, answer
        self.mark_of = marks(list(rows["arm"]), answer.baseline)
        self.loss_axis = loss_label(rows)
        self.compute = f"training FLOPs ({answer.convention})"
        time, self.time = time_of(rows)
        numbers = {
            "budget": rows[CONVENTIONS[answer.convention]],
            "loss": rows["loss"],
            "parameters": rows["parameters"],
            "tokens": rows["tokens"],
            "time": time,
        }
        self.data: dict[str, Any] = {
            "run": list(map(str, rows["run_id"])),
            "arm": list(map(str, rows["arm"])),
            "size": [_cell(value) for value in rows["size"]],
            "seed": [_cell(value) for value in rows["seed"]],
            **{name: column.to_numpy(float, na_value=np.nan) for name, column in numbers.items()},
        }
        self.source = ColumnDataSource(_narrow(self.data) | {"row": rows.index.to_numpy(np.int32)})
        arms = self.data["arm"]
        self.place_of = {arm: [at for at, name in enumerate(arms) if name == arm] for arm in self.mark_of}

    def loss_against(self, column: str, label: str) -> Plot:
        """The final loss of every run against a column of the shared table."""
        made = plot(label, self.loss_axis, "time" if column == "time" else "counts")
        self._dots(made, column, "loss")
        return made

    def loss_against_compute(self) -> list[Plot]:
        """Every run, each arm's law with its 68% band, and the residuals below."""
        top = self.loss_against("budget", self.compute)
        law = self.answer.law
        if law is None:
            return [top]
        grid = np.geomspace(law.points.x["C"].min(), law.points.x["C"].max(), 60)
        residuals = np.full(len(self.rows), np.nan)
        for arm in dict.fromkeys(law.points.arm):
            place = self.place_of[arm]
            self._line(top, arm, grid, law.predict({"C": grid}, arm))
            if law.draws is not None:
                self._band(top, arm, grid, *band(law, {"C": grid}, arm, 0.68))
            expected = law.predict({"C": self.data["budget"][place]}, arm)
            residuals[place] = 100 * np.log(self.data["loss"][place] / expected)
        spare = 0.08 * np.ptp(self.data["loss"]) + 0.01
        top.y_range.update(
            start=self.data["loss"].min() - spare, end=self.data["loss"].max() + spare
        )  # bands may be far wider
        self.source.add(residuals.astype(np.float32), "residual")
        below = plot(self.compute, "residual (%)", height=170, x_range=top.x_range)
        self._dots(below, "budget", "residual")
        rule(below, 0.0)
        return [top, below]

    def local_multipliers(self) -> list[Plot]:
        """m at each size, the line of m(C) with its 95% band, and a dotted rule at the largest compute measured."""
        made = plot(self.compute, "compute multiplier m")
        values, ends, largest, drawn = [1.0], [1.0], 0.0, []
        for item in self.answer.found:
            if not item.local:
                continue
            data: dict[str, Any] = {
                "arm": [item.arm] * len(item.local),
                "size": [str(row["size"]) for row in item.local],
                "budget": np.array([row["compute_baseline"] for row in item.local]),
                "m": np.array([row["m"] for row in item.local]),
                "loss": np.array([row["loss"] for row in item.local]),
                "baseline's loss": np.array([row["loss_baseline"] for row in item.local]),
            }
            drawn.append(made.scatter("budget", "m", source=ColumnDataSource(data), **dots(self.mark_of[item.arm])))
            self._tag(drawn[-1], item.arm)
            line = np.array([[point.compute, point.m, *point.ci] for point in item.curve]).reshape(-1, 4)
            self._line(made, item.arm, line[:, 0], line[:, 1])
            self._band(made, item.arm, line[:, 0], line[:, 2], line[:, 3])
            values += [*data["m"], *line[:, 1]]
            ends += [*data["m"], *line[:, 2], *line[:, 3]]
            largest = max(largest, *data["budget"])
        made.y_range.update(start=max(min(ends) - 0.05, 0), end=min(max(ends) + 0.05, TALLEST * max(values)))
        answers_to_pointer(made, drawn, ("arm", "size", "budget", "m", "loss", "baseline's loss"), leads=False)
        rule(made, 1.0)
        rule(made, largest, "height", "dotted")
        return [made]

    def wall_clock(self) -> list[Plot]:
        """What compute costs in measured time, and the loss that the time buys."""
        cost = plot(self.compute, self.time, y="time")
        self._dots(cost, "budget", "time")
        return [cost, self.loss_against("time", self.time)]

    def loss_curves(self, evals: pd.DataFrame) -> list[Plot]:
        """Held-out loss over training, every run a line; at most MOST_POINTS of its evaluations."""
        made = plot("training tokens", self.loss_axis)
        evals = evals[evals["tokens"] > 0].sort_values(["tokens"], kind="stable")
        curve_of = {str(run): part for run, part in evals.groupby("run_id")}
        drawn = []
        for arm, mark in self.mark_of.items():
            curves = {
                at: curve_of[self.data["run"][at]] for at in self.place_of[arm] if self.data["run"][at] in curve_of
            }
            curves = {at: part.iloc[_spread(len(part))] for at, part in curves.items()}
            if not curves:
                continue
            lines = [[part[name].to_numpy(float) for part in curves.values()] for name in ("tokens", "loss")]
            self._tag(made.multi_line(*lines, **stroke(mark, 1.2)), arm)
            at_of = [at for at, part in curves.items() for _ in range(len(part))]
            x, y = (np.concatenate(each) for each in lines)
            names = ("run", "arm", "size", "seed")
            data: dict[str, Any] = {name: [self.data[name][at] for at in at_of] for name in names}
            data |= {"row": self.rows.index.to_numpy(np.int32)[at_of], "tokens": x, "loss": y}
            drawn.append(made.scatter("tokens", "loss", source=ColumnDataSource(_narrow(data)), **dots(mark, 5)))
            self._tag(drawn[-1], arm)
        answers_to_pointer(made, drawn, ("run", "arm", "size", "seed", "tokens", "loss"))
        return [made]

    def isoflop(self) -> list[Plot]:
        """Loss against N by budget with its curve, one arm at a time, and the growth of N* with compute.

        What belongs to one arm is tagged "panel-0", "panel-1", ... in the order of `allocations`; the page shows one.
        """
        budgets = [item.compute for item in self.answer.optima]
        mapper = LogColorMapper(palette=budget_shades(), low=min(budgets), high=max(*budgets, 1.01 * min(budgets)))
        shade = {"field": "budget", "transform": mapper}
        curves = plot("parameters N", self.loss_axis)
        growth = plot(self.compute, "best N* (parameters)", y="counts")
        runs, stars = [], []
        for panel, law in enumerate(self.answer.allocations):
            mine = [item for item in self.answer.optima if item.arm == law.arm and item.N is not None]
            view = CDSView(filter=IndexFilter(self.place_of[law.arm]))
            look: Any = {"size": 7, "fill_color": shade, "line_color": shade, "nonselection_alpha": 0.35}
            runs.append(curves.scatter("parameters", "loss", source=self.source, view=view, **look))
            fitted = [tuple(part.astype(np.float32) for part in curve_of(item)) for item in mine]
            lines = ColumnDataSource(
                {"xs": [x for x, _ in fitted], "ys": [y for _, y in fitted], "budget": [item.compute for item in mine]}
            )
            shapes = curves.multi_line("xs", "ys", source=lines, line_color=shade, line_width=1.4)
            for renderer in (runs[-1], shapes):
                renderer.update(tags=[f"panel-{panel}"], visible=panel == 0)
            stars.append(self._growth(growth, law.arm, mine, law.N_exponent))
        answers_to_pointer(curves, runs, RUN_TIPS)
        answers_to_pointer(growth, stars, ("arm", "budget", "parameters", "status"), leads=False)
        bar: Any = {"width": 10, "background_fill_color": None, "bar_line_color": None, "title": "FLOPs"}
        curves.add_layout(ColorBar(color_mapper=mapper, **bar), "right")
        return [curves, growth]

    def _growth(self, made: Plot, arm: str, optima: Sequence[Optimum], exponent: float | None) -> GlyphRenderer:
        """N* of every budget, hollow where its status is not ok, and the law through the others."""
        sizes = np.array([item.N for item in optima], float)
        counts = np.array([item.status == "ok" for item in optima], bool)
        compute = np.array([item.compute for item in optima], float)
        data = {
            "arm": [arm] * len(optima),
            "budget": compute,
            "parameters": sizes,
            "status": [item.status for item in optima],
            "face": np.where(counts, 0.9, 0.0),
        }
        look = dots(self.mark_of[arm], 9) | {"fill_alpha": "face"}
        drawn = made.scatter("budget", "parameters", source=ColumnDataSource(_narrow(data)), **look)
        self._tag(drawn, arm)
        if exponent is not None and counts.any():
            height = np.mean(np.log(sizes[counts]) - exponent * np.log(compute[counts]))
            self._line(made, arm, compute[counts], np.exp(height) * compute[counts] ** exponent)
        return drawn

    def ablations(self, rows: pd.DataFrame) -> list[Plot]:
        """A plot for each factor: loss by setting, a line for each group of arms that differ in it alone."""
        mark_of = marks(list(rows["line"]), "")
        baseline = baseline_loss(self.rows, rows, self.answer.baseline)
        plots = []
        for factor, part in rows.groupby("factor", sort=False):
            made = plot(str(factor), self.loss_axis, "linear", height=260, x_range=list(dict.fromkeys(part["setting"])))
            drawn = []
            for line, mine in part.groupby("line", sort=False):
                means = mine.groupby("setting", sort=False)["loss"].mean()
                made.line(list(means.index), means.to_numpy(float), **stroke(mark_of[line]))
                data = {
                    "run": list(map(str, mine["run_id"])),
                    "arm": list(map(str, mine["arm"])),
                    "setting": list(mine["setting"]),
                    "others": [str(line)] * len(mine),
                    "loss": mine["loss"].to_numpy(float),
                    "row": mine.index.to_numpy(np.int32),
                }
                drawn.append(made.scatter("setting", "loss", source=ColumnDataSource(data), **dots(mark_of[line])))
            answers_to_pointer(made, drawn, ("run", "arm", "setting", "others", "loss"))
            if baseline is not None:
                rule(made, baseline, dash="dotted")
            plots.append(made)
        return plots

    def _dots(self, made: Plot, x: str, y: str) -> None:
        drawn = []
        for arm, mark in self.mark_of.items():
            view = CDSView(filter=IndexFilter(self.place_of[arm]))
            drawn.append(made.scatter(x, y, source=self.source, view=view, **dots(mark)))
            self._tag(drawn[-1], arm)
        answers_to_pointer(made, drawn, RUN_TIPS)

    def _line(self, made: Plot, arm: str, x: Any, y: Any) -> None:
        self._tag(made.line(x, y, **stroke(self.mark_of[arm])), arm)

    def _band(self, made: Plot, arm: str, x: Any, low: Any, high: Any) -> None:
        self._tag(made.varea(x, low, high, fill_color=colour(self.mark_of[arm]), fill_alpha=0.14), arm)

    def _tag(self, renderer: GlyphRenderer, arm: str) -> None:
        mark = self.mark_of[arm]
        renderer.tags = [f"arm-{list(self.mark_of).index(arm)}", *([INK] if colour(mark) != mark.colour else [])]


def charts(names: Iterable[str], of: Material, answer: Answers) -> dict[str, list[Plot]]:
    """The counterparts of the figures of `drawing.draw`, by the same `names`; a figure may be several plots."""
    drawn = Charts(of.done, answer)
    makers: dict[str, Callable[[], list[Plot]]] = {
        "loss-against-compute": drawn.loss_against_compute,
        "multiplier-against-compute": drawn.local_multipliers,
        "loss-against-tokens": lambda: [drawn.loss_against("tokens", "training tokens D")],
        "wall-clock": drawn.wall_clock,
        "loss-curves": lambda: drawn.loss_curves(of.evals),
        "isoflop": drawn.isoflop,
        "ablations": lambda: drawn.ablations(of.ablated),
    }
    return {name: makers[name]() for name in names if name in makers}


def _narrow(data: dict[str, Any]) -> dict[str, Any]:
    """Numbers as 32-bit floats, to halve their bytes: seven digits are more than a screen or a tooltip shows."""
    return {
        name: column.astype(np.float32) if isinstance(column, np.ndarray) and column.dtype == float else column
        for name, column in data.items()
    }


def _spread(count: int) -> list[int]:
    """Indices of up to MOST_POINTS evenly spaced items of `count`, including the first and the last."""
    return sorted(set(np.linspace(0, count - 1, min(count, MOST_POINTS)).round().astype(int).tolist()))


def _cell(value: Any) -> str:
    return "-" if is_missing(value) else short(value)
