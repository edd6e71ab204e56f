"""Parses libtpu's schedule of a Pallas kernel, and weights it by the steps really executed.

A TPU core is in order and runs one bundle of instructions per cycle. The compiler dumps its bundles, with their loops
and branches, and how many slots of each unit a bundle fills. So

    static cycles = sum over regions of bundles x how often the region runs.

The schedule has the trip counts of loops. How often branches run follows from the mask's geometry (`kernels/cases`) or,
if it depends on the data, from runs in interpret mode (`rates.py`). The declaration must match the compiled program:
loops must run for the declared steps, and there must be as many branches as in the source.

For a kernel that walks over lists, the regions with matrix products are declared instead, each with how often its
branches without products run (`Branch.asides`). Chips differ in which of those become jumps. If the number of jumps
matches no declaration, each counts whenever it is reached, which is an upper bound.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from longattn.aot.kernels.cases import Branch, Kernel

# ---- the schedule, parsed

_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2} *)?: *>* *\{", re.MULTILINE)
_BRANCH = re.compile(r"\bsbr\.(?:rel|abs)\s*(?:\((?P<unless>!?)(?P<test>%\w+)\)\s*)?target bundleno = (?P<target>\d+)")
_TRIPS = re.compile(r"scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test")
_COPY = r"{test} = (?:scmp\.ge\.s32\.totalorder %\w+, (\d+)|pmov 1\b)"  # in a loop that the compiler made for a copy
_CORE = re.compile(r"(%s\w+) = sld \[\S+\] /\* megacore core id")
_DELAY = 5  # a branch's own bundle and its four delay slots run before it takes effect
# Columns of the utilisation file; the first one's name depends on libtpu's version. It counts the cycles for which
# products keep a unit busy.
_SLOTS = {
    "MATMUL": "MXU", "MXU": "MXU", "XLU": "XLU", "VALU": "VALU", "EUP": "EUP", "VLOAD": "load", "VSTORE": "store",
    "VLOAD:FILL": "fill", "VSTORE:SPILL": "spill",
}  # fmt: skip
SLOTS = ("MXU", "XLU", "VALU", "EUP", "load", "store")


@dataclass
class Region:
    """Bundles [start, end) that run equally often, without those of the regions inside."""

    kind: Literal["kernel", "loop", "branch"]
    start: int
    end: int
    trips: int | None = None  # of a loop, if constant
    inside: list[Region] = field(default_factory=list)
    bundles: int = 0
    slots: dict[str, int] = field(default_factory=dict)  # slots filled

    def walk(self) -> Iterator[Region]:
        """Yields this region and all inside it, in program order."""
        yield self
        for region in self.inside:
            yield from region.walk()

    def total(self, slot: str) -> int:
        """Returns the slots filled here and inside, counting each region once."""
        return sum(region.slots[slot] for region in self.walk())


@dataclass(frozen=True)
class Schedule:
    """The compiler's schedule of one kernel."""

    root: Region
    capacity: dict[str, int]  # slots of a bundle
    filled: dict[str, np.ndarray]  # slots that each bundle fills, int [bundles]
    divided: bool  # the cores of a device share its grid: it reads its core's id, and not only to idle on the second


def parse(bundles: str, utilisation: str) -> Schedule:
    """Parses the regions of one kernel from its `packed-bundles-post-ra` and utilisation dumps.

    Raises ValueError for dumps of an unknown form, such as another version of libtpu may write.
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

    regions, exit_tests = [], {}  # by the id of a loop's region
    for i, bundle in enumerate(text):
        for match in _BRANCH.finditer(bundle):
            target, after = int(match["target"]), min(i + _DELAY, n)
            if target <= i:
                regions.append(Region("loop", target, after))
                exit_tests[id(regions[-1])] = match["test"] if match["unless"] else None
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
            own = "".join(text[i] for i in range(region.start, region.end) if i not in inner)
            tests = list(_TRIPS.finditer(own))
            if not tests and (test := exit_tests[id(region)]):
                tests = list(re.finditer(_COPY.format(test=re.escape(test)), own))
            region.trips = int(tests[-1][1] or 1) if tests else None
    core = _CORE.search(bundles)
    divided = core is not None and not re.search(rf"scmp\.ne\.s32\.totalorder {core[1]}, 0", bundles)
    return Schedule(root, capacity, dict(zip(capacity, used.T)), divided)


def _utilisation(text: str) -> tuple[dict[str, int], np.ndarray]:
    """Returns the slots of a bundle by name, and the slots filled [bundles slots]."""
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
    what: str  # name of a branch of the source
    bundles: int
    runs: float
    most: float  # runs if data-dependent branches ran whenever asked
    trips: int | None
    start: int
    end: int


@dataclass(frozen=True)
class Weighted:
    """One kernel's cycles and slots, on the busiest core."""

    name: str
    cycles: float
    cycles_worst: float  # cycles if every data-dependent branch ran whenever asked, with the costliest alternative
    busy: dict[str, float]  # cycles for which each unit alone would be busy
    cores: int  # cores that share the grid
    spills: int  # spilling stores in the schedule, each counted once
    regions: tuple[Executions, ...]


