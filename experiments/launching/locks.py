"""One submission to a store at a time, and which signals may end a launcher when."""

import contextlib
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from analysis.logs.ownership import held


@contextlib.contextmanager
def store_lock(store: Path) -> Iterator[None]:
    """Hold the store, and make it if it is missing; whoever has to wait is told on standard error.

    Afterwards the lock file is gone, and the store, too, where it was made here and is still empty: a refused
    submission leaves nothing. Raises ValueError where the store takes no files.
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
    while True:
        try:
            store.mkdir(parents=True, exist_ok=True)  # under /proc this, too, raises FileNotFoundError
            with contextlib.suppress(FileNotFoundError):  # whoever had made the store removed it again, empty as it was
                stack.enter_context(held(store, patience=math.inf, waiting=lambda: _tell(store)))
                return
        except OSError as error:
            raise ValueError(f"{store} takes no files ({error.strerror}); choose another with --store") from None


def _tell(store: Path) -> None:
    print(f"waiting for another submit to {store}", file=sys.stderr)


@contextlib.contextmanager
def signals_deferred() -> Iterator[None]:
    """Nothing short of SIGKILL ends this process inside: a job may have begun that no file names yet.

    INT, HUP and TERM are acted on at the end. INT and HUP, which a terminal sends to all programs started from it, are
    blocked for those started inside as well, for as long as these run.
    """
    noted: list[int] = []
    deferred = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda number, _: noted.append(number)) for number in deferred}
    # Programs inherit the mask and not the handlers; the handlers note what reaches another thread of this process.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        while held_back := signal.sigtimedwait((signal.SIGINT, signal.SIGHUP), 0):
            noted.append(held_back.si_signo)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for came in dict.fromkeys(noted):  # the first whose handler raises ends this
            signal.raise_signal(came)


@contextlib.contextmanager
def termination_as_interrupt() -> Iterator[None]:
    """Make a closed terminal or a plain `kill` raise KeyboardInterrupt, as Ctrl-C does.

    A signal that is ignored stays ignored: `nohup` asks for that.
    """
    heeded = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, signal.default_int_handler) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
