"""Trained runs in use: decoding with caches, sampling, evaluation."""

import hashlib
import itertools
import json
import math
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from test_decoder import CONVS, SMALL, randomised
from texts import write_txt

from analysis.logs.files import read_json, write_json
from analysis.logs.record import sealed
from experiments import evaluation
from experiments.cli.main import main
from experiments.design.arms import QKV
from experiments.design.config import RunConfig
from experiments.evaluation import scoring
from experiments.evaluation.domains import evaluate_domain
from experiments.evaluation.generate import Sampling, generate
from experiments.evaluation.load import TrainedRun, load_run
from experiments.evaluation.scoring import Request, score
from experiments.parts.attention import Attention
from experiments.parts.short_convolution import LowRankConvolution


@pytest.mark.parametrize("conv", CONVS)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_decoding_with_caches_gives_the_logits_of_the_full_forward(conv: str, qk_norm: bool) -> None:
    model = randomised(replace(SMALL, conv=CONVS[conv], mixer=Attention(4, 2, qk_norm=qk_norm)))
    tokens = torch.randint(50, (3, 11), generator=torch.Generator().manual_seed(2))
    whole = model(tokens).logits
    for cuts in ([11], [1] * 11, [4, 1, 2, 3, 1]):
        cache, parts = None, []
        for part in tokens.split(cuts, 1):
            logits, cache = model.decode(part, cache)
            parts.append(logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-12, atol=1e-12)


def test_greedy_generation_takes_the_most_likely_token_of_the_full_forward() -> None:
    model = randomised(replace(SMALL, conv=LowRankConvolution(QKV, rank=3)))
    tokens = torch.tensor([[3, 1, 4], [1, 5, 9]])
    for token in itertools.islice(generate(model, tokens, Sampling(temperature=0), seed=0), 6):
        assert torch.equal(token, model(tokens).logits[:, -1].argmax(-1))
        tokens = torch.cat([tokens, token[:, None]], 1)


def test_sampling_follows_the_probabilities_it_is_told_to_keep() -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.3, 0.2])
    generator = torch.Generator().manual_seed(0)

    def shares(sampling: Sampling) -> torch.Tensor:
        drawn = sampling.draw(probabilities.log().repeat(40_000, 1), generator)
        return drawn.bincount(minlength=4) / len(drawn)

    def near(got: torch.Tensor, wanted: list[float]) -> None:
        torch.testing.assert_close(got, torch.tensor(wanted), rtol=0, atol=0.012)  # 5 standard errors of 40,000 draws

    near(shares(Sampling()), [0.1, 0.4, 0.3, 0.2])
    near(shares(Sampling(top_k=2)), [0, 4 / 7, 3 / 7, 0])
    near(shares(Sampling(top_p=0.7)), [0, 4 / 7, 3 / 7, 0])
    near(shares(Sampling(top_p=0.71)), [0, 4 / 9, 3 / 9, 2 / 9])
    squares = torch.tensor([0.01, 0.16, 0.09, 0.04]) / 0.3
    near(shares(Sampling(temperature=0.5)), squares.tolist())
    for temperature in (0, 1e-50, 1e-40, 1e-6):  # in float32, the logits over the second and third are infinite
        assert shares(Sampling(temperature=temperature)).tolist() == [0, 1, 0, 0]
    near(shares(Sampling(temperature=math.inf)), [0.25] * 4)


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}])
def test_sampling_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("damage", ["a bit of a weight", "cut", "gone"])
def test_damaged_weights_are_refused(finished: Callable[..., Path], tmp_path: Path, damage: str) -> None:
    run_dir = Path(shutil.copytree(finished(), tmp_path / finished().name))
    weights = run_dir / "model.pt"
    content = bytearray(weights.read_bytes())
    if damage == "gone":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(content[:-100])
    else:
        tensor = load_run(run_dir).model.state_dict()["embedding.weight"].numpy().tobytes()
        content[content.index(tensor) + 5] ^= 1  # torch.load takes this as it is
        weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.pt is .*damaged .*; copy it again"):
        load_run(run_dir)


