"""What one run is: frozen, hashable values without torch, so that planning and status start at once.

T sequence length, V vocabulary, D channels. Everything in `RunConfig` changes what is learned and is part of
the run's identity; how it is executed (device, micro-batches, GPUs) is `Execution` and is not.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal, get_args

from experiments.design.data import DataConfig

Site = Literal["q", "k", "v", "o", "gate", "up", "down"]  # the linear maps of a layer
Kind = Literal["none", "static", "headwise", "lowrank"]
SITES: tuple[Site, ...] = get_args(Site)


@dataclass(frozen=True)
class ConvConfig:
    """A short convolution after each of the named linear layers (arXiv 2606.03825, section 2)."""

    kind: Kind = "none"
    sites: tuple[Site, ...] = ()
    width: int = 4  # taps
    rank: int = 16  # of the low-rank generator
    head_size: int = 16  # consecutive channels that share a head-wise filter
    residual: bool = True
    static_filter: bool = True  # a per-channel filter beside the dynamic one

    def __post_init__(self) -> None:
        if len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites must name each once; got {list(self.sites)}; remove the second")
        if self.kind == "none" and self.sites:
            raise ValueError(f"kind 'none' takes no sites; got {list(self.sites)}; remove them or set another kind")
        if self.kind != "none" and not self.sites:
            raise ValueError(f"kind {self.kind!r} needs sites; got none; name some of {', '.join(SITES)}")
        for name in ("width", "rank", "head_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-style decoder: pre-norm, RMSNorm, SwiGLU, RoPE."""

    layers: int
    width: int  # of the residual stream, D
    ffn: int  # hidden width of the SwiGLU
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = True
    qk_norm: bool = False
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    conv: ConvConfig = field(default_factory=ConvConfig)

    def __post_init__(self) -> None:
        if self.width % self.heads or self.head_dim % 2:
            raise ValueError(f"heads must divide width into even heads; got {self.heads} and {self.width}")
        if self.kv_heads < 1 or self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads; got {self.kv_heads} and {self.heads}")
        if self.conv.kind == "headwise":
            for site in self.conv.sites:
                channels = self.linear_shape(site)[1]
                if channels % self.conv.head_size:
                    raise ValueError(
                        f"head_size must divide the {channels} channels of {site!r}; got {self.conv.head_size}"
                    )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def linear_shape(self, site: str) -> tuple[int, int]:
        """(inputs, outputs) of one of a layer's seven linear maps."""
        kv = self.kv_heads * self.head_dim
        return {
            "q": (self.width, self.width),
            "k": (self.width, kv),
            "v": (self.width, kv),
            "o": (self.width, self.width),
            "gate": (self.width, self.ffn),
            "up": (self.width, self.ffn),
            "down": (self.ffn, self.width),
        }[site]


@dataclass(frozen=True)
class TrainConfig:
    """Optimisation of one run. AdamW; linear warm-up, then cosine to zero (paper, section 4)."""

    tokens: int  # D, a whole number of sequences
    sequence_length: int
    batch_sequences: int  # of the global batch; the last batch may be short
    learning_rate: float
    evaluate_every: int  # tokens; the same for every arm of a size, so that losses can be compared on the way
    held_out_sequences: int
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-10
    warmup_fraction: float = 0.1
    clip_norm: float = 1.0  # of the gradient; the paper does not state one

    @property
    def sequences(self) -> int:
        return self.tokens // self.sequence_length

    @property
    def steps(self) -> int:
        return -(-self.sequences // self.batch_sequences)


@dataclass(frozen=True)
class RunConfig:
    """One training run: an arm at a size with a seed."""

    sweep: str
    arm: str
    baseline: str
    ladder: str
    size: str
    seed: int
    model: ModelConfig
    train: TrainConfig
    data: DataConfig

    @property
    def run_id(self) -> str:
        """Readable prefix plus a hash of everything that decides the outcome.

        The sweep's name and its choice of baseline are left out: they decide how a run is read, not what it is.
        """
        content = {k: v for k, v in dataclasses.asdict(self).items() if k not in ("sweep", "baseline")}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return f"{self.arm}-{self.size}-s{self.seed}-{digest[:10]}"


@dataclass(frozen=True)
class Execution:
    """How a run is executed on given hardware. Set by the profile; not part of the run's identity."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    gpus: int = 1  # processes, one a GPU; on a CPU also the number of processes
    micro_batch: int = 0  # sequences per forward pass and process; 0: the share of the batch, up to 32k tokens
    compile: bool = True  # torch.compile, on a GPU only
    threads: int = 1  # of torch on a CPU; a fixed number keeps sums in one order
    checkpoint_minutes: float = 10.0
    max_attempts: int = 20  # a run that is interrupted more often has failed
