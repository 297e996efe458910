"""Where compiled programs are kept: a folder on the machine's own disk that all runs of the same code share.

Seeds of an arm and a size need the same program, so only the first of them on a machine has to compile it. Processes
may read and write the folder at the same time: torch (`write_atomic`; `TritonBundler`, a whole folder) and Triton
(`FileCacheManager.put`) write under another name and rename, and what they lock they lock by files. Neither is sure to
hold on a shared file system, so the disk must be a local one. Code is loaded from the folder, so nobody else may have
been able to write there.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from analysis.errors import first_line
from experiments import source
from experiments.training.provenance import version

VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}  # and the folder that each names
# What `stat` calls file systems of one machine. Of any other it is not known whether locks and renames hold there.
LOCAL = ("bcachefs", "btrfs", "ext2/ext3", "f2fs", "overlayfs", "ramfs", "tmpfs", "xfs", "zfs")
ROOM = 64 * 2**20  # bytes that must be free, for the programs of a few models
KEPT = 8  # folders of other code or versions
KEPT_DAYS = 7.0  # since their last use
_MEMORY = "/dev/shm"
_REMOVED = "removed-"  # begins the name of a folder that is being deleted
_PRIVATE = 0o700
_TRIES = 50  # to take a folder that others delete at the same time, a tenth of a second apart


@contextlib.contextmanager
def compile_cache() -> Iterator[None]:
    """Have torch and Triton keep compiled programs, until the context ends, where other runs of this code find them.

    Where that is not safe or not possible, says so on standard error and gives this process a folder of its own.
    Does nothing if the environment names a folder of the user's. Raises OSError if no folder can be had at all.
    """
    before = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if not all(map(_is_default, before.values())):
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            folder = _shared_folder(stack)
        except OSError as error:
            folder = _own_folder(stack)
            where, why = f"{error.filename}: " if error.filename else "", error.strerror or first_line(error)
            print(
                f"compiled programs are not shared with other runs: {where}{why}; they are in {folder} until this "
                "process ends",
                file=sys.stderr,
                flush=True,
            )
        stack.callback(os.environ.update, before)
        for variable, name in VARIABLES.items():
            os.environ[variable] = str(folder / name)
            stack.callback(os.environ.pop, variable, None)
        yield


def _is_default(place: str) -> bool:
    """Whether torch chose this folder: importing its compiler is enough to have a variable set to torch's default."""
    try:
        return place.startswith(f"{tempfile.gettempdir()}/torchinductor_")
    except FileNotFoundError:  # no folder of temporary files takes any
        return False


