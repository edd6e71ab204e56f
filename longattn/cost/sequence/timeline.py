"""Time lines of one layer's attention over a machine: who computes, who waits, which messages are not hidden.

Events of P devices, one after the other as the programs have them: a pair takes its FLOPs at the rate stated, a message
its bytes at the bandwidth of the links that it crosses, and a latency. What is sent ahead travels while the device
computes; a device goes on when it has computed and holds what the next step needs. Nothing else costs time here
(memory, launches, the ends of kernels), and nothing is fitted to a measurement.

    ring        a hop starts with the computation of the one before; gradients follow one hop behind, in the same loop;
                the way home ends it
    balanced    what step t + 1 needs leaves when step t begins and what step t - 1 gave back is there; what step t
                gives back leaves at its end
    all_gather, ulysses    nothing overlaps
    usp         the ring between two exchanges

A TPU's neighbours are joined by single links: the sequence's axis (of usp, each of its two) is taken to be a closed
ring of them, a message to a device further off passes through those between, the shorter way, and all-gathers use both
directions. GPUs of a host hang on a switch; between hosts each has its adapter.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from longattn.cost.flops import attention_flops
from longattn.cost.sequence.load import load
from longattn.cost.sequence.problem import Problem, Way, entry
from longattn.cost.sequence.traffic import Message, Traffic, traffic
from longattn.cost.topology import Topology
from longattn.cost.torus import ways

LATENCY = 1e-6  # seconds: the order of one hop between chips; vendors publish none


@dataclass(frozen=True)
class Machine:
    """The rates of devices along the sequence."""

    flops: float  # FLOP/s of one device in attention
    link: float  # bytes/s of one link, in one direction; behind a switch of all of a device's links
    torus: bool  # links join neighbours; else a switch joins all devices of a node
    network: float  # bytes/s that one device sends to other nodes
    node: int  # devices of a node
    latency: float = LATENCY  # seconds of a message, for each link that it crosses


def machine(where: Topology, efficiency: float = 1.0, latency: float = LATENCY) -> Machine:
    """A topology's published rates; `efficiency`: the share of the peak that the attention kernels reach.

    Raises:
      ValueError: for an efficiency outside (0, 1], or a negative latency.
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"{efficiency=} must lie in (0, 1]: the share of the peak that attention reaches")
    if latency < 0:
        raise ValueError(f"{latency=} must not be negative: seconds")
    return Machine(
        where.peak_flops * efficiency, where.link_bandwidth / where.chip.links, where.chip.links > 1,
        where.network_bandwidth, where.node, latency,
    )  # fmt: skip


