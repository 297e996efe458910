"""How our changes to compiled programs reach torch.compile and its cache."""

import threading
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor_config
from torch.fx import Graph

from experiments.design.model import ModelConfig
from experiments.models import passes
from experiments.models.decoder import Decoder
from experiments.models.passes import OPERATORS, compile_options
from experiments.models.rotation_in_place import ROTATION_IN_PLACE
from experiments.models.weight_gradients import WIDE_PRODUCTS, WideProducts
from experiments.parts.attention import Attention
from experiments.parts.short_convolution import NoConvolution
from experiments.parts.swiglu import SwiGLU

ROOT = Path(__file__).parent.parent


@pytest.mark.filterwarnings("default")  # torch's compiler warns about itself
def test_the_backward_pass_is_changed_where_another_thread_compiles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As autograd does for a GPU. The norm is the smallest compiled program of a model."""
    torch.compiler.reset()
    seen: list[Graph] = []
    monkeypatch.setattr(WideProducts, "__call__", lambda _, graph: seen.append(graph))
    monkeypatch.setattr(WideProducts, "uuid", lambda _: None)  # not to be found in torch's cache
    model = Decoder(ModelConfig(1, 16, 8, Attention(2, 2), SwiGLU(16), NoConvolution()), 0)
    model.compile(dynamic=False)
    loss = model._apply_norm(model.norm, torch.randn(2, 3, model.config.width, requires_grad=True)).sum()
    assert len(seen) == 1
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert len(seen) == 2


def test_a_pass_of_somebody_else_stays() -> None:
    assert set(compile_options([ROTATION_IN_PLACE, WIDE_PRODUCTS])) == {
        "post_grad_custom_pre_pass",
        "post_grad_custom_post_pass",
    }
    with inductor_config.patch(post_grad_custom_pre_pass=print):
        assert set(compile_options([ROTATION_IN_PLACE, WIDE_PRODUCTS])) == {"post_grad_custom_post_pass"}


@pytest.mark.parametrize("one", [ROTATION_IN_PLACE, WIDE_PRODUCTS])
def test_the_cache_of_programs_knows_the_code_of_operators(
    one: passes.Pass, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would give programs with the gradients of older code."""
    registering = [
        path
        for folder in ("dynconv", "experiments")
        for path in (ROOT / folder).rglob("*.py")
        if "torch.library." in path.read_text()
    ]
    assert len(registering) > 2
    assert {str(path) for path in registering} <= set(OPERATORS)
    source = tmp_path / "operators.py"
    source.write_text("gradient = 2")
    monkeypatch.setattr(passes, "OPERATORS", (str(source),))
    before = one.uuid()
    passes.get_hash_for_files.cache_clear()  # as in another process
    source.write_text("gradient = 3")
    assert one.uuid() != before
