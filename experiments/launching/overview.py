"""The states of runs as text: a table that fits the terminal, a summary of long lists, and one run in detail."""

import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from textwrap import fill

from experiments.launching.attempts import Attempt
from experiments.launching.states import ACTIVE, STATES, RunState
from experiments.terminal import align, duration, span

LONG_LIST = 40  # runs; a longer list is shown as one row for each arm and size
MOST_CAUSES = 12  # causes that are listed; --json has all of them
MOST_NAMED = 3  # runs that are named for one cause
DAY = 86400


@dataclass(frozen=True)
class _Column:
    """A column of the table of runs."""

    heading: str
    cell: Callable[[RunState], str]
    importance: int  # On a narrow terminal the least important columns are left out; 9 means never.


def render(states: Sequence[RunState], width: int, *, every: bool = False) -> str:
    """The runs as a table of at most `width` characters, causes below it, and a summary.

    A long list is shown by arm and size, unless `every` run is asked for.
    """
    long = len(states) > LONG_LIST and not every
    table = _groups(states) if long else _table(states, width)
    hint = ["", f"{len(states)} runs by arm and size; --all shows each, --state, --arm and --size some"] if long else []
    return "\n".join([table, *hint, "", *_causes(states, width), *(_fit(line, width) for line in _summary(states))])


def _loss(run: RunState) -> str:
    """The held-out loss of a complete run; otherwise the last training loss, marked since the two do not compare."""
    if run.loss is None:
        return ""
    return f"{run.loss:.4f}" if run.state == "complete" else f"train {run.loss:.4f}"


COLUMNS = (
    _Column("run", lambda run: run.run_id, 9),
    _Column("state", lambda run: run.state, 9),
    _Column("done", lambda run: f"{run.progress:.0%}", 9),
    _Column("loss", _loss, 6),
    _Column("to go", lambda run: duration(run.eta), 8),
    _Column("waits for", lambda run: ", ".join(filter(None, (run.reason, _when(run.expected_start, "%H:%M")))), 7),
    _Column("last step", lambda run: f"{ago} ago" if (ago := _since(run.last_logged)) else "", 4),
    _Column("attempts", lambda run: str(run.attempts or ""), 3),
    _Column("elapsed", lambda run: duration(run.elapsed), 3),
    _Column("device time", lambda run: _hours(run.gpu_hours), 4),
    _Column("forecast", lambda run: _hours(run.forecast_gpu_hours), 4),
    _Column("node", lambda run: run.nodes or "", 2),
    _Column("job", lambda run: run.job_id or "", 1),
)


def _table(states: Sequence[RunState], width: int) -> str:
    """A row for each run, with the columns that have content and fit into the width."""
    shown = [column for column in COLUMNS if column.importance == 9 or any(map(column.cell, states))]
    while True:
        table = align([c.heading for c in shown], [[c.cell(state) for c in shown] for state in states])
        least = min(shown, key=lambda column: column.importance)
        if max(map(len, table.splitlines())) <= width or least.importance == 9:
            return table
        shown.remove(least)


def _groups(states: Sequence[RunState]) -> str:
    """A row for each arm and size: the number of runs in each state, and the mean share of training that is done."""
    groups: dict[tuple[str, str], list[RunState]] = {}
    for state in states:
        groups.setdefault((state.arm or "?", state.size or "?"), []).append(state)
    present = [name for name in STATES if any(state.state == name for state in states)]
    rows = []
    for (arm, size), runs in groups.items():
        counts = Counter(run.state for run in runs)
        done = sum(run.progress for run in runs) / len(runs)
        rows.append([arm, size, str(len(runs)), *(str(counts[name] or "") for name in present), f"{done:.0%}"])
    return align(["arm", "size", "runs", *present, "done"], rows)


def _causes(states: Iterable[RunState], width: int) -> list[str]:
    """A line for each cause, with the runs that have it. Causes that differ only in numbers, such as steps, are one."""
    alike: dict[tuple[str, str], list[RunState]] = {}
    for state in states:
        if state.cause:
            alike.setdefault((state.state, re.sub(r"\d+", "", state.cause)), []).append(state)
    lines = []
    for runs in list(alike.values())[:MOST_CAUSES]:
        first = runs[0]
        if len(runs) == 1:
            line = f"{first.run_id} {first.state}: {first.cause}"
        else:
            others = " (others alike)" if any(run.cause != first.cause for run in runs) else ""
            more = f" and {len(runs) - MOST_NAMED} more" if len(runs) > MOST_NAMED else ""
            named = ", ".join(run.run_id for run in runs[:MOST_NAMED])
            line = f"{len(runs)} {first.state} ({named}{more}): {first.cause}{others}"
        lines.append(_fit(line, width))
    if len(alike) > MOST_CAUSES:
        lines.append(f"{len(alike) - MOST_CAUSES} more causes: --json has all of them")
    return [*lines, ""] if lines else []


