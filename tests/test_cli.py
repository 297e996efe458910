"""The command line as a person and a script meet it: results on standard output, one line for each mistake."""

import argparse
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from launches import wait_until
from texts import CHEAP_SWEEP

from analysis.logs.schema import CONVENTIONS
from experiments.cli.main import main, parser
from experiments.design.sweep import load_sweep
from experiments.launching import states
from experiments.launching.states import RunState

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "experiments" / "sweeps" / "demo.toml"
LOCAL = ROOT / "slurm" / "profiles" / "local.toml"
PLAN_KEYS = {
    *("run_id", "arm", "size", "seed", "parameters", "parameters_nonembedding", "tokens"),
    *("flops_exact", "flops_6nd", "flops_6n_nonemb_d"),
}
VERBS = parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a wrong request gets."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    return printed.err


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([verb, "--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"dynconv {verb}" in text.partition("examples:")[2]


def arguments_of(verb: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """Those of the verbs in it, too."""
    for action in verb._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from arguments_of(inner)
        else:
            yield verb.prog, action


def test_every_example_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    text = ""
    for words in (*([verb] for verb in VERBS), ["bench", "kernels"], ["bench", "train"]):
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        text += capsys.readouterr().out.partition("examples:")[2]
    examples = [line.strip() for line in text.splitlines() if line.startswith("  dynconv ")]
    assert len(examples) > len(VERBS)
    for example in examples:
        parser().parse_args(shlex.split(example.partition("   ")[0])[1:])  # leaves where it is none


def test_what_a_verb_writes_has_one_name() -> None:
    named = {tuple(action.option_strings) for _, action in arguments_of(parser()) if "-o" in action.option_strings}
    assert named == {("-o", "--output")}


def test_every_argument_says_what_it_is() -> None:
    silent = [(verb, action.dest) for verb, action in arguments_of(parser()) if not action.help]
    assert silent == []
    helps = [action.help or "" for _, action in arguments_of(parser()) if action.dest == "convention"]
    assert len(helps) == 7
    assert all(name in text for text in helps for name in CONVENTIONS)
    # choose_convention takes 6N_active D only where it is asked for.
    assert all("6N_nonemb D' or '6N_active D' (default: the first of the first four" in text for text in helps)


def test_the_runs_in_examples_are_those_of_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    for verb in VERBS:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        text += capsys.readouterr().out
    named = set(re.findall(r"[\w-]+-s\d+-[0-9a-f]{10}\b", text))
    assert len(named) == 2
    assert named <= {run.run_id for run in load_sweep(DEMO)}


def test_names_and_paths_of_the_wrong_kind_are_answered_with_those_that_are_meant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "results" / "runs" / "demo" / "run-1"
    run_dir.mkdir(parents=True)
    (run_dir / "config.json").write_text("{}")
    (tmp_path / "mine.toml").write_bytes(DEMO.read_bytes())
    monkeypatch.delenv("DYNCONV_STORES", raising=False)
    monkeypatch.chdir(tmp_path)
    for verb in ("plan", "submit", "status"):
        for wrong in ("demo", "demmo.toml", "experiments/sweeps/demo"):
            assert refused(capsys, verb, wrong).endswith(f"; did you mean {DEMO}?\n")
        assert refused(capsys, verb, "mine").endswith("; did you mean mine.toml?\n")
    assert refused(capsys, "plan", "results/runs/demo").endswith(f"; did you mean {DEMO}?\n")
    assert refused(capsys, "table", "demo").endswith("no store at demo; did you mean results/runs/demo?\n")
    line = refused(capsys, "table", run_dir.relative_to(tmp_path))
    assert "results/runs/demo/run-1 is one run; give its store, results/runs/demo" in line


def test_plan_for_scripts_and_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(DEMO), "--profile", str(LOCAL), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    sweep = tomllib.loads(DEMO.read_text())
    assert len(rows) == len(sweep["sizes"]) * len(sweep["arms"]) * len(sweep["seeds"])
    assert all(row.keys() >= PLAN_KEYS for row in rows)
    assert main(["plan", str(DEMO), "--profile", str(LOCAL)]) == 0
    text = capsys.readouterr().out
    assert all(row["run_id"] in text for row in rows)
    assert f"{len(rows)} runs" in text
    assert re.search(r"forecast \S+ \S+ of one device, by the profile's 0.03 TFLOP/s a device;", text)


def test_no_forecast_without_a_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["plan", str(DEMO)]) == 0
    words = "; no forecast, since the speed is not known: measure it by --calibrate, or give --throughput, or a "
    assert words in capsys.readouterr().out
    assert main(["plan", str(DEMO), "--json"]) == 0
    text = capsys.readouterr().out
    assert {(row["hours"], row["teraflops_per_second"]) for row in json.loads(text)} == {(None, None)}
    monkeypatch.chdir(tmp_path)
    Path("plan.json").write_text(text)
    assert main(["power", "plan.json", "--m", "1.1", "--seeds", "1", "--simulations", "200"]) == 0


def test_fit_says_whose_answer_m_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points = [(arm, c, 2 + a * c**-0.1) for arm, a in (("base", 50.0), ("dyn", 48.0)) for c in (1e13, 1e14, 1e15, 1e16)]
    rows = "".join(f"{arm},{c:g},{loss:.6f}\n" for arm, c, loss in points)
    (tmp_path / "points.csv").write_text("arm,C,loss\n" + rows)
    fit = ["fit", str(tmp_path / "points.csv"), "--baseline", "base", "--bootstrap", "0", "--starts", "50"]
    assert main(fit) == 0
    printed = capsys.readouterr().out
    assert "m[dyn]" in printed
    assert "what an arm saves is answered by `dynconv table`" in printed
    assert main([*fit, "--format", "csv"]) == 0
    assert "dynconv table" not in capsys.readouterr().out


def test_plan_writes_nothing(tmp_path: Path) -> None:
    """Neither a store nor data: from an empty folder with an empty home."""
    home = tmp_path / "home"
    home.mkdir()
    command = [sys.executable, "-m", "experiments.cli.main", "plan", str(DEMO), "--profile", str(LOCAL)]
    environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("DYNCONV_CACHE", None)
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert sorted(tmp_path.rglob("*")) == [home]


def test_a_forecast_that_lacks_some_speeds_says_of_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    measured = ROOT / "results" / "measured" / "h200" / "training.parquet"  # some sizes, no control
    assert main(["plan", str(DEMO.parent / "mini-scaling.toml"), "--throughput", str(measured)]) == 0
    lacking = re.search(r"no forecast, since the speed of (\d+) of 616 runs is not known", capsys.readouterr().out)
    assert lacking is not None
    assert 0 < int(lacking[1]) < 616


def test_wrong_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    typo = tmp_path / "typo.toml"
    typo.write_text(DEMO.read_text().replace("tokens_per_parameter", "tokens_per_param"))
    assert "unknown key 'tokens_per_param'; did you mean 'tokens_per_parameter'?" in refused(capsys, "plan", typo)
    assert "nothing.toml: no such file" in refused(capsys, "plan", tmp_path / "nothing.toml")
    profile = tmp_path / "profile.toml"
    profile.write_text('executor = "locall"\n')
    assert "did you mean 'local'" in refused(capsys, "submit", DEMO, "--profile", profile)
    assert "is not a folder" in refused(capsys, "status", "--store", tmp_path / "nowhere")
    assert main(["status", str(DEMO), "--store", str(tmp_path / "nowhere")]) == 0
    assert "nowhere is not there yet" in capsys.readouterr().err
    run_id = load_sweep(DEMO)[0].run_id
    line = refused(capsys, "cancel", DEMO, f"{run_id[:-1]}x", "--store", tmp_path)
    assert f"the sweep has no such run: got '{run_id[:-1]}x'; did you mean '{run_id}'?" in line


def test_an_unwritable_store(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "submit", DEMO, "--profile", LOCAL, "--store", "/proc/store")
    assert "/proc/store" in line


def test_a_store_that_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "store").write_text("")
    assert "store" in refused(capsys, "submit", DEMO, "--profile", LOCAL, "--store", tmp_path / "store")
    assert (tmp_path / "store").read_text() == ""


def test_an_unknown_verb_is_a_wrong_request(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["plam"])
    assert left.value.code == 2
    assert "plan" in capsys.readouterr().err


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    plan = ["plan", str(tmp_path / "nothing.toml")]
    for arguments in (["--debug", *plan], [*plan, "--debug"]):
        with pytest.raises(ValueError, match="no such file"):
            main(arguments)


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m experiments.cli.main plan {DEMO} --profile {LOCAL} | head -n 1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("run ")


def test_a_closed_standard_output_is_no_error() -> None:
    command = f"{sys.executable} -m experiments.cli.main plan {DEMO} --profile {LOCAL} >&-"
    done = subprocess.run(command, shell=True, cwd=ROOT, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def cheap(text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments for a sweep of one run that takes a second, with a store and data of its own."""
    monkeypatch.setenv("DYNCONV_CACHE", str(tmp_path / "cache"))
    sweep = tmp_path / "cheap.toml"
    sweep.write_text(CHEAP_SWEEP.format(source=text_folder))
    return [str(sweep), "--store", str(tmp_path / "store")]


def test_cancel_retry_and_watch(cheap: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run is made, fails, is retried; what is told to whoever asks for it at the wrong moment."""
    here = tmp_path / "here.toml"
    here.write_text('executor = "debug"\n[default]\ndevice = "cpu"\n')
    store = Path(cheap[-1])
    (run,) = load_sweep(Path(cheap[0]))
    run_dir = store / run.run_id
    run_dir.mkdir(parents=True)
    assert main(["status", "--store", str(store)]) == 0
    assert capsys.readouterr().out == "no runs here; `dynconv submit SWEEP` makes them\n"
    assert main(["cancel", *cheap]) == 0
    assert capsys.readouterr().err == f"{store}: 1 runs cancelled\n"
    assert main(["submit", *cheap]) == 0
    told = "0 runs submitted; 1 cancelled already (see to them with `dynconv retry`)"
    assert capsys.readouterr().err == f"{store}: {told}\n"
    failure = {"attempt": 1, "step": 3, "cause": "such is life", "time": 0.0}
    (run_dir / "failure.json").write_text(json.dumps(failure))
    (run_dir / "cancelled").unlink()
    assert main(["submit", *cheap]) == 1
    assert "1 failed already (see to them with `dynconv retry`)" in capsys.readouterr().err
    assert main(["retry", *cheap, "--profile", str(here)]) == 0
    assert f"{store}: 1 runs submitted\n" in capsys.readouterr().err
    assert main(["retry", *cheap]) == 0
    assert capsys.readouterr().err == f"{store}: 0 runs submitted; 1 complete already\n"
    assert main(["status", *cheap, "--watch"]) == 0
    assert f"{run.run_id}  complete  100%" in capsys.readouterr().out


def test_watch_looks_again_until_nothing_is_under_way(
    cheap: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Path(cheap[-1])
    seen = iter(["running", "queued", "failed"])
    monkeypatch.setattr("experiments.cli.status.WATCH_SECONDS", 0.0)
    monkeypatch.setattr(states, "read", lambda *_: [RunState("a-run", next(seen))])
    assert main(["status", *cheap, "--watch"]) == 0
    assert re.findall("1 runs: 1 (.*)", capsys.readouterr().out) == ["running", "queued", "failed"]
    assert not store.exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["cancel", "a.toml", "--arm", "x"], "dynconv cancel: no such argument: --arm x; `dynconv cancel --help`"),
        (["track", "store", "--to", "tensorbord", "-o", "x"], "dynconv track: argument --to: invalid choice: "),
        (["bench", "trian"], "dynconv bench: argument "),
        (["tabel", "store"], "dynconv: argument VERB: invalid choice: 'tabel'"),
        ([], "dynconv: the following arguments are required: VERB; `dynconv --help`"),
    ],
)
def test_a_wrong_argument_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert text.startswith(said)
    assert text.count("\n") == 1


def test_a_run_that_fails_is_exit_code_1(cheap: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It has used up its attempts."""
    profile = tmp_path / "profile.toml"
    profile.write_text('executor = "local"\n[default]\nmax_attempts = 1\n')
    (run,) = load_sweep(Path(cheap[0]))
    run_dir = tmp_path / "store" / run.run_id
    run_dir.mkdir(parents=True)
    logged = {"first_step": 1, "step": 1, "tokens": 1, "loss": 5.0, "started_at": 0.0, "updated_at": 0.0}
    (run_dir / "attempt-0001.json").write_text(json.dumps(logged))
    assert main(["submit", *cheap, "--profile", str(profile)]) == 1
    assert "1 unreadable already (see to them with `dynconv status`)" in capsys.readouterr().err
    (run_dir / "config.json").write_text(json.dumps({"tokens": run.train.tokens}))
    assert main(["submit", *cheap, "--profile", str(profile)]) == 1
    said, told = capsys.readouterr().err.splitlines()[-2:]
    assert said == f"{tmp_path / 'store'}: 1 runs submitted"
    assert re.search(rf"{run.run_id} failed: AttemptsSpent: .*max_attempts = 1 .*; log: {tmp_path}", told)


def test_ctrl_c_is_exit_code_130(cheap: list[str], tmp_path: Path) -> None:
    """While it waits for its turn at the store."""
    (tmp_path / "store").mkdir()
    with (tmp_path / "store" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, "-m", "experiments.cli.main", "submit", *cheap]
        with (tmp_path / "stderr").open("w") as stderr, subprocess.Popen(command, stderr=stderr, cwd=ROOT) as submit:
            told = f"waiting for another submit to {tmp_path / 'store'}\n"
            wait_until(lambda: (tmp_path / "stderr").read_text() == told)
            submit.send_signal(signal.SIGINT)
            assert submit.wait() == 130
    said = "dynconv submit: interrupted; submitting again goes on where this stopped\n"
    assert (tmp_path / "stderr").read_text() == told + said


def test_a_failing_file_system_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"{sys.executable} -m experiments.cli.main plan {DEMO} > /dev/full"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "dynconv plan: No space left on device\n")
    run_dir = tmp_path / load_sweep(DEMO)[0].run_id
    run_dir.symlink_to("/proc/self/net")  # a folder in which nobody can make a file
    assert main(["cancel", str(DEMO), "--store", str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"dynconv cancel: {run_dir}/cancelled: No such file or directory\n"
