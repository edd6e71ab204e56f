"""A compiled program's schedule walked through at a chip's published rates: a bound on the time of a step.

Each instruction takes the longer of its products at the chip's peak and its bytes at the memory's bandwidth; a transfer
takes the links that it needs (of a TPU slice as `torus.py` says) for its bytes at their bandwidth. A synchronous
collective stops the chip. One that is started and awaited later is hidden behind what runs between: each link works for
one transfer at a time, first for the one that is awaited first, and where the wait comes too early the chip stands
still for the rest. Copies that are started ahead and those to and from the host's memory cost nothing here, so that it
stays a bound.

How long attention's kernels run does not stand in the program, for their lists of blocks are data: `walk` takes them
to run so long that all beside them is hidden, `bound` knows how long they take together at the least.

Everything real is slower: nothing reaches its peak, no link is without a pause, latencies are left out.
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

from longattn.aot import hlo
from longattn.aot.hlo import Computation, Instruction, Program
from longattn.cost.collective import Collective
from longattn.cost.torus import Torus

LINEAR = "linear_attention"  # in the scopes of all that linear attention computes and sends


@dataclass(frozen=True)
class Rates:
    """What one device can do per second at most."""

    flops: float  # bfloat16 products
    hbm: float  # bytes from and to its memory
    link: float  # bytes received from its node or pod
    network: float  # bytes received from another node
    node: int  # devices of a node, in the program's order
    torus: Torus | None = None  # of a TPU slice: its links take the place of `link` and `network`

    def times(self, collectives: Iterable[Collective]) -> dict[Collective, np.ndarray]:
        """The least seconds that each takes of each of a number of links, or sets of them: its own is the longest."""
        if self.torus is not None:
            return self.torus.times(collectives)
        return {what: np.array([self._switched(what)]) for what in collectives}

    def _switched(self, what: Collective) -> float:
        """Between nodes all devices of a node share what must come over the network."""
        n, nodes = len(what.group), len({device // self.node for device in what.group})
        if what.pairs:
            crossing = 1.0 if any(a // self.node != b // self.node for a, b in what.pairs) else 0.0
        elif what.kind in ("all-to-all", "ragged-all-to-all"):
            crossing = (n - n / nodes) / max(1, n - 1)
        else:
            crossing = (nodes - 1) / max(1, n - 1)
        return max(what.bytes / self.link, what.bytes * crossing / self.network)


class Sums(defaultdict[Any, float]):
    """Numbers by key, zero where there is none."""

    def __init__(self) -> None:
        super().__init__(float)

    def add(self, other: Sums, times: float) -> None:
        for key, n in other.items():
            self[key] += times * n


@dataclass
class Totals:
    """One device's step, or a part of it."""

    flops: float = 0.0  # of matrix products
    linear: float = 0.0  # of these, those of linear attention
    hbm_bytes: float = 0.0
    host_bytes: float = 0.0  # to the host's memory and back
    compute: float = 0.0  # seconds in which instructions run
    exposed: float = 0.0  # seconds in which the chip only waits for others
    busy: Any = 0.0  # seconds of each link, as `Rates.times` has them
    collectives: Sums = field(default_factory=Sums)  # runs of (which Collective, whether asynchronous)
    waits: Sums = field(default_factory=Sums)  # seconds of `exposed` due to each
    beside: Sums = field(default_factory=Sums)  # runs of each that were under way while attention was computed
    unknown: Sums = field(default_factory=Sums)  # runs of loops and kernels whose bound is data, by scope: not counted

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
    """Whether what was traced there belongs to a backward pass."""
    return "transpose(" in scope


def softmax(scope: str) -> bool:
    """Whether what was traced there is softmax attention."""
    return "attention" in scope and LINEAR not in scope


def walk(program: Program, rates: Rates) -> Totals:
    """The whole program's totals. Loops whose bound is data are left out and named; of branches the shortest counts."""
    return _Walk(program, rates, _times(program, rates), frozenset((False, True))).computation(program.entry)


