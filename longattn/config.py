"""Configurations: frozen, hashable dataclasses that hold choices, never arrays, functions or meshes.

A config is a Python file that builds a `Config`; `to_json` and `from_json` round-trip it with a version and
class names.
Kernel block sizes are not here: they belong to each back end's `Tuning`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from longattn import mask as masks

VERSION = 3


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value is not None and value < 1:
            raise ValueError(f"{type(owner).__name__}.{name}={value} must be at least 1")


def _fraction(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{type(owner).__name__}.{name}={value} must lie in [0, 1]")


def _above_zero(owner: object, *names: str) -> None:
    for name in names:
        if getattr(owner, name) <= 0:
            raise ValueError(f"{type(owner).__name__}.{name}={getattr(owner, name)} must be positive")


def _range(owner: object, *names: str) -> None:
    for name in names:
        low, high = getattr(owner, name)
        if not 0 < low <= high:
            raise ValueError(f"{type(owner).__name__}.{name}={(low, high)} must be (low, high) with 0 < low <= high")


@dataclass(frozen=True)
class RoPE:
    """Rotary position embedding (arXiv:2104.09864) and how it is stretched to longer contexts."""

    base: float = 10_000.0  # period base: angle of pair i at position p is p * base ** (-2 i / D)
    scaling: Literal["none", "linear", "yarn"] = "none"  # linear: arXiv:2306.15595; yarn: arXiv:2309.00071
    factor: float = 1.0  # how many times longer than original_T the context becomes (linear, yarn)
    original_T: int = 2048  # the context length of the original training (yarn)

    def __post_init__(self) -> None:
        _positive(self, "original_T")
        if self.base <= 1:
            raise ValueError(f"RoPE.base={self.base} must exceed 1")
        if self.factor < 1:
            raise ValueError(f"RoPE.factor={self.factor} must be at least 1: it stretches the context")
        if self.scaling == "none" and self.factor != 1:
            raise ValueError(f"RoPE.factor={self.factor} has no effect with scaling='none'; choose 'linear' or 'yarn'")


@dataclass(frozen=True)
class Softmax:
    """Exact softmax attention with any mask."""

    mask: masks.Mask = masks.Causal()  # an expression on the command line: "Causal() & Window(512)"
    rope: RoPE | None = RoPE()  # None: no position encoding
    qk_norm: bool = False  # RMSNorm of q and k per head, before RoPE
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)
    sinks: bool = False  # one learned extra logit per head in the denominator

    def __post_init__(self) -> None:
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
class LinearAttention:
    """Softmax replaced by the product of positive features, elu(x) + 1 (arXiv:2006.16236)."""

    eps: float = 1e-6  # added to the sum of weights that divides the output

    def __post_init__(self) -> None:
        _above_zero(self, "eps")


@dataclass(frozen=True)
class Performer:
    """Softmax estimated with positive orthogonal random features, FAVOR+ (arXiv:2009.14794)."""

    features: int = 256  # random features of a head
    seed: int = 0  # of the features, which are no parameters
    eps: float = 1e-6  # added to the sum of weights that divides the output

    def __post_init__(self) -> None:
        _positive(self, "features")
        _above_zero(self, "eps")


@dataclass(frozen=True)
class Based:
    """exp(q k) replaced by its Taylor series up to the square (arXiv:2402.18668)."""

    features: int = 16  # size of a query/key head before the feature map
    eps: float = 1e-6  # added to the sum of weights that divides the output

    def __post_init__(self) -> None:
        _positive(self, "features")
        _above_zero(self, "eps")


@dataclass(frozen=True)
class RetNet:
    """Retention: a fixed decay per head (arXiv:2307.08621)."""

    V: int | None = None  # size of a value head; None: 2 * Model.D
    fastest: float = 1 / 32  # what the first head forgets per token
    slowest: float = 1 / 512  # what the last head forgets per token; those between in equal ratios
    rope: RoPE | None = RoPE()  # None: no position encoding but the decay

    def __post_init__(self) -> None:
        _positive(self, "V")
        if not 0 < self.slowest <= self.fastest < 1:
            raise ValueError(
                f"RetNet.slowest={self.slowest} and fastest={self.fastest} must be 0 < slowest <= fastest < 1"
            )


@dataclass(frozen=True)
class GLA:
    """Gated linear attention: a decay per channel that depends on the token (arXiv:2312.06635)."""

    D: int | None = None  # size of a query/key head; None: Model.D / 2
    rank: int = 16  # of the decay's projection
    temperature: float = 16.0  # decays are sigmoid(.) ** (1 / temperature)

    def __post_init__(self) -> None:
        _positive(self, "D", "rank")
        _above_zero(self, "temperature")


@dataclass(frozen=True)
class Mamba2:
    """State-space duality: a decay per head that depends on the token (arXiv:2405.21060)."""

    expand: int = 2  # heads, in multiples of Model.H
    state: int = 128  # size of a query/key head: the paper's N
    groups: int = 1  # query/key heads
    taps: int = 4  # of the short convolutions
    steps: tuple[float, float] = (1e-3, 0.1)  # range of the step size at initialisation, log-uniform
    rates: tuple[float, float] = (1.0, 16.0)  # range of the decay rate at initialisation, uniform

    def __post_init__(self) -> None:
        _positive(self, "expand", "state", "groups", "taps")
        _range(self, "steps", "rates")


@dataclass(frozen=True)
class GatedDeltaNet:
    """The delta rule with a decay per head that depends on the token (arXiv:2412.06464)."""

    V: int | None = None  # size of a value head; None: 2 * Model.D
    taps: int = 4  # of the short convolutions
    steps: tuple[float, float] = (1e-3, 0.1)  # range of the step size at initialisation, log-uniform
    rates: tuple[float, float] = (1.0, 16.0)  # range of the decay rate at initialisation, uniform

    def __post_init__(self) -> None:
        _positive(self, "V", "taps")
        _range(self, "steps", "rates")


@dataclass(frozen=True)
class KimiDeltaAttention:
    """The delta rule with a decay per channel that depends on the token (arXiv:2510.26692)."""

    V: int | None = None  # size of a value head; None: Model.D
    rank: int | None = None  # of the projections of decay and output gate; None: Model.D
    taps: int = 4  # of the short convolutions
    steps: tuple[float, float] = (1e-3, 0.1)  # range of the step size at initialisation, log-uniform
    rates: tuple[float, float] = (1.0, 16.0)  # range of the decay rate at initialisation, uniform

    def __post_init__(self) -> None:
        _positive(self, "V", "rank", "taps")
        _range(self, "steps", "rates")


# The union of every mixer's config; a new mixer joins here.
Mixer = Softmax | LinearAttention | Performer | Based | RetNet | GLA | Mamba2 | GatedDeltaNet | KimiDeltaAttention


@dataclass(frozen=True)
class Model:
    """A decoder-only transformer: pre-norm residual blocks of (mixer, SwiGLU)."""

    N: int = 4  # layers
    E: int = 256  # model width
    F: int = 704  # MLP width
    H: int = 4  # query heads
    K: int = 4  # key/value heads; must divide H
    D: int = 64  # size of a query/key/value head
    W: int = 257  # vocabulary
    mixers: tuple[Mixer, ...] = (Softmax(),)  # a pattern: layer i takes mixers[i % len(mixers)]
    tie: bool = True  # the output head is the embedding, transposed
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of the computation; parameters are float32
    norm_eps: float = 1e-6  # of every RMSNorm
    mlp_chunk: int | None = None  # the MLP runs over the sequence in pieces of this many tokens
    scan: bool = True  # scan over the layers where all mixers are equal
    remat: Literal["none", "full", "attention", "dots", "offload"] = (
        "none"  # what the backward pass recomputes; see models/transformer.py
    )

    def __post_init__(self) -> None:
        _positive(self, "N", "E", "F", "H", "K", "D", "W", "mlp_chunk")
        if not self.mixers:
            raise ValueError("Model.mixers=() must name at least one mixer")
        if self.H % self.K:
            raise ValueError(f"Model.K={self.K} must divide Model.H={self.H}")
        if self.D % 2:
            raise ValueError(f"Model.D={self.D} must be even: RoPE rotates pairs")

    @property
    def layers(self) -> tuple[Mixer, ...]:
        """The mixer of each of the N layers."""
        return tuple(self.mixers[i % len(self.mixers)] for i in range(self.N))


@dataclass(frozen=True)
class ByteLM:
    """Byte-level language modelling of local files, packed to length T."""

    glob: str = ""  # files to read ("**" recurses); "" is the Python standard library's own sources
    T: int = 1024  # tokens per row
    B: int = 8  # rows per step, over all devices
    overlap: int = 1  # bytes a piece of a long file repeats from the piece before, without loss
    valid: float = 0.05  # share of the documents held out (by a hash of the path, so it never moves)
    max_bytes: int | None = None  # stop after this many bytes of corpus
    balance: bool = False  # share a step's rows out by the pairs that attention sees, so that all devices have as many

    def __post_init__(self) -> None:
        _positive(self, "T", "B", "overlap", "max_bytes")
        _fraction(self, "valid")
        if self.overlap >= self.T:
            raise ValueError(f"ByteLM.overlap={self.overlap} must be less than T={self.T}")


@dataclass(frozen=True)
class MQAR:
    """Multi-query associative recall (Zoology, arXiv:2312.04927): key-value pairs, then queries at power-law gaps."""

    T: int = 256  # tokens per row
    B: int = 64  # rows per step
    pairs: int = 16  # key-value pairs per row
    vocabulary: int = 256  # keys are 1 .. vocabulary/2 - 1, values vocabulary/2 .. vocabulary - 1
    alpha: float = 0.01  # exponent of the power law of the gaps

    def __post_init__(self) -> None:
        _positive(self, "T", "B", "pairs")
        if 4 * self.pairs > self.T:
            raise ValueError(
                f"MQAR.pairs={self.pairs} must be at most T/4={self.T // 4}: pairs and queries take two tokens each"
            )
        if self.pairs > self.vocabulary // 2 - 1:
            raise ValueError(
                f"MQAR.pairs={self.pairs} must be at most {self.vocabulary // 2 - 1}, the number of distinct keys"
            )


@dataclass(frozen=True)
class Needle:
    """A passkey hidden in real text, asked for at the end."""

    glob: str = ""  # the haystack's files; "" is the Python standard library's own sources
    T: int = 512  # tokens per row
    B: int = 32  # rows per step
    digits: int = 4  # length of the passkey
    depth: float | None = None  # where the needle stands: 0 start, 1 end, None uniform

    def __post_init__(self) -> None:
        _positive(self, "T", "B", "digits")
        if self.depth is not None:
            _fraction(self, "depth")


Data = ByteLM | MQAR | Needle


LayoutName = Literal["contiguous", "zigzag", "striped"]  # the orders of a sequence over its devices: parallel/layout.py

if typing.TYPE_CHECKING:
    StrategyName = str
else:

    class _AnyString(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, str)

    class StrategyName(metaclass=_AnyString):
        """Any string, as the type of a field that names a strategy of `longattn.parallel.STRATEGIES`.

        That table lies above this module, which therefore cannot check the name: whoever makes a mesh from a config
        does. The command line knows by this type where to list the names.
        """


def layout_unit(layout: LayoutName, shards: int) -> int:
    """The number whose multiples a layout divides into `shards` shards: zigzag has two pieces in each."""
    return 2 * shards if layout == "zigzag" and shards > 1 else shards


@dataclass(frozen=True)
class Mesh:
    """Devices along each axis of the mesh; their product is the number of devices. All 1: one device, no mesh.

    Parameters and moments are divided among the devices on fsdp, ring and seq, whose product must divide Model.E.
    """

    data: int = 1  # rows of the batch; parameters and moments are replicated
    fsdp: int = 1  # rows of the batch
    tensor: int = 1  # heads and the MLP's width
    seq: int = 1  # positions
    ring: int = 1  # shards of the sequence, each on seq devices, between which keys and values travel: strategy usp
    strategy: StrategyName = "ring"  # how queries meet the keys of other devices; see parallel/attention.py
    layout: LayoutName = "contiguous"  # which tokens a device has; see parallel/layout.py

    def __post_init__(self) -> None:
        _positive(self, "data", "fsdp", "tensor", "seq", "ring")

    @property
    def size(self) -> int:
        """The number of devices."""
        return math.prod(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Devices along each axis, as `longattn.parallel.make_mesh` takes them; ring only where it is more than one."""
        axes = ("data", "fsdp", "tensor", *(("ring",) if self.ring > 1 else ()), "seq")
        return {axis: getattr(self, axis) for axis in axes}

    @property
    def P(self) -> int:
        """Devices along the sequence."""
        return self.ring * self.seq

    @property
    def shards(self) -> int:
        """Shards that `layout` permutes: one for each device on the ring axis for usp, else on the seq axis."""
        return self.ring if self.ring > 1 else self.seq

    @property
    def unit(self) -> int:
        """The number whose multiples data.T may be."""
        return math.lcm(self.P, layout_unit(self.layout, self.shards))


