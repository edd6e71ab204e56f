"""Part 4, over devices: the cost of sharding attention along the sequence, counted from the strategies' schedules.

Nothing runs: see `longattn.cost.sequence` and `longattn profile sequence`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from longattn.cost import topology
from longattn.cost.sequence.load import load
from longattn.cost.sequence.problem import Problem, Way
from longattn.cost.sequence.strategies import compare
from longattn.cost.sequence.timeline import machine
from longattn.study.presets import SequencePlan
from longattn.study.store import Number, Store
from longattn.study.units import Clock, Unit


def units(plan: SequencePlan, store: Store) -> list[Unit]:
    """Returns a single unit, which takes a second."""
    return [Unit("sequence/ways", lambda clock: _numbers(plan, clock), always=True)]


def _numbers(plan: SequencePlan, clock: Clock) -> Iterable[Number]:
    problem = Problem(T=plan.T, H=plan.H, K=plan.K, D=plan.D)
    note = f"by formula: T = {plan.T:,}, {plan.H} heads, {plan.K} of keys, D = {plan.D}, bfloat16, causal"
    for i, name in enumerate(plan.machines):
        where = topology.parse(name)
        command = f"longattn profile sequence --topology {name} --T {plan.T} --H {plan.H} --K {plan.K} --D {plan.D}"
        number = functools.partial(Number, "sequence", way="", badge="predicted", note=note, command=command)
        for row in compare({problem: 1}, where.size, machine(where)):
            way = Way(row["strategy"], row["layout"], tuple(row["sizes"]))
            at = {"strategy": way.strategy, "layout": way.layout, "P": way.P}
            if i == 0:  # the same on every machine
                found = load(problem, way)
                pairs, helps = (tuple(map(float, x.reshape(-1))) for x in (found.pairs, found.helps))  # [steps P]
                yield number(quantity="idle", value=row["idle"], unit="share", at=at, samples=pairs)
                yield number(quantity="lent", value=float(found.helps.mean()), unit="share", at=at, samples=helps)
                for passed, size in row["received"].items():
                    yield number(quantity=f"received_{passed}", value=size, unit="B", at=at)
            for quantity in ("total", "exposed"):
                at_machine = {**at, "machine": name}
                yield number(quantity=quantity, value=row["seconds"][quantity], unit="s", at=at_machine)
