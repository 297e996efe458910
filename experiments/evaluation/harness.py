"""A trained run as a model of lm-evaluation-harness (an extra: `pip install 'dynconv[eval]'`)."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from experiments.evaluation.generate import Sampling, complete
from experiments.evaluation.load import TrainedRun, precision
from experiments.evaluation.scoring import Request, most_tokens, score

MOST_NEW_TOKENS = 256  # of a task that names no limit


class _Question(NamedTuple):
    tokens: tuple[int, ...]
    stops: tuple[str, ...]  # texts that end the answer
    sampling: Sampling
    most: int  # tokens of the answer


class RunLM(TemplateLM):
    """The harness's interface over a run: texts in, log-probabilities and continuations out.

    Contexts that with their continuations are longer than the sequences of the training are cut on the left;
    `truncated` counts them.
    """

    def __init__(self, run: TrainedRun) -> None:
        super().__init__()
        self._run = run
        self.max_length = run.config.train.sequence_length
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        return self._run.end_of_text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: ARG002
        return list(self._run.tokenizer.encode(string, add_special_tokens=False).ids)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        for (context, continuation), _before, tokens in requests:
            if not tokens:  # the harness takes what the two have beyond the tokens of the context
                raise ValueError(
                    f"the answers of a task must have tokens of their own; got none for {continuation[:40]!r} after "
                    f"{context[-40:]!r}; end the question with a line break or a space (target_delimiter) in a copy of "
                    "the task"
                )
        # The harness moves white space from the end of a context to the answer, which may leave none of it.
        wanted = [
            self._request(context or [self.prefix_token_id], continuation) for _, context, continuation in requests
        ]
        return [tuple(each) for each in score(self._run, wanted)]  # type: ignore[misc]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: ARG002
        """The log-probability of each whole text, in windows that do not overlap; the first follows an end of text."""
        windows = [
            [
                self._request(*make_disjoint_window(window))
                for window in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.eot_token_id, self.max_length, context_len=1
                )
            ]
            for request in requests
        ]
        scores = iter(score(self._run, [window for text in windows for window in text]))
        return [sum(next(scores).log_probability for _ in text) for text in windows]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: ARG002
        """The text that follows each request's context, up to one of its stops or an end of text.

        Requests with the same settings are answered together if the lengths of their contexts differ by less than the
        answers take: each as it would be by itself.
        """
        questions = [self._question(*request.args) for request in requests]
        alike: dict[tuple[Sampling, int], list[int]] = {}
        for number in sorted(range(len(questions)), key=lambda n: -len(questions[n].tokens)):
            alike.setdefault((questions[number].sampling, questions[number].most), []).append(number)
        answers: dict[int, str] = {}
        for (_, most), waiting in alike.items():
            while waiting:
                longest = len(questions[waiting[0]].tokens)
                rows = max(1, most_tokens(self._run.config.model.vocabulary) // (longest + most))
                some = [number for number in waiting[:rows] if len(questions[number].tokens) > longest - most]
                waiting = waiting[len(some) :]
                answers |= zip(some, self._answer([questions[number] for number in some]), strict=True)
        return [answers[number] for number in range(len(questions))]

    def _answer(self, questions: Sequence[_Question]) -> list[str]:
        """The answers to questions with the same settings."""

        def ends(number: int, tokens: Sequence[int]) -> bool:
            if tokens[-1] == self.eot_token_id:
                return True
            text = self._run.tokenizer.decode(list(tokens))
            return any(stop in text for stop in questions[number].stops)

        first = questions[0]
        with precision(self._run.device):
            made = complete(self._run.model, [q.tokens for q in questions], first.sampling, 0, first.most, ends)
        answers = []
        for question, tokens in zip(questions, made, strict=True):
            text = self._run.tokenizer.decode(tokens[:-1] if tokens[-1] == self.eot_token_id else tokens)
            answers.append(min((text.split(stop)[0] for stop in question.stops), key=len, default=text))
        return answers

    def _question(self, context: str, settings: Mapping[str, Any]) -> _Question:
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        said = settings.get("max_gen_toks", MOST_NEW_TOKENS)
        most = int(said) if str(said).isdecimal() else 0
        temperature = float(settings.get("temperature", 1.0)) if settings.get("do_sample", False) else 0.0
        ids = self.tok_encode(context) or [self.eot_token_id]
        room = self.max_length - most
        if most < 1:
            raise ValueError(
                f"max_gen_toks of a task must be a whole number, at least 1; got {said}; correct it in a copy of the "
                "task"
            )
        if room < 1:
            raise ValueError(
                f"a task wants answers of up to {most} tokens, and the run was trained on sequences of "
                f"{self.max_length}, which leaves no room for the question; lower max_gen_toks in a copy of the task "
                "(--include), or leave the task out"
            )
        self.truncated += len(ids) > room
        return _Question(
            tokens=tuple(ids[-room:]),
            stops=tuple(stop for stop in stops if stop),  # an empty one, as in some tasks, stands for none
            sampling=Sampling(temperature, settings.get("top_k") or None, settings.get("top_p")),
            most=most,
        )

    def _request(self, context: Sequence[int], continuation: Sequence[int]) -> Request:
        room = max(1, self.max_length + 1 - len(continuation))  # the last token is only predicted
        self.truncated += len(context) > room
        return Request(tuple(context[-room:]), tuple(continuation))


def evaluate(
    run: TrainedRun, tasks: Sequence[str], include: Path | None, shots: int | None, limit: int | None
) -> tuple[dict[str, dict[str, float]], int]:
    """The harness's metrics by task, and how many contexts were too long and cut.

    A task that `shots` or `limit` change has them in its name, as "mine@limit=10", since its values cannot be compared
    with those of the task itself. `include` is a folder with the user's own task files. Raises ValueError if a task is
    not known, or there is no such folder.
    """
    if include is not None and not include.is_dir():
        raise ValueError(f"--include {include}: no such folder; wanted the one that holds your tasks' .yaml files")
    folder = None if include is None else str(include)
    manager = TaskManager(include_path=folder, include_defaults=include is None)
    if include is not None and not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folder)  # takes seconds, as it reads thousands of the harness's own files
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        yours = "--include takes a folder with yours" if include is None else f"no .yaml file in {include} defines it"
        named = ", ".join(unknown)
        raise ValueError(
            f"{named}: lm-evaluation-harness knows no such task; `lm-eval ls tasks` lists its own, and {yours}"
        )
    if run.config.packed:
        print(
            "dynconv: this run was trained on packed documents, where no text follows an end of text; the harness puts "
            "one before texts that have no context, so their first tokens are scored as it has not learned them",
            file=sys.stderr,
        )
    model = RunLM(run)
    answer = simple_evaluate(
        model, tasks=list(tasks), num_fewshot=shots, limit=limit, task_manager=manager, log_samples=False
    )
    results = {task: _metrics(values) for task, values in answer["results"].items()}
    changed = {"shots": shots, "limit": limit}
    suffix = "".join(f"@{name}={value}" for name, value in changed.items() if value is not None)
    return {f"{task}{suffix}": metrics for task, metrics in results.items() if metrics}, model.truncated


def _metrics(values: Mapping[str, Any]) -> dict[str, float]:
    """The harness names a metric "acc,none", with the answer's filter behind the comma."""
    metrics = {}
    for name, value in values.items():
        metric, _, filter_name = name.partition(",")
        if filter_name and isinstance(value, int | float):
            metrics[metric if filter_name == "none" else f"{metric}.{filter_name}"] = float(value)
    return metrics
