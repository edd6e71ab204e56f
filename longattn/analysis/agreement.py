"""Whether a back end of attention computes what it should: results and all gradients, by a tolerance that is derived.

Errors are Euclidean norms against the truth. A back end's may be at most twice that of a plain implementation of the
same precision on the same device, beside the rounding of sums (as flash-attention's tests have it, arXiv:2205.14135).
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import Precision

from longattn import shapes
from longattn.mask import Causal, Mask, Prefix
from longattn.ops.attention.api import attention_with_lse

_ENOUGH = 64
Results = Mapping[str, Any]  # out, lse and the gradients dq, dk, dv, dsinks, dbias


@dataclass(frozen=True)
class Problem:
    """A call of attention with everything that is differentiable, drawn from the normal distribution."""

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


@dataclass(frozen=True)
class Drawn:
    """A problem's arrays, in NumPy, or their ShapeDtypeStructs."""

    arrays: dict[str, Any]  # q, k, v, sinks, bias: what has a gradient
    ids: dict[str, Any]  # segment_ids and positions, int32 [B T]; prefix, int32 [B]
    cotangents: dict[str, Any]  # of out (in the problem's dtype) and of lse


def shaped(problem: Problem) -> Drawn:
    """Shapes and dtypes of a problem's arrays."""
    p, array = problem, jax.ShapeDtypeStruct
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


def draw(problem: Problem, seed: int = 0) -> Drawn:
    """Equal for equal problems and seeds."""
    p, s, rng = problem, shaped(problem), np.random.default_rng(seed)
    drawn = {name: rng.standard_normal(a.shape, np.float32) for name, a in s.arrays.items()}
    drawn["k"] *= np.linspace(1, p.rise, p.keys, dtype=np.float32)[:, None, None]
    ids = {}
    if p.documents:
        starts = np.zeros((p.B, p.T), bool)
        for row in starts:
            row[rng.choice(p.T - 1, p.documents - 1, replace=False) + 1] = True
        index = np.broadcast_to(np.arange(p.T, dtype=np.int32), (p.B, p.T))
        ids["segment_ids"] = np.cumsum(starts, 1, dtype=np.int32)
        ids["positions"] = index - np.maximum.accumulate(np.where(starts, index, 0), 1)
    if p.prefix:
        ids["prefix"] = rng.integers(1, p.prefix + 1, p.B, dtype=np.int32)
    cotangents = {name: rng.standard_normal(a.shape, np.float32).astype(a.dtype) for name, a in s.cotangents.items()}
    return Drawn({name: x.astype(s.arrays[name].dtype) for name, x in drawn.items()}, ids, cotangents)


