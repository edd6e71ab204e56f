"""Whether a back end computes what it should: results and all gradients, by a tolerance that is derived.

Errors are Euclidean norms against the truth. A back end's may be at most twice that of a plain implementation of the
same precision on the same device, beside the rounding of sums (as flash-attention's tests have it, arXiv:2205.14135).
`AnyProblem` is what a kind of problem has to say; attention's is here, linear attention's in `agreement_linear`.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision

from longattn import shapes
from longattn.mask import Causal, Mask, Prefix
from longattn.ops import partial as partials
from longattn.ops.attention import api

_ENOUGH = 64
_LOGITS = 2**25  # that exist at once where a problem must be quickly compared
Results = Mapping[str, Any]  # what the operation returns, by name, and the gradient dx of every array x


@dataclass(frozen=True)
class Drawn:
    """A problem's arrays, in NumPy, or their ShapeDtypeStructs, by name."""

    arrays: dict[str, Any]  # what has a gradient
    ids: dict[str, Any]  # what has none, int32
    cotangents: dict[str, Any]  # of what the operation returns; none: it has no gradient


@runtime_checkable
class AnyProblem(Protocol):
    """A call of an operation with everything that is differentiable: a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    op: ClassVar[str]
    api: ClassVar[Any]  # the operation's module with BACK_ENDS and DEFAULT

    @property
    def T(self) -> int:
        """Tokens."""

    @property
    def dtype(self) -> str:
        """Of q, k and v."""

    def shaped(self) -> Drawn:
        """Shapes and dtypes of the arrays."""

    def fill(self, arrays: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """The ids; arrays of float32 normal numbers become, in place, such as the operation is made for."""

    def call(self, arrays: Any, ids: Any, implementation: str) -> dict[str, Any]:
        """What the back end returns."""

    def plain(self, arrays: Any, ids: Any) -> dict[str, Any]:
        """The same in plain JAX, in float32, rounded to the problem's dtype wherever a device may round."""

    def units(self, truth: Results) -> float:
        """In the last place, that rounding is allowed beside the plain implementation's error."""

    def shorter(self) -> AnyProblem:
        """A problem of the same kind, which is quickly compared."""


