"""Calls Slurm's programs, except sbatch (see sbatch.py), and parses what they say about the cluster and its jobs."""

import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.design import strict
from experiments.launching.profile import Slurm

ANSWER_SECONDS = 20  # A controller that takes longer counts as down.
CANCEL_SECONDS = 120  # timeout of scancel, which may have to reach many nodes
_CLOCKS_APART = 86400.0  # seconds by which a controller's clock may differ from ours
# Options of sbatch that the launcher sets itself, or that would change the number of jobs or where they write.
OWN_OPTIONS = (
    "array", "chdir", "dependency", "error", "export", "job-name", "kill-on-invalid-dep", "nodes", "ntasks",
    "ntasks-per-node", "open-mode", "output", "parsable", "requeue", "no-requeue", "signal", "test-only", "wait",
    "wrap",
)  # fmt: skip
# Prefixes of environment variables that set options of Slurm's programs and of submitit
_OPTION_VARIABLES = (
    "SBATCH_",
    "SALLOC_",
    "SQUEUE_",
    "SACCT_",
    "SINFO_",
    "SCANCEL_",
    "SCONTROL_",
    "SLURM_",
    "SRUN_",
    "SUBMITIT_",
)


def check(slurm: Slurm) -> None:
    """Raises ValueError if there is no sbatch, the controller does not answer, a partition does not exist, or the
    profile sets one of OWN_OPTIONS."""
    if shutil.which("sbatch") is None:
        raise ValueError(
            "the profile wants Slurm and this machine has no sbatch; submit from a login node of the cluster, "
            "bring up slurm/cluster, or use slurm/profiles/local.toml"
        )
    configuration = os.environ.get("SLURM_CONF")
    if configuration and not Path(configuration).exists():
        raise ValueError(f"SLURM_CONF={configuration} does not exist; bring the cluster up, or unset SLURM_CONF")
    partitions = _ask("sinfo", "--all", "--noheader", "--format=%R")
    if partitions is None:
        raise ValueError(
            "Slurm's controller does not answer (sinfo failed); if this is the one-node cluster, "
            'run eval "$(slurm/cluster/up)" in this shell'
        )
    for partition in slurm.partition.split(","):
        strict.choose(partition, sorted(set(partitions.split())), "the cluster has no such partition")
    own = sorted(name for name in slurm.options if name.replace("_", "-") in OWN_OPTIONS)
    if own:
        names = ", ".join(own)
        raise ValueError(f"[slurm.options] must leave to the launcher what it sets itself; got {names}; remove it")


@dataclass(frozen=True)
class Queued:
    """A job that has not ended, as squeue describes it."""

    state: str  # such as PENDING or RUNNING
    reason: str | None = None  # Slurm's reason why it waits, such as "Priority"
    start: float | None = None  # unix seconds; the expected start of a waiting job
    nodes: str | None = None


@dataclass(frozen=True)
class Ended:
    """One start of a job, as sacct describes it. A requeued job has several; the last may not have ended yet.

    A job that never started has neither nodes nor times.
    """

    state: str  # such as PREEMPTED, or "CANCELLED by 1000"
    exit_code: str  # exit code and signal, such as "1:0"
    nodes: str | None = None
    start: float | None = None  # unix seconds
    end: float | None = None


def queue(job_ids: Sequence[str], owners: Iterable[int]) -> dict[str, Queued] | None:
    """Job id -> its entry in squeue, for jobs that have not ended; None if the controller does not answer.

    `owners` are the user ids of those who submitted the jobs.
    """
    users = ",".join(map(str, sorted({os.getuid(), *owners})))
    lines = _ask("squeue", "--noheader", "--all", "--array", "--format=%i|%T|%r|%S|%N", f"--user={users}")
    if lines is None:
        return None
    # Sites may print notices on standard output, too.
    found = re.findall(r"^(\d+(?:_\d+)?)\|([A-Z_]+)\|([^|\n]*)\|([^|\n]*)\|([^|\n]*)$", lines, re.MULTILINE)
    wanted = set(job_ids)
    return {
        job_id: Queued(state, None if reason == "None" else reason, _unix(start), nodes or None)
        for job_id, state, reason, start, nodes in found
        if job_id in wanted
    }


