"""Accounting of device time: forecasts of runs under a profile, hours that a store has used, caps and time limits."""

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from analysis.logs import reader
from analysis.logs.files import read_json
from analysis.logs.schema import SCHEMA
from analysis.logs.selection import some
from experiments.design import calibrations
from experiments.design.calibrations import Calibration, Work
from experiments.design.config import RunConfig
from experiments.design.forecast import Rate, stated_rate
from experiments.launching import attempts, local, states
from experiments.launching.jobs import errors_naming
from experiments.launching.profile import LONGEST_ATTEMPT, Job, Profile
from experiments.terminal import warn
from experiments.training.record import read_record, recorded_execution

CLOCKS = ("train", "eval", "checkpoint", "lost")  # clocks of a finished run that grow with its tokens
START = ("startup", "compile")  # clocks that each run spends once
# A time limit that follows from a measured speed is MARGIN times the forecast of the longest run, plus START_HOURS.
MARGIN = 1.5
START_HOURS = 0.5
UNEVEN = 0.3  # relative spread between the rounds of a calibration above which a note warns


@dataclass
class Speeds:
    """The speeds of a sweep's runs."""

    rates: dict[str, Rate] = field(default_factory=dict)  # by run id; runs of unknown speed are missing
    notes: list[str] = field(default_factory=list)  # measurements that were not used, and why


def speeds(runs: Sequence[RunConfig], profile: Profile, store: Path, cache: Path) -> Speeds:
    """The speed of each run: measured by finished runs of its kind in the store, else by a calibration, else as the
    profile states it."""
    found = Speeds()
    places = {size: place(profile, profile.job(size)) for size in {run.size for run in runs}}
    finished = _finished(runs, profile, places, store, found.notes)
    in_container = profile.slurm is not None and profile.slurm.python is not None
    stale, uneven = dict[str, list[str]](), list[str]()
    calibrated: dict[Work, Rate | None] = {}
    for run in runs:
        job = profile.job(run.size)
        work = Work.of(run, job.execution, places[run.size])
        if work in finished:
            found.rates[run.run_id] = finished[work]
            continue
        if work not in calibrated:
            kept = calibrations.read(work, places[run.size], cache)
            why = kept and kept.stale(in_container)
            calibrated[work] = _rate(kept) if kept and not why else None
            if why:
                stale.setdefault(why, []).append(f"{run.arm} at {run.size}")
            elif kept and kept.spread > UNEVEN:
                uneven.append(f"{run.arm} at {run.size} varied by {kept.spread:.0%}")
        if rate := calibrated[work]:
            found.rates[run.run_id] = rate
        elif job.teraflops_per_second is not None:
            found.rates[run.run_id] = stated_rate(run, job.gpus, job.teraflops_per_second)
    found.notes += [
        f"the calibration of {some(names)} is {why}, and is not used; `dynconv plan --calibrate` measures again"
        for why, names in stale.items()
    ]
    if uneven:
        found.notes.append(
            f"the calibration of {some(uneven)} between its rounds: the machine was not idle, so the forecast is rough"
        )
    return found


def place(profile: Profile, job: Job) -> str:
    """Where a job runs, as a key of calibrations: this machine's device, or the options that Slurm is given."""
    if profile.slurm is None:
        return local.device_name(job)
    slurm = profile.slurm
    options = {
        "partition": slurm.partition,
        "constraint": slurm.constraint,
        "python": slurm.python,
        "srun_options": " ".join(slurm.srun_options),  # They name the container, and so the versions of packages.
        **slurm.options,
    }
    kind = "cpu" if job.device == "cpu" else "gpu"
    return f"slurm {kind} " + " ".join(f"{name}={value}" for name, value in sorted(options.items()) if value)


def require_idle(profile: Profile, runs: Sequence[RunConfig]) -> None:
    """Raises ValueError if runs are training on the devices of this machine that a calibration would use."""
    if beside := local.Slots(profile, [profile.job(run.size) for run in runs]).beside(()):
        raise ValueError(
            f"--calibrate measures runs that are alone; got {len(beside)} that train on this machine, as "
            f"{Path(beside[0].run).name} (process {beside[0].pid}): wait for their end"
        )


