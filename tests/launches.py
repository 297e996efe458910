"""What tests of launching share: a profile of this machine, how to see where runs stand, and runs that last."""

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.design.config import RunConfig
from experiments.launching import snapshot, states
from experiments.launching import submit as launch
from experiments.launching.profile import Job, Profile

HERE = Profile("local", max_parallel=2, default=Job(device="cpu"))
PATIENCE = 300.0  # seconds for what takes one or ten on a machine that is not loaded
Submit = Callable[..., launch.Outcome]
IMPORTS = """
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
"""  # of `slowly`


def state_of(store: Path, run: RunConfig) -> states.RunState:
    return states.read(store, [run.run_id])[0]


def wait_until(condition: Callable[[], bool], seconds: float = PATIENCE, said: Callable[[], str] = str) -> None:
    """Fails with what `said` returns if the condition does not hold in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not so within {seconds} s{said()}"
        time.sleep(0.1)


def slowly(look: Callable[[Any], bool], file: str, after: int) -> Callable[[Any], bool]:
    """Instead of `_Attempt._folder_taken`, which the training loop calls before each step: from step `after` on, a step
    takes a tenth of a second as long as `file` is there.

    So a run that is to be stopped half-way is not at its end before, however fast the machine is.
    """

    def look_slowly(attempt: Any) -> bool:
        if attempt._step > after and Path(file).exists():
            time.sleep(0.1)
        return look(attempt)

    return look_slowly


def slow_down(store: Path, after: int = 0) -> Path:
    """Let runs that are submitted to `store` take their steps as in `slowly`, until the file that this returns goes."""
    store.mkdir(exist_ok=True)
    return slow_down_code(snapshot.take(store), after)


def slow_down_code(code: Path, after: int = 0) -> Path:
    """`slow_down` for what runs the copy of the packages in the folder `code`."""
    file = code / "slowly"
    file.touch()
    added = f"_Attempt._folder_taken = slowly(_Attempt._folder_taken, {str(file)!r}, {after})"
    with (code / "experiments" / "training" / "run.py").open("a") as module:
        module.write(f"\n{IMPORTS}\n\n{inspect.getsource(slowly)}\n\n{added}\n")
    return file
