"""A sweep on generated tasks, from its file to its log: no corpus, one row a metric, resumed bit for bit."""

import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from company import meet, part
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from analysis.logs.files import read_json
from analysis.logs.store import load
from experiments.cli.main import main
from experiments.design.config import Execution, RunConfig
from experiments.design.sweep import load_sweep
from experiments.evaluation.load import load_run
from experiments.models.decoder import Decoder, Output
from experiments.models.readout import positions
from experiments.parts.short_convolution import NoConvolution
from experiments.tasks.base import Examples
from experiments.tasks.stream import GeneratedTask
from experiments.training import run as run_module
from experiments.training.assembly import assemble
from experiments.training.loss import IGNORED
from experiments.training.parallel import World
from experiments.training.record import check_store, read_record, write_record
from experiments.training.run import Run
from experiments.training.scoring import answers_of
from experiments.training.trainer import Trainer

ALONE = World(0, 1, torch.device("cpu"))
CPU = Execution(device="cpu")
SWEEP = """
name = "recall"
ladder = "recall"
sizes = ["d32"]
arms = ["transformer", "static-qkv"]
baseline = "transformer"
seeds = [0]
steps = 12
match = "tokens"
evaluations = 2

[train]
batch_sequences = 8

[task.short]
kind = "mqar"
sequence_length = 24
vocabulary = 32
pairs = 4
held_out_sequences = 20

[task.keys]
kind = "mqar"
sequence_length = 36
vocabulary = 24
pairs = 4
key_length = 2
key_vocabulary = 4
held_out_sequences = 20
evaluate_pairs = [2, 8]
"""


def write(folder: Path, text: str = SWEEP) -> Path:
    path = folder / "recall.toml"
    path.write_text(text)
    return path


@pytest.fixture
def runs(tmp_path: Path) -> dict[str, RunConfig]:
    """The run of static-qkv on each task."""
    return {run.task_name: run for run in load_sweep(write(tmp_path)) if run.arm == "static-qkv"}


def never() -> bool:
    return False


def test_a_sweep_runs_every_arm_on_every_task(tmp_path: Path) -> None:
    runs = load_sweep(write(tmp_path))
    assert [(run.task_name, run.arm) for run in runs] == [
        (task, arm) for task in ("short", "keys") for arm in ("transformer", "static-qkv")
    ]
    for run in runs:
        assert run.task is not None
        assert run.data is None
        assert run.model.vocabulary == run.task.vocabulary
        assert run.train.sequence_length == run.task.sequence_length
        assert run.train.steps == 12
        assert (run.budget, run.epochs) == ("12 steps", None)
        assert run.run_id.startswith(f"{run.arm}-d32-{run.task_name}-s0-")
    assert len({run.run_id.split("-")[-1] for run in runs}) == 4
    longer = load_sweep(write(tmp_path, SWEEP.replace("steps = 12", "steps = 12\nsteps_by_task = { keys = 40 }")))
    assert [(run.train.steps, run.budget) for run in longer[1:3]] == [(12, "12 steps"), (40, "40 steps")]
    limited = load_sweep(write(tmp_path, SWEEP.replace("held_out_sequences = 20", "train_sequences = 24", 1)))
    assert limited[0].epochs == 4.0


def test_ids_are_what_they_have_been(runs: dict[str, RunConfig]) -> None:
    assert {name: run.run_id for name, run in runs.items()} == {
        "keys": "static-qkv-d32-keys-s0-e690e1d5e0",
        "short": "static-qkv-d32-short-s0-0013fb29b6",
    }
    assert run_of(replace(runs["short"], task_name="renamed")) == run_of(runs["short"])


def run_of(run: RunConfig) -> str:
    return run.run_id.split("-")[-1]


def test_facts_of_the_task_are_columns(runs: dict[str, RunConfig]) -> None:
    facts = runs["keys"].facts()
    assert (facts["task.kind"], facts["task.pairs"], facts["task.key_length"]) == ("mqar", 4, 2)
    assert facts["task.success_accuracy"] == 0.9
    assert "task.evaluate_pairs" not in facts


