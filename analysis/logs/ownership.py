"""One owner of a folder at a time: by a file lock or, where the file system has none, by a lease that is kept alive.

A lock ends with the process that holds it. A lease is a file that its owner touches every BEAT_SECONDS; whoever wants
the folder takes the file away once it has not been touched for LEASE_SECONDS by his own clock, so that clocks of two
nodes are never compared. Either way the owner keeps the file open, and owns the folder while the path names that file
with what the owner wrote into it: a server of NFS gives the lock of a client that it has not heard of for long to
another, and the first learns of it by that alone.
"""

import contextlib
import errno
import fcntl
import math
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

LOCK, LEASE = ".lock", ".lease"
LEASE_SECONDS = 60.0
BEAT_SECONDS = 5.0
POLL_SECONDS = 0.2
_READ_AND_WRITE = 0o666
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class FolderHeld(RuntimeError):
    """Another process owns the folder."""


class Hold:
    """The ownership of a folder, by the file at `path` that is held open and has `content`."""

    def __init__(self, path: Path, file: IO[bytes], content: bytes = b"") -> None:
        self._path, self._file, self._content = path, file, content

    def lost(self) -> bool:
        """Whether the path names another file or none, or the file has other content: the folder was removed, or
        somebody took it over."""
        try:
            # Opening the file makes a client of NFS ask the server, where `stat` may answer from a cache.
            with self._path.open("rb") as found:
                same = os.path.sameopenfile(found.fileno(), self._file.fileno())
                return not same or found.read() != self._content
        except OSError:
            return True

    def release(self) -> None:
        """Remove the file, unless it is somebody else's by now."""
        if not self.lost():
            self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def held(folder: Path, *, patience: float, waiting: Callable[[], None] = lambda: None) -> Iterator[Hold]:
    """Own the folder until the context ends; afterwards the file that says so is gone.

    Raises FolderHeld if another process has it for longer than `patience` seconds; `waiting` is called once before
    the first wait. A lease is watched until it is seen to be kept alive or to have ended, however long that takes.
    Raises OSError if the folder takes no files.
    """
    with contextlib.ExitStack() as stack:
        turns = _Turns(folder, waiting)
        hold = _lock(folder / LOCK, turns, patience, stack)
        if hold is None:
            hold = _lease(folder / LEASE, turns, patience, stack)
        try:
            yield hold
        finally:
            hold.release()


class _Turns:
    """The wait for a folder."""

    def __init__(self, folder: Path, waiting: Callable[[], None]) -> None:
        self._folder, self._waiting = folder, waiting
        self._since: float | None = None

    def wait(self, patience: float) -> None:
        """Let a moment pass. Raises FolderHeld where this has lasted for longer than `patience` seconds."""
        if self._since is None:
            self._since = time.monotonic()
            if patience > 0:
                self._waiting()
        if time.monotonic() - self._since >= patience:
            raise FolderHeld(f"{self._folder} is another process's")
        time.sleep(POLL_SECONDS)


def _lock(path: Path, turns: _Turns, patience: float, stack: contextlib.ExitStack) -> Hold | None:
    """The folder, by a lock; None where its file system has no locks (ENOSYS, ENOTSUP, ENOLCK)."""
    while True:
        made = not path.exists()
        with contextlib.ExitStack() as own:
            file = own.enter_context(path.open("ab"))
            if made:  # Whoever may write in the folder must be able to lock it, if this process is killed.
                with contextlib.suppress(OSError):
                    os.fchmod(file.fileno(), path.parent.stat().st_mode & _READ_AND_WRITE)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                turns.wait(patience)
                continue
            except OSError as error:
                if error.errno not in _NO_LOCKS:  # it has locks, so a lease would be a second owner
                    raise
                if made:
                    path.unlink(missing_ok=True)
                return None
            hold = Hold(path, file, _signed(file))
            if not hold.lost():  # else whoever held it before deleted it: another process may hold a new file by now
                stack.enter_context(own.pop_all())
                return hold


def _signed(file: IO[bytes]) -> bytes:
    """Replace what an earlier owner wrote into the file by what nobody else writes; returns it."""
    content = uuid.uuid4().hex.encode()
    file.truncate(0)
    file.write(content)
    file.flush()
    os.fsync(file.fileno())
    return content


def _lease(path: Path, turns: _Turns, patience: float, stack: contextlib.ExitStack) -> Hold:
    """The folder, by a lease: the file is made by whoever finds none (O_EXCL), which works on every file system."""
    seen, since, alive = None, time.monotonic(), False
    while True:
        try:
            file = stack.enter_context(path.open("xb"))
            break
        except FileExistsError:
            now = _mark(path)
        if now != seen:
            alive = alive or None not in (now, seen)
            seen, since = now, time.monotonic()
        elif now is not None and time.monotonic() - since > LEASE_SECONDS:
            _take_away(path, now)
        turns.wait(patience if alive else math.inf)
    ended = threading.Event()
    stack.callback(ended.set)
    threading.Thread(target=_keep_alive, args=(file, ended), name="lease", daemon=True).start()
    return Hold(path, file)


def _keep_alive(file: IO[bytes], ended: threading.Event) -> None:
    """Touch the file, whatever its path names by now, so that the lease of a successor is never kept alive."""
    while not ended.wait(BEAT_SECONDS):
        with contextlib.suppress(OSError, ValueError):  # ValueError: it was closed just now
            os.utime(file.fileno())


def _mark(path: Path) -> tuple[int, int, int] | None:
    """What changes whenever a lease is kept alive or changes hands; None where there is none."""
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def _take_away(path: Path, dead: tuple[int, int, int]) -> None:
    """Remove a lease that was not kept alive. If it has changed hands meanwhile, it is put back."""
    aside = path.with_name(f"{path.name}-{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)  # of several that try, one gets it
        if _mark(aside) != dead:
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink()
