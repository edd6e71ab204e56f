"""Mixers that keep a state of fixed size instead of keys and values: the linear family.

Each is its paper's layer around one call of `longattn.ops.linear.linear_attention`; its docstring names the
differences. None adds positions where its paper has none: order comes from decays and short convolutions. If the model
has fewer key/value heads than query heads (K < H), the layer says what it does with K.
Letters: M is the number of features, R the rank of a projection, C the taps of a short convolution.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Float32, Int32

from longattn import config
from longattn.models.context import Context
from longattn.models.layers import RMSNorm, fan_in, no_state, rope_frequencies, rotate
from longattn.models.mixer import Buffers, MixerModule, Widths
from longattn.ops.calls import LinearCall
from longattn.ops.linear import xla
from longattn.ops.linear.pallas_tpu.tuning import LANES
from longattn.parallel.mesh import SLICED, Rule

Heads = Float[Array, "B T H D"]
Features = Float[Array, "B T H M"]
_F32 = 4  # bytes


# ---- parts


def project(module: nn.Module, name: str, x: Float[Array, "B T E"], H: int, D: int) -> Heads:
    """Returns x times the parameter `name` [E H D]."""
    w = module.param(name, fan_in(0, (1, 2)), (x.shape[-1], H, D), jnp.float32)
    return jnp.einsum("BTE,EHD->BTHD", x, w.astype(x.dtype))


def low_rank(module: nn.Module, name: str, x: Float[Array, "B T E"], rank: int, H: int, D: int) -> Heads:
    """Returns x times `name`_down [E R] times `name`_up [R H D]."""
    down = module.param(f"{name}_down", fan_in(0, 1), (x.shape[-1], rank), jnp.float32)
    up = module.param(f"{name}_up", fan_in(0, (1, 2)), (rank, H, D), jnp.float32)
    x = jnp.einsum("BTE,ER->BTR", x, down.astype(x.dtype))
    return jnp.einsum("BTR,RHD->BTHD", x, up.astype(x.dtype))


def out(module: nn.Module, y: Heads, model: config.Model) -> Float[Array, "B T E"]:
    """Returns the heads' outputs times the parameter `out` [H V E]."""
    w = module.param("out", fan_in((0, 1), 2, 1 / (2 * model.N)), (*y.shape[2:], model.E), jnp.float32)
    with jax.named_scope("out"):
        return jnp.einsum("BTHV,HVE->BTE", y, w.astype(y.dtype))


def convolved(
    module: Linear, name: str, x: Heads, taps: int, segment_ids: Int32[Array, "B T"] | None, *, bias: bool = False
) -> Heads:
    """Returns silu of a short causal convolution with the parameter `name`_conv [H D C], drawn from +-1/sqrt(C)."""
    H, D = x.shape[2:]
    bound = taps**-0.5
    uniform = lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)
    w = module.param(f"{name}_conv", uniform, (H, D, taps), jnp.float32)
    b = module.param(f"{name}_conv_bias", uniform, (H, D), jnp.float32) if bias else None
    return (module.context or Context()).short_convolution(x, w, b, segment_ids=segment_ids, activation="silu")[0]