def accounting(job_ids: Sequence[str]) -> dict[str, list[Ended]]:
    """Job id -> its starts in order, of which the last is the current one. Empty if the cluster has no accounting."""
    arrays = sorted({job_id.split("_")[0] for job_id in job_ids})
    columns = "JobID,State,ExitCode,NodeList,Start,End"
    command = ("sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", f"--format={columns}")
    ends: dict[str, list[Ended]] = {}
    for line in (_ask(*command, f"--jobs={','.join(arrays)}") or "").splitlines():
        if line.count("|") != columns.count(","):  # a notice of the site
            continue
        ids, state, code, nodes, start, end = line.split("|")
        one = Ended(state, code, None if nodes in ("", "None assigned") else nodes, _unix(start), _unix(end))
        for job_id in _expanded(ids):
            ends.setdefault(job_id, []).append(one)
    for starts in ends.values():
        starts.sort(key=lambda one: math.inf if one.start is None else one.start)
    return ends


def _unix(text: str) -> float | None:
    """A time of Slurm's, in this machine's time zone, as Unix seconds; None for "N/A", "Unknown" and "None"."""
    try:
        return time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S"))
    except ValueError:
        return None


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs. Raises ValueError if there is no scancel, it does not answer, or it refuses."""
    if shutil.which("scancel") is None:
        raise ValueError("this machine has no scancel; cancel from a login node of the cluster")
    command = ["scancel", *job_ids]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=CANCEL_SECONDS, env=environment()
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"scancel has not answered for {CANCEL_SECONDS} s; try again") from None
    if done.returncode != 0:
        raise ValueError(f"scancel refused: {one_line(done.stderr)}")


def find(name: str, since: float) -> str | None:
    """The id of the job or array of this name, submitted at `since` (unix seconds) or later; None if Slurm has none.

    Raises ValueError if the controller does not answer. Without accounting, jobs that ended some minutes ago are not
    found.
    """
    queued = _ask("squeue", "--noheader", "--all", "--states=all", f"--name={name}", "--format=%F")
    if queued is None:
        raise ValueError("Slurm's controller does not answer (squeue failed); try again when it does")
    begin = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - _CLOCKS_APART))
    columns = ("--noheader", "--parsable2", "--allocations", "--format=JobID")
    ended = _ask("sacct", *columns, f"--name={name}", f"--starttime={begin}")
    # Sites may print notices on standard output, too.
    found = re.findall(r"^(\d+)(?:_\S+)?$", f"{queued}\n{ended or ''}", re.MULTILINE)
    return min(found, key=int) if found else None


def limit_running(array: str, count: int) -> None:
    """Let `count` jobs of an array run at once, or any number if it is 0. Raises ValueError if Slurm refuses."""
    command = ["scontrol", "update", f"JobId={array}", f"ArrayTaskThrottle={count}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=ANSWER_SECONDS, env=environment()
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        raise ValueError(f"scontrol does not answer, so max_parallel of array {array} stays as it was") from None
    if done.returncode != 0:
        raise ValueError(f"scontrol refused to change max_parallel of array {array}: {one_line(done.stderr)}")


def environment() -> dict[str, str]:
    """This process's environment without variables that change what Slurm's programs do or print.

    These are the user's, and those of a Slurm job that this process may be part of.
    """
    return {k: v for k, v in os.environ.items() if not k.startswith(_OPTION_VARIABLES) or k == "SLURM_CONF"}


def max_array_size() -> int:
    """How many jobs an array may have; 1 if the cluster has no arrays (MaxArraySize 0)."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config") or "", re.MULTILINE)
    return max(1, int(found[1])) if found else 1000


def _ask(*command: str) -> str | None:
    """The command's standard output, or None if it is missing, fails or takes longer than ANSWER_SECONDS."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False, env=environment()
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _expanded(ids: str) -> list[str]:
    """The single ids in sacct's "7", "7_3" or, for elements of an array that never started, "7_[0-2,5%4]"."""
    pending = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", ids)
    if pending is None:
        return [ids]
    ranges = [part.split("-") for part in pending[2].split(",")]
    return [
        f"{pending[1]}_{index}" for first, *last in ranges for index in range(int(first), int((last or [first])[0]) + 1)
    ]


def one_line(text: str) -> str:
    """The first line of a program's output that mentions an error, else its first line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no reason given")
