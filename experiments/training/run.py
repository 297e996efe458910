"""Execute one run from its directory: train, log and checkpoint it, resume it, and stop when the scheduler asks.

The scheduler pickles `Run(run_dir)`, which holds no state. A job that is requeued, after a preemption or the failure of
a node, finds the newest complete checkpoint in the directory; if the run is complete, it returns at once.
"""

import contextlib
import importlib.metadata
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from submitit.helpers import DelayedSubmission

from analysis.logs.files import read_json, write_atomically
from analysis.logs.ownership import FolderHeld, Hold, held
from analysis.logs.reader import progress
from analysis.logs.writer import RunLog, next_attempt, record_failure
from experiments.design.config import RunConfig
from experiments.training.job import joined, other_job, this_place
from experiments.training.record import data_sha256, read_record

if TYPE_CHECKING:  # torch takes seconds to import, and the launcher needs this module without it
    from experiments.training.parallel import World
    from experiments.training.trainer import Trainer


SHOWN = ("loss", "accuracy")  # the metrics that an evaluation prints; the log has all
# How long a job waits for another that still has the run's directory: that one stops when it sees that job.json no
# longer names it, at its next step or, if it evaluates, at the next batch.
PATIENCE_SECONDS = 300.0
CHECK_SECONDS = 1.0  # between two looks at whether the directory is still this job's
SHARING_VARIABLE = "DYNCONV_SHARING"  # The launcher sets it to the number of runs on this device; empty: unknown.


class RunFailed(RuntimeError):
    """The run failed; failure.json in its directory says at which step and why."""


class FolderTaken(RuntimeError):
    """The run's directory was removed, or given to another job: nothing more is written there."""


class Run:
    """A callable that starts or resumes the run in `run_dir` and returns when the run has ended or must stop."""

    def __init__(self, run_dir: Path | str) -> None:
        self.run_dir = Path(run_dir)

    def __call__(self) -> None:
        """Raises RunFailed if the run fails; the cause is also in failure.json."""
        called_at = time.time()
        if (self.run_dir / "run.json").exists() or (self.run_dir / "cancelled").exists():
            return
        attempt = _Attempt(self.run_dir, called_at)
        with attempt.own():
            try:
                finished = attempt.execute()
            except FolderTaken:
                raise
            except Exception as error:  # Any error ends the run: it is only tried again when a person says so.
                raise RunFailed(f"{self.run_dir.name}: {attempt.fail(error)}") from error
        if not finished:
            attempt.stop.act()

    def checkpoint(self) -> DelayedSubmission | None:
        """Called by submitit after the state was saved: what to submit again, or None if the run was cancelled."""
        return None if (self.run_dir / "cancelled").exists() else DelayedSubmission(Run(self.run_dir))


class StopSignal:
    """Records that the scheduler sent its signal, so that the training loop can stop between two steps.

    submitit's own handler would requeue the job at once, in the middle of a step. It is replaced here, and called by
    `act` after the state was saved.
    """

    def __init__(self) -> None:
        self.raised = False
        self._signal = signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]
        handler = signal.getsignal(self._signal)
        self._handler = handler if callable(handler) else None
        if self._handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(self._signal, self._note)

    def _note(self, _signum: int, _frame: FrameType | None) -> None:
        self.raised = True

    def act(self) -> None:
        """Call submitit's handler, which requeues the job and ends the process of rank 0."""
        assert self._handler is not None, "act is only called after the signal was received"
        self._handler(self._signal, None)


