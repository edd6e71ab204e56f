"""The schedule that libtpu writes down for a Pallas kernel: parsed, and weighted by the steps really executed.

A TPU core is in order and runs one bundle of instructions per cycle. The compiler dumps the bundles it packed, with
their loops and branches, and how many slots of each unit a bundle fills. So

    static cycles = sum over regions of bundles x how often the region runs.

Trip counts of loops stand in the schedule; how often branches run comes from the mask's geometry (`analysis/cases.py`).
What is declared must fit what was compiled: the grid's loop must run for the declared steps, and there must be as many
branches as the source has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from longattn.analysis.cases import Kernel

# ---- the schedule, parsed

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2} *)?:(?: >)* +\{", re.MULTILINE)
_BRANCH = re.compile(r"\bsbr\.(?:rel|abs)\s*(?:\(!?%\w+\)\s*)?target bundleno = (\d+)")
_TRIPS = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test")
_DELAY = 5  # a branch's own bundle and its four delay slots run before it takes effect
# Columns of the utilisation file; versions of libtpu differ in the first one's name. It counts the cycles for which
# products keep a unit busy.
_SLOTS = {
    "MATMUL": "MXU", "MXU": "MXU", "XLU": "XLU", "VALU": "VALU", "EUP": "EUP", "VLOAD": "load", "VSTORE": "store",
    "VLOAD:FILL": "fill", "VSTORE:SPILL": "spill",
}  # fmt: skip
SLOTS = ("MXU", "XLU", "VALU", "EUP", "load", "store")


@dataclass
class Region:
    """Bundles [start, end) that run together, without those of the regions inside."""

    kind: Literal["kernel", "loop", "branch"]
    start: int
    end: int
    trips: int | None = None  # a loop's, where the schedule holds it as a constant
    inside: list[Region] = field(default_factory=list)
    bundles: int = 0
    slots: dict[str, int] = field(default_factory=dict)  # slots filled

    def walk(self) -> Iterator[Region]:
        """This region and all inside it, in the order of the program."""
        yield self
        for region in self.inside:
            yield from region.walk()

    def total(self, slot: str) -> int:
        """Slots filled here and inside, each region once."""
        return sum(region.slots[slot] for region in self.walk())


@dataclass(frozen=True)
class Schedule:
    """What the compiler wrote down about one kernel."""

    root: Region
    capacity: dict[str, int]  # slots of a bundle


def parse(bundles: str, utilisation: str) -> Schedule:
    """The regions of one kernel from its `packed-bundles-post-ra` and utilisation dumps.

    Raises:
      ValueError: for texts that are not of this form, as another version of libtpu may write them.
    """
    heads = list(_BUNDLE.finditer(bundles))
    n = len(heads)
    if not n or [int(head[1], 16) for head in heads] != list(range(n)):
        raise ValueError("the bundles of libtpu's schedule are not numbered 0, 1, 2, ...: this version is not known")
    ends = [head.start() for head in heads[1:]] + [len(bundles)]
    text = [bundles[head.end() : end] for head, end in zip(heads, ends)]
    capacity, used = _utilisation(utilisation)
    if len(used) != n:
        raise ValueError(f"libtpu's schedule has {n} bundles, its utilisation {len(used)}: this version is not known")

    regions = []
    for i, bundle in enumerate(text):
        for match in _BRANCH.finditer(bundle):
            target, after = int(match[1]), min(i + _DELAY, n)
            if target <= i:
                regions.append(Region("loop", target, after))
            elif after < target:
                regions.append(Region("branch", after, target))
    root = Region("kernel", 0, n)
    stack = [root]
    for region in sorted(regions, key=lambda r: (r.start, -r.end, r.kind != "loop")):
        while region.start >= stack[-1].end:
            stack.pop()
        if region.end > stack[-1].end:
            raise ValueError(f"bundles {region.start} to {region.end} of the schedule overlap another region's end")
        stack[-1].inside.append(region)
        stack.append(region)

    sums = {slot: np.concatenate([[0], np.cumsum(column)]) for slot, column in zip(capacity, used.T)}
    for region in root.walk():
        parts = [(region.start, region.end, 1), *((r.start, r.end, -1) for r in region.inside)]
        region.bundles = sum(sign * (end - start) for start, end, sign in parts)
        region.slots = {s: int(sum(sign * (c[end] - c[start]) for start, end, sign in parts)) for s, c in sums.items()}
        if region.kind == "loop":
            inner = {i for r in region.inside for i in range(r.start, r.end)}
            tests = [m for i in range(region.start, region.end) if i not in inner for m in _TRIPS.finditer(text[i])]
            region.trips = int(tests[-1][1]) if tests else None
    return Schedule(root, capacity)


def _utilisation(text: str) -> tuple[dict[str, int], np.ndarray]:
    """(slots of a bundle by name, slots filled [bundles slots])."""
    names = next((line.replace(" ", "").split(",") for line in text.splitlines() if "VALU," in line), [])
    rows = [line.split() for line in text.splitlines() if re.fullmatch(r"[\d ]+", line) and line.strip()]
    keep = {_SLOTS[name]: i for i, name in enumerate(names) if name in _SLOTS}
    if set(keep) != set(_SLOTS.values()) or not rows or any(len(row) != len(names) for row in rows):
        raise ValueError(
            f"libtpu's utilisation has the columns {', '.join(names) or 'none'}: this version is not known"
        )
    table = np.array(rows, dtype=np.int64)[:, list(keep.values())]
    return dict(zip(keep, table[0].tolist())), table[1:]


# ---- the schedule, weighted


@dataclass(frozen=True)
class Executions:
    """How often one region runs, on the busiest core."""

    kind: str
    what: str  # of a branch of the source
    bundles: int
    runs: float
    trips: int | None
    start: int


@dataclass(frozen=True)
class Weighted:
    """One kernel's cycles and slots, on the busiest core."""

    name: str
    cycles: float
    busy: dict[str, float]  # cycles for which each unit would be busy if nothing else were in the way
    cores: int  # that the grid spreads over
    spills: int  # spilling stores in the schedule, each counted once
    regions: tuple[Executions, ...]


