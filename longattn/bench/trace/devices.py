"""Executions of compiled programs, from what each kind of device writes:

    CPU   plane "/host:CPU", a line per thread; ops carry hlo_op, program_id, run_id and device_ordinal
    TPU   plane "/device:TPU:0", line "XLA Modules": an event per execution; line "XLA Ops": its ops, nested in time
    GPU   plane "/device:GPU:0", a line "Stream #..." per stream; kernels carry hlo_op and program_id

It was tested on traces of CPUs. For TPUs and GPUs it follows the documented form and has not run on a device's trace.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from longattn.bench.trace.program import Op, Stored
from longattn.bench.trace.protobuf import Event
from longattn.bench.trace.scope import scope_of
from longattn.bench.trace.timeline import Execution, Kernel

CONTROL = frozenset({"while", "conditional", "call"})  # the ops inside them are events of their own
Programs = Mapping[int, Stored]  # by their number


class _Raw(NamedTuple):
    """An event of a device, not yet assigned to an execution."""

    name: str
    op: str  # name of the instruction
    start: float
    end: float
    own: float  # nanoseconds, less the events inside it on its line
    stats: dict[str, Any]


def _nested(events: list[_Raw]) -> list[_Raw]:
    """Returns the events of one line by start; `own` excludes the events inside each."""
    events = sorted(events, key=lambda e: (e.start, -e.end))
    own = [e.end - e.start for e in events]
    open_: list[int] = []
    for i, event in enumerate(events):
        while open_ and events[open_[-1]].end <= event.start:
            open_.pop()
        if open_:
            own[open_[-1]] -= min(event.end, events[open_[-1]].end) - event.start
        open_.append(i)
    return [event._replace(own=max(0.0, t)) for event, t in zip(events, own)]


def _execution(
    program: str, device: str, raws: Iterable[_Raw], known: Callable[[_Raw], Op], start: float, end: float
) -> Execution:
    kernels = []
    for raw in raws:
        op = known(raw)
        if op.opcode not in CONTROL:
            kernels.append(Kernel(raw.name, op.scope, raw.start, raw.end, raw.own * 1e-9))
    return Execution(program, device, start, end, tuple(sorted(kernels, key=lambda k: k.start)))


def _opcode(name: str) -> str:
    """Returns the opcode that an instruction's name suggests."""
    return re.sub(r"[._\d]+$", "", name)


def _known(programs: Programs, number: int, name: str) -> Callable[[_Raw], Op]:
    """Returns a look-up of a program's ops. A program that was compiled twice may have another number in the trace."""
    same = [programs[number]] if number in programs else [stored for stored in programs.values() if stored.name == name]
    tables = [stored.ops for stored in same]

    def known(raw: _Raw) -> Op:
        found = next((ops[raw.op] for ops in tables if raw.op in ops), None)
        return found or Op(_opcode(raw.op), scope_of(str(raw.stats.get("name") or raw.stats.get("tf_op") or "")))

    return known


