"""Execute one run from its directory: train, log and checkpoint it, resume it, and stop when the scheduler asks.

The scheduler pickles `Run(run_dir)`, which holds no state. A job that is requeued, after a preemption or the failure of
a node, finds the newest complete checkpoint in the directory; if the run is complete, it returns at once.
"""

import contextlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submitit.helpers import DelayedSubmission

from analysis.errors import first_line
from analysis.logs.files import file_sha256, read_json, write_atomically
from analysis.logs.provenance import count_attempts, last_interruption
from analysis.logs.reader import progress, read_attempts
from analysis.logs.writer import RunLog, next_attempt, record_failure
from experiments.design.config import RunConfig
from experiments.training.folder import FolderTaken, RunFolder
from experiments.training.job import joined, this_place
from experiments.training.provenance import provenance, runs_on_device
from experiments.training.record import data_sha256, read_record
from experiments.training.stopping import PREEMPTED, STOPPED, Preempted, StopSignal

if TYPE_CHECKING:  # torch takes seconds to import, and the launcher needs this module without it
    from experiments.training.parallel import World
    from experiments.training.trainer import Trainer


SHOWN = ("loss", "accuracy")  # the metrics that an evaluation prints; the log has all
CAUSE_SECONDS = 5.0  # how long to wait for another process of the job to record why it failed
LEAVE_SECONDS = 20.0  # how long other ranks stay so that rank 0 can have the job requeued before their exit ends it


class RunFailed(RuntimeError):
    """The run failed; failure.json in its directory says at which step and why."""


class AttemptsSpent(RuntimeError):
    """The run has used up its `max_attempts` and is not finished."""


class Run:
    """A callable that starts or resumes the run in `run_dir` and returns when the run has ended or must stop."""

    why_stopped = STOPPED

    def __init__(self, run_dir: Path | str) -> None:
        self.run_dir = Path(run_dir)

    def __call__(self) -> None:
        """Raises RunFailed if the run fails; the cause is also in failure.json."""
        called_at = time.time()
        if (self.run_dir / "run.json").exists() or (self.run_dir / "cancelled").exists():
            return
        stop = StopSignal()
        try:
            stop.starting()
            attempt = _Attempt(self.run_dir, called_at, stop)
            finished = attempt.run()
            self.why_stopped = attempt.left or self.why_stopped
        except Preempted:
            finished = False
        if not finished:
            stop.act()

    def checkpoint(self) -> DelayedSubmission | None:
        """Called by submitit after the state was saved. Returns the job to submit, or None if the run was cancelled."""
        return None if (self.run_dir / "cancelled").exists() else DelayedSubmission(Run(self.run_dir))


