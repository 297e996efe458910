"""Large builds: killed and gone on with, in several processes, in bounded memory; always the same bytes."""

import fcntl
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import killed_build
import pytest
from launches import PATIENCE, wait_until
from texts import make_texts, specify, visible, write_txt

from experiments.data import documents, encode, processes, reading
from experiments.data.build import build
from experiments.data.dataset import Dataset
from experiments.data.forecast import forecast
from experiments.data.formats import read_documents
from experiments.design.data import DataConfig


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Some twelve buckets a split, and five parts."""
    monkeypatch.setattr(reading, "PART_BYTES", 10_000)
    monkeypatch.setattr(documents, "BUCKET_BYTES", 4_000)
    return specify(write_txt(tmp_path / "txt", make_texts()))


@pytest.fixture
def sha256(spec: DataConfig, tmp_path: Path) -> str:
    """Of the dataset, built at once."""
    return Dataset.open(build(spec, tmp_path / "at once")).sha256


def left_over(cache: Path) -> list[Path]:
    return [path for path in visible(cache) if path.is_dir() and path.name.startswith(".")]


def test_an_interrupted_build_goes_on_where_it_was(
    spec: DataConfig, sha256: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[encode.Job] = []
    encode_one = encode.encode_one

    def interrupted(job: encode.Job, *arguments: Any) -> None:
        if len(made) == 5:
            raise KeyboardInterrupt
        if not encode.is_whole(job):
            made.append(job)
        encode_one(job, *arguments)

    monkeypatch.setattr(encode, "encode_one", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(spec, tmp_path / "cache")
    (working,) = left_over(tmp_path / "cache")
    damaged = sorted(working.glob("tokens-*/train-bucket-*.ids"))[2]
    damaged.write_bytes(damaged.read_bytes()[::-1])
    monkeypatch.setattr(encode, "encode_one", encode_one)
    torn = working / "spill" / "part-002"
    (torn / "counts.json").unlink()
    read: list[Path] = []
    monkeypatch.setattr(
        reading, "read_documents", lambda path, spec: (read.append(path), read_documents(path, spec))[1]
    )
    assert len(list(working.glob("tokens-*/*.ids"))) == 5
    path = build(spec, tmp_path / "cache")
    assert Dataset.open(path).sha256 == sha256
    assert visible(tmp_path / "cache") == [path]
    assert 0 < len(read) < len(make_texts()) / 2


def test_what_killed_builds_left_goes_in_time(tmp_path: Path, spec: DataConfig) -> None:
    cache, host = tmp_path / "cache", socket.gethostname()
    recent, old, in_use = (cache / f".text-300-{name}.{host}.abc" for name in ("recent", "old", "used"))
    for folder in (recent, old, in_use):
        (folder / "spill").mkdir(parents=True)
    for folder in (old, in_use):
        os.utime(folder, (0, 0))
    with (cache / ".text-300-used.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build(spec, cache)
    assert set(left_over(cache)) == {recent, in_use}


def test_what_a_killed_build_left_is_used_bucket_by_bucket(spec: DataConfig, tmp_path: Path) -> None:
    """encode_one leaves a whole bucket alone, and makes a damaged one again."""
    text = tmp_path / "spill"
    with documents.Part(text / "part-000", 1) as part:
        for each in make_texts():
            part.add(each.encode())
    documents.finish(text, 1, held_out_by_name=False)
    trained = build(spec, tmp_path / "cache") / "tokenizer.json"
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "tokenizer.json").write_bytes(trained.read_bytes())
    job = encode.Job(tmp_path / "tokens", text, "train", 0, 10**6, 300, spec.end_of_text)
    encode.encode_one(job)
    ids = job.path.with_suffix(".ids")
    whole, written = ids.read_bytes(), ids.stat().st_mtime_ns
    encode.encode_one(job)
    assert ids.stat().st_mtime_ns == written
    ids.write_bytes(whole[:-2])
    encode.encode_one(job)
    assert ids.read_bytes() == whole


def test_processes_make_the_same_bytes(
    spec: DataConfig, sha256: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    path = build(spec, tmp_path / "cache")
    assert Dataset.open(path).sha256 == sha256
    assert visible(tmp_path / "cache") == [path]


CODE = """
import json, os, sys
from pathlib import Path
from experiments.data import documents, processes, reading
from experiments.data.build import build
from experiments.design.data import DataConfig
documents.BUCKET_BYTES, processes.PARALLEL_BYTES, reading.PART_BYTES = 4_000, 0, 10_000
os.sched_getaffinity = lambda _: {0, 1}
if __name__ == "__main__":
    print(build(DataConfig(**json.loads(sys.argv[1])), Path(sys.argv[2])))
