"""Which device computes which pair of devices' queries and keys at which step, and how many pairs the mask shows there.

Built from what the strategies themselves walk along: `pairs`, `routes`, `steps`, `heads`. Nothing here is fitted or
simulated. Work is counted in visible (query, key) pairs of a mean head: of ulysses and usp a device has few heads and
many pairs of each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from longattn.cost.pairs import pairs_between
from longattn.cost.sequence.problem import Problem, Way, check
from longattn.mask import EMPTY, Mask
from longattn.parallel import balanced, ring
from longattn.parallel.exchange import heads
from longattn.parallel.layout import SequenceLayout
from longattn.parallel.pairs import pairs

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
    outer = call.outer
    where = problem.mask, call.layout, problem.T, outer.devices
    seen = visible(*where) if problem.block == 1 else computed(*where, problem.block)
    if way.strategy == "all_gather":
        rows = np.arange(call.devices)[None]
        return Load(rows, np.full_like(rows, ALL), seen.sum(1)[None].astype(np.float64), np.zeros_like(rows, bool))
    share = 1.0
    if way.strategy in ("ulysses", "usp"):  # each device of the all-to-all has its heads, those filled in too
        share = heads(problem.H, problem.K, call.sizes[-1]).each / problem.H
    if way.strategy == "ulysses":
        whole = np.full((1, call.devices), ALL)
        return Load(whole, whole, np.full(whole.shape, share * seen.sum()), np.zeros_like(whole, bool))
    needed = pairs(problem.mask, outer, problem.T, problem.T).needed
    i = np.arange(outer.devices)
    at = [(i, i)]
    if way.strategy == "balanced":
        at += [step.at(i) for step in balanced.steps(needed)]
    else:
        for route in ring.routes(needed):
            at += [(i, (i - route.distance(hop, outer.devices)) % len(i)) for hop in range(1, route.hops + 1)]
    queries, keys = (np.stack(x) for x in zip(*at, strict=True))
    found = np.where(needed[queries, keys], share * seen[queries, keys], 0.0)
    each = call.devices // outer.devices  # the devices of a part of the sequence, next to each other
    return Load(*(np.repeat(x, each, 1) for x in (queries, keys, found, queries != i[None])))
