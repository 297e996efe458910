"""Compiled programs that runs of the same code share: where they are kept, when they are not, and for how long."""

import contextlib
import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from experiments import source
from experiments.design.config import Execution
from experiments.training import compile_cache as module
from experiments.training import job
from experiments.training.compile_cache import VARIABLES, compile_cache
from experiments.training.job import Place, joined

pytestmark = pytest.mark.skipif(
    subprocess.run(["stat", "-f", "-c", "%T", tempfile.gettempdir()], capture_output=True, text=True).stdout.strip()
    not in module.LOCAL_FILE_SYSTEMS,
    reason="the temporary folder of this machine is not known as a local one",
)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What TMPDIR would name, as private as /tmp is by its sticky bit."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def root(temporary: Path) -> Path:
    return temporary / f"dynconv-cache-{os.getuid()}"


def folder_in_use() -> Path:
    """The folder that holds both caches, as torch and Triton are told."""
    (folder,) = {Path(os.environ[name]).parent for name in VARIABLES}
    return folder


def test_runs_of_one_code_share_a_private_folder_that_stays(temporary: Path) -> None:
    with compile_cache():
        first = folder_in_use()
        (first / "inductor").mkdir()
    assert not any(name in os.environ for name in VARIABLES)
    with compile_cache():
        assert folder_in_use() == first
    assert first.parent == root(temporary)
    assert {path.stat().st_mode & 0o777 for path in (first, first.parent)} == {0o700}
    assert (first / "inductor").is_dir()


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(source, "code_sha256", lambda: "other code"),
        lambda patch: patch.setattr(module, "version", lambda package: f"another {package}"),
        lambda patch: patch.setattr(sys, "prefix", "/another/environment"),
        lambda patch: patch.setattr(os, "confstr", lambda _: "another libc"),
    ],
    ids=["code", "torch and triton", "environment", "libc"],
)
def test_other_code_or_versions_have_another_folder(
    change: Callable[[pytest.MonkeyPatch], None], temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with compile_cache():
        first = folder_in_use()
    change(monkeypatch)
    with compile_cache():
        assert folder_in_use() != first
        assert folder_in_use().parent == root(temporary)


def test_folders_that_the_environment_names_are_left_alone(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "/mine")
    with compile_cache():
        assert {name: os.environ.get(name) for name in VARIABLES} == {
            "TRITON_CACHE_DIR": "/mine",
            "TORCHINDUCTOR_CACHE_DIR": None,
        }
    assert not root(temporary).exists()


def test_what_torch_chose_when_it_was_imported_is_not_what_the_user_named(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Importing `torch._dynamo` sets the variable, as a process that forks runs has done."""
    default = default_cache_dir()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default)
    with compile_cache():
        assert folder_in_use().parent == root(temporary)
    assert {name: os.environ.get(name) for name in VARIABLES} == {
        "TORCHINDUCTOR_CACHE_DIR": default,
        "TRITON_CACHE_DIR": None,
    }


# A folder that cannot be trusted or used


def not_private(temporary: Path, _: pytest.MonkeyPatch) -> str:
    root(temporary).mkdir()
    root(temporary).chmod(0o755)
    return "others may use it (mode 755, wanted 700); remove it"


def another_users(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """As root may make it, and seen by another user where this one may not give folders away."""
    uid = os.getuid()
    theirs = temporary / f"dynconv-cache-{uid + 1}"
    theirs.mkdir(mode=0o700)
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    why = f"it belongs to the user {uid}, and compiled code would be loaded from it"
    return f"{theirs}: {why}; set TMPDIR to a folder of your own"


def a_link(temporary: Path, _: pytest.MonkeyPatch) -> str:
    (temporary / "elsewhere").mkdir(mode=0o700)
    root(temporary).symlink_to(temporary / "elsewhere")
    return "it is no folder; remove it"


def a_link_inside(temporary: Path, _: pytest.MonkeyPatch) -> str:
    with compile_cache():
        inside = folder_in_use()
    inside.rmdir()
    (temporary / "elsewhere").mkdir(mode=0o700)
    inside.symlink_to(temporary / "elsewhere")
    return "Not a directory"


def no_sticky_bit(temporary: Path, _: pytest.MonkeyPatch) -> str:
    temporary.chmod(0o777)
    return f"others may replace it, as {temporary} has no sticky bit; set TMPDIR to a folder of your own"


def a_shared_file_system(_: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(module, "LOCAL_FILE_SYSTEMS", ())
    return "is not known as local; set TMPDIR to a local folder"


def full_outside_of_memory(descriptor: int, offset: int, length: int) -> None:
    """`posix_fallocate` where the disk is full. (A disk of 1 MB and one that is read-only were tried by hand.)"""
    if not Path(f"/proc/self/fd/{descriptor}").readlink().is_relative_to("/dev/shm"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.truncate(descriptor, offset + length)


def noexec_outside_of_memory(folder: Path) -> Any:
    """`statvfs` where the disk is mounted noexec. (A mount of that kind was tried by hand.)"""
    return SimpleNamespace(f_flag=0 if folder.is_relative_to("/dev/shm") else os.ST_NOEXEC)


@pytest.mark.parametrize(
    "spoil",
    [not_private, another_users, a_link, a_link_inside, no_sticky_bit, a_shared_file_system],
    ids=lambda spoil: spoil.__name__,
)
def test_a_process_has_a_folder_of_its_own_where_the_shared_one_will_not_do(
    spoil: Callable[[Path, pytest.MonkeyPatch], str],
    temporary: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = spoil(temporary, monkeypatch)
    with compile_cache():
        own = folder_in_use()
        (own / "triton").mkdir()
        assert own.stat().st_mode & 0o777 == 0o700
        assert own.parent == temporary
    assert not own.exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"compiled programs are not shared with other runs: {temporary}")
    assert said in line
    assert line.endswith(f"; they are in {own} until this process ends")


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no folder in memory")
@pytest.mark.parametrize("problem", ["no folder takes files", "the folder is full", "mounted noexec"])
def test_a_process_keeps_its_programs_in_memory_where_the_disk_takes_no_files_or_allows_no_code(
    problem: str, temporary: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = str(root(temporary))
    if problem == "no folder takes files":  # what Python asks of each of the usual ones is to write a file
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(temporary / "missing")])
        said = "No usable temporary directory found"
    elif problem == "the folder is full":
        monkeypatch.setattr(os, "posix_fallocate", full_outside_of_memory)
    else:
        monkeypatch.setattr(os, "statvfs", noexec_outside_of_memory)
    with compile_cache():
        assert folder_in_use().parent == Path("/dev/shm")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"compiled programs are not shared with other runs: {said}")
    assert ("(mounted noexec)" in line) == (problem == "mounted noexec")


def test_where_no_folder_will_do_the_problem_of_the_one_to_change_is_raised(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
    with pytest.raises(PermissionError, match="set TMPDIR to a folder elsewhere"), compile_cache():
        pass
    assert not [path for path in temporary.iterdir() if path != root(temporary)]


@pytest.mark.parametrize("made_again", [False, True])
def test_a_folder_that_is_deleted_while_it_is_taken_is_taken_anew(
    made_again: bool, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deleted, and perhaps made again by a third, after it was opened and before it was locked."""
    with compile_cache():
        folder = folder_in_use()
    assert folder.parent == root(temporary)
    real, deleted = fcntl.flock, list[Path]()

    def flock(descriptor: int, operation: int) -> None:
        if not deleted:
            deleted.append(folder)
            folder.rename(temporary / "deleted")  # the name of a new folder that has the same inode says nothing
            if made_again:
                folder.mkdir(mode=0o700)
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with compile_cache():
        assert folder_in_use() == folder
        with pytest.raises(BlockingIOError):
            module._remove(folder)
    assert deleted


# What is deleted


def made(temporary: Path, name: str, days_ago: float = 0.0) -> Path:
    """A folder of other code that was last used so long ago."""
    folder = root(temporary) / name
    folder.mkdir(mode=0o700, parents=True)
    root(temporary).chmod(0o700)
    (folder / "program").touch()
    os.utime(folder, (time.time() - 86400 * days_ago,) * 2)
    return folder


@contextlib.contextmanager
def another_process_uses(folder: Path) -> Iterator[None]:
    """From a descriptor that was opened for this, a lock is another's even in this process."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        yield
    finally:
        os.close(descriptor)


def test_folders_that_nobody_used_for_days_are_deleted_and_those_in_use_are_not(temporary: Path) -> None:
    old, used, new = made(temporary, "old", 8.0), made(temporary, "used", 8.0), made(temporary, "new", 6.0)
    half_gone = made(temporary, "removed-older-17")
    with another_process_uses(used), compile_cache():
        assert {path.name for path in root(temporary).iterdir()} == {"used", "new", folder_in_use().name}
    assert not old.exists()
    assert not half_gone.exists()
    assert (new / "program").exists()


def test_the_last_few_folders_of_other_code_are_kept(temporary: Path) -> None:
    for hours in range(12):
        made(temporary, f"{hours} hours ago", hours / 24)
    with compile_cache():
        own = folder_in_use().name
    assert {path.name for path in root(temporary).iterdir()} == {own, *(f"{hours} hours ago" for hours in range(8))}


def use(folder: Path) -> None:
    for _ in range(100):
        with contextlib.ExitStack() as stack:
            module._take(folder, stack)
            (folder / "program").touch()
            assert (folder / "program").exists()


def test_a_folder_is_never_deleted_under_those_who_use_it(temporary: Path) -> None:
    """Two use it again and again while this one deletes it whenever it is free."""
    root(temporary).mkdir(mode=0o700)
    folder = root(temporary) / "code"
    with ThreadPoolExecutor(2) as pool:
        users = [pool.submit(use, folder) for _ in range(2)]
        while not all(user.done() for user in users):
            with contextlib.suppress(FileNotFoundError, BlockingIOError):
                module._remove(folder)
    for user in users:
        user.result()


def test_a_new_folder_is_not_deleted_in_place_of_the_old_one(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While this process is about to delete the folder another does, and a run makes it again and uses it."""
    folder, real = made(temporary, "old", 8.0), fcntl.flock
    with contextlib.ExitStack() as run:

        def flock(descriptor: int, operation: int) -> None:
            monkeypatch.setattr(fcntl, "flock", real)
            module._remove(folder)
            module._take(folder, run)
            (folder / "of the run").touch()
            real(descriptor, operation)

        monkeypatch.setattr(fcntl, "flock", flock)
        module._remove(folder)
        assert (folder / "of the run").exists()


# Who uses it


def test_every_run_and_benchmark_on_a_gpu_uses_it(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_device", lambda *_: torch.device("cuda"))
    with joined(temporary, Execution(), Place()):
        assert folder_in_use().parent == root(temporary)
    monkeypatch.setattr(job, "_device", lambda *_: torch.device("cpu"))
    with joined(temporary, replace(Execution(), device="cpu"), Place()):
        assert not any(name in os.environ for name in VARIABLES)
    shutil.rmtree(root(temporary))
