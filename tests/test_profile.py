"""Profiles: what is read from a file, what is refused, and what it makes a job say to sbatch."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.launching import sbatch
from experiments.launching.profile import Job, Slurm, load_profile

PROFILES = Path(__file__).parent.parent / "slurm" / "profiles"


@pytest.mark.parametrize("path", sorted(PROFILES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_profiles_load(path: Path) -> None:
    assert load_profile(path).executor in ("local", "debug", "slurm")


def test_a_size_differs_from_the_default_only_where_it_says_so(tmp_path: Path) -> None:
    text = '[slurm]\npartition = "p"\n[default]\nhours = 3\ngpus = 8\n[size.300M]\ngpus = 16\nmicro_batch = 4\n'
    path = tmp_path / "cluster.toml"
    path.write_text('executor = "slurm"\n' + text)
    profile = load_profile(path)
    large, other = profile.job("300M"), profile.job("150M")
    assert (large.hours, large.gpus, large.nodes, large.micro_batch) == (3.0, 16, 2, 4)
    assert (other.hours, other.gpus, other.nodes, other.micro_batch) == (3.0, 8, 1, 0)
    assert (large.execution.gpus, large.execution.micro_batch) == (16, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('executor = "slrum"', r"executor: got 'slrum'; did you mean 'slurm'\? legal: local, debug, slurm"),
        ('executor = "local"\nmax_paralel = 2', r"unknown key 'max_paralel'; did you mean 'max_parallel'\?"),
        ('executor = "local"\n[default]\nmemry_gb = 2', r"default: unknown key 'memry_gb'; did you mean 'memory_gb'"),
        ('executor = "local"\n[size.300m]\ngpus = 2', r"got '300m'; did you mean '300M'\?"),
        ('executor = "local"\n[size.300M]\ngpu = 2', r"size.300M: unknown key 'gpu'; did you mean 'gpus'"),
        ('executor = "local"\nsize = 3', r"size: got 3; wanted a table"),
        ('executor = "slurm"', r"executor 'slurm' needs a table \[slurm\]"),
        ('executor = "local"\n[slurm]\npartition = "x"', r"executor 'local' does not go with a table \[slurm\]"),
        ('executor = "slurm"\n[slurm]\naccount = "x"', r"slurm: missing key 'partition'"),
        ('executor = "local"\n[default]\ngpus = 12', r"gpus must fill whole nodes of gpus_per_node = 8; got 12"),
        ('executor = "local"\n[default]\nhours = 0', r"hours must be finite and above zero; got 0"),
        ('executor = "local"\n[default]\nhours = inf', r"hours must be finite and above zero; got inf"),
        ('executor = "local"\n[default]\nmemory_gb = -3', r"memory_gb must be finite and above zero; got -3"),
        ('executor = "local"\n[default]\ncheckpoint_minutes = nan', r"checkpoint_minutes must be finite and not neg"),
        (
            'executor = "slurm"\n[slurm]\npartition = "p"\nsignal_seconds = 360\n[default]\nhours = 9\n'
            "[size.300M]\nhours = 0.1",
            r"signal_seconds must be above zero and shorter than the shortest hours = 0.1; got 360",
        ),
        ('executor = "slurm"\n[slurm]\npartition = ""', r"slurm: partition must be one of the cluster's; got ''"),
        (
            'executor = "local"\n[size.3N]',
            r"legal: 150M, 300M, 400M, 600M, 1B, 2B, 1M, 3M, 7M, .* 7B, 8M, 18M",
        ),  # each once
        ('executor = "local"\nmax_parallel = -1', r"max_parallel must not be negative; got -1"),
    ],
)
def test_a_wrong_profile_is_refused_by_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"^{path}: .*{message}"):
        load_profile(path)


def test_what_a_job_says_to_sbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole script, so that a change of it is a change somebody has read."""
    monkeypatch.setattr("submitit.slurm.slurm.SlurmExecutor.affinity", lambda _: 2)  # no Slurm is needed to write it
    profile = load_profile(PROFILES / "example-gpu.toml")
    assert profile.slurm is not None
    script = sbatch.script(
        profile.job("1B"),
        replace(
            profile.slurm,
            setup=("module load cuda",),
            options={"reservation": "scaling", "exclusive": ""},
            srun_options=("--mpi=none",),
        ),
        count=5,
        max_parallel=3,
        name="paper-scaling-1B",
        folder=Path("/store/.jobs/1"),
        snapshot=Path("/store/.code/a b"),
    )
    assert script.replace(sys.executable, "python") == (
        "#!/bin/bash\n"
        "\n"
        "# Parameters\n"
        "#SBATCH --account=my-account\n"
        "#SBATCH --array=0-4%3\n"
        "#SBATCH --cpus-per-task=12\n"
        "#SBATCH --exclusive\n"
        "#SBATCH --gpus-per-node=8\n"
        "#SBATCH --job-name=paper-scaling-1B\n"
        "#SBATCH --mem=921600M\n"
        "#SBATCH --nodes=2\n"
        "#SBATCH --ntasks-per-node=8\n"
        "#SBATCH --open-mode=append\n"
        "#SBATCH --output=/store/.jobs/1/%A_%a_0_log.out\n"
        "#SBATCH --partition=gpu\n"
        "#SBATCH --requeue\n"
        "#SBATCH --reservation=scaling\n"
        "#SBATCH --signal=TERM@300\n"
        "#SBATCH --time=2880\n"
        "\n"
        "# setup\n"
        "unset TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR\n"
        "module load cuda\n"
        "export SUBMITIT_PREEMPT_SIGNAL=TERM\n"
        "export PYTHONPATH='/store/.code/a b'${PYTHONPATH:+:$PYTHONPATH}\n"
        "export PYTHONSAFEPATH=1  # else the folder that was submitted from comes before the snapshot\n"
        "export DYNCONV_SHARING=1\n"
        "trap : TERM  # the run heeds it; this script goes on when that has ended\n"
        "requeue=/store/.jobs/1/requeue-$SLURM_JOB_ID  # a file by which the run asks to be queued again\n"
        'rm -f "$requeue"\n'
        "\n"
        "# command\n"
        "export SUBMITIT_EXECUTOR=slurm\n"
        "srun --unbuffered --output /store/.jobs/1/%A_%a_%t_log.out --kill-on-bad-exit=1 --export=ALL --cpu-bind=none "
        "--cpus-per-task=12 --mpi=none python -u -m experiments.launching.worker /store/.jobs/1\n"
        "\n"
        "\n"
        "# teardown\n"
        "code=$?\n"
        'if [ -e "$requeue" ] || [ $code -eq 143 ]; then\n'
        "    for _ in {1..60}; do\n"
        '        state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) || state=unknown\n'
        "        [[ $state == RUNNING || $state == unknown ]] || break\n"
        '        [ $state = RUNNING ] && scontrol requeue "$SLURM_JOB_ID" && break\n'
        "        sleep 10\n"
        "    done\n"
        "fi\n"
        "exit $code"
    )


@pytest.mark.parametrize(
    ("said", "too_many"),
    [
        (
            "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: ... policy (job submit limit, ...)",
            True,
        ),
        (
            "sbatch: error: QOSMaxSubmitJobPerUserLimit\nsbatch: error: Batch job submission failed: Job violates ...",
            True,
        ),
        ("sbatch: error: QOSMaxWallDurationPerJobLimit\nsbatch: error: ... policy (job submit limit, ...)", False),
        (
            "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, ...)",
            True,
        ),
        ("sbatch: error: Batch job submission failed: Invalid job array specification", True),
        ("sbatch: error: Batch job submission failed: Invalid account or account/partition combination", False),
    ],
)
def test_which_refusals_are_of_too_many_jobs(said: str, too_many: bool) -> None:
    assert sbatch._too_many(said) == too_many


def test_only_gpus_that_slurm_gives_to_one_job_are_known_to_be_unshared() -> None:
    assert sbatch._sharing(Job(), Slurm("gpu")) == "1"
    assert sbatch._sharing(Job(device="cpu"), Slurm("gpu")) == ""
    assert sbatch._sharing(Job(), Slurm("gpu", options={"gres": "shard:1"})) == ""
