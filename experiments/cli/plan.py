"""The verb that says what a sweep will cost before anything is submitted: plan."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.errors import WorkFailed
from analysis.logs.files import require_writable
from experiments.cli.arguments import (
    Subparsers,
    add_verb,
    format_argument,
    part_argument,
    profile_argument,
    profile_of,
    store_argument,
    sweep_argument,
)
from experiments.cli.stores import runs_of
from experiments.terminal import warn

if TYPE_CHECKING:
    from experiments.bench.calibration import Request
    from experiments.design.config import RunConfig
    from experiments.design.forecast import Rate
    from experiments.launching.profile import Profile

CALIBRATION_HOURS = 0.5  # the time limit of a job that measures
_SIGNAL_SECONDS = 30
_POLL_SECONDS = 3.0


def register(subparsers: Subparsers) -> None:
    """Add the verb of this file."""
    verb = add_verb(
        subparsers,
        "plan",
        _plan,
        "list every run of a sweep with its size, tokens, FLOPs and forecast hours; submits no run",
        "experiments/sweeps/demo.toml",
        "experiments/sweeps/demo.toml --calibrate         # measure each arm at each size for a few seconds, here",
        "experiments/sweeps/paper-scaling.toml --profile slurm/profiles/my-cluster.toml --calibrate   # in short jobs",
        "experiments/sweeps/paper-scaling.toml --throughput results/measured/h200/training.parquet",
        "experiments/sweeps/demo.toml --format json",
    )
    sweep_argument(verb)
    part_argument(verb)
    profile_argument(verb)
    store_argument(verb)
    text = "train a few steps of each arm at each size as the profile would, here or in jobs of Slurm, for the forecast"
    verb.add_argument("--calibrate", action="store_true", help=text)
    text = "a file of `bench train`: forecast by measured tokens a second, where it has them"
    verb.add_argument("--throughput", type=Path, metavar="FILE", help=text)
    format_argument(verb)


def _plan(args: argparse.Namespace) -> int:
    from experiments.data.forecast import forecast
    from experiments.design import plan
    from experiments.design.data import default_cache

    if args.calibrate and args.throughput is not None:
        raise ValueError("--calibrate measures what --throughput FILE gives; choose one of the two")
    runs, store = runs_of(args)
    profile, cache = profile_of(args), default_cache()
    if args.calibrate:
        _calibrate(runs, profile, cache)
    for spec in dict.fromkeys(run.data for run in runs if run.data is not None):
        if cost := forecast(spec, cache, profile.data.cores if profile.slurm else None):
            warn(f"{args.sweep}: {cost}")
    gpus = {run.size: profile.job(run.size).gpus for run in runs}
    rates = _rates(runs, gpus, profile, store, cache, args.throughput)
    if args.calibrate:
        warn(*_by_finished_runs(runs, rates, store))
    rows = plan.rows(runs, gpus, rates)
    if args.format == "json":
        print(json.dumps(rows, indent=1))
        return 0
    print(plan.render(rows))
    if all(run.run_id in rates for run in runs):
        print(_end(runs, rates, profile, store))
    return 0


def planned(sweep: Path, sizes: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The runs of a sweep file, and those that it would make at other `sizes` of its ladder, as `plan --format json`
    prints them without a forecast, with the facts of each run, for `power` and `table`.

    Raises ValueError for a sweep on generated tasks.
    """
    from experiments.design import plan
    from experiments.design.sweep import load_at, load_sweep

    runs = load_at(sweep, sizes) if sizes else load_sweep(sweep)
    if runs[0].task is not None:
        raise ValueError(f"a sweep on text is wanted; {runs[0].sweep} trains on generated tasks; give another")
    rows = plan.rows(runs, {run.size: 1 for run in runs})
    return [row | run.facts() for row, run in zip(rows, runs, strict=True)]


def _rates(
    runs: Sequence[RunConfig], gpus: dict[str, int], profile: Profile, store: Path, cache: Path, throughput: Path | None
) -> dict[str, Rate]:
    """The speeds of the runs; what was measured and is not used, and what is missing, is named on standard error."""
    from experiments.launching import account

    if throughput is None:
        found = account.speeds(runs, profile, store, cache)
        warn(*found.notes)
        return found.rates
    from analysis.logs.selection import some
    from experiments.design.forecast import measured_rates, stated_rate

    fused = {size: profile.job(size).execution.fused for size in gpus}
    rates, lacking = measured_rates(runs, gpus, fused, throughput)
    if lacking:
        warn(f"{throughput} has no throughput of {some(lacking)}")
    for run in runs:
        stated = profile.job(run.size).teraflops_per_second
        if run.run_id not in rates and stated is not None:
            rates[run.run_id] = stated_rate(run, gpus[run.size], stated)
    return rates


def _by_finished_runs(runs: Sequence[RunConfig], rates: dict[str, Rate], store: Path) -> list[str]:
    """A line on the arms and sizes whose calibration is not in the forecast, as finished runs go before it."""
    from analysis.logs.selection import some

    names = dict.fromkeys(f"{run.arm} at {run.size}" for run in runs if run.run_id in rates and rates[run.run_id].whole)
    if not names:
        return []
    return [
        f"the forecast of {some(names)} is by the clocks of finished runs in {store}, which go before the calibration "
        "that was just made; name an empty --store to see what that gives"
    ]


