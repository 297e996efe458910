"""Where the runs of a sweep are kept where no --store says so: one place, from whichever folder it is submitted."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from experiments import source
from experiments.cli.arguments import STORES
from experiments.design.config import RunConfig
from experiments.terminal import warn

VARIABLE = "DYNCONV_STORES"
_PROJECT_FILES = ("pyproject.toml", ".git")


def runs_of(args: argparse.Namespace) -> tuple[list[RunConfig], Path]:
    """The runs of the sweep, or those that --where chooses, and their store. `plan` and `submit` also print notes on
    settings that may be mistakes, and on runs of the store that were submitted otherwise. Raises ValueError where the
    store can keep no runs."""
    from experiments.design.sweep import load_sweep, notes
    from experiments.design.sweep_file import read_sweep

    runs = load_sweep(args.sweep)
    if args.verb in ("plan", "submit"):
        for note in notes(read_sweep(args.sweep)):
            warn(f"{args.sweep}: {note}")
    store: Path = getattr(args, "store", None) or default_store(args.sweep, runs, args.verb)
    _refuse_other_stores(store)
    if args.verb in ("plan", "submit"):
        from experiments.training.record import submitted_otherwise

        warn(*submitted_otherwise(runs, store))
    return chosen_runs(runs, getattr(args, "where", None)), store


def _refuse_other_stores(store: Path) -> None:
    """Raises ValueError for what can keep no runs: a file, and a frozen store, whose table hides runs beside it."""
    if store.is_file():
        raise ValueError(f"{store} is a file; --store wants the folder in which runs are kept")
    if (frozen := store / "runs.parquet").exists():
        raise ValueError(
            f"{store} is a frozen store: {frozen.name} hides runs that are beside it; give another --store"
        )


def chosen_runs(runs: list[RunConfig], where: str | None) -> list[RunConfig]:
    """The runs that fulfil a condition on the columns of `plan --format json`, with the trunks of those among them.

    Raises ValueError where it is no condition, or no run fulfils it.
    """
    if where is None:
        return runs
    from analysis.advantage.planning import plan_table
    from analysis.pages.query import chosen
    from experiments.design import plan

    kept = chosen(plan_table(plan.rows(runs, {run.size: 1 for run in runs})), where)
    ids = {*kept["run_id"], *kept["trunk"].dropna()}
    return [run for run in runs if run.run_id in ids]


def default_store(sweep: Path, runs: Sequence[RunConfig], verb: str) -> Path:
    """The folder of the sweep's name in the stores of the project that the sweep file belongs to.

    Its runs may be in another store, which was the default before a variable was set or the file was moved. That is
    said, and `submit` and `retry`, which would train all of them again, raise ValueError.
    """
    name = runs[0].sweep
    chosen = stores_of(sweep) / name
    places = [STORES, *(stores_of(near, heed_variable=False) for near in (Path(), sweep))]
    others = {(place / name).resolve(): place / name for place in places}
    others.pop(chosen.resolve(), None)
    for other in others.values():
        count = sum((other / run.run_id).is_dir() for run in runs)
        if count == 0:
            continue
        told = f"{count} runs of this sweep are in {other}, and the default is {chosen}"
        if verb in ("submit", "retry") and not any((chosen / run.run_id).is_dir() for run in runs):
            raise ValueError(f"{told}: name the one that you want with --store")
        warn(f"{told}; --store names another")
    return chosen


def stores_of(path: Path, *, heed_variable: bool = True) -> Path:
    """The folder of stores: $DYNCONV_STORES, or results/runs of the project that a file or folder belongs to.

    That is the nearest folder above with a pyproject.toml or .git. Without one it is the file's own folder; the sweeps
    of an installed copy count as lying in the current one. Relative to the current folder if it is in it.
    """
    if heed_variable and (chosen := os.environ.get(VARIABLE)):
        return Path(chosen)
    here = path.resolve()
    if here.is_relative_to(source.root()) and not any((source.root() / name).exists() for name in _PROJECT_FILES):
        here = Path.cwd()
    folders = [folder for folder in (here, *here.parents) if folder.is_dir()]
    project = next((f for f in folders if any((f / name).exists() for name in _PROJECT_FILES)), folders[0])
    stores = project / STORES
    return stores.relative_to(Path.cwd()) if stores.is_relative_to(Path.cwd()) else stores
