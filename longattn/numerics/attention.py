"""Problems of attention: to all keys at once, and to keys in two shards."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jaxtyping import Array

from longattn.mask import Mask, Prefix
from longattn.numerics.compare import Drawn, Results, packed
from longattn.ops import partial as partials
from longattn.ops.attention import api
from longattn.ops.calls import AttentionCall

_LOGITS = 2**25  # logits that exist at once in a problem that is quickly compared


@dataclass(frozen=True)
class Problem(AttentionCall):
    """A call of attention with everything that is differentiable, drawn from the normal distribution."""

    op: ClassVar[str] = "attention"
    api: ClassVar[Any] = api

    prefix: int = 0  # longest prefix that every query sees; each sequence draws its own; 0: no prefix
    documents: int = 0  # packed documents per sequence, with restarting positions, as in training; 0: no segment ids
    bias: tuple[int, ...] | None = None  # shape of a float32 bias, which broadcasts to [B H T S]
    rise: float = 1.0  # factor by which keys, and so logits, grow along the sequence

    def shaped(self) -> Drawn:
        p, array = self, jax.ShapeDtypeStruct
        arrays = {
            "q": array((p.B, p.T, p.H, p.D), p.dtype),
            "k": array((p.B, p.keys, p.heads, p.D), p.dtype),
            "v": array((p.B, p.keys, p.heads, p.values), p.dtype),
        }
        if p.sinks:
            arrays["sinks"] = array((p.H,), jnp.float32)
        if p.bias is not None:
            arrays["bias"] = array(p.bias, jnp.float32)
        ids = dict.fromkeys(("segment_ids", "positions") if p.documents else (), array((p.B, p.T), jnp.int32))
        if p.prefix:
            ids["prefix"] = array((p.B,), jnp.int32)
        cotangents = {"out": array((p.B, p.T, p.H, p.values), p.dtype), "lse": array((p.B, p.T, p.H), jnp.float32)}
        return Drawn(arrays, ids, cotangents)

    def fill(self, arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        arrays["k"] *= np.linspace(1, self.rise, self.keys, dtype=np.float32)[:, None, None]
        ids = {}
        if self.documents:
            ids["segment_ids"], ids["positions"] = packed(self.B, self.T, self.documents, rng)
        if self.prefix:
            ids["prefix"] = rng.integers(1, self.prefix + 1, self.B, dtype=np.int32)
        return ids

    def _mask(self, ids: dict[str, Array]) -> Mask:
        return self.mask | Prefix(ids["prefix"]) if self.prefix else self.mask

    def call(self, arrays: dict[str, Array], ids: dict[str, Array], implementation: str) -> dict[str, Array]:
        out, lse = api.attention_with_lse(
            **arrays, mask=self._mask(ids), segment_ids=ids.get("segment_ids"), positions=ids.get("positions"),
            scale=self.scale, softcap=self.softcap, implementation=implementation,
        )  # fmt: skip
        return {"out": out, "lse": lse}

    def plain(self, arrays: dict[str, Array], ids: dict[str, Array]) -> dict[str, Array]:
        """Computes the whole matrix at once, with each result rounded to the problem's dtype, in both passes.

        Products are exact except for their float32 sum. So the error is the cost of this precision on any device.
        """
        p, bits = self, jnp.finfo(self.dtype)
        # Any device multiplies bfloat16 factors exactly at default precision, which compiles in a third of the time.
        product = functools.partial(jnp.einsum, precision=None if p.dtype == "bfloat16" else Precision.HIGHEST)

        def r(x: Array) -> Array:  # its transpose rounds the cotangents
            return jax.lax.reduce_precision(x, exponent_bits=bits.nexp, mantissa_bits=bits.nmant)

        q, k, v = (arrays[name].astype(jnp.float32) for name in "qkv")
        k, v = (jnp.repeat(x, p.H // p.heads, axis=2) for x in (k, v))
        scale = p.D**-0.5 if p.scale is None else p.scale
        s = r(scale * r(product("BTHD,BSHD->BHTS", q, k)))
        if p.softcap is not None:
            s = r(p.softcap * r(jnp.tanh(r(s / p.softcap))))
        if p.bias is not None:
            s = r(s + arrays["bias"].reshape((1,) * (4 - len(p.bias)) + p.bias))
        positions = ids.get("positions", jnp.arange(max(p.T, p.keys), dtype=jnp.int32)[None])
        visible = p._mask(ids)(positions[:, None, : p.T, None], positions[:, None, None, : p.keys])
        if "segment_ids" in ids:
            visible &= ids["segment_ids"][:, None, :, None] == ids["segment_ids"][:, None, None, :]
        s = jnp.where(visible, s, -jnp.inf)
        sink = (arrays["sinks"] if p.sinks else jnp.full(p.H, -jnp.inf))[None, :, None]
        m = jax.lax.stop_gradient(jnp.maximum(s.max(-1), sink))
        m = jnp.where(m == -jnp.inf, 0.0, m)
        e = jnp.exp(s - m[..., None])
        total = e.sum(-1) + jnp.exp(sink - m)
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        out = r(product("BHTS,BSHV->BTHV", r(e / total[..., None]), v))
        return {"out": out, "lse": jnp.where(empty, -jnp.inf, m + jnp.log(total)).transpose(0, 2, 1)}

    def units(self, truth: Results) -> float:
        """Allows for the longest sums, and for the rounding of the lse: it enters every weight of the backward pass."""
        p, lse = self, truth["lse"][np.isfinite(truth["lse"])]
        terms = p.B * p.H * max(p.T, p.keys, p.D, p.values)
        return max(terms, 1024) ** 0.5 + (float(np.sqrt(np.mean(np.square(lse)))) if lse.size else 0.0)

    def shorter(self) -> Problem:
        """Returns a problem so short that few logits exist at once; T becomes a multiple of 128 if it changes."""
        T = max(128, math.isqrt(_LOGITS // self.H) // 128 * 128)
        return replace(self, T=min(self.T, T))


@dataclass(frozen=True)
class PartsProblem(Problem):
    """Attention to keys in two shards, as in a ring: partial results are merged, partial gradients summed.

    The reference attends to all keys at once.
    """

    op: ClassVar[str] = "attention in parts"

    def __post_init__(self) -> None:
        if self.sinks or self.bias is not None:
            raise ValueError(f"{self.sinks=} and {self.bias=} must be off: partial gradients are of q, k and v alone")

    def call(self, arrays: dict[str, Array], ids: dict[str, Array], implementation: str) -> dict[str, Array]:
        if implementation == "reference":
            return super().call(arrays, ids, implementation)
        p, half = self, self.keys // 2
        positions = ids.get("positions", jnp.tile(jnp.arange(max(p.T, p.keys), dtype=jnp.int32)[None], (p.B, 1)))
        segments = ids.get("segment_ids")
        parts: list[tuple[slice, dict[str, Any]]] = []
        for keys in (slice(0, half), slice(half, p.keys)):
            pair = lambda x, keys=keys: (x[:, : p.T], x[:, keys])
            parts.append((keys, {
                "mask": p._mask(ids), "positions": pair(positions), "scale": p.scale, "softcap": p.softcap,
                "segment_ids": None if segments is None else pair(segments), "implementation": implementation,
            }))  # fmt: skip

        @jax.custom_vjp
        def attend(q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            return forward(q, k, v)[0]

        def forward(q: Array, k: Array, v: Array) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
            found = (api.attend_partial(q, k[:, keys], v[:, keys], **options) for keys, options in parts)
            out, lse = partials.finish(functools.reduce(partials.merge, found), dtype=q.dtype)
            return (out, lse), (q, k, v, out, lse)

        def backward(kept: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple[Array, ...]:
            q, k, v, *results = kept
            given = *results, *cotangents
            found = [api.backward_partial(q, k[:, keys], v[:, keys], *given, **options) for keys, options in parts]
            (dq, *first), (more, *second) = found
            gradients = dq + more, *(jnp.concatenate(both, 1) for both in zip(first, second))
            return tuple(d.astype(q.dtype) for d in gradients)

        attend.defvjp(forward, backward)
        out, lse = attend(**arrays)
        return {"out": out, "lse": lse}
