"""Runs in this launcher's care, until they end: in the slots of this machine, or in this very process."""

import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.design.config import RunConfig
from experiments.launching import jobs, local, states
from experiments.launching.branches import ready
from experiments.launching.locks import signals_deferred, store_lock, termination_as_interrupt
from experiments.launching.profile import Profile
from experiments.launching.progress import Progress
from experiments.training.job import other_job, this_place
from experiments.training.run import SHARING_VARIABLE, Run, RunFailed

if TYPE_CHECKING:
    import submitit

POLL_SECONDS = 0.5
STOP_SECONDS = 60.0  # what runs get to save their state after Ctrl-C


def run_in_slots(runs: Sequence[RunConfig], profile: Profile, store: Path, code: Path) -> None:
    """Start the runs in this machine's slots as these become free, until all have ended.

    Ctrl-C lets the running ones save their state, then stops them.
    """
    folder = jobs.new_folder(store, "local")
    slots = local.Slots(profile, [profile.job(run.size) for run in runs])
    waiting, running = deque(in_order(runs)), dict[int, "submitit.Job[None]"]()
    with ExitStack() as stack:
        stack.enter_context(termination_as_interrupt())
        with signals_deferred():  # ignored by the server, too, and so by the runs: only the launcher heeds Ctrl-C
            stack.enter_context(slots.shared_gpus())
            server = stack.enter_context(slots.server(code))
        server.wait_until_ready()
        progress = stack.enter_context(Progress(store, runs))
        try:
            while waiting or running:
                for slot in [slot for slot, job in running.items() if job.done()]:
                    del running[slot]
                    slots.free.append(slot)
                if not running:
                    # Only a trunk that waits itself can still be trained here. Drop the branches of any other, which
                    # would wait for ever.
                    here = {run.run_id for run in waiting}
                    waiting = deque(run for run in waiting if ready(run, store) or run.trunk in here)
                while slots.free and (run := _next(waiting, store)):
                    run_dir = store / run.run_id
                    with store_lock(store):  # another `submit` or a `cancel` may have been here first
                        if states.read(store, [run.run_id])[0].state in states.SUBMITTABLE:
                            slot = slots.free.pop(0)
                            with signals_deferred():
                                running[slot] = slots.start(slot, run_dir, profile.job(run.size), folder, server)
                                jobs.write_job(run_dir, "local", running[slot].job_id, running[slot].paths.stdout, code)
                progress.update()
                time.sleep(POLL_SECONDS)
        except BaseException:  # whatever ends the launcher, Ctrl-C or a full disk: no run may outlive it
            _stop([job for job in running.values() if not job.done()])
            raise


def in_order(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """The order in which runs are started here.

    The first seeds come first, since those after them find their program compiled. Of a seed the longest come first:
    then no slot is left with a long run at the end, and the first speeds that are seen are those of most of the work.
    """
    return sorted(runs, key=lambda run: (run.seed, -run.own_flops))


def _next(waiting: deque[RunConfig], store: Path) -> RunConfig | None:
    """Take the first run whose trunk, if it has one, is complete; None where all that wait do so for their trunks."""
    chosen = next((run for run in waiting if ready(run, store)), None)
    if chosen is not None:
        waiting.remove(chosen)
    return chosen


def _stop(running: Sequence["submitit.Job[None]"]) -> None:
    """Tell the runs to save their state and stop, and wait STOP_SECONDS at most until they have."""
    print(f"\nstopping {len(running)} runs; their state is being saved", file=sys.stderr)
    end = time.monotonic() + STOP_SECONDS
    while (living := [job for job in running if not job.done()]) and time.monotonic() < end:
        for job in living:  # repeatedly: submitit's controller, just after its start, has no process to pass it on to
            local.stop(job.job_id)
        time.sleep(POLL_SECONDS)


def run_in_this_process(runs: Sequence[RunConfig], _profile: Profile, store: Path, code: Path) -> None:
    """Run one after the other, trunks first. A failed run shows its traceback, and the next one starts all the same."""
    for run in runs:
        if not ready(run, store):
            continue
        with store_lock(store):  # another `submit` or a `cancel` may have been here first
            if states.read(store, [run.run_id])[0].state not in states.SUBMITTABLE:
                continue
            jobs.write_job(store / run.run_id, "debug", str(os.getpid()), None, code)
        try:
            with local.environment({SHARING_VARIABLE: "1"}):
                Run(store / run.run_id)()
        except RunFailed:
            traceback.print_exc()
        finally:
            if other_job(store / run.run_id, this_place()) is None:
                (store / run.run_id / "job.json").unlink(missing_ok=True)  # The folder may have been removed.
