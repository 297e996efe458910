"""What one run is: frozen, hashable values without torch, so that planning and status start at once.

Everything in `RunConfig` but its names decides what is learned and is part of the run's id; how it is executed
(device, micro-batches, GPUs) is `Execution` and is not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from analysis.logs.schema import TRUNK as TRUNK
from experiments.design.data import DataConfig
from experiments.design.identity import OUTSIDE_ID, digest
from experiments.design.model import Counts, ModelConfig
from experiments.design.train import TrainConfig
from experiments.parts.base import Fact


@dataclass(frozen=True)
class RunConfig:
    """One training run: an arm at a size and a budget, with a seed."""

    sweep: str = field(metadata=OUTSIDE_ID)
    arm: str = field(metadata=OUTSIDE_ID)
    baseline: str = field(metadata=OUTSIDE_ID)
    ladder: str = field(metadata=OUTSIDE_ID)
    size: str = field(metadata=OUTSIDE_ID)
    budget: str = field(metadata=OUTSIDE_ID)  # what the run is given, in words
    seed: int
    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    vary: Mapping[str, float] = field(
        default_factory=dict, metadata=OUTSIDE_ID
    )  # the sweep's axes, and where the run is
    trunk: str | None = field(default=None, metadata=OUTSIDE_ID)  # id of the run whose state this one takes up
    branch_step: int = field(default=0, metadata=OUTSIDE_ID)  # of that state

    @property
    def run_id(self) -> str:
        """A prefix for people, and a hash of everything that decides the outcome."""
        return f"{self.arm}-{self.size}-s{self.seed}-{digest(self)}"

    @property
    def counts(self) -> Counts:
        """Parameters, tokens and FLOPs. Those of a branch include its trunk's."""
        return self.model.count(self.train.tokens, self.train.sequence_length)

    @property
    def own_tokens(self) -> int:
        """Tokens of the steps that the run takes itself: a branch takes up where its trunk stood."""
        return self.train.tokens - self.branch_step * self.train.batch_sequences * self.train.sequence_length

    @property
    def own_flops(self) -> int:
        """Exact FLOPs of the steps that the run takes itself."""
        return self.model.count(self.own_tokens, self.train.sequence_length).flops_exact

    @property
    def epochs(self) -> float:
        """Passes over the training tokens."""
        return self.train.tokens / self.data.train_tokens

    def facts(self) -> dict[str, Fact]:
        """What a table may group runs by, beside their names."""
        train = self.train
        return {
            **self.model.facts(),
            "train.optimizer": train.optimizer.kind,
            "train.schedule": train.schedule.kind,
            "train.learning_rate": train.learning_rate,
            "train.batch_tokens": train.batch_sequences * train.sequence_length,
        }


@dataclass(frozen=True)
class Execution:
    """How a run is executed on given hardware. Set by the profile; not part of the run's identity."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus: int = 1  # processes, one a GPU; on a CPU also the number of processes
    micro_batch: int = 0  # sequences per forward pass and process; 0: the share of the batch, up to 32k tokens
    compile: bool = True  # torch.compile and, where the model is small, steps as CUDA graphs; on a GPU only
    threads: int = 1  # of torch on a CPU; a fixed number keeps sums in one order
    checkpoint_minutes: float = 10.0
    max_attempts: int = 20  # a run that is interrupted more often has failed