def _summary(states: Sequence[RunState]) -> list[str]:
    """How many runs are in each state, what they cost, and when all of them will have ended."""
    counts = Counter(state.state for state in states)
    lines = [f"{len(states)} runs: " + ", ".join(f"{counts[name]} {name}" for name in STATES if counts[name])]
    spent = sum(state.gpu_hours or 0.0 for state in states)
    if spent > 0:
        forecasts = [state.forecast_gpu_hours for state in states]
        whole = sum(hours for hours in forecasts if hours is not None)
        forecast = f" of {_hours(whole)} forecast" if forecasts and None not in forecasts else ""
        lines.append(f"device time {_hours(spent)}{forecast}{_lost(states)}")
    seconds = seconds_to_go(states)
    if seconds is not None:
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + seconds))
        lines.append(f"about {duration(seconds)} to go with {counts['running']} running at once, until {end}")
    return lines


def _lost(states: Sequence[RunState]) -> str:
    """In words, what was lost because attempts ended early, for example by preemption."""
    parts = []
    if steps := sum(state.redone_steps for state in states):
        parts.append(f"{steps} steps done again ({duration(sum(state.redone_seconds for state in states))})")
    if between := sum(state.between_seconds for state in states):
        parts.append(f"{duration(between)} between attempts")
    return f"; lost to restarts: {', '.join(parts)}" if parts else ""


def seconds_to_go(states: Sequence[RunState]) -> float | None:
    """Forecast of the seconds until all active runs have ended, if as many as now run at once.

    A run whose speed is not known gets the median seconds per FLOP of the runs of its size, else of all runs. Returns
    None if no run is running, if no speed is known, or if a run's FLOPs are not known.
    """
    running = [state for state in states if state.state == "running"]
    speeds: dict[str | None, list[float]] = {}
    for state in states:
        if state.state == "complete" and state.elapsed and state.flops:
            speeds.setdefault(state.size, []).append(state.elapsed / state.flops)
        elif state.state == "running" and state.eta is not None and state.flops_left:
            speeds.setdefault(state.size, []).append(state.eta / state.flops_left)
    every = [speed for each in speeds.values() for speed in each]
    to_go = []
    for state in states:
        if state.state == "running" and state.eta is not None:
            to_go.append(state.eta)
        elif state.state in ("pending", "queued", "requeued", "running"):
            if not every or state.flops_left is None:
                return None
            to_go.append(statistics.median(speeds.get(state.size, every)) * state.flops_left)
    return max(max(to_go), sum(to_go) / len(running)) if running else None


def render_run(state: RunState, attempts: Sequence[Attempt], width: int) -> str:
    """One run in detail: its state and the cause, what it cost, where its output is, and its attempts."""
    why = state.cause or state.reason
    start = f"; Slurm expects it to start at {_when(state.expected_start)}" if state.expected_start else ""
    loss = f", loss {_loss(state)}" if state.loss is not None else ""
    logged = f"; last step logged {_since(state.last_logged)} ago" if state.last_logged else ""
    forecast = f" of {_hours(state.forecast_gpu_hours)} forecast" if state.forecast_gpu_hours is not None else ""
    facts = {
        "run": state.run_id,
        "state": state.state + (f": {why}" if why else "") + start,
        "done": f"{state.progress:.0%}{loss}{logged}" + (f"; {duration(state.eta)} to go" if state.eta else ""),
        "device time": "" if state.gpu_hours is None else f"{_hours(state.gpu_hours)}{forecast}{_lost([state])}",
        "job": (state.job_id or "") + (f" on {state.nodes}" if state.nodes else ""),
        "log": state.log or "",
    }
    lines = [_fit(f"{name:<13}{text}", width, 13) for name, text in facts.items() if text]
    return "\n".join([*lines, *(["", _attempts(attempts, width)] if attempts else [])])


def _attempts(attempts: Sequence[Attempt], width: int) -> str:
    """A table of the attempts without empty columns, and below it how they ended."""
    headings = ["attempt", "job", "node", "device", "started", "ended", "steps", "done again", "waited"]
    rows = [
        [
            "-" if one.number is None else str(one.number),
            one.job_id or "",
            one.nodes or "",
            (one.device or "") + (f" x{one.gpus}" if one.gpus and one.gpus > 1 else ""),
            _when(one.started_at),
            _when(one.ended_at),
            "none" if one.last_step is None else f"{one.first_step}-{one.last_step}",
            str(one.redone_steps or ""),
            duration(one.waited_seconds),
        ]
        for one in attempts
    ]
    keep = [n for n in range(len(headings)) if any(row[n] for row in rows)]
    headings, rows = [headings[n] for n in keep], [[row[n] for n in keep] for row in rows]
    ends = [f"  {row[0]}: {one.how_ended}" for row, one in zip(rows, attempts, strict=True) if one.how_ended]
    return "\n".join([align(headings, rows), "", "how they ended:", *(_fit(end, width, 5) for end in ends)])


def _fit(text: str, width: int, indent: int = 2) -> str:
    """A line, wrapped to the width of the terminal."""
    return fill(text, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def _since(moment: float | None) -> str:
    return "" if moment is None else duration(max(0.0, time.time() - moment))


def _when(moment: float | None, near_format: str = "%H:%M:%S") -> str:
    """A time in Unix seconds as a time of day, with the date if it is more than half a day away."""
    if moment is None:
        return ""
    near = abs(moment - time.time()) < DAY / 2
    return time.strftime(near_format if near else "%m-%d %H:%M", time.localtime(moment))


def _hours(hours: float | None) -> str:
    return "" if hours is None else span(hours)


def unfinished(states: Iterable[RunState]) -> bool:
    """Whether any of the runs is still active, so that its state may change."""
    return any(state.state in ACTIVE for state in states)
