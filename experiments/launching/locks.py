"""One submission to a store at a time, and which signals may end a launcher when."""

import contextlib
import fcntl
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


@contextlib.contextmanager
def store_lock(store: Path) -> Iterator[None]:
    """Hold the store, and make it if it is missing; whoever has to wait is told on standard error.

    Afterwards the lock file is gone, and the store, too, where it was made here and is still empty: a refused
    submission leaves nothing. Raises ValueError where the store takes no files.
    """
    made = not store.exists()
    path = store / ".lock"
    with contextlib.ExitStack() as stack:
        told = False
        while True:
            try:
                store.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(path.open("w"))
            except OSError as error:
                raise ValueError(f"{store} takes no files ({error.strerror}); choose another with --store") from None
            told = _acquire(file, store, told)
            if _is_open_file(path, file):
                break
            file.close()  # whoever held it before deleted it: another process may hold a new file by now
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            if made:
                with contextlib.suppress(OSError):  # not empty
                    store.rmdir()


def _acquire(file: TextIO, store: Path, told: bool) -> bool:
    """Lock the file. Returns whether the user has been told that it takes time."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not told:
            print(f"waiting for another submit to {store}", file=sys.stderr)
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    except OSError:  # some cluster file systems have no locks; the window is small, so go on without
        pass
    return told


def _is_open_file(path: Path, file: TextIO) -> bool:
    """Whether `path` still names the file that is open."""
    held = os.fstat(file.fileno())
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    return (found.st_dev, found.st_ino) == (held.st_dev, held.st_ino)


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