@dataclass(frozen=True)
class Problem:
    """A call of attention with everything that is differentiable, drawn from the normal distribution."""

    op: ClassVar[str] = "attention"
    api: ClassVar[Any] = api

    T: int  # queries
    H: int  # query heads
    D: int  # head size of queries and keys
    B: int = 1  # sequences
    S: int | None = None  # keys; none: T
    K: int | None = None  # key/value heads; none: H
    V: int | None = None  # head size of values; none: D
    dtype: str = "float32"  # of q, k, v
    mask: Mask = Causal()
    prefix: int = 0  # tokens that everybody sees, at most: another number in each sequence; 0: no prefix
    documents: int = 0  # that share each sequence, positions restarting at each, as in training; 0: no segment ids
    scale: float | None = None  # of the logits; none: D**-0.5
    softcap: float | None = None
    sinks: bool = False  # float32 [H]
    bias: tuple[int, ...] | None = None  # its shape, which broadcasts to [B H T S]; float32
    rise: float = 1.0  # keys grow along the sequence to so many times their size at its start, and logits with them

    @property
    def keys(self) -> int:
        return self.T if self.S is None else self.S

    @property
    def heads(self) -> int:
        """Key/value heads."""
        return self.H if self.K is None else self.K

    @property
    def values(self) -> int:
        """Head size of values."""
        return self.D if self.V is None else self.V

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

    def fill(self, arrays: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        arrays["k"] *= np.linspace(1, self.rise, self.keys, dtype=np.float32)[:, None, None]
        ids = {}
        if self.documents:
            ids["segment_ids"], ids["positions"] = packed(self.B, self.T, self.documents, rng)
        if self.prefix:
            ids["prefix"] = rng.integers(1, self.prefix + 1, self.B, dtype=np.int32)
        return ids

    def _mask(self, ids: Any) -> Mask:
        return self.mask | Prefix(ids["prefix"]) if self.prefix else self.mask

    def call(self, arrays: Any, ids: Any, implementation: str) -> dict[str, Any]:
        out, lse = api.attention_with_lse(
            **arrays, mask=self._mask(ids), segment_ids=ids.get("segment_ids"), positions=ids.get("positions"),
            scale=self.scale, softcap=self.softcap, implementation=implementation,
        )  # fmt: skip
        return {"out": out, "lse": lse}

    def plain(self, arrays: Any, ids: Any) -> dict[str, Any]:
        """The whole matrix at once, each result rounded to the problem's dtype, forwards and backwards.

        Products are exact but for their sum in float32, so that on any device its error is what this precision costs
        there.
        """
        p, bits = self, jnp.finfo(self.dtype)
        # Factors that were rounded to bfloat16 are exact in any device's products, and compiled in a third of the time.
        product = functools.partial(jnp.einsum, precision=None if p.dtype == "bfloat16" else Precision.HIGHEST)

        def r(x: Any) -> Any:  # its transpose rounds cotangents
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
        """Of the longest sums, and of an lse that is kept for the backward pass, whose rounding, in proportion to its
        size, is in every weight there.
        """
        p, lse = self, truth["lse"][np.isfinite(truth["lse"])]
        terms = p.B * p.H * max(p.T, p.keys, p.D, p.values)
        return max(terms, 1024) ** 0.5 + (float(np.sqrt(np.mean(np.square(lse)))) if lse.size else 0.0)

    def shorter(self) -> Problem:
        """So short that few logits exist at once, and a multiple of 128 unless it was as short before."""
        T = max(128, math.isqrt(_LOGITS // self.H) // 128 * 128)
        return replace(self, T=min(self.T, T))


@dataclass(frozen=True)
class PartsProblem(Problem):
    """The keys in two parts, as the devices of a ring hold them: partial results are merged, partial gradients summed.

    The reference attends to all keys at once.
    """

    op: ClassVar[str] = "attention in parts"

    def __post_init__(self) -> None:
        if self.sinks or self.bias is not None:
            raise ValueError(f"{self.sinks=} and {self.bias=} must be off: partial gradients are of q, k and v alone")

    def call(self, arrays: Any, ids: Any, implementation: str) -> dict[str, Any]:
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
        def attend(q: Any, k: Any, v: Any) -> Any:
            return forward(q, k, v)[0]

        def forward(q: Any, k: Any, v: Any) -> Any:
            found = (api.attend_partial(q, k[:, keys], v[:, keys], **options) for keys, options in parts)
            out, lse = partials.finish(functools.reduce(partials.merge, found), dtype=q.dtype)
            return (out, lse), (q, k, v, out, lse)

        def backward(kept: Any, cotangents: Any) -> Any:
            q, k, v, *results = kept
            given = *results, *cotangents
            found = [api.backward_partial(q, k[:, keys], v[:, keys], *given, **options) for keys, options in parts]
            (dq, *first), (more, *second) = found
            gradients = dq + more, *(jnp.concatenate(both, 1) for both in zip(first, second))
            return tuple(d.astype(q.dtype) for d in gradients)

        attend.defvjp(forward, backward)
        out, lse = attend(**arrays)
        return {"out": out, "lse": lse}


def packed(B: int, T: int, documents: int, rng: np.random.Generator) -> tuple[Any, Any]:
    """segment_ids and positions [B T] of so many documents in each sequence, cut at random."""
    starts = np.zeros((B, T), bool)
    for row in starts:
        row[rng.choice(T - 1, documents - 1, replace=False) + 1] = True
    index = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return np.cumsum(starts, 1, dtype=np.int32), index - np.maximum.accumulate(np.where(starts, index, 0), 1)


def draw(problem: AnyProblem, seed: int = 0) -> Drawn:
    """Equal for equal problems and seeds."""
    s, rng = problem.shaped(), np.random.default_rng(seed)
    drawn = {name: rng.standard_normal(a.shape, np.float32) for name, a in s.arrays.items()}
    ids = problem.fill(drawn, rng)
    cotangents = {name: rng.standard_normal(a.shape, np.float32).astype(a.dtype) for name, a in s.cotangents.items()}
    return Drawn({name: x.astype(s.arrays[name].dtype) for name, x in drawn.items()}, ids, cotangents)


def draws(problem: AnyProblem) -> tuple[Drawn, ...]:
    """So many draws that no result has fewer than 64 numbers in all.

    Of a few numbers, as are the gradients of two heads' sinks, the error is a matter of chance, and so is its ratio to
    another implementation's.
    """
    fewest = min(math.prod(a.shape) for a in problem.shaped().arrays.values())
    return tuple(draw(problem, seed) for seed in range(-(-_ENOUGH // fewest)))


# ---- results


@functools.partial(jax.jit, static_argnames=("problem", "implementation"))
def _results(arrays: Any, ids: Any, cotangents: Any, *, problem: AnyProblem, implementation: str | None) -> Any:
    """Of a back end, or of the plain implementation, with the gradients, if there are any."""

    def call(arrays: Any) -> Any:
        return problem.plain(arrays, ids) if implementation is None else problem.call(arrays, ids, implementation)

    if not cotangents:
        return call(arrays)
    found, pull = jax.vjp(call, arrays)
    (gradients,) = pull({name: cotangents[name].astype(x.dtype) for name, x in found.items()})
    return {**found, **{f"d{name}": x for name, x in gradients.items()}}


def check(problem: AnyProblem, implementation: str) -> None:
    """Raises NotImplementedError with the reason where the back end refuses the problem here; computes nothing."""
    # Traced anew each time: a refusal depends on the device, of which the cache of a jitted function knows nothing.
    f = functools.partial(_results.__wrapped__, problem=problem, implementation=implementation)
    given = problem.shaped()
    jax.eval_shape(f, given.arrays, given.ids, given.cotangents)


def computed(problem: AnyProblem, implementation: str | None, drawn: Sequence[Drawn]) -> Results:
    """What the back end computes on the default device, in NumPy, with an axis of draws before all others."""
    f = functools.partial(_results, problem=problem, implementation=implementation)
    results = [jax.device_get(f(d.arrays, d.ids, d.cotangents)) for d in drawn]
    return {name: np.stack([r[name] for r in results]) for name in results[0]}


def truth(problem: AnyProblem, implementation: str, drawn: Sequence[Drawn], dtype: Any) -> Results:
    """`computed` of the same numbers in a wider dtype: what is taken to be exact."""
    cast = lambda tree: {name: np.asarray(x).astype(dtype) for name, x in tree.items()}
    wide = [Drawn(cast(d.arrays), d.ids, cast(d.cotangents)) for d in drawn]
    return computed(replace(problem, dtype=np.dtype(dtype).name), implementation, wide)


def plain(problem: AnyProblem, drawn: Sequence[Drawn]) -> Results:
    """`computed` by the problem's plain implementation."""
    return computed(problem, None, drawn)


# ---- the comparison


@dataclass(frozen=True)
class Deviation:
    """One result's error, as a share of the truth's norm (as it is, where that is 0)."""

    error: float
    allowed: float
    plain: float  # error of the plain implementation
    flaw: str = ""  # what is wrong whatever the error

    @property
    def agrees(self) -> bool:
        return not self.flaw and self.error <= self.allowed

    def __str__(self) -> str:
        return self.flaw or f"relative error {self.error:.1e} of {self.allowed:.1e} allowed"


def deviations(
    got: Results, truth: Results, plain: Results, work: Any, units: float | None = None
) -> dict[str, Deviation]:
    """How far each result is from the truth.

    Args:
      got: what is judged.
      truth: as if exact, of the same names and shapes.
      plain: what a plain implementation of the same precision gives.
      work: the dtype of statistics and accumulators.
      units: in its last place that rounding is allowed beside; None: sqrt(n) for a sum of n terms, with n the number of
        a result's elements, at least 1024.
    """
    found = {}
    for name, array in got.items():
        eps = max(np.finfo(work).eps, np.finfo(np.float32).eps if array.dtype == np.float32 else 0)
        x, exact, yardstick = (np.asarray(a).astype(np.float64) for a in (array, truth[name], plain[name]))
        if x.shape != exact.shape:
            found[name] = Deviation(np.inf, 0.0, 0.0, f"its shape is {x.shape}, not {exact.shape}")
            continue
        finite = np.isfinite(exact)
        flaw = ""
        if not np.array_equal(x[~finite], exact[~finite]):
            flaw = "it is not -inf where no key is visible"
        elif not np.isfinite(x[finite]).all():
            flaw = f"{np.count_nonzero(~np.isfinite(x[finite]))} of {x.size} numbers are NaN or inf"
        size = float(np.linalg.norm(exact[finite]))
        error, own = (float(np.linalg.norm(a[finite] - exact[finite])) for a in (x, yardstick))
        rounding = float(eps) * (max(x.size, 1024) ** 0.5 if units is None else units)
        bound, unit = 2 * own + rounding * size, size or 1.0
        found[name] = Deviation(error / unit, bound / unit, own / unit, flaw)
    return found


def tried(
    problem: AnyProblem, implementation: str, drawn: Sequence[Drawn], truth: Results, plain: Results
) -> dict[str, Any]:
    """A back end on the default device, as JSON: its `outcome` is "passed", "failed" or "refused".

    With `results`, each as of `Deviation`, and the `worst` of them, or a `reason`; and the `seconds` that it took.
    """
    began = time.perf_counter()
    try:
        try:
            check(problem, implementation)
        except NotImplementedError as refusal:
            return {"outcome": "refused", "reason": " ".join(str(refusal).split())}
        got, again = (computed(problem, implementation, drawn) for _ in range(2))
    except Exception as error:  # of the compiler's or the device's many kinds: a kernel that was accepted must run
        row: dict[str, Any] = {
            "outcome": "failed",
            "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
        }
    else:
        found = deviations(got, truth, plain, shapes.statistics_dtype(problem.dtype), problem.units(truth))
        for name, x in got.items():
            if x.tobytes() != again[name].tobytes() and not found[name].flaw:
                found[name] = replace(found[name], flaw="two calls with equal arguments differ")
        worst = max(found, key=lambda name: (not found[name].agrees, _share(found[name])))
        row = {
            "outcome": "passed" if found[worst].agrees else "failed",
            "worst": worst,
            "results": {name: {**_json(d), "agrees": d.agrees} for name, d in found.items()},
        }
        if not found[worst].agrees:
            row["reason"] = f"{worst}: {found[worst]}"
    return row | {"seconds": time.perf_counter() - began}


def _json(d: Deviation) -> dict[str, Any]:
    """None for what is no number, which JSON does not know."""
    return {name: None if isinstance(x, float) and not np.isfinite(x) else x for name, x in asdict(d).items()}


def _share(d: Deviation) -> float:
    """How much of what is allowed an error is; a flaw is beyond all."""
    return np.inf if d.flaw else d.error / d.allowed if d.allowed else float(d.error > 0)
