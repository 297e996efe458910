"""Make the trainer of a run from its configuration: the model, the task and the optimizers are chosen here."""

from experiments.data.dataset import Dataset
from experiments.design.config import Execution, RunConfig
from experiments.models.decoder import Decoder
from experiments.tasks.text import Text
from experiments.training.optimizers import make_optimizers
from experiments.training.parallel import World
from experiments.training.trainer import Trainer


def assemble(run: RunConfig, dataset: Dataset, execution: Execution, world: World) -> Trainer:
    """The trainer of a run at its first step.

    Raises ValueError if the data's vocabulary is larger than the model's, or if micro-batches would separate sequences
    that read one another.
    """
    execution.check(run.model)
    if dataset.vocabulary > run.model.vocabulary:
        raise ValueError(
            f"the data have {dataset.vocabulary} tokens, and the model's vocabulary is {run.model.vocabulary}; "
            "make them equal"
        )
    model = Decoder(run.model, run.seed).to(world.device)
    return Trainer(
        model,
        Text(dataset, run.train, run.seed),
        make_optimizers(model, run.train, tables=(model.embedding, model.head)),
        run.train,
        execution,
        world,
        identity={"run_id": run.run_id},
        group=run.model.sequence_group,
    )