def cpu(plane: Any, programs: Programs) -> Iterator[Execution]:
    """Yields the executions in a CPU's plane."""
    runs: dict[tuple[int, int, int], list[_Raw]] = defaultdict(list)
    names: dict[int, str] = {}
    bounds: dict[tuple[int, int], float] = {}  # completion of an execution, by (device, run)
    ends: dict[int, float] = {}
    for line in plane.lines:
        events = []
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_op" in stats and "run_id" in stats:  # without them it is the host's, such as a kernel's launch
                events.append(_Raw(event.name, stats["hlo_op"], event.start_ns, event.end_ns, 0.0, stats))
            elif event.name.startswith("end: ") and "_c" in stats:
                ends[int(stats["_c"])] = event.start_ns
            elif "run_id" in stats:
                key = int(stats.get("device_ordinal", 0)), int(stats["run_id"])
                bounds[key] = max(bounds.get(key, 0.0), event.end_ns)
        for raw in _nested(events):
            program = int(raw.stats.get("program_id", 0))
            names[program] = raw.stats.get("hlo_module", "")
            run = int(raw.stats["run_id"])
            runs[program, run, int(raw.stats.get("device_ordinal", 0))].append(raw)
    for (program, run, device), raws in runs.items():
        known = _known(programs, program, names[program])
        starts = sorted(raw.start for raw in raws if known(raw).opcode not in CONTROL)
        whole = []
        for raw in raws:
            # Other threads may finish an op that this one began. Its end mark comes late, after the work that it
            # triggered, so an op lasts at most until the next one begins.
            mark = ends.get(int(raw.stats["_p"]), raw.end) if "_p" in raw.stats else raw.end
            following = bisect.bisect_left(starts, raw.end)
            tail = min(mark, starts[following] if following < len(starts) else mark)
            longer = max(0.0, tail - raw.end)
            whole.append(raw._replace(end=raw.end + longer, own=raw.own + longer))
        start, end = min(raw.start for raw in raws), max(raw.end for raw in whole)
        end = max(end, bounds.get((device, run), end))
        yield _execution(names[program], f"/device:CPU:{device}", whole, known, start, end)


def tpu(plane: Any, metadata: Mapping[str, Event], programs: Programs) -> Iterator[Execution]:
    """Yields the executions in a TPU's plane."""
    lines = {line.name: list(line.events) for line in plane.lines}
    ops = [
        _Raw(_instruction(e.name, metadata), _instruction(e.name, metadata), e.start_ns, e.end_ns, 0.0,
             {**(metadata[e.name].stats if e.name in metadata else {}), **dict(e.stats)})
        for e in lines.get("XLA Ops", ())
    ]  # fmt: skip
    ops = _nested(ops)
    starts = [raw.start for raw in ops]

    for module in lines.get("XLA Modules", ()):
        first, last = bisect.bisect_left(starts, module.start_ns), bisect.bisect_left(starts, module.end_ns)
        name, number = numbered(module.name)
        known = _known(programs, number, name)
        yield _execution(name, plane.name, ops[first:last], known, module.start_ns, module.end_ns)


def numbered(name: str) -> tuple[str, int]:
    """Returns the name and number of a compiled program from an event's name, such as "jit_f(7)"."""
    found = re.fullmatch(r"(.*)\((-?\d+)\)", name)
    return (found[1], int(found[2])) if found else (name, 0)


def _instruction(name: str, metadata: Mapping[str, Event]) -> str:
    """Returns an op's name; a TPU's events are named by the instruction's whole text."""
    if name in metadata and metadata[name].display:
        return metadata[name].display
    return name.split(" = ")[0].removeprefix("%")


def gpu(plane: Any, programs: Programs) -> tuple[list[Execution], float]:
    """Returns the executions in a GPU's plane, and the seconds of kernels that name no program."""
    unknown = 0.0
    by_program: dict[int, list[_Raw]] = defaultdict(list)
    names: dict[int, str] = {}
    for line in plane.lines:
        if not line.name.startswith("Stream"):
            continue
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_module" not in stats:
                unknown += event.duration_ns * 1e-9
                continue
            # Annotations may be nested; the innermost comes last.
            op = str(stats.get("hlo_op", "")).split("::")[-1]
            program = int(stats.get("program_id", 0))
            names[program] = stats["hlo_module"]
            raw = _Raw(event.name, op, event.start_ns, event.end_ns, event.duration_ns, stats)
            by_program[program].append(raw)
    found = []
    for program, raws in by_program.items():
        raws.sort(key=lambda raw: raw.start)
        # Kernels do not name their run, but each run begins with the same op, which stands outside of any loop.
        first = raws[0].op, raws[0].name
        begins = [i for i, raw in enumerate(raws) if (raw.op, raw.name) == first]
        for i, j in zip(begins, [*begins[1:], len(raws)]):
            end = max(raw.end for raw in raws[i:j])
            known = _known(programs, program, names[program])
            found.append(_execution(names[program], plane.name, raws[i:j], known, raws[i].start, end))
    return found, unknown
