"""Several processes train as one does, resume bit for bit, and read each other's checkpoints; gloo on a CPU."""

import importlib.util
import json
import math
import multiprocessing
import os
import re
import struct
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from launches import PATIENCE

from experiments.data.dataset import Dataset
from experiments.design.arms import ALL_LINEAR
from experiments.design.config import Execution, RunConfig
from experiments.design.train import Muon
from experiments.parts.moe import MoE
from experiments.parts.short_convolution import LowRankConvolution
from experiments.training import checkpoints
from experiments.training.assembly import assemble
from experiments.training.job import Place, joined
from experiments.training.parallel import World, is_sharded
from experiments.training.rendezvous import process_group
from experiments.training.run import Run, RunFailed
from experiments.training.trainer import NonFiniteLoss, Trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch raises its own on import; fork beside threads
    pytest.mark.skipif(torch.cuda.is_available(), reason="the processes are forked and run on CPUs"),
]
CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
KINDS = ("ddp", "fsdp")
STEPS = 14  # the last batch has two sequences only, fewer than some jobs have processes
SAVED = 6  # the step of the first checkpoint, and that of the second, written after a resumption by more processes
SAVED_AGAIN = 9
# Measured at most: 1.1e-7 of a loss, 6.1e-6 of a gradient norm, 3.7e-5 of a weight (some near zero, which AdamW moves
# by the sign of a gradient).
LOSS, NORM, WEIGHT = 5e-7, 2e-5, 1.2e-4

Record = dict[str, Any]