class _Attempt:
    """One process in one attempt at a run. Only rank 0 writes the log; all processes write the checkpoints."""

    def __init__(self, run_dir: Path, called_at: float) -> None:
        self._run_dir, self._called_at = run_dir, called_at
        self.stop = StopSignal()
        self._place = this_place()
        self._number = next_attempt(run_dir)
        self._log: RunLog | None = None
        self._step = self._micro_batch = 0
        self._saved_at = time.monotonic()
        self._hold: Hold | None = None
        self._checked_at = 0.0

    @contextmanager
    def own(self) -> Iterator[None]:
        """Own the run's directory: the logs of two jobs that train the same run would be interleaved.

        Raises RunFailed, and leaves the directory alone, if another process has it, or if job.json names another job.
        """
        try:
            self._require_owner()
            with contextlib.ExitStack() as stack:
                if self._place.rank == 0:
                    noted = (self._run_dir / "job.json").exists()  # then the other job knows that it has to stop
                    self._hold = stack.enter_context(
                        held(self._run_dir, patience=PATIENCE_SECONDS if noted else 0.0, waiting=self._tell)
                    )
                    self._require_owner()  # it may have taken long
                    self._number = next_attempt(self._run_dir)
                yield
        except FolderHeld:
            raise RunFailed(f"{self._run_dir.name}: another process has this run; wait for it to end") from None
        except FolderTaken as error:
            raise RunFailed(str(error)) from None

    def _tell(self) -> None:
        print(f"{self._run_dir.name}: waiting for another job, which still has it", file=sys.stderr, flush=True)

    def _require_owner(self) -> None:
        """Raises FolderTaken if the directory is no longer this job's."""
        if self._hold is not None and self._hold.lost():
            raise FolderTaken(
                f"{self._run_dir} was removed while this run trained, and another job may have it now; this one stops "
                "and leaves it alone"
            )
        if (other := other_job(self._run_dir, self._place)) is not None:
            raise FolderTaken(f"{self._run_dir} was given to job {other}; this one stops and leaves it to that")

    def _require_owner_by_all(self, world: "World") -> None:
        """As `_require_owner`, in all processes: one that went on would fail for want of the others."""
        taken: FolderTaken | None = None
        if world.rank == 0:
            self._checked_at = time.monotonic()
            try:
                self._require_owner()
            except FolderTaken as error:
                taken = error
        if world.any(taken is not None):
            raise taken or FolderTaken(f"{self._run_dir} was removed while this run trained, or given to another job")

    def _may_be_taken(self) -> bool:
        """Whether it is time to look again, and the directory is not this job's any more."""
        if self._place.rank > 0 or time.monotonic() - self._checked_at < CHECK_SECONDS:
            return False
        self._checked_at = time.monotonic()
        with contextlib.suppress(FolderTaken):
            self._require_owner()
            return False
        return True

    def execute(self) -> bool:
        """Train to the end. False if the scheduler asked to stop before; the state is saved then."""
        import torch

        if self._place.size == 1:
            self._remove_failure()
        config, run, self._execution = read_record(self._run_dir)
        with joined(self._run_dir, self._execution, self._place) as world:
            self._number = world.gather(self._number)[0]
            if world.any((self._run_dir / "run.json").exists()):  # by a job that was waited for
                return True
            if self._number > self._execution.max_attempts:
                raise RuntimeError(
                    f"started {self._number - 1} times already; max_attempts = {self._execution.max_attempts} is "
                    "allowed; raise it in the profile, then retry"
                )
            if world.rank == 0 and world.size > 1:
                self._remove_failure()
            world.wait_for_all()  # A process that fails from here on writes failure.json, which must not be deleted.
            with contextlib.suppress(torch.OutOfMemoryError):
                return self._work(config, run, world)
            # Here the trainer, which the error's traceback held, is gone, and its memory is free for a smaller one.
            raise self._does_not_fit(config, run, world)

    def _work(self, config: dict[str, Any], run: RunConfig, world: "World") -> bool:
        """`execute`, once the processes have joined. The trainer is dropped before they part."""
        trainer = self._prepare(config, run, world)
        finished = self._train(trainer, world)
        if finished:
            self._finish(trainer)
        return finished

    def _does_not_fit(self, config: dict[str, Any], run: RunConfig, world: "World") -> ValueError:
        """The error of a batch that does not fit into the GPU's memory."""
        import torch

        from experiments.data.dataset import Dataset
        from experiments.training.assembly import assemble
        from experiments.training.memory import micro_batch_that_fits
        from experiments.training.parallel import World

        def make(micro_batch: int) -> "Trainer":
            execution = replace(self._execution, micro_batch=micro_batch)
            dataset = None if run.data is None else Dataset.open(config["data_dir"])
            return assemble(run, dataset, execution, World(0, 1, world.device))

        tried = self._micro_batch
        gigabytes = f"{torch.cuda.get_device_properties(world.device).total_memory / 2**30:.0f} GiB"
        if tried == 0:
            return ValueError(f"the model does not fit into the GPU's {gigabytes}; set parallel = 'fsdp' on more GPUs")
        if world.sharded:  # One process alone cannot try, and the others may be waiting for it already.
            advice = f"try micro_batch = {max(1, tried // 2)} in the profile, or more GPUs"
        else:
            fits = micro_batch_that_fits(make, tried, run.model.sequence_group)
            advice = f"{fits} do: set micro_batch = {fits} in the profile"
            if fits is None:
                advice = "nor do fewer: set parallel = 'fsdp' in the profile, on more GPUs"
        return ValueError(
            f"micro_batch = {tried} sequences of {run.train.sequence_length} tokens do not fit into the GPU's "
            f"{gigabytes}; {advice}"
        )

    def _remove_failure(self) -> None:
        """Delete the failure.json of an earlier attempt.

        If there are several processes, rank 0 calls this after all have joined: none of them can have failed in this
        attempt then.
        """
        (self._run_dir / "failure.json").unlink(missing_ok=True)

    def fail(self, error: Exception) -> str:
        """Record the cause and return it. If it cannot be written, as on a full disk, it is still returned."""
        cause = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
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
            about = _provenance(world, self._place.job, config["code_commit"])
            about["damaged_checkpoints"] = skipped or []
            self._log = RunLog(
                self._run_dir,
                attempt=self._number,
                first_step=self._step,
                about=about,
                require_owner=self._require_owner,
            )
            self._log.add_seconds("queue", max(0.0, self._called_at - waiting_since))
            self._log.add_seconds("startup", time.time() - self._called_at)
        if world.device.type == "cuda":
            start = time.monotonic()
            trainer.warm_up()
            self._add_seconds("compile", start)
        self._saved_at = time.monotonic()
        return trainer

    def _train(self, trainer: "Trainer", world: "World") -> bool:
        """Train and evaluate until the end. False if the scheduler asked to stop; the state is saved then."""
        from experiments.training import checkpoints

        def stopping() -> bool:
            return world.any(self.stop.raised or self._may_be_taken())

        while trainer.evaluation_due or not trainer.finished:
            if stopping():
                self._save(trainer)
                if world.any(self.stop.raised):
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
        """Write a checkpoint. The log is flushed first, so that it never ends before the step of a checkpoint."""
        from experiments.training import checkpoints

        self._require_owner_by_all(trainer.world)
        start = time.monotonic()
        if self._log is not None:
            self._log.flush()
        checkpoints.save(self._run_dir, trainer.state(), trainer.world)
        if self._log is not None:
            self._add_seconds("checkpoint", start)
            self._log.flush()
        self._saved_at = time.monotonic()

    def _finish(self, trainer: "Trainer") -> None:
        """Write the weights, merge the log and write run.json; only then are the checkpoints no longer needed."""
        import torch

        from experiments.training import checkpoints

        self._require_owner_by_all(trainer.world)
        weights = trainer.weights()
        if self._log is not None:
            write_atomically(self._run_dir / "model.pt", lambda temporary: torch.save(weights, temporary))
            self._log.finish({})
            checkpoints.remove(self._run_dir)

    def _add_seconds(self, clock: str, since: float) -> None:
        if self._log is not None:
            self._log.add_seconds(clock, time.monotonic() - since)


def _provenance(world: "World", job_id: str, code_commit: str | None) -> dict[str, Any]:
    """The provenance of this attempt, for its log."""
    import torch

    cuda = world.device.type == "cuda"
    sharing = os.environ.get(SHARING_VARIABLE, "")
    return {
        "device": torch.cuda.get_device_name(world.device) if cuda else "cpu",
        "gpus": world.size,
        "parallel": world.parallel if world.size > 1 else None,
        "dtype": "bfloat16" if cuda else "float32",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "job_id": job_id or None,
        "code_commit": code_commit,
        "sharing": int(sharing) if sharing.isdigit() else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _waiting_since(run_dir: Path, config: dict[str, Any]) -> float:
    """Unix seconds since when the run waits for its job: its last submission, or the end of its last attempt."""
    job = run_dir / "job.json"
    resubmitted = read_json(job)["submitted_at"] if job.exists() else 0.0
    last = progress(run_dir)
    return max(config["submitted_at"], resubmitted, last.updated_at if last else 0.0)
