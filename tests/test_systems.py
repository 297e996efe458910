"""What every system of parts must do, whatever it is made of: causality, decoding, learning, resuming, one program."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stepping import gpu_trainer, on_a_gpu, to_the_end
from test_decoder import randomised
from test_parallel import KINDS, STEPS, Job, course, in_processes
from torch import Tensor
from torch.overrides import TorchFunctionMode

from experiments.data.dataset import Dataset
from experiments.design.config import Execution, RunConfig
from experiments.design.model import ModelConfig
from experiments.models.decoder import Decoder
from experiments.parts.attention import Attention
from experiments.parts.gated_deltanet import GatedDeltaNet
from experiments.parts.mamba2 import Mamba2
from experiments.parts.moe import MoE
from experiments.parts.short_convolution import LowRankConvolution, StaticConvolution
from experiments.parts.swiglu import SwiGLU
from experiments.training import checkpoints
from experiments.training.assembly import assemble
from experiments.training.parallel import World
from experiments.training.rendezvous import process_group
from experiments.training.run import Run

ALONE = World(0, 1, torch.device("cpu"))
CPU = Execution(device="cpu")
PLAIN = ModelConfig(2, width=16, vocabulary=300, mixer=Attention(2, 2), ffn=SwiGLU(24))
MAMBA, DELTA = Mamba2(heads=2, head_size=6, state=8), GatedDeltaNet(heads=2, key=6, value=8)
SYSTEMS = {
    "moe": replace(PLAIN, ffn=MoE(experts=5, top_k=2, shared=1, hidden=8)),
    "moe lowrank": replace(
        PLAIN,
        ffn=MoE(experts=5, top_k=2, shared=1, hidden=8),
        conv=LowRankConvolution(("q", "k", "v", "gate", "up", "down"), rank=2),
    ),
    "mamba2": replace(PLAIN, mixer=MAMBA),
    "mamba2 static": replace(
        PLAIN, mixer=MAMBA, conv=StaticConvolution(("x", "b", "c"), residual=False, activation="silu")
    ),
    "mamba2 lowrank": replace(
        PLAIN, mixer=MAMBA, conv=LowRankConvolution(("x", "b", "c"), rank=2, residual=False, activation="silu")
    ),
    "gated deltanet": replace(PLAIN, mixer=DELTA),
    "gated deltanet lowrank": replace(
        PLAIN, mixer=DELTA, conv=LowRankConvolution(("q", "k", "v"), rank=2, residual=False, activation="silu")
    ),
}
TOKENS = torch.randint(300, (2, 75), generator=torch.Generator().manual_seed(2))  # more than a chunk of a recurrence
every_system = pytest.mark.parametrize("model", SYSTEMS.values(), ids=SYSTEMS)


@every_system
@pytest.mark.parametrize("place", [7, 63, 64, 70])
def test_no_logit_depends_on_a_later_token(model: ModelConfig, place: int) -> None:
    decoder, changed = randomised(model, 0.2), TOKENS.clone()
    changed[0, place] = (TOKENS[0, place] + 1) % 300
    before, after = decoder(TOKENS).logits, decoder(changed).logits
    # Not bit for bit: among an expert's rows, a token's may stand at another place, which changes the order of sums.
    torch.testing.assert_close(after[0, :place], before[0, :place], rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(after[1], before[1], rtol=1e-11, atol=1e-12)
    assert not torch.equal(after[0, place], before[0, place])


@every_system
def test_decoding_with_caches_gives_the_logits_of_the_full_forward(model: ModelConfig) -> None:
    decoder = randomised(model, 0.2)
    whole = decoder(TOKENS).logits
    for cuts in ([75], [66, *[1] * 9], [4, 1, 2, 68]):
        cache, parts = None, []
        for part in TOKENS.split(cuts, 1):
            logits, cache = decoder.decode(part, cache)
            parts.append(logits)
        # RoPE's table is float32 by design
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-6, atol=1e-7)


class AutocastOfGPUs(TorchFunctionMode):
    """Computes in float32 what autocast computes in it on GPUs, and not on CPUs (torch's documentation of autocast)."""

    WIDE = ("cumsum", "exp", "log", "logsumexp", "norm", "pow", "prod", "reciprocal", "rsqrt", "softplus", "sum")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in self.WIDE and torch.is_autocast_enabled("cpu"):
            args = [x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x for x in args]
        return func(*args, **(kwargs or {}))


@every_system
def test_the_residual_stream_stays_narrow(model: ModelConfig) -> None:
    """A stream of float32 would cost a GPU time and memory, and the mixture of experts its kernels."""
    decoder = Decoder(model, seed=0)
    for block in decoder.blocks:
        block.prepare(75, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16), AutocastOfGPUs():
            assert block(torch.randn(2, 75, 16, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


@every_system
def test_it_learns_text_and_resumes_bit_for_bit(
    model: ModelConfig, tiny_run: RunConfig, dataset: Dataset, tmp_path: Path
) -> None:
    run = replace(tiny_run, model=model)
    straight = assemble(run, dataset, CPU, ALONE)
    losses = [straight.step().loss for _ in range(25)]
    assert losses[-1] < losses[0] - 0.5
    first = assemble(run, dataset, CPU, ALONE)
    begun = [first.step().loss for _ in range(11)]
    checkpoints.save(tmp_path, first.state(), ALONE)
    resumed = assemble(run, dataset, CPU, ALONE)
    assert checkpoints.load_newest(tmp_path, run.run_id, resumed, ALONE) == []
    assert begun + [resumed.step().loss for _ in range(14)] == losses
    one, other = (torch.cat([p.detach().flatten() for p in t.model.parameters()]) for t in (straight, resumed))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("saved", "read"),
    [("mamba2", "gated deltanet"), ("gated deltanet lowrank", "gated deltanet"), ("moe", "moe lowrank")],
)
def test_a_checkpoint_of_another_part_is_refused(
    saved: str, read: str, tiny_run: RunConfig, dataset: Dataset, tmp_path: Path
) -> None:
    """Were it under this run's name, as ids keep them apart otherwise."""
    one, other = (assemble(replace(tiny_run, model=SYSTEMS[name]), dataset, CPU, ALONE) for name in (saved, read))
    one.step()
    checkpoints.save(tmp_path, one.state(), ALONE)
    before = [parameter.clone() for parameter in other.model.parameters()]
    with pytest.raises(ValueError, match=r"the checkpoint (lacks|has) model\..*; start the run anew"):
        checkpoints.load_newest(tmp_path, one.state()[0]["run_id"], other, ALONE)
    assert all(map(torch.equal, before, other.model.parameters()))


@pytest.mark.parametrize("name", ["moe", "mamba2 lowrank", "gated deltanet"])
def test_recomputed_activations_change_no_bit(name: str, tiny_run: RunConfig, dataset: Dataset) -> None:
    run = replace(tiny_run, model=SYSTEMS[name])
    plain, other = (assemble(run, dataset, how, ALONE) for how in (CPU, replace(CPU, recompute="block")))
    assert [other.step().loss for _ in range(4)] == [plain.step().loss for _ in range(4)]


def _in_company(rank: int, size: int, job: Job) -> None:
    with process_group(torch.device("cpu"), job.folder / "meeting", rank, size, ["here"]):
        kinds = {kind: course(job.trainer(World(rank, size, torch.device("cpu"), kind)), STEPS) for kind in KINDS}
    torch.save(kinds, job.folder / f"of-{rank}.pt")


@pytest.mark.parametrize("name", ["moe", "mamba2 lowrank", "gated deltanet"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes are forked and run on CPUs")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch raises its own on import; fork beside threads
def test_two_processes_train_as_one(name: str, tiny_run: RunConfig, dataset: Dataset, tmp_path: Path) -> None:
    """Replicated or sharded; 13 steps of 8 sequences and one of 2, in micro-batches of 2."""
    train = replace(tiny_run.train, tokens=16 * (8 * (STEPS - 1) + 2))
    job = Job(tmp_path, replace(tiny_run, model=SYSTEMS[name], train=train), dataset.path)
    expected = course(job.trainer(ALONE), STEPS)
    in_processes(2, _in_company, job)
    for kind, got in torch.load(tmp_path / "of-0.pt").items():
        assert got["losses"] == pytest.approx(expected["losses"], rel=1e-5), kind
        assert got["norms"] == pytest.approx(expected["norms"], rel=2e-4), kind
        torch.testing.assert_close(got["weights"], expected["weights"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["moe lowrank", "mamba2 lowrank", "gated deltanet lowrank"])
def test_a_submitted_run_is_trained_and_recorded(
    name: str, tiny_run: RunConfig, submitted: Callable[..., Path], tmp_path: Path
) -> None:
    run_dir = submitted(replace(tiny_run, model=SYSTEMS[name]), tmp_path)
    Run(run_dir)()
    assert (run_dir / "run.json").exists()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
@pytest.mark.parametrize("name", ["mamba2 static", "gated deltanet lowrank"])
def test_all_layers_share_one_program(name: str) -> None:
    """The mixture of experts is compiled in test_moe.py, on torch's grouped products."""
    torch.compiler.reset()
    model = Decoder(replace(SYSTEMS[name], layers=3), seed=0)
    expected = model(TOKENS).logits
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    model.compile(backend=backend, fullgraph=True, dynamic=False)
    assert torch.equal(model(TOKENS).logits, expected)
    assert len(graphs) == 2  # a block's and the last norm's


@on_a_gpu
@pytest.mark.parametrize("name", ["moe", "moe lowrank", "mamba2 lowrank", "gated deltanet lowrank"])
def test_bfloat16_on_a_gpu_follows_float32(name: str, tiny_run: RunConfig, dataset: Dataset) -> None:
    """Steps are captured as CUDA graphs, but for those in which the host waits for the GPU."""
    run = replace(tiny_run, model=SYSTEMS[name])
    torch.compiler.reset()
    checked, trainer = assemble(run, dataset, CPU, ALONE), gpu_trainer(run, dataset)
    assert trainer._engine is not None
    assert trainer.compiled
    assert trainer._engine.captured != trainer.model.waits_for_host(torch.device("cuda"))
    for step in [step for window in to_the_end(trainer) for step in window]:
        assert step.loss == pytest.approx(checked.step().loss, abs=6e-2)
