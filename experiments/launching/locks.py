"""The lock that allows one submission to a store at a time, and the handling of signals in launchers."""

import contextlib
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from analysis.logs.ownership import held


@contextlib.contextmanager
def store_lock(store: Path) -> Iterator[None]:
    """Hold the store's lock. Makes the store if it is missing. Says on standard error if it has to wait.

    Afterwards the lock file is removed, and so is the store if it was made here and is still empty, so that a refused
    submission leaves nothing behind. Raises ValueError if the store cannot be written.
    """
    made = not store.exists()
    try:
        with contextlib.ExitStack() as stack:
            _hold(store, stack)
            yield
    finally:
        if made:
            with contextlib.suppress(OSError):  # not empty
                store.rmdir()


def require_store(store: Path) -> None:
    """Raises ValueError where there is no store."""
    if not store.is_dir():
        raise ValueError(f"{store} is not a store, so it has no runs; name another with --store")


def _hold(store: Path, stack: contextlib.ExitStack) -> None:
    """Make the store and enter its lock into the stack. Raises ValueError if the store cannot be written."""
    while True:
        try:
            store.mkdir(parents=True, exist_ok=True)  # Under /proc this raises FileNotFoundError as well.
            with contextlib.suppress(FileNotFoundError):  # The process that made the store has removed it, still empty.
                stack.enter_context(held(store, patience=math.inf, waiting=lambda: _tell(store)))
                return
        except OSError as error:
            raise ValueError(f"{store} takes no files ({error.strerror}); choose another with --store") from None


def _tell(store: Path) -> None:
    print(f"waiting for another submit to {store}", file=sys.stderr)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """A context in which only SIGKILL ends this process, since a job may have started that no file records yet.

    INT, HUP and TERM take effect at the end of the context. Programs started inside have INT and HUP, which a terminal
    sends to all its processes, blocked for their whole life.
    """
    noted: list[int] = []
    deferred = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in deferred}
    # Programs inherit the signal mask but not the handlers, which note signals to other threads of this process.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        while held_back := signal.sigtimedwait((signal.SIGINT, signal.SIGHUP), 0):
            noted.append(held_back.si_signo)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for came in dict.fromkeys(noted):  # The first handler that raises ends this loop.
            signal.raise_signal(came)


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """A context in which a closed terminal or a plain `kill` raises KeyboardInterrupt, as Ctrl-C does.

    A signal that was ignored before stays ignored, as under `nohup`.
    """
    heeded = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
