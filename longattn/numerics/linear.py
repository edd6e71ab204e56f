"""Problems of linear attention: every kind of decay, with and without the delta rule."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision
from jax.typing import DTypeLike
from jaxtyping import Array

from longattn.numerics.compare import Drawn, Results, packed
from longattn.ops import dispatch
from longattn.ops.linear import api

_STATES = 2**25  # numbers in the plain implementation's states, one per token, in a problem that is quickly compared


@dataclass(frozen=True)
class LinearProblem:
    """A call of linear attention with everything that is differentiable; with the delta rule keys have norm 1."""

    op: ClassVar[str] = "linear attention"
    api: ClassVar[Any] = api

    T: int  # tokens
    H: int  # heads of the state, the largest of those of q, k and v
    D: int  # head size of queries and keys
    B: int = 1  # sequences
    V: int | None = None  # head size of values; None: D
    heads: tuple[int, int, int] | None = None  # of q, k and v; None: H each
    decay: str = "none"  # none, scalar (a head's) or vector (a channel's)
    delta: bool = False
    rate: float = 0.1  # mean of -log_decay
    state: bool = False  # with an initial state
    documents: int = 0  # packed documents per sequence; 0: no segment ids
    dtype: str = "float32"  # of q, k, v
    scale: float = 1.0  # of the output

    def shaped(self) -> Drawn:
        p, array = self, jax.ShapeDtypeStruct
        (q, k, v), V = p.heads or (p.H,) * 3, p.V or p.D
        sizes = {"q": (q, p.D), "k": (k, p.D), "v": (v, V)}
        arrays = {name: array((p.B, p.T, *size), p.dtype) for name, size in sizes.items()}
        state = array((p.B, p.H, p.D, V), jnp.float32)
        if p.decay != "none":
            arrays["log_decay"] = array((p.B, p.T, p.H, *([p.D] if p.decay == "vector" else [])), jnp.float32)
        if p.delta:
            arrays["beta"] = array((p.B, p.T, p.H), jnp.float32)
        if p.state:
            arrays["initial_state"] = state
        ids = {"segment_ids": array((p.B, p.T), jnp.int32)} if p.documents else {}
        return Drawn(arrays, ids, {"out": array((p.B, p.T, p.H, V), p.dtype), "final_state": state})

    def fill(self, arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        if self.delta:
            arrays["k"] /= np.linalg.norm(arrays["k"], axis=-1, keepdims=True)
            arrays["beta"] = 1 / (1 + np.exp(-arrays["beta"]))
        if self.decay != "none":
            arrays["log_decay"] = -self.rate * rng.exponential(size=arrays["log_decay"].shape)
        return {"segment_ids": packed(self.B, self.T, self.documents, rng)[0]} if self.documents else {}

    def call(self, arrays: dict[str, Array], ids: dict[str, Array], implementation: str) -> dict[str, Array]:
        out, state = api.linear_attention(**arrays, **ids, scale=self.scale, implementation=implementation)
        return {"out": out, "final_state": state}

    def plain(self, arrays: dict[str, Array], ids: dict[str, Array]) -> dict[str, Array]:
        """Computes token by token, with the factors of every product rounded to the problem's dtype, in both passes.

        Sums and the state are float32. The reference is no yardstick: it does not round factors, as any product in half
        precision must, so its error is only the rounding of results.
        """
        p, dtype = self, jnp.float32
        product, decayed = _rounding(p.dtype)
        q, k, v = (jnp.repeat(x, p.H // x.shape[2], axis=2).astype(dtype) for x in (arrays[name] for name in "qkv"))
        a, segments = arrays.get("log_decay"), ids.get("segment_ids")
        if a is not None:
            a = jnp.broadcast_to(a if p.decay == "vector" else a[..., None], k.shape)
        starts = None if segments is None else jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
        S = arrays.get("initial_state", jnp.zeros((p.B, p.H, p.D, v.shape[3]), dtype))

        def step(S: Array, token: Any) -> tuple[Array, Array]:
            q, k, v, a, beta, starts = token
            if starts is not None:
                S = jnp.where(starts[:, None, None, None], 0.0, S)
            if a is not None:
                S = decayed(a, S)
            if beta is not None:
                v = beta[..., None] * (v - product("BHD,BHDV->BHV", k, S))
            S = S + product("BHD,BHV->BHDV", k, v)
            return S, product("BHD,BHDV->BHV", q, S, p.scale)

        tokens = jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, a, arrays.get("beta"), starts))
        S, out = jax.lax.scan(step, S, tokens)
        return {"out": out.swapaxes(0, 1).astype(p.dtype), "final_state": S}

    def units(self, truth: Results) -> float:
        """Allows for the longest sums, over tokens and heads."""
        return max(self.B * self.H * max(self.T, self.D, self.V or self.D), 1024) ** 0.5

    def shorter(self) -> LinearProblem:
        """Returns a problem so short that few states exist at once; T becomes a multiple of 128 if it changes."""
        T = max(128, _STATES // (self.H * self.D * (self.V or self.D)) // 128 * 128)
        return replace(self, T=min(self.T, T))


@dataclass(frozen=True)
class StateProblem(LinearProblem):
    """The passes over the state alone that devices sharing a sequence run, by a back end's `fold` and `pull`.

    Results are the state after the tokens, and the initial state's gradient from both cotangents. With the delta rule
    also the transition matrix, which the same fold computes from an identity beside the state. The last sequence is one
    document, because there is no transition across the start of a document.
    """

    op: ClassVar[str] = "linear attention in parts"

    state: bool = True

    def __post_init__(self) -> None:
        if not self.state:
            raise ValueError("state=False must be True: a fold starts from a state")

    def shaped(self) -> Drawn:
        s = super().shaped()
        return Drawn(s.arrays | {f"d{name}": x for name, x in s.cotangents.items()}, s.ids, {})

    def fill(self, arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        ids = super().fill(arrays, rng)
        if ids:
            ids["segment_ids"][-1] = 0
        return ids

    def call(self, arrays: dict[str, Array], ids: dict[str, Array], implementation: str) -> dict[str, Array]:
        do, dS, given = _cotangents(arrays)
        absent = dict.fromkeys(("log_decay", "beta", "segment_ids"))
        operands, options, names = api.validate(
            **(absent | given | ids), scale=self.scale, implementation=implementation, tuning=None
        )
        x, shaped, columns = api.prepare(operands), jax.eval_shape(api.prepare, operands), dS.shape[3]
        S = x.initial_state
        assert S is not None  # `state` is true
        if self.delta:
            S = jnp.concatenate([S, self._identity(S.dtype)], 3)

        def accepts(back_end: dispatch.BackEnd) -> tuple[Any, Any]:
            return back_end.check(shaped, options), api.check_fold(back_end, shaped, S.shape[3], options)

        name, (plan, fold_plan) = dispatch.choose(names, api.BACK_ENDS, accepts)
        back_end = api.BACK_ENDS[name]
        both = back_end.fold(x._replace(q=None, initial_state=S), options, fold_plan)
        found = {"final_state": both[..., :columns], "dinitial_state": back_end.pull(x, do, dS, options, plan)}
        return found | ({"transition": both[..., columns:]} if self.delta else {})

    def plain(self, arrays: dict[str, Array], ids: dict[str, Array]) -> dict[str, Array]:
        """Computes each result by whole passes over the tokens."""
        do, dS, given = _cotangents(arrays)
        after = lambda S, **other: super(StateProblem, self).plain(given | {"initial_state": S} | other, ids)
        S = given["initial_state"]
        found, pull = jax.vjp(after, S)
        (before,) = pull({"out": do, "final_state": dS})
        made = {"final_state": found["final_state"], "dinitial_state": before}
        if self.delta:
            nothing = jnp.zeros((*given["v"].shape[:3], self.D), given["v"].dtype)
            made["transition"] = after(self._identity(S.dtype), v=nothing)["final_state"]
        return made

    def _identity(self, dtype: DTypeLike) -> Array:
        """Returns identities [B H D D]."""
        return jnp.broadcast_to(jnp.eye(self.D, dtype=dtype)[None, None], (self.B, self.H, self.D, self.D))


def _cotangents(arrays: dict[str, Array]) -> tuple[Array, Array, dict[str, Array]]:
    """Splits the arrays of a `StateProblem`: the outputs' cotangent, the state's cotangent, and the other arrays."""
    given = dict(arrays)
    return given.pop("dout"), given.pop("dfinal_state"), given


def _rounding(dtype: str) -> tuple[Callable[..., Array], Callable[[Array, Array], Array]]:
    """Returns an einsum of two float32 arrays, and exp(a [B H D]) S [B H D V], with factors rounded to `dtype`.

    Cotangents are rounded where they are factors of a gradient. The decay scales the state in float32.
    """
    bits = jnp.finfo(dtype)
    einsum = functools.partial(jnp.einsum, precision=None if dtype == "bfloat16" else Precision.HIGHEST)
    r = functools.partial(jax.lax.reduce_precision, exponent_bits=bits.nexp, mantissa_bits=bits.nmant)

    def product(equation: str, a: Array, b: Array, scale: float = 1.0) -> Array:
        @jax.custom_gradient
        def rounded(a: Any, b: Any) -> Any:
            x, pull = jax.vjp(functools.partial(einsum, equation), r(a), r(b))
            return scale * x, lambda dx: tuple(scale * d for d in pull(r(dx)))

        return rounded(a, b)

    @jax.custom_gradient
    def decayed(a: Any, S: Any) -> Any:
        decay = jnp.exp(a)[..., None]
        after = decay * S
        return after, lambda dS: ((r(dS) * r(after)).sum(-1), decay * dS)

    return product, decayed