@dataclass(frozen=True)
class _Found:
    """The kernel's step in the schedule, and how often the regions around it run."""

    step: Region  # contains the branches of the source
    runs: dict[int, float]  # by id of the region
    cores: int


def weigh(schedule: Schedule, kernel: Kernel, cores: int, rates: Mapping[str, float] | None = None) -> Weighted:
    """Weights the schedule of `kernel` by the steps it really executes.

    Args:
      schedule: the parsed schedule.
      kernel: the declaration of its case.
      cores: cores of one device.
      rates: share of the times asked that a data-dependent branch runs, by `Branch.data`.

    Raises ValueError if the compiled program does not match the declaration, or a rate is missing.
    """
    found = _own_loops(schedule, kernel) if kernel.loops else _grid(schedule, kernel, cores)
    declared = _declared(found.step, kernel)
    rows: list[Executions] = []
    cycles, filled = 0.0, dict.fromkeys(schedule.capacity, 0.0)
    worst = {"": 0.0}  # cycles by alternative; "" always runs

    def times(branch: Branch) -> tuple[float, float]:
        most = branch.runs / found.cores
        return most * _rate(kernel, branch, rates), most

    def add(region: Region, runs: float, most: float, alternative: str) -> None:
        nonlocal cycles
        what = "grid step" if region is found.step else ""
        if id(region) in found.runs:
            runs = most = found.runs[id(region)]
        elif branch := declared.get(id(region)):
            (runs, most), what = times(branch), branch.what
            alternative = branch.alternative or alternative
        elif region.kind == "loop" and region.trips is not None:
            runs, most = runs * region.trips, most * region.trips
        elif region.kind == "loop":
            bodies = [declared[id(r)] for r in region.walk() if id(r) in declared]
            inside = [times(replace(body, runs=body.loop or body.runs)) for body in bodies]
            if not kernel.lists or not inside:
                raise ValueError(f"{kernel.name}: the loop at bundle {region.start} has no constant number of trips")
            runs, most = map(max, zip(*inside))
        # Any other branch counts whenever it is reached.
        cycles += runs * region.bundles
        worst[alternative] = worst.get(alternative, 0.0) + most * region.bundles
        for slot, n in region.slots.items():
            filled[slot] += runs * n
        rows.append(Executions(region.kind, what, region.bundles, runs, most, region.trips, region.start, region.end))
        for inner in region.inside:
            add(inner, runs, most, alternative)

    add(schedule.root, 1.0, 1.0, "")
    busy = {slot: n / schedule.capacity[slot] for slot, n in filled.items()}
    cycles_worst = worst.pop("") + max(worst.values(), default=0.0)
    return Weighted(kernel.name, cycles, cycles_worst, busy, found.cores, schedule.root.total("spill"), tuple(rows))


