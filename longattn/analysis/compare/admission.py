"""Who may be timed: whose results (and gradients) agree with those of a float32 reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longattn.analysis import bench
from longattn.analysis.compare.contestants import CONTESTANTS
from longattn.analysis.compare.options import CompareOptions
from longattn.ops import dispatch
from longattn.ops.attention.api import BACK_ENDS
from longattn.train.record import available_memory


def _refusals(name: str) -> tuple[type[Exception], ...]:
    """What becomes a row with its reason: of a rival's whatever its kernel's compiler may raise."""
    return (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) if name in BACK_ENDS else (Exception,)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {text}"


def compiled(name: str, options: CompareOptions, arrays: Sequence[Any]) -> Any:
    """The contestant's compiled program, called "compare_NAME".

    Raises NotImplementedError with the reason why it does not run here, and whatever its compiler raises.
    """
    contestant, platform = CONTESTANTS[name], dispatch.target().platform
    if platform not in contestant.platforms:
        raise NotImplementedError(f"it runs on {' and '.join(contestant.platforms)}, this is {platform}")
    attend = contestant.build(options.problem)
    inner = bench.candidate(attend, options.what)

    def program(*arguments: Any) -> Any:
        return inner(*arguments)

    program.__name__ = f"compare_{name}"  # by which the trace knows it
    result = jax.jit(program).lower(*arrays).compile()
    memory = result.memory_analysis()
    if memory is not None:
        needs, free = memory.temp_size_in_bytes + memory.output_size_in_bytes, available_memory()
        if free is not None and needs > 0.8 * free:
            raise NotImplementedError(f"it needs {needs / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    return result


def _expected(options: CompareOptions, drawn: Mapping[str, np.ndarray]) -> tuple[str, list[np.ndarray]]:
    """The back end that gave them, and the results for float32 inputs: the reference's, or where its memory in
    proportion to T x T is not there, the blockwise form's.
    """
    arrays = [jnp.asarray(x) for x in drawn.values()]
    wide = replace(options, dtype="float32")
    try:
        name, program = "reference", compiled("reference", wide, arrays)
    except NotImplementedError:
        try:
            name, program = "xla", compiled("xla", wide, arrays)
        except NotImplementedError as error:
            raise ValueError(
                f"T={options.T} is too long to be checked on this machine: in float32 {error}; choose a shorter one"
            ) from None
    return name, [np.asarray(x) for x in program(*arrays)]


def admit(options: CompareOptions) -> tuple[str, dict[str, Callable[[], Any]], dict[str, dict[str, Any]]]:
    """What was compared with, the contestants that run and agree, and what is known of each: error or reason."""
    drawn = bench.inputs(options.problem, options.T)
    against, expected = _expected(options, drawn)
    arrays = [jnp.asarray(x, options.dtype) for x in drawn.values()]
    fns: dict[str, Callable[[], Any]] = {}
    known: dict[str, dict[str, Any]] = {}
    limit = bench.AGREE[options.dtype]
    for name in options.contestants:
        try:
            program = compiled(name, options, arrays)
            results = [np.asarray(x, np.float32) for x in program(*arrays)]
        except _refusals(name) as error:
            known[name] = {"reason": _reason(error)}
            continue
        error = bench.relative_error(results, expected)
        known[name] = {"error": error}
        if error <= limit:
            fns[name] = functools.partial(program, *arrays)
        else:
            known[name]["reason"] = (
                f"it disagrees with {against} in float32: relative error {error:.1e}, at most {limit:.0e} for "
                f"{options.dtype}; it was not timed"
            )
    return against, fns, known
