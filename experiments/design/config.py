"""The configuration of one run. No torch is imported here, so that `plan` and `status` start at once.

`RunConfig` holds what decides the outcome of a run, and its id covers that; fields marked OUTSIDE_ID, such as names,
are left out of the id. `Execution` says how a run is executed (device, micro-batches, GPUs), and is no part of the id.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from analysis.logs.schema import TRUNK as TRUNK
from experiments.design.data import DataConfig
from experiments.design.identity import OUTSIDE_ID, digest
from experiments.design.model import Counts, ModelConfig
from experiments.design.train import TrainConfig
from experiments.parts.base import Fact
from experiments.tasks.registry import AnyTask

TEXT = "text"  # the name of the task of language modelling


@dataclass(frozen=True)
class RunConfig:
    """One training run: an arm at a size and a budget, with a seed."""

    sweep: str = field(metadata=OUTSIDE_ID)
    arm: str = field(metadata=OUTSIDE_ID)
    baseline: str = field(metadata=OUTSIDE_ID)
    ladder: str = field(metadata=OUTSIDE_ID)
    size: str = field(metadata=OUTSIDE_ID)
    budget: str = field(metadata=OUTSIDE_ID)  # such as "20 tokens per parameter" or "500 steps", or "trunk"
    seed: int
    model: ModelConfig
    train: TrainConfig
    data: DataConfig | None = None  # the dataset of text; None: the task generates its sequences
    # axis of the sweep's [vary] -> the run's value
    vary: Mapping[str, float] = field(default_factory=dict, metadata=OUTSIDE_ID)
    # id of the run from whose state this one starts, and the step after which that state was kept
    trunk: str | None = field(default=None, metadata=OUTSIDE_ID)
    branch_step: int = field(default=0, metadata=OUTSIDE_ID)
    task: AnyTask | None = None  # None: language modelling on text
    task_name: str = field(default=TEXT, metadata=OUTSIDE_ID)
    packed: bool = False  # whether the documents within a sequence of text are kept apart (data/packing.py)

    def __post_init__(self) -> None:
        if self.packed:
            self._check_packed()
        group = self.model.sequence_group
        if group == 1:
            return
        where = f"{self.arm} {self.size}: the sequences of a batch read one another in groups of {group}"
        batch = self.train.batch_sequences
        if batch % group:
            raise ValueError(f"{where}, so batch_sequences must be a multiple of {group}; got {batch}; change it")
        if self.train.held_out_sequences < group:
            raise ValueError(
                f"{where}, so the held-out set needs {group} sequences; got {self.train.held_out_sequences}; "
                "raise validation_tokens, or held_out_sequences of a generated task"
            )

    def _check_packed(self) -> None:
        """Raises ValueError if the run cannot keep documents apart."""
        where = f"{self.arm} {self.size}: packed"
        if self.data is None:
            raise ValueError(f"{where} is for documents of text, [data]; got {self.task_name}; remove it")
        if self.model.sequence_group > 1:
            raise ValueError(
                f"{where} keeps documents apart, and the filters of this control (conv.mismatched) are generated from "
                "another sequence; remove one of the two"
            )
        for part in (self.model.mixer, self.model.ffn):
            if not part.takes_documents:
                raise ValueError(
                    f"{where} keeps documents apart, and the part {part.kind!r} does not (takes_documents); remove it, "
                    "or choose another part"
                )

    @cached_property
    def run_id(self) -> str:
        """The run's id: a readable prefix and a hash of everything that decides its outcome."""
        task = "" if self.task is None else f"-{self.task_name}"
        return f"{self.arm}-{self.size}{task}-s{self.seed}-{digest(self)}"

    @property
    def counts(self) -> Counts:
        """Parameters, tokens and training FLOPs. Tokens and FLOPs of a branch include its trunk's."""
        return self.model.count(self.train.tokens, self.train.sequence_length)

    @property
    def own_tokens(self) -> int:
        """Training tokens without those of the trunk from which a branch starts."""
        return self.train.tokens - self.branch_step * self.train.batch_sequences * self.train.sequence_length

    @property
    def own_flops(self) -> int:
        """Exact training FLOPs without those of the trunk."""
        return self.model.count(self.own_tokens, self.train.sequence_length).flops_exact

    @property
    def epochs(self) -> float | None:
        """Passes over the training data. None for a generated task whose sequences never repeat."""
        if self.data is not None:
            return self.train.tokens / self.data.train_tokens
        assert self.task is not None
        return self.train.sequences / self.task.train_sequences if self.task.train_sequences else None

    def facts(self) -> dict[str, Fact]:
        """The settings that a table may group runs by, in addition to their names."""
        train = self.train
        task: dict[str, Fact] = {} if self.task is None else self.task.facts()
        if self.packed:
            task["packed"] = True
        return {
            **self.model.facts(),
            **{f"task.{name}": value for name, value in task.items()},
            "train.optimizer": train.optimizer.kind,
            "train.schedule": train.schedule.kind,
            "train.learning_rate": train.learning_rate,
            "train.batch_tokens": train.batch_sequences * train.sequence_length,
        }


@dataclass(frozen=True)
class Execution:
    """How a run is executed on given hardware. The profile sets this, and the run's id does not cover it."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus: int = 1  # number of processes, each with one GPU; on a CPU, the number of processes
    # "ddp": each process holds the whole model; "fsdp": each holds a part of every matrix and of its optimizer state
    parallel: Literal["ddp", "fsdp"] = "ddp"
    micro_batch: int = 0  # sequences of one forward pass of a process; 0: its share of the batch, at most 32k tokens
    compile: bool = True  # only on a GPU: torch.compile and, for small models, steps as CUDA graphs
    recompute: Literal["none", "block", "attention-kept"] = "none"  # activations, to save memory (models/recompute.py)
    fused: bool = True  # only on a GPU: compute convolutions and e.g. RoPE in one kernel if possible (models/fused.py)
    threads: int = 1  # of torch on a CPU; fixed, because the order of a sum depends on the number of threads
    checkpoint_minutes: float = 10.0
    max_attempts: int = 20  # a run that is started more often than this fails

    def in_words(self, cuda: bool) -> str:
        """The settings that decide the speed of a step, in words. Runs that differ in them do not compare in time."""
        found = [f"{self.threads} threads"] if not cuda else ["compiled" if self.compile else "not compiled"]
        found += [f"recompute {self.recompute}"] if self.recompute != "none" else []
        found += ["fused"] if cuda and self.fused else []
        found += [f"micro_batch {self.micro_batch}"] if self.micro_batch else []
        return "; ".join(found)

    def check(self, run: RunConfig) -> None:
        """Raises ValueError if micro-batches would separate sequences that read one another."""
        group = run.model.sequence_group
        if self.micro_batch % group:
            raise ValueError(
                f"micro_batch must be a multiple of {group} for a model whose sequences read one another in groups of "
                f"{group} (conv.mismatched); got {self.micro_batch}; change it in the profile"
            )
