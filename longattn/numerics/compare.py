"""Whether a back end computes what it should: results and all gradients, by a tolerance that is derived.

Errors are Euclidean norms against the truth. A back end's may be at most twice that of a plain implementation of the
same precision on the same device, beside the rounding of sums (as flash-attention's tests have it, arXiv:2205.14135).
`AnyProblem` is what a kind of problem has to say.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import numpy as np

from longattn import shapes

_ENOUGH = 64
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