def test_weights_of_another_model_are_refused(finished: Callable[..., Path], tmp_path: Path) -> None:
    run_dir = Path(shutil.copytree(finished(), tmp_path / finished().name))
    shutil.copyfile(finished(mixer=Attention(4, 2, qk_norm=True)) / "model.pt", run_dir / "model.pt")
    with pytest.raises(ValueError, match=r"weights of another model: 4 are .* blocks\.0\.mixer\.q_norm"):
        load_run(run_dir)


def test_weights_of_another_seed_are_refused(finished: Callable[..., Path], tmp_path: Path) -> None:
    """Their names and shapes are the same, so that nothing else tells them from the run's own."""
    run_dir = Path(shutil.copytree(finished(), tmp_path / finished().name))
    run = read_json(run_dir / "run.json")
    assert run["weights_sha256"] == hashlib.sha256((run_dir / "model.pt").read_bytes()).hexdigest()
    weights = {name: each + 1 for name, each in torch.load(run_dir / "model.pt").items()}
    torch.save(weights, run_dir / "model.pt")
    with pytest.raises(ValueError, match=r"model\.pt is not what this run wrote, by weights_sha256 in run\.json"):
        load_run(run_dir)
    del run["weights_sha256"]  # as in runs of older versions, whose weights may be anyone's
    write_json(run_dir / "run.json", sealed(run))
    assert torch.equal(load_run(run_dir).model.embedding.weight, weights["embedding.weight"])
    write_json(run_dir / "run.json", sealed(run | {"run_id": "another"}))
    with pytest.raises(ValueError, match=r"run\.json is of run another; wanted "):
        load_run(run_dir)


@pytest.mark.parametrize("damage", ["a merge left out", "gone"])
def test_another_tokenizer_is_refused(damage: str, finished: Callable[..., Path], tmp_path: Path) -> None:
    """It would give bits a byte and tasks of the harness other values, without a word."""
    run_dir = Path(shutil.copytree(finished(), tmp_path / finished().name))
    path = run_dir / "tokenizer.json"
    content = json.loads(path.read_text())
    path.unlink()  # it may be a link to the store's
    if damage != "gone":
        content["model"]["merges"].pop()
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"tokenizer\.json is (missing|not the tokenizer) .*; copy it again"):
        load_run(run_dir)


