"""Part 2, memory: bytes of a training step against T, and the longest T and largest batch that fit each chip.

Nothing runs. The training step is compiled from shapes at three lengths, a polynomial in T is fitted to its bytes, and
the fit is checked at a fourth length. The bytes are those of this machine's compiler: on a CPU, bfloat16 products are
computed, and partly kept, in float32.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from longattn import config
from longattn.cost import hardware
from longattn.models import module_of
from longattn.study.presets import MemoryPlan
from longattn.study.store import Number, Store
from longattn.study.units import Clock, Unit
from longattn.study.ways import FIRST, Way, ways
from longattn.train.step import batch_shapes, state_shapes, train_step

USABLE = 0.9  # share of a chip's memory; the runtime, the programs and fragmentation take the rest
LONGEST = 2**30  # tokens; a fit is not extrapolated further


def units(plan: MemoryPlan, store: Store) -> list[Unit]:
    """Returns a unit per way and remat policy. Every way gets the first policy; ways after FIRST get no other."""
    made = [Unit("memory/chips", lambda clock: _chips(), weight=0.05)]
    for rank, remat in enumerate(plan.remats):
        for i, way in enumerate(ways(plan.windows, plan.without)):
            if plan.every or rank == 0 or i < FIRST:
                work = lambda clock, w=way, r=remat: _policy(plan, w, r, clock)
                made.append(Unit(f"memory/{way.name}/{remat}", work))
    return made


def _chips() -> Iterable[Number]:
    for name, chip in hardware.CHIPS.items():
        yield Number(
            "memory",
            "chip_bytes",
            "",
            chip.hbm_bytes,
            "B",
            "predicted",
            {"chip": name},
            note=f"published: {chip.source}",
        )


def _config(plan: MemoryPlan, way: Way, remat: Any, T: int, B: int = 1) -> config.Config:
    model = dataclasses.replace(plan.model, mixers=(way.mixer,), remat=remat)
    return config.Config(model=model, data=config.ByteLM(T=T, B=B))


def _compiled(program: Any, *arguments: Any) -> Any:
    return program.lower(*arguments).compile().memory_analysis()


def step_bytes(cfg: config.Config, way: Way) -> int:
    """Returns the bytes of one compiled training step by XLA's account: state, batch, scratch and results."""
    m = _compiled(train_step(cfg, way.context), state_shapes(cfg), batch_shapes(cfg))
    return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


@dataclass(frozen=True)
class Fit:
    """Bytes of a step with one sequence: a + b T + c T**2, where c = 0 if a line is accurate to a percent."""

    a: float
    b: float
    c: float

    def __call__(self, T: float, B: int = 1) -> float:
        """Returns the bytes of B sequences: all but the constant grows with the batch."""
        return self.a + B * (self.b * T + self.c * T**2)

    def longest(self, limit: float) -> int:
        """Returns the longest T, a multiple of 128, within `limit` bytes; 0 if there is none."""
        low, high = 0, LONGEST // 128
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self(middle * 128) <= limit else (low, middle - 1)
        return low * 128

    def largest_batch(self, T: int, limit: float) -> int:
        return max(0, math.floor((limit - self.a) / max(self(T) - self.a, 1)))


def fit(lengths: Iterable[int], values: Iterable[float]) -> Fit:
    """Fits a line if it is within 1% of every value, else a parabola that rises."""
    T, y = np.array(list(lengths), float), np.array(list(values), float)
    b, a = np.polyfit(T, y, 1)
    if (np.abs(a + b * T - y) <= 0.01 * y).all():
        return Fit(float(a), float(b), 0.0)
    if len(T) > 2 and (parabola := np.polyfit(T, y, 2))[0] > 0:  # a negative c would turn down somewhere
        c, b, a = parabola
        return Fit(float(a), float(b), float(c))
    return Fit(float(a), float(b), 0.0)


def _policy(plan: MemoryPlan, way: Way, remat: str, clock: Clock) -> Iterable[Number]:
    at = {"remat": remat}
    number = lambda quantity, value, unit, badge, more, **rest: Number(
        "memory", quantity, way.name, float(value), unit, badge, {**at, **more}, **rest
    )
    lengths = (*plan.lengths, plan.check)
    held = {}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # XLA compiles outside the interpreter's lock
        sizes = pool.map(lambda T: step_bytes(_config(plan, way, remat, T), way), lengths)
        for T, size in zip(lengths, sizes, strict=True):
            held[T] = size
            clock.report(len(held) / (len(lengths) + 1))
            note = "checks the fit" if plan.check == T else ""
            yield number("step_bytes", size, "B", "compiled", {"T": T}, note=note)
    line = fit(plan.lengths, [held[T] for T in plan.lengths])
    yield number(
        "fit_error",
        line(plan.check) / held[plan.check] - 1,
        "share",
        "predicted",
        {"T": plan.check},
        note="fitted over compiled, minus 1",
    )
    for T in (plan.lengths[0] * 2**i for i in range(12)):
        yield number("fitted_bytes", line(T), "B", "predicted", {"T": T})
    for name, chip in hardware.CHIPS.items():
        limit = USABLE * chip.hbm_bytes / chip.devices
        yield number(
            "longest_T",
            line.longest(limit),
            "tokens",
            "predicted",
            {"chip": name},
            note=f"within {USABLE:.0%} of one device's memory",
        )
        yield number(
            "largest_batch",
            line.largest_batch(plan.batch_at, limit),
            "sequences",
            "predicted",
            {"chip": name, "T": plan.batch_at},
        )
    yield from _parts(plan, way, remat, held[plan.check], number)


def _parts(plan: MemoryPlan, way: Way, remat: str, total: int, number: Callable[..., Number]) -> Iterable[Number]:
    """Yields the bytes of the step at the checked length, by part."""
    cfg = _config(plan, way, remat, plan.check)
    state = state_shapes(cfg)
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    attention = _layer_scratch(cfg, way)
    parts = {
        "parameters": size(state.params),
        "optimiser": size(state.opt_state),
        "gradients": size(state.params),
        "attention": attention,
    }
    rest = total - sum(parts.values())
    for name, value in {**parts, "activations": max(0, rest)}.items():
        note = {"attention": "scratch of one layer, compiled alone", "activations": "the rest of the step"}.get(
            name, ""
        )
        yield number(f"held_{name}", value, "B", "compiled", {"T": plan.check}, note=note)


def _layer_scratch(cfg: config.Config, way: Way) -> int:
    """Returns the scratch bytes of one mixer, forward and backward, at the config's shapes."""
    module = module_of(way.mixer)(way.mixer, cfg.model, way.context)
    x = jax.ShapeDtypeStruct(
        (cfg.data.B, cfg.data.T, cfg.model.E),
        np.dtype(cfg.model.dtype) if cfg.model.dtype == "float32" else jax.numpy.bfloat16,
    )
    params = jax.eval_shape(lambda: module.init(jax.random.key(0), jax.numpy.zeros((1, 1, cfg.model.E), x.dtype)))

    def both(params: Any, x: Any) -> Any:
        y, pull = jax.vjp(lambda p, x: module.apply(p, x)[0], params, x)
        return pull(y)

    return int(_compiled(jax.jit(both), params, x).temp_size_in_bytes)
