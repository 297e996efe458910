"""Builds that the jobs of a cluster share: in any order of work and with any kills, the same bytes as one build."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launches import PATIENCE
from texts import make_texts, specify, visible, write_txt

from experiments.data import documents, encode, reading, steps, writing
from experiments.data.build import build
from experiments.data.dataset import Dataset
from experiments.design.data import DataConfig
from experiments.launching import data_jobs, slurm
from experiments.launching.profile import Profile, Slurm


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Fifteen buckets a split, and six parts."""
    monkeypatch.setattr(reading, "PART_BYTES", 10_000)
    monkeypatch.setattr(documents, "BUCKET_BYTES", 4_000)
    return specify(write_txt(tmp_path / "txt", make_texts()), drop_near_copies=True)


@pytest.fixture
def sha256(spec: DataConfig, tmp_path: Path) -> str:
    """Of the dataset, built at once."""
    return Dataset.open(build(spec, tmp_path / "at once")).sha256


def begin(spec: DataConfig, cache: Path) -> steps.Shared:
    shared = steps.begin(spec, cache)
    assert isinstance(shared, steps.Shared)
    return shared


@pytest.mark.parametrize("workers", [1, 3, 50])
def test_shared_steps_make_the_same_dataset(spec: DataConfig, sha256: str, tmp_path: Path, workers: int) -> None:
    shared = begin(spec, tmp_path / "cache")
    assert shared.counts() == {"read": 6, "collect": 1, "tokenize": 2 * 15, "publish": 1}
    for step, pieces in shared.counts().items():
        for worker in random.Random(workers).sample(range(workers), workers) if pieces > 1 else [0]:
            steps.run(shared, step, worker, workers if pieces > 1 else 1)
    path = steps.begin(spec, tmp_path / "cache")
    assert isinstance(path, Path)
    data = Dataset.open(path)
    data.verify()
    assert data.sha256 == sha256
    assert visible(tmp_path / "cache") == [path]
    assert build(spec, tmp_path / "cache") == path
    assert path.stat().st_mode & 0o777 == (tmp_path / "txt").stat().st_mode & 0o777


def test_buckets_after_enough_tokens_are_left_alone(spec: DataConfig, tmp_path: Path) -> None:
    spec = specify(spec.source, train_tokens=1000)
    shared = begin(spec, tmp_path / "cache")
    for step in ("read", "collect", "tokenize"):
        steps.run(shared, step, 0, 1)
    made = {path.stem for path in shared.folder.glob("tokens-*/train-bucket-*.ids")}
    assert made == {"train-bucket-000", "train-bucket-001"}


def test_what_is_whole_is_not_made_again(spec: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a step was ended half-way, and one of its files was damaged."""
    shared = begin(spec, tmp_path / "cache")
    steps.run(shared, "read", 0, 2)
    whole = {path: path.stat().st_ino for path in shared.folder.glob("spill/part-*")}
    assert len(whole) == 3
    steps.run(shared, "read", 0, 1)
    steps.run(shared, "collect", 0, 1)
    assert {path: path.stat().st_ino for path in whole} == whole
    with monkeypatch.context() as patch:
        patch.setattr(writing, "_leave_out_near_copies", lambda *_: pytest.fail("looked for again"))
        patch.setattr(writing.bpe, "train", lambda *_: pytest.fail("trained again"))
        steps.run(shared, "collect", 0, 1)
        steps.run(shared, "tokenize", 1, 2)
    made = sorted(shared.folder.glob("tokens-*/*.ids"))
    damaged = made[-1]
    before = damaged.read_bytes()
    damaged.write_bytes(before[::-1])
    times = {path: path.stat().st_mtime_ns for path in made[:-1]}
    steps.run(shared, "tokenize", 0, 1)
    assert damaged.read_bytes() == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_a_dataset_that_is_there_already_ends_the_steps(
    spec: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of text that was touched since, so that only reading tells."""
    path = build(spec, tmp_path / "cache")
    (Path(spec.source) / "0000.txt").touch()
    shared = begin(spec, tmp_path / "cache")
    monkeypatch.setattr(writing, "prepare", lambda *_: pytest.fail("built again"))
    for step in steps.STEPS:
        steps.run(shared, step, 0, 1)
    assert steps.begin(spec, tmp_path / "cache") == path


def killed(*_: object) -> list[bytes]:
    raise KeyboardInterrupt


def test_a_step_that_begins_again_takes_nothing_away(tmp_path: Path) -> None:
    """As of a lost node, which is killed right after: near copies that were found stay left out."""
    texts = ["\n".join(f"line {number} of {text}" for number in range(40)) for text in make_texts()]
    texts += [f"another first line\n{text}" for text in texts]
    spec = specify(write_txt(tmp_path / "copied", texts), drop_near_copies=True, validation_tokens=100)
    shared = begin(spec, tmp_path / "cache")
    steps.run(shared, "read", 0, 1)
    steps.run(shared, "collect", 0, 1)
    left_out = shared.folder / "spill" / documents.LEFT_OUT
    whole = left_out.read_bytes()
    assert len(whole) > 0
    (shared.folder / writing.PREPARED).unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "find_near_copies", killed)
        with pytest.raises(KeyboardInterrupt):
            steps.run(shared, "collect", 0, 1)
    assert left_out.read_bytes() == whole


