"""One dataclass for each mixer: the values that `Model.mixers` holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from longattn import mask as masks
from longattn.config.checks import above_zero, increasing, positive, typed


@dataclass(frozen=True)
class RoPE:
    """Rotary position embedding (arXiv:2104.09864) and its scaling to longer contexts.

    The fields after original_T are those of published checkpoints' `rope_scaling`, and mean the same; models/layers.py
    has the equations. A pair of channels makes original_T * frequency / (2 pi) turns within the original context.
    """

    base: float = 10_000.0  # period base: angle of pair i at position p is p * base ** (-2 i / D)
    scaling: Literal["none", "linear", "yarn", "llama3"] = (
        "none"  # linear: arXiv:2306.15595; yarn: arXiv:2309.00071; llama3: that of Llama 3.1
    )
    factor: float = 1.0  # how many times longer than original_T the context becomes
    original_T: int = 2048  # the context length of the original training (yarn, llama3)
    beta_fast: float = 32.0  # yarn: pairs of at least this many turns keep their frequency
    beta_slow: float = 1.0  # yarn: pairs of at most this many turns have it divided by factor
    truncate: bool = True  # yarn: the ramp between those two starts and ends at whole pairs
    low_freq_factor: float = 1.0  # llama3: pairs of at most this many turns have their frequency divided by factor
    high_freq_factor: float = 4.0  # llama3: pairs of at least this many turns keep it
    attention_factor: float | None = None  # factor of q and of k; None: 1, for yarn 0.1 ln(factor) + 1
    mscale: float | None = None  # yarn: attention_factor is m(mscale) / m(mscale_all_dim), m(s) = 0.1 s ln(factor) + 1
    mscale_all_dim: float | None = None  # yarn: given together with mscale

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "original_T")
        above_zero(self, "attention_factor", "mscale", "mscale_all_dim")
        if self.base <= 1:
            raise ValueError(f"RoPE.base={self.base} must exceed 1")
        if self.factor < 1:
            raise ValueError(f"RoPE.factor={self.factor} must be at least 1: it stretches the context")
        for low, high in (("beta_slow", "beta_fast"), ("low_freq_factor", "high_freq_factor")):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"RoPE.{low}={getattr(self, low)} and {high}={getattr(self, high)} must be 0 < {low} < {high}"
                )
        for name, scalings in _READ_BY.items():
            if self.scaling not in scalings and getattr(self, name) != getattr(RoPE, name):
                raise ValueError(
                    f"RoPE.{name}={getattr(self, name)} has no effect with scaling={self.scaling!r}; "
                    f"choose {' or '.join(map(repr, scalings))}, or leave it out"
                )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError(
                f"RoPE.mscale={self.mscale} and mscale_all_dim={self.mscale_all_dim} must be given together, as the "
                "attention factor is made of both; give both, or attention_factor"
            )
        if self.attention_factor is not None and self.mscale is not None:
            raise ValueError(
                f"RoPE.attention_factor={self.attention_factor} takes the place of mscale={self.mscale} and "
                f"mscale_all_dim={self.mscale_all_dim}; leave out either"
            )


# The scalings that read a field. (original_T is not here: configs of version 3 may hold one that nothing reads.)
_READ_BY = {
    "factor": ("linear", "yarn", "llama3"),
    **dict.fromkeys(("beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim"), ("yarn",)),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor"), ("llama3",)),
}


@dataclass(frozen=True)
class Mixer:
    """Base class of the configs of mixers.

    A subclass is a frozen dataclass whose name is that of the module class which computes it, in `models.MIXERS`.
    """

    def __post_init__(self) -> None:
        typed(self)


@dataclass(frozen=True)
class Softmax(Mixer):
    """Exact softmax attention with any mask."""

    mask: masks.Mask = masks.Causal()  # an expression on the command line: "Causal() & Window(512)"
    rope: RoPE | None = RoPE()  # None: no position encoding
    qk_norm: bool = False  # RMSNorm of q and k per head, before RoPE
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)
    sinks: bool = False  # one learned extra logit per head in the denominator

    def __post_init__(self) -> None:
        typed(self)
        try:
            whole = masks.parse(str(self.mask)) == self.mask
        except ValueError:
            whole = False
        if not whole:
            raise ValueError(
                f"Softmax.mask={self.mask} cannot be written to a run's config.json: build it of the masks of "
                "longattn.mask without arrays and without Fn"
            )


@dataclass(frozen=True)
class LinearAttention(Mixer):
    """Softmax replaced by the product of positive features, elu(x) + 1 (arXiv:2006.16236)."""

    eps: float = 1e-6  # added to the sum of weights that divides the output

    def __post_init__(self) -> None:
        typed(self)
        above_zero(self, "eps")


@dataclass(frozen=True)
class Performer(Mixer):
    """Softmax estimated with positive orthogonal random features, FAVOR+ (arXiv:2009.14794)."""

    features: int = 256  # random features of a head
    seed: int = 0  # draws the features, which are no parameters
    eps: float = 1e-6  # added to the sum of weights that divides the output

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "features")
        above_zero(self, "eps")


@dataclass(frozen=True)
class Based(Mixer):
    """exp(q k) replaced by its Taylor series up to the square (arXiv:2402.18668)."""

    features: int = 16  # size of a query/key head before the feature map
    eps: float = 1e-6  # added to the sum of weights that divides the output

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "features")
        above_zero(self, "eps")


@dataclass(frozen=True)
class RetNet(Mixer):
    """Retention: a fixed decay per head (arXiv:2307.08621)."""

    V: int | None = None  # size of a value head; None: 2 * Model.D
    fastest: float = 1 / 32  # share of the state that the first head forgets per token
    slowest: float = 1 / 512  # the same for the last head; heads between are spaced in equal ratios
    rope: RoPE | None = RoPE()  # None: no position encoding but the decay

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "V")
        if not 0 < self.slowest <= self.fastest < 1:
            raise ValueError(
                f"RetNet.slowest={self.slowest} and fastest={self.fastest} must be 0 < slowest <= fastest < 1"
            )


@dataclass(frozen=True)
class GLA(Mixer):
    """Gated linear attention: a decay per channel that depends on the token (arXiv:2312.06635)."""

    D: int | None = None  # size of a query/key head; None: Model.D / 2
    rank: int = 16  # rank of the decay's projection
    temperature: float = 16.0  # decays are sigmoid(.) ** (1 / temperature)

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "D", "rank")
        above_zero(self, "temperature")


@dataclass(frozen=True)
class Mamba2(Mixer):
    """State-space duality: a decay per head that depends on the token (arXiv:2405.21060)."""

    expand: int = 2  # heads per head of Model.H
    state: int = 128  # size of a query/key head: the paper's N
    groups: int = 1  # query/key heads
    norm_groups: int | None = None  # groups of channels, each with its own rms in the output norm; None: groups
    taps: int = 4  # taps of the short convolutions
    step_limit: tuple[float, float | None] = (0.0, None)  # (low, high) that step sizes are clipped to; None: no bound
    steps: tuple[float, float] = (1e-3, 0.1)  # range of the step size at initialisation, log-uniform
    rates: tuple[float, float] = (1.0, 16.0)  # range of the decay rate at initialisation, uniform

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "expand", "state", "groups", "norm_groups", "taps")
        increasing(self, "steps", "rates")
        low, high = self.step_limit
        if low < 0 or (high is not None and high <= low):
            raise ValueError(f"Mamba2.step_limit={self.step_limit} must be (low, high) with 0 <= low < high")


@dataclass(frozen=True)
class GatedDeltaNet(Mixer):
    """The delta rule with a decay per head that depends on the token (arXiv:2412.06464)."""

    V: int | None = None  # size of a value head; None: 2 * Model.D
    scale: float | None = None  # factor of q, after it was normalised; None: Model.D ** -0.5
    taps: int = 4  # taps of the short convolutions
    steps: tuple[float, float] = (1e-3, 0.1)  # range of the step size at initialisation, log-uniform
    rates: tuple[float, float] = (1.0, 16.0)  # range of the decay rate at initialisation, uniform

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "V", "taps")
        above_zero(self, "scale")
        increasing(self, "steps", "rates")


@dataclass(frozen=True)
class KimiDeltaAttention(Mixer):
    """The delta rule with a decay per channel that depends on the token (arXiv:2510.26692)."""

    V: int | None = None  # size of a value head; None: Model.D
    scale: float | None = None  # factor of q, after it was normalised; None: Model.D ** -0.5
    rank: int | None = None  # rank of the projections of decay and output gate; None: Model.D
    taps: int = 4  # taps of the short convolutions
    steps: tuple[float, float] = (1e-3, 0.1)  # range of the step size at initialisation, log-uniform
    rates: tuple[float, float] = (1.0, 16.0)  # range of the decay rate at initialisation, uniform

    def __post_init__(self) -> None:
        typed(self)
        positive(self, "V", "rank", "taps")
        above_zero(self, "scale")
        increasing(self, "steps", "rates")


def mixer_classes() -> dict[str, type[Mixer]]:
    """Every mixer's config class by its name, also those that are defined outside this package."""
    found: dict[str, type[Mixer]] = {}
    below = Mixer.__subclasses__()
    while below:
        cls = below.pop(0)
        found[cls.__name__] = cls
        below += cls.__subclasses__()
    return found