def draws(problem: Problem) -> tuple[Drawn, ...]:
    """So many draws that no result has fewer than 64 numbers in all.

    Of a few numbers, as are the gradients of two heads' sinks, the error is a matter of chance, and so is its ratio to
    another implementation's.
    """
    fewest = min(math.prod(a.shape) for a in shaped(problem).arrays.values())
    return tuple(draw(problem, seed) for seed in range(-(-_ENOUGH // fewest)))


# ---- results


def _mask(problem: Problem, ids: Any) -> Mask:
    return problem.mask | Prefix(ids["prefix"]) if problem.prefix else problem.mask


def _with_gradients(attend: Any, arrays: Any, cotangents: Any) -> Results:
    (out, lse), pull = jax.vjp(lambda arrays: attend(**arrays), arrays)
    (gradients,) = pull((cotangents["out"].astype(out.dtype), cotangents["lse"].astype(lse.dtype)))
    return {"out": out, "lse": lse, **{f"d{name}": x for name, x in gradients.items()}}


@functools.partial(jax.jit, static_argnames=("problem", "implementation"))
def _attended(arrays: Any, ids: Any, cotangents: Any, *, problem: Problem, implementation: str) -> Any:
    p = problem
    attend = functools.partial(
        attention_with_lse, mask=_mask(p, ids), segment_ids=ids.get("segment_ids"), positions=ids.get("positions"),
        scale=p.scale, softcap=p.softcap, implementation=implementation,
    )  # fmt: skip
    return _with_gradients(attend, arrays, cotangents)


def check(problem: Problem, implementation: str) -> None:
    """Raises NotImplementedError with the reason where the back end refuses the problem here; computes nothing."""
    # Traced anew each time: a refusal depends on the device, of which the cache of a jitted function knows nothing.
    f = functools.partial(_attended.__wrapped__, problem=problem, implementation=implementation)
    given = shaped(problem)
    jax.eval_shape(f, given.arrays, given.ids, given.cotangents)


def attended(problem: Problem, implementation: str, drawn: Sequence[Drawn]) -> Results:
    """What the back end computes on the default device, in NumPy, with an axis of draws before all others."""
    return _stacked(functools.partial(_attended, problem=problem, implementation=implementation), drawn)


def _stacked(f: Any, drawn: Sequence[Drawn]) -> Results:
    results = [jax.device_get(f(d.arrays, d.ids, d.cotangents)) for d in drawn]
    return {name: np.stack([r[name] for r in results]) for name in results[0]}


def truth(problem: Problem, implementation: str, drawn: Sequence[Drawn], dtype: Any) -> Results:
    """`attended` of the same numbers in a wider dtype: what is taken to be exact."""
    cast = lambda tree: {name: np.asarray(x).astype(dtype) for name, x in tree.items()}
    wide = [Drawn(cast(d.arrays), d.ids, cast(d.cotangents)) for d in drawn]
    return attended(replace(problem, dtype=np.dtype(dtype).name), implementation, wide)


@functools.partial(jax.jit, static_argnames="problem")
def _plain(arrays: Any, ids: Any, cotangents: Any, *, problem: Problem) -> Any:
    p, bits = problem, jnp.finfo(problem.dtype)
    # Factors that were rounded to bfloat16 are exact in any device's products, and compiled in a third of the time.
    product = functools.partial(jnp.einsum, precision=None if p.dtype == "bfloat16" else Precision.HIGHEST)

    def r(x: Any) -> Any:  # its transpose rounds cotangents
        return jax.lax.reduce_precision(x, exponent_bits=bits.nexp, mantissa_bits=bits.nmant)

    def attend(q: Any, k: Any, v: Any, sinks: Any = None, bias: Any = None) -> tuple[Any, Any]:
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        k, v = (jnp.repeat(x, p.H // p.heads, axis=2) for x in (k, v))
        scale = p.D**-0.5 if p.scale is None else p.scale
        s = r(scale * r(product("BTHD,BSHD->BHTS", q, k)))
        if p.softcap is not None:
            s = r(p.softcap * r(jnp.tanh(r(s / p.softcap))))
        if bias is not None:
            s = r(s + bias.reshape((1,) * (4 - bias.ndim) + bias.shape))
        positions = ids.get("positions", jnp.arange(max(p.T, p.keys), dtype=jnp.int32)[None])
        visible = _mask(p, ids)(positions[:, None, : p.T, None], positions[:, None, None, : p.keys])
        if "segment_ids" in ids:
            visible &= ids["segment_ids"][:, None, :, None] == ids["segment_ids"][:, None, None, :]
        s = jnp.where(visible, s, -jnp.inf)
        sink = (jnp.full(p.H, -jnp.inf) if sinks is None else sinks)[None, :, None]
        m = jax.lax.stop_gradient(jnp.maximum(s.max(-1), sink))
        m = jnp.where(m == -jnp.inf, 0.0, m)
        e = jnp.exp(s - m[..., None])
        total = e.sum(-1) + jnp.exp(sink - m)
        empty = total == 0
        total = jnp.where(empty, 1.0, total)
        out = r(product("BHTS,BSHV->BTHV", r(e / total[..., None]), v))
        return out, jnp.where(empty, -jnp.inf, m + jnp.log(total)).transpose(0, 2, 1)

    return _with_gradients(attend, arrays, cotangents)


def plain(problem: Problem, drawn: Sequence[Drawn]) -> Results:
    """The whole matrix at once in float32, each result rounded to the problem's dtype, forwards and backwards.

    In NumPy, with an axis of draws before all others.

    Products are exact but for their sum in float32, so that on any device its error is what this precision costs there.
    """
    return _stacked(functools.partial(_plain, problem=problem), drawn)


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
    problem: Problem, implementation: str, drawn: Sequence[Drawn], truth: Results, plain: Results
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
        got, again = (attended(problem, implementation, drawn) for _ in range(2))
    except Exception as error:  # of the compiler's or the device's many kinds: a kernel that was accepted must run
        row: dict[str, Any] = {
            "outcome": "failed",
            "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
        }
    else:
        found = deviations(got, truth, plain, shapes.statistics_dtype(problem.dtype), _units(problem, truth))
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


def _units(problem: Problem, truth: Results) -> float:
    """What rounding is allowed: of the longest sums, and of an lse that is kept for the backward pass, whose rounding,
    in proportion to its size, is in every weight there.
    """
    p, lse = problem, truth["lse"][np.isfinite(truth["lse"])]
    terms = p.B * p.H * max(p.T, p.keys, p.D, p.values)
    return max(terms, 1024) ** 0.5 + (float(np.sqrt(np.mean(np.square(lse)))) if lse.size else 0.0)


def _json(d: Deviation) -> dict[str, Any]:
    """None for what is no number, which JSON does not know."""
    return {name: None if isinstance(x, float) and not np.isfinite(x) else x for name, x in asdict(d).items()}


def _share(d: Deviation) -> float:
    """How much of what is allowed an error is; a flaw is beyond all."""
    return np.inf if d.flaw else d.error / d.allowed if d.allowed else float(d.error > 0)
