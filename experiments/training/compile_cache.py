"""The folder for compiled programs, on the machine's own disk, which all runs of the same code share.

Seeds of an arm and a size need the same program, so only the first of them on a machine has to compile it. Processes
may read and write the folder at the same time: torch (`write_atomic`; `TritonBundler`, a whole folder) and Triton
(`FileCacheManager.put`) write under a temporary name and rename, and they lock by files. Shared file systems guarantee
neither atomic renames nor locks, so the disk must be a local one. Code is loaded from the folder, so no other user may
have been able to write there.
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

VARIABLES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}  # variable -> its subfolder
# Local file systems, by the names that `stat` prints. On others, locks and atomic renames may not work.
LOCAL_FILE_SYSTEMS = ("bcachefs", "btrfs", "ext2/ext3", "f2fs", "overlayfs", "ramfs", "tmpfs", "xfs", "zfs")
REQUIRED_BYTES = 64 * 2**20  # free space for the programs of a few models
MAX_OLD_FOLDERS = 8  # folders of other code or versions that are kept
MAX_OLD_DAYS = 7.0  # days since their last use
_MEMORY = "/dev/shm"
_REMOVED = "removed-"  # prefix of the name of a folder that is being deleted
_PRIVATE = 0o700
_TRIES = 50  # attempts, a tenth of a second apart, to lock a folder that other processes may be deleting


@contextlib.contextmanager
def compile_cache() -> Iterator[None]:
    """Until the context ends, torch and Triton keep compiled programs in a folder that other runs of this code share.

    Where sharing is unsafe or impossible, says so on standard error and gives this process a folder of its own. Does
    nothing if the user has set one of VARIABLES. Raises OSError if no folder accepts files.
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
    """Whether torch chose this folder itself: importing torch's compiler sets a variable to torch's default."""
    try:
        return place.startswith(f"{tempfile.gettempdir()}/torchinductor_")
    except FileNotFoundError:  # There is no usable folder for temporary files.
        return False


def _shared_folder(stack: contextlib.ExitStack) -> Path:
    """The folder of this code and these versions, locked until the stack closes.

    Raises OSError if it is unsafe, unusable, or cannot be locked.
    """
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
    """A folder for this process alone, deleted when the stack closes; in memory if the disk is not usable."""
    for parent in (None, _MEMORY):  # None: the system's folder for temporary files
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
    """Raises PermissionError if another user may have put files into the folder, or may replace the folder.

    Any user may make a folder, or a link to one, in /tmp; its sticky bit keeps them from replacing ours.
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
    """Raises OSError unless the folder is on a file system that only this machine uses."""
    asked = subprocess.run(["stat", "-f", "-c", "%T", str(root)], capture_output=True, text=True, check=False)
    kind = asked.stdout.strip() or "unknown"
    if kind not in LOCAL_FILE_SYSTEMS:
        raise OSError(0, f"its file system ({kind}) is not known as local; set TMPDIR to a local folder", str(root))


def _require_usable(folder: Path) -> None:
    """Raises OSError if the folder lacks space, cannot be written, or is mounted without permission to execute."""
    if os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise OSError(
            errno.EACCES,
            "compiled code must not be loaded from it (mounted noexec); set TMPDIR to a folder elsewhere",
            str(folder),
        )
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            os.posix_fallocate(probe.fileno(), 0, REQUIRED_BYTES)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None


def _name() -> str:
    """The name of the folder for the programs that this process compiles.

    torch and Triton hash each program themselves, but leave out the libraries that compiled code is linked to, which
    may differ between containers on one node. The name contains the boot id because files that were written shortly
    before a node lost power may exist and be empty.
    """
    torch, triton = version("torch"), version("triton")
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    decide = (source.code_sha256(), torch, triton, sys.version, sys.prefix, platform.libc_ver(), boot)
    return f"torch-{torch}-triton-{triton}-{hashlib.sha256(repr(decide).encode()).hexdigest()[:16]}"


def _take(folder: Path, stack: contextlib.ExitStack) -> Path:
    """Make the folder if it is missing, and mark it as in use by a shared lock until the stack closes.

    The lock lasts as long as this process or one forked from it lives, and systemd-tmpfiles respects it. Raises OSError
    if that fails.
    """
    for _ in range(_TRIES):
        with contextlib.suppress(FileExistsError):  # `exist_ok` raises it if the folder is deleted at this moment.
            folder.mkdir(mode=_PRIVATE)
        with contextlib.ExitStack() as attempt, contextlib.suppress(FileNotFoundError, BlockingIOError):
            held = _opened(folder, attempt)
            fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(held), folder.lstat()):  # Otherwise it was deleted before we locked it.
                os.utime(folder)
                stack.enter_context(attempt.pop_all())
                return folder
        time.sleep(0.1)
    raise TimeoutError(0, "another process deletes it, and does not end", str(folder))


def _opened(folder: Path, stack: contextlib.ExitStack) -> int:
    """A file descriptor of the folder, closed when the stack closes."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    stack.callback(os.close, descriptor)
    return descriptor


def _remove_unused(root: Path, name: str) -> None:
    """Delete unused folders of other code: all but the MAX_OLD_FOLDERS used last, and those older than MAX_OLD_DAYS."""
    others = []
    for folder in root.iterdir():
        if folder.name.startswith(_REMOVED):  # The process that was deleting it was killed.
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.name != name:
            with contextlib.suppress(FileNotFoundError):  # Another process has deleted it.
                others.append((folder.lstat().st_mtime, folder))
    for number, (used, folder) in enumerate(sorted(others, reverse=True)):
        if number >= MAX_OLD_FOLDERS or time.time() - used > 86400 * MAX_OLD_DAYS:
            with contextlib.suppress(OSError):  # It is in use, or another process deletes it.
                _remove(folder)


def _remove(folder: Path) -> None:
    """Delete a folder. Raises BlockingIOError if it is in use, FileNotFoundError if another process deletes it."""
    aside = folder.with_name(f"{_REMOVED}{folder.name}-{os.getpid()}")
    with contextlib.ExitStack() as stack:
        held = _opened(folder, stack)
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(held), folder.lstat()):  # It was replaced by a new folder, which is in use.
            return
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