def _rate(calibration: Calibration) -> Rate:
    """The speed that a calibration measured."""
    day = time.strftime("%Y-%m-%d", time.localtime(calibration.measured_at))
    return Rate(calibration.tokens_per_second, f"the calibration of {day} on {calibration.device}")


def _finished(
    runs: Sequence[RunConfig],
    profile: Profile,
    places: Mapping[str, str],  # by size
    store: Path,
    notes: list[str],
) -> dict[Work, Rate]:
    """The speeds of the store's complete runs that were executed as the profile would execute them.

    Adds a note for those that were measured on several kinds of device or versions of torch, which give no speed.
    """
    rows: dict[Work, list[tuple[RunConfig, Mapping[str, Any]]]] = defaultdict(list)
    for run in runs:
        done, record = store / run.run_id / "run.json", store / run.run_id / "config.json"
        if not done.exists():
            continue
        row, frozen = read_json(done), read_json(record)
        if frozen.get("schema") != SCHEMA:
            continue
        with errors_naming(record):
            execution = recorded_execution(frozen, record)
        job, where = profile.job(run.size), places[run.size]
        work = Work.of(run, execution, where)
        if work == Work.of(run, job.execution, where) and _would_be_on(row.get("device"), where, job):
            rows[work].append((run, row))
    found, mixed = {}, []
    for work, members in rows.items():
        kinds = {tuple(done.get(key) for key in ("device", "dtype", "torch")) for _, done in members}
        (first, _), (device, _, torch) = members[0], next(iter(kinds))
        if len(kinds) > 1 or torch is None:
            mixed.append(f"{first.arm} at {first.size}")
            continue
        tokens = sum(run.own_tokens for run, _ in members)
        clocks = [done.get("seconds", {}) for _, done in members]
        seconds = sum(clock.get(name, 0.0) for clock in clocks for name in CLOCKS)
        start = sum(clock.get(name, 0.0) for clock in clocks for name in START) / len(members)
        if seconds > 0:
            words = f"finished runs of {store} on {device}" + _side_by_side([done for _, done in members])
            found[work] = Rate(tokens / seconds, words, whole=True, start_seconds=start)
    if mixed:
        notes.append(f"the finished runs of {some(mixed)} are of several devices or versions, and no forecast")
    return found


def _side_by_side(finished: Sequence[Mapping[str, Any]]) -> str:
    """In words, how many runs shared the device, if several did: each was slower than it would have been alone."""
    attempts = [attempt for done in finished for attempt in done.get("attempts_made", ())]
    most = max((attempt.get("sharing") or 1 for attempt in attempts), default=1)
    return f", up to {most} at once on it" if most > 1 else ""


def _would_be_on(device: str | None, where: str, job: Job) -> bool:
    """Whether the profile would put a run on this device. On Slurm only CPU and GPU can be told apart."""
    if device is None or where.startswith("slurm"):
        return device is not None and (job.device == "auto" or (device == "cpu") == (job.device == "cpu"))
    return device == ("cpu" if where.startswith("cpu") else where)


def share_left(run: RunConfig, store: Path) -> float:
    """The share, from 0 to 1, of a run's own tokens that it still has to train on, by its log."""
    run_dir = store / run.run_id
    if reader.status(run_dir) == "complete":
        return 0.0
    logged = reader.progress(run_dir)
    left = run.counts.tokens - (logged.tokens or 0) if logged else run.own_tokens
    return min(1.0, max(0.0, left / run.own_tokens))


def used_hours(store: Path) -> float:
    """GPU-hours of all attempts at all runs of a store, by their logs."""
    run_dirs = sorted(path.parent for path in store.glob("*/config.json"))
    costs = [attempts.cost(attempts.read_made(run_dir, None), running=False) for run_dir in run_dirs]
    return sum(cost.gpu_hours or 0.0 for cost in costs)


