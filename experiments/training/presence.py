"""The runs that this machine trains now: which GPUs or cores each has, in a file that its launcher writes.

So a run knows how many others really share its device, whoever submitted them, and two launchers together start no
more runs than either would alone. A file names a process and when that began, and counts while the process lives. Runs
of other users, and those of Slurm, have no file.
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
_OURS = re.compile(r"\d+-(\d+|None)\.json")  # what `_name` gives; None where the process had ended before it was noted


@dataclass(frozen=True)
class Share:
    """What a run uses of this machine: some of its GPUs, or threads on some of its cores."""

    gpus: tuple[int, ...]
    threads: int
    cores: tuple[int, ...]

    def meets(self, other: "Share") -> bool:
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
    """How many runs use the device of the run of process `pid` now, this one included; None where it is not known.

    On a CPU runs share nothing while there is a core for each of their threads; beyond that it is the number of runs
    that stand on a core.
    """
    try:
        runs = present()
    except OSError:
        return None
    own = next((run.share for run in runs if run.pid == pid), None)
    if own is None:
        return None
    beside = [run.share for run in runs if run.share.meets(own)]
    return len(beside) if own.gpus else max(1, math.ceil(sum(s.threads for s in beside) / len(own.cores)))


def present() -> list[Present]:
    """The runs that live. Files of others stay as they are."""
    found = []
    for path in sorted(_folder().glob("*-*.json")):
        pid, _, began = path.stem.partition("-")
        if not began.isdigit() or process_started(pid) != int(began):
            continue
        with contextlib.suppress(ValueError, KeyError, TypeError):  # removed just now
            noted = read_json(path)
            share = {key: noted["share"][key] for key in ("gpus", "threads", "cores")}
            shared = Share(tuple(share["gpus"]), int(share["threads"]), tuple(share["cores"]))
            found.append(Present(int(pid), str(noted["run"]), shared))
    return found


@contextlib.contextmanager
def starting() -> Iterator[None]:
    """Between counting the runs and adding one: one launcher of this machine at a time. Forgets those that ended.

    Raises ValueError if the folder cannot be had.
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
            if _OURS.fullmatch(path.name) and path.name not in living:  # the folder may hold other files of its user
                path.unlink(missing_ok=True)
        yield


def check() -> None:
    """Raises ValueError if the folder cannot be had."""
    with starting():
        pass


def add(pid: int, run: str, share: Share) -> None:
    """Note a run that process `pid` trains. Call it inside of `starting`."""
    write_json(_folder() / _name(pid), {"run": run, "share": asdict(share)})


def remove(pid: int) -> None:
    """Forget the run of a process that goes on without it."""
    (_folder() / _name(pid)).unlink(missing_ok=True)


def process_started(pid: str) -> int | None:
    """When a process of this machine began, in clock ticks since boot: with it a process id names one process only."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the command's name, in brackets, may hold anything
    return None if state == "Z" else int(fields[18])


def _name(pid: int) -> str:
    return f"{pid}-{process_started(str(pid))}.json"


def _folder() -> Path:
    # Not TMPDIR or XDG_RUNTIME_DIR, which may differ between two shells of a user, and whose files may go at a logout.
    return Path(os.environ.get(FOLDER_VARIABLE, f"/tmp/dynconv-{os.getuid()}"))
