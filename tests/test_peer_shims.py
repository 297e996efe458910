"""Shims with the arguments of others around dynconv, the script that runs their suites on them, and bench kernels."""

import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peer_shims
import pytest
import torch
from convolutions import relative_error
from torch import Tensor

from experiments.bench import cases

PEERS = {
    "causal_conv1d.py": "from peer_shims import causal_conv1d_fn",
    "fla/modules/convolution.py": "from peer_shims import fla_causal_conv1d as causal_conv1d",
    "attn_gym/linear/kda/short_conv/__init__.py": "from peer_shims import attention_gym_conv1d as causal_conv1d",
}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Packages of the others' names, each a shim."""
    for name, text in PEERS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for parent in path.relative_to(tmp_path).parents[:-1]:
            (tmp_path / parent / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    others = [name for name in sys.modules if name.partition(".")[0] in ("causal_conv1d", "fla", "attn_gym")]
    real = {name: sys.modules.pop(name) for name in others}  # a test before this one may have imported a real one
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("causal_conv1d", "fla", "attn_gym")]:
        del sys.modules[name]
    sys.modules.update(real)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench_compares_what_is_installed(installed: Path, dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert installed.is_dir()
    found = list(cases._installed_peers())
    names = ["causal-conv1d", "flash-linear-attention", "flash-linear-attention, cuda", "attention-gym"]
    assert [provider.name for provider in found] == names
    for provider in found:
        assert provider.error(cases.Case("static", B=2, T=9, D=16, dtype=dtype), "cpu") < 0.01
    assert capsys.readouterr().err == ""


def test_bench_says_what_is_missing_or_broken(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (installed / "fla" / "modules" / "convolution.py").write_text("raise RuntimeError('wants another Triton')")
    (installed / "attn_gym" / "linear" / "kda" / "short_conv" / "__init__.py").write_text("import cutlass_of_nowhere")
    assert [provider.name for provider in cases._installed_peers()] == ["causal-conv1d"]
    said = capsys.readouterr().err
    assert "flash-linear-attention is left out: wants another Triton\n" in said
    assert "attention-gym is left out: No module named 'cutlass_of_nowhere'\n" in said


def loop(x: Tensor, weight: Tensor, past: Tensor) -> Tensor:  # [B, D, T], [D, W] (current last), [B, D, W-1]
    """A causal convolution in float64, token by token."""
    padded, width = torch.cat([past, x], 2), weight.shape[1]
    return torch.stack([(padded[:, :, t : t + width] * weight).sum(2) for t in range(x.shape[2])], 2)


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("length", [3, 5])
def test_decoding_in_place_as_causal_conv1d(length: int, circular: bool) -> None:
    """Chunks of several tokens, some sequences absent; what a longer or circular state holds is what was read last."""
    torch.manual_seed(0)
    weight, tokens = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 6, 9, dtype=torch.float64)
    pool, rows = torch.zeros(5, 6, length, dtype=torch.float64), torch.tensor([4, -1, 2], dtype=torch.int32)
    outputs = []
    for begin, end in itertools.pairwise([0, 1, 3, 5, 6, 9]):
        seen = torch.full((3,), begin, dtype=torch.int32) if circular else None
        given: dict[str, Any] = {"cache_seqlens": seen, "conv_state_indices": rows}
        outputs.append(peer_shims.causal_conv1d_update(tokens[:, :, begin:end], pool, weight, **given))
    got, want = torch.cat(outputs, 2), loop(tokens, weight, tokens.new_zeros(3, 6, 3))
    assert relative_error(got[[0, 2]], want[[0, 2]]) < 1e-14
    assert not got[1].any()
    assert not pool[[0, 1, 3]].any()
    if not circular:
        assert torch.equal(pool[[4, 2]], tokens[[0, 2]][:, :, -length:])


def test_decoding_in_place_as_attention_gym() -> None:
    torch.manual_seed(0)
    weight, tokens = torch.randn(6, 4, dtype=torch.float64), torch.randn(3, 5, 6, dtype=torch.float64)
    pool, rows = torch.zeros(5, 3, 6, dtype=torch.float64), torch.tensor([4, 0, 2], dtype=torch.int32)
    steps = [peer_shims.attention_gym_decode(tokens[:, t], weight, pool, state_indices=rows) for t in range(5)]
    got, want = torch.stack(steps, 2), loop(tokens.transpose(1, 2), weight, tokens.new_zeros(3, 6, 3))
    assert relative_error(got[[0, 2]], want[[0, 2]]) < 1e-14
    assert not got[1].any()
    assert not pool[[0, 1, 3]].any()
    assert torch.equal(pool[[4, 2]], tokens[[0, 2], 2:])


SUITE = """
import pytest, torch
from fla.modules.convolution import ShortConvolution, causal_conv1d

@pytest.mark.parametrize(("T", "D"), [(4, 6), (400, 600)])
def test_size(T, D):
    x = torch.randn(2, T, D, device="cuda")
    module = ShortConvolution(D, 4, bias=True, device="cuda")
    y, cache = module(x, output_final_state=True)
    padded = torch.nn.functional.conv1d(x.transpose(1, 2), module.weight, module.bias, padding=3, groups=D)[..., :T]
    torch.testing.assert_close(y, torch.nn.functional.silu(padded).transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert torch.equal(cache, x.transpose(1, 2)[..., -4:])

def test_wrong():
    assert causal_conv1d(torch.ones(1, 1, 1), torch.ones(1, 2))[0].item() == 2

def test_elsewhere():
    pytest.skip("for another machine")
"""


@pytest.mark.slow
def test_the_script_counts_what_passes_fails_and_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "flash-linear-attention" / "tests" / "modules" / "test_conv.py"
    path.parent.mkdir(parents=True)
    path.write_text(SUITE)
    script = str(Path(__file__).parent / "peers.py")
    options = ["--suite", "flash-linear-attention", "--suite", "causal-conv1d", "--largest", "1000"]
    done = subprocess.run(
        [sys.executable, script, str(tmp_path), *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    table, _, notes = done.stdout.partition("\n\n")
    rows = [line.split() for line in table.splitlines()]
    assert rows[1:] == [["flash-linear-attention", "1", "1", "1", "1"], ["causal-conv1d", "-", "-", "-", "-"]]
    assert "flash-linear-attention: 1 larger than 1,000 elements" in notes
    assert "flash-linear-attention: 1 for another machine" in notes
    assert "flash-linear-attention: FAILED test_wrong: " in notes
    assert "causal-conv1d: " in notes
    assert "test_causal_conv1d.py: not there" in notes
