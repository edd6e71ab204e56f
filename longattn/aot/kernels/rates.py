"""Counts how often data-dependent branches of a kernel run, in interpret mode on the CPU.

While the kernel is traced, `pl.when` is replaced by one that also reports whether its condition held. Inputs are drawn
from N(0, 1), as after a normalisation. A rate says nothing about other data, so tables also show the worst case.
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

    name: str  # name of the decorated function
    asked: int = 0
    runs: int = 0


@dataclass
class _Counter:
    """A `pl.when` that counts."""

    when: Any  # the original
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
    """Runs a case in interpret mode on N(0, 1) inputs, and returns the counts in the order of the source."""
    counter = _Counter(pl.when)
    with mock.patch.object(pl, "when", counter), pltpu.force_tpu_interpret_mode():
        fn, arrays = CASES[case].build(shape)
        keys = jax.random.split(jax.random.key(0), len(arrays))
        values = [jax.random.normal(key, a.shape, jnp.float32).astype(a.dtype) for key, a in zip(keys, arrays)]
        jax.block_until_ready(fn(*values))
        jax.effects_barrier()
    return counter.counts


def small(shape: Shape) -> Shape:
    """Returns a shape of 4 x 4 blocks with the same mask, head sizes and grouping, which is interpreted in seconds."""
    group = shape.H // shape.key_heads
    return replace(shape, T=1024, H=group, K=1, documents=min(shape.documents, 2), bT=256, bS=256, bC=128, bR=128)


def measure_here(request: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the rates of a case's data-dependent branches by the names of their functions."""
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