def bound(program: Program, rates: Rates, totals: Totals, attention: Mapping[bool, float]) -> Totals:
    """The totals of `walk`, where waits are those of a step whose attention takes no longer than it must.

    Whatever runs longer adds to the step what it hides of transfers, or more. So a step takes at least the time of a
    walk in which some passes' attention hides nothing and takes no time, and the others' hides all, and their time
    added: the longest of these.

    Args:
      program: the program.
      rates: what its devices can do.
      totals: what `walk` says of them.
      attention: seconds of all attention of the (True: backward) passes at the least; not part of the totals.
    """
    times, more = _times(program, rates), sum(attention.values())
    longest, waits = totals.seconds + more, totals.waits
    for n in range(len(attention)):
        for hiding in map(frozenset, itertools.combinations(attention, n)):
            other = _Walk(program, rates, times, hiding).computation(program.entry)
            seconds = other.seconds + sum(attention[passed] for passed in hiding)
            if seconds > longest:
                longest, waits = seconds, other.waits
    exposed, seen = longest - more - totals.compute, sum(waits.values())
    # What that walk sees beyond it is what attention's time hides: of each in proportion.
    part = (exposed - totals.exposed) / (seen - totals.exposed) if seen > totals.exposed else 0.0
    blended = Sums()
    blended.add(totals.waits, 1 - part)
    blended.add(waits, part)
    return replace(totals, exposed=exposed, waits=blended)


def _times(program: Program, rates: Rates) -> dict[Collective, np.ndarray]:
    """Of all collectives of a program."""
    found = (
        hlo.collective(program, computation, instruction)
        for computation in program.computations.values()
        for instruction in computation.instructions
    )
    return rates.times(what for what in found if what is not None)


@dataclass(eq=False)
class _Sent:
    """A collective on its way."""

    name: str  # of the instruction that started it
    what: Collective
    left: np.ndarray  # seconds of each link's time
    due: float  # the place of the instruction that awaits it
    beside: bool = False  # whether attention was computed meanwhile


