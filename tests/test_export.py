"""Runs outside of this project: exported for Hugging Face's transformers, and a convolution in a model of theirs."""

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_decoder import CONVS
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from experiments.cli.main import main
from experiments.design.arms import ALL_LINEAR, QKV
from experiments.evaluation.export import export
from experiments.evaluation.generate import Sampling, generate
from experiments.evaluation.load import load_run
from experiments.parts.attention import Attention
from experiments.parts.gated_deltanet import GatedDeltaNet
from experiments.parts.mamba2 import Mamba2
from experiments.parts.moe import MoE
from experiments.parts.short_convolution import (
    HeadwiseConvolution,
    LowRankConvolution,
    NoConvolution,
    StaticConvolution,
)
from experiments.parts.swiglu import SwiGLU

MAMBA, DELTA = Mamba2(heads=3, head_size=6, state=8), GatedDeltaNet(heads=2, key=6, value=8)
EXPORTED: dict[str, dict[str, Any]] = {
    **{name: {"conv": conv} for name, conv in CONVS.items()},
    "qk-norm": {"mixer": Attention(4, 2, qk_norm=True)},
    "untied": {"tied": False},
    "static, no residual": {"conv": StaticConvolution(("q", "down"), residual=False)},
    "no static filter": {"conv": LowRankConvolution(QKV, rank=2, static_filter=False)},
    "mamba2": {"mixer": MAMBA, "conv": NoConvolution()},
    "mamba2, static, silu": {"mixer": MAMBA, "conv": StaticConvolution(("x", "b"), residual=False, activation="silu")},
    "mamba2, lowrank": {"mixer": MAMBA, "conv": LowRankConvolution(("x", "c", "dt", "o", "up"), rank=2)},
    "gated deltanet": {"mixer": DELTA, "conv": NoConvolution()},
    "gated deltanet, headwise": {
        "mixer": DELTA,
        "conv": HeadwiseConvolution((*QKV, "mixer_input"), head_size=2, generator_init="linear"),
    },
    "experts": {"ffn": MoE(experts=5, top_k=2, shared=1, hidden=8), "conv": LowRankConvolution(ALL_LINEAR, rank=2)},
    "one expert": {"mixer": MAMBA, "ffn": MoE(experts=3, top_k=1, shared=2, hidden=8), "conv": NoConvolution()},
}


@pytest.fixture(scope="module", params=EXPORTED)
def exported(request: pytest.FixtureRequest, finished: Callable[..., Path], tmp_path_factory: Any) -> tuple[Any, Any]:
    """A trained run, and its exported model as transformers loads it."""
    run = load_run(finished(**EXPORTED[request.param]))
    folder = tmp_path_factory.mktemp("exported") / "model"
    with torch.no_grad():  # away from special initial values
        generator = torch.Generator().manual_seed(0)
        for parameter in run.model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    export(run, folder)
    return run, folder


def test_what_the_exported_code_cannot_express_is_refused(finished: Callable[..., Path], tmp_path: Path) -> None:
    class Other(SwiGLU):
        kind = "other"

    run = load_run(finished())
    config = replace(run.config, model=replace(run.config.model, ffn=Other(24)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="export knows swiglu, moe here; an-arm has other"):
        export(run._replace(config=config), tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mamba2", "gated deltanet", "experts"])
def test_new_weights_of_the_exported_architecture_are_initialised(
    name: str, finished: Callable[..., Path], tmp_path: Path
) -> None:
    """As somebody who trains it from scratch draws them."""
    export(load_run(finished(**EXPORTED[name])), tmp_path / "model")
    config = AutoConfig.from_pretrained(tmp_path / "model", trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    for parameter in model.parameters():
        assert 0 <= parameter.abs().max() < 10
    logits = model(torch.arange(12)[None]).logits
    assert 0 < logits.std() < 1


def test_the_exported_model_gives_the_same_logits_and_survives_its_own_saving(
    exported: tuple[Any, Path], tmp_path: Path
) -> None:
    run, folder = exported
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(2))
    wanted = run.model(tokens).logits
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "who may read one file may read all"
    assert (
        AutoTokenizer.from_pretrained(folder, trust_remote_code=True).encode("def f(x):\n")
        == run.tokenizer.encode("def f(x):\n").ids
    )


@pytest.mark.parametrize("beams", [1, 3])
def test_the_exported_model_generates_with_caches_what_it_generates_without(
    exported: tuple[Any, Path], beams: int
) -> None:
    run, folder = exported
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    # The second prompt is padded on the left. Both must go on as they do alone.
    prompts = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    settings = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    together = model.generate(prompts, attention_mask=mask, **settings)
    for row, prompt in enumerate(prompts):
        alone = prompt[mask[row].bool()][None]
        uncached = model.generate(alone, attention_mask=torch.ones_like(alone), use_cache=False, **settings)
        assert together[row, 5:].tolist() == uncached[0, alone.shape[1] :].tolist()
    if beams == 1:
        drawn = itertools.islice(generate(run.model, prompts[:1], Sampling(temperature=0), seed=0), 8)
        assert [int(token) for token in drawn] == together[0, 5:].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lowrank", "one expert"])
def test_an_exported_model_needs_only_transformers_torch_and_dynconv(
    name: str, finished: Callable[..., Path], tmp_path: Path
) -> None:
    folder, run_dir = tmp_path / "model", finished(**EXPORTED[name])
    assert main(["export", str(run_dir), "--format", "hf", "-o", str(folder)]) == 0
    program = f"""
import sys
sys.modules["experiments"] = sys.modules["analysis"] = None  # importing them fails
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
prompt = tokenizer("def f(", return_tensors="pt")
made = model.generate(**prompt, max_new_tokens=4, do_sample=False, eos_token_id=None)
print(made[0, -4:].tolist())
"""
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    run = load_run(run_dir)
    prompt = torch.tensor([run.tokenizer.encode("def f(").ids])
    wanted = [int(t) for t in itertools.islice(generate(run.model, prompt, Sampling(temperature=0), seed=0), 4)]
    assert json.loads(printed) == wanted


def test_the_example_with_a_llama_of_transformers_trains() -> None:
    page = (Path(__file__).parent.parent / "dynconv" / "README.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) < 30
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(code, names)
    model = names["model"]
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    tokens = torch.tensor([list((b"def f(x):\n    return x + 1\n" * 8)[:128])])
    losses = []
    for _ in range(20):
        loss = model(tokens, labels=tokens).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]
    filters = [p for name, p in model.named_parameters() if name.endswith("conv.up")]
    assert len(filters) == 6
    assert all(bool(p.detach().abs().max() > 0) for p in filters)  # they start at zero: all of them have learnt
