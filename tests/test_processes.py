"""Work in several processes, which ends with the process that asked for it."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.data import processes


def write_later(path: Path) -> Path:
    time.sleep(2)
    path.write_text("done")
    return path


class Interrupted(list[Path]):
    """Jobs during whose submission Ctrl-C is pressed, after the first."""

    def __getitem__(self, key: object) -> Iterator[Path]:  # type: ignore[override]
        yield next(iter(self))
        raise KeyboardInterrupt


def test_ctrl_c_while_processes_start_does_not_wait_for_their_work(tmp_path: Path) -> None:
    jobs = Interrupted([tmp_path / "first", tmp_path / "second"])
    with pytest.raises(KeyboardInterrupt):
        next(processes.in_order(write_later, jobs, 2))
    assert not list(tmp_path.iterdir())


def test_who_stops_asking_waits_for_nothing(tmp_path: Path) -> None:
    names = [tmp_path / str(number) for number in range(4)]
    results = processes.in_order(write_later, names, 1)
    assert next(results) == names[0]
    results.close()  # type: ignore[attr-defined]
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
