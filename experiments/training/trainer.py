"""The trainer advances a model and its optimizers through a task, one step at a time.

Shapes: B sequences of a batch or micro-batch, T sequence length, V vocabulary.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from analysis.errors import WorkFailed
from dynconv.ops import has_fused_kernels
from experiments.design.config import Execution
from experiments.design.train import TrainConfig
from experiments.models.decoder import Decoder
from experiments.tasks.base import Examples, Task
from experiments.training.checkpoints import State
from experiments.training.compiled_check import disagreement, held_out_disagreement
from experiments.training.engine import Engine, add_gradients, on_device, window_shape
from experiments.training.evaluation import Evaluator
from experiments.training.loss import losses_of
from experiments.training.memory import is_out_of_memory
from experiments.training.muon import Muon
from experiments.training.optimizers import Optimizers
from experiments.training.parallel import World, local, whole
from experiments.training.state import load_optimizers, tensors_for, tensors_of

MICRO_BATCH_TOKENS = 32_768  # the default size of a micro-batch, with which a 300M model trains in 23 GiB
# Steps of models up to this size are captured as CUDA graphs, since a GPU runs their kernels faster than the host can
# launch them.
CAPTURED_PARAMETERS = 10**8
WINDOW_SECONDS = 1.0  # target duration of the steps launched together, after which the host reads losses and signals


class NonFiniteLoss(ArithmeticError):
    """Training diverged; the message says what was not finite."""


@dataclass(frozen=True)
class Step:
    """One optimizer step as it is logged: the loss in nats per target, the time in seconds."""

    step: int  # counted from 1
    tokens: int  # trained on so far
    loss: float
    gradient_norm: float  # before clipping
    learning_rate: float
    seconds: float  # on a GPU the mean over the steps that were launched together


@dataclass(frozen=True)
class Evaluation:
    """One pass over the held-out set as it is logged."""

    step: int
    tokens: int
    task: str
    metrics: Mapping[str, float]  # by name: those of the task, and auxiliary losses of the model
    seconds: float


class Trainer:
    """The state of one training run. On a CPU the same arguments give the same results, bit for bit."""

    def __init__(
        self,
        model: nn.Module,  # called like a `Decoder`: tokens [B, T], and perhaps a criterion -> `Output` or `Scored`
        task: Task,
        optimizers: Optimizers,
        config: TrainConfig,
        execution: Execution,
        world: World,
        identity: Mapping[str, str],  # stored in checkpoints to identify their run
        group: int = 1,  # number of neighbouring sequences that must share a micro-batch, as one reads the other
    ) -> None:
        self.model = model
        self.task = task
        self.config = config
        self.world = world
        self.steps_done = 0
        self.evaluated_at = 0  # the step after which the last evaluation took place
        self._identity = {**identity, "data_sha256": task.sha256}
        self._optimizers = optimizers
        self._cuda = world.device.type == "cuda"
        share = world.largest_share(config.batch_sequences, group)
        fitting = max(1, MICRO_BATCH_TOKENS // config.sequence_length // group) * group
        self._micro_batch = min(share, execution.micro_batch or fitting)
        self._group = group
        if execution.recompute != "none":
            cast(Decoder, model).recompute(execution.recompute)
        self.fused: tuple[str, ...] = ()  # operations computed in one kernel, such as "q, k, v, RoPE"
        if execution.fused and self._cuda:
            # The fused kernels do not support packed documents.
            kernels = has_fused_kernels(world.device) and task.held_out.starts is None
            self.fused = cast(Decoder, model).fuse(kernels)
        self.compiled = execution.compile and self._cuda
        if self.compiled:
            model.compile(dynamic=False)
        self._replicas = world.replicate(model)
        self._losses = partial(losses_of, self._replicas, world.device)
        self._evaluator = Evaluator(self._replicas, self._losses, task, world, self._micro_batch, group)
        self._engine: Engine | None = None
        if runs_ahead(world, optimizers):
            micro_batches = math.ceil(share / self._micro_batch)
            starts = task.held_out.starts
            documents = None if starts is None else starts.shape[1]
            shape = window_shape(micro_batches, self._micro_batch, config.sequence_length, documents)
            self._engine = Engine(self._replicas, self._losses, optimizers, world, shape, config.clip_norm)
        self._window = 1  # number of steps to launch together; grows once the time of a step is measured
        self._filled = range(0)  # 0-based steps whose batches are in the engine's next window
        self._failure: NonFiniteLoss | None = None  # raised by the next call, so that the steps before it are logged

    @property
    def micro_batch(self) -> int:
        """The number of sequences of one forward pass."""
        return self._micro_batch

    @property
    def finished(self) -> bool:
        """Whether all steps of the run are done."""
        return self.steps_done == self.config.steps

    @property
    def captured(self) -> bool:
        """Whether a step is a CUDA graph: true of small models on a GPU, once they are warmed up."""
        return self._engine is not None and self._engine.captured

    @property
    def evaluation_due(self) -> bool:
        """Whether to evaluate: after the last step, and wherever a multiple of `evaluate_every` tokens is reached."""
        return self.steps_done != self.evaluated_at and self._evaluates_after(self.steps_done)

    def warm_up(self) -> None:
        """Compile the model and load kernels by a training and an evaluation pass whose results are discarded.

        A small model's passes are also captured as CUDA graphs, unless the host has to wait for results in them.
        """
        small = sum(parameter.numel() for parameter in self.model.parameters()) <= CAPTURED_PARAMETERS
        capture = self.compiled and small and self.world.size == 1
        capture = capture and not cast(Decoder, self.model).waits_for_host(self.world.device)
        if self._engine is None:
            self._backward(0)
            self._zero_grad()
            self._evaluator.warm_up(None)
        else:
            self._engine.warm_up(capture)
            self._evaluator.warm_up(self._engine.stream if capture else None)
        torch.cuda.synchronize()

    def check_captured(self) -> None:
        """Compare the captured step and evaluation, if there are any, with the uncompiled model. Updates nothing.

        It computes the next training step. Raises WorkFailed if a loss or a parameter's gradient differs by more than
        rounding explains, since a wrongly compiled program would train to a wrong loss without an error.
        """
        try:
            found = self._disagreement()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            print(
                "the compiled step was not checked: memory is too small for one that is not compiled", file=sys.stderr
            )
            return
        finally:  # An uncompiled step needs more memory than training will: return it for other processes.
            if self.captured:
                torch.cuda.empty_cache()
        if found is not None:
            raise WorkFailed(
                f"{found}, so its program is wrong on {torch.cuda.get_device_name()} with torch {torch.__version__}; "
                "set compile = false in the profile"
            )

    def _disagreement(self) -> str | None:
        """How the captured programs differ from the uncompiled model by more than rounding; None if they do not."""
        losses = self._evaluator.compare_with_eager()  # first, since it takes less memory than a step
        found = None if losses is None else held_out_disagreement(*losses)
        if found is not None or self._engine is None or not self._engine.captured or self.finished:
            return found
        self._fill(self.steps_done, 1)
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.model.named_parameters()}
        step = self._engine.compare_with_eager()
        return disagreement(step, [names[each] for each in self._engine.parameters], first=self.steps_done == 0)

    def step(self) -> Step:
        """One optimizer step on the next global batch.

        Raises NonFiniteLoss, without updating anything, if the loss or the gradient norm is not finite.
        """
        (step,) = self.advance(1)
        return step

    def advance(self, most: int | None = None) -> list[Step]:
        """Take the next optimizer steps, at most `most`: one on a CPU, on a GPU as many as are launched together.

        An evaluation or a branch point can only be due after the last of them. Raises NonFiniteLoss if the first step
        is not finite. If a later one is not, returns the steps before it, and the next call raises NonFiniteLoss. The
        model and the optimizer are then in the state before the step that was not finite.
        """
        if self._engine is None:
            return [self._checked_step()]
        if self._failure is not None:
            raise self._failure
        start = time.perf_counter()
        wanted = self._window if most is None else most
        if self._filled.start != self.steps_done or not 0 < len(self._filled) <= wanted:
            self._fill(self.steps_done, wanted)
        steps = self._filled
        self._engine.launch(len(steps))
        self._fill(steps.stop, self._window)  # Prepare the next window while the device works.
        outcomes = self._engine.read(len(steps))
        seconds = self._mean_over_processes((time.perf_counter() - start) / len(steps))
        self._window = max(1, min(int(WINDOW_SECONDS / seconds), 2 * self._window, self._engine.shape.steps))
        done: list[Step] = []
        for index, (loss, norm) in zip(steps, outcomes, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                self._fail(loss, norm)
                if not done:
                    assert self._failure is not None
                    raise self._failure
                break
            self.steps_done = index + 1
            rate = self.config.learning_rate_at(index)
            done.append(Step(index + 1, self._tokens(index + 1), loss, norm, rate, seconds))
        return done

    def _fill(self, first: int, most: int) -> None:
        """Write the batches of the next steps into the engine's window, up to an evaluation or a branch point."""
        assert self._engine is not None
        last = first
        while last < min(first + most, self.config.steps) and (last == first or not self._stops_after(last)):
            rate = self.config.learning_rate_at(last)
            self._engine.fill(last - first, self._micro_batches(last), self._tokens_of(last), rate)
            last += 1
        self._filled = range(first, last)

    def _stops_after(self, steps: int) -> bool:
        """Whether a branch point must be kept, or an evaluation made, after `steps` steps."""
        return steps in self.config.branch_steps or self._evaluates_after(steps)

    def _evaluates_after(self, steps: int) -> bool:
        """Whether an evaluation must be made after `steps` steps."""
        before = self._tokens(steps - 1) // self.config.evaluate_every
        return steps == self.config.steps or self._tokens(steps) // self.config.evaluate_every > before

    def _mean_over_processes(self, seconds: float) -> float:
        """The mean of `seconds` over the processes, which must all choose the same length of the next window."""
        if self.world.size == 1:
            return seconds
        total = torch.tensor(seconds, dtype=torch.float64, device=self.world.device)
        return self.world.sum(total).item() / self.world.size

    def _fail(self, loss: float, norm: float) -> None:
        """Recompute the gradients of the failed step, to name those that are not finite, and store the error."""
        self._zero_grad()
        self._backward(self.steps_done)
        self._failure = NonFiniteLoss(self._cause(loss, norm))
        self._zero_grad()

    def _checked_step(self) -> Step:
        """One step without the engine: the loss is checked on the host before the update."""
        start = time.perf_counter()
        total = self._backward(self.steps_done)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = self.world.total_norm(gradients)
        loss_value, norm_value = total.item(), norm.item()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise NonFiniteLoss(self._cause(loss_value, norm_value))
        self.world.clip(list(self.model.parameters()), self.config.clip_norm, norm)
        rate = self.config.learning_rate_at(self.steps_done)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        self._zero_grad()
        if self._cuda:
            torch.cuda.synchronize()
        self.steps_done += 1
        seconds = time.perf_counter() - start
        return Step(self.steps_done, self._tokens(self.steps_done), loss_value, norm_value, rate, seconds)

    def _backward(self, index: int) -> Tensor:
        """Accumulate gradients of the mean loss over a global batch. Returns that loss without auxiliary losses."""
        micro_batches = list(self._micro_batches(index))
        counted = torch.tensor(sum(each.positions for each in micro_batches), device=self.world.device)
        tokens = self._tokens_of(index)
        on_device = [(self._to_device(each), each.inputs.size / tokens) for each in micro_batches]
        return add_gradients(self._replicas, self._losses, on_device, self.world.sum(counted), self.world)

    def evaluate(self, interrupted: Callable[[], bool]) -> Evaluation | None:
        """The task's metrics on its held-out sets, or None if `interrupted`, called repeatedly, returned True.

        Raises NonFiniteLoss if the held-out loss is not finite.
        """
        start = time.perf_counter()
        metrics = self._evaluator.metrics(self.finished, interrupted)
        if metrics is None:
            return None
        if not math.isfinite(metrics["loss"]):
            raise NonFiniteLoss(f"held-out loss {metrics['loss']}")
        self.evaluated_at = self.steps_done
        seconds = time.perf_counter() - start
        return Evaluation(self.steps_done, self._tokens(self.steps_done), self.task.name, metrics, seconds)

    def state(self) -> State:
        """Everything that is needed to resume the run. All processes must call this."""
        about: dict[str, str | int] = {**self._identity}
        about |= {"steps_done": self.steps_done, "evaluated_at": self.evaluated_at}
        return State(about, tensors_of(self.model, self._optimizers))

    def tensors_for(self, saved: Mapping[str, tuple[torch.Size, torch.dtype]]) -> dict[str, Tensor]:
        """The tensors into which a checkpoint is read, by name.

        Raises ValueError if the model and the checkpoint do not have the same parameters.
        """
        return tensors_for(self.model, saved)

    def resume(self, state: State) -> None:
        """Continue from a state that was read into the tensors of `tensors_for`. Call this before `warm_up`.

        Raises ValueError if the state was trained on other data.
        """
        data_sha256 = self._identity["data_sha256"]
        if state.about["data_sha256"] != data_sha256:
            raise ValueError(
                f"the checkpoint was trained on data {str(state.about['data_sha256'])[:12]}; this run has "
                f"{data_sha256[:12]}; restore the data it began with or start the run anew"
            )
        assert self._engine is None or not self._engine.captured, (
            "load the state before warm_up: a captured step uses the tensors that it was captured with"
        )
        load_optimizers(state.tensors, self.model, self._optimizers)
        self.steps_done, self.evaluated_at = int(state.about["steps_done"]), int(state.about["evaluated_at"])

    def weights(self) -> dict[str, Tensor]:
        """The whole model's state_dict, gathered from all processes, which must all call this."""
        return {name: whole(tensor) for name, tensor in self.model.state_dict().items()}

    def _tokens(self, steps: int) -> int:
        """Training tokens of the first `steps` steps."""
        sequences = min(steps * self.config.batch_sequences, self.config.sequences)
        return sequences * self.config.sequence_length

    def _tokens_of(self, index: int) -> int:
        """Training tokens of the 0-based global batch `index`."""
        return self._tokens(index + 1) - self._tokens(index)

    def _micro_batches(self, index: int) -> Iterator[Examples]:
        """This process's share of global batch `index`, in micro-batches.

        Every process gets the same number, some perhaps empty: gathering weights and averaging gradients takes all
        processes.
        """
        sequences = self._tokens_of(index) // self.config.sequence_length
        first, share = self.world.share(sequences, self._group)
        for low in range(0, self.world.largest_share(sequences, self._group), self._micro_batch):
            start = min(low, share)
            yield self.task.batch(index, first + start, min(self._micro_batch, share - start))

    def _to_device(self, examples: Examples) -> tuple[Tensor, ...]:
        """The arguments of the loss, on the device and padded to a whole micro-batch."""
        return on_device(examples, self._micro_batch, self.world.device)

    def _zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _cause(self, loss: float, norm: float) -> str:
        """The message of NonFiniteLoss. It names the first parameter whose gradient is not finite."""
        names = [name for name, _ in self.model.named_parameters()]
        finite = {n: local(p.grad).isfinite().all() for n, p in self.model.named_parameters() if p.grad is not None}
        broken = [name for name, flag in finite.items() if self.world.any(not flag)]
        where = f", first in {broken[0]} ({len(broken)} of {len(names)} parameters)" if broken else ""
        rate = self.config.learning_rate_at(self.steps_done)
        return f"loss {loss}, gradient norm {norm}{where}, learning rate {rate:.3g}"


def runs_ahead(world: World, optimizers: Optimizers) -> bool:
    """Whether the engine launches steps before the losses of earlier ones are read: on a GPU, where it saves time.

    All optimizers must be able to skip an update by a flag on the device (`found_inf`).
    """
    able = all(isinstance(optimizer, torch.optim.AdamW | Muon) for optimizer in optimizers)
    return world.device.type == "cuda" and able
