"""The signal by which a scheduler tells a job to stop: before a preemption, and before its time limit."""

import os
import signal
import threading
from types import FrameType

STOPPED = "stopped with its state saved"  # what a run says last that was told to stop; `status` reads it
PREEMPTED = "it was told to stop"


class Preempted(BaseException):
    """The signal came while the run started: nothing is to be saved. No `except Exception` of a library stops it."""


class StopSignal:
    """Takes the signal over from the handler that was there, which would requeue the job in the middle of a step.

    While a run starts, the signal raises Preempted, since compiling alone may outlast the time that is left. Later it
    is only recorded, so that the training loop can stop between two steps. `act` calls the handler that was there.
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
            self._starting = False  # once: what comes later must not interrupt the end of the job
            raise Preempted

    def starting(self) -> None:
        """From now on the signal raises Preempted, as this does if it has come already."""
        self._starting = True
        if self.received:
            self._starting = False
            raise Preempted

    def started(self) -> None:
        """From now on the signal is recorded only."""
        self._starting = False

    @property
    def has_scheduler(self) -> bool:
        """Whether there is a handler that starts the job again."""
        return self._handler is not None

    def act(self) -> None:
        """Call the handler that was there, which requeues the job and ends the process of rank 0."""
        assert self._handler is not None, "act is only called where there is a scheduler"
        self._handler(self._signal, None)