def require_within_cap(
    todo: Sequence[RunConfig], runs: Sequence[RunConfig], profile: Profile, store: Path, cache: Path
) -> None:
    """Raises ValueError if `todo` and the store's active runs would exceed the profile's `max_gpu_hours`, or if the
    speed of one of them is not known."""
    if profile.max_gpu_hours is None:
        return
    chosen = {run.run_id for run in todo}
    ids = states.find(store) if store.is_dir() else []
    active = [s.run_id for s in states.read(store, [i for i in ids if i not in chosen]) if s.state in states.ACTIVE]
    known = {run.run_id: run for run in runs}
    under_way = [known.get(run_id) or read_record(store / run_id)[1] for run_id in active]
    ahead = [*todo, *under_way]
    everything = {run.run_id: run for run in (*runs, *ahead)}  # Finished runs are included for their speeds.
    rates = speeds(list(everything.values()), profile, store, cache).rates
    if unknown := sorted({f"{run.arm} at {run.size}" for run in ahead if run.run_id not in rates}):
        raise ValueError(
            f"max_gpu_hours = {profile.max_gpu_hours:g} needs a forecast, and the speed of {some(unknown)} is not "
            "known; measure it by `dynconv plan --calibrate`, or state teraflops_per_second in the profile"
        )
    hours = sum(profile.job(run.size).gpus * rates[run.run_id].hours(run) * share_left(run, store) for run in ahead)
    used = used_hours(store)
    if used + hours > profile.max_gpu_hours:
        sources = " and ".join(dict.fromkeys(rates[run.run_id].source for run in ahead))
        raise ValueError(
            f"max_gpu_hours = {profile.max_gpu_hours:g} in the profile: {store} has used {used:.4g} GPU-hours, and the "
            f"{len(todo)} runs to be submitted"
            + (f", with {len(under_way)} under way," if under_way else "")
            + f" are forecast to take {hours:.4g} more, by {sources}; submit fewer runs, or raise the cap"
        )


def with_time_limits(profile: Profile, todo: Sequence[RunConfig], found: Speeds) -> Profile:
    """The profile with a time limit added to each size that has none, if the speed of all its runs in `todo` was
    measured.

    Standard error says how each limit was derived, and which measurements were not used.
    """
    wanted = sorted({run.size for run in todo if profile.job(run.size).hours is None})
    if profile.slurm is None or not wanted:
        return profile
    warn(*found.notes)
    rates = found.rates
    sizes = dict(profile.size)
    for size in wanted:
        own = [run for run in todo if run.size == size]
        known = [rates[run.run_id] for run in own if run.run_id in rates and rates[run.run_id].measured]
        if len(known) < len(own):
            unknown = f"the speed of {len(own) - len(known)} of its {len(own)} runs was not measured"
            warn(f"the time limit of {size} is {LONGEST_ATTEMPT:g} h: {unknown}")
            continue
        longest, by = max((rate.hours(run), rate.source) for rate, run in zip(known, own, strict=True))
        limit = min(LONGEST_ATTEMPT, max(MARGIN * longest + START_HOURS, profile.slurm.signal_seconds / 1800))
        sizes[size] = replace(profile.job(size), hours=limit)
        forecast = f"forecast of {longest:.3g} h, by {by},"
        words = f"{MARGIN:g} times the longest run's {forecast} and {START_HOURS:g} h for the start"
        how = words if limit < LONGEST_ATTEMPT else "the most"
        warn(f"the time limit of {size} is {limit:.3g} h: {how}")
    return replace(profile, size=sizes)


def runs_at_once(profile: Profile, runs: Sequence[RunConfig]) -> int | None:
    """How many runs train at once, on this machine or of one size on Slurm. None: all of them.

    Raises ValueError if a run does not fit on this machine.
    """
    if profile.executor == "local":
        return len(local.Slots(profile, [profile.job(run.size) for run in runs]).free)
    return profile.max_parallel or None if profile.executor == "slurm" else 1


def share_devices(profile: Profile, runs: Sequence[RunConfig]) -> bool:
    """Whether `max_parallel` puts several runs on a GPU or core of this machine, where each is slower than alone."""
    if profile.executor != "local" or not profile.max_parallel:
        return False
    apart = runs_at_once(replace(profile, max_parallel=0), runs) or 1
    return min(profile.max_parallel, len(runs)) > apart
