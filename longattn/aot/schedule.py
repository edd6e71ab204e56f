"""Walks through a compiled program's schedule at published rates, for a lower bound on the time of a step.

Each instruction takes the longer of its products at the chip's peak and its bytes at HBM's bandwidth. A transfer
occupies its links (in a TPU slice, those that `torus.py` finds) for its bytes at their bandwidth. A synchronous
collective stops the chip. An asynchronous one overlaps with what runs between its start and its wait. A link serves one
transfer at a time, the one awaited first; if the wait comes too early, the chip idles for the rest. Prefetched copies
and copies to and from the host cost nothing here, which keeps the result a lower bound.

The program does not say how long attention's kernels run, because their lists of blocks are data. `walk` assumes that
they hide everything beside them; `bound` is given their least total time.

Real steps are slower: nothing reaches its peak, links pause, and latencies are left out.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from longattn.aot import collectives, instructions
from longattn.aot.hlo import Computation, Instruction, Program
from longattn.cost.collective import Collective
from longattn.cost.torus import Torus

LINEAR = "linear_attention"  # part of every scope of linear attention


@dataclass(frozen=True)
class Rates:
    """Peak rates of one device, per second."""

    flops: float  # bfloat16 products
    hbm: float  # bytes from and to its memory
    link: float  # bytes received from its node or pod
    network: float  # bytes received from another node
    node: int  # devices of a node, in the program's order
    torus: Torus | None = None  # links of a TPU slice, which replace `link` and `network`

    def times(self, collectives: Iterable[Collective]) -> dict[Collective, np.ndarray]:
        """Returns the least seconds for which each collective occupies each link (or set); its time is the longest."""
        if self.torus is not None:
            return self.torus.times(collectives)
        return {what: np.array([self._switched(what)]) for what in collectives}

    def _switched(self, what: Collective) -> float:
        """Returns the seconds over switches: the devices of a node share the bytes that cross the network."""
        n, nodes = len(what.group), len({device // self.node for device in what.group})
        if what.pairs:
            crossing = 1.0 if any(a // self.node != b // self.node for a, b in what.pairs) else 0.0
        elif what.kind in ("all-to-all", "ragged-all-to-all"):
            crossing = (n - n / nodes) / max(1, n - 1)
        else:
            crossing = (nodes - 1) / max(1, n - 1)
        return max(what.bytes / self.link, what.bytes * crossing / self.network)


class Sums(defaultdict[Any, float]):
    """Numbers by key; missing keys are zero."""

    def __init__(self) -> None:
        super().__init__(float)

    def add(self, other: Sums, times: float) -> None:
        for key, n in other.items():
            self[key] += times * n


@dataclass
class Totals:
    """Totals of a step, or of a part of it, on one device."""

    flops: float = 0.0  # of matrix products
    linear: float = 0.0  # FLOPs of linear attention among them
    hbm_bytes: float = 0.0
    host_bytes: float = 0.0  # to the host's memory and back
    compute: float = 0.0  # seconds in which instructions run
    exposed: float = 0.0  # seconds in which the chip only waits for messages
    busy: Any = 0.0  # seconds of each link, as in `Rates.times`
    collectives: Sums = field(default_factory=Sums)  # runs of each (Collective, whether asynchronous)
    waits: Sums = field(default_factory=Sums)  # seconds of `exposed` due to each
    beside: Sums = field(default_factory=Sums)  # runs of each that overlapped with attention
    unknown: Sums = field(default_factory=Sums)  # uncounted runs of loops and kernels, by scope: their bounds are data
    missing: list[str] = field(default_factory=list)  # names of collectives in places that the walk does not reach

    def add(self, other: Totals, times: float = 1.0) -> None:
        self.flops += times * other.flops
        self.linear += times * other.linear
        self.hbm_bytes += times * other.hbm_bytes
        self.host_bytes += times * other.host_bytes
        self.compute += times * other.compute
        self.exposed += times * other.exposed
        self.busy = self.busy + times * other.busy
        self.collectives.add(other.collectives, times)
        self.waits.add(other.waits, times)
        self.beside.add(other.beside, times)
        self.unknown.add(other.unknown, times)

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


def backward(scope: str) -> bool:
    """Returns whether a scope belongs to a backward pass."""
    return "transpose(" in scope


def softmax(scope: str) -> bool:
    """Returns whether a scope belongs to softmax attention."""
    return "attention" in scope and LINEAR not in scope


def walk(program: Program, rates: Rates) -> Totals:
    """Returns the program's totals. Names loops with data-dependent bounds, without counting them.

    Of the branches of a conditional the shortest counts.
    """
    walk = _Walk(program, rates, _times(program, rates), frozenset((False, True)))
    totals = walk.computation(program.entry)
    return replace(totals, missing=collectives.missing(program, (program.computations[name] for name in walk.done)))


def bound(program: Program, rates: Rates, totals: Totals, attention: Mapping[bool, float]) -> Totals:
    """Returns the totals of `walk` with the waits of a step whose attention takes its least time.

    Attention that runs longer lengthens the step by at least what it hides. So each choice of passes gives a bound: the
    attention of these passes hides everything and adds its time, that of the others hides nothing and takes no time.
    The largest of these bounds holds.

    Args:
      program: the program.
      rates: peak rates of its devices.
      totals: the result of `walk`.
      attention: least seconds of attention in the forward (False) and backward (True) passes; not part of the totals.
    """
    times, attention_seconds = _times(program, rates), sum(attention.values())
    longest, waits = totals.seconds + attention_seconds, totals.waits
    for n in range(len(attention)):
        for hiding in map(frozenset, itertools.combinations(attention, n)):
            candidate = _Walk(program, rates, times, hiding).computation(program.entry)
            seconds = candidate.seconds + sum(attention[passed] for passed in hiding)
            if seconds > longest:
                longest, waits = seconds, candidate.waits
    exposed, waited = longest - attention_seconds - totals.compute, sum(waits.values())
    # That walk waits longer than `exposed`: attention hides the rest, in proportion of every wait.
    part = (exposed - totals.exposed) / (waited - totals.exposed) if waited > totals.exposed else 0.0
    blended = Sums()
    blended.add(totals.waits, 1 - part)
    blended.add(waits, part)
    return replace(totals, exposed=exposed, waits=blended)


def _times(program: Program, rates: Rates) -> dict[Collective, np.ndarray]:
    """Returns `Rates.times` of all collectives of a program."""
    found = (
        collectives.collective(program, computation, instruction)
        for computation in program.computations.values()
        for instruction in computation.instructions
    )
    return rates.times(what for what in found if what is not None)


@dataclass(eq=False)
class _InFlight:
    """A collective that was started and not yet awaited."""

    name: str  # name of the instruction that started it
    what: Collective
    left: np.ndarray  # seconds of each link that it still needs
    due: float  # index of the instruction that awaits it
    beside: bool = False  # whether attention was computed meanwhile


class _Walk:
    """Walks through computations, each once.

    `hiding` are the passes (True: backward) whose attention hides everything beside it; other attention takes no time.
    """

    def __init__(
        self, program: Program, rates: Rates, times: Mapping[Collective, np.ndarray], hiding: frozenset[bool]
    ) -> None:
        self.program, self.rates, self.times, self.hiding = program, rates, times, hiding
        self.done: dict[str, Totals] = {}

    def computation(self, computation: Computation) -> Totals:
        if computation.name not in self.done:
            self.done[computation.name] = self._computation(computation)
        return self.done[computation.name]

    def _computation(self, computation: Computation) -> Totals:
        totals, in_flight, due = Totals(), list[_InFlight](), self._awaited(computation)
        for at, instruction in enumerate(computation.instructions):
            opcode = instruction.opcode
            if opcode == "while":
                runs = instructions.trips(self.program, computation, instruction)
                if runs is None:
                    totals.unknown[instruction.scope] += 1
                    self._hide(in_flight, self._unknown([instruction.scope]))
                    continue
                self._inner(self.program.computations[instruction.required("body")], totals, in_flight, runs)
            elif opcode == "custom-call" and "longattn_attention" in instruction.scope:  # its lists are data too
                totals.unknown[instruction.scope] += 1
                totals.hbm_bytes += instructions.hbm_bytes(self.program, computation, instruction)
                self._hide(in_flight, self._unknown([instruction.scope]))
            elif opcode == "conditional":
                branches = self.program.branches(instruction)
                # A formula counts the attention of the device that has most: take the branch with its kernel.
                attending = [branch for branch in branches if self.computation(branch).unknown]
                self._inner(min(attending or branches, key=lambda b: self.computation(b).seconds), totals, in_flight)
            elif opcode == "call":
                self._inner(self.program.computations[instruction.required("to_apply")], totals, in_flight)
            else:
                self._one(computation, instruction, totals, in_flight, at, due)
        while in_flight:  # awaited outside of this computation, if at all: counted here
            self._wait(in_flight[0], totals, in_flight)
        return totals

    def _awaited(self, computation: Computation) -> dict[str, int]:
        """Returns, for each start of a collective, the index of the instruction that awaits it."""
        under_way: list[tuple[str, str | None]] = []
        found: dict[str, int] = {}
        started: dict[str, str] = {}  # the start that each start or update stands for
        for at, instruction in enumerate(computation.instructions):
            role, _ = _role(self.program, computation, instruction)
            if role == "start":
                under_way.append((instruction.name, self._channel(instruction)))
                started[instruction.name] = instruction.name
            elif role == "update":  # stands for the start that it continues
                name, _ = instruction.operands[0]
                started[instruction.name] = started.get(name, name)
            elif role == "done":
                names = {started.get(name, name) for name, _ in instruction.operands}
                channel = self._channel(instruction)
                start = next((s for s in under_way if s[0] in names or (channel and s[1] == channel)), None)
                if start is not None:
                    found[start[0]] = at
                    under_way.remove(start)
        return found

    def _inner(self, inner: Computation, totals: Totals, in_flight: list[_InFlight], runs: int = 1) -> None:
        """Adds a computation that runs `runs` times; collectives in flight use the links' time that it leaves free."""
        found = self.computation(inner)
        totals.add(found, runs)
        if runs:
            free = np.maximum(found.seconds - found.busy, 0.0)  # links may be busy beside attention that is not counted
            self._hide(in_flight, runs * (free + self._unknown(found.unknown)))

    def _unknown(self, scopes: Iterable[str]) -> float:
        """Returns an upper bound on the seconds of what is not counted."""
        counted = lambda scope: softmax(scope) and backward(scope) not in self.hiding
        return 0.0 if all(map(counted, scopes)) else math.inf

    def _one(
        self, computation: Computation, instruction: Instruction, totals: Totals, in_flight: list[_InFlight], at: int,
        due: Mapping[str, int],
    ) -> None:  # fmt: skip
        role, what = _role(self.program, computation, instruction)
        if role == "done":
            for awaited in [s for s in in_flight if s.due == at]:
                self._wait(awaited, totals, in_flight)
            return
        if what is not None:  # the role is "start" or "whole"
            times = self.times[what]
            totals.collectives[what, role == "start"] += 1
            totals.busy = totals.busy + times
            begun = _InFlight(
                instruction.name, what, times, due.get(instruction.name, math.inf) if role == "start" else at
            )
            bisect.insort(in_flight, begun, key=lambda s: s.due)
            if role == "whole":
                self._wait(begun, totals, in_flight, asynchronous=False)
            return
        flops = instructions.flops(self.program, computation, instruction)
        moved = instructions.hbm_bytes(self.program, computation, instruction)
        offloaded = instructions.host_bytes(computation, instruction)
        ahead = offloaded or instruction.opcode in ("copy-start", "async-start", "call-start")
        seconds = 0.0 if ahead else max(flops / self.rates.flops, moved / self.rates.hbm)
        totals.flops += flops
        totals.linear += flops * (LINEAR in instruction.scope)
        totals.hbm_bytes += moved
        totals.host_bytes += offloaded
        totals.compute += seconds
        self._hide(in_flight, seconds)

    @staticmethod
    def _hide(in_flight: list[_InFlight], seconds: Any) -> None:
        """Lets each link work for `seconds`, which are infinite beside attention of unknown length."""
        for collective in in_flight:
            collective.beside |= bool(np.isinf(seconds).any())
            used = np.minimum(collective.left, seconds)
            collective.left = collective.left - used
            seconds = seconds - used

    def _wait(self, awaited: _InFlight, totals: Totals, in_flight: list[_InFlight], asynchronous: bool = True) -> None:
        """Waits for a collective; those that are due later proceed meanwhile."""
        seconds = float(awaited.left.max())
        totals.exposed += seconds
        totals.waits[awaited.what, asynchronous] += seconds
        self._hide(in_flight, seconds)
        totals.beside[awaited.what, asynchronous] += awaited.beside
        in_flight.remove(awaited)

    def _channel(self, instruction: Instruction) -> str | None:
        """Returns the channel of the collective inside a fusion, which pairs its start with its end."""
        inner = self.program.called(instruction)
        return next((c for i in inner.instructions if (c := i.attribute("channel_id"))), None) if inner else None


def _role(program: Program, computation: Computation, instruction: Instruction) -> tuple[str, Collective | None]:
    """Returns an instruction's role in a collective: "start", "update", "done" or "whole"; else "compute"."""
    opcode, name = instruction.opcode, instruction.name
    if opcode == "fusion" and name.startswith("async-collective-done"):
        return "done", None
    if opcode.endswith("-done") and opcode != "copy-done":
        return "done", None
    if opcode.endswith("-update"):
        return "update", None
    inner = program.called(instruction) if opcode == "fusion" else None
    if inner is not None and inner.name.startswith("async_collective_fusion"):
        return "compute", None
    what = collectives.collective(program, computation, instruction)
    if what is None:
        return "compute", None
    started = opcode.endswith("-start") or name.startswith("async-collective-start")
    return ("start" if started else "whole"), what