def _end(runs: Sequence[RunConfig], rates: dict[str, Rate], profile: Profile, store: Path) -> str:
    """Lines on what is left of the sweep, when it will have ended, and the profile's cap."""
    from experiments.design.timeline import Piece, hours_until_done
    from experiments.launching import account, local_loop
    from experiments.terminal import span

    pieces, left = [], 0.0
    for run in local_loop.in_order(runs) if profile.executor == "local" else runs:
        hours = rates[run.run_id].hours(run) * account.share_left(run, store)
        lane = f"{run.size} {run.trunk}" if profile.slurm is not None else ""  # as its array
        pieces += [Piece(run.run_id, hours, lane, run.trunk)] if hours else []
        left += hours * profile.job(run.size).gpus
    if not pieces:
        return f"all of them are complete in {store}"
    lines = []
    if len(pieces) < len(runs):
        lines.append(f"{len(runs) - len(pieces)} runs are complete in {store}; {span(left)} of one device are left")
    try:
        slots = account.runs_at_once(profile, runs)
    except ValueError as error:  # it is another machine's profile
        lines.append(f"no date of the end: {error}")
    else:
        hours = hours_until_done(pieces, slots)
        end = time.strftime("%a %Y-%m-%d %H:%M", time.localtime(time.time() + 3600 * hours))
        of_size = " of a size" if profile.slurm is not None else ""
        side = "with all runs at once" if slots is None else f"with {slots} run{'s' * (slots > 1)}{of_size} at once"
        lines.append(f"{span(hours)} {side}: until {end} if it starts now and waits for nothing")
        if account.share_devices(profile, runs) and not all(rate.whole for rate in rates.values()):
            lines[-1] += "; later, as runs share a device, and their speeds are of one run alone"
    if profile.max_gpu_hours is not None:
        used = account.used_hours(store)
        lines.append(
            f"max_gpu_hours = {profile.max_gpu_hours:g}: {used:.4g} used in {store}, {left:.4g} forecast; "
            + ("`submit` will refuse that" if used + left > profile.max_gpu_hours else "within the cap")
        )
    return "\n".join(lines)


def _calibrate(runs: Sequence[RunConfig], profile: Profile, cache: Path) -> None:
    """Measure the speed of each kind of run. Raises WorkFailed, once all sizes had their turn, if one had none, and
    ValueError, before any has, if the cache takes no files."""
    from experiments.bench import calibration
    from experiments.design.calibrations import FOLDER
    from experiments.launching import account

    try:
        require_writable(cache / FOLDER)
    except ValueError as error:
        raise ValueError(f"{error}, by the variable DYNCONV_CACHE") from None

    sizes = dict.fromkeys(run.size for run in runs)
    executions = {size: profile.job(size).execution for size in sizes}
    places = {size: account.place(profile, profile.job(size)) for size in sizes}
    wanted = calibration.requests(runs, executions, places, cache.absolute())
    failures = list[str]()
    if profile.slurm is not None:
        failures = _in_slurm(wanted, profile, cache.absolute())
    else:
        account.require_idle(profile, runs)
    for request in wanted if profile.slurm is None else ():
        try:
            calibration.calibrate(request)
        except WorkFailed as error:
            failures.append(str(error))
    if failures:
        raise WorkFailed("; ".join(failures))


def _in_slurm(wanted: Sequence[Request], profile: Profile, cache: Path) -> list[str]:
    """Have Slurm measure, a job a size, and wait. Returns a line for each size whose job brought nothing."""
    from dataclasses import replace

    from experiments.bench import calibration
    from experiments.design.calibrations import FOLDER
    from experiments.launching import causes, jobs, sbatch, slurm, snapshot

    assert profile.slurm is not None
    slurm.check(profile.slurm)
    root = cache / FOLDER
    root.mkdir(parents=True, exist_ok=True)
    code = snapshot.take(root)
    # by job id, with the output, and when its speeds were last measured, as the clocks of nodes may differ from ours
    waiting: dict[str, tuple[Request, Path, list[float | None]]] = {}
    for request in wanted:
        folder = jobs.new_folder(root, request.size)
        calibration.freeze(request, folder)
        name = f"calibrate-{request.size}-{folder.name.rpartition('-')[2]}"
        script = sbatch.script(
            replace(profile.job(request.size), hours=CALIBRATION_HOURS),
            replace(profile.slurm, signal_seconds=_SIGNAL_SECONDS),
            count=1,
            max_parallel=0,
            name=name,
            folder=folder,
            snapshot=code,
            module=calibration.__name__,
        )
        before = calibration.measured_at(request)
        job_id = sbatch.submit(script, folder, name)
        waiting[job_id] = (request, folder / f"{job_id}_0_log.out", before)
    warn(f"{len(waiting)} jobs measure the speed, each up to {60 * CALIBRATION_HOURS:.0f} minutes: {' '.join(waiting)}")
    failures = []
    try:
        while waiting:
            time.sleep(_POLL_SECONDS)
            queue = slurm.queue(list(waiting), [])
            for job_id in [job_id for job_id in waiting if queue is not None and job_id not in queue]:
                request, log, before = waiting.pop(job_id)
                now = calibration.measured_at(request)
                if any(new is None or new == old for new, old in zip(now, before, strict=True)):
                    starts = slurm.accounting([job_id]).get(job_id, [])
                    end = causes.cause_of(starts[-1] if starts else None, log)
                    failures.append(f"{request.size}: job {job_id} measured nothing ({end}); its output: {log}")
    except KeyboardInterrupt:
        warn(f"the jobs go on; `plan` without --calibrate uses what they measure: {' '.join(waiting)}")
        raise
    return failures
