"""A trained run on its generated task at further sequence lengths."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from experiments.design.config import RunConfig
from experiments.evaluation.load import check_finished
from experiments.models.decoder import Decoder
from experiments.tasks.base import Generator
from experiments.tasks.stream import GeneratedTask
from experiments.terminal import bar
from experiments.training.evaluation import Evaluator
from experiments.training.loss import losses_of
from experiments.training.parallel import World
from experiments.training.record import read_record

LONGEST = 2**24  # tokens: RoPE counts positions in float32, which holds whole numbers up to here


def check_lengths(run_dir: Path, lengths: Sequence[int]) -> RunConfig:
    """The configuration of the run in this folder.

    Raises ValueError if it is not finished, if it was trained on text or by another version of its task, or if its task
    cannot have these lengths.
    """
    config = check_finished(run_dir)
    task_at(config, lengths)
    if config.task is not None and config.task.sha256 != read_record(run_dir)[0]["data_sha256"]:
        raise ValueError(
            f"{run_dir} was trained on another version of the task {config.task_name}; check out the code of its time"
        )
    return config


def task_at(config: RunConfig, lengths: Sequence[int]) -> Generator:
    """The task of a run with held-out sets of these lengths. Raises ValueError if there are none to be had."""
    if config.task is None:
        raise ValueError(f"--lengths is for runs on generated tasks; {config.run_id} was trained on text; use --text")
    if known := [length for length in lengths if length in config.task.evaluate_lengths]:
        raise ValueError(f"the evaluations of {config.run_id} have sequence_length={known[0]} already; leave it out")
    if long := [length for length in lengths if length > LONGEST]:
        raise ValueError(
            f"--lengths must be at most {LONGEST}, beyond which RoPE cannot tell positions apart; got {long[0]}; "
            "lower it"
        )
    try:
        return config.task.at_lengths(lengths)
    except ValueError as error:
        raise ValueError(f"--lengths of {config.run_id}: {error}") from None


def evaluate_lengths(config: RunConfig, model: Decoder, lengths: Sequence[int]) -> dict[str, float]:
    """The metrics that `evaluate_lengths` in the run's sweep would have given, such as "accuracy@sequence_length=1024".

    Raises ValueError as `task_at` does.
    """
    found: dict[str, float] = {}
    for length in lengths:
        found |= _evaluate(config, model, length)
    return found


def _evaluate(config: RunConfig, model: Decoder, length: int) -> dict[str, float]:
    """The metrics at one length, in micro-batches of as many tokens as in training."""
    device, group = model.embedding.weight.device, config.model.sequence_group
    task = GeneratedTask(task_at(config, (length,)), config.task_name, config.train.batch_sequences, config.seed)
    sequences = config.train.batch_sequences * config.train.sequence_length // length
    sequences = max(group, sequences - sequences % group)
    evaluator = Evaluator(model, partial(losses_of, model, device), task, World(0, 1, device), sequences, group)
    with torch.no_grad(), bar(f"evaluating at {length} tokens", None, " sequences") as progress:

        def go_on() -> bool:
            progress.update(sequences)
            return False

        return evaluator.further_metrics(go_on) or {}
