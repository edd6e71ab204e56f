"""Part 2, memory: bytes of a training step against T, and the longest T and largest batch that fit each chip.

Nothing runs. What fits a chip is `longattn plan --analytic`'s answer: formulas that were checked against its compiler.
Ways that no formula knows have none; `longattn plan` compiles them. The bytes here are those of steps compiled for this
machine: on a CPU, bfloat16 products are computed, and partly kept, in float32.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from longattn import config
from longattn.cost import hardware, step, topology
from longattn.models import module_of
from longattn.plan import search
from longattn.study.presets import MemoryPlan
from longattn.study.store import Number, Store
from longattn.study.units import Clock, Unit
from longattn.study.ways import FIRST, Way, ways
from longattn.train.step import batch_shapes, state_shapes, train_step

DRAWN = "v5e"  # the chip of the figure


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


def _policy(plan: MemoryPlan, way: Way, remat: str, clock: Clock) -> Iterable[Number]:
    number = lambda quantity, value, unit, badge, more, **rest: Number(
        "memory", quantity, way.name, float(value), unit, badge, {"remat": remat, **more}, **rest
    )
    if way.implementation is None:  # the formulas are those of the default back ends
        with contextlib.suppress(NotImplementedError):  # a way whose memory no formula knows
            yield from _fitting(plan, way, remat, number)
    held = {}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:  # XLA compiles outside the interpreter's lock
        sizes = pool.map(lambda T: step_bytes(_config(plan, way, remat, T), way), plan.lengths)
        for T, size in zip(plan.lengths, sizes, strict=True):
            held[T] = size
            clock.report(len(held) / (len(plan.lengths) + 1))
            yield number("step_bytes", size, "B", "compiled", {"T": T})
    yield from _parts(plan, way, remat, held[plan.lengths[-1]], number)


def _fitting(plan: MemoryPlan, way: Way, remat: str, number: Callable[..., Number]) -> Iterable[Number]:
    """Yields the longest T and the largest batch of each chip, and the bytes on the one that is drawn, by formula."""
    note = "longattn plan --analytic: within one device's memory"
    for name in (*hardware.TENSOR_CORES, *hardware.GPUS):
        where = topology.one(name)
        T = search.by_formula(lambda T: _config(plan, way, remat, T), where, plan.batch_at, search.TILE, search.LONGEST)
        yield number("longest_T", T or 0, "tokens", "predicted", {"chip": name}, note=note)
        most = search.LONGEST // plan.batch_at
        B = search.by_formula(lambda B: _config(plan, way, remat, plan.batch_at, B), where, 1, 1, most)
        yield number("largest_batch", B or 0, "sequences", "predicted", {"chip": name, "T": plan.batch_at}, note=note)
        for T in (plan.lengths[0] * 2**i for i in range(8) if name == DRAWN):
            size = step.memory(_config(plan, way, remat, T), where)["total"]
            yield number("chip_step_bytes", size, "B", "predicted", {"chip": name, "T": T})


def _parts(plan: MemoryPlan, way: Way, remat: str, total: int, number: Callable[..., Number]) -> Iterable[Number]:
    """Yields the bytes of the step at the longest length, by part."""
    cfg = _config(plan, way, remat, plan.lengths[-1])
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
        yield number(f"held_{name}", value, "B", "compiled", {"T": plan.lengths[-1]}, note=note)


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
