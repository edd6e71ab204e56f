"""A compiled program's schedule walked through at a chip's published rates: a bound on the time of a step.

Each instruction takes the longer of its products at the chip's peak and its bytes at the memory's bandwidth; what a
device receives takes its bytes at the bandwidth of all its links. A synchronous collective stops the chip. One that is
started and awaited later is hidden behind what runs between: links work through what has been started in order, and
where the wait comes too early the chip stands still for the rest. Copies that are started ahead, those to and from the
host's memory, and what loops of unknown length take or leave of the transfers under way, cost nothing here, so that it
stays a bound.

Everything real is slower: nothing reaches its peak, links of a torus are rarely all in use, latencies are left out.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import Any

from longattn.analysis import hlo
from longattn.analysis.hlo import Collective, Computation, Instruction, Program

LINEAR = "linear_attention"  # in the scopes of all that linear attention computes and sends


@dataclass(frozen=True)
class Rates:
    """What one device can do per second at most."""

    flops: float  # bfloat16 products
    hbm: float  # bytes from and to its memory
    link: float  # bytes received from its node or pod
    network: float  # bytes received from another node
    node: int  # devices of a node, in the program's order

    def seconds(self, what: Collective) -> float:
        """The least time of a collective. Between nodes all devices of a node share what must come over the network."""
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
        self.collectives.add(other.collectives, times)
        self.waits.add(other.waits, times)
        self.beside.add(other.beside, times)
        self.unknown.add(other.unknown, times)

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed


def walk(program: Program, rates: Rates) -> Totals:
    """The whole program's totals. Loops whose bound is data are left out and named; of branches the shortest counts."""
    return _Walk(program, rates).computation(program.entry)


@dataclass
class _Sent:
    """A collective on its way."""

    name: str  # of the instruction that started it
    channel: str | None
    what: Collective
    left: float  # seconds of the links' time
    beside: bool = False  # whether attention was computed meanwhile


class _Walk:
    def __init__(self, program: Program, rates: Rates) -> None:
        self.program, self.rates = program, rates
        self.done: dict[str, Totals] = {}

    def computation(self, computation: Computation) -> Totals:
        if computation.name not in self.done:
            self.done[computation.name] = self._computation(computation)
        return self.done[computation.name]

    def _computation(self, computation: Computation) -> Totals:
        totals, sent = Totals(), deque[_Sent]()
        for instruction in computation.instructions:
            opcode = instruction.opcode
            if opcode == "while":
                runs = hlo.trips(self.program, computation, instruction)
                if runs is None:
                    totals.unknown[instruction.scope] += 1
                    self._hide(sent, math.inf)
                    continue
                inner = self.computation(self.program.computations[instruction.attribute("body")])
                totals.add(inner, runs)
                self._hide(sent, runs * inner.compute)
            elif opcode == "custom-call" and "longattn_attention" in instruction.scope:  # its lists are data, too
                totals.unknown[instruction.scope] += 1
                totals.hbm_bytes += hlo.hbm_bytes(self.program, computation, instruction)
                self._hide(sent, math.inf)
            elif opcode == "conditional":
                branches = list(map(self.computation, self.program.branches(instruction)))
                # Attention is charged by formula, that of the device which has most of it: it is at its kernel here.
                attending = [branch for branch in branches if branch.unknown]
                shortest = min(attending or branches, key=lambda t: t.seconds)
                totals.add(shortest)
                self._hide(sent, math.inf if attending else shortest.compute)
            elif opcode == "call":
                inner = self.computation(self.program.computations[instruction.attribute("to_apply")])
                totals.add(inner)
                self._hide(sent, inner.compute)
            else:
                self._one(computation, instruction, totals, sent)
        for left in sent:  # awaited outside of this computation, if at all: charged here
            totals.exposed += left.left
            totals.waits[left.what, True] += left.left
        return totals

    def _one(self, computation: Computation, instruction: Instruction, totals: Totals, sent: deque[_Sent]) -> None:
        role, what = _role(self.program, computation, instruction)
        if role == "start":
            totals.collectives[what, True] += 1
            sent.append(_Sent(instruction.name, self._channel(instruction), what, self.rates.seconds(what)))
            return
        if role == "done":
            self._wait(computation, instruction, totals, sent)
            return
        if role == "whole":
            totals.collectives[what, False] += 1
            totals.exposed += self.rates.seconds(what)
            totals.waits[what, False] += self.rates.seconds(what)
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
    def _hide(sent: deque[_Sent], seconds: float) -> None:
        """The links work while something runs: attention, where it is not known how long."""
        for collective in sent:
            collective.beside |= seconds == math.inf
            used = min(collective.left, seconds)
            collective.left -= used
            seconds -= used

    def _wait(self, computation: Computation, instruction: Instruction, totals: Totals, sent: deque[_Sent]) -> None:
        """What was started before and awaited here is done, and so is all that was started before it."""
        names, channel = {name for name, _ in instruction.operands}, self._channel(instruction)
        at = next((i for i, s in enumerate(sent) if s.name in names or (channel and s.channel == channel)), None)
        if at is None:
            return
        for collective in list(sent)[: at + 1]:
            totals.exposed += collective.left
            totals.waits[collective.what, True] += collective.left
            collective.left = 0.0
        totals.beside[sent[at].what, True] += sent[at].beside
        del sent[at]

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