def log_probabilities(run: TrainedRun, tokens: list[int]) -> torch.Tensor:  # [T - 1]
    """Of each token after the first, without batches, caches or padding."""
    with torch.no_grad():
        logits = run.model(torch.tensor([tokens])).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def test_scores_are_sums_of_log_probabilities_however_requests_are_batched(
    finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(finished())
    draw = random.Random(0)
    contexts = [tuple(draw.choices(range(300), k=k)) for k in (1, 3, 9, 9, 14)]
    requests = [Request(c, tuple(draw.choices(range(300), k=k))) for c in contexts for k in (1, 1, 4, 12)]
    draw.shuffle(requests)
    for most in (2**14, 20):
        monkeypatch.setattr(scoring, "MOST_TOKENS", most)
        for request, got in zip(requests, score(run, requests), strict=True):
            tokens = [*request.context, *request.continuation]
            wanted = log_probabilities(run, tokens)[len(request.context) - 1 :].sum()
            assert got.log_probability == pytest.approx(float(wanted), rel=1e-5)
            likely = run.model(torch.tensor([tokens])).logits[0, len(request.context) - 1 : -1].argmax(-1)
            assert got.greedy == (likely.tolist() == list(request.continuation))


def test_a_folder_of_text_is_scored_as_one_stream_of_documents(
    finished: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = finished()
    run = load_run(run_dir)
    end = run.tokenizer.token_to_id("<|endoftext|>")
    texts = {"code": ["import os\n" * 9, "x = 1"], "prose": ["Nobody said café. <|endoftext|> " * 4]}
    for domain, documents in texts.items():
        write_txt(tmp_path / "text" / domain, documents)
    (tmp_path / "text" / "loose.txt").write_text("in no domain")
    for name in ("paper.pdf", "notes.md", "more.md", ".hidden.txt"):
        (tmp_path / "text" / "prose" / name).write_text("of a format that is not read")
    prose = tmp_path / "text" / "prose"
    (prose / "latin.txt").write_bytes("Nobody said café.".encode("latin-1"))
    capsys.readouterr()  # what the training printed
    assert main(["eval", str(run_dir), "--text", str(tmp_path / "text"), "--json"]) == 0
    shown = capsys.readouterr()
    assert "loose.txt in " in shown.err
    assert f"{prose}: 1 document left out, not UTF-8; the first is in {prose / 'latin.txt'}\n" in shown.err
    assert "text/prose: not read: 2 .md, 1 .pdf, 1 hidden or an editor's\n" in shown.err
    assert "text/code: not read" not in shown.err
    rows = json.loads(shown.out)
    got = {(row["task"], row["metric"]): row["value"] for row in rows}
    for domain, documents in texts.items():
        stream = [end]
        for document in documents:
            stream += [*run.tokenizer.encode(document).ids, end]
        starts = range(0, len(stream) - 1, 16)  # windows of the training's sequence length
        loss = -sum(float(log_probabilities(run, stream[start : start + 17]).sum()) for start in starts)
        size = sum(len(document.encode()) for document in documents)
        assert got[f"text/{domain}", "tokens"] == len(stream) - 1
        assert got[f"text/{domain}", "bytes"] == size
        assert got[f"text/{domain}", "loss"] == pytest.approx(loss / (len(stream) - 1), rel=1e-5)
        assert got[f"text/{domain}", "bits_per_byte"] == pytest.approx(loss / math.log(2) / size, rel=1e-5)
    logged = pq.read_table(run_dir / "evals.parquet").to_pylist()
    assert {(r["task"], r["metric"]): r["value"] for r in logged if r["task"] != "text"} == got
    assert any(row["task"] == "text" for row in logged)


def test_a_run_that_takes_no_results_is_refused_before_it_is_evaluated(
    finished: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise ValueError(f"{path} cannot be written")

    monkeypatch.setattr("experiments.cli.models.require_writable", refuse)
    monkeypatch.setattr("experiments.evaluation.load.load_run", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "a.txt").write_text("x = 1\n")
    assert main(["eval", str(finished()), "--text", str(tmp_path)]) == 2
    assert f"{finished() / 'evals.parquet'} cannot be written" in capsys.readouterr().err


def test_a_folder_is_scored_whole_where_training_held_out_text_of_its_own(
    finished: Callable[..., Path], tmp_path: Path
) -> None:
    run = load_run(finished())
    folder = write_txt(tmp_path / "text", ["import os"])
    assert run.config.data is not None
    own = replace(run.config, data=replace(run.config.data, validation_source=str(tmp_path / "gone")))
    assert evaluate_domain(run._replace(config=own), folder) == evaluate_domain(run, folder)


def test_a_folder_called_python_is_not_the_source_of_that_name(
    finished: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load_run(finished())
    folder = write_txt(tmp_path / "python", ["import os"])
    monkeypatch.chdir(tmp_path)
    assert evaluate_domain(run, Path("python")) == evaluate_domain(run, folder)


TASKS = {
    "choices": {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}],
    },
    "perplexity": {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{question}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "writing": {
        "output_type": "generate_until", "doc_to_text": "{{question}}", "doc_to_target": "{{written}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the harness's own dependencies
def test_tasks_of_the_harness_join_the_log_of_a_run(
    finished: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = finished()
    run = load_run(run_dir)
    questions = ["import o", "def f(self, x", "for i in range("]
    choices = [["s", "zz"], ["):", " = 3"], ["3)", "]["]]
    written = []
    for question in questions:
        prompt = torch.tensor([run.tokenizer.encode(question).ids])
        drawn = itertools.islice(generate(run.model, prompt, Sampling(temperature=0), seed=0), 5)
        written.append(run.tokenizer.decode([int(token) for token in drawn]).split("\n")[0])
    written[2] = "not what the model writes"
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    rows = zip(questions, choices, [0, 1, 0], written, strict=True)
    docs = [dict(zip(("question", "choices", "answer", "written"), row, strict=True)) for row in rows]
    (tasks / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    for name, task in TASKS.items():
        data = {
            "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(tasks / "docs.jsonl")}},
        }  # fmt: skip
        (tasks / f"{name}.yaml").write_text(json.dumps({"task": name} | data | task))
    arguments = ["eval", str(run_dir), "--tasks", ",".join(TASKS), "--include", str(tasks), "--json"]
    capsys.readouterr()  # what the training printed
    assert main(arguments) == 0
    got = {(row["task"], row["metric"]): row["value"] for row in json.loads(capsys.readouterr().out)}

    def log_probability(context: str, continuation: str) -> float:
        whole = run.tokenizer.encode(context + continuation).ids
        before = len(run.tokenizer.encode(context).ids)
        return float(log_probabilities(run, whole)[before - 1 :].sum())

    right = [
        max(range(2), key=lambda n: log_probability(question, options[n])) == answer
        for question, options, answer in zip(questions, choices, [0, 1, 0], strict=True)
    ]
    assert got["choices", "acc"] == pytest.approx(sum(right) / 3)
    assert got["writing", "exact_match"] == pytest.approx(2 / 3)
    end = run.tokenizer.token_to_id("<|endoftext|>")
    total = sum(float(log_probabilities(run, [end, *run.tokenizer.encode(q).ids]).sum()) for q in questions)
    assert got["perplexity", "byte_perplexity"] == pytest.approx(math.exp(-total / sum(map(len, questions))), rel=1e-4)
    assert main([*arguments, "--limit", "1"]) == 0  # A part of the questions is a task of another name.
    tried = {row["task"] for row in json.loads(capsys.readouterr().out)}
    assert tried == {f"{task}@limit=1" for task in TASKS}
    kept = {(row["task"], row["metric"]): row["value"] for row in pq.read_table(run_dir / "evals.parquet").to_pylist()}
    assert kept.items() >= got.items()
    assert {task for task, _ in kept} >= tried


@pytest.mark.slow  # importing the harness takes seconds
@pytest.mark.filterwarnings("ignore")
def test_a_task_whose_answers_leave_no_room_for_the_question_is_refused(finished: Callable[..., Path]) -> None:
    """Not answered after the last token of the question alone."""
    from experiments.evaluation.harness import RunLM

    model = RunLM(load_run(finished()))
    question = SimpleNamespace(args=("import os\nimport sys\nimport re\nimport json\n", {"max_gen_toks": 13}))
    assert len(model.generate_until([question])) == 1
    assert model.truncated == 1  # The run was trained on sequences of 16 tokens.
    question.args[1]["max_gen_toks"] = 16
    with pytest.raises(ValueError, match=r"answers of up to 16 tokens, and the run was trained on sequences of 16"):
        model.generate_until([question])


@pytest.mark.slow  # importing the harness takes seconds
@pytest.mark.filterwarnings("ignore")
def test_answers_after_white_space_alone_begin_a_text_and_answers_without_tokens_are_refused(
    finished: Callable[..., Path],
) -> None:
    from experiments.evaluation.harness import RunLM

    run = load_run(finished())
    model = RunLM(run)
    requests = [SimpleNamespace(args=args) for args in (("\n", "x"), (" ", "("), ("", " ("), ("import os", " as x"))]
    end = run.tokenizer.token_to_id("<|endoftext|>")
    for request, (got, _) in zip(requests[:3], model.loglikelihood(requests, disable_tqdm=True), strict=False):
        wanted = log_probabilities(run, [end, *run.tokenizer.encode("".join(request.args)).ids])
        assert got == pytest.approx(float(wanted.sum()), rel=1e-5)
    joined = SimpleNamespace(args=("e", "n"))  # which become one token
    assert len(run.tokenizer.encode("en").ids) == 1
    with pytest.raises(
        ValueError, match=r"must have tokens of their own; got none for 'n' after 'e'; end the question"
    ):
        model.loglikelihood([joined], disable_tqdm=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["eval", "RUN"], "neither --text nor --tasks"),
        (["eval", "RUN", "--tasks", ","], "neither --text nor --tasks"),
        (["eval", "RUN", "--text", "EMPTY", "--limit", "3"], "--limit belongs to --tasks"),
        (["eval", "RUN", "--text", "nowhere"], "must be a folder of text"),
        (["eval", "RUN", "--text", "EMPTY"], "the corpus must hold"),
        (["eval", "EMPTY", "--text", "EMPTY"], "a run's folder or a store with finished runs on text; it has none"),
        (["eval", "RUN", "--tasks", "no-such-task"], "knows no such task"),
        (["eval", "RUN", "--tasks", "mine", "--include", "nowhere"], "--include nowhere: no such folder"),
        (["eval", "RUN", "--tasks", "mine", "--include", "EMPTY"], "no .yaml file in"),
        (["generate", "EMPTY"], "must be the folder of a run"),
        (["generate", "RUN", "--tokens", "0"], "--tokens must be at least 1"),
        (["generate", "RUN", "--seed", str(2**64)], "--seed must be 0 to 2^63 - 1"),
        (["generate", "RUN", "--top-p", "2"], "top_p must be above 0"),
        (["generate", "RUN", "--prompt", "\udcff"], "--prompt must be UTF-8"),
        (["export", "EMPTY", "-o", "x"], "must be the folder of a run"),
        (["export", "EMPTY", "-o", "EMPTY"], "exists; remove it, or name another folder"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_wrong_requests_are_answered_in_one_line(
    arguments: list[str], said: str, finished: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RUN": str(finished()), "EMPTY": str(tmp_path)}
    capsys.readouterr()  # what the run printed, if it was trained just now
    assert main([places.get(argument, argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


def test_without_the_harness_the_extra_is_named(
    finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # importing it fails
    monkeypatch.delitem(sys.modules, "experiments.evaluation.harness", raising=False)
    monkeypatch.delattr(evaluation, "harness", raising=False)  # else `from experiments.evaluation import` finds it
    arguments = ["eval", str(finished()), "--tasks", "lambada_openai"]
    capsys.readouterr()
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert "--tasks needs lm-evaluation-harness" in said
    assert "pip install 'dynconv[eval]'" in said
    assert said.count("\n") == 1


def test_an_unfinished_run_is_not_used(
    tiny_run: RunConfig, submitted: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = submitted(tiny_run, tmp_path)
    for arguments in (["generate", str(run_dir)], ["eval", str(run_dir), "--text", str(tmp_path)]):
        assert main(arguments) == 2
        assert "is not finished" in capsys.readouterr().err


def test_a_store_with_a_control_is_evaluated_without_it(
    finished: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_txt(tmp_path / "text", ["x = 1\n" * 9])
    store = tmp_path / "store"
    arms = finished(), finished(conv=LowRankConvolution(QKV, rank=2, mismatched=True))
    run_dir, control = (Path(shutil.copytree(arm, store / arm.name)) for arm in arms)
    capsys.readouterr()  # what the training printed
    assert main(["eval", str(store), "--text", str(tmp_path / "text"), "--json"]) == 0
    shown = capsys.readouterr()
    assert {row["run_id"] for row in json.loads(shown.out)} == {run_dir.name}
    assert f"left out: {control} is a control whose sequences read one another; use a run of its arm" in shown.err
    # A control that is named is refused before others are evaluated, and so is a store that holds nothing else.
    assert main(["eval", str(run_dir), str(control), "--text", str(tmp_path / "text")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    shutil.rmtree(run_dir)
    assert main(["eval", str(store), "--text", str(tmp_path / "text")]) == 2
    assert "it has none; name another" in capsys.readouterr().err


def test_text_of_a_run_goes_to_standard_output(
    finished: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["generate", str(finished()), "--prompt", "def f(", "--tokens", "30", "--seed", "4"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("def f(")
    assert main(arguments) == 0
    assert capsys.readouterr().out == first
    assert main([*arguments, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert len(said["text"]) >= 20
    control = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160)), "\ufffd")
    assert (said["prompt"] + said["text"]).translate(control) + "\n" == first
