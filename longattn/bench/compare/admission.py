"""Which contestants may be timed: those whose results (and gradients) agree with a float32 reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from longattn.bench import attention
from longattn.bench.compare.options import CompareOptions
from longattn.bench.compare.peers import CONTESTANTS, LINEAR, Contestant
from longattn.bench.compare.problems import Linear, Problem, What
from longattn.environment import available_memory
from longattn.ops import dispatch
from longattn.ops.attention.api import BACK_ENDS

_OURS = {*BACK_ENDS, *LINEAR}


def _refusals(name: str) -> tuple[type[Exception], ...]:
    """Returns the exceptions that become a row's reason: for a rival, whatever its compiler may raise."""
    return (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) if name in _OURS else (Exception,)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {text}"


def compiled(name: str, contestant: Contestant, problem: Problem, what: What, arrays: Sequence[Any]) -> Any:
    """Returns the contestant's compiled program, named "compare_NAME" in the trace.

    Raises NotImplementedError with the reason why it cannot run here, and whatever its compiler raises.
    """
    platform = dispatch.target().platform
    if platform not in contestant.platforms:
        raise NotImplementedError(f"it runs on {' and '.join(contestant.platforms)}, this is {platform}")
    inner = attention.candidate(contestant.build(problem), what)

    def program(*arguments: Any) -> Any:
        return inner(*arguments)

    program.__name__ = f"compare_{name}"  # its name in the trace
    result = jax.jit(program).lower(*arrays).compile()
    memory = result.memory_analysis()
    if memory is not None:
        needs, free = memory.temp_size_in_bytes + memory.output_size_in_bytes, available_memory()
        if free is not None and needs > 0.8 * free:
            raise NotImplementedError(f"it needs {needs / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    return result


class _Solved(NamedTuple):
    """A problem's inputs in its dtype, and the expected results."""

    arrays: list[Any]
    against: str  # the back end that gave the results
    results: list[np.ndarray]


def _solve(problem: Problem, what: What) -> _Solved:
    """Returns the inputs and the reference's results in float32.

    If the reference needs too much memory (T x T for attention), the blockwise back end takes its place.
    """
    drawn, wide = problem.drawn(), replace(problem, dtype="float32")
    cast = lambda dtype: [jnp.asarray(x, dtype if n in ("q", "k", "v", "do") else x.dtype) for n, x in drawn.items()]
    arrays, table = cast("float32"), LINEAR if isinstance(problem, Linear) else CONTESTANTS
    try:
        name, program = "reference", compiled("reference", table["reference"], wide, what, arrays)
    except NotImplementedError:
        try:
            name, program = "xla", compiled("xla", table["xla"], wide, what, arrays)
        except NotImplementedError as error:
            raise ValueError(
                f"T={drawn['q'].shape[1]} is too long to be checked on this machine: in float32 {error}; choose a "
                "shorter one"
            ) from None
    return _Solved(cast(problem.dtype), name, [np.asarray(x) for x in program(*arrays)])


def admit(options: CompareOptions) -> tuple[str, dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
    """Returns the reference's name, the contestants that run and agree, and by contestant its error or reason."""
    solved: dict[type, _Solved] = {}  # a yardstick's problem is of another type
    fns: dict[str, Callable[[], Any]] = {}
    known: dict[str, dict[str, Any]] = {}
    for name in options.names:
        problem = options.given(name)
        if type(problem) not in solved:
            solved[type(problem)] = _solve(problem, options.what)
        arrays, against, expected = solved[type(problem)]
        try:
            program = compiled(name, options.known[name], problem, options.what, arrays)
            results = [np.asarray(x, np.float32) for x in program(*arrays)]
        except _refusals(name) as error:
            known[name] = {"reason": _reason(error)}
            continue
        error, limit = attention.relative_error(results, expected), attention.AGREE[problem.dtype]
        known[name] = {"error": error}
        if error <= limit:
            fns[name] = functools.partial(program, *arrays)
        else:
            known[name]["reason"] = (
                f"it disagrees with {against} in float32: relative error {error:.1e}, at most {limit:.0e} for "
                f"{problem.dtype}; it was not timed"
            )
    return " and ".join(dict.fromkeys(s.against for s in solved.values())), fns, known
