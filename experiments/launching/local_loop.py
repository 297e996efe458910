"""Runs the sweep on this machine until all runs have ended: in slots, or one by one in this process."""

import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.design.config import RunConfig
from experiments.launching import jobs, local, states
from experiments.launching.branches import ready
from experiments.launching.fork_server import ForkServer
from experiments.launching.locks import signals_deferred, store_lock, termination_as_interrupt
from experiments.launching.profile import Profile
from experiments.launching.progress import Progress
from experiments.training.folder import other_job
from experiments.training.job import this_place
from experiments.training.presence import Present, add, remove, starting
from experiments.training.run import Run, RunFailed

if TYPE_CHECKING:
    import submitit

POLL_SECONDS = 0.5
STOP_SECONDS = 60.0  # how long runs may take to save their state after Ctrl-C


def run_in_slots(runs: Sequence[RunConfig], profile: Profile, store: Path, code: Path) -> None:
    """Start the runs in this machine's slots as they become free, and return when all have ended.

    Ctrl-C lets the running ones save their state, then stops them. Runs of this sweep that another launcher of this
    machine starts meanwhile are waited for. All runs of other launchers count towards `max_parallel`.
    """
    folder = jobs.new_folder(store, "local")
    slots = local.Slots(profile, [profile.job(run.size) for run in runs])
    with ExitStack() as stack:
        stack.enter_context(termination_as_interrupt())
        with signals_deferred():  # The server and its runs inherit the blocked signals: only the launcher gets Ctrl-C.
            stack.enter_context(slots.shared_gpus())
            server = stack.enter_context(slots.server(code))
        server.wait_until_ready()
        progress = stack.enter_context(Progress(store, runs))
        loop = _Loop(runs, profile, store, code, slots, server, folder)
        try:
            while loop.turn({state.run_id for state in progress.update() if state.state == "running"}):
                time.sleep(POLL_SECONDS)
        except BaseException:  # No run may outlive the launcher, whether Ctrl-C or a full disk ends it.
            _stop([job for job in loop.running.values() if not job.done()])
            raise
    if loop.taken:
        count = f"{len(loop.taken)} of {len(runs)} runs"
        print(f"{store}: {count} were not started by this submit: another one, or a cancel, was first", file=sys.stderr)


def in_order(runs: Sequence[RunConfig]) -> list[RunConfig]:
    """The runs in the order in which they are started here.

    First seeds come first, so that later seeds find their program compiled. Within a seed the longest run comes first:
    then no slot is left with a long run at the end, and the first measured speeds are those of most of the work.
    """
    return sorted(runs, key=lambda run: (run.seed, -run.own_flops))


@dataclass
class _Loop:
    """The runs that are waiting for a slot, and those that have one."""

    runs: Sequence[RunConfig]
    profile: Profile
    store: Path
    code: Path
    slots: local.Slots
    server: ForkServer
    folder: Path

    def __post_init__(self) -> None:
        self.waiting = deque(in_order(self.runs))
        self.running = dict[int, "submitit.Job[None]"]()  # by slot
        self.taken = list[str]()  # ids of runs that another `submit` or a `cancel` took before their turn
        self._told = False  # whether the user was told that runs of other launchers leave no slot

    def turn(self, trained: set[str]) -> bool:
        """Free the slots of jobs that have ended, and start runs in them. Returns False when all runs have ended.

        `trained` has the ids of the runs that are being trained, here or by another launcher.
        """
        for slot in [slot for slot, job in self.running.items() if job.done()]:
            del self.running[slot]
            self.slots.free.append(slot)
        if not self.running:
            # A trunk can only become complete if it is waiting itself, or if another launcher runs it. Drop branches of
            # all other trunks, which would wait forever.
            trunks = states.read(self.store, {run.trunk for run in self.waiting if run.trunk is not None})
            hoped = {run.run_id for run in self.waiting} | {s.run_id for s in trunks if s.state in states.ACTIVE}
            self.waiting = deque(run for run in self.waiting if ready(run, self.store) or run.trunk in hoped)
        while self.slots.room(self._beside()) and (run := _next(self.waiting, self.store)):
            with store_lock(self.store):  # Another `submit` or a `cancel` may have changed the run's state.
                if states.read(self.store, [run.run_id])[0].state not in states.SUBMITTABLE:
                    self.taken.append(run.run_id)
                elif not self._start(run):
                    self.waiting.appendleft(run)
                    break
        return bool(self.waiting or self.running or trained)

    def _start(self, run: RunConfig) -> bool:
        """Start and register a run. Returns False if another launcher has taken the last free slot meanwhile."""
        with starting():
            beside = self._beside()
            if not self.slots.room(beside):
                return False
            job, slot = self.profile.job(run.size), self.slots.take(beside)
            run_dir = self.store / run.run_id
            with signals_deferred():
                begun = self.running[slot] = self.slots.start(slot, run_dir, job, self.folder, self.server)
                # Register before job.json: the run looks itself up when it starts, and the store's disk may be slow.
                add(int(begun.job_id), str(run_dir), self.slots.share(slot, job))
                jobs.write_job(run_dir, "local", begun.job_id, begun.paths.stdout, self.code)
        return True

    def _beside(self) -> list[Present]:
        """The runs of other launchers on this one's GPUs or cores. Tells the user once if they leave no slot."""
        beside = self.slots.beside({int(job.job_id) for job in self.running.values()})
        if beside and self.waiting and not self._told and self.slots.free and not self.slots.room(beside):
            self._told = True
            count = f"{len(beside)} runs of other submits, as {Path(beside[0].run).name} (process {beside[0].pid}),"
            print(f"\n{count} train on this machine: waiting until max_parallel allows more", file=sys.stderr)
        return beside


def _next(waiting: deque[RunConfig], store: Path) -> RunConfig | None:
    """Take the first run that need not wait for its trunk. Returns None if there is none."""
    chosen = next((run for run in waiting if ready(run, store)), None)
    if chosen is not None:
        waiting.remove(chosen)
    return chosen


def _stop(running: Sequence["submitit.Job[None]"]) -> None:
    """Tell the runs to save their state and stop, and wait for that at most STOP_SECONDS."""
    print(f"\nstopping {len(running)} runs; their state is being saved", file=sys.stderr)
    end = time.monotonic() + STOP_SECONDS
    while (living := [job for job in running if not job.done()]) and time.monotonic() < end:
        for job in living:  # Repeat: a controller that has just started has no process yet to forward the signal to.
            local.stop(job.job_id)
        time.sleep(POLL_SECONDS)


def run_in_this_process(runs: Sequence[RunConfig], profile: Profile, store: Path, code: Path) -> None:
    """Run one after the other in the given order, which has trunks first. After a failure, print the traceback and
    continue with the next run."""
    for run in runs:
        if not ready(run, store):
            continue
        with store_lock(store):  # Another `submit` or a `cancel` may have changed the run's state.
            if states.read(store, [run.run_id])[0].state not in states.SUBMITTABLE:
                continue
            jobs.write_job(store / run.run_id, "debug", str(os.getpid()), None, code)
        job = replace(profile.job(run.size), gpus=1)
        with starting():
            add(os.getpid(), str(store / run.run_id), local.Slots(profile, [job]).share(0, job))
        try:
            Run(store / run.run_id)()
        except RunFailed:
            traceback.print_exc()
        finally:
            remove(os.getpid())
            if other_job(store / run.run_id, this_place()) is None:
                (store / run.run_id / "job.json").unlink(missing_ok=True)  # The folder may have been removed.
