"""Slurm: what our jobs say to sbatch (through submitit), and what squeue and sacct say about them.

The reasons for the settings are in slurm/README.md, under "What our jobs tell Slurm".
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from experiments.design import strict
from experiments.launching.profile import Job, Slurm
from experiments.training.run import SHARING_VARIABLE

ANSWER_SECONDS = 20  # if the controller takes longer, it counts as down
CANCEL_SECONDS = 120  # for scancel, which may have to reach many nodes
# Options of sbatch that the launcher sets itself, or that would change how many jobs there are and where they write.
OWN_OPTIONS = (
    "array", "chdir", "dependency", "error", "export", "job-name", "kill-on-invalid-dep", "nodes", "ntasks",
    "ntasks-per-node", "open-mode", "output", "parsable", "requeue", "no-requeue", "signal", "test-only", "wait",
    "wrap",
)  # fmt: skip
# Variables by which the programs of Slurm take options from the user's shell
_OPTION_VARIABLES = ("SBATCH_", "SALLOC_", "SQUEUE_", "SACCT_", "SINFO_", "SCANCEL_", "SCONTROL_", "SLURM_", "SRUN_")


def check(slurm: Slurm) -> None:
    """Raises ValueError where there is no sbatch, no controller that answers, or no such partition."""
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


def queue(job_ids: Sequence[str], owners: Iterable[int]) -> dict[str, str] | None:
    """Job id -> state, as PENDING or RUNNING, of those still queued; None where the controller does not answer.

    `owners` are the user ids of those who submitted the jobs.
    """
    users = ",".join(map(str, sorted({os.getuid(), *owners})))
    lines = _ask("squeue", "--noheader", "--all", "--array", "--format=%i|%T", f"--user={users}")
    if lines is None:
        return None
    # Sites print notices on standard output, too.
    states = dict(re.findall(r"^(\d+(?:_\d+)?)\|([A-Z_]+)$", lines, re.MULTILINE))
    return {job_id: states[job_id] for job_id in job_ids if job_id in states}


def accounting(job_ids: Sequence[str]) -> dict[str, str]:
    """Job id -> how it ended, e.g. "OUT_OF_MEMORY (exit 0:125)"; empty without accounting."""
    arrays = sorted({job_id.split("_")[0] for job_id in job_ids})
    lines = _ask(
        "sacct",
        "--noheader",
        "--parsable2",
        "--allocations",
        "--format=JobID,State,ExitCode",
        f"--jobs={','.join(arrays)}",
    )
    ends = {}
    for line in (lines or "").splitlines():
        ids, state, code = line.split("|") if line.count("|") == 2 else ("", "", "")  # else a notice of the site
        ends.update(dict.fromkeys(_expanded(ids), f"{state} (exit {code})"))
    return ends


def cancel(job_ids: Sequence[str]) -> None:
    """Raises ValueError where there is no scancel, it does not answer, or it refuses."""
    if shutil.which("scancel") is None:
        raise ValueError("this machine has no scancel; cancel from a login node of the cluster")
    command = ["scancel", *job_ids]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=CANCEL_SECONDS, env=_own_environment()
        )
    except subprocess.TimeoutExpired:
        raise ValueError(f"scancel has not answered for {CANCEL_SECONDS} s; try again") from None
    if done.returncode != 0:
        raise ValueError(f"scancel refused: {_one_line(done.stderr)}")


def submit(calls: Sequence[Callable[[], None]], executor: submitit.SlurmExecutor) -> list[submitit.Job[None]]:
    """One array of jobs, of `max_array_size` at most. Raises ValueError if refused."""
    with _clean_environment():
        try:
            return executor.submit_array(calls)
        except (FailedJobError, FailedSubmissionError) as error:
            raise ValueError(f"sbatch refused: {_one_line(str(error))}") from None


def executor(
    job: Job, slurm: Slurm, *, max_parallel: int, name: str, folder: Path, snapshot: Path, after: str | None = None
) -> submitit.SlurmExecutor:
    """A submitit executor whose script asks for what the profile says; one task for each process of a run."""
    processes_per_node = min(job.gpus, job.gpus_per_node)
    result = submitit.SlurmExecutor(folder=folder, max_num_timeout=job.max_attempts)
    options = {name: value or True for name, value in slurm.options.items()}  # "" stands for a bare flag
    asked = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "time": max(1, round(60 * job.time_limit)),
        "nodes": job.nodes,
        "ntasks_per_node": processes_per_node,
        "cpus_per_task": job.cpus_per_gpu,
        "gpus_per_node": None if job.device == "cpu" else processes_per_node,
        "mem": None if job.memory_gb is None else f"{round(1024 * job.memory_gb)}M",
    }
    result.update_parameters(
        **{key: value for key, value in asked.items() if value is not None},
        job_name=name,
        array_parallelism=max_parallel or 10**6,
        wckey=None,  # submitit's own would be refused where the site checks them; [slurm.options] may name one
        stderr_to_stdout=True,
        # Node failures and preemptions requeue. TERM warns before the time limit, as it does before a preemption.
        additional_parameters={
            "requeue": True,
            "signal": f"TERM@{slurm.signal_seconds}",
            **({"dependency": f"afterok:{after}", "kill_on_invalid_dep": "yes"} if after else {}),
            **options,
        },
        setup=[*slurm.setup, *_setup(snapshot, _sharing(job, slurm))],
        # From 22.05 on, srun no longer takes --cpus-per-task over from sbatch.
        srun_args=["--kill-on-bad-exit=1", "--export=ALL", "--cpu-bind=none", f"--cpus-per-task={job.cpus_per_gpu}"],
    )
    return result


def _sharing(job: Job, slurm: Slurm) -> str:
    """How many runs share the devices, as text; empty where it is not known.

    Slurm gives a GPU to one job, unless the profile asks for shared ones; cores and their memory may be shared.
    """
    may_share = any(name in slurm.options for name in ("oversubscribe", "overcommit", "gres"))
    return "" if job.device == "cpu" or may_share else "1"


def _setup(snapshot: Path, sharing: str) -> list[str]:
    scratch = '"${TMPDIR:-/tmp}/dynconv-$SLURM_JOB_ID"'
    return [
        "export SUBMITIT_PREEMPT_SIGNAL=TERM",
        f"export PYTHONPATH={shlex.quote(str(snapshot))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1  # else the folder that was submitted from comes before the snapshot",
        f"export {SHARING_VARIABLE}={sharing}",
        f"export DYNCONV_SCRATCH={scratch}  # on the node: compilers' caches break on shared file systems",
        "export TRITON_CACHE_DIR=$DYNCONV_SCRATCH/triton TORCHINDUCTOR_CACHE_DIR=$DYNCONV_SCRATCH/inductor",
        """trap 'rm -rf "$DYNCONV_SCRATCH"' EXIT""",
    ]


@contextlib.contextmanager
def _clean_environment() -> Iterator[None]:
    """Remove variables that sbatch would take for options: the user's, and those of the Slurm job that we may be in.

    The user is told of his own, since the profile alone decides.
    """
    kept = dict(os.environ)
    for key in list(os.environ):
        if key.startswith((*_OPTION_VARIABLES, "SUBMITIT_")) and key != "SLURM_CONF":
            del os.environ[key]
    if ignored := sorted(key for key in kept if key.startswith("SBATCH_")):
        print(f"dynconv: {', '.join(ignored)} of this shell: ignored, since the profile decides", file=sys.stderr)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


def _own_environment() -> dict[str, str]:
    """The environment without variables that change what Slurm's programs do or print."""
    return {k: v for k, v in os.environ.items() if not k.startswith(_OPTION_VARIABLES) or k == "SLURM_CONF"}


def max_array_size() -> int:
    """How many jobs an array may have; 1 where the cluster has no arrays (MaxArraySize 0)."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _ask("scontrol", "show", "config") or "", re.MULTILINE)
    return max(1, int(found[1])) if found else 1000


def _ask(*command: str) -> str | None:
    """Standard output, or None where the command is missing, fails or takes too long."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False, env=_own_environment()
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _expanded(ids: str) -> list[str]:
    """sacct's "7", "7_3" and, for elements that never started, "7_[0-2,5%4]" as single ids."""
    pending = re.fullmatch(r"(\d+)_\[([\d,-]+)(?:%\d+)?\]", ids)
    if pending is None:
        return [ids]
    ranges = [part.split("-") for part in pending[2].split(",")]
    return [
        f"{pending[1]}_{index}" for first, *last in ranges for index in range(int(first), int((last or [first])[0]) + 1)
    ]


def _one_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no reason given")
