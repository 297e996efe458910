"""Why a run's job ended, in one line: from what the job printed, and from what Slurm's accounting says."""

import pwd
import re
import signal
from pathlib import Path

from experiments.launching.slurm import Ended

TAIL_BYTES = 1 << 16
# Lines that report progress and not a cause: messages of submitit and srun, our steps, frames of tracebacks
_COURSE = re.compile(
    r"submitit (INFO|WARNING|ERROR) |job \d+(_\d+)?: |attempt \d+, from step |step \d+/\d+  |stopping \d+ runs|"
    r"ends as it was told to|"
    r"\s|[~^]+$|(The above|During handling of the above) exception|"
    r"srun: (?!error)|srun: error: .*(Exited with exit code|Terminating|Timed out waiting for job step)|"
    r"slurmstepd: .*(exited? (with|before)|Exited with)"
)
_STARTED = re.compile(r"submitit INFO .* Starting with |job \d+(_\d+)?: |attempt \d+, from step ")
_CANCELLED = re.compile(
    r"slurmstepd.*: error: \*\*\* (?:JOB|STEP) \S+ ON (\S+) CANCELLED AT \S+(?: DUE TO (.*?))? \*\*\*"
)
_OUT_OF_MEMORY = re.compile(r"slurmstepd.*: error: .*oom.kill|srun: error: .*: Out Of Memory", re.IGNORECASE)
_KILLED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (?!Exited)(.+)")
_EXCEPTION = re.compile(r"(?:[A-Za-z_]\w*\.)*([A-Z]\w*)(?:: (.*))?$")
_SCRIPT = re.compile(r"^\S*/slurm_script: (?=line )")  # The path contains the job's number.
# Exceptions of our own layers and submitit's that only repeat an earlier one
_PASSED_ON = ("RunFailed", "SystemExit", "FailedJobError", "UncompletedJobError")


def cause_in_log(log: Path) -> str | None:
    """The line of a job's output that says why its last start ended; None if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return None
    return cause_in(lines)


def cause_in(lines: list[str]) -> str | None:
    """As `cause_in_log`, from the lines of the output.

    Running out of memory is looked for first, since its consequences look like a killed process. Otherwise the first
    event is the cause, and later ones, such as the exit of the other processes, are its consequences.
    """
    boundaries = [number for number, line in enumerate(lines) if _STARTED.match(line) or _CANCELLED.match(line)]
    last = lines[boundaries[-1] + 1 :] if boundaries else lines
    if found := _event(last) or _remark(last):
        return found
    cancelled = _CANCELLED.match(lines[boundaries[-1]]) if boundaries else None
    if cancelled is None:
        return None
    return f"ended on {cancelled[1]}" + (f" due to {cancelled[2].lower()}" if cancelled[2] else "")


def _event(lines: list[str]) -> str | None:
    """The first exception or killed process in the output, or that memory ran out."""
    if any(_OUT_OF_MEMORY.match(line) for line in lines):
        return "out of memory; raise memory_gb in the profile"
    in_traceback = False
    for line in lines:
        if line.startswith("Traceback (most recent call last)"):
            in_traceback = True
        elif in_traceback and line and not line[0].isspace():
            in_traceback = False
            if not _passed_on(line):
                return line
        elif killed := _KILLED.match(line):
            return f"process {killed[2]} on {killed[1]}: {killed[3]}"
    return None


def _remark(lines: list[str]) -> str | None:
    """The last line that does not merely report progress."""
    said = [line.strip() for line in lines if line.strip() and not _COURSE.match(line)]
    last = next((line for line in reversed(said) if not _passed_on(line)), None)
    return None if last is None else _SCRIPT.sub("the job's script, ", last)


def _passed_on(line: str) -> bool:
    """Whether the line is an exception that only repeats an earlier one."""
    found = _EXCEPTION.match(line)
    return found is not None and found[1] in _PASSED_ON


def cause_of(ended: Ended | None, log: Path | None) -> str:
    """Why a job left Slurm's queue without a result, by the accounting and its output, if there are any."""
    if ended is None or ended.state in ("RUNNING", "PENDING", "REQUEUED", "SUSPENDED"):  # unknown or out of date
        said = cause_in_log(log) if log else None
        return f"it left the queue without a result{f': {said}' if said else ''}"
    said = None
    if ended.state in ("FAILED", "COMPLETED"):  # Other states are causes themselves.
        said = (cause_in_log(log) if log else None) or exited(ended.exit_code)
    elif ended.state == "OUT_OF_MEMORY":
        said = "raise memory_gb in the profile"
    return f"Slurm says {how_ended(ended)}" + (f": {said}" if said else "")


def how_ended(ended: Ended) -> str:
    """Slurm's state of a job that ended, with the name of the user who cancelled it or of the node that failed."""
    if ended.state.startswith("CANCELLED by "):
        uid = ended.state.removeprefix("CANCELLED by ")
        return f"CANCELLED by {user(int(uid)) if uid.isdigit() else uid}"
    if ended.state in ("NODE_FAIL", "BOOT_FAIL") and ended.nodes:
        return f"{ended.state} on {ended.nodes}"
    return ended.state


def user(number: int) -> str:
    """The name of the user with this id, or the id if this machine does not know it."""
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def exited(code: str) -> str | None:
    """sacct's exit code, such as "3:0" or "0:9", in words; None for a success, and for text of another form."""
    found = re.fullmatch(r"(\d+):(\d+)", code)
    if found is None:
        return None
    exit_code, number = int(found[1]), int(found[2])
    number = number or (exit_code - 128 if exit_code > 128 else 0)  # as a shell reports a program that was killed
    if number:
        names = {each.value: each.name for each in signal.Signals}
        return f"ended by {names.get(number, f'signal {number}')}"
    return f"it exited with code {exit_code}" if exit_code else None