def unit(x: Heads) -> Heads:
    """Returns x / |x| over the last axis, computed in float32."""
    wide = x.astype(jnp.float32)
    return (wide * jax.lax.rsqrt(jnp.sum(wide**2, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def decay(
    module: nn.Module,
    x: Array,
    steps: tuple[float, float],
    rates: tuple[float, float],
    limit: tuple[float, float | None] = (0.0, None),
) -> tuple[Float32[Array, "B T ..."], Float32[Array, "B T ..."]]:
    """Returns log_decay = -exp(decay_log) * step, and step = softplus(x + decay_bias), for x [B T H] or [B T H D].

    As in section 7 of arXiv:2405.21060: each head has a rate exp(decay_log), drawn from `rates`. The bias is drawn so
    that at x = 0 the step sizes are uniform in their logarithm over `steps`. Steps are clipped to `limit`.
    """

    def log_rate(key: Array, shape: Any, dtype: Any) -> Array:
        return jnp.log(jax.random.uniform(key, shape, dtype, *rates))

    def bias(key: Array, shape: Any, dtype: Any) -> Array:
        step = jnp.exp(jax.random.uniform(key, shape, dtype, *map(math.log, steps)))
        return step + jnp.log(-jnp.expm1(-step))  # the inverse of softplus

    shape = x.shape[2:]
    rate = jnp.exp(module.param("decay_log", log_rate, shape[:1], jnp.float32))
    step = jax.nn.softplus(x.astype(jnp.float32) + module.param("decay_bias", bias, shape, jnp.float32)[None, None])
    if limit != (0.0, None):
        step = jnp.clip(step, *limit)
    return -rate.reshape(1, 1, -1, *(1,) * (len(shape) - 1)) * step, step


def per_head(module: nn.Module, name: str, x: Float[Array, "B T E"], H: int) -> Float32[Array, "B T H"]:
    """Returns x times the parameter `name` [E H], in float32."""
    w = module.param(name, fan_in(0, 1), (x.shape[-1], H), jnp.float32)
    return jnp.einsum("BTE,EH->BTH", x, w.astype(x.dtype), preferred_element_type=jnp.float32)


def scaled_norm(y: Heads, scale: float | None, model: config.Model) -> Heads:
    """Returns RMSNorm(scale * y), where None is D**-0.5: y is linear in q, which the papers scale.

    It is the norm of y with eps / scale**2. So no kernel multiplies by a scale that bfloat16 would round.
    """
    return RMSNorm(model.norm_eps / (scale or model.D**-0.5) ** 2, name="norm")(y)


def taylor(x: Heads) -> Features:
    """Returns features whose products are 1 + s + s**2 / 2 with s = q k / sqrt(D).

    They are 1, x, and the upper triangle of x x^T. x_i x_j and x_j x_i are one feature, sqrt(2) times as large, so the
    triangle has D (D + 1) / 2.
    """
    D = x.shape[-1]
    wide = x.astype(jnp.float32) * D**-0.25
    squares = [wide[..., i : i + 1] * wide[..., i:] * _multiplicity(D - i) for i in range(D)]
    return jnp.concatenate([jnp.ones_like(wide[..., :1]), wide, *squares], -1).astype(x.dtype)


def _multiplicity(n: int) -> np.ndarray:
    """Returns factors for the n products x_i x_i, x_i x_{i+1} ...: the first occurs once in x x^T, the others twice."""
    return np.where(np.arange(n) == 0, 0.5**0.5, 1.0).astype(np.float32).reshape(1, 1, 1, -1)


def orthogonal_features(M: int, D: int, seed: int) -> np.ndarray:
    """Returns random directions [M D], orthogonal in groups of D, with the lengths of normal vectors.

    Section 3.2 of arXiv:2009.14794.
    """
    rng = np.random.default_rng(seed)

    def rotation() -> np.ndarray:
        Q, R = np.linalg.qr(rng.standard_normal((D, D)))
        return Q.T * np.sign(np.diag(R))[:, None]  # without the signs, rotations are not equally likely

    blocks = [rotation() for _ in range(-(-M // D))]
    lengths = np.linalg.norm(rng.standard_normal((M, D)), axis=1, keepdims=True)
    return (np.concatenate(blocks)[:M] * lengths).astype(np.float32)


def favor(x: Heads, directions: np.ndarray, *, query: bool) -> Features:
    """Returns positive random features exp(w x - |x|**2 / 2) / sqrt(M) of x / D**(1/4) (lemma 1 of arXiv:2009.14794).

    A query's features are divided by the largest of them, which the normaliser cancels. A key's are not: the largest
    over a sequence would let later tokens change earlier ones, and exponents never exceed |w|**2 / 2.
    """
    M, D = directions.shape
    wide = x.astype(jnp.float32) * D**-0.25
    exponent = jnp.einsum("BTHD,MD->BTHM", wide, directions, precision=jax.lax.Precision.HIGHEST)
    exponent = exponent - jnp.sum(wide**2, -1, keepdims=True) / 2
    if query:
        exponent = exponent - jax.lax.stop_gradient(jnp.max(exponent, -1, keepdims=True))
    return (jnp.exp(exponent) * M**-0.5).astype(x.dtype)


# ---- mixers


class Linear(MixerModule):
    """Base of the mixers of this family. Each defines `mix` and `sizes`."""

    in_order = True  # the state passes from token to token, so the sequence must lie in order

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T E"],
        positions: Int32[Array, "B T"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        state: None = None,
    ) -> tuple[Float[Array, "B T E"], None]:
        no_state(state)
        return self.mix(x, positions, segment_ids), None

    @nn.nowrap
    def scan(self, q: Array, k: Array, v: Array, **options: Any) -> Heads:
        """Returns the outputs of the context's `linear_attention`.

        They carry the states' checkpoint name: saving the states alone would still re-run the scan, since later ops
        read the outputs.
        """
        return checkpoint_name((self.context or Context()).linear_attention(q, k, v, **options)[0], "linear_state")

    @nn.nowrap
    def normalised(self, q: Array, k: Array, v: Array, segment_ids: Array | None) -> Heads:
        """Returns sum_s (q k_s) v_s / (eps + sum_s q k_s). A further column of v, of ones, gives the sum of weights."""
        y = self.scan(q, k, jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1), segment_ids=segment_ids)
        total = y[..., -1:].astype(jnp.float32) + self.config.eps
        return (y[..., :-1].astype(jnp.float32) / total).astype(v.dtype)

    @classmethod
    def state_elements(cls, mixer: Any, model: config.Model, T: int) -> int:
        """Returns the size of the state and of the convolutions' last inputs, which do not depend on T."""
        state, tail = cls.sizes(mixer, model)
        return state + tail

    @classmethod
    def bytes_read_per_token(cls, mixer: Any, model: config.Model, T: int, itemsize: int = 2) -> int:
        """Returns the bytes of all of it; the state is float32 whatever the itemsize."""
        state, tail = cls.sizes(mixer, model)
        return 4 * state + itemsize * tail

    @staticmethod
    def sequential_steps(mixer: Any, model: config.Model, T: int) -> int:
        """Returns the number of chunks: each waits for the state of the one before."""
        return -(-T // xla.Tuning().chunk)

    @classmethod
    def sizes(cls, mixer: Any, model: config.Model) -> tuple[int, int]:
        """Returns the elements of the recurrence's state and of the inputs that short convolutions keep."""
        raise NotImplementedError(f"{cls.__name__} must define sizes")

    @classmethod
    def sharding(cls, mixer: Any, model: config.Model) -> tuple[Rule, ...]:
        """Returns rules that slice matrices along E and divide heads over `tensor`."""
        return (
            ("q|k|v|gate", P(SLICED, "tensor", None)),  # [E H D]
            ("decay|beta", P(SLICED, "tensor")),  # [E H]
            ("(decay|gate)_down", P(SLICED, None)),  # [E R]
            ("(decay|gate)_up", P(None, "tensor", None)),  # [R H D]
            ("(q|k|v)_conv(_bias)?", P("tensor")),  # [H D C], [H D]
            ("decay_log|decay_bias|skip", P("tensor")),  # [H], or [H D]
            ("out", P("tensor", None, SLICED)),  # [H D E]
            ("norm/scale", P()),  # [D]
        )

    @classmethod
    def buffers(cls, mixer: Any, model: config.Model, call: LinearCall, widths: Widths) -> Buffers | None:
        """Returns the counts of layers without an output gate, or with convolutions and a gate."""
        w, c = widths, widths.itemsize
        if w.channels:
            return Buffers(mlp=c * (5 * w.F + 6 * w.E + w.convolved + 2 * w.out))
        return Buffers(mlp=c * (4 * w.F + 4 * w.E + w.out))


class LinearAttention(Linear):
    """phi(q) sum_s phi(k_s) v_s / phi(q) sum_s phi(k_s) with phi = elu + 1 (arXiv:2006.16236).

    Query head h reads key/value head h // (H // K). The paper scales neither q nor k.
    """

    @nn.nowrap
    def mix(self, x: Array, positions: Array | None, segment_ids: Array | None) -> Array:
        m = self.model
        with jax.named_scope("projections"):
            q, k = (jax.nn.elu(project(self, n, x, h, m.D)) + 1 for n, h in (("q", m.H), ("k", m.K)))
            v = project(self, "v", x, m.K, m.D)
        return out(self, self.normalised(q, k, v, segment_ids), m)

    @staticmethod
    def sizes(mixer: config.LinearAttention, model: config.Model) -> tuple[int, int]:
        return model.H * model.D * (model.D + 1), 0


class Performer(Linear):
    """Attention with positive orthogonal random features, FAVOR+ (arXiv:2009.14794), drawn once from the config's seed.

    Query head h reads key/value head h // (H // K). The features stay the same during training, for all layers and
    heads. The paper's code adds 1e-6 to each feature. Here eps is in the denominator alone, added to weights in units
    of the query's largest feature.
    """

    @nn.nowrap
    def mix(self, x: Array, positions: Array | None, segment_ids: Array | None) -> Array:
        c, m = self.config, self.model
        with jax.named_scope("projections"):
            q, k, v = (project(self, n, x, h, m.D) for n, h in zip("qkv", (m.H, m.K, m.K)))
        with jax.named_scope("features"):
            directions = orthogonal_features(c.features, m.D, c.seed)
            q, k = favor(q, directions, query=True), favor(k, directions, query=False)
        return out(self, self.normalised(q, k, v, segment_ids), m)

    @staticmethod
    def sizes(mixer: config.Performer, model: config.Model) -> tuple[int, int]:
        return model.H * mixer.features * (model.D + 1), 0

    @staticmethod
    def own_flops(mixer: config.Performer, model: config.Model, T: float) -> tuple[float, float]:
        """Returns the products with random directions, which have no gradient."""
        flops = 2.0 * T * (model.H + model.K) * mixer.features * model.D
        return flops, flops

    @classmethod
    def buffers(cls, mixer: config.Performer, model: config.Model, call: LinearCall, widths: Widths) -> Buffers:
        """Returns the family's counts, and the features of q and k in both dtypes beside their inputs."""
        w, c = widths, widths.itemsize
        features = (_F32 + c) * (w.q + w.k) + c * (5 * w.E + (call.Hq + call.Hk) * model.D + w.v)
        return Buffers(mlp=c * (4 * w.F + 4 * w.E + w.out), features=features)


class Based(Linear):
    """Attention with the second-order Taylor series instead of exp (arXiv:2402.18668).

    The paper alternates it with layers of attention over small windows. Here a pattern of mixers says so, such as
    (Based(), Softmax(mask=Causal() & Window(63))). Symmetric features are kept once: 16 channels have
    153 instead of 273. Query head h reads key/value head h // (H // K).
    """

    @nn.nowrap
    def mix(self, x: Array, positions: Array | None, segment_ids: Array | None) -> Array:
        c, m = self.config, self.model
        with jax.named_scope("projections"):
            q, k = (project(self, n, x, h, c.features) for n, h in (("q", m.H), ("k", m.K)))
            v = project(self, "v", x, m.K, m.D)
        with jax.named_scope("features"):
            q, k = taylor(q), taylor(k)
        return out(self, self.normalised(q, k, v, segment_ids), m)

    @staticmethod
    def sizes(mixer: config.Based, model: config.Model) -> tuple[int, int]:
        d = mixer.features
        return model.H * (1 + d + d * (d + 1) // 2) * (model.D + 1), 0

    @classmethod
    def buffers(cls, mixer: config.Based, model: config.Model, call: LinearCall, widths: Widths) -> Buffers:
        """Returns the family's counts, and each product of a channel with those after it, filled up to lanes."""
        w, c = widths, widths.itemsize
        features = _F32 * call.H * (LANES * (2 * mixer.features - 1) + w.q // call.Hq) + 2 * c * w.E
        return Buffers(mlp=c * (4 * w.F + 4 * w.E + w.out), features=features)


class RetNet(Linear):
    """Multi-scale retention (arXiv:2307.08621): rotated q and k, a fixed decay per head, a norm and a swish gate.

    The paper's GroupNorm over heads is an RMSNorm of each head, as in the authors' code, here with one gain for all
    heads. It cancels the paper's other normalisations of the scores, and a factor of q and k that `rope` has, so they
    are left out. All arrays have Model.H heads.
    """

    @nn.nowrap
    def mix(self, x: Array, positions: Array | None, segment_ids: Array | None) -> Array:
        c, m = self.config, self.model
        V = c.V or 2 * m.D
        with jax.named_scope("projections"):
            q, k = (project(self, n, x, m.H, m.D) for n in "qk")
            v, gate = (project(self, n, x, m.H, V) for n in ("v", "gate"))
        if c.rope is not None:
            frequencies = rope_frequencies(c.rope, m.D)
            with jax.named_scope("rotary"):
                q, k = rotate(q, positions, frequencies), rotate(k, positions, frequencies)
        forgets = np.geomspace(c.fastest, c.slowest, m.H)
        y = self.scan(
            q, k, v, log_decay=jnp.asarray(np.log1p(-forgets), jnp.float32), segment_ids=segment_ids, scale=m.D**-0.5
        )
        return out(self, RMSNorm(m.norm_eps, name="norm")(y) * nn.silu(gate), m)

    @staticmethod
    def sizes(mixer: config.RetNet, model: config.Model) -> tuple[int, int]:
        return model.H * model.D * (mixer.V or 2 * model.D), 0

    @classmethod
    def buffers(cls, mixer: config.RetNet, model: config.Model, call: LinearCall, widths: Widths) -> Buffers:
        """Returns the counts with an output gate, and with q and k before they are rotated."""
        w, c = widths, widths.itemsize
        return Buffers(mlp=c * (4 * w.F + 4 * w.E + 2 * w.out) + c * (w.q + w.k))


class GLA(Linear):
    """Gated linear attention (arXiv:2312.06635): log_decay = logsigmoid(x W_down W_up + b) / temperature, per channel.

    The norm of each head is an RMSNorm, as in the authors' code; the paper's text says LayerNorm. The output gate,
    swish, has no bias. All arrays have Model.H heads.
    """

    @nn.nowrap
    def mix(self, x: Array, positions: Array | None, segment_ids: Array | None) -> Array:
        c, m = self.config, self.model
        D = c.D or m.D // 2
        with jax.named_scope("projections"):
            q, k = (project(self, n, x, m.H, D) for n in "qk")
            v, gate = (project(self, n, x, m.H, m.D) for n in ("v", "gate"))
            forget = low_rank(self, "decay", x, c.rank, m.H, D).astype(jnp.float32)
            forget = forget + self.param("decay_bias", nn.initializers.zeros, (m.H, D), jnp.float32)[None, None]
        y = self.scan(
            q, k, v, log_decay=jax.nn.log_sigmoid(forget) / c.temperature, segment_ids=segment_ids, scale=D**-0.5
        )
        return out(self, RMSNorm(m.norm_eps, name="norm")(y) * nn.silu(gate), m)

    @staticmethod
    def sizes(mixer: config.GLA, model: config.Model) -> tuple[int, int]:
        return model.H * (mixer.D or model.D // 2) * model.D, 0

    @classmethod
    def buffers(cls, mixer: config.GLA, model: config.Model, call: LinearCall, widths: Widths) -> Buffers:
        """Returns the counts with an output gate."""
        w, c = widths, widths.itemsize
        return Buffers(mlp=c * (4 * w.F + 4 * w.E + 2 * w.out))


class Mamba2(Linear):
    """The SSD layer (arXiv:2405.21060): q and k (the paper's C and B) shared by heads, v = step * x, a skip D x.

    It has `expand` * Model.H heads of Model.D channels. The paper's in-projection is split into one matrix per result.
    The RMSNorm of y * silu(gate) is taken over the channels of each group of heads that share q and k, as in the
    authors' code and in published checkpoints, or over each of `norm_groups` groups.
    """

    @nn.nowrap
    def mix(self, x: Array, positions: Array | None, segment_ids: Array | None) -> Array:
        c, m = self.config, self.model
        H, norm_groups = c.expand * m.H, c.norm_groups or c.groups
        if H * m.D % norm_groups:
            raise ValueError(
                f"Mamba2.norm_groups={norm_groups} must divide the {H * m.D} channels of {H} heads; None: groups"
            )
        with jax.named_scope("projections"):
            gate, v = (project(self, n, x, H, m.D) for n in ("gate", "v"))
            k, q = (project(self, n, x, c.groups, c.state) for n in ("b", "c"))
            log_decay, step = decay(self, per_head(self, "decay", x, H), c.steps, c.rates, c.step_limit)
        v, k, q = (convolved(self, n, a, c.taps, segment_ids, bias=True) for n, a in (("v", v), ("b", k), ("c", q)))
        skip = self.param("skip", nn.initializers.ones, (H,), jnp.float32)[None, None, :, None] * v.astype(jnp.float32)
        written = (step[..., None] * v.astype(jnp.float32)).astype(x.dtype)
        y = self.scan(q, k, written, log_decay=log_decay, segment_ids=segment_ids)
        y = (y.astype(jnp.float32) + skip).astype(x.dtype) * nn.silu(gate)
        norm = RMSNorm(m.norm_eps, norm_groups, name="norm")
        y = norm(y.reshape(*y.shape[:2], -1)).reshape(y.shape)
        return out(self, y, m)

    @staticmethod
    def sizes(mixer: config.Mamba2, model: config.Model) -> tuple[int, int]:
        values = mixer.expand * model.H * model.D
        return values * mixer.state, (mixer.taps - 1) * (values + 2 * mixer.groups * mixer.state)

    @classmethod
    def sharding(cls, mixer: config.Mamba2, model: config.Model) -> tuple[Rule, ...]:
        """Returns the family's rules, and for b and c, whose few heads all others read, rules that divide no heads."""
        return (
            ("b|c", P(SLICED, None, None)),  # [E H D]
            ("(b|c)_conv(_bias)?", P()),  # [H D C], [H D]
            *super().sharding(mixer, model),
        )

    @classmethod
    def buffers(cls, mixer: config.Mamba2, model: config.Model, call: LinearCall, widths: Widths) -> Buffers:
        """Returns the counts with a skip and a norm over all channels, in float32."""
        w, c = widths, widths.itemsize
        mlp = c * (4 * w.F + 4 * w.E + 4 * w.out) + 3 * _F32 * w.channels[0]
        return Buffers(mlp=mlp, kernel=(2 * c + _F32) * w.out, overlaps_mlp=False)


class GatedDeltaNet(Linear):
    """The gated delta rule (arXiv:2412.06464): Mamba-2's decay, beta in (0, 1), q and k normalised to length 1.

    q is then multiplied by Model.D**-0.5, as in the authors' code and in published checkpoints. q and k have Model.K
    heads, v, decay and beta Model.H. The norm of each head is an RMSNorm times silu(gate).
    """

    @nn.nowrap
    def mix(self, x: Array, positions: Array | None, segment_ids: Array | None) -> Array:
        c, m = self.config, self.model
        V = c.V or 2 * m.D
        with jax.named_scope("projections"):
            q, k = (project(self, n, x, m.K, m.D) for n in "qk")
            v, gate = (project(self, n, x, m.H, V) for n in ("v", "gate"))
            log_decay, _ = decay(self, per_head(self, "decay", x, m.H), c.steps, c.rates)
            beta = nn.sigmoid(per_head(self, "beta", x, m.H))
        q, k, v = (convolved(self, n, a, c.taps, segment_ids) for n, a in zip("qkv", (q, k, v)))
        y = self.scan(unit(q), unit(k), v, log_decay=log_decay, beta=beta, segment_ids=segment_ids)
        return out(self, scaled_norm(y, c.scale, m) * nn.silu(gate), m)

    @staticmethod
    def sizes(mixer: config.GatedDeltaNet, model: config.Model) -> tuple[int, int]:
        values = model.H * (mixer.V or 2 * model.D)
        return values * model.D, (mixer.taps - 1) * (values + 2 * model.K * model.D)


class KimiDeltaAttention(Linear):
    """The delta rule with a low-rank decay per channel (arXiv:2510.26692); q and k are normalised to length 1.

    q is then multiplied by Model.D**-0.5, as in the authors' code and in published checkpoints.
    log_decay is -exp(decay_log) softplus(x W_down W_up + decay_bias), with a rate per head. The norm of each head is an
    RMSNorm times sigmoid(x G_down G_up). All arrays have Model.H heads.
    """

    @nn.nowrap
    def mix(self, x: Array, positions: Array | None, segment_ids: Array | None) -> Array:
        c, m = self.config, self.model
        V, rank = c.V or m.D, c.rank or m.D
        with jax.named_scope("projections"):
            q, k = (project(self, n, x, m.H, m.D) for n in "qk")
            v = project(self, "v", x, m.H, V)
            gate = low_rank(self, "gate", x, rank, m.H, V)
            log_decay, _ = decay(self, low_rank(self, "decay", x, rank, m.H, m.D), c.steps, c.rates)
            beta = nn.sigmoid(per_head(self, "beta", x, m.H))
        q, k, v = (convolved(self, n, a, c.taps, segment_ids) for n, a in zip("qkv", (q, k, v)))
        y = self.scan(unit(q), unit(k), v, log_decay=log_decay, beta=beta, segment_ids=segment_ids)
        return out(self, scaled_norm(y, c.scale, m) * nn.sigmoid(gate), m)

    @staticmethod
    def sizes(mixer: config.KimiDeltaAttention, model: config.Model) -> tuple[int, int]:
        V = mixer.V or model.D
        return model.H * model.D * V, (mixer.taps - 1) * model.H * (2 * model.D + V)
