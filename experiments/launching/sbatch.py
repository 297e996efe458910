"""Writes our batch scripts, by way of submitit, submits them to sbatch, and interprets its answer.

The reasons for the settings are in slurm/README.md, under "What our jobs tell Slurm".
"""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import submitit

from experiments.launching import slurm, worker
from experiments.launching.profile import Job, Slurm
from experiments.terminal import warn
from experiments.training.compile_cache import VARIABLES
from experiments.training.provenance import SHARING_VARIABLE

LOOK_SECONDS = 30.0  # how long to look for a submission if sbatch did not say whether it was accepted
_PAUSE = 2.0  # seconds between two looks
REQUEUE_TRIES = 60  # attempts of a batch script to requeue its job, ten seconds apart
# Errors of sbatch if it got no answer from the controller, so that the jobs may have been accepted.
_NO_ANSWER = re.compile(r"timed out|unable to contact|connect|communication|zero bytes|unexpected message|socket", re.I)
# The limit that was exceeded, such as AssocMaxSubmitJobLimit; older versions do not name it.
_LIMIT = re.compile(r"\b[A-Z]\w+Limit\b")
# The run itself chooses a folder on the node. The shell's may be on a shared file system, where these caches break.
_NO_CACHES = f"unset {' '.join(VARIABLES)}"
_TOO_MANY = re.compile(r"job submit limit|Invalid job array|unable to accept job", re.I)


class TooMany(ValueError):
    """More jobs were submitted than may be queued; sbatch may accept fewer."""


class Unanswered(ValueError):
    """It is not known whether Slurm has the jobs."""