"""


def processes_of(group: int) -> list[str]:
    listed = subprocess.run(["ps", "-o", "stat=", "-o", "args=", "-s", str(group)], capture_output=True, text=True)
    return [line for line in listed.stdout.splitlines() if not line.startswith("Z")]


@pytest.mark.slow
def test_killed_five_times_at_random_the_build_ends_as_if_made_at_once(
    spec: DataConfig, sha256: str, tmp_path: Path
) -> None:
    """The builder alone is killed, as by the kernel: its workers leave by themselves."""
    cache = tmp_path / "cache"
    rng, kills, window = random.Random(1), 0, 0.5
    while True:
        left = set(left_over(cache)) if cache.is_dir() else set()
        command = [sys.executable, "-c", CODE, json.dumps(vars(spec)), str(cache)]
        builder = subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if kills == 5:
            assert builder.wait(PATIENCE) == 0
            break
        # Until it is at work, in a folder of its own.
        while not (cache.is_dir() and set(left_over(cache)) - left) and builder.poll() is None:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, window))
        builder.send_signal(signal.SIGKILL)
        killed = builder.wait() == -signal.SIGKILL
        assert killed or builder.returncode == 0
        kills += killed
        window *= 1.2 if killed else 0.5  # so that at any speed about four are killed to one that ends
        wait_until(lambda group=builder.pid: processes_of(group) == [])
        for path in set(visible(cache)) - set(left_over(cache)):
            assert Dataset.open(path).sha256 == sha256
            shutil.rmtree(path)
    (path,) = visible(cache)
    data = Dataset.open(path)
    data.verify()
    assert data.sha256 == sha256


@pytest.mark.slow
def test_the_command_that_kills_builds_of_any_size(tmp_path: Path) -> None:
    """tests/killed_build.py, which is run by hand at 2 GB, on a sample; the test above is sure to kill one at work."""
    shown = killed_build.show(tmp_path, 2_000_000, vocabulary=512, kills=2)
    assert shown["same"]
    assert not shown["last"]["killed"]


def test_the_cost_of_a_large_build_is_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the paper's 100 billion tokens, from a file that takes no room on disk."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_300 * 10**9))
    with (tmp_path / "a.txt").open("wb") as file:
        file.truncate(400 * 10**9)
    spec = specify(tmp_path, vocabulary=100_352, train_tokens=10**11, validation_tokens=10**7)
    line = forecast(spec, tmp_path)
    assert line is not None
    # On 64 cores (400e9 / 100e6 + 100e9 / 0.86e6) / 64 s, and in one process (400e9 + 800e9) / 0.5e9 s
    assert "100B tokens of 400 GB of text, about 1.19 h on 64 cores (34.1 h on one)" in line
    assert "1,200 GB of disk meanwhile and 400 GB then" in line
    assert "free: choose another place with DYNCONV_CACHE" not in line
    assert "too little" not in line
    by_jobs = str(forecast(spec, tmp_path, 200))  # no more than 128 have work
    assert "about 55.7 min by 128 jobs (34.1 h on one)" in by_jobs
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_100 * 10**9))
    assert f"; {tmp_path} has 1,100 GB free: choose another place with DYNCONV_CACHE" in str(forecast(spec, tmp_path))
    (tmp_path / "a.txt").write_text("a short text")
    assert str(forecast(spec, tmp_path)).endswith("; that may be too little text")
    assert str(forecast(specify(tmp_path), tmp_path)).endswith("; that may be too little text")  # though built at once
    (tmp_path / "a.txt").write_text("a longer text" * 100_000)
    assert forecast(specify(tmp_path), tmp_path) is None
    missing = specify(tmp_path / "nowhere", vocabulary=100_352, train_tokens=10**11, validation_tokens=10**7)
    assert "100B tokens of 450 GB of text (not there yet; 4.5 bytes a token are assumed), about 1." in str(
        forecast(missing, tmp_path)
    )
