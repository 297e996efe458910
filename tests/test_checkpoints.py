"""Checkpoints: read back bit for bit, never used when damaged, never half written, and no programs."""

import json
import pickle
import random
import resource
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.data.dataset import Dataset
from experiments.design.config import Execution, RunConfig
from experiments.design.train import Muon
from experiments.training import checkpoints
from experiments.training.assembly import assemble
from experiments.training.checkpoints import State
from experiments.training.parallel import World

ALONE = World(0, 1, torch.device("cpu"))
CPU = Execution(device="cpu")


class Toy:
    """A run whose tensors all hold its step."""

    def __init__(self, step: int = 0, run_id: str = "x") -> None:
        self.step, self.run_id = step, run_id
        self.tensors = {
            "model.w": torch.full((5, 3), float(step)),
            "model.half": torch.full((7,), float(step), dtype=torch.bfloat16),
            "optimizer.w.step": torch.tensor(float(step)),
        }

    def state(self) -> State:
        return State({"run_id": self.run_id, "steps_done": self.step}, self.tensors)

    def tensors_for(self, saved: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
        return {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in saved.items()}

    def resume(self, state: State) -> None:
        self.step, self.tensors = int(state.about["steps_done"]), state.tensors


def save(run_dir: Path, *steps: int) -> None:
    for step in steps:
        checkpoints.save(run_dir, Toy(step).state(), ALONE)


def loaded(run_dir: Path) -> tuple[int, list[str]]:
    """The step of the checkpoint that is used, whose tensors must be those of that step, and what was skipped."""
    run = Toy()
    skipped = checkpoints.load_newest(run_dir, "x", run, ALONE)
    assert skipped is not None
    for name, tensor in Toy(run.step).tensors.items():
        assert torch.equal(run.tensors[name], tensor)
        assert run.tensors[name].dtype == tensor.dtype
    return run.step, skipped


def kept(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoint").iterdir())


def test_the_newest_two_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    assert checkpoints.load_newest(tmp_path, "x", Toy(), ALONE) is None
    save(tmp_path, 1, 2, 3)
    assert kept(tmp_path) == ["step-0000000002", "step-0000000003"]
    assert loaded(tmp_path) == (3, [])


def flip(path: Path, position: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_one_flipped_bit_anywhere_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In every file of the newest checkpoint, among them the one with the checksums."""
    save(tmp_path, 1, 2)
    whole, places = tmp_path / "whole", random.Random(0)
    shutil.copytree(tmp_path / "checkpoint", whole)
    names = sorted(path.name for path in (whole / "step-0000000002").iterdir())
    assert [name.rpartition(".")[2] for name in names] == ["json", "safetensors"]
    for name in names:
        for _ in range(60):
            shutil.rmtree(tmp_path / "checkpoint")
            shutil.copytree(whole, tmp_path / "checkpoint")
            path = tmp_path / "checkpoint" / "step-0000000002" / name
            flip(path, places.randrange(path.stat().st_size), places.randrange(8))
            step, (skipped,) = loaded(tmp_path)
            assert step == 1
            assert skipped.startswith("step-0000000002: ")
            assert "step-0000000002 is damaged (" in capsys.readouterr().err


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "flipped": (lambda path: flip(next(path.glob("*.safetensors")), -5, 3), "the checksum of .* differs"),
    "torn": (lambda path: next(path.glob("*.safetensors")).write_bytes(b"torn"), "the checksum of .* differs"),
    "a file missing": (lambda path: next(path.glob("*.safetensors")).unlink(), "FileNotFoundError"),
    "no manifest": (lambda path: (path / "manifest.json").unlink(), r"manifest\.json is missing"),
    "an edited manifest": (
        lambda path: (path / "manifest.json").write_text(
            (path / "manifest.json").read_text().replace('"steps_done": ', '"steps_done": 1')
        ),
        r"the checksum of manifest\.json differs",
    ),
    "of an earlier version": (lambda path: (shutil.rmtree(path), path.write_bytes(b"a file")), "ValueError"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_copy_before_is_used_and_where_none_is_intact_the_run_fails(damage: str, tmp_path: Path) -> None:
    harm, problem = DAMAGES[damage]
    save(tmp_path, 10, 20)
    harm(tmp_path / "checkpoint" / "step-0000000020")
    assert loaded(tmp_path)[0] == 10
    save(tmp_path, 15)
    assert kept(tmp_path) == ["step-0000000010", "step-0000000015"]  # the damaged one is of a course given up
    for path in (tmp_path / "checkpoint").iterdir():
        harm(path)
    with pytest.raises(
        ValueError, match=rf"no checkpoint of .* is intact \(.*{problem}.*; remove .* train the run anew"
    ):
        loaded(tmp_path)
    save(tmp_path, 10, 15)  # in the places of damaged ones
    assert loaded(tmp_path) == (15, [])


@pytest.mark.parametrize("moment", ["torch", "write_json", "sync_folder"])
def test_a_save_that_is_interrupted_leaves_the_copies_before(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1, 2)
    with monkeypatch.context() as patch:

        def killed(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        target = "torch.distributed.checkpoint.state_dict_saver.save"
        patch.setattr(target if moment == "torch" else f"experiments.training.checkpoints.{moment}", killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 3)
    assert loaded(tmp_path) == (3 if moment == "sync_folder" else 2, [])  # in its place before the folder is synced
    save(tmp_path, 4)
    assert len(kept(tmp_path)) == 2
    assert loaded(tmp_path) == (4, [])


def test_a_disk_that_is_full_is_named_and_the_copy_before_stays(tmp_path: Path) -> None:
    save(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))  # the system refuses larger files
    try:
        with pytest.raises(OSError, match=r"a checkpoint could not be written by rank 0 \(OSError: .*File too large"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert loaded(tmp_path) == (1, [])


def test_a_run_that_was_removed_is_not_made_again(tmp_path: Path) -> None:
    """Its folder may be another's by now, which would go on from the state of this one."""
    with pytest.raises(FileNotFoundError):
        save(tmp_path / "removed", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, Toy(2, "somebody-elses").state(), ALONE)
    with pytest.raises(ValueError, match="step-0000000002 is a checkpoint of run somebody-elses; wanted x; move it"):
        loaded(tmp_path)


def test_a_checkpoint_that_is_a_program_is_not_run(tmp_path: Path) -> None:
    """Even if all its checksums are right."""

    class Program:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (Path.touch, (str(tmp_path / "ran"),))  # type: ignore[return-value]

    save(tmp_path, 1)
    folder = tmp_path / "checkpoint" / "step-0000000001"
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(pickle.dumps(Program()))
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["files"] = checkpoints._checksums([path])
    (folder / "manifest.json").write_text(json.dumps(manifest | {"sha256": checkpoints._digest(manifest)}))
    with pytest.raises(Exception, match="header"):
        loaded(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_large_states_are_split_into_files_and_small_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 32)
    save(tmp_path, 1)
    assert len(list((tmp_path / "checkpoint" / "step-0000000001").glob("*.safetensors"))) == 3
    assert loaded(tmp_path) == (1, [])


def test_a_state_of_other_parameters_or_data_is_refused(tiny_run: RunConfig, dataset: Dataset, tmp_path: Path) -> None:
    trainer = assemble(tiny_run, dataset, CPU, ALONE)
    trainer.step()
    about, tensors = trainer.state()
    for name in ("data", "less", "more"):
        (tmp_path / name).mkdir()
    checkpoints.save(tmp_path / "data", State({**about, "data_sha256": "0" * 64}, tensors), ALONE)
    less = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    checkpoints.save(tmp_path / "less", State(about, less), ALONE)
    checkpoints.save(tmp_path / "more", State(about, {**tensors, "model.other": torch.ones(2)}), ALONE)
    for name, problem in (
        ("data", "was trained on data 000000000000; this run has"),
        ("less", r"the checkpoint lacks model\.norm\.weight, which this model has; start the run anew"),
        ("more", r"the checkpoint has model\.other \[2\], which this model lacks; start the run anew"),
    ):
        with pytest.raises(ValueError, match=problem):
            checkpoints.load_newest(tmp_path / name, tiny_run.run_id, trainer, ALONE)


def test_muon_goes_on_bit_for_bit(tiny_run: RunConfig, dataset: Dataset, tmp_path: Path) -> None:
    run = replace(tiny_run, train=replace(tiny_run.train, optimizer=Muon()))
    trainer, resumed = (assemble(run, dataset, CPU, ALONE) for _ in range(2))
    for _ in range(3):
        trainer.step()
    checkpoints.save(tmp_path, trainer.state(), ALONE)
    assert checkpoints.load_newest(tmp_path, run.run_id, resumed, ALONE) == []
    assert [resumed.step().loss for _ in range(4)] == [trainer.step().loss for _ in range(4)]
