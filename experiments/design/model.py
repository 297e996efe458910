"""A model's configuration, and its exact numbers of parameters and FLOPs, which are sums over its parts.

A multiply-add counts as two FLOPs. Counted are every matrix product including the LM head, causal attention as half of
the full product, the convolutions, and the generation of their filters. Not counted, in any arm, are norms,
activations, residual additions, softmax, RoPE, the look-up of embeddings and the optimizer. A backward pass counts as
two forward passes.
Source of the parameter counts: arXiv 2606.03825, table 1 (reproduced by tests/test_model.py).
"""

from collections import Counter
from dataclasses import dataclass, field

from experiments.parts.attention import Attention
from experiments.parts.base import FFN_INPUT, MIXER_INPUT, Fact, LinearMap
from experiments.parts.registry import AnyConvolution, FeedForward, Mixer
from experiments.parts.short_convolution import NoConvolution
from experiments.parts.swiglu import SwiGLU

BACKWARD_OVER_FORWARD = 2


@dataclass(frozen=True)
class Counts:
    """Parameters, tokens and training FLOPs of a run. Its record stores them, and the analysis reads them from there.

    FLOPs are by the named conventions: exact, 6 N D, 6 N_active D and 6 N_nonemb D.
    """

    parameters: int  # N: a tied embedding counts once
    parameters_active: int  # those that one token uses
    parameters_nonembedding: int  # N without the input embedding and without an untied LM head
    tokens: int  # D
    flops_exact: int
    flops_6nd: int
    flops_6nactive_d: int
    flops_6n_nonemb_d: int


@dataclass(frozen=True)
class ModelConfig:
    """A pre-norm decoder: an embedding, `layers` layers of a mixer and a feed-forward part, and an LM head."""

    layers: int
    width: int  # of the residual stream, D
    vocabulary: int
    mixer: Mixer = field(default_factory=Attention)
    ffn: FeedForward = field(default_factory=SwiGLU)
    conv: AnyConvolution = field(default_factory=NoConvolution)
    tied: bool = True  # the LM head uses the weights of the embedding
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    # Whether all outputs are decoded from the last token's state (models/readout.py). Such a model is not causal.
    reads_last_token: bool = False

    @property
    def sequence_group(self) -> int:
        """How many neighbouring sequences of a batch read one another; 1 if each is processed independently.

        A process's share of a batch and a micro-batch must consist of whole groups. A model with groups above 1 can
        neither decode nor take packed documents.
        """
        return self.conv.sequence_group

    def linear_maps(self) -> dict[str, LinearMap]:
        """Site -> shape of each linear map of one layer."""
        mixer, ffn = self.mixer.linear_maps(self.width), self.ffn.linear_maps(self.width)
        shared = sorted(mixer.keys() & ffn.keys())
        # With a shared name, the module would have two convolutions where the counts have one.
        assert not shared, f"{self.mixer.kind} and {self.ffn.kind} both name a linear map {shared}; rename one"
        return mixer | ffn

    def sites(self) -> dict[str, LinearMap]:
        """Site -> shape, for every place that a convolution may have in a layer.

        These are the input of each part, and the output of each of its linear maps.
        """
        on_input = LinearMap(self.width, self.width)
        self.linear_maps()  # checks that no two maps have the same name
        mixer, ffn = self.mixer.linear_maps(self.width), self.ffn.linear_maps(self.width)
        return {MIXER_INPUT: on_input, **mixer, FFN_INPUT: on_input, **ffn}

    def convolutions(self) -> list[LinearMap]:
        """For each convolution of one layer: (channels that its generator reads, channels that it convolves)."""
        sites = self.sites()
        return [self.conv.widths(sites[site], self.width) for site in self.conv.sites]

    def parameters(self) -> int:
        """N: all parameters; a tied embedding counts once."""
        return self.parameters_nonembedding() + (1 if self.tied else 2) * self.vocabulary * self.width

    def parameters_active(self) -> int:
        """N_active, the parameters that one token uses.

        These exclude the experts that its router does not choose and, if the embedding is not tied to the LM head, all
        of the embedding's rows but one.
        """
        parts = (self.mixer, self.ffn)
        idle = sum(part.parameters(self.width) - part.active_parameters(self.width) for part in parts)
        other_rows = 0 if self.tied else (self.vocabulary - 1) * self.width
        return self.parameters() - self.layers * idle - other_rows

    def parameters_nonembedding(self) -> int:
        """N without the input embedding and without an untied LM head."""
        convolutions = sum(map(self.conv.parameters, self.convolutions()))
        norms = 2 * self.width  # one before each part
        layer = self.mixer.parameters(self.width) + self.ffn.parameters(self.width) + convolutions + norms
        # models/readout.py has two linear maps, each with a norm.
        readout = 2 * self.width**2 + 2 * self.width if self.reads_last_token else 0
        return self.layers * layer + self.width + readout

    def forward_flops(self, sequence_length: int) -> dict[str, int]:
        """Operation -> FLOPs of one forward pass over one sequence."""
        flops = Counter({"head": 2 * sequence_length * self.width * self.vocabulary})
        if self.reads_last_token:
            flops["readout"] = 4 * sequence_length * self.width**2
        for part in (self.mixer, self.ffn):
            for name, count in part.forward_flops(self.width, sequence_length).items():
                flops[name] += self.layers * count
        for convolution in self.convolutions():
            for name, count in self.conv.forward_flops(convolution).items():
                flops[name] += self.layers * sequence_length * count
        return dict(flops)

    def training_flops_per_sequence(self, sequence_length: int) -> int:
        """FLOPs of a forward and backward pass over one sequence."""
        return (1 + BACKWARD_OVER_FORWARD) * sum(self.forward_flops(sequence_length).values())

    def count(self, tokens: int, sequence_length: int) -> Counts:
        """Parameters, and FLOPs by every convention, for `tokens` training tokens in sequences of `sequence_length`."""
        total, active, body = self.parameters(), self.parameters_active(), self.parameters_nonembedding()
        return Counts(
            parameters=total,
            parameters_active=active,
            parameters_nonembedding=body,
            tokens=tokens,
            flops_exact=self.training_flops_per_sequence(sequence_length) * (tokens // sequence_length),
            flops_6nd=6 * total * tokens,
            flops_6nactive_d=6 * active * tokens,
            flops_6n_nonemb_d=6 * body * tokens,
        )

    def facts(self) -> dict[str, Fact]:
        """The settings that a table may group by, each under the name of its part, as in "conv.width"."""
        named = [
            ("mixer", self.mixer.kind, self.mixer.kind, self.mixer.facts()),
            ("ffn", self.ffn.kind, self.ffn.kind, self.ffn.facts()),
            ("conv", self.conv.kind, "conv", self.conv.facts(self.sites())),
        ]
        facts: dict[str, Fact] = {}
        for role, kind, prefix, own in named:
            facts |= {f"{role}.kind": kind, **{f"{prefix}.{name}": value for name, value in own.items()}}
        return facts