def submit(script: str, folder: Path, name: str) -> str:
    """Write the script to `folder` and submit it. Returns the id of the array, or of the single job.

    sbatch can fail although the jobs were accepted, so after an error they are looked for by `name`. Raises ValueError
    if they were refused, TooMany if sbatch may accept fewer, and Unanswered if it is not known whether Slurm has them.
    Ctrl-C kills sbatch, which also leaves that unknown.
    """
    path, since = folder / "submission.sh", time.time()
    path.write_text(script)
    # sbatch gets a session of its own, so that signals from the terminal do not end it half-way.
    with subprocess.Popen(
        ["sbatch", str(path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=slurm.environment(),
        start_new_session=True,
    ) as sbatch:
        try:
            answer, errors = sbatch.communicate()
        except BaseException:
            os.killpg(sbatch.pid, signal.SIGKILL)
            sbatch.wait()
            raise
    # Sites may print notices, too, which may name other jobs.
    if sbatch.returncode == 0 and (accepted := re.search(r"^Submitted batch job (\d+)", answer, re.MULTILINE)):
        return accepted[1]
    said = slurm.one_line(errors or answer)
    reasons = "\n".join(line for line in errors.splitlines() if "error" in line.lower())  # leaves out notices
    known = sbatch.returncode > 0 and reasons != "" and not _NO_ANSWER.search(reasons)
    if found := _look(name, since, 0.0 if known else LOOK_SECONDS):
        warn(f"sbatch said: {said}; Slurm has the jobs all the same, as {found}")
        return found
    if not known:
        raise Unanswered(f"sbatch said: {said}; whether Slurm has the jobs is not known yet: submit again to find out")
    raise (TooMany if _too_many(reasons) else ValueError)(f"sbatch refused: {said}")


def _too_many(reasons: str) -> bool:
    """Whether sbatch refused because the user, the account or the array may not have so many jobs."""
    if limits := _LIMIT.findall(reasons):
        return any("Submit" in limit for limit in limits)
    return _TOO_MANY.search(reasons) is not None


def _look(name: str, since: float, seconds: float) -> str | None:
    """The id of the jobs of this name, once Slurm knows it; None if it does not within `seconds`."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(ValueError):
            if found := slurm.find(name, since):
                return found
        if time.monotonic() > end:
            return None
        time.sleep(_PAUSE)


def script(
    job: Job,
    profile: Slurm,
    *,
    count: int,
    max_parallel: int,
    name: str,
    folder: Path,
    snapshot: Path,
    after: str | None = None,
    module: str = worker.__name__,
) -> str:
    """The batch script of an array of `count` jobs, or of a single job, with the resources of the profile.

    A job has one task for each process of its run. The tasks execute `module` with `folder` as the argument. `after` is
    the id of a job that must succeed first.
    """
    python = shlex.quote(sys.executable) if profile.python is None else profile.python
    executor = submitit.SlurmExecutor(folder=folder)
    options = {name: value or True for name, value in profile.options.items()}  # "" stands for a bare flag
    executor.update_parameters(
        **_resources(job, profile),
        job_name=name,
        array_parallelism=max_parallel or 10**6,
        wckey=None,  # Sites that check wckeys would refuse submitit's; [slurm.options] may name one.
        stderr_to_stdout=True,
        # Slurm requeues after node failures and preemptions. TERM warns before both the time limit and a preemption.
        additional_parameters={
            "requeue": True,
            "signal": f"TERM@{profile.signal_seconds}",
            **({"dependency": f"afterok:{after}", "kill_on_invalid_dep": "yes"} if after else {}),
            **options,
        },
        setup=[_NO_CACHES, *profile.setup, *_setup(snapshot, _sharing(job, profile), folder)],
        teardown=_teardown(),
        # From Slurm 22.05 on, srun no longer inherits --cpus-per-task from sbatch.
        srun_args=[
            "--kill-on-bad-exit=1",
            "--export=ALL",
            "--cpu-bind=none",
            f"--cpus-per-task={job.cpus_per_gpu}",
            *profile.srun_options,
        ],
    )
    if count > 1:
        executor.parameters["map_count"] = count
    return executor._make_submission_file_text(f"{python} -u -m {module} {shlex.quote(str(folder))}", "")


def _resources(job: Job, profile: Slurm) -> dict[str, Any]:
    """The parameters of submitit for what a job asks of Slurm, without those that are left to the cluster."""
    processes_per_node = min(job.gpus, job.gpus_per_node)
    asked = {
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "time": max(1, round(60 * job.time_limit)),
        "nodes": job.nodes,
        "ntasks_per_node": processes_per_node,
        "cpus_per_task": job.cpus_per_gpu,
        "gpus_per_node": None if job.device == "cpu" else processes_per_node,
        "mem": None if job.memory_gb is None else f"{round(1024 * job.memory_gb)}M",
    }
    return {key: value for key, value in asked.items() if value is not None}


def name_ignored_variables() -> None:
    """Warn of the shell's SBATCH_* variables, which are not passed on to sbatch."""
    if ignored := sorted(key for key in os.environ if key.startswith("SBATCH_")):
        warn(f"{', '.join(ignored)} of this shell: ignored, since the profile decides")


def _sharing(job: Job, profile: Slurm) -> str:
    """The value of SHARING_VARIABLE in a job: the number of runs on its devices, or "" if that is not known.

    Slurm gives a GPU to one job unless the profile asks for shared GPUs. Jobs on a CPU may share cores and memory.
    """
    may_share = any(name in profile.options for name in ("oversubscribe", "overcommit", "gres"))
    return "" if job.device == "cpu" or may_share else "1"


def _setup(snapshot: Path, sharing: str, folder: Path) -> list[str]:
    """The shell lines of a batch script before srun."""
    requeue = worker.requeue_file(folder, "").as_posix()
    return [
        "export SUBMITIT_PREEMPT_SIGNAL=TERM",
        f"export PYTHONPATH={shlex.quote(str(snapshot))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1  # else the folder that was submitted from comes before the snapshot",
        f"export {SHARING_VARIABLE}={sharing}",
        "trap : TERM  # the run heeds it; this script goes on when that has ended",
        f"requeue={shlex.quote(requeue)}$SLURM_JOB_ID  # a file by which the run asks to be queued again",
        'rm -f "$requeue"',
    ]


def _teardown() -> list[str]:
    """The shell lines of a batch script after srun, which requeue the job if the run asked for that.

    They also requeue it if TERM ended the run (exit code 128 + 15) before it could ask. A job that is not RUNNING any
    more is being preempted or cancelled, which Slurm handles itself. Without scontrol the script waits, since Slurm
    requeues a preempted job after its grace time.
    """
    return [
        "code=$?",
        'if [ -e "$requeue" ] || [ $code -eq 143 ]; then',
        f"    for _ in {{1..{REQUEUE_TRIES}}}; do",
        '        state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) || state=unknown',
        "        [[ $state == RUNNING || $state == unknown ]] || break",
        '        [ $state = RUNNING ] && scontrol requeue "$SLURM_JOB_ID" && break',
        "        sleep 10",
        "    done",
        "fi",
        "exit $code",
    ]