def test_steps_and_flops_can_be_matched(tmp_path: Path) -> None:
    text = SWEEP.replace('"tokens"', '"flops"').replace("steps = 12", "steps = 400")
    by_task: dict[str, list[RunConfig]] = {}
    for run in load_sweep(write(tmp_path, text)):
        by_task.setdefault(run.task_name, []).append(run)
    for baseline, other in by_task.values():
        assert baseline.train.steps == 400 > other.train.steps
        assert other.counts.flops_exact == pytest.approx(baseline.counts.flops_exact, rel=1e-3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[task.keys]", "[task.text]", "task 'text' is the name of language modelling; give the task another name"),
        ("[task.keys]", "[task.'a b']", "task must be letters, digits, .*got 'a b'; rename it"),
        ("steps = 12", "steps = 12\ntokens_per_parameter = 3", "steps and tokens_per_parameter are both given"),
        ("steps = 12", "", "tokens_per_parameter is given nowhere"),
        ("steps = 12", "steps = 0", "steps must be above zero"),
        ("steps = 12", "steps = 12\nsteps_by_task = { long = 5 }", "steps_by_task: one of this sweep's tasks is wa"),
        ("steps = 12", "steps = 12\nsteps_by_task = { keys = 0 }", r"steps_by_task\.keys must be a number above zero"),
        ('kind = "mqar"', 'kind = "mqra"', r"task\.short\.kind: got 'mqra'; did you mean 'mqar'\?"),
        ("pairs = 4", "pairs = 9", r"task\.short: sequence_length must be at least 36 \(9 pairs and as many keys"),
        ("vocabulary = 32", "vocabulary = 6", r"task\.short: 2 key tokens give 2 keys"),
        (
            "[task.short]",
            "[data]\nvocabulary = 300\ntrain_tokens = 9\nvalidation_tokens = 9\n[task.short]",
            "both are",
        ),
    ],
)
def test_a_sweep_that_does_not_fit_is_refused_in_one_line(
    old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, SWEEP.replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        load_sweep(path)
    assert main(["plan", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_sweep_without_text_or_task_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"on text, \[data\], or on generated tasks, \[task.NAME\]; neither is there"):
        load_sweep(write(tmp_path, SWEEP.partition("[task")[0]))


def test_from_the_sweep_file_to_rows_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DYNCONV_CACHE", str(tmp_path / "cache"))
    path, store = write(tmp_path), tmp_path / "store"
    profile = tmp_path / "here.toml"
    profile.write_text('executor = "debug"\n[default]\ndevice = "cpu"\n')
    assert main(["plan", str(path)]) == 0
    assert "short" in capsys.readouterr().out.splitlines()[1].split()
    submit = ["submit", str(path), "--store", str(store), "--profile", str(profile)]
    assert main(submit) == 0
    assert not (tmp_path / "cache").exists()
    assert main(submit) == 0  # nothing is left to do, and the tasks of one store do not forbid each other
    capsys.readouterr()
    assert main(["status", str(path), "--store", str(store), "--format", "json"]) == 0
    assert {row["state"] for row in json.loads(capsys.readouterr().out)} == {"complete"}

    found = load(store)
    assert sorted(found.runs["task"]) == ["keys", "keys", "short", "short"]
    assert found.runs["task.pairs"].tolist() == [4] * 4
    evals = found.evals()
    assert set(evals["step"]) == {8, 12}
    last = evals[(evals["step"] == 12) & (evals["task"] == "keys")]
    plain = ("loss", "accuracy", "exact", "success")
    by_length = [f"{name}@key_length={length}" for length in (1, 2) for name in ("loss", "accuracy")]
    further = [f"{name}@pairs={pairs}" for pairs in (2, 8) for name in plain]
    assert last["metric"].tolist() == [*plain, *by_length, *further] * 2
    first = evals[(evals["step"] == 8) & (evals["task"] == "keys")]
    assert first["metric"].tolist() == [*plain, *by_length] * 2  # further sets only after the last step
    for _, run in found.runs.iterrows():
        own = evals[(evals["run_id"] == run["run_id"]) & (evals["step"] == 12)].set_index("metric")["value"]
        assert own["loss"] == run["loss"]
        assert 0 <= own["accuracy"] < 0.9
        assert own["success"] == 0
    assert main(["query", str(store), "select task, count(*) as n from runs group by task order by task"]) == 0
    assert "keys" in capsys.readouterr().out


def test_the_metrics_are_those_of_the_models_own_answers(runs: dict[str, RunConfig]) -> None:
    """Whatever the micro-batches, of which the last is padded."""
    run = runs["keys"]
    found = []
    for micro_batch in (0, 3):
        trainer = assemble(run, None, replace(CPU, micro_batch=micro_batch), ALONE)
        while not trainer.finished:
            trainer.step()
        evaluation = trainer.evaluate(never)
        assert evaluation is not None
        task = trainer.task
        assert isinstance(task, GeneratedTask)
        further = {f"@{at}": task.further_held_out(at) for at in task.further}
        for at, examples in {"": task.held_out, **further}.items():
            logits = trainer.model(torch.from_numpy(examples.inputs)).logits.detach()
            mask, targets = torch.from_numpy(examples.mask), torch.from_numpy(examples.targets)
            right = logits[mask].argmax(1) == targets[mask]
            loss = torch.nn.functional.cross_entropy(logits[mask], targets[mask]).item()
            assert evaluation.metrics[f"loss{at}"] == pytest.approx(loss, rel=1e-5)
            assert evaluation.metrics[f"accuracy{at}"] == pytest.approx(right.float().mean().item())
        found.append(evaluation.metrics)
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-3)


def _train_in_company(rank: int, size: int, folder: Path, run: RunConfig) -> None:
    meet(rank, size, folder)
    world = World(rank, size, torch.device("cpu"))
    trainer = assemble(run, None, replace(CPU, micro_batch=2), world)
    while not trainer.finished:
        trainer.step()
    evaluation = trainer.evaluate(lambda: world.any(False))
    assert evaluation is not None
    (folder / f"metrics-{rank}.json").write_text(json.dumps(evaluation.metrics))
    del trainer
    part()


@pytest.mark.slow
def test_three_processes_score_as_one(runs: dict[str, RunConfig], tmp_path: Path) -> None:
    run = runs["keys"]
    context = multiprocessing.get_context("fork")  # the others would import torch anew
    processes = [context.Process(target=_train_in_company, args=(rank, 3, tmp_path, run)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=300)
        assert process.exitcode == 0
    alone = assemble(run, None, CPU, ALONE)
    while not alone.finished:
        alone.step()
    evaluation = alone.evaluate(never)
    assert evaluation is not None
    for rank in range(3):
        metrics = json.loads((tmp_path / f"metrics-{rank}.json").read_text())
        assert list(metrics) == list(evaluation.metrics)
        assert metrics["loss"] == pytest.approx(evaluation.metrics["loss"], rel=1e-3)
        assert metrics["loss@pairs=8"] == pytest.approx(evaluation.metrics["loss@pairs=8"], rel=1e-3)
        assert metrics["accuracy"] == pytest.approx(evaluation.metrics["accuracy"], abs=0.03)


def test_scoring_takes_a_batch_without_answers(runs: dict[str, RunConfig]) -> None:
    """As a process gets it whose share of the held-out set is used up."""
    model = Decoder(runs["short"].model, 0)
    nothing = torch.full((2, 24), IGNORED)
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        where = torch.device(device)
        answers = answers_of(model.to(where), where, torch.zeros_like(nothing).to(where), nothing.to(where))
        assert not answers.losses.any()
        assert not answers.correct.any()


def test_a_solved_tasks_loss_is_not_rounded_to_zero() -> None:
    class Sure(torch.nn.Module):
        def forward(self, tokens: torch.Tensor) -> Output:
            return Output(30.0 * torch.nn.functional.one_hot(tokens, 5).float(), {}, {})

    inputs = torch.tensor([[0, 1, 2, 3]])
    targets = torch.tensor([[IGNORED, 1, 3, IGNORED]])
    answers = answers_of(Sure(), torch.device("cpu"), inputs, targets)
    assert answers.correct.tolist() == [[False, True, False, False]]
    small = 4 * np.exp(-30.0)
    np.testing.assert_allclose(answers.losses, [[0, small, 30 + small, 0]], rtol=5e-3)  # float64 holds 30 to 4e-15


def test_compression_is_read_from_the_last_token_alone(tmp_path: Path) -> None:
    text = SWEEP.partition("[task")[0] + "[task.squeeze]\nkind = 'compression'\nsequence_length = 7\nvocabulary = 6\n"
    run = load_sweep(write(tmp_path, text.replace("batch_sequences = 8", "batch_sequences = 32")))[1]
    assert run.model.reads_last_token
    model = Decoder(run.model, 0)
    assert run.model.parameters() == sum(parameter.numel() for parameter in model.parameters())
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        model(torch.zeros(1, 7, dtype=torch.int64))
    flops = run.model.forward_flops(7)  # torch counts attention in full
    assert counter.get_total_flops() == sum(flops.values()) + flops["attention"] - flops["convolution"]
    assert flops["readout"] == 2 * 2 * 7 * 32**2

    states = torch.randn(2, 7, 32)
    one, other = states.clone(), states.clone()
    other[:, :-1] = torch.randn(2, 6, 32)
    with torch.no_grad():
        assert torch.equal(model.readout(one), model.readout(other))
    assert len(positions(7, 32, torch.device("cpu")).unique(dim=0)) == 7

    long = replace(run.train, tokens=7 * 32 * 150, learning_rate=1e-2, warmup_steps=10)
    trainer = assemble(replace(run, train=long), None, CPU, ALONE)
    losses = [trainer.step().loss for _ in range(150)]
    assert losses[0] == pytest.approx(np.log(6), abs=0.1)
    assert losses[-1] < 0.9 * np.log(5)  # what is known without the sequence: that the five tokens are as likely


@pytest.mark.slow
def test_a_run_learns_to_recall(runs: dict[str, RunConfig]) -> None:
    """Keys of two tokens: without its convolutions the model stays at a guess for as long."""
    run = runs["keys"]
    train = replace(run.train, tokens=36 * 16 * 300, batch_sequences=16, learning_rate=1e-2, warmup_steps=20)
    accuracy = {}
    for name, conv in (("static", run.model.conv), ("none", NoConvolution())):
        trainer = assemble(replace(run, model=replace(run.model, conv=conv), train=train), None, CPU, ALONE)
        while not trainer.finished:
            trainer.step()
        evaluation = trainer.evaluate(never)
        assert evaluation is not None
        accuracy[name] = evaluation.metrics["accuracy"]
    assert accuracy["static"] > 0.9
    assert accuracy["none"] < 0.6


def load_baseline(run: RunConfig):
    from experiments.parts.short_convolution import NoConvolution

    return replace(run.model, conv=NoConvolution())


def submitted(run: RunConfig, store: Path, **execution: object) -> Path:
    settings = Execution(**({"device": "cpu"} | execution))  # type: ignore[arg-type]  # checked by the class
    return write_record(run, store, None, settings, code_commit=None, submitted_at=time.time())


def test_an_interrupted_run_continues_bit_for_bit(
    runs: dict[str, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = (submitted(runs["keys"], tmp_path / name, checkpoint_minutes=0.0) for name in ("a", "b"))
    Run(whole)()

    class Killed(BaseException):
        """Ends the process as a signal would: nothing is recorded."""

    advance, left = Trainer.advance, [7]

    def stops(trainer: Trainer, most: int | None = None) -> list:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        return advance(trainer, most)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", stops)
        with pytest.raises(Killed):
            Run(broken)()
    assert not (broken / "run.json").exists()
    Run(broken)()
    assert read_json(broken / "run.json")["attempts"] == 2
    for name, columns in (("steps", ("step", "loss")), ("evals", ("step", "metric", "value"))):
        one, other = (pq.read_table(folder / f"{name}.parquet") for folder in (whole, broken))
        assert all(one[column].to_pylist() == other[column].to_pylist() for column in columns)
    weights = [torch.load(folder / "model.pt", weights_only=True) for folder in (whole, broken)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_the_record_leads_back_to_the_run(runs: dict[str, RunConfig], tmp_path: Path) -> None:
    run = runs["keys"]
    run_dir = submitted(run, tmp_path)
    record, again, _ = read_record(run_dir)
    assert again == run
    assert (record["task"], record["data_dir"], record["tokenizer_sha256"]) == ("keys", None, None)
    assert record["data_sha256"] == run.task.sha256
    Run(run_dir)()
    with pytest.raises(ValueError, match="has no tokenizer, as it was trained on keys; give a run on text"):
        load_run(run_dir)


def test_a_store_takes_several_tasks_and_one_configuration_of_each(runs: dict[str, RunConfig], tmp_path: Path) -> None:
    submitted(runs["keys"], tmp_path)
    for beside in runs.values():
        check_store([beside], tmp_path, beside.task.sha256)
    changed = replace(runs["keys"], task=replace(runs["keys"].task, pairs=3, evaluate_pairs=()))
    with pytest.raises(ValueError, match="restore it, or submit to another store: runs on different data cannot be"):
        check_store([changed], tmp_path, changed.task.sha256)


def test_a_generator_of_another_version_does_not_go_on(
    runs: dict[str, RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = submitted(runs["keys"], tmp_path)
    monkeypatch.setattr(type(runs["keys"].task), "version", 2)
    with pytest.raises(run_module.RunFailed, match=r"the task keys holds data .*; the run was submitted with"):
        Run(run_dir)()


def test_a_batch_without_an_answer_is_no_divergence(
    runs: dict[str, RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = assemble(runs["short"], None, CPU, ALONE)
    batch = GeneratedTask.batch

    def unanswered(task: GeneratedTask, step: int, first: int, count: int) -> Examples:
        found = batch(task, step, first, count)
        return found._replace(mask=np.zeros(found.inputs.shape, bool)) if step == 1 else found

    monkeypatch.setattr(GeneratedTask, "batch", unanswered)
    losses = [trainer.step().loss for _ in range(3)]
    assert losses[1] == 0
    assert min(losses[0], losses[2]) > 1


def test_a_models_vocabulary_must_hold_the_tasks(runs: dict[str, RunConfig]) -> None:
    run = runs["keys"]
    with pytest.raises(ValueError, match="the data have 24 tokens, and the model's vocabulary is 20; make them equal"):
        assemble(replace(run, model=replace(run.model, vocabulary=20)), None, CPU, ALONE)
    assert Decoder(run.model, 0).head.weight.shape[0] == 24


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_scores_as_a_cpu_does(runs: dict[str, RunConfig]) -> None:
    """Compiled for the task's own held-out set and uncompiled for the further ones, in bfloat16."""
    gpu = assemble(runs["keys"], None, Execution(device="cuda"), World(0, 1, torch.device("cuda", 0)))
    gpu.warm_up()
    while not gpu.finished:
        gpu.advance()
    cpu = assemble(runs["keys"], None, CPU, ALONE)
    cpu.model.load_state_dict({name: value.cpu() for name, value in gpu.model.state_dict().items()})
    cpu.steps_done = gpu.steps_done
    got, want = gpu.evaluate(never), cpu.evaluate(never)
    assert got is not None
    assert want is not None
    assert got.metrics.keys() == want.metrics.keys()
    for name, value in want.metrics.items():
        assert got.metrics[name] == pytest.approx(value, abs=0.03 if name.startswith("loss") else 0.1)
