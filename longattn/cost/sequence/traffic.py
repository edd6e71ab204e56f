"""Formulas of the bytes that devices along the sequence send each other in one layer's attention.

Per device with B rows, t = T / P tokens, c bytes of q's dtype, f = 4 of the statistics'. A shard of keys and values is
B t K (D + V) elements, kv below.

    ring        forward     c kv a hop, P - 1 hops or as many as the mask needs, in one direction or both
                backward    the same, and f kv a hop: one hop behind, the last one home
    balanced    forward     keys that are lent cost c kv, queries c B t H D and f B t H (V + 1) for what comes back
                backward    keys c kv and f kv; queries B t H (c (D + V) + 2 f) and f B t H D
    all_gather  forward     (P - 1) c kv
                backward    the same, and (P - 1) f kv (reduce-scatter)
    ulysses     forward     (P - 1) / P of c B t (H' (D + V) + K' (D + V)) + f B t H', for H' query and K' key/value
                            heads with those filled in or sent to several devices
                backward    (P - 1) / P of c B t H' (D + V) + 2 f B t H', and of dk and dv, B t K' (D + V) elements of
                            c bytes, or of f where a head went to several
    usp         ulysses on the second axis, and the ring's hops of T / P1 tokens and K' / P2 heads on the first

Segment ids and positions are whole on every device: where they are given, (P - 1) t 4 bytes a row of each are gathered
by whoever reads them first.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from longattn.cost.sequence.problem import Problem, Way, check, entry
from longattn.parallel import balanced, ring
from longattn.parallel.pairs import pairs
from longattn.parallel.strategy import Call
from longattn.parallel.ulysses import heads

STATISTICS = 4  # bytes: float32, and of float64 inputs 8, which nobody spreads
Edges = Iterable[tuple[int, int]]


@dataclass(frozen=True)
class Message:
    """One collective of the program: who sends how much to whom."""

    scope: str  # the named scope of the program
    kind: str  # "collective-permute", "all-gather", "reduce-scatter" or "all-to-all"
    edges: tuple[tuple[int, int], ...]  # (from, to)
    bytes: float  # on each edge
    step: int = 0  # of the balanced schedule; of the ring's routes; of what is exchanged, before (0) or after (1)


@dataclass(frozen=True)
class Traffic:
    """Messages of one pass over one layer on P devices."""

    P: int
    messages: tuple[Message, ...] = field(default=())

    def received(self, scope: str | None = None) -> np.ndarray:
        """Bytes that each device receives [P]; of one scope, or of all."""
        total = np.zeros(self.P)
        for m in self.messages:
            if scope in (None, m.scope):
                np.add.at(total, [to for _, to in m.edges], m.bytes)
        return total

    @property
    def most(self) -> float:
        """Bytes that a device receives at most."""
        return float(self.received().max(initial=0.0))

    @property
    def scopes(self) -> list[str]:
        return list(dict.fromkeys(m.scope for m in self.messages))


def everyone(groups: Iterable[Iterable[int]]) -> tuple[tuple[int, int], ...]:
    """Every device of a group to every other."""
    return tuple((a, b) for group in map(list, groups) for a in group for b in group if a != b)


def traffic(problem: Problem, way: Way) -> tuple[Traffic, Traffic]:
    """(forward, backward) messages of one layer.

    Raises:
      ValueError, NotImplementedError: as `problem.check`.
    """
    call = check(problem, way)
    passes = entry(_MESSAGES, way, "traffic")(problem, call)
    if problem.ids and call.P > 1:
        ids = 2 * problem.B * problem.T // call.P * 4  # positions and segment ids, of queries and keys alike
        passes[0].append(Message("ids", "all-gather", everyone([range(call.P)]), ids))
    return tuple(Traffic(call.P, tuple(messages)) for messages in passes)  # type: ignore[return-value]


def again(forward: Traffic, remat: str) -> Traffic:
    """Returns the bytes that the backward pass sends once more where a policy of `config.Model` rematerialises a layer.

    All of the forward pass under "full". The other policies that recompute keep out and lse, but not q, k and v as they
    were exchanged.
    """
    kept = {"none": (), "full": forward.messages}.get(remat)
    exchanged = tuple(m for m in forward.messages if (m.scope, m.step) == ("exchange", 0))
    return Traffic(forward.P, exchanged if kept is None else kept)


def _rings(n: int, each: int) -> list[list[int]]:
    """The devices of each ring of n, on a mesh of n x each."""
    return [[i * each + inner for i in range(n)] for inner in range(each)]


def _around(edges: Edges, rings: list[list[int]]) -> tuple[tuple[int, int], ...]:
    """Edges between places of a ring, in all rings."""
    edges = list(edges)
    return tuple((devices[a], devices[b]) for devices in rings for a, b in edges)


def hops(kv: float, problem: Problem, call: Call, rings: list[list[int]]) -> tuple[list[Message], list[Message]]:
    """The ring's messages for shards of `kv` elements of keys and values."""
    P = call.P
    needed = pairs(problem.mask, call, problem.T, problem.T).needed
    forward, behind = [], []
    for n, route in enumerate(ring.routes(needed)):
        edges = _around(route.edges(needed), rings)
        everybody = lambda shift: _around([(i, (i + shift) % P) for i in range(P)], rings)
        forward += [_permute("hop", edges, problem.itemsize * kv, n)] * route.hops
        behind += [_permute("behind", everybody(route.shift), STATISTICS * kv, n)] * (route.hops - 1)
        behind.append(_permute("home", everybody(-route.shift * route.hops), STATISTICS * kv, n))
    return forward, [*forward, *behind]


