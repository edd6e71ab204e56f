"""The parts that layers share: RMSNorm, rotary positions, SwiGLU.

Parameters are float32; the computation has the dtype of the inputs.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from longattn import config
from longattn.models.context import Context


def fan_in(
    in_axis: int | tuple[int, ...], out_axis: int | tuple[int, ...], scale: float = 1.0
) -> nn.initializers.Initializer:
    """Returns an initializer: a truncated normal of standard deviation sqrt(scale / fan-in)."""
    return nn.initializers.variance_scaling(scale, "fan_in", "truncated_normal", in_axis=in_axis, out_axis=out_axis)


def no_state(state: Any) -> None:
    """Raises ValueError unless `state` is None, for mixers that keep no state."""
    if state is not None:
        raise ValueError(
            f"state={type(state).__name__} must be None: models run whole sequences, there is no decoding with a cache"
        )


class RMSNorm(nn.Module):
    """Computes x / rms(x) * scale over the last axis, in float32 (arXiv:1910.07467).

    `groups` divides the axis into as many pieces of neighbouring channels, each of which has an rms of its own.
    """

    eps: float
    groups: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "... E"]) -> Float[Array, "... E"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        wide = x.astype(jnp.float32)
        if self.groups > 1:  # XLA would compile an axis of size 1 to another program
            wide = wide.reshape(*x.shape[:-1], self.groups, -1)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + self.eps)
        return (wide.reshape(x.shape) * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def rope_frequencies(rope: config.RoPE, D: int) -> np.ndarray:
    """Returns the angle per position, in radians, of each of the D/2 pairs, float64.

    none: base**(-2i/D). linear: that over `factor` (arXiv:2306.15595). yarn and llama3 divide the frequencies of slow
    pairs by `factor`, keep those of fast ones, and interpolate between the two (arXiv:2309.00071, section 3.2).

    Fast and slow are told by the turns of a pair within original_T. llama3 interpolates linearly in the turns, as
    YaRN's paper does. yarn does so in i, between the real i of beta_fast and of beta_slow turns, rounded outwards where
    `truncate`: so does the code of YaRN's authors, and so do published checkpoints.
    """
    plain = rope.base ** (-np.arange(0, D, 2) / D)
    if rope.scaling == "none":
        return plain
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "llama3":
        turns = rope.original_T * plain / (2 * math.pi)
        ramp: np.ndarray = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    else:
        index = lambda turns: D * math.log(rope.original_T / (2 * math.pi * turns)) / (2 * math.log(rope.base))
        fast, slow = index(rope.beta_fast), index(rope.beta_slow)
        if rope.truncate:
            fast, slow = math.floor(fast), math.ceil(slow)
        fast, slow = max(fast, 0), min(slow, D - 1)
        width = slow - fast if slow > fast else 1e-3  # a ramp without width is a step
        ramp = 1 - (np.arange(D // 2) - fast) / width
    keep = np.clip(ramp, 0, 1)
    return keep * plain + (1 - keep) * plain / rope.factor


def rope_temperature(rope: config.RoPE | None) -> float:
    """Returns the factor on the logits, the square of that on q and on k: `attention_factor`, if given.

    Otherwise it is 1, and for yarn m(1), or m(mscale) / m(mscale_all_dim), where m(s) = 0.1 s ln(factor) + 1
    (arXiv:2309.00071, section 3.4). DeepSeek's latent attention multiplies logits by m(mscale_all_dim)**2 besides.
    """
    if rope is None:
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor**2
    if rope.scaling != "yarn":
        return 1.0
    m = lambda s: 0.1 * s * math.log(rope.factor) + 1
    if rope.mscale is None or rope.mscale_all_dim is None:
        return m(1) ** 2
    return (m(rope.mscale) / m(rope.mscale_all_dim)) ** 2


def _high_word(a: Array, b: Array) -> Array:
    """Returns the upper 32 bits of the products of two uint32."""
    half = jnp.uint32(0xFFFF)
    a_high, a_low, b_high, b_low = a >> 16, a & half, b >> 16, b & half
    first = a_high * b_low + (a_low * b_low >> 16)
    second = a_low * b_high + (first & half)
    return a_high * b_high + (first >> 16) + (second >> 16)


def rotate(
    x: Float[Array, "B T H D"], positions: Int32[Array, "#B T"] | None, frequencies: np.ndarray
) -> Float[Array, "B T H D"]:
    """Rotates the pairs (x[i], x[i + D/2]) by position * frequency; positions=None is arange(T).

    Angles are kept in turns as 32-bit fixed point, where integer overflow is the reduction modulo one turn: q^T k
    depends on the difference of positions only, at any position. (The float32 product of a position near 10**6 and a
    frequency is off by up to 0.03 radians, differently for q and k.) Frequencies have 64 bits, rounded by 2**-54
    of themselves or 2**-65 turns: a base of 1e12 turns its last pair by 2**-43 turns a token.
    """
    steps = [int(f / (2 * math.pi) * 2.0**64 + 0.5) for f in frequencies]
    high = jnp.asarray([step >> 32 for step in steps], jnp.uint32)[None, None, None]
    low = jnp.asarray([step % 2**32 for step in steps], jnp.uint32)[None, None, None]
    if positions is None:
        positions = jnp.arange(x.shape[1], dtype=jnp.int32)[None]
    position = positions.astype(jnp.uint32)[:, :, None, None]
    # Modulo 2**32, as which negative positions are 2**32 too large: each adds `low` to the upper word.
    turns = position * high + _high_word(position, low) - jnp.where(positions[:, :, None, None] < 0, low, 0)
    angle = turns.astype(jnp.int32).astype(jnp.float32) * (math.pi * 2.0**-31)  # in [-pi, pi]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def swiglu(
    x: Float[Array, "B T E"], gate: Float[Array, "E F"], up: Float[Array, "E F"], down: Float[Array, "F E"]
) -> Float[Array, "B T E"]:
    """Computes (silu(x gate) * (x up)) down (arXiv:2002.05202)."""
    gate, up, down = (w.astype(x.dtype) for w in (gate, up, down))
    hidden = nn.silu(jnp.einsum("BTE,EF->BTF", x, gate)) * jnp.einsum("BTE,EF->BTF", x, up)
    return jnp.einsum("BTF,FE->BTE", hidden, down)


class SwiGLU(nn.Module):
    """Applies the block's MLP. `model.mlp_chunk` runs it in pieces of the sequence, so [B T F] never exists.

    Where the sequence lies in parts on a mesh, a piece is `mlp_chunk` positions of each part: nothing moves.
    """

    model: config.Model
    context: Context | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        E, F, chunk = self.model.E, self.model.F, self.model.mlp_chunk
        gate = self.param("gate", fan_in(0, 1), (E, F), jnp.float32)
        up = self.param("up", fan_in(0, 1), (E, F), jnp.float32)
        down = self.param("down", fan_in(0, 1, 1 / (2 * self.model.N)), (F, E), jnp.float32)
        context = self.context or Context()
        P = context.P
        B, T = x.shape[0], x.shape[1] // P
        if chunk is None or chunk >= T:
            return swiglu(x, gate, up, down)
        # The weights are cast inside each piece, so their gradients are summed over the pieces in float32.
        piece = jax.checkpoint(lambda x: swiglu(context.spread(x), gate, up, down), prevent_cse=False)
        whole = T // chunk * chunk
        x = x.reshape(B, P, T, E)
        pieces = jnp.moveaxis(x[:, :, :whole].reshape(B, P, -1, chunk, E), 2, 0)
        y = jax.lax.map(piece, pieces.reshape(-1, B, P * chunk, E)).reshape(-1, B, P, chunk, E)
        y = jnp.moveaxis(y, 0, 2).reshape(B, P, whole, E)
        if whole < T:
            rest = context.spread(piece(x[:, :, whole:].reshape(B, -1, E)))
            y = jnp.concatenate([y, rest.reshape(B, P, -1, E)], 2)
        return y.reshape(B, P * T, E)
