"""Weights and states of other implementations, converted and converted back.

What each of them computes is restated here from its documentation, in float64 and by loops, and in its own layout.
"""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from convolutions import relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dynconv import converters
from dynconv.layers import LowRankDynamicConv, StaticShortConv
from dynconv.ops import static_convolution_step

B, T, D, R, G = 2, 9, 6, 3, 5
WIDTHS = pytest.mark.parametrize("width", [1, 2, 4, 7])


def depthwise(
    x: Tensor,  # [B, D, T]
    weight: Tensor,  # [D, W]: the current token's tap is the last
    bias: Tensor | None,  # [D]
    activation: str | None,
    before: Tensor,  # [B, D, W-1]
) -> Tensor:  # [B, D, T]
    """causal-conv1d's causal_conv1d_fn: channels first; its activations "silu" and "swish" are one function."""
    width = weight.shape[1]
    past = torch.cat([before, x], 2)
    y = torch.zeros_like(x)
    for t, tap in itertools.product(range(x.shape[2]), range(width)):
        y[:, :, t] += weight[:, tap] * past[:, :, t + tap]
    y = y if bias is None else y + bias[:, None]
    return y if activation is None else y / (1 + (-y).exp())


def short_convolution(
    x: Tensor,  # [B, T, D]
    weight: Tensor,  # [D, 1, W]
    bias: Tensor | None,  # [D]
    activation: str | None,
    residual: Tensor | None,  # [B, T, D]
    cache: Tensor,  # [B, D, W]
) -> tuple[Tensor, Tensor]:  # [B, T, D], and the next cache
    """flash-linear-attention's ShortConvolution: its cache holds the last W inputs, of which W-1 are read again."""
    width = weight.shape[2]
    y = depthwise(x.transpose(1, 2), weight[:, 0], bias, activation, cache[:, :, 1:]).transpose(1, 2)
    y = y if residual is None else y + residual
    return y, torch.cat([cache, x.transpose(1, 2)], 2)[:, :, -width:]


def low_rank(
    x: Tensor,  # [B, T, D]
    generator_input: Tensor,  # [B, T, G]
    proj_in: Tensor,  # [R, G]
    proj_out: Tensor,  # [R, W*D]: W blocks of D columns, the current token's first
    proj_out_bias: Tensor,  # [W, D]
) -> Tensor:  # [B, T, D]
    """The paper's LowRankDynamicShortConvolution, which adds its input."""
    width = len(proj_out_bias)
    filters = (generator_input @ proj_in.T @ proj_out).unflatten(2, (width, D)) + proj_out_bias
    y = x.clone()
    for t, tap in itertools.product(range(x.shape[1]), range(width)):
        if t >= tap:
            y[:, t] += filters[:, t, tap] * x[:, t - tap]
    return y


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def same_bits(got: dict[str, Tensor], want: dict[str, Tensor]) -> bool:
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def static_module(weights: dict[str, Tensor], activation: str | None, residual: bool) -> StaticShortConv:
    width, channels = weights["static_filter"].shape
    options = {"bias": "bias" in weights, "activation": activation, "dtype": torch.float64}
    module = StaticShortConv(channels, width, residual, **options)  # type: ignore[arg-type]  # a mix of types
    module.load_state_dict(weights)
    return module


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("biased", [False, True])
@WIDTHS
def test_weights_of_causal_conv1d(width: int, biased: bool, activation: str | None) -> None:
    torch.manual_seed(0)
    theirs = {"weight": normal(D, width)} | ({"bias": normal(D)} if biased else {})
    ours = converters.from_conv1d(theirs)
    x = normal(B, T, D)
    zeros = x.new_zeros(B, D, width - 1)
    want = depthwise(x.transpose(1, 2), theirs["weight"], theirs.get("bias"), activation, zeros).transpose(1, 2)
    module = static_module(ours, activation, residual=False)
    assert relative_error(module(x), want) < 1e-14
    back = converters.to_conv1d(module.state_dict())
    assert same_bits(back | {"weight": back["weight"].squeeze(1)}, theirs)


