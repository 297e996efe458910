"""A registry of the runs that this machine trains now: a file for each with its GPUs or cores, written by its launcher.

By it a run knows how many others share its device, whichever launcher started them, and two launchers together start no
more runs than either would alone. A file is named by the process id and start time of its run, and counts while that
process lives. Runs of other users and runs on Slurm have no file.
"""

import contextlib
import errno
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from analysis.logs.files import read_json, write_json
from analysis.logs.ownership import held

FOLDER_VARIABLE = "DYNCONV_PRESENCE"
_PRIVATE = 0o700
_OURS = re.compile(r"\d+-(\d+|None)\.json")  # names that `_name` makes; "None" if the process ended before `add`


@dataclass(frozen=True)
class Share:
    """What a run uses of this machine: some of its GPUs, or threads on some of its cores."""

    gpus: tuple[int, ...]
    threads: int
    cores: tuple[int, ...]

    def overlaps(self, other: "Share") -> bool:
        """Whether the two use the same GPU, or both a CPU and the same core."""
        if self.gpus or other.gpus:
            return not set(self.gpus).isdisjoint(other.gpus)
        return not set(self.cores).isdisjoint(other.cores)


@dataclass(frozen=True)
class Present:
    """A run that a living process of this machine trains."""

    pid: int
    run: str
    share: Share


def sharing(pid: int) -> int | None:
    """How many runs use the device of process `pid`'s run now, including it; None if that is not known.

    On a CPU it is 1 while there is a core for each thread of the runs, and otherwise the number of threads per core,
    rounded up.
    """
    try:
        runs = present()
    except OSError:
        return None
    own = next((run.share for run in runs if run.pid == pid), None)
    if own is None:
        return None
    beside = [run.share for run in runs if run.share.overlaps(own)]
    return len(beside) if own.gpus else max(1, math.ceil(sum(s.threads for s in beside) / len(own.cores)))


def present() -> list[Present]:
    """The registered runs whose processes live. Files of ended processes are ignored, not deleted."""
    found = []
    for path in sorted(_folder().glob("*-*.json")):
        pid, _, began = path.stem.partition("-")
        if not began.isdigit() or process_started(pid) != int(began):
            continue
        with contextlib.suppress(ValueError, KeyError, TypeError):  # The file was removed just now.
            noted = read_json(path)
            share = {key: noted["share"][key] for key in ("gpus", "threads", "cores")}
            shared = Share(tuple(share["gpus"]), int(share["threads"]), tuple(share["cores"]))
            found.append(Present(int(pid), str(noted["run"]), shared))
    return found


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Lock the registry, so that one launcher at a time counts the runs and adds one. Removes files of ended processes.

    Raises ValueError if the registry's folder cannot be made or locked, or belongs to another user.
    """
    folder = _folder()
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(mode=_PRIVATE, exist_ok=True)
            # Anybody may make a link in /tmp, and one that leads to a folder of this user's would pass a plain `stat`.
            if folder.lstat().st_uid != os.getuid():
                raise PermissionError(errno.EACCES, "it is another user's")
            stack.enter_context(held(folder, patience=math.inf))
        except OSError as error:
            raise ValueError(
                f"{folder} is to note which runs this machine trains ({error.strerror}); set {FOLDER_VARIABLE} to a "
                "folder of your own on this machine"
            ) from None
        living = {_name(run.pid) for run in present()}
        for path in folder.glob("*.json"):
            if _OURS.fullmatch(path.name) and path.name not in living:  # The user may keep other files in this folder.
                path.unlink(missing_ok=True)
        yield


def check() -> None:
    """Raises ValueError if the registry cannot be used: see `starting`."""
    with starting():
        pass


def add(pid: int, run: str, share: Share) -> None:
    """Register a run that process `pid` trains. Call it inside the context of `starting`."""
    write_json(_folder() / _name(pid), {"run": run, "share": asdict(share)})


def remove(pid: int) -> None:
    """Remove the run of a process from the registry before the process ends."""
    (_folder() / _name(pid)).unlink(missing_ok=True)


def process_started(pid: str) -> int | None:
    """When a process of this machine began, in clock ticks since boot; None if it has ended.

    Process ids are used again; together with this time they are unique.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # The command's name, in brackets, may contain any character.
    return None if state == "Z" else int(fields[18])


def _name(pid: int) -> str:
    return f"{pid}-{process_started(str(pid))}.json"


def _folder() -> Path:
    # Not TMPDIR or XDG_RUNTIME_DIR: they may differ between a user's shells, and be emptied when the user logs out.
    return Path(os.environ.get(FOLDER_VARIABLE, f"/tmp/dynconv-{os.getuid()}"))