class _Walk:
    """`hiding`: the passes (True: backward) whose attention hides all that is beside it; others' takes no time."""

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
        totals, sent, due = Totals(), list[_Sent](), self._awaited(computation)
        for at, instruction in enumerate(computation.instructions):
            opcode = instruction.opcode
            if opcode == "while":
                runs = hlo.trips(self.program, computation, instruction)
                if runs is None:
                    totals.unknown[instruction.scope] += 1
                    self._hide(sent, self._unknown([instruction.scope]))
                    continue
                self._inner(self.program.computations[instruction.attribute("body")], totals, sent, runs)
            elif opcode == "custom-call" and "longattn_attention" in instruction.scope:  # its lists are data, too
                totals.unknown[instruction.scope] += 1
                totals.hbm_bytes += hlo.hbm_bytes(self.program, computation, instruction)
                self._hide(sent, self._unknown([instruction.scope]))
            elif opcode == "conditional":
                branches = self.program.branches(instruction)
                # Attention is charged by formula, that of the device which has most of it: it is at its kernel here.
                attending = [branch for branch in branches if self.computation(branch).unknown]
                self._inner(min(attending or branches, key=lambda b: self.computation(b).seconds), totals, sent)
            elif opcode == "call":
                self._inner(self.program.computations[instruction.attribute("to_apply")], totals, sent)
            else:
                self._one(computation, instruction, totals, sent, at, due)
        while sent:  # awaited outside of this computation, if at all: charged here
            self._wait(sent[0], totals, sent)
        return totals

    def _awaited(self, computation: Computation) -> dict[str, int]:
        """For each start of a collective the place of the instruction that awaits it."""
        under_way: list[tuple[str, str | None]] = []
        found: dict[str, int] = {}
        for at, instruction in enumerate(computation.instructions):
            role, _ = _role(self.program, computation, instruction)
            if role == "start":
                under_way.append((instruction.name, self._channel(instruction)))
            elif role == "done":
                names, channel = {name for name, _ in instruction.operands}, self._channel(instruction)
                start = next((s for s in under_way if s[0] in names or (channel and s[1] == channel)), None)
                if start is not None:
                    found[start[0]] = at
                    under_way.remove(start)
        return found

    def _inner(self, inner: Computation, totals: Totals, sent: list[_Sent], runs: int = 1) -> None:
        """A computation that runs so often; what is under way gets what it leaves of the links' time."""
        found = self.computation(inner)
        totals.add(found, runs)
        if runs:
            free = np.maximum(found.seconds - found.busy, 0.0)  # they may be busy beside what is not counted
            self._hide(sent, runs * (free + self._unknown(found.unknown)))

    def _unknown(self, scopes: Iterable[str]) -> float:
        """For how long what is not counted runs at the most."""
        counted = lambda scope: softmax(scope) and backward(scope) not in self.hiding
        return 0.0 if all(map(counted, scopes)) else math.inf

    def _one(
        self, computation: Computation, instruction: Instruction, totals: Totals, sent: list[_Sent], at: int,
        due: Mapping[str, int],
    ) -> None:  # fmt: skip
        role, what = _role(self.program, computation, instruction)
        if role == "done":
            for awaited in [s for s in sent if s.due == at]:
                self._wait(awaited, totals, sent)
            return
        if role in ("start", "whole"):
            times = self.times[what]
            totals.collectives[what, role == "start"] += 1
            totals.busy = totals.busy + times
            begun = _Sent(instruction.name, what, times, due.get(instruction.name, math.inf) if role == "start" else at)
            bisect.insort(sent, begun, key=lambda s: s.due)
            if role == "whole":
                self._wait(begun, totals, sent, asynchronous=False)
            return
        flops = hlo.flops(self.program, computation, instruction)
        moved = hlo.hbm_bytes(self.program, computation, instruction)
        offloaded = hlo.host_bytes(computation, instruction)
        ahead = offloaded or instruction.opcode in ("copy-start", "async-start")
        seconds = 0.0 if ahead else max(flops / self.rates.flops, moved / self.rates.hbm)
        totals.flops += flops
        totals.linear += flops * (LINEAR in instruction.scope)
        totals.hbm_bytes += moved
        totals.host_bytes += offloaded
        totals.compute += seconds
        self._hide(sent, seconds)

    @staticmethod
    def _hide(sent: list[_Sent], seconds: Any) -> None:
        """The links work while something runs, each for so long: attention, where it is not known how long."""
        for collective in sent:
            collective.beside |= bool(np.isinf(seconds).any())
            used = np.minimum(collective.left, seconds)
            collective.left = collective.left - used
            seconds = seconds - used

    def _wait(self, awaited: _Sent, totals: Totals, sent: list[_Sent], asynchronous: bool = True) -> None:
        """It is done before the chip goes on; what is due later goes on beside it."""
        seconds = float(awaited.left.max())
        totals.exposed += seconds
        totals.waits[awaited.what, asynchronous] += seconds
        self._hide(sent, seconds)
        totals.beside[awaited.what, asynchronous] += awaited.beside
        sent.remove(awaited)

    def _channel(self, instruction: Instruction) -> str | None:
        """The channel of the collective inside a fusion, by which its start and its end are known."""
        inner = self.program.called(instruction)
        return next((c for i in inner.instructions if (c := i.attribute("channel_id"))), None) if inner else None


def _role(program: Program, computation: Computation, instruction: Instruction) -> tuple[str, Collective | None]:
    """start, done or whole of a collective; else compute, which may carry one along."""
    opcode, name = instruction.opcode, instruction.name
    if opcode == "fusion" and name.startswith("async-collective-done"):
        return "done", None
    if opcode.endswith("-done") and opcode != "copy-done":
        return "done", None
    inner = program.called(instruction) if opcode == "fusion" else None
    if inner is not None and inner.name.startswith("async_collective_fusion"):
        return "compute", None
    what = hlo.collective(program, computation, instruction)
    if what is None:
        return "compute", None
    started = opcode.endswith("-start") or name.startswith("async-collective-start")
    return ("start" if started else "whole"), what