def _declared(step: Region, kernel: Kernel) -> dict[int, Branch]:
    """Returns the declared branches by the id of their region in the step."""
    if kernel.lists:
        regions, kind = [r for r in step.walk() if r.slots["MXU"]], "regions with matrix products"
    else:
        regions, kind = [r for r in step.walk() if r.kind == "branch" and r is not step], "branches"
    if len(regions) != len(kernel.branches):
        raise ValueError(
            f"{kernel.name}: the schedule's step has {len(regions)} {kind}, its source {len(kernel.branches)}"
        )
    declared = {id(region): branch for region, branch in zip(regions, kernel.branches)}
    for region, branch in zip(regions, kernel.branches):
        jumps = [b for r in region.inside if not r.total("MXU") for b in r.walk() if b.kind == "branch"]
        asides = next((runs for runs in branch.asides if len(runs) == len(jumps)), ())
        declared |= {id(jump): replace(branch, what="", runs=runs) for jump, runs in zip(jumps, asides)}
    return declared


def _rate(kernel: Kernel, branch: Branch, rates: Mapping[str, float] | None) -> float:
    if not branch.data:
        return 1.0
    if rates is None or branch.data not in rates:
        raise ValueError(
            f"{kernel.name}: how often the branch {branch.what!r} runs depends on the data, and no rate is known"
        )
    return rates[branch.data]


def _grid(schedule: Schedule, kernel: Kernel, cores: int) -> _Found:
    """Finds the step of a kernel whose grid Pallas walks."""
    grid = next((r for r in schedule.root.walk() if r.kind == "loop" and r.total("MXU")), None)
    if grid is None or (grid.trips is None and not kernel.dynamic):
        raise ValueError(f"{kernel.name}: the schedule has no loop over the grid with a known number of trips")
    # Pallas pipelines the grid: the first trip only fetches, the last only waits for what was stored.
    if grid.trips is None:
        used = cores if schedule.divided else 1
        steps = kernel.steps / used
    else:
        steps = grid.trips - 2
        used = int(kernel.steps // steps) if steps > 0 else 0
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
    return _Found(body[0], {id(grid): steps + 2.0, id(body[0]): float(steps)}, used)


def _own_loops(schedule: Schedule, kernel: Kernel) -> _Found:
    """Finds the step of a kernel with loops of its own over blocks: the body of the innermost loop."""
    region, runs = schedule.root, {}
    while len(runs) < len(kernel.loops):
        inside = [r for r in region.inside if r.total("MXU")]
        if len(inside) != 1:
            raise ValueError(
                f"{kernel.name}: {len(inside)} regions inside its loop {len(runs)} hold matrix products, one was "
                "expected"
            )
        (region,) = inside
        if region.kind != "loop":
            continue
        n, around = kernel.loops[len(runs)], kernel.loops[len(runs) - 1] if runs else 1
        if region.trips is not None and region.trips * around != n:
            raise ValueError(
                f"{kernel.name}: the schedule's loop {len(runs)} has {region.trips} trips, the case counts {n} over "
                f"{around}"
            )
        runs[id(region)] = float(n)
    return _Found(region, runs, 1)


def along(schedule: Schedule, weighted: Weighted, bins: int = 480) -> dict[str, Any]:
    """Returns how full each slot is along the cycles, in program order; a bundle is as wide as the times it runs.

    "slots" has, by name, the shares filled in `bins` equal parts of the kernel's cycles. "spans" has the stretches that
    belong to one region, each with its name and its first and last cycle.
    """
    owner = np.zeros(len(schedule.filled["VALU"]), int)
    for i, region in enumerate(weighted.regions):  # inner regions come later and overwrite
        owner[region.start : region.end] = i
    runs = np.array([region.runs for region in weighted.regions])[owner]
    end = np.concatenate([[0.0], np.cumsum(runs)])
    edges = np.linspace(0, end[-1], bins + 1)

    def shares(filled: np.ndarray, capacity: int) -> list[float]:
        done = np.concatenate([[0.0], np.cumsum(filled * runs)]) / capacity
        return np.round(np.diff(np.interp(edges, end, done)) / (end[-1] / bins), 3).tolist()

    slots = {slot: shares(filled, schedule.capacity[slot]) for slot, filled in schedule.filled.items()}
    starts = np.flatnonzero(np.diff(owner, prepend=-1))
    spans = [
        {"what": region.what or region.kind, "runs": region.runs, "bundles": int(stop - start),
         "from": float(end[start]), "to": float(end[stop])}
        for start, stop in zip(starts, [*starts[1:], len(owner)])
        if (region := weighted.regions[owner[start]]).runs
    ]  # fmt: skip
    return {"slots": slots, "spans": spans}