def _permute(scope: str, edges: Edges, bytes: float, step: int) -> Message:
    return Message(scope, "collective-permute", tuple(edges), bytes, step)


def _shard(problem: Problem, call: Call) -> float:
    """Elements of a device's keys and values."""
    return problem.B * problem.T / call.P * problem.heads * (problem.D + problem.values)


def _ring(problem: Problem, call: Call) -> tuple[list[Message], list[Message]]:
    return hops(_shard(problem, call), problem, call, _rings(call.P, 1))


def _balanced(problem: Problem, call: Call) -> tuple[list[Message], list[Message]]:
    c, f, kv = problem.itemsize, STATISTICS, _shard(problem, call)
    rows, D, V = problem.B * problem.T / call.P * problem.H, problem.D, problem.values
    forward, backward = [], []
    back = lambda edges: [(b, a) for a, b in edges]
    for n, step in enumerate(balanced.steps(pairs(problem.mask, call, problem.T, problem.T).needed)):
        if step.queries:
            forward.append(_permute("queries", step.queries, c * rows * D, n))
            forward.append(_permute("results", back(step.queries), f * rows * (V + 1), n))
            backward.append(_permute("queries", step.queries, rows * (c * (D + V) + 2 * f), n))
            backward.append(_permute("gradients", back(step.queries), f * rows * D, n))
        # A collective of no pairs is one all the same.
        forward.append(_permute("keys", step.keys, c * kv, n))
        backward.append(_permute("keys", step.keys, c * kv, n))
        backward.append(_permute("gradients", back(step.keys), f * kv, n))
    return forward, backward


def _all_gather(problem: Problem, call: Call) -> tuple[list[Message], list[Message]]:
    edges, kv = everyone([range(call.P)]), _shard(problem, call)
    gather, scatter = (
        Message("gather", "all-gather", edges, problem.itemsize * kv),
        Message("scatter", "reduce-scatter", edges, STATISTICS * kv),
    )
    return [gather], [gather, scatter]


def _heads(problem: Problem, call: Call) -> tuple[list[Message], list[Message]]:
    c, f, D, V = problem.itemsize, STATISTICS, problem.D, problem.values
    P, outer = call.sizes[-1], call.outer
    which = heads(problem.H, problem.heads, P)
    rings = call.P // P
    edges = everyone([range(r * P, r * P + P) for r in range(rings)])
    tokens = problem.B * problem.T / call.P / P  # what one device has for another
    queries, keys = which.each * P, len(which.keys)
    gradient = c if which.keys == tuple(range(problem.heads)) else f
    exchange = lambda bytes, step: Message("exchange", "all-to-all", edges, tokens * bytes, step)
    forward = [
        exchange(c * (queries * D + keys * (D + V)), 0),  # q, k, v
        exchange(queries * (c * V + f), 1),  # out, lse
    ]
    backward = [
        exchange(queries * (c * V + 2 * f), 0),  # dout, lse, dlse
        exchange(c * queries * D + gradient * keys * (D + V), 1),
    ]
    if len(call.sizes) > 1:
        kv = problem.B * problem.T / rings * (keys / P) * (D + V)
        onwards, back = hops(kv, problem, outer, _rings(rings, P))
        forward += onwards
        backward += back
    return forward, backward


_MESSAGES = {"ring": _ring, "balanced": _balanced, "all_gather": _all_gather, "ulysses": _heads, "usp": _heads}


def units(strategy: str, P: int, group: int = 1) -> tuple[float, float] | None:
    """(forward, backward) received per device in T H D elements, by the usual table: K = H / group, V = D, no hop home.

    Ring Attention (arXiv:2310.01889), DistFlashAttn (arXiv:2310.03294, means over the devices), all-gathered keys
    (arXiv:2407.21783) and DeepSpeed-Ulysses (arXiv:2309.14509), each with one number of bytes for every element. None:
    no such figure is published (usp).
    """
    kv, q = 2 * (P - 1) / P / group, (P - 1) / P
    return {
        "ring": (kv, 2 * kv),
        "balanced": ((kv + 2 * q) / 4, (kv + 2 * q) / 2),
        "all_gather": (kv, 2 * kv),
        "ulysses": ((2 + 2 / group) * q / P, (2 + 2 / group) * q / P),
    }.get(strategy)


DIFFERS = {  # from the usual figure
    "ring": "gradients of keys and values travel in float32, the way home included, and keys without use do not",
    "balanced": "the figure is a mean over devices, one of which has the busiest steps; for even P the last step lends "
    "keys alone; what helpers give back and all gradients are float32, and statistics go along with queries",
    "all_gather": "gradients of keys and values are scattered in float32",
    "ulysses": "heads that are filled in are sent too, and those that go to several devices, with float32 gradients; "
    "two statistics go along with each query",
    "usp": "there is no usual figure: its exchange is that of ulysses, its hops are the ring's",
}