def in_processes(size: int, work: Callable[..., None], *arguments: Any) -> None:
    """Call `work(rank, size, *arguments)` in forked processes, which share the imports of this one."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank, size, *arguments)) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * size


@dataclass(frozen=True)
class Job:
    """What every process of the jobs here is given."""

    folder: Path
    run: RunConfig
    data: Path
    recompute: Literal["none", "block"] = "none"

    def trainer(self, world: World) -> Trainer:
        torch.set_num_threads(1)
        execution = Execution(device="cpu", micro_batch=2, recompute=self.recompute)
        return assemble(self.run, Dataset.open(self.data), execution, world)

    def resumed(self, world: World, checkpoint: str) -> Trainer:
        trainer = self.trainer(world)
        assert checkpoints.load_newest(self.folder / checkpoint, self.run.run_id, trainer, world) == []
        return trainer

    def with_muon(self) -> "Job":
        return replace(self, run=replace(self.run, train=replace(self.run.train, optimizer=Muon())))

    def save(self, trainer: Trainer, checkpoint: str) -> None:
        folder = self.folder / checkpoint
        folder.mkdir(exist_ok=True)
        checkpoints.save(folder, trainer.state(), trainer.world)


def course(trainer: Trainer, steps: int) -> Record:
    """The next steps and, at the end of the run, the held-out loss and the weights."""
    done = [trainer.step() for _ in range(steps)]
    record: Record = {"losses": [step.loss for step in done], "norms": [step.gradient_norm for step in done]}
    if trainer.finished:
        evaluation = trainer.evaluate(lambda: trainer.world.any(False))
        assert evaluation is not None
        weights = trainer.weights()
        record |= {"held-out": evaluation.metrics["loss"]}
        record |= {"weights": torch.cat([weights[name].flatten() for name in sorted(weights)])}
    return record


def listening() -> list[str]:
    """Addresses on which this process listens for TCP connections."""
    sockets = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found = re.fullmatch(r"socket:\[(\d+)\]", str(descriptor.readlink()))
        except OSError:
            continue
        if found:
            sockets.add(found[1])
    addresses = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in sockets:
                addresses.append(fields[1].partition(":")[0])
    return addresses


def interrupted(job: Job, world: World, checkpoint: str) -> Record:
    """The whole course, by a trainer that saves a checkpoint, and by another that goes on from it."""
    saving = job.trainer(world)
    first = course(saving, SAVED)
    job.save(saving, checkpoint)
    rest = course(job.resumed(world, checkpoint), STEPS - SAVED)
    return {**rest, **{name: first[name] + rest[name] for name in ("losses", "norms")}}


def two_processes(rank: int, size: int, job: Job) -> None:
    records: Record = {}
    with process_group(CPU, job.folder / "meeting-2", rank, size, ["here"]):
        records["listening"] = dist.get_rank() == rank and listening()
        for kind in KINDS:
            world = World(rank, size, CPU, kind)
            records[kind] = course(job.trainer(world), STEPS)
            records[f"{kind} resumed"] = interrupted(job, world, f"{kind}-2")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("experiments.training.trainer.runs_ahead", lambda *_: True)
            records["fsdp ahead"] = course(job.trainer(world), STEPS)
            records["fsdp recomputed"] = course(replace(job, recompute="block").trainer(world), STEPS)
            records["fsdp compiled"] = compiled(job.trainer(world))
            records["muon"] = course(job.with_muon().trainer(world), STEPS)
            records["muon resumed"] = interrupted(job.with_muon(), world, "muon-2")
        records["parts"] = {
            name: (tuple(parameter.shape), is_sharded(parameter), parameter.dtype)
            for name, parameter in job.trainer(world).model.named_parameters()
        }
        records["errors"] = errors(job, world)
        world.wait_for_all()
    torch.save(records, job.folder / f"two-{rank}.pt")


def compiled(trainer: Trainer) -> Record:
    """The course of a model whose blocks are compiled, and how many programs they took."""
    torch.compiler.reset()  # other tests of this process may have compiled, too
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    trainer.model.compile(dynamic=False, backend="aot_eager")
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # Dynamo provokes one of torch's
        record = course(trainer, STEPS)
    return {**record, "programs": torch._dynamo.utils.counters["stats"]["unique_graphs"] - before}


def errors(job: Job, world: World) -> list[str]:
    """Messages that every process must raise alike."""
    messages = []
    trainer = job.trainer(world)
    trainer.step()
    if world.rank == 1:  # only in this process's part
        with torch.no_grad():
            dict(trainer.model.named_parameters())["blocks.1.ffn.maps.up.linear.weight"].to_local()[0, 0] = math.nan
    with pytest.raises(NonFiniteLoss) as failure:
        trainer.step()
    messages.append(str(failure.value))
    # Of the newest checkpoint, one file is damaged, which one of the processes reads.
    folder = job.folder / "damaged"
    for _ in range(2):
        job.save(trainer := job.resumed(world, "damaged" if folder.exists() else "fsdp-2"), "damaged")
        trainer.step()
    job.save(trainer, "damaged")
    if world.rank == 0:
        damaged = sorted(folder.glob(f"checkpoint/step-{SAVED + 1:010d}/*.safetensors"))[-1]
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    world.wait_for_all()
    resumed = job.trainer(world)
    messages += checkpoints.load_newest(folder, job.run.run_id, resumed, world) or []
    messages.append(f"step {resumed.steps_done}")
    return messages


def four_processes(rank: int, size: int, job: Job) -> None:
    records: Record = {}
    with process_group(CPU, job.folder / "meeting-4", rank, size, ["here"]):
        for kind in KINDS:
            world = World(rank, size, CPU, kind)
            records[kind] = course(job.trainer(world), STEPS)
            resumed = job.resumed(world, f"{kind}-2")
            course(resumed, SAVED_AGAIN - SAVED)
            job.save(resumed, f"{kind}-4")
            records[f"{kind} resumed"] = course(resumed, STEPS - SAVED_AGAIN)
        records["ddp resumed as fsdp"] = course(job.resumed(world, "ddp-4"), STEPS - SAVED_AGAIN)
    torch.save(records, job.folder / f"four-{rank}.pt")


@pytest.fixture(scope="module")
def job(tiny_run: RunConfig, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Job:
    train = replace(tiny_run.train, tokens=16 * (8 * (STEPS - 1) + 2), evaluate_every=16 * 8 * STEPS)
    model = replace(tiny_run.model, conv=LowRankConvolution(ALL_LINEAR, rank=2))
    return Job(tmp_path_factory.mktemp("jobs"), replace(tiny_run, train=train, model=model), dataset.path)


@pytest.fixture(scope="module")
def alone(job: Job) -> Record:
    return course(job.trainer(ALONE), STEPS)


@pytest.fixture(scope="module")
def two(job: Job) -> list[Record]:
    in_processes(2, two_processes, job)
    return [torch.load(job.folder / f"two-{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def four(job: Job, two: list[Record]) -> list[Record]:
    """They resume what the two have saved."""
    assert two
    in_processes(4, four_processes, job)
    return [torch.load(job.folder / f"four-{rank}.pt") for rank in range(4)]


def expect_close(got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """Equal up to rounding, in the steps that `got` has: the last ones of a whole run."""
    count = len(got["losses"])
    assert got["losses"] == pytest.approx(want["losses"][-count:], rel=LOSS)
    assert got["norms"] == pytest.approx(want["norms"][-count:], rel=NORM)
    assert got["held-out"] == pytest.approx(want["held-out"], rel=LOSS)
    torch.testing.assert_close(got["weights"], want["weights"], rtol=0, atol=WEIGHT)


def expect_equal(got: Record, want: Record) -> None:
    """Bit for bit."""
    assert {**got, "weights": None} == {**want, "weights": None}
    assert torch.equal(got["weights"], want["weights"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "fsdp ahead", "fsdp recomputed"])
def test_two_processes_train_as_one(kind: str, alone: Record, two: list[Record]) -> None:
    expect_equal(two[0][kind], two[1][kind])
    expect_close(two[0][kind], alone)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_four_processes_train_as_one(kind: str, alone: Record, four: list[Record]) -> None:
    """The last batch has two sequences: two of the four have none, and take part all the same."""
    for record in four[1:]:
        expect_equal(record[kind], four[0][kind])
    expect_close(four[0][kind], alone)


@pytest.mark.slow
def test_compiled_blocks_are_gathered_outside_of_their_programs(alone: Record, two: list[Record]) -> None:
    """All layers share one program of the block. With that of the norm and without gradients, there are four."""
    expect_close(two[0]["fsdp compiled"], alone)
    assert two[0]["fsdp compiled"]["programs"] == 4


@pytest.mark.slow
def test_muon_of_sharded_matrices_trains_as_muon(job: Job, two: list[Record]) -> None:
    """It orthogonalises in bfloat16, whose rounding depends on the last bits of a gradient."""
    expect_equal(two[0]["muon"], two[1]["muon"])
    want = course(job.with_muon().trainer(ALONE), STEPS)
    assert two[0]["muon"]["losses"] == pytest.approx(want["losses"], rel=1e-4)  # measured: 1.3e-5


def two_of_experts(rank: int, size: int, job: Job) -> None:
    with process_group(CPU, job.folder / "meeting-experts", rank, size, ["here"]):
        torch.save(course(job.trainer(World(rank, size, CPU, "fsdp")), 4), job.folder / f"experts-{rank}.pt")


@pytest.mark.slow
def test_muon_keeps_whole_matrices_apart_from_sharded_ones_of_their_shape(job: Job) -> None:
    """The router of 16 experts has the shape of the maps q, k, v and o, and stays whole."""
    ffn = MoE(16, 2, shared=1, hidden=8)
    job = replace(job, run=replace(job.run, model=replace(job.run.model, ffn=ffn))).with_muon()
    in_processes(2, two_of_experts, job)
    got = [torch.load(job.folder / f"experts-{rank}.pt") for rank in range(2)]
    assert got[0] == got[1]
    want = course(job.trainer(ALONE), 4)
    assert got[0]["losses"] == pytest.approx(want["losses"], rel=1e-4)  # measured: equal


def two_with_large_adamw(rank: int, size: int, job: Job) -> None:
    with process_group(CPU, job.folder / "meeting-large", rank, size, ["here"]), pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # not by `kernels`, which would interpret the convolutions, too
        from experiments.training.adamw import LargeAdamW

        records = []
        for replaced in (False, True):
            trainer = job.trainer(World(rank, size, CPU, "fsdp"))
            if replaced:
                (optimizer,) = trainer._optimizers
                trainer._optimizers = [LargeAdamW(optimizer.param_groups, fused=True)]
            record = course(trainer, 4)
            records.append(record | {"weights": torch.cat([each.flatten() for each in trainer.weights().values()])})
    torch.save(records, job.folder / f"large-{rank}.pt")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="its kernel is Triton's")
def test_adamw_of_large_models_takes_sharded_matrices(job: Job) -> None:
    in_processes(2, two_with_large_adamw, job)
    for rank in range(2):
        want, got = torch.load(job.folder / f"large-{rank}.pt")
        assert got["losses"] == pytest.approx(want["losses"], rel=LOSS)
        torch.testing.assert_close(got["weights"], want["weights"], rtol=0, atol=WEIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "muon"])
def test_as_many_processes_resume_bit_for_bit(kind: str, two: list[Record]) -> None:
    expect_equal(two[0][f"{kind} resumed"], two[0][kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_more_and_fewer_processes_resume_the_same_run(kind: str, job: Job, alone: Record, four: list[Record]) -> None:
    """From 2 to 4, and from these 4 to 1."""
    expect_close(four[0][f"{kind} resumed"], alone)
    expect_close(course(job.resumed(ALONE, f"{kind}-4"), STEPS - SAVED_AGAIN), alone)


@pytest.mark.slow
def test_a_checkpoint_of_one_kind_is_resumed_as_the_other(alone: Record, four: list[Record]) -> None:
    expect_close(four[0]["ddp resumed as fsdp"], alone)


@pytest.mark.slow
def test_all_processes_write_a_part_of_a_checkpoint(job: Job, four: list[Record]) -> None:
    assert four
    for kind in KINDS:
        (folder,) = (job.folder / f"{kind}-4" / "checkpoint").iterdir()
        sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
        assert len(sizes) == 4
        assert max(sizes) < sum(sizes) / 2
        manifest = json.loads((folder / "manifest.json").read_text())
        assert (manifest["processes"], len(manifest["files"])) == (4, 4)


@pytest.mark.slow
def test_matrices_are_sharded_in_float32_and_the_rest_stays_whole(two: list[Record]) -> None:
    for name, (_, sharded, dtype) in two[0]["parts"].items():
        assert sharded == (name == "embedding.weight" or name.endswith("linear.weight")), name
        assert dtype == torch.float32


@pytest.mark.slow
def test_processes_of_one_node_listen_on_loopback_only(two: list[Record]) -> None:
    loopback = f"{struct.unpack('<I', bytes([127, 0, 0, 1]))[0]:08X}"
    assert {address for record in two for address in record["listening"]} == {loopback}


@pytest.mark.slow
def test_errors_are_alike_in_all_processes(two: list[Record]) -> None:
    divergence, damaged, step = two[0]["errors"]
    assert two[1]["errors"] == two[0]["errors"]
    assert divergence.startswith("loss nan, gradient norm nan, first in embedding.weight (")
    assert damaged.startswith(f"step-{SAVED + 1:010d}: the checksum of shard-00002-")
    assert step == f"step {SAVED}"


def test_torch_without_the_library_for_several_processes_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with (
        pytest.raises(ValueError, match=r"torch was built without NCCL, which several .* or set gpus = 1"),
        process_group(torch.device("cuda"), tmp_path / "meeting", 0, 2, ["here"]),
    ):
        pass


def test_devices_that_differ_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(World, "gather", lambda *_: ["NVIDIA H200", "NVIDIA H200", "NVIDIA A100"])
    monkeypatch.setattr("experiments.training.rendezvous.process_group", lambda *_: pytest.MonkeyPatch.context())
    with (
        pytest.raises(ValueError, match="devices differ: rank 0 has NVIDIA H200, and rank 2 has NVIDIA A100; ask for"),
        joined(tmp_path, Execution(device="cpu"), Place(rank=0, size=3)),
    ):
        pass


@pytest.mark.parametrize(
    ("fitting", "parallel", "advice"),
    [
        (2, "ddp", r"2 do: set micro_batch = 2 in the profile"),
        (0, "ddp", r"nor do fewer: set parallel = 'fsdp' in the profile, on more GPUs"),
        (2, "fsdp", r"try micro_batch = 4 in the profile, or more GPUs"),
    ],
)
def test_a_batch_that_does_not_fit_is_answered_with_one_that_does(
    fitting: int,
    parallel: Literal["ddp", "fsdp"],
    advice: str,
    tiny_run: RunConfig,
    submitted: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The memory of a GPU is played by `advance` and `warm_up`, which want at most so many sequences."""

    def played(trainer: Trainer) -> None:
        if trainer.micro_batch > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    def no_model(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Trainer, "advance", played)
    monkeypatch.setattr(Trainer, "warm_up", played)
    monkeypatch.setattr(World, "sharded", parallel == "fsdp")
    monkeypatch.setattr(World, "place", lambda *_, **__: None)
    monkeypatch.setattr("experiments.training.memory.gpu_memory", lambda _: "80 GiB")
    run_dir = submitted(tiny_run, tmp_path, parallel=parallel)
    with pytest.raises(RunFailed, match=rf"micro_batch = 8 sequences of 16 tokens .* the GPU's 80 GiB; {advice}$"):
        Run(run_dir)()
    monkeypatch.setattr("experiments.training.assembly.assemble", no_model)
    with pytest.raises(RunFailed, match=r"the model does not fit into the GPU's 80 GiB; set parallel = 'fsdp' on more"):
        Run(run_dir)()


def test_torch_without_cuda_on_a_machine_with_gpus_is_named(
    tiny_run: RunConfig,
    submitted: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(RunFailed, match=r"'cuda' was asked for and torch .* was built without CUDA; install a build"):
        Run(submitted(tiny_run, tmp_path / "cuda", device="cuda"))()
    Run(submitted(tiny_run, tmp_path / "auto", device="auto"))()
    assert "this run was given a GPU and trains on the CPU, because torch" in capsys.readouterr().err
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
