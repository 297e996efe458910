"""Every named arm, small: it learns real text, resumes bit for bit, and no logit depends on a later token."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.data.dataset import Dataset
from experiments.design.arms import ARMS
from experiments.design.config import Execution, RunConfig
from experiments.models.decoder import Decoder
from experiments.parts.base import Shape
from experiments.training import checkpoints
from experiments.training.assembly import assemble
from experiments.training.parallel import World

ALONE = World(0, 1, torch.device("cpu"))
CPU = Execution(device="cpu")
SHAPE = Shape(width=16, heads=2, ffn=24, rank=2, head_size=8)


def fitted(run: RunConfig, name: str) -> RunConfig:
    arm = ARMS[name]
    plain = replace(run.model, mixer=arm.mixer.fitted(SHAPE), ffn=arm.ffn.fitted(SHAPE))
    return replace(run, arm=name, model=replace(plain, conv=arm.conv.fitted(SHAPE, plain.sites())))


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_learns_and_resumes_bit_for_bit(
    name: str, tiny_run: RunConfig, dataset: Dataset, tmp_path: Path
) -> None:
    run = fitted(tiny_run, name)
    straight = assemble(run, dataset, CPU, ALONE)
    assert run.model.parameters() == sum(parameter.numel() for parameter in straight.model.parameters())
    losses = [straight.step().loss for _ in range(run.train.steps)]
    assert losses[-1] < losses[0] - 0.5
    first = assemble(run, dataset, CPU, ALONE)
    for _ in range(11):
        first.step()
    checkpoints.save(tmp_path, first.state(), ALONE)
    resumed = assemble(run, dataset, CPU, ALONE)
    assert checkpoints.load_newest(tmp_path, run.run_id, resumed, ALONE) == []
    assert [resumed.step().loss for _ in range(14)] == losses[11:]
    one, other = straight.evaluate(lambda: False), resumed.evaluate(lambda: False)
    assert one is not None
    assert other is not None
    assert one.metrics == other.metrics


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_no_logit_of_an_arm_depends_on_a_later_token(name: str, qk_norm: bool, tiny_run: RunConfig) -> None:
    config = fitted(tiny_run, name).model
    model = Decoder(replace(config, mixer=replace(config.mixer, qk_norm=qk_norm)), seed=0).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    tokens = torch.randint(300, (2, 12), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, 7] = (tokens[0, 7] + 1) % 300
    before, after = model(tokens).logits, model(changed).logits
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.equal(before[0, 7], after[0, 7])
    assert torch.equal(before[1], after[1]) == (not name.endswith("mismatched"))
