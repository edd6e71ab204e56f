"""The links of a TPU slice: which of them a collective needs, and for how long at least.

Chips stand on a grid. One link each way joins a chip to each neighbour; wrap-around links make an axis a ring. XLA's
schedules do not say which links a message takes, so these rules give a lower bound. Only messages over detours could be
faster:

    messages         a message takes a shortest way. It is not split, except into halves where both ways around a ring
                     are equally far
    permutes         all pairs go along the axes in one order, the best one for the busiest link
    all-to-all       every pair of the group does the same; parallel links share the load
    all-gather, reduce-scatter    what a chip receives, or sends, goes over those of its links on which a shortest way
                     from another chip of the group ends: the two of a ring where the group lies along one axis, one at
                     the ends of an axis that is no ring
    all-reduce       both, one after the other or at once: a chip sends and receives the array once at least, and all
                     together what a reduce-scatter and an all-gather send

Devices of one chip share its links, and reach each other at the rate of all of them together. Twisted tori, which a
user has to request, are not covered.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from longattn.cost.collective import Collective


def ways(start: int, end: int, n: int, ring: bool = True) -> list[tuple[int, list[int]]]:
    """The shortest ways along an axis of n places, two where both are equally far: (1 or -1, the places entered)."""
    onwards = (end - start) % n
    distances = ((onwards, 1), (n - onwards, -1)) if ring else ((abs(end - start), 1 if end > start else -1),)
    return [
        (way, [(start + way * passed) % n for passed in range(1, distance + 1)])
        for distance, way in distances
        if not ring or 2 * distance <= n
    ]


@dataclass(frozen=True)
class Torus:
    """A slice, and the place of each device of a program in it."""

    sizes: tuple[int, ...]  # chips along each axis
    rings: tuple[bool, ...]  # whether an axis has wrap-around links
    link: float  # bytes/s of one link, in one direction
    chip: float  # bytes/s that one device receives from another of its chip
    places: tuple[tuple[int, ...], ...]  # the coordinates of each device's chip, in the program's order

    def times(self, collectives: Iterable[Collective]) -> dict[Collective, np.ndarray]:
        """Seconds for which each collective occupies every set of links [sets].

        A collective is done when each set has worked for that long. A set works for one collective at a time. Sets
        that all collectives use alike are counted once.
        """
        collectives = list(dict.fromkeys(collectives))
        if not collectives:
            return {}
        loads = {c: load for c in collectives if (load := self._loads(c)) is not None}
        received = {c: self._received(c) for c in collectives if c not in loads}
        kinds = [np.eye(len(self._rates), dtype=bool), *(usable.T for usable, _ in received.values())]
        sets = np.unique(np.concatenate(kinds), axis=0)  # [S directions], of every chip
        sets = sets[sets.any(1)]
        rates = sets @ self._rates
        rows = np.zeros((len(collectives), 2, len(sets), math.prod(self.sizes)))
        for row, c in zip(rows, collectives):
            if c in loads:
                row[0] = sets @ loads[c] / rates[:, None]
                continue
            usable, bytes_ = received[c]
            links = usable.sum(0)
            # Where links differ, the ends of a line limit a reduce-scatter by what they send. They receive little, so
            # it does not compete with what other collectives make them receive.
            apart = c.kind == "reduce-scatter" and len(set(links[links > 0])) > 1
            row[int(apart)] = np.where(sets.astype(int) @ usable == links, bytes_, 0.0) / rates[:, None]
        flat = rows.reshape(len(rows), -1)
        used = flat.any(0)
        used[0] = True  # at least one column, where no link is used
        found = np.unique(flat[:, used], axis=1)
        return dict(zip(collectives, found, strict=True))

    @cached_property
    def _rates(self) -> np.ndarray:
        """Bytes/s of each direction [2 axes + 1]: onwards and back along each axis, and within the chip."""
        return np.array([self.link] * 2 * len(self.sizes) + [self.chip])

    @cached_property
    def _strides(self) -> tuple[int, ...]:
        return tuple(math.prod(self.sizes[axis + 1 :]) for axis in range(len(self.sizes)))

    def _number(self, place: Iterable[int]) -> int:
        """The number of the chip at these coordinates."""
        return sum(at * stride for at, stride in zip(place, self._strides, strict=True))

    def _axis(self, axis: int, start: int, end: int) -> Iterator[tuple[int, float, list[int]]]:
        """Yields (direction, share of the message, places entered) for each shortest way along an axis."""
        found = ways(start, end, self.sizes[axis], self.rings[axis])
        for way, entered in found:
            yield 2 * axis + (way < 0), 1 / len(found), entered

    def _empty(self) -> np.ndarray:
        """Zeros [directions chips]: one for each direction in which each chip can be entered."""
        return np.zeros((len(self._rates), math.prod(self.sizes)))

    def _loads(self, what: Collective) -> np.ndarray | None:
        """Bytes over each link [directions chips], by direction and the chip it leads to; None where not known."""
        if what.kind == "collective-permute":
            orders = itertools.permutations(range(len(self.sizes)))
            return min((self._permuted(what, order) for order in orders), key=np.max)
        if what.kind in ("all-to-all", "ragged-all-to-all"):
            return self._exchanged(what)
        return None

    def _permuted(self, what: Collective, order: tuple[int, ...]) -> np.ndarray:
        loads = self._empty()
        for a, b in what.pairs:
            at = list(self.places[a])
            if a != b and self.places[a] == self.places[b]:
                loads[-1, self._number(at)] = what.bytes
            for axis in order:
                for direction, share, entered in self._axis(axis, at[axis], self.places[b][axis]):
                    for at[axis] in entered:
                        loads[direction, self._number(at)] += share * what.bytes
                at[axis] = self.places[b][axis]
        return loads

    def _members(self, what: Collective) -> tuple[list[tuple[int, ...]], float, float]:
        """(chips of the group, its devices on each, groups that share each chip)."""
        chips = sorted({self.places[device] for device in what.group})
        each = len(what.group) / len(chips)
        return chips, each, len(self.places) / len(set(self.places)) / each

    def _exchanged(self, what: Collective) -> np.ndarray:
        loads = self._empty()
        chips, each, groups = self._members(what)
        if len(chips) == 1:
            loads[-1, self._number(chips[0])] = what.bytes
            return loads
        message = what.bytes / (len(what.group) - 1) * each**2 * groups  # from one chip to another
        for axis, n in enumerate(self.sizes):
            lines = np.array(sorted({self._number((*chip[:axis], 0, *chip[axis + 1 :])) for chip in chips}))
            there = np.bincount([chip[axis] for chip in chips], minlength=n)
            for start, end in itertools.product(np.flatnonzero(there).tolist(), repeat=2):
                for direction, share, entered in self._axis(axis, start, end):
                    for place in entered:
                        numbers = lines + place * self._strides[axis]
                        loads[direction, numbers] += share * message * there[start] * there[end] / len(lines)
        return loads

    def _received(self, what: Collective) -> tuple[np.ndarray, np.ndarray]:
        """(directions over which a chip may receive [directions chips], bytes that it must receive [chips])."""
        usable, bytes_ = self._empty().astype(bool), self._empty()[0]
        chips, each, groups = self._members(what)
        numbers, n = np.array([self._number(chip) for chip in chips]), len(what.group)
        if len(chips) == 1:
            usable[-1, numbers], bytes_[numbers] = n > 1, what.bytes
            return usable, bytes_
        for axis, there in enumerate(np.array(chips).T):
            for start, end in itertools.permutations(set(there.tolist()), 2):
                for direction, *_ in self._axis(axis, start, end):
                    usable[direction, numbers[there == end]] = True
        if what.kind == "all-reduce":
            array, links = what.bytes * n / (2 * (n - 1)), usable.sum(0)
            shares = 2 * (len(chips) - 1) * array * links[numbers] / links.sum()
            bytes_[numbers] = groups * np.maximum(array, shares)
        elif what.kind == "collective-broadcast":
            bytes_[numbers] = groups * what.bytes
        else:
            bytes_[numbers] = groups * what.bytes * (n - each) / (n - 1)
        return usable, bytes_