def _shared_folder(stack: contextlib.ExitStack) -> Path:
    """The folder of this code and these versions, in use until the stack ends. Raises OSError if it cannot be had."""
    root = Path(tempfile.gettempdir(), f"dynconv-cache-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        root.mkdir(mode=_PRIVATE)
    _require_private(root)
    _require_local(root)
    name = _name()
    _remove_unused(root, name)
    folder = _take(root / name, stack)
    _require_usable(folder)
    return folder


def _own_folder(stack: contextlib.ExitStack) -> Path:
    """A folder of this process alone, deleted when the stack ends: in memory if the disk takes no files."""
    for parent in (None, _MEMORY):  # None: the folder of temporary files, if there is one that takes files
        try:
            folder = Path(tempfile.mkdtemp(prefix="dynconv-", dir=parent))
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            _require_usable(folder)
        except OSError as error:
            problem = error
        else:
            return folder
    raise problem


def _require_private(root: Path) -> None:
    """Raises PermissionError if somebody else may have put files into the folder, or may put another in its place.

    Anybody may make a folder, or a link to one, in /tmp; there the sticky bit keeps others from replacing ours.
    """
    found, parent = root.lstat(), root.parent.stat()
    if not stat.S_ISDIR(found.st_mode):
        _refuse(root, "it is no folder; remove it")
    if found.st_uid != os.getuid():
        _refuse(
            root,
            f"it belongs to the user {found.st_uid}, and compiled code would be loaded from it; set TMPDIR to a folder "
            "of your own",
        )
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        _refuse(root, f"others may use it (mode {stat.S_IMODE(found.st_mode):o}, wanted 700); remove it")
    if parent.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not parent.st_mode & stat.S_ISVTX:
        _refuse(root, f"others may replace it, as {root.parent} has no sticky bit; set TMPDIR to a folder of your own")


def _refuse(root: Path, why: str) -> None:
    raise PermissionError(0, why, str(root))


def _require_local(root: Path) -> None:
    """Raises OSError if other machines may see the folder, too."""
    asked = subprocess.run(["stat", "-f", "-c", "%T", str(root)], capture_output=True, text=True, check=False)
    kind = asked.stdout.strip() or "unknown"
    if kind not in LOCAL:
        raise OSError(0, f"its file system ({kind}) is not known as local; set TMPDIR to a local folder", str(root))


def _require_usable(folder: Path) -> None:
    """Raises OSError if the folder takes no files, or too few, or if code must not be loaded from it."""
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise OSError(
            errno.EACCES,
            "compiled code must not be loaded from it (mounted noexec); set TMPDIR to a folder elsewhere",
            str(folder),
        )
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            os.posix_fallocate(probe.fileno(), 0, ROOM)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def _name() -> str:
    """The name of the folder for what this process compiles.

    torch and Triton have hashes of their own for each program; these leave out libraries that compiled code is linked
    to, as containers on one node may differ in. The boot is in the name because files that were written shortly before
    a node lost power may be there and empty.
    """
    torch, triton = version("torch"), version("triton")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    decide = (source.code_sha256(), torch, triton, sys.version, sys.prefix, platform.libc_ver(), boot)
    return f"torch-{torch}-triton-{triton}-{hashlib.sha256(repr(decide).encode()).hexdigest()[:16]}"


def _take(folder: Path, stack: contextlib.ExitStack) -> Path:
    """Make the folder, if it is missing, and hold a shared lock on it, which says that it is in use, as long as this
    process or one forked from it lives. Cleaners as systemd-tmpfiles heed it, too. Raises OSError if that fails."""
    for _ in range(_TRIES):
        with contextlib.suppress(FileExistsError):  # `exist_ok` would raise it if the folder goes at this moment
            folder.mkdir(mode=_PRIVATE)
        with contextlib.ExitStack() as attempt, contextlib.suppress(FileNotFoundError, BlockingIOError):
            held = _opened(folder, attempt)
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(held), folder.lstat()):  # else it was deleted between the two calls
                os.utime(folder)
                stack.enter_context(attempt.pop_all())
                return folder
        time.sleep(0.1)
    raise TimeoutError(0, "another process deletes it, and does not end", str(folder))


def _opened(folder: Path, stack: contextlib.ExitStack) -> int:
    """A file descriptor of the folder, closed when the stack ends."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    stack.callback(os.close, descriptor)
    return descriptor


def _remove_unused(root: Path, name: str) -> None:
    """Delete folders of other code that nobody uses: all but the last KEPT, and those not used for KEPT_DAYS."""
    others = []
    for folder in root.iterdir():
        if folder.name.startswith(_REMOVED):  # by a process that was killed before it was done
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.name != name:
            with contextlib.suppress(FileNotFoundError):  # another process deletes it
                others.append((folder.lstat().st_mtime, folder))
    for number, (used, folder) in enumerate(sorted(others, reverse=True)):
        if number >= KEPT or time.time() - used > 86400 * KEPT_DAYS:
            with contextlib.suppress(OSError):  # in use, or another process deletes it
                _remove(folder)


def _remove(folder: Path) -> None:
    """Delete a folder. Raises BlockingIOError if it is in use, FileNotFoundError if another process deletes it."""
    aside = folder.with_name(f"{_REMOVED}{folder.name}-{os.getpid()}")
    with contextlib.ExitStack() as stack:
        held = _opened(folder, stack)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(held), folder.lstat()):  # the name may be that of a new one, which is in use
            return
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