CODE = """
import sys
from experiments.data import documents, reading, steps
documents.BUCKET_BYTES, reading.PART_BYTES = 4_000, 10_000
steps.main()
"""


def start(shared: steps.Shared, step: str, worker: int, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", CODE, str(shared.folder), step, str(worker), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_workers_killed_at_random_and_started_twice_do_no_harm(spec: DataConfig, sha256: str, tmp_path: Path) -> None:
    """A step is done when a worker of each share has ended well, as Slurm has it; others of the same share, which a
    lost node still runs, are killed at any time: before they begin, too, where the machine is slow."""
    shared, rng = begin(spec, tmp_path / "cache"), random.Random(0)
    for step, pieces in shared.counts().items():
        workers = min(2, pieces)
        doomed = [start(shared, step, worker, workers) for worker in range(workers)]
        time.sleep(rng.uniform(0.2, 1.2))
        working = [start(shared, step, worker, workers) for worker in range(workers)]
        time.sleep(rng.uniform(0, 0.6))
        for process in doomed:
            process.send_signal(signal.SIGKILL)
            process.wait()
        for process in working:
            process.wait(PATIENCE)
        for worker in range(workers):  # the two may have been in each other's way: once more, alone
            assert start(shared, step, worker, workers).wait(PATIENCE) == 0
    (path,) = visible(tmp_path / "cache")
    data = Dataset.open(path)
    data.verify()
    assert data.sha256 == sha256


def test_a_step_that_fails_says_why(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spec = specify(write_txt(tmp_path / "txt", make_texts()), train_tokens=10**6)
    shared = begin(spec, tmp_path / "cache")
    for step in ("read", "collect", "tokenize", "publish"):
        command = [sys.executable, "-m", "experiments.data.steps", str(shared.folder), step, "0", "1"]
        done = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.returncode == 1
    said = steps.failure_of(shared.folder).read_text()
    assert said.startswith("publish: train_tokens must be at most what the corpus holds; got 1000000")
    assert "Traceback" in capfd.readouterr().err


def test_what_a_folder_was_begun_with_is_what_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another working directory; and other text is another build."""
    write_txt(tmp_path / "txt", make_texts())
    monkeypatch.chdir(tmp_path)
    shared = begin(specify("txt"), tmp_path / "cache")
    assert begin(specify(tmp_path / "txt"), tmp_path / "cache") == shared
    record: dict[str, Any] = json.loads((shared.folder / steps.RECORD).read_text())
    assert record["spec"]["source"] == str(tmp_path / "txt")
    assert steps.under_way(specify("txt"), tmp_path / "cache") == shared
    assert steps.under_way(specify("txt", train_tokens=5000), tmp_path / "cache") is None
    (tmp_path / "txt" / "new.txt").write_text("new")
    assert begin(specify("txt"), tmp_path / "cache") != shared
    monkeypatch.chdir("/")
    assert shared.source().found.files[0].path == tmp_path / "txt" / "0000.txt"


def test_counting_a_bucket_reads_none(spec: DataConfig, tmp_path: Path) -> None:
    shared = begin(spec, tmp_path / "cache")
    for step in ("read", "collect", "tokenize"):
        steps.run(shared, step, 0, 1)
    source = shared.source()
    prepared = writing.prepare(shared.folder, source.spec, source.found, None)
    (first, *_) = writing.jobs(prepared, source.spec, "validation")
    assert encode.count(first) == first.path.with_suffix(".ids").stat().st_size // 2
    assert encode.count(first._replace(bucket=99)) == 0


def test_the_first_jobs_are_cancelled_if_a_later_one_is_refused(
    spec: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the same command would find them in the queue, and nothing would come after them."""
    answers, cancelled, queued = iter(["7", "8"]), list[str](), list[str]()

    def sbatch(_: str) -> str:
        for job_id in answers:
            queued.append(job_id)
            return job_id
        raise ValueError("sbatch refused: too many")

    monkeypatch.setattr(slurm, "check", lambda _: None)
    monkeypatch.setattr(slurm, "queue", lambda ids, _: dict.fromkeys(set(ids) & {f"{one}_0" for one in queued}))
    monkeypatch.setattr(slurm, "max_array_size", lambda: 1)
    monkeypatch.setattr(slurm, "cancel", cancelled.extend)
    monkeypatch.setattr(data_jobs, "_sbatch", sbatch)
    for _ in range(2):
        with pytest.raises(ValueError, match="sbatch refused: too many"):
            data_jobs.build(spec, Profile("slurm", slurm=Slurm("p")), tmp_path / "cache")
    assert cancelled == ["7", "8"]
