"""The signal by which a scheduler tells a job to stop: before a preemption, and before its time limit."""

import os
import signal
import threading
from types import FrameType

STOPPED = "stopped with its state saved"  # the last line of output of a run that was told to stop; `status` reads it
PREEMPTED = "it was told to stop"


class Preempted(BaseException):
    """The signal arrived while the run started, when there is no state to save yet.

    It derives from BaseException so that no library's `except Exception` swallows it.
    """


class StopSignal:
    """Replaces submitit's signal handler, which would requeue the job in the middle of a step.

    While a run starts, the signal raises Preempted, since compiling alone may take longer than the time that is left.
    Later it is only recorded, so that the training loop can stop between two steps. `act` then calls the replaced
    handler.
    """

    def __init__(self) -> None:
        self.received = False
        self._starting = False
        self._signal = signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]
        handler = signal.getsignal(self._signal)
        self._handler = handler if callable(handler) else None
        if self._handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(self._signal, self._note)

    def _note(self, _signum: int, _frame: FrameType | None) -> None:
        self.received = True
        if self._starting:
            self._starting = False  # Raise only once: a second signal must not interrupt the end of the job.
            raise Preempted

    def starting(self) -> None:
        """From now on the signal raises Preempted. Raises Preempted at once if the signal has arrived already."""
        self._starting = True
        if self.received:
            self._starting = False
            raise Preempted

    def started(self) -> None:
        """From now on the signal is only recorded."""
        self._starting = False

    @property
    def has_scheduler(self) -> bool:
        """Whether a scheduler's handler was replaced, which requeues the job."""
        return self._handler is not None

    def act(self) -> None:
        """Call the replaced handler, which requeues the job and ends the process on rank 0."""
        assert self._handler is not None, "act is only called where there is a scheduler"
        self._handler(self._signal, None)