@pytest.mark.parametrize("biased", [False, True])
@WIDTHS
def test_weights_of_a_depthwise_conv1d_of_torch(width: int, biased: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.Conv1d(D, D, width, groups=D, padding=width - 1, bias=biased, dtype=torch.float64)
    x = normal(B, T, D)
    module = static_module(converters.from_conv1d(theirs.state_dict()), None, residual=False)
    assert relative_error(module(x), theirs(x.transpose(1, 2))[..., :T].transpose(1, 2)) < 1e-14
    other = nn.Conv1d(D, D, width, groups=D, padding=width - 1, bias=biased, dtype=torch.float64)
    other.load_state_dict(converters.to_conv1d(module.state_dict()))
    assert same_bits(other.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("biased", [False, True])
@WIDTHS
def test_weights_and_states_of_flash_linear_attention(width: int, biased: bool) -> None:
    """A prompt, and the tokens after it one by one, each from the state that was converted there and back."""
    torch.manual_seed(0)
    theirs = {"weight": normal(D, 1, width)} | ({"bias": normal(D)} if biased else {})
    x, cache = normal(B, T, D), torch.zeros(B, D, width, dtype=torch.float64)
    want, cache = short_convolution(x, theirs["weight"], theirs.get("bias"), "silu", x, cache)
    module = static_module(converters.from_conv1d(theirs), "silu", residual=True)
    y, state = module.prefill(x)
    assert relative_error(y, want) < 1e-14
    assert torch.equal(converters.state_from_channels_first(cache, width), state)
    for _ in range(3):
        token = normal(B, 1, D)
        held = converters.state_to_channels_first(state, width)
        want, cache = short_convolution(token, theirs["weight"], theirs.get("bias"), "silu", token, held)
        y, state = module.step(token, None, converters.state_from_channels_first(held, width))
        assert relative_error(y, want) < 1e-14
        assert torch.equal(converters.state_from_channels_first(cache, width), state)
    assert same_bits(converters.to_conv1d(module.state_dict()), theirs)


@WIDTHS
def test_states_of_causal_conv1d(width: int) -> None:
    """Its states may be longer than a filter reaches back."""
    torch.manual_seed(0)
    weight, token = normal(D, width), normal(B, 1, D)
    for length in (width - 1, width, width + 3):
        theirs = normal(B, D, length)
        ours = converters.state_from_channels_first(theirs, width)
        before = theirs[:, :, length - width + 1 :]
        want = depthwise(token.transpose(1, 2), weight, None, None, before).transpose(1, 2)
        filters = converters.from_conv1d({"weight": weight})["static_filter"]
        assert relative_error(static_convolution_step(token, ours, filters)[0], want) < 1e-14
        back = converters.state_to_channels_first(ours, length)
        assert torch.equal(back[:, :, length - width + 1 :], before)
        assert not back[:, :, : length - width + 1].any()


@WIDTHS
def test_weights_of_the_papers_module(width: int) -> None:
    torch.manual_seed(0)
    theirs = {"proj_in.weight": normal(R, G), "proj_out": normal(R, width * D), "proj_out_bias": normal(width, D)}
    module = LowRankDynamicConv(D, G, width, R, dtype=torch.float64)
    module.load_state_dict(converters.from_paper(theirs))
    x, generator_input = normal(B, T, D), normal(B, T, G)
    assert relative_error(module(x, generator_input), low_rank(x, generator_input, *theirs.values())) < 1e-14
    assert same_bits(converters.to_paper(module.state_dict()), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_bit_survives(dtype: torch.dtype) -> None:
    """NaN and its payload, infinities, subnormal numbers and negative zeros included."""
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    bits = torch.randint(torch.iinfo(integer).min, torch.iinfo(integer).max, (64, 1, 4)).to(integer)
    back = converters.to_conv1d(converters.from_conv1d({"weight": bits.view(dtype)}))
    assert torch.equal(back["weight"].contiguous().view(integer), bits)


def test_weights_can_be_written_to_a_file(tmp_path: Path) -> None:
    """Strided ones cannot, and fully_shard refuses them, too."""
    for made in (
        converters.to_conv1d({"static_filter": torch.randn(4, 6), "bias": torch.randn(6)}),
        converters.from_conv1d({"weight": torch.randn(6, 1, 4)}),
    ):
        save_file(made, tmp_path / "weights")
        assert all(torch.equal(value, made[name]) for name, value in load_file(tmp_path / "weights").items())


def test_the_example_of_the_readme() -> None:
    page = (Path(__file__).parent.parent / "dynconv" / "README.md").read_text()
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "converters" in block]
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    x = torch.randn(2, 9, 64)
    want = torch.nn.functional.silu(names["theirs"](x.transpose(1, 2))[..., :9]).transpose(1, 2)
    torch.testing.assert_close(names["ours"](x), want)


def test_a_bias_is_drawn_as_that_of_torch() -> None:
    torch.manual_seed(0)
    module = StaticShortConv(4096, width=4, bias=True)
    assert module.bias is not None
    assert 0.49 < module.bias.abs().max() <= 0.5
    assert "bias=True" in repr(module)
    assert [name for name, _ in module.named_parameters()] == ["static_filter", "bias"]
    with torch.no_grad():
        module.static_filter.zero_()
    x = torch.zeros(1, 2, 4096)
    torch.testing.assert_close(module(x), module.bias.expand(1, 2, 4096))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: converters.from_conv1d({"weight": torch.ones(4, 2, 3)}), "[D, 1, W] or [D, W]; got [4, 2, 3]; only"),
        (
            lambda: converters.from_conv1d({"conv.weight": torch.ones(4, 1, 3)}),
            "hold weight and perhaps bias; got conv.",
        ),
        (lambda: converters.from_conv1d({}), "got nothing; pass one module's own, without prefixes"),
        (lambda: converters.to_conv1d({"weight": torch.ones(4, 3)}), "must hold static_filter and perhaps bias; got"),
        (
            lambda: converters.from_paper({"proj_in.weight": torch.ones(2, 3)}),
            "must hold proj_in.weight, proj_out, proj_out_bias; got proj_in.weight;",
        ),
        (
            lambda: converters.to_paper(LowRankDynamicConv(4, 3, static_filter=False).state_dict()),
            "must hold down.weight, up, static_filter; got down.weight, up;",
        ),
        (lambda: converters.state_from_channels_first(torch.ones(2, 6, 2), 4), "L of at least W-1 = 3; got [2, 6, 2]"),
        (
            lambda: converters.state_to_channels_first(torch.ones(2, 3, 6), 2),
            "at least W-1; got 2 for a state [2, 3, 6]",
        ),
    ],
)
def test_errors_say_what_was_got(call, message: str) -> None:  # type: ignore[no-untyped-def]  # a lambda
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