def weigh(schedule: Schedule, kernel: Kernel, cores: int) -> Weighted:
    """The schedule of `kernel` weighted by the steps it really executes, on a device of `cores` cores.

    Raises:
      ValueError: where what was compiled does not fit what the case declares.
    """
    root = schedule.root
    grid = next((r for r in root.walk() if r.kind == "loop" and r.total("MXU")), None)
    if grid is None or grid.trips is None:
        raise ValueError(f"{kernel.name}: the schedule has no loop over the grid with a known number of trips")
    # Pallas pipelines the grid: the first trip only fetches, the last only waits for what was stored.
    steps = grid.trips - 2
    used = kernel.steps // steps if steps > 0 else 0
    if used not in (1, cores) or used * steps != kernel.steps:
        raise ValueError(
            f"{kernel.name}: the schedule walks over {steps} grid steps per core, the case counts {kernel.steps} over "
            f"{cores} cores"
        )
    body = [r for r in grid.inside if r.kind == "branch" and r.total("MXU")]
    if len(body) != 1:
        raise ValueError(
            f"{kernel.name}: {len(body)} regions of the grid's loop hold matrix products, one was expected"
        )
    found = [r for r in body[0].walk() if r.kind == "branch"][1:]
    if len(found) != len(kernel.branches):
        raise ValueError(
            f"{kernel.name}: the schedule's step has {len(found)} branches, its source {len(kernel.branches)}"
        )
    declared = {id(region): branch for region, branch in zip(found, kernel.branches)}
    rows: list[Executions] = []
    cycles, filled = 0.0, dict.fromkeys(schedule.capacity, 0.0)

    def add(region: Region, runs: float) -> None:
        nonlocal cycles
        what = ""
        if region is body[0]:
            runs, what = float(steps), "grid step"
        elif id(region) in declared:
            branch = declared[id(region)]
            runs, what = branch.runs / used, branch.what
        elif region.kind == "loop":
            if region.trips is None:
                raise ValueError(f"{kernel.name}: the loop at bundle {region.start} has no constant number of trips")
            runs *= region.trips
        # Any other branch lies outside of a step and is charged whenever it is reached.
        cycles += runs * region.bundles
        for slot, n in region.slots.items():
            filled[slot] += runs * n
        rows.append(Executions(region.kind, what, region.bundles, runs, region.trips, region.start))
        for inner in region.inside:
            add(inner, runs)

    add(root, 1.0)
    busy = {slot: n / schedule.capacity[slot] for slot, n in filled.items()}
    return Weighted(kernel.name, cycles, busy, used, root.total("spill"), tuple(rows))
