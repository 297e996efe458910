"""Texts completed together, which must come out as each does by itself."""

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_decoder import SMALL, randomised

from experiments.evaluation.generate import Sampling, complete, generate
from experiments.evaluation.load import load_run
from experiments.parts.attention import Attention
from experiments.parts.gated_deltanet import GatedDeltaNet
from experiments.parts.mamba2 import Mamba2
from experiments.parts.short_convolution import LowRankConvolution


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=0.9, top_k=20)])
@pytest.mark.parametrize(
    "mixer", [Attention(4, 2), Mamba2(heads=2, head_size=8, state=8), GatedDeltaNet(heads=2, key=8, value=8)]
)
def test_completions_together_are_those_of_each_prompt_by_itself(mixer: Any, sampling: Sampling) -> None:
    """Prompts of different lengths, and rows that end before others do."""
    conv = LowRankConvolution((*mixer.linear_maps(16),), rank=3)
    model = randomised(replace(SMALL, mixer=mixer, conv=conv))
    draw = random.Random(1)
    prompts = [draw.choices(range(50), k=k) for k in (3, 7, 1, 3, 5)]
    asked: list[int] = []

    def ends(row: int, tokens: Sequence[int]) -> bool:
        asked.append(row)
        return len(tokens) == 3 + 2 * row or tokens[-1] % 7 == row

    wanted = []
    for row, prompt in enumerate(prompts):
        alone: list[int] = []
        for token in itertools.islice(generate(model, torch.tensor([prompt]), sampling, seed=5), 9):
            alone.append(int(token))
            if ends(row, alone):
                break
        wanted.append(alone)
    asked.clear()
    assert complete(model, prompts, sampling, 5, 9, ends) == wanted
    assert len({len(each) for each in wanted}) > 2
    for row, each in enumerate(wanted):
        assert asked.count(row) == len(each) - (len(each) == 9)


@pytest.mark.slow  # importing the harness takes seconds
@pytest.mark.filterwarnings("ignore")
def test_answers_in_batches_are_those_of_each_request_by_itself(
    finished: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from experiments.evaluation import harness

    model = harness.RunLM(load_run(finished()))
    batches: list[int] = []

    def counted(model: Any, prompts: Sequence[Sequence[int]], *rest: Any) -> list[list[int]]:
        batches.append(len(prompts))
        return complete(model, prompts, *rest)

    monkeypatch.setattr(harness, "complete", counted)
    texts = ["import os", "x", "def f(self, x", "import re", "", "for i in range("]
    greedy = {"max_gen_toks": 9, "until": ["\n", " "]}
    drawn = {"max_gen_toks": 9, "do_sample": True, "temperature": 0.8, "until": "e"}
    requests = [SimpleNamespace(args=(text, settings)) for settings in (greedy, drawn) for text in texts]
    together = model.generate_until(requests)
    assert len(batches) < len(requests)
    assert together == [model.generate_until([request])[0] for request in requests]
    assert len(set(together)) > 4
    requests[0].args[1]["max_gen_toks"] = 0
    with pytest.raises(ValueError, match="max_gen_toks of a task must be at least 1; got 0"):
        model.generate_until(requests)
