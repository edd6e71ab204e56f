"""Compares a back end's results and gradients with the truth, against a derived tolerance.

An error is the Euclidean norm of the difference to the truth. It may be at most twice the error of a plain
implementation of the same precision on the same device, plus the rounding of sums (as in the tests of flash-attention,
arXiv:2205.14135). `AnyProblem` is the interface of a kind of problem.
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
from jax.typing import DTypeLike
from jaxtyping import Array

from longattn import shapes

_ENOUGH = 64  # numbers of a result over all draws
Results = Mapping[str, Any]  # by name: the operation's results, and the gradient dx of every array x


@dataclass(frozen=True)
class Drawn:
    """A problem's NumPy arrays, or their ShapeDtypeStructs, by name."""

    arrays: dict[str, Any]  # arguments with a gradient
    ids: dict[str, Any]  # arguments without, int32
    cotangents: dict[str, Any]  # cotangents of the results; empty if the operation has no gradient


@runtime_checkable
class AnyProblem(Protocol):
    """A call of an operation with everything that is differentiable; implementations are frozen dataclasses."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    op: ClassVar[str]
    api: ClassVar[Any]  # the operation's module with BACK_ENDS and DEFAULT

    @property
    def T(self) -> int:
        """The number of tokens."""

    @property
    def dtype(self) -> str:
        """The dtype of q, k and v."""

    def shaped(self) -> Drawn:
        """Returns the shapes and dtypes of the arrays."""

    def fill(self, arrays: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Returns the ids, and turns arrays of normal numbers, in place, into realistic ones (decays < 0, ...)."""

    def call(self, arrays: dict[str, Array], ids: dict[str, Array], implementation: str) -> dict[str, Array]:
        """Returns the back end's results."""

    def plain(self, arrays: dict[str, Array], ids: dict[str, Array]) -> dict[str, Array]:
        """Computes the same in plain float32 JAX, rounded to the problem's dtype wherever a device may round."""

    def units(self, truth: Results) -> float:
        """Returns the units in the last place that rounding may add to the plain implementation's error."""

    def shorter(self) -> AnyProblem:
        """Returns a problem of the same kind that is quickly compared."""


