"""Part 2, memory: the longest T and the largest batch that fit each chip, and the bytes of a training step on one.

Nothing runs and nothing is compiled. The numbers are `longattn plan --analytic`'s: formulas that were checked against
compilers. Ways whose memory no formula knows have none; `longattn plan` compiles them.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable
from typing import Any

from longattn import config
from longattn.cost import flops, hardware, step, topology
from longattn.plan import search
from longattn.study.presets import MemoryPlan
from longattn.study.store import Number, Store
from longattn.study.units import Unit
from longattn.study.ways import Way, trained

DRAWN = "v5e"  # the chip of the figure
CHIPS = (*hardware.TENSOR_CORES, *hardware.GPUS)
NOTE = "longattn plan --analytic: within one device's memory"


def units(plan: MemoryPlan, store: Store) -> list[Unit]:
    """Returns a unit per way and remat policy."""
    made = [Unit("memory/chips", lambda clock: _chips(plan), weight=0.05)]
    for remat in plan.remats:
        for way in trained(plan.windows, plan.without):  # the formulas are those of the default back ends
            work = lambda clock, w=way, r=remat: _policy(plan, w, r)
            made.append(Unit(f"memory/{way.name}/{remat}", work))
    return made


def _chips(plan: MemoryPlan) -> Iterable[Number]:
    for name in CHIPS:
        size = topology.one(name).hbm_bytes
        note = f"what a program can use; published: {hardware.CHIPS[name].source}"
        yield Number("memory", "chip_bytes", "", size, "B", "predicted", {"chip": name}, note=note)
    yield Number("memory", "parameters", "", flops.parameters(plan.model).total, "parameters", "predicted")


def _config(plan: MemoryPlan, way: Way, remat: Any, T: int, B: int = 1) -> config.Config:
    model = dataclasses.replace(plan.model, mixers=(way.mixer,), remat=remat)
    return config.Config(model=model, data=config.ByteLM(T=T, B=B))


def _policy(plan: MemoryPlan, way: Way, remat: str) -> Iterable[Number]:
    """Yields what fits each chip, and the bytes on the one that is drawn; nothing of a chip that no formula knows."""
    for name in CHIPS:
        with contextlib.suppress(NotImplementedError):
            yield from _fitting(plan, way, remat, name)


def _fitting(plan: MemoryPlan, way: Way, remat: str, chip: str) -> Iterable[Number]:
    """Yields the longest T and the largest batch on a chip by formula, and the bytes on the one that is drawn.

    Raises NotImplementedError for a way whose memory there no formula knows.
    """
    where = topology.one(chip)

    def number(quantity: str, value: float | None, unit: str, note: str = NOTE, **at: Any) -> Number:
        about = {"remat": remat, "chip": chip, **at}
        return Number("memory", quantity, way.name, float(value or 0), unit, "predicted", about, note=note)

    T = search.by_formula(lambda T: _config(plan, way, remat, T), where, plan.batch_at, search.TILE, search.LONGEST)
    yield number("longest_T", T, "tokens")
    most = search.LONGEST // plan.batch_at
    B = search.by_formula(lambda B: _config(plan, way, remat, plan.batch_at, B), where, 1, 1, most)
    yield number("largest_batch", B, "sequences", T=plan.batch_at)
    if chip == DRAWN:
        for T in plan.lengths:
            yield number("step_bytes", step.memory(_config(plan, way, remat, T), where)["total"], "B", "", T=T)
        for kind, size in step.memory(_config(plan, way, remat, plan.held_at), where).items():
            yield number(f"held_{kind}", size, "B", "", T=plan.held_at)
