"""Exact parameters and FLOPs of a model, from its configuration alone.

A multiply-add counts as two FLOPs. Counted: every matrix product with the LM head, causal attention as half of
the full product, the convolutions and the making of their filters. Not counted, in any arm: norms, activations,
residual additions, softmax, RoPE, the embedding's look-up, the optimiser. A backward pass counts as two forwards.
Source of the parameter counts: arXiv 2606.03825, table 1 (reproduced by tests/test_flops.py).
"""

from dataclasses import dataclass

from experiments.design.config import SITES, ConvConfig, ModelConfig

BACKWARD_OVER_FORWARD = 2


@dataclass(frozen=True)
class Counts:
    """The keys of a run that every claim is made of. Stored with the run, never inferred."""

    parameters: int
    parameters_nonembedding: int
    tokens: int
    flops_exact: int
    flops_6nd: int
    flops_6n_nonemb_d: int


def count(model: ModelConfig, tokens: int, sequence_length: int) -> Counts:
    """All conventions at once, for `tokens` training tokens in sequences of `sequence_length`."""
    total, body = parameters(model), parameters_nonembedding(model)
    per_sequence = training_flops_per_sequence(model, sequence_length)
    return Counts(
        parameters=total,
        parameters_nonembedding=body,
        tokens=tokens,
        flops_exact=per_sequence * (tokens // sequence_length),
        flops_6nd=6 * total * tokens,
        flops_6n_nonemb_d=6 * body * tokens,
    )


def parameters(model: ModelConfig) -> int:
    """N: every trained number, a tied embedding once."""
    tables = 1 if model.tied else 2
    return parameters_nonembedding(model) + tables * model.vocabulary * model.width


def parameters_nonembedding(model: ModelConfig) -> int:
    """N without the input embedding and without an untied LM head."""
    linears = sum(inputs * outputs for inputs, outputs in map(model.linear_shape, SITES))
    convs = sum(conv_parameters(model.conv, *model.linear_shape(site)) for site in model.conv.sites)
    norms = 2 * model.width + (2 * model.head_dim if model.qk_norm else 0)
    return model.layers * (linears + convs + norms) + model.width


def conv_parameters(conv: ConvConfig, inputs: int, outputs: int) -> int:
    """Parameters of one convolution on `outputs` channels whose generator reads `inputs` channels."""
    static = conv.width * outputs
    if conv.kind == "static":
        return static
    generator = {
        "headwise": inputs * conv.width * (outputs // conv.head_size),
        "lowrank": conv.rank * (inputs + conv.width * outputs),
    }[conv.kind]
    return generator + (static if conv.static_filter else 0)


def training_flops_per_sequence(model: ModelConfig, sequence_length: int) -> int:
    """Forward and backward over one sequence: training FLOPs are this times the number of sequences."""
    return (1 + BACKWARD_OVER_FORWARD) * sum(forward_flops(model, sequence_length).values())


def forward_flops(model: ModelConfig, sequence_length: int) -> dict[str, int]:
    """FLOPs of one forward pass over one sequence, by part."""
    shapes = [model.linear_shape(site) for site in SITES]
    conv_shapes = [model.linear_shape(site) for site in model.conv.sites]
    return {
        "linear": 2 * sequence_length * model.layers * sum(inputs * outputs for inputs, outputs in shapes),
        "head": 2 * sequence_length * model.width * model.vocabulary,
        # QK^T and AV, each 2 T^2 D over all heads, halved because attention is causal
        "attention": 2 * sequence_length**2 * model.width * model.layers,
        "generator": sequence_length
        * model.layers
        * sum(_generator_flops(model.conv, inputs, outputs) for inputs, outputs in conv_shapes),
        "convolution": sequence_length
        * model.layers
        * sum(_convolution_flops(model.conv, outputs) for _, outputs in conv_shapes),
    }


def _generator_flops(conv: ConvConfig, inputs: int, outputs: int) -> int:
    """The matrix products that make one token's filter."""
    return {
        "static": 0,
        "headwise": 2 * inputs * conv.width * (outputs // conv.head_size),
        "lowrank": 2 * conv.rank * (inputs + conv.width * outputs),
    }[conv.kind]


def _convolution_flops(conv: ConvConfig, outputs: int) -> int:
    """Applying one token's filter, and adding the static one to it where there are both."""
    both = conv.kind != "static" and conv.static_filter
    return conv.width * outputs * (3 if both else 2)
