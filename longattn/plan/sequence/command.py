"""`longattn profile sequence [STRATEGY]`: load, bytes and time of one layer's attention spread over a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from rich.console import Console

from longattn import mask as masks
from longattn.aot import compilers
from longattn.aot.messages import measured
from longattn.config.checks import typed
from longattn.config.mesh import LayoutName
from longattn.cost import topology
from longattn.cost.sequence.load import load
from longattn.cost.sequence.problem import Problem, Way, ways
from longattn.cost.sequence.strategies import compare, recommended
from longattn.cost.sequence.timeline import LATENCY, machine, simulate
from longattn.cost.sequence.traffic import DIFFERS, traffic, units
from longattn.files import json_text
from longattn.mask import Causal, Mask
from longattn.parallel.attention import STRATEGIES
from longattn.plan.sequence import packing, show
from longattn.shapes import suggest

VERSION = 1
_WIDTH = 120
_TIMEOUT = 1800.0
_HELP = "all: compare the strategies; one of them: its schedule. " + "; ".join(
    f"{strategy.name}: {strategy.summary}" for strategy in STRATEGIES.values()
)


@dataclass(frozen=True)
class SequenceOptions:
    """Costs, by formula, one layer's attention sharded along the sequence over all devices of a machine."""

    strategy: str = field(default="all", metadata={"help": _HELP})
    layout: LayoutName = "contiguous"  # of the schedule that is shown
    topology: str = "v5e:2x4"  # the machine, as for `longattn plan`
    T: int = 131_072  # tokens of a sequence
    B: int = 1  # sequences
    H: int = 32  # query heads
    K: int = 8  # key/value heads
    D: int = 128  # size of a query/key head
    V: int | None = None  # size of a value head; none: D
    mask: Mask = Causal()  # without arrays
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"  # of q, k, v and out
    block: int = 1  # pairs are computed in squares of as many tokens, as kernels do; 1: those visible alone
    efficiency: float = 1.0  # share of the published peak that the attention kernels reach
    latency: float = LATENCY  # seconds of a message, for each link that it crosses
    packed: bool = False  # of ByteLM's packed documents (the standard library's sources): how their work lies
    measure: bool = False  # of one strategy, also count the bytes in its program, compiled for as many CPU devices
    json: bool = False  # print one JSON document instead of the tables

    def __post_init__(self) -> None:
        typed(self)
        if self.strategy not in (names := ("all", *STRATEGIES)):
            raise ValueError(f"strategy={self.strategy!r} must be a strategy, or all; {suggest(self.strategy, names)}")
        where = topology.parse(self.topology)
        machine(where, self.efficiency, self.latency)
        if where.size < 2:
            raise ValueError(f"topology={self.topology!r} has one device: nothing is spread over it")
        if self.measure and self.strategy == "all":
            raise ValueError("measure compiles the programs of one strategy: name it, such as profile sequence ring")
        if self.measure and self.dtype == "bfloat16":
            raise ValueError("measure needs --dtype float16 or float32: XLA for CPUs sends bfloat16 as float32")

    @property
    def problem(self) -> Problem:
        return Problem(
            T=self.T, H=self.H, K=self.K, D=self.D, V=self.V, B=self.B, dtype=self.dtype, mask=self.mask,
            block=self.block,
        )  # fmt: skip


def run(options: SequenceOptions, console: Console | None = None) -> dict[str, Any]:
    """Prints the tables (or the JSON document) and gives the document.

    Raises:
      ValueError, NotImplementedError: where the machine's devices do not divide T, or the strategy does not serve.
    """
    where = topology.parse(options.topology)
    document: dict[str, Any] = {
        "version": VERSION,
        "kind": "profile sequence",
        "topology": where.name,
        "devices": where.size,
        "problem": {**asdict(options.problem), "mask": str(options.mask)},
        "machine": asdict(machine(where, options.efficiency, options.latency)),
    }
    if options.strategy == "all":
        rows = compare({options.problem: 1}, where.size, machine(where, options.efficiency, options.latency))
        document |= {"rows": rows, "recommended": recommended(rows)}
    else:
        document["way"] = _one(options, where)
    if options.packed:
        document["packed"] = packing.table([options.T], [where.size], mask=options.mask)
        document["groups"] = packing.groups_table([options.T], [where.size], (1, 2, 4, 8))
    if options.json:
        print(json_text(document))
    else:
        show.tables(console or Console(width=max(_WIDTH, Console().width)), document)
    return document


def _one(options: SequenceOptions, where: topology.Topology) -> dict[str, Any]:
    """One way's schedule, messages and time."""
    problem, P = options.problem, where.size
    candidates = [way for way in ways(P, options.K) if way.strategy == options.strategy]
    if not candidates:
        raise ValueError(
            f"{P} devices cannot be divided into a ring and an all-to-all of at least two each for {options.strategy}"
        )
    way = Way(options.strategy, options.layout, candidates[0].sizes)
    found, passes = load(problem, way), traffic(problem, way)
    counted = _measured(options, way) if options.measure else None
    usual = units(way.strategy, P, options.H // options.K)
    element = problem.B * problem.T * problem.H * problem.D * problem.itemsize
    messages = [
        {
            "pass": name, "scope": scope, "messages": sum(m.scope == scope for m in sent.messages),
            "most": float(sent.received(scope).max()), "mean": float(sent.received(scope).mean()),
            **({"measured": max(counted[name].get(scope, [0.0]))} if counted else {}),
        }
        for name, sent in zip(("forward", "backward"), passes, strict=True)
        for scope in sent.scopes
    ]  # fmt: skip
    times = simulate(problem, way, machine(where, options.efficiency, options.latency))
    return {
        "strategy": way.strategy, "layout": way.layout, "sizes": list(way.sizes), "name": str(way),
        "queries": found.queries.tolist(), "keys": found.keys.tolist(), "pairs": found.pairs.tolist(),
        "helps": found.helps.tolist(), "idle_slots": found.idle_slots, "idle": found.idle_share,
        "critical": found.critical, "messages": messages,
        "units": {
            name: {"most": sent.most / element, "mean": float(sent.received().mean()) / element,
                   "usual": usual[i] if usual else None}
            for i, (name, sent) in enumerate(zip(("forward", "backward"), passes, strict=True))
        },
        "differs": DIFFERS.get(way.strategy, "there is no usual figure"),
        "seconds": {name: asdict(took) for name, took in zip(("forward", "backward"), times, strict=True)},
    }  # fmt: skip


def _measured(options: SequenceOptions, way: Way) -> dict[str, dict[str, list[float]]]:
    request = {
        "problem": {**asdict(options.problem), "mask": str(options.mask)},
        "way": {"strategy": way.strategy, "layout": way.layout, "sizes": list(way.sizes)},
    }
    answer = compilers.call("longattn.plan.sequence.command:count", request, {"JAX_PLATFORMS": "cpu"}, _TIMEOUT)
    if "reason" in answer:
        raise ValueError(answer["reason"])
    return answer


def count(request: Mapping[str, Any]) -> dict[str, Any]:
    """The child of `--measure`, which has as many CPU devices as it takes: bytes by pass, scope and device."""
    import jax

    way = Way(**{**request["way"], "sizes": tuple(request["way"]["sizes"])})
    jax.config.update("jax_num_cpu_devices", way.P)
    problem = Problem(**{**request["problem"], "mask": masks.parse(request["problem"]["mask"])})
    passes = measured(problem, way)
    return {
        name: {scope: np.asarray(bytes).tolist() for scope, bytes in found.items()}
        for name, found in zip(("forward", "backward"), passes, strict=True)
    }