@dataclass(frozen=True)
class Optimiser:
    """AdamW with linear warm-up and cosine decay, after clipping by global norm."""

    lr: float = 1e-3  # peak learning rate
    warmup: int = 100  # steps of linear warm-up from 0
    final: float = 0.1  # learning rate at the last step, as a share of lr
    b1: float = 0.9  # decay of the first moment
    b2: float = 0.95  # decay of the second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.1  # decoupled, on matrices only
    clip: float = 1.0  # global gradient norm is clipped to this; 0 turns clipping off
    accumulate: int = 1  # micro-batches per step; must divide data.B
    z_loss: float = 0.0  # weight of the mean squared log-partition
    loss_chunk: int = 512  # tokens whose logits exist at once

    def __post_init__(self) -> None:
        _positive(self, "accumulate", "loss_chunk")
        _fraction(self, "final", "b1", "b2")
        if self.lr <= 0:
            raise ValueError(f"Optimiser.lr={self.lr} must be positive")
        for name in ("warmup", "eps", "weight_decay", "clip", "z_loss"):
            if getattr(self, name) < 0:
                raise ValueError(f"Optimiser.{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class Run:
    """How long, how often, and where."""

    name: str = "run"  # the folder under `dir`
    dir: str = "runs"  # parent of the run's folder
    steps: int = 1000  # optimiser steps
    seed: int = 0  # of the parameters and of the data order
    log_every: int = 10  # steps between lines of metrics
    eval_every: int = 250  # steps between evaluations; 0: only at the end
    eval_batches: int = 16  # batches of an evaluation; 0: the whole held-out set
    save_every: int = 250  # steps between checkpoints
    keep: int = 2  # newest checkpoints kept, besides the best
    profile: tuple[int, int] | None = None  # (first step, number of steps) of a trace, for `longattn profile --trace`
    tensorboard: bool = False  # also write TensorBoard scalars
    init_from: str = ""  # start from the parameters of this run's best checkpoint

    def __post_init__(self) -> None:
        _positive(self, "steps", "log_every", "save_every", "keep")
        for name in ("eval_every", "eval_batches"):
            if getattr(self, name) < 0:
                raise ValueError(f"Run.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.seed < 2**31:
            raise ValueError(f"Run.seed={self.seed} must lie in [0, 2**31)")
        if self.profile is not None and min(self.profile) < 1:
            raise ValueError(f"Run.profile={self.profile} must be (first step, number of steps), both at least 1")


@dataclass(frozen=True)
class Config:
    """Everything that determines a training run."""

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=ByteLM)
    mesh: Mesh = field(default_factory=Mesh)
    optimiser: Optimiser = field(default_factory=Optimiser)
    run: Run = field(default_factory=Run)

    def __post_init__(self) -> None:
        if self.data.B % self.optimiser.accumulate:
            raise ValueError(f"{self.optimiser.accumulate=} must divide {self.data.B=}")
        rows = self.data.B // self.optimiser.accumulate
        if rows % (self.mesh.data * self.mesh.fsdp):
            raise ValueError(f"{self.mesh.data=} * {self.mesh.fsdp=} must divide {rows}, the rows of a micro-batch")
        along = f"{self.mesh.ring=} * {self.mesh.seq=}" if self.mesh.ring > 1 else f"{self.mesh.seq=}"
        if short := -self.data.T % self.mesh.unit:
            unit = f"{self.mesh.unit} for {self.mesh.layout=}" if self.mesh.unit > self.mesh.P else "it"
            raise ValueError(
                f"{along} must divide {self.data.T=}: set T to a multiple of {unit}, next {self.data.T + short}"
            )
        if self.mesh.size > 1 and self.model.E % (self.mesh.fsdp * self.mesh.P):
            raise ValueError(f"{self.mesh.fsdp=} * {along} must divide {self.model.E=}: they slice matrices")
        if self.model.K % self.mesh.tensor or self.model.F % self.mesh.tensor:
            raise ValueError(f"{self.mesh.tensor=} must divide {self.model.K=} and {self.model.F=}")
        vocabulary = self.data.vocabulary if isinstance(self.data, MQAR) else 257
        if vocabulary > self.model.W:
            raise ValueError(
                f"{self.model.W=} must be at least {vocabulary}, the vocabulary of {type(self.data).__name__}"
            )


_CLASSES: dict[str, type] = {
    c.__name__: c for c in (RoPE, *typing.get_args(Mixer), Model, ByteLM, MQAR, Needle, Mesh, Optimiser, Run, Config)
}


def _encode(value: Any) -> Any:
    if isinstance(value, masks.Mask):
        return {"class": "Mask", "expression": str(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [_encode(v) for v in value]
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_decode(v) for v in value)
    if not isinstance(value, dict):
        return value
    name = value.get("class")
    if name == "Mask":
        return masks.parse(value["expression"])
    if name not in _CLASSES:
        raise ValueError(f"class {name!r} in the JSON is no config of this version; it knows {sorted(_CLASSES)}")
    cls = _CLASSES[name]
    given = {k: _decode(v) for k, v in value.items() if k != "class"}
    known = {f.name for f in dataclasses.fields(cls)}
    if given.keys() != known:
        extra, missing = sorted(given.keys() - known), sorted(known - given.keys())
        raise ValueError(
            f"{name} in the JSON has unknown fields {extra} and lacks {missing}: it was written by another version"
        )
    return cls(**given)


def to_json(config: Config) -> str:
    """The config as JSON text with a version and class names."""
    return json.dumps({"version": VERSION, "config": _encode(config)}, indent=2)


def from_json(text: str) -> Config:
    """The inverse of `to_json`. Raises ValueError for anything else, also another version's."""
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"the config is no JSON: {error}") from None
    version = document.get("version") if isinstance(document, dict) else None
    if version != VERSION:
        raise ValueError(f"config version {version!r} must be {VERSION}: it was written by another version")
    try:
        config = _decode(document.get("config"))
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"the JSON is no config: {error}") from error
    if not isinstance(config, Config):
        raise ValueError(f"the JSON holds a {type(config).__name__}, not a Config")
    return config
