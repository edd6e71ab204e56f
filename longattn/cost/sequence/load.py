"""Which device computes which pair of devices' queries and keys at which step, and how many pairs the mask shows there.

Built from what the strategies themselves walk along: `pairs`, `routes`, `steps`, `heads`. Nothing here is fitted or
simulated. Work is counted in visible (query, key) pairs of a mean head: of ulysses and usp a device has few heads and
many pairs of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longattn.cost.pairs import pairs_between
from longattn.cost.sequence.problem import Problem, Way, check, entry
from longattn.mask import EMPTY, Mask
from longattn.parallel import balanced, ring
from longattn.parallel.layout import SequenceLayout
from longattn.parallel.pairs import pairs
from longattn.parallel.strategy import Call
from longattn.parallel.ulysses import heads

ALL = -1  # in the place of a device: of all of them


def visible(mask: Mask, layout: SequenceLayout, T: int, P: int) -> np.ndarray:
    """int64 [P P]: the visible pairs of device i's queries and device j's keys, of T tokens in the layout.

    Raises:
      NotImplementedError, ValueError: as `pairs.pairs_between`.
    """
    step = P if layout.name == "striped" else 1
    tokens = [[range(a, b + 1, step) for a, b in layout.runs(i, T, P)] for i in range(P)]
    count = lambda i, j: sum(pairs_between(mask, q, k) for q in tokens[i] for k in tokens[j])
    return np.array([[count(i, j) for j in range(P)] for i in range(P)], np.int64)


def computed(mask: Mask, layout: SequenceLayout, T: int, P: int, block: int) -> np.ndarray:
    """int64 [P P]: as `visible`, but all pairs of those squares of `block` x `block` tokens that may show one.

    Raises:
      ValueError: where `block` does not divide a device's pieces of the sequence.
    """
    step = P if layout.name == "striped" else 1
    tiles = []  # of each device, (first, last) positions
    for device in range(P):
        runs = layout.runs(device, T, P)
        if (n := len(range(runs[0][0], runs[0][1] + 1, step))) % block:
            raise ValueError(f"{block=} must divide {n}, the tokens of a piece of the {layout.name} layout")
        starts = np.concatenate([np.arange(a, b + 1, step * block) for a, b in runs]).astype(np.int32)
        tiles.append((starts, starts + np.int32(step * (block - 1))))
    count = lambda q, k: (mask.kind(q[0][:, None], q[1][:, None], k[0][None], k[1][None]) != EMPTY).sum()
    return np.array([[count(q, k) for k in tiles] for q in tiles], np.int64) * block**2


@dataclass(frozen=True, eq=False)
class Load:
    """The schedule of one layer's attention on P devices: arrays of [steps P]."""

    queries: np.ndarray  # whose queries the device computes with; ALL: of all
    keys: np.ndarray  # whose keys
    pairs: np.ndarray  # float64: visible pairs of a mean head, or of squares those that are computed
    helps: np.ndarray  # bool: the queries are another device's

    @property
    def idle(self) -> np.ndarray:
        """bool [steps P]: nothing to compute."""
        return self.pairs == 0

    @property
    def idle_slots(self) -> float:
        """Share of (step, device) without work, whatever the others' work is."""
        return float(self.idle.mean())

    @property
    def critical(self) -> float:
        """Pairs on the critical path, where all devices wait for the slowest at each step."""
        return float(self.pairs.max(1).sum())

    @property
    def idle_share(self) -> float:
        """Share of the devices' time spent waiting for the slowest at each step, a visible pair taking as long as
        another.
        """
        return 1.0 - float(self.pairs.sum()) / (self.pairs.shape[1] * self.critical) if self.critical else 0.0

    @property
    def imbalance(self) -> float:
        """Pairs of the device that has most, over the mean."""
        return float(self.pairs.sum(0).max() / self.pairs.sum(0).mean()) if self.critical else 1.0


def load(problem: Problem, way: Way) -> Load:
    """The schedule of a strategy over a layout.

    Raises:
      ValueError, NotImplementedError: as `problem.check` and `pairs.pairs_between`.
    """
    call = check(problem, way)
    schedule = entry(_SCHEDULES, way, "load")
    where = problem.mask, call.layout, problem.T, call.shards
    seen = visible(*where) if problem.block == 1 else computed(*where, problem.block)
    return schedule(problem, call, seen)


def _ring(problem: Problem, call: Call, seen: np.ndarray) -> Load:
    needed, i = _needed(problem, call), np.arange(call.P)
    at = [(i, i)]
    for route in ring.routes(needed):
        at += [(i, (i - route.distance(hop, call.P)) % call.P) for hop in range(1, route.hops + 1)]
    return _stepwise(at, needed, seen)


def _balanced(problem: Problem, call: Call, seen: np.ndarray) -> Load:
    needed, i = _needed(problem, call), np.arange(call.P)
    return _stepwise([(i, i), *(step.at(i) for step in balanced.steps(needed))], needed, seen)


def _needed(problem: Problem, call: Call) -> np.ndarray:
    return pairs(problem.mask, call, problem.T, problem.T).needed


def _stepwise(at: list[tuple[np.ndarray, np.ndarray]], needed: np.ndarray, seen: np.ndarray) -> Load:
    """The load of a schedule that lists each device's pair (queries of, keys of) at every step."""
    queries, keys = (np.stack(x) for x in zip(*at, strict=True))
    found = np.where(needed[queries, keys], seen[queries, keys], 0.0)
    return Load(queries, keys, found, queries != np.arange(len(needed))[None])


def _all_gather(problem: Problem, call: Call, seen: np.ndarray) -> Load:
    rows = np.arange(call.P)[None]
    return Load(rows, np.full_like(rows, ALL), seen.sum(1)[None].astype(np.float64), np.zeros_like(rows, bool))


def _ulysses(problem: Problem, call: Call, seen: np.ndarray) -> Load:
    whole = np.full((1, call.P), ALL)
    return Load(whole, whole, np.full(whole.shape, _share(problem, call) * seen.sum()), np.zeros_like(whole, bool))


def _usp(problem: Problem, call: Call, seen: np.ndarray) -> Load:
    found, each = _ring(problem, call.outer, seen * _share(problem, call)), call.sizes[-1]
    return Load(*(np.repeat(x, each, 1) for x in (found.queries, found.keys, found.pairs, found.helps)))


def _share(problem: Problem, call: Call) -> float:
    """The share of the heads, those filled in too, that a device on the axis of the all-to-all has."""
    return heads(problem.H, problem.heads, call.sizes[-1]).each / problem.H


_SCHEDULES = {"ring": _ring, "balanced": _balanced, "all_gather": _all_gather, "ulysses": _ulysses, "usp": _usp}
