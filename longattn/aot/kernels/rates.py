"""How often branches that depend on the data run: counted in kernels that run on the CPU, in interpret mode.

A kernel's `pl.when` is replaced, while it is traced, by one that also reports each time whether its condition held.
Inputs are drawn from N(0, 1), as after a normalisation; a rate says nothing about other data, so tables show the worst
case beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from longattn.aot.kernels.cases import CASES, Shape


@dataclass
class Count:
    """One `pl.when` of a source: how often it was asked, and how often it ran."""

    name: str  # of the function under it
    asked: int = 0
    runs: int = 0


@dataclass
class _Counter:
    """Stands in for `pl.when`."""

    when: Any  # the real one
    counts: list[Count] = field(default_factory=list)  # in the order of the source

    def __call__(self, condition: Any) -> Any:
        def decorate(function: Any) -> Any:
            count = Count(function.__name__)
            self.counts.append(count)

            def record(held: Any) -> None:
                count.asked += 1
                count.runs += int(held)

            jax.debug.callback(record, condition)
            return self.when(condition)(function)

        return decorate


def count(case: str, shape: Shape) -> list[Count]:
    """Run a case in interpret mode on N(0, 1) inputs, and count its branches, in the order of their sources."""
    counter = _Counter(pl.when)
    with mock.patch.object(pl, "when", counter), pltpu.force_tpu_interpret_mode():
        fn, arrays = CASES[case].build(shape)
        keys = jax.random.split(jax.random.key(0), len(arrays))
        values = [jax.random.normal(key, a.shape, jnp.float32).astype(a.dtype) for key, a in zip(keys, arrays)]
        jax.block_until_ready(fn(*values))
        jax.effects_barrier()
    return counter.counts


def small(shape: Shape) -> Shape:
    """A shape of four blocks by four with the mask, head sizes and grouping of another, which interprets in seconds."""
    group = shape.H // shape.key_heads
    return replace(shape, T=1024, H=group, K=1, documents=min(shape.documents, 2), bT=256, bS=256, bC=128, bR=128)


def measure_here(request: Mapping[str, Any]) -> dict[str, Any]:
    """The rates of a case's branches that depend on the data, by the names of the functions under them."""
    shape = Shape.from_json(request["shape"])
    names = {
        branch.data for kernel in CASES[request["case"]].kernels(shape) for branch in kernel.branches if branch.data
    }
    counts = count(request["case"], shape)
    asked = {name: sum(c.asked for c in counts if c.name == name) for name in names}
    never = [name for name, n in asked.items() if not n]
    if never:
        raise ValueError(f"{request['case']} never asked for {', '.join(never)} in interpret mode")
    return {"rates": {name: sum(c.runs for c in counts if c.name == name) / asked[name] for name in names}}
