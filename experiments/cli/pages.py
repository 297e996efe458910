"""The verbs that present the logs of runs: plot, report, query, freeze."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cli.arguments import (
    TABLE_FORMATS,
    Subparsers,
    add_reading_verb,
    baseline_argument,
    convention_argument,
    folder_name,
    format_argument,
    published_argument,
    reading_store,
    require_folder,
    where_argument,
)
from experiments.terminal import warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from analysis.logs.store import Store


def register(subparsers: Subparsers) -> None:
    """Add the verbs of this file."""
    _add_plot(subparsers)
    _add_report(subparsers)
    _add_query(subparsers)
    _add_freeze(subparsers)


def _add_plot(subparsers: Subparsers) -> None:
    parser = add_reading_verb(
        subparsers,
        "plot",
        _plot,
        "draw every figure for which a store, or a table of kernel times or throughput, has the data",
        "results/runs/demo -o figures",
        "results/measured/h200/kernels.parquet -o figures --type png",
        "results/measured/h200/training.parquet -o figures",
    )
    parser.add_argument("-o", "--output", type=folder_name, required=True, metavar="DIR", help="folder for the figures")
    baseline_argument(parser)
    convention_argument(parser)
    where_argument(parser)
    parser.add_argument("--type", choices=("svg", "png", "pdf"), default="svg", help="of the files (default svg)")
    published_argument(parser, "also draw the paper's ablations beside the runs that have the same facts")


def _add_freeze(subparsers: Subparsers) -> None:
    parser = add_reading_verb(
        subparsers,
        "freeze",
        _freeze,
        "write a store's runs.parquet and evals.parquet, for committing and sharing",
        "results/runs/demo -o results/measured/laptop/demo",
    )
    parser.add_argument("-o", "--output", type=folder_name, required=True, metavar="DIR", help="folder for the files")
    parser.add_argument("--steps", action="store_true", help="write steps.parquet, too")


def _add_query(subparsers: Subparsers) -> None:
    parser = add_reading_verb(
        subparsers,
        "query",
        _query,
        "run SQL over the views runs, steps, evals and multipliers (DuckDB)",
        """results/runs/demo "select arm, size, avg(loss) from runs group by all order by all" """,
        """results/runs/demo "select * from multipliers" --format csv""",
    )
    parser.add_argument("sql", metavar="SQL", help="one statement, as in the examples")
    baseline_argument(parser, "for multipliers, the arm that others are compared with")
    convention_argument(parser, "how FLOPs are counted, in multipliers and C")
    format_argument(parser, TABLE_FORMATS)


def _add_report(subparsers: Subparsers) -> None:
    parser = add_reading_verb(
        subparsers,
        "report",
        _report,
        "write one self-contained HTML page: answers, figures, and where every number comes from",
        "results/runs/demo -o report.html",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the .html file to write")
    where_argument(parser)
    baseline_argument(parser)
    convention_argument(parser)


def _plot(args: argparse.Namespace) -> int:
    from analysis.advantage.published import beside_published, read_published
    from analysis.logs.points import read_kernels
    from analysis.pages.kernel_figures import kernel_bars
    from analysis.pages.published_figures import published_panels
    from analysis.pages.style import save
    from analysis.pages.throughput_figures import read_training, throughput_panels

    require_folder(args.output)
    kernels = read_kernels(args.stores[0]) if len(args.stores) == 1 else None
    training = read_training(args.stores[0]) if len(args.stores) == 1 else None
    if kernels is not None:
        drawn = {"kernels": kernel_bars(kernels)}
    elif training is not None:
        drawn = {"training": throughput_panels(training)}
    else:
        with reading_store(args) as store:
            drawn = _drawn(store, args.baseline, args.convention)
            if args.published is not None:
                drawn["published"] = published_panels(beside_published(store.runs, read_published(args.published)))
    args.output.mkdir(parents=True, exist_ok=True)
    for name, figure in drawn.items():
        path = args.output / f"{name}.{args.type}"
        save(figure, path)
        print(path)
    return 0


def _drawn(store: Store, baseline: str | None, convention: str | None) -> dict[str, Figure]:
    """The figures of a store. One of several tasks supports no law or multiplier, but its accuracies are drawn."""
    from analysis.errors import Refusal
    from analysis.logs.selection import choose_baseline
    from analysis.pages.drawing import answers, draw, material
    from analysis.pages.metric_figures import accuracy_panels

    try:
        found = answers(store, baseline, convention)
    except Refusal as error:
        accuracies = material(store).accuracies
        if accuracies.empty:
            raise
        warn(f"accuracy alone is drawn: {error}")
        return {"accuracy": accuracy_panels(accuracies, choose_baseline(store.runs, baseline))}
    warn(*found.notes)
    return draw(material(store), found)


def _query(args: argparse.Namespace) -> int:
    from analysis.pages.query import sql
    from analysis.pages.tables import value_table

    with reading_store(args) as store:
        print(value_table(*sql(store, args.sql, args.baseline, args.convention), args.format))
    return 0


def _report(args: argparse.Namespace) -> int:
    from analysis.logs.files import require_writable, write_atomically
    from analysis.pages.report import report

    if not args.output.parent.is_dir() or args.output.is_dir():
        got = "is a folder" if args.output.is_dir() else "is in no folder"
        raise ValueError(f"{args.output} {got}; give a file in a folder that exists")
    if args.output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"a report is a page for a browser; got {args.output}; name a file that ends in .html")
    require_writable(args.output)
    with reading_store(args) as store:
        page = report(store, args.baseline, args.convention)
    write_atomically(args.output, lambda temporary: temporary.write_text(page))
    print(args.output)
    return 0


def _freeze(args: argparse.Namespace) -> int:
    from analysis.logs.provenance import several
    from analysis.logs.store import freeze

    require_folder(args.output)
    with reading_store(args) as store:
        written = freeze(store, args.output, args.steps)
    warn(*(f"{line}; `dynconv table` names the comparisons that mix them" for line in several(store.runs)))
    counts = store.runs["status"].value_counts()
    warn(f"froze {len(store.runs)} runs: {', '.join(f'{count} {status}' for status, count in counts.items())}")
    print(*written, sep="\n")
    return 0