def packed(B: int, T: int, documents: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns segment_ids and positions [B T] of `documents` documents per sequence, cut at random."""
    starts = np.zeros((B, T), bool)
    for row in starts:
        row[rng.choice(T - 1, documents - 1, replace=False) + 1] = True
    index = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    return np.cumsum(starts, 1, dtype=np.int32), index - np.maximum.accumulate(np.where(starts, index, 0), 1)


def draw(problem: AnyProblem, seed: int = 0) -> Drawn:
    """Draws the arrays of a problem; equal problems and seeds give equal arrays."""
    s, rng = problem.shaped(), np.random.default_rng(seed)
    drawn = {name: rng.standard_normal(a.shape, np.float32) for name, a in s.arrays.items()}
    ids = problem.fill(drawn, rng)
    cotangents = {name: rng.standard_normal(a.shape, np.float32).astype(a.dtype) for name, a in s.cotangents.items()}
    return Drawn({name: x.astype(s.arrays[name].dtype) for name, x in drawn.items()}, ids, cotangents)


def draws(problem: AnyProblem) -> tuple[Drawn, ...]:
    """Draws a problem so often that no result has fewer than 64 numbers in all.

    With few numbers, such as the gradients of two heads' sinks, the error is left to chance, and so is its ratio to the
    error of another implementation.
    """
    fewest = min(math.prod(a.shape) for a in problem.shaped().arrays.values())
    return tuple(draw(problem, seed) for seed in range(-(-_ENOUGH // fewest)))


# ---- results


@functools.partial(jax.jit, static_argnames=("problem", "implementation"))
def _results(arrays: Any, ids: Any, cotangents: Any, *, problem: AnyProblem, implementation: str | None) -> Any:
    """Returns the results and gradients of a back end, or of the plain implementation if that is None."""

    def call(arrays: Any) -> Any:
        return problem.plain(arrays, ids) if implementation is None else problem.call(arrays, ids, implementation)

    if not cotangents:
        return call(arrays)
    found, pull = jax.vjp(call, arrays)
    (gradients,) = pull({name: cotangents[name].astype(x.dtype) for name, x in found.items()})
    return {**found, **{f"d{name}": x for name, x in gradients.items()}}


def check(problem: AnyProblem, implementation: str) -> None:
    """Raises NotImplementedError, with the reason, if the back end refuses the problem here; computes nothing."""
    # Bypasses jit's cache: a refusal depends on the device, which is no part of its key.
    f = functools.partial(_results.__wrapped__, problem=problem, implementation=implementation)
    given = problem.shaped()
    jax.eval_shape(f, given.arrays, given.ids, given.cotangents)


def computed(problem: AnyProblem, implementation: str | None, drawn: Sequence[Drawn]) -> Results:
    """Computes on the default device; returns NumPy arrays with a leading axis of draws."""
    f = functools.partial(_results, problem=problem, implementation=implementation)
    results = [jax.device_get(f(d.arrays, d.ids, d.cotangents)) for d in drawn]
    return {name: np.stack([r[name] for r in results]) for name in results[0]}


def truth(problem: AnyProblem, implementation: str, drawn: Sequence[Drawn], dtype: DTypeLike) -> Results:
    """Computes with the same numbers in a wider dtype, which counts as exact."""
    cast = lambda tree: {name: np.asarray(x).astype(dtype) for name, x in tree.items()}
    wide = [Drawn(cast(d.arrays), d.ids, cast(d.cotangents)) for d in drawn]
    return computed(replace(problem, dtype=np.dtype(dtype).name), implementation, wide)


def plain(problem: AnyProblem, drawn: Sequence[Drawn]) -> Results:
    """Computes with the problem's plain implementation."""
    return computed(problem, None, drawn)


# ---- the comparison


@dataclass(frozen=True)
class Deviation:
    """The error of one result as a share of the truth's norm; absolute where that is 0."""

    error: float
    allowed: float
    plain: float  # error of the plain implementation
    flaw: str = ""  # a fault that no tolerance excuses

    @property
    def agrees(self) -> bool:
        return not self.flaw and self.error <= self.allowed

    def __str__(self) -> str:
        return self.flaw or f"relative error {self.error:.1e} of {self.allowed:.1e} allowed"


def deviations(
    got: Results, truth: Results, plain: Results, work: DTypeLike, units: float | None = None
) -> dict[str, Deviation]:
    """Returns how far each result is from the truth.

    Args:
      got: the results to judge.
      truth: the exact results, with the same names and shapes.
      plain: the results of a plain implementation of the same precision.
      work: the dtype of statistics and accumulators.
      units: units in its last place that rounding may add. None is sqrt(n), for a sum of n terms, where n is the number
        of a result's elements and at least 1024.
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
    """Tries a back end on the default device; returns, as JSON, its `outcome`: "passed", "failed" or "refused".

    Beside it are `results` (fields of `Deviation`) with the name of the `worst`, or a `reason`; and the `seconds`.
    """
    began = time.perf_counter()
    try:
        try:
            check(problem, implementation)
        except NotImplementedError as refusal:
            return {"outcome": "refused", "reason": " ".join(str(refusal).split())}
        got, again = (computed(problem, implementation, drawn) for _ in range(2))
    except Exception as error:  # compilers and devices raise many classes: an accepted kernel must run
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
    """Returns a deviation as JSON, with None for NaN and infinity."""
    return {name: None if isinstance(x, float) and not np.isfinite(x) else x for name, x in asdict(d).items()}


def _share(d: Deviation) -> float:
    """Returns the error as a share of the allowed one; infinite for a flaw."""
    return np.inf if d.flaw else d.error / d.allowed if d.allowed else float(d.error > 0)