def seconds(messages: Sequence[Message], sizes: tuple[int, ...], machine: Machine) -> float:
    """Returns the seconds of messages sent at once between devices that stand along axes of these sizes."""
    messages = [m for m in messages if m.edges]
    if not messages:
        return 0.0
    kind = messages[0].kind
    if machine.torus and kind in ("all-gather", "reduce-scatter"):  # each shard is passed on, half of them each way
        n = sizes[-1]
        return machine.latency * (n // 2) + sum(m.bytes for m in messages) * (n - 1) / 2 / machine.link
    if machine.torus:
        return _through_links(tuple(messages), sizes, machine)
    sent, crossing = defaultdict(float), defaultdict(float)
    for m in messages:
        for a, b in m.edges:
            for end in (("from", a), ("to", b)):
                sent[end] += m.bytes
                crossing[end] += m.bytes * (a // machine.node != b // machine.node)
    # What all devices of a node gather enters it once, through all their adapters.
    shared = min(machine.node, sizes[-1]) if kind in ("all-gather", "reduce-scatter") else 1
    return machine.latency + max(max(sent.values()) / machine.link, max(crossing.values()) / shared / machine.network)


@functools.lru_cache(maxsize=1024)
def _through_links(messages: tuple[Message, ...], sizes: tuple[int, ...], machine: Machine) -> float:
    links: dict[tuple[int, ...], float] = defaultdict(float)
    furthest = 0
    for m in messages:
        for a, b in m.edges:
            (at, inner), (to, other) = divmod(a, sizes[-1]), divmod(b, sizes[-1])
            axis, start, end, n, beside = (1, inner, other, sizes[-1], at) if at == to else (0, at, to, sizes[0], inner)
            found = ways(start, end, n)
            for way, entered in found:
                furthest = max(furthest, len(entered))
                for place in entered:
                    links[axis, beside, place, way] += m.bytes / len(found)
    return machine.latency * furthest + max(links.values()) / machine.link


@dataclass(frozen=True)
class Pass:
    """Seconds of one pass over one layer."""

    total: float  # until the last device is done
    compute: float  # of a mean device
    imbalance: float  # until the last device would be done if messages took no time, without `compute`
    exposed: float  # what messages add

    @property
    def overhead(self) -> float:
        """Exposed messages over the time without them."""
        return self.exposed / (self.total - self.exposed)

    def __add__(self, other: Pass) -> Pass:
        return Pass(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: float) -> Pass:
        return Pass(*(times * a for a in vars(self).values()))


@dataclass(frozen=True, eq=False)
class _Run:
    """The inputs of a time line: seconds of every pair, and of every message."""

    computed: np.ndarray  # [steps P]
    sent: Traffic
    seconds: Callable[[Sequence[Message]], float]
    overlap: bool
    torus: bool
    busy: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # until when: (sending, receiving)

    def at(self, scope: str, step: int = 0) -> list[Message]:
        return [m for m in self.sent.messages if (m.scope, m.step) == (scope, step)]

    def arrival(self, leaves: np.ndarray, messages: Sequence[Message], channel: int) -> np.ndarray:
        """When what leaves at [P] arrives; 0 for those that get nothing.

        A device sends one message after the other, and receives so: on a torus of each `channel`, a direction.
        """
        out, into = self.busy.setdefault(channel if self.torus else 0, (np.zeros_like(leaves), np.zeros_like(leaves)))
        took, arrives = self.seconds(messages), np.zeros_like(leaves)
        for a, b in (edge for m in messages for edge in m.edges):
            arrives[b] = max(leaves[a], out[a], into[b]) + took
        for a, b in (edge for m in messages for edge in m.edges):
            out[a], into[b] = max(out[a], arrives[b]), arrives[b]
        return arrives

    def together(self, when: np.ndarray, messages: Sequence[Message]) -> np.ndarray:
        """When a collective that all wait for is done."""
        return np.full_like(when, when.max() + self.seconds(messages)) if messages else when


def simulate(problem: Problem, way: Way, machine: Machine, *, overlap: bool = True) -> tuple[Pass, Pass]:
    """(forward, backward) of one layer's attention, ids apart.

    Args:
      problem: the layer.
      way: the strategy, its layout and devices.
      machine: their rates.
      overlap: False: nothing is sent before the step at hand is computed, to see what overlapping is worth.

    Raises:
      ValueError, NotImplementedError: as `load`.
    """
    pairs = load(problem, way).pairs * problem.B
    line = entry(_LINES, way, "time line")
    flops = attention_flops(1, problem.H, problem.D, problem.values)
    found = []
    for backward, sent in enumerate(traffic(problem, way)):
        work = flops.backward + flops.recompute if backward else flops.forward
        computed = pairs * (work / machine.flops)
        took = functools.partial(seconds, sizes=way.sizes, machine=machine)
        times = [
            float(line(_Run(computed, sent, priced, overlap, machine.torus), bool(backward)).max())
            for priced in (took, lambda messages: 0.0)
        ]
        mean = float(computed.sum(0).mean())
        found.append(Pass(times[0], mean, times[1] - mean, times[0] - times[1]))
    return found[0], found[1]


def _ring(run: _Run, backward: bool, start: np.ndarray | None = None) -> np.ndarray:
    """When each device is done [P]."""
    P = run.computed.shape[1]
    start = np.zeros(P) if start is None else start
    hops = [run.at("hop", n) for n in range(1 + max((m.step for m in run.sent.messages), default=0))]
    routes = [route for route in hops if route]
    done = start + run.computed[0]
    leaves = start if run.overlap else done
    held = [run.arrival(leaves, route[:1], n) for n, route in enumerate(routes)]
    homes, step = [], 1
    for n, route in enumerate(routes):
        behind, home = run.at("behind", n), run.at("home", n)
        at = np.maximum(done, held[n])
        for hop in range(len(route)):
            end = at + run.computed[step]
            step += 1
            leaves = at if run.overlap else end
            arrives = [end]
            if hop + 1 < len(route):
                arrives.append(run.arrival(leaves, route[hop + 1 : hop + 2], n))
            if backward and hop:
                arrives.append(run.arrival(leaves, behind[hop - 1 : hop], n))
            at = functools.reduce(np.maximum, arrives)
        done = at
        homes.append(run.arrival(done, home, n) if backward else done)
    return functools.reduce(np.maximum, homes, done)


def _balanced(run: _Run, backward: bool) -> np.ndarray:
    P, steps = run.computed.shape[1], len(run.computed) - 1
    lend = lambda when, n: run.arrival(when, run.at("queries", n) + run.at("keys", n), 0)
    done = run.computed[0].copy()
    lent = lend(np.zeros(P) if run.overlap else done, 0)
    whole = done  # what earlier steps gave back is there, too
    for n in range(steps):
        at = np.maximum(done, lent)
        if not run.overlap:
            at = np.maximum(at, whole)
        done = at + run.computed[n + 1]
        lent = lend(np.maximum(at, whole) if run.overlap else done, n + 1)
        returned = run.at("gradients", n) if backward else run.at("results", n)
        whole = np.maximum(np.maximum(done, whole), run.arrival(done, returned, 1))
    return whole


def _gathered(run: _Run, backward: bool) -> np.ndarray:
    at = run.together(np.zeros(run.computed.shape[1]), run.at("gather")) + run.computed[0]
    return run.together(at, run.at("scatter"))


def _exchanged(run: _Run, backward: bool) -> np.ndarray:
    start = run.together(np.zeros(run.computed.shape[1]), run.at("exchange", 0))
    return run.together(_ring(run, backward, start), run.at("exchange", 1))


_LINES = {"ring": _ring, "balanced": _balanced, "all_gather": _gathered, "ulysses": _exchanged, "usp": _exchanged}