class _Attempt:
    """One process in one attempt at a run. Only rank 0 writes the log; all processes write the checkpoints."""

    def __init__(self, run_dir: Path, called_at: float, stop: StopSignal) -> None:
        self._run_dir, self._called_at, self._stop = run_dir, called_at, stop
        self._place = this_place()
        self._number = next_attempt(run_dir)
        self._log: RunLog | None = None
        self._step = self._micro_batch = 0
        self._saved_at = time.monotonic()
        self._folder = RunFolder(run_dir, self._place)
        self.left: str | None = None  # why this process left the job before the run was finished

    def run(self) -> bool:
        """Train to the end. Returns False if the job has to be started again. Raises RunFailed."""
        try:
            with self._folder.owned():
                self._number = next_attempt(self._run_dir)  # again: another job may have made attempts until now
                try:
                    return self._execute_or_fail()
                except Preempted:
                    self._interrupted(PREEMPTED, preempted=True)
                    raise
        except FolderTaken as error:
            raise RunFailed(str(error)) from None

    def _execute_or_fail(self) -> bool:
        """`_execute`, with errors recorded and raised as RunFailed."""
        try:
            return self._execute()
        except FolderTaken:
            raise
        except Exception as error:  # Any error ends the run, until a person retries it.
            if self._place.size > 1 and _lost_peer(error):
                return self._leave(error)
            raise RunFailed(f"{self._run_dir.name}: {self._fail(error)}") from error

    def _require_folder(self, world: "World") -> None:
        """Raises FolderTaken in all processes if the directory is no longer this job's.

        A process that went on without the others would fail, and write failure.json into another job's directory.
        """
        taken: FolderTaken | None = None
        if world.rank == 0:
            try:
                self._folder.require()
            except FolderTaken as error:
                taken = error
        if world.any(taken is not None):
            raise taken or FolderTaken(f"{self._run_dir} was removed while this run trained, or given to another job")

    def _folder_taken(self) -> bool:
        """Whether the directory is no longer this job's, checked by rank 0 every CHECK_SECONDS, else False.

        Each check also counts the runs on the device.
        """
        if not self._folder.check_due():
            return False
        self._count_runs()
        return self._folder.taken()

    def _count_runs(self) -> None:
        """Record in the log how many runs share the device now."""
        if self._log is not None:
            self._log.sharing(runs_on_device(self._place))

    def _execute(self) -> bool:
        """Train to the end. Returns False, with the state saved, if the scheduler asked to stop before."""
        from experiments.training.memory import out_of_memory_suppressed

        if self._place.size == 1:
            self._remove_failure()
        config, run, self._execution = read_record(self._run_dir)
        with joined(self._run_dir, self._execution, self._place) as world, self._failures_recorded():
            self._number = world.gather(self._number)[0]
            if world.any((self._run_dir / "run.json").exists()):  # by the job that `owned` waited for
                return True
            if world.rank == 0 and world.size > 1:
                self._remove_failure()
            # This also waits for all processes: a failure.json that one of them writes later must not be deleted.
            self._require_attempts_left(world)
            with out_of_memory_suppressed():
                return self._work(config, run, world)
            # The error's traceback, which held the trainer, is gone here, so its memory is free for smaller trainers.
            raise self._does_not_fit(config, run, world)

    @contextmanager
    def _failures_recorded(self) -> Iterator[None]:
        """Record the cause of a failure before this process leaves, since its peers will fail without it."""
        try:
            yield
        except Exception as error:
            if not isinstance(error, FolderTaken) and not (self._place.size > 1 and _lost_peer(error)):
                self._fail(error)
            raise

    def _require_attempts_left(self, world: "World") -> None:
        """Raises AttemptsSpent, in all processes, if the run was started too often."""
        attempts, _ = read_attempts(self._run_dir)
        counted, last = world.gather((count_attempts(attempts.values()), last_interruption(attempts)))[0]
        if counted >= self._execution.max_attempts:
            raise AttemptsSpent(
                f"started {counted} times already{f' (the last time {last})' if last else ''}; max_attempts = "
                f"{self._execution.max_attempts} is allowed; raise it in the profile, then retry"
            )

    def _leave(self, error: Exception) -> bool:
        """Leave a job that has lost another process.

        On rank 0 under a scheduler, returns False, so that the job is requeued: losing a process is no failure of the
        run. Without a scheduler rank 0 raises RunFailed, and other ranks do so once rank 0 has had LEAVE_SECONDS to
        requeue the job. All ranks raise RunFailed at once if the lost process recorded why it failed.
        """
        end = time.monotonic() + CAUSE_SECONDS
        while time.monotonic() < end:
            # List the directory: NFS clients may answer `exists` from their cache.
            if any(path.name == "failure.json" for path in self._run_dir.iterdir()):
                failure = read_json(self._run_dir / "failure.json")
                if failure["attempt"] >= self._number:
                    raise RunFailed(f"{self._run_dir.name}: another process of the job failed: {failure['cause']}")
            time.sleep(0.1)
        self.left = f"another process of the job is gone ({first_line(error).partition('. ')[0]})"
        print(f"{self._run_dir.name}: {self.left}", file=sys.stderr, flush=True)
        self._interrupted(self.left, preempted=False)
        if self._place.rank == 0 and self._stop.has_scheduler:
            return False
        end = time.monotonic() + LEAVE_SECONDS
        while self._place.rank > 0 and time.monotonic() < end and not self._stop.received:
            time.sleep(0.1)
        raise RunFailed(f"{self._run_dir.name}: {self.left}")

    def _interrupted(self, cause: str, *, preempted: bool) -> None:
        """Record in the log why this attempt ends before the run does."""
        if self._log is not None:
            with contextlib.suppress(OSError, FolderTaken):
                self._log.interrupt(cause, preempted=preempted)

    def _work(self, config: dict[str, Any], run: RunConfig, world: "World") -> bool:
        """Train, once the processes have joined. Returning frees the trainer before the process group is destroyed."""
        trainer = self._prepare(config, run, world)
        finished = self._train(trainer, world)
        if finished:
            self._finish(trainer)
        return finished

    def _does_not_fit(self, config: dict[str, Any], run: RunConfig, world: "World") -> ValueError:
        """The error that tells which micro-batch would fit into the GPU's memory."""
        from experiments.data.dataset import Dataset
        from experiments.training.assembly import assemble
        from experiments.training.memory import does_not_fit
        from experiments.training.parallel import World

        def make(micro_batch: int) -> "Trainer":
            execution = replace(self._execution, micro_batch=micro_batch)
            dataset = None if run.data is None else Dataset.open(config["data_dir"])
            return assemble(run, dataset, execution, World(0, 1, world.device))

        return ValueError(does_not_fit(make, self._micro_batch, run, world))

    def _remove_failure(self) -> None:
        """Delete the failure.json of an earlier attempt.

        If there are several processes, rank 0 calls this after all have joined: none has failed in this attempt yet.
        """
        (self._run_dir / "failure.json").unlink(missing_ok=True)

    def _fail(self, error: Exception) -> str:
        """Write the cause to failure.json and return it, even if it cannot be written, as on a full disk.

        Raises FolderTaken, and records nothing, if the directory belongs to another job.
        """
        self._folder.require()
        cause = f"{type(error).__name__}: {first_line(error)}"
        with contextlib.suppress(OSError):
            if self._log is not None:
                self._log.fail(self._step, cause)
            else:
                record_failure(self._run_dir, attempt=self._number, step=self._step, cause=cause, time=time.time())
        return f"step {self._step}: {cause}"

    def _prepare(self, config: dict[str, Any], run: RunConfig, world: "World") -> "Trainer":
        """Make the trainer, resumed from the newest checkpoint or the trunk's state, and open the attempt's log."""
        from experiments.data.dataset import Dataset
        from experiments.training import checkpoints
        from experiments.training.assembly import assemble

        waiting_since = _waiting_since(self._run_dir, config)
        dataset = None if run.data is None else Dataset.open(config["data_dir"])
        found = data_sha256(run, dataset)
        if found != config["data_sha256"]:
            raise ValueError(
                f"{config['data_dir'] or f'the task {run.task_name}'} holds data {found[:12]}; the run was submitted "
                f"with {config['data_sha256'][:12]}; restore it or submit the sweep again"
            )
        if dataset is not None:
            dataset.spot_check(run.run_id)
        trainer = assemble(run, dataset, self._execution, world)
        skipped = checkpoints.load_newest(self._run_dir, run.run_id, trainer, world)
        if skipped is None and run.trunk is not None:
            checkpoints.load_branch_point(self._run_dir.parent / run.trunk, run.branch_step, trainer, world)
        self._step, self._micro_batch = trainer.steps_done + 1, trainer.micro_batch
        if world.rank == 0:
            execution = replace(self._execution, compile=trainer.compiled)
            about = provenance(world, self._place, execution, config["code_commit"])
            about["fused"] = "; ".join(trainer.fused) or "nothing"
            about["damaged_checkpoints"] = skipped or []
            self._log = RunLog(
                self._run_dir,
                attempt=self._number,
                first_step=self._step,
                about=about,
                require_owner=self._folder.require,
            )
            print(f"attempt {self._number}, from step {self._step}", flush=True)
            self._log.add_seconds("queue", max(0.0, self._called_at - waiting_since))
            self._log.add_seconds("startup", time.time() - self._called_at)
        if world.device.type == "cuda":
            start = time.monotonic()
            trainer.warm_up()
            trainer.check_captured()
            self._add_seconds("compile", start)
        self._saved_at = time.monotonic()
        return trainer

    def _train(self, trainer: "Trainer", world: "World") -> bool:
        """Train and evaluate until the end. Returns False, with the state saved, if the scheduler asked to stop."""
        from experiments.training import checkpoints

        def stopping() -> bool:
            return world.any(self._stop.received or self._folder_taken())

        self._stop.started()
        while trainer.evaluation_due or not trainer.finished:
            if stopping():
                self._save(trainer)
                if world.any(self._stop.received):
                    self._interrupted(PREEMPTED, preempted=True)
                    return False
            if trainer.evaluation_due:
                evaluation = trainer.evaluate(stopping)
                if evaluation is not None and self._log is not None:
                    self._log.evaluation(**asdict(evaluation))
                    done = f"{evaluation.step}/{trainer.config.steps}"
                    found = [f"{name} {evaluation.metrics[name]:.4f}" for name in SHOWN if name in evaluation.metrics]
                    print(f"step {done}  held-out {'  '.join(found)}", flush=True)
            else:
                steps = trainer.advance()
                self._step = trainer.steps_done + 1
                if trainer.steps_done in trainer.config.branch_steps:
                    checkpoints.keep_branch_point(self._run_dir, trainer.state(), world)
                for step in steps:
                    if self._log is not None:
                        self._log.step(**asdict(step))
            if world.any(time.monotonic() - self._saved_at > 60 * self._execution.checkpoint_minutes):
                self._save(trainer)
        return True

    def _save(self, trainer: "Trainer") -> None:
        """Write a checkpoint. The log is flushed first, so that it covers every step before the checkpoint."""
        from experiments.training import checkpoints

        self._require_folder(trainer.world)
        start = time.monotonic()
        if self._log is not None:
            self._log.flush()
        checkpoints.save(self._run_dir, trainer.state(), trainer.world)
        if self._log is not None:
            self._add_seconds("checkpoint", start)
            self._log.flush()
        self._saved_at = time.monotonic()

    def _finish(self, trainer: "Trainer") -> None:
        """Write the weights, merge the log's parts, write run.json, and only then delete the checkpoints."""
        import torch

        from experiments.training import checkpoints

        self._require_folder(trainer.world)
        weights = trainer.weights()
        self._count_runs()
        if self._log is not None:
            path = self._run_dir / "model.pt"
            write_atomically(path, lambda temporary: torch.save(weights, temporary))
            self._log.finish({"weights_sha256": file_sha256(path)})
            checkpoints.remove(self._run_dir)

    def _add_seconds(self, clock: str, since: float) -> None:
        if self._log is not None:
            self._log.add_seconds(clock, time.monotonic() - since)


def _lost_peer(error: Exception) -> bool:
    from experiments.training.parallel import lost_peer

    return lost_peer(error)


def _waiting_since(run_dir: Path, config: dict[str, Any]) -> float:
    """When the run began to wait for its job, in Unix seconds: at its last submission or its last attempt's end."""
    job = run_dir / "job.json"
    resubmitted = read_json(job)["submitted_at"] if job.exists() else 0.0
    last = progress(run_dir)
    return max(config["submitted_at"], resubmitted, last.updated_at if last else 0.0)
