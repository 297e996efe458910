"""What tests of launching share: a profile of this machine, and how to see where runs stand."""

import time
from collections.abc import Callable
from pathlib import Path

from experiments.design.config import RunConfig
from experiments.launching import states
from experiments.launching import submit as launch
from experiments.launching.profile import Job, Profile

HERE = Profile("local", max_parallel=2, default=Job(device="cpu"))
Submit = Callable[..., launch.Outcome]


def state_of(store: Path, run: RunConfig) -> states.RunState:
    return states.read(store, [run.run_id])[0]


def wait_until(condition: Callable[[], bool], seconds: float = 60.0, said: Callable[[], str] = str) -> None:
    """Fails with what `said` returns if the condition does not hold in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds} s{said()}"
        time.sleep(0.1)
