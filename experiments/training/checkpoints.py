"""Checkpoints of a run: folders that all its processes write together, and that any number of processes can read.

A checkpoint holds the tensors in safetensors files (torch.distributed.checkpoint), and manifest.json with everything
else and a checksum of each file. Reading it executes no code. A folder gets its name only when all of it is on disk,
and a checkpoint with a wrong checksum is never used.
"""

import contextlib
import hashlib
import json
import shutil
import sys
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from analysis.logs.files import read_json, sync_folder, write_json
from experiments.training.parallel import World

if TYPE_CHECKING:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

CHECKPOINTS_TO_KEEP = 2  # if the newest is damaged, the run resumes from the one before it
MANIFEST = "manifest.json"
FILE_BYTES = 2**29  # bytes of tensors per file; torch builds a file in memory before it writes it
_HASHING_THREADS = 4


class State(NamedTuple):
    """What a checkpoint holds."""

    about: Mapping[str, str | int]  # at least run_id and steps_done
    tensors: dict[str, Tensor]  # by name; each process holds its own part of a sharded tensor


class Resumable(Protocol):
    """What can be saved and resumed: the trainer."""

    def state(self) -> State:
        """Everything that is needed to resume."""
        ...

    def tensors_for(self, saved: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
        """Tensors to read the saved ones into, sharded as this process needs them. Raises ValueError if it cannot."""
        ...

    def resume(self, state: State) -> None:
        """Continue from a state, whose tensors are those that `tensors_for` returned."""
        ...


def save(run_dir: Path, state: State, world: World) -> None:
    """Write a checkpoint, keep the CHECKPOINTS_TO_KEEP - 1 checkpoints before it, and delete all others.

    Checkpoints of later steps, which are deleted as well, exist where they were damaged and the run resumed from an
    earlier one. All processes must call this; it returns when the checkpoint is on disk.
    """
    folder = run_dir / "checkpoint"
    path = _write(folder, state, world)
    if world.rank == 0:
        earlier = [name for name in _newest_first(folder) if name < path.name]
        for other in folder.iterdir():
            if other.name not in (path.name, *earlier[: CHECKPOINTS_TO_KEEP - 1]):
                _remove(other)


def load_newest(run_dir: Path, run_id: str, run: Resumable, world: World) -> list[str] | None:
    """Resume from the newest intact checkpoint of this run. Returns None if there is no checkpoint.

    Otherwise returns one line for each newer checkpoint that was skipped, saying why; it is also printed to standard
    error. All processes must call this, and all read the same checkpoint. Raises ValueError if no checkpoint is intact,
    or if the checkpoint belongs to another run.
    """
    folder = run_dir / "checkpoint"
    skipped: list[str] = []
    for name in world.gather(_newest_first(folder))[0]:
        path = folder / name
        problem = _problem(path, world)
        if problem is None:
            got = _manifest(path)["about"].get("run_id")
            if got != run_id:
                raise ValueError(f"{path} is a checkpoint of run {got}; wanted {run_id}; move it away and retry")
            _read(path, run, world)
            return skipped
        skipped.append(f"{name}: {problem}")
        if world.rank == 0:
            print(f"{path} is damaged ({problem}); trying the checkpoint before it", file=sys.stderr, flush=True)
    if skipped:
        raise ValueError(
            f"no checkpoint of {run_dir.name} is intact ({'; '.join(skipped)}); remove {folder} to train the run anew"
        )
    return None


def keep_branch_point(run_dir: Path, state: State, world: World) -> None:
    """Save the state of a trunk from which branches start. Unlike a checkpoint it is never deleted."""
    _write(run_dir / "branch-points", state, world)


def load_branch_point(trunk_dir: Path, step: int, run: Resumable, world: World) -> None:
    """Continue from a trunk's state after `step`.

    Raises ValueError if the trunk has not reached that step, or if the state is damaged or of another run.
    """
    path = trunk_dir / "branch-points" / _name(step)
    if not path.exists():
        raise ValueError(f"the trunk {trunk_dir.name} has kept no state after step {step}; retry when it has")
    problem = _problem(path, world)
    if problem is not None:
        raise ValueError(f"{path} is damaged ({problem}); train the trunk anew")
    got = _manifest(path)["about"].get("run_id")
    if got != trunk_dir.name:
        raise ValueError(f"{path} is a state of run {got}; wanted one of {trunk_dir.name}; train the trunk anew")
    _read(path, run, world)


def remove(run_dir: Path) -> None:
    """Remove a finished run's checkpoints; its weights stay in model.pt."""
    shutil.rmtree(run_dir / "checkpoint", ignore_errors=True)


def _name(step: int) -> str:
    return f"step-{step:010d}"


def _newest_first(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.glob("step-*")), reverse=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _write(folder: Path, state: State, world: World) -> Path:
    """Write a checkpoint into a temporary folder beside its place, and rename it when all of it is on disk."""
    path = folder / _name(int(state.about["steps_done"]))
    temporary = folder / f".{path.name}.tmp"
    if world.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        folder.mkdir(exist_ok=True)  # The run's own folder is not made again, if it was removed just now.
        temporary.mkdir()
    world.wait_for_all()
    written = [temporary / name for name in _write_tensors(temporary, state.tensors, world)]
    checksums: dict[str, Any] = {}
    for own in world.gather(_checksums(written)):
        checksums |= own
    if world.rank == 0:
        content = {"about": dict(state.about), "processes": world.size, "files": checksums}
        write_json(temporary / MANIFEST, content | {"sha256": _digest(content)})
        replaced = folder / f".{path.name}.old"
        if path.exists():  # It is damaged, or the run has since resumed from an earlier checkpoint.
            path.replace(replaced)
        temporary.replace(path)
        sync_folder(folder)
        shutil.rmtree(replaced, ignore_errors=True)
    world.wait_for_all()  # No process may leave, and take the others down, before the checkpoint is in its place.
    return path


def _write_tensors(folder: Path, tensors: dict[str, Tensor], world: World) -> list[str]:
    """Write the tensors and sync them to disk, together with all processes.

    Returns the names of the files that this process wrote.
    """
    # This takes seconds to import, and most runs end before they need it.
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = _make_writer(folder, tensors)
    with _torch_failures_as_oserror("written"):
        save(tensors, storage_writer=writer, no_dist=world.size == 1)
    names: list[str] = writer.written  # type: ignore[attr-defined]
    return names


def _make_writer(folder: Path, tensors: Mapping[str, Tensor]) -> "HuggingFaceStorageWriter":
    """A writer of safetensors files of about FILE_BYTES each. Its attribute `written` lists this process's files."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    class Writer(HuggingFaceStorageWriter):
        def __init__(self, files: dict[str, int]) -> None:
            super().__init__(str(folder), fqn_to_index_mapping=files, save_distributed=True)
            self.written: list[str] = []

        def write_data(self, *arguments: Any) -> Any:
            future = super().write_data(*arguments)
            self.written = sorted({result.storage_data.relative_path for result in future.value()})
            return future

    files, size = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + size // FILE_BYTES
        size += tensor.numel() * tensor.element_size()
    return Writer(files)


def _read(path: Path, run: Resumable, world: World) -> None:
    """Read a checkpoint into the run's tensors and resume it.

    The number of processes may have changed since the checkpoint was saved: each reads the parts that it needs now.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    saved: Mapping[str, Any] = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    tensors = run.tensors_for({name: (each.size, each.properties.dtype) for name, each in saved.items()})
    with _torch_failures_as_oserror("read"):
        load(tensors, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=world.size == 1)
    run.resume(State(_manifest(path)["about"], tensors))


@contextlib.contextmanager
def _torch_failures_as_oserror(verb: str) -> Iterator[None]:
    """A context in which a failed save or load raises OSError, and torch does not warn of a missing process group.

    torch raises CheckpointException in every process. It derives from BaseException, so `except Exception` misses it.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):
            yield
    except CheckpointException as failure:
        rank, (cause, _) = next(iter(failure.failures.items()))
        message = f"{type(cause).__name__}: {str(cause).splitlines()[0] if str(cause) else 'no message'}"
        raise OSError(f"a checkpoint could not be {verb} by rank {rank} ({message})") from None


def _problem(path: Path, world: World) -> str | None:
    """What is wrong with a checkpoint, or None. Each process checks some of the files; all return the same answer."""
    problem: str | None = None
    try:
        files: dict[str, Any] = _manifest(path)["files"]
        own = sorted(files)[world.rank :: world.size]
        found = _checksums([path / name for name in own])
        damaged = [name for name in own if found[name] != files[name]]
        if damaged:
            problem = f"the checksum of {damaged[0]} differs from that in {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    return next((each for each in world.gather(problem) if each is not None), None)


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises ValueError if it is missing or was changed."""
    content = read_json(path / MANIFEST)
    expected = content.pop("sha256", None)
    if expected != _digest(content):
        raise ValueError(f"the checksum of {MANIFEST} differs")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksums(paths: list[Path]) -> dict[str, str]:
    """The SHA-256 of files by their names."""

    def checksum(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        return dict(zip([path.name for path in paths], pool.map(checksum, paths), strict=True))
