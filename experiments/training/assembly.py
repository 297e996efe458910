"""Make the trainer of a run from its configuration: the model, the task and the optimizers are chosen here."""

from experiments.data.dataset import Dataset
from experiments.data.text import Text
from experiments.design.config import Execution, RunConfig
from experiments.models.decoder import Decoder
from experiments.tasks.base import Task
from experiments.tasks.stream import GeneratedTask
from experiments.training.optimizers import make_optimizers
from experiments.training.parallel import World
from experiments.training.trainer import Trainer


def assemble(run: RunConfig, dataset: Dataset | None, execution: Execution, world: World) -> Trainer:
    """The trainer of a run at its first step; `dataset` is None for a generated task.

    Raises ValueError if the data's vocabulary is larger than the model's, or if micro-batches would separate sequences
    that read one another.
    """
    execution.check(run)
    task: Task
    if run.task is not None:
        task = GeneratedTask(run.task, run.task_name, run.train.batch_sequences, run.seed)
    else:
        assert dataset is not None, "a run without a generated task trains on a dataset"
        task = Text(dataset, run.train, run.seed, run.packed)
    if task.vocabulary > run.model.vocabulary:
        raise ValueError(
            f"the data have {task.vocabulary} tokens, and the model's vocabulary is {run.model.vocabulary}; "
            "make them equal"
        )
    return make_trainer(run, Decoder(run.model, run.seed), task, execution, world)


def make_trainer(run: RunConfig, model: Decoder, task: Task, execution: Execution, world: World) -> Trainer:
    """The trainer of a run's model on any task: `dynconv bench train` gives it random tokens and weights."""
    world.place(model, parts=model.blocks)  # before the optimizers are made: sharding replaces parameters
    return Trainer(
        model,
        task,
        make_optimizers(model, run.train, tables=(model.embedding, model.head)),
        run.train,
        execution,
        world,
        identity={"run_id": run.run_id},
        group=run.model.sequence_group,
    )
