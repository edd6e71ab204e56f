"""A recorded trace, read back: what each op of each compiled program cost on the device, by the scope it came from.

`jax.profiler.ProfileData` gives the timeline. It leaves out what the file says once per kind of event, so that is read
off the protocol buffer itself: the compiled programs (from whose instructions an op's scope is known), and on a TPU the
ops' own names. What a device writes:

    CPU   plane "/host:CPU", a line per thread; ops carry hlo_op, program_id, run_id and device_ordinal
    TPU   plane "/device:TPU:0", line "XLA Modules": an event per execution; line "XLA Ops": its ops, nested in time
    GPU   plane "/device:GPU:0", a line "Stream #..." per stream; kernels carry hlo_op and program_id

Reading was tried on traces of CPUs; for TPUs and GPUs it follows the documented form and was not run on a device.

Times are nanoseconds of the trace's own clock, seconds where a name says so. On a CPU several threads work on one
execution: its span is from its first op to its completion, it is busy while any thread is inside an op, and the seconds
of ops are summed over threads.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jax.profiler import ProfileData

Phase = Literal["forward", "backward", "recompute"]
CONTROL = frozenset({"while", "conditional", "call"})  # what runs inside them are ops of their own


class Scope(NamedTuple):
    """Where in the source an op comes from."""

    path: tuple[str, ...]  # named scopes and modules, outermost first; () where nothing is known
    phase: Phase

    def __str__(self) -> str:
        return "/".join(self.path) or "(no scope)"


class Kernel(NamedTuple):
    """One run of one op."""

    name: str  # of the HLO instruction; on a GPU of the kernel
    scope: Scope
    start: float
    end: float
    seconds: float  # its own: without the ops that ran inside it on the same line


@dataclass(frozen=True)
class Execution:
    """One run of a compiled program on one device."""

    program: str  # such as "jit__train_step"
    device: str  # such as "/device:TPU:0"
    start: float
    end: float
    kernels: tuple[Kernel, ...]  # by start

    @property
    def seconds(self) -> float:
        """From its first op to its completion."""
        return (self.end - self.start) * 1e-9

    @property
    def busy(self) -> float:
        """Seconds for which at least one op ran."""
        total, until = 0.0, self.start
        for kernel in self.kernels:
            total += max(0.0, kernel.end - max(kernel.start, until))
            until = max(until, kernel.end)
        return total * 1e-9


@dataclass(frozen=True)
class Trace:
    """What a trace says about the programs that ran in it."""

    executions: tuple[Execution, ...]  # by start
    unknown_seconds: float  # of device events that name no program, as those of replayed CUDA graphs may

    def of(self, program: str) -> tuple[Execution, ...]:
        """The executions of the programs of that name."""
        return tuple(e for e in self.executions if e.program == program)

    def busiest(self) -> str:
        """The program that kept devices busy for longest. Raises ValueError for a trace without programs."""
        total: dict[str, float] = defaultdict(float)
        for execution in self.executions:
            total[execution.program] += execution.busy
        if not total:
            raise ValueError("the trace holds no execution of a compiled program: record one while the device works")
        return max(total, key=lambda name: total[name])


# ---- scopes


_WRAPPED = re.compile(r"(\w+)\((.*)\)")
# What jax and XLA put between scopes: names of control flow, of calls and of transformations.
_STRUCTURE = frozenset(
    {
        "", "body", "branch", "checkpoint", "closed_call", "cond", "core_call", "custom_jvp_call", "custom_vjp_call",
        "eval_jaxpr", "pjit", "remat", "rematted_computation", "scan", "shard_map", "while",
    }
)  # fmt: skip
_BRANCH = re.compile(r"branch_\d+_fun")


def scope_of(op_name: str) -> Scope:
    """The scope that an instruction's `op_name` tells, such as

        jit(step)/transpose(jvp(Model))/while/body/layer/mlp/dot_general    ->    Model/layer/mlp, backward

    The last part, the operation, is left out, and so are jitted functions, control flow, transformations and, unless
    there is nothing else, einsum equations. An op is of the backward pass where it was transposed or stands in a scope
    "backward"; of the recomputation where a remat policy runs it again. Where XLA joined several (collectives), it
    writes what they share before a list, jit(step)/transpose(jvp(Model))/(embedding/add:mlp/dot): the scope is what
    they share, or the first's if that is nothing.
    """
    shared, several, rest = op_name.partition("/(")
    if several:
        common = scope_of(f"{shared}/")
        return common if common.path else scope_of(f"{shared}/{rest.split(':')[0]}")
    whole = op_name.split(";")[0].removesuffix(":")
    *parts, _ = whole.split("/")
    path: list[str] = []
    equation = ""
    for part in parts:
        while wrapped := _WRAPPED.fullmatch(part):
            part = "" if wrapped[1] in ("jit", "pjit") else wrapped[2]
        if "->" in part:
            equation = part
        elif part not in _STRUCTURE and not _BRANCH.fullmatch(part) and path[-1:] != [part]:
            path.append(part)
    phase: Phase = "backward" if "transpose(" in whole or "backward" in path else "forward"
    if "rematted_computation" in whole:
        phase = "recompute"
    return Scope(tuple(part for part in path if part != "backward") or ((equation,) if equation else ()), phase)


# ---- compiled programs, as the trace stores them


Fields = Mapping[int, Sequence[Any]]


def _fields(message: memoryview) -> Fields:
    """The fields of a protocol buffer by number: integers, or the bytes of what has a length.

    https://protobuf.dev/programming-guides/encoding/
    """
    found: dict[int, list[Any]] = defaultdict(list)
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, kind = tag >> 3, tag & 7
        value: int | memoryview
        if kind == 0:
            value, at = _varint(message, at)
        elif kind == 2:
            length, at = _varint(message, at)
            value, at = message[at : at + length], at + length
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
            value, at = message[at : at + size], at + size
        else:
            raise ValueError(f"wire type {kind} at byte {at}: this is no protocol buffer; record the trace again")
        found[number].append(value)
    return found


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _integers(values: Iterable[Any]) -> Iterator[int]:
    """A repeated integer field, packed or not."""
    for value in values:
        if isinstance(value, int):
            yield value
            continue
        at = 0
        while at < len(value):
            number, at = _varint(value, at)
            yield number


def _text(fields: Fields, number: int) -> str:
    return bytes(fields[number][-1]).decode(errors="replace") if number in fields else ""


class Op(NamedTuple):
    """An instruction of a compiled program."""

    opcode: str
    scope: Scope


@dataclass(eq=False)
class _Instruction:
    name: str
    opcode: str
    op_name: str  # "" for what XLA made
    parameter: int  # which one it is, of a parameter
    called: tuple[int, ...]  # computations
    operands: list[_Instruction]
    users: list[_Instruction]


# Operations that only move their operand.
_MOVES = frozenset({"copy", "dynamic_slice", "reshape", "slice", "squeeze", "transpose"})


def program_ops(module: bytes | memoryview) -> dict[str, Op]:
    """The instructions by name, of a serialised HloModuleProto.

    A fusion counts for the scope of its first matrix product, where it holds one: that is where its time goes, and
    XLA calls it after its last operation. An instruction without a name of its own was made by XLA (on a CPU even
    products, if they have several batch axes). It has the scope of what uses it; a product that of a slice or copy
    of an operand that was made for it alone, within the scope around both. Else it has that of the instruction in whose
    body it stands.
    """
    # xla/service/hlo.proto: HloModuleProto.computations = 3; HloComputationProto.instructions = 2, .id = 5;
    # HloInstructionProto.name = 1, .opcode = 2, .metadata = 7 (op_name = 2), .parameter_number = 9, .id = 35,
    # .operand_ids = 36, .called_computation_ids = 38.
    bodies: dict[int, list[_Instruction]] = {}
    callers: dict[int, tuple[int, _Instruction]] = {}
    for body in map(_fields, _fields(memoryview(module))[3]):
        by_id: dict[int, _Instruction] = {}
        reads: list[tuple[_Instruction, list[int]]] = []
        for fields in map(_fields, body.get(2, ())):
            op_name = _text(_fields(fields[7][-1]), 2) if 7 in fields else ""
            row = _Instruction(
                _text(fields, 1), _text(fields, 2), op_name if "/" in op_name else "", fields.get(9, (0,))[-1],
                tuple(_integers(fields.get(38, ()))), [], [],
            )  # fmt: skip
            by_id[fields[35][-1]] = row
            reads.append((row, list(_integers(fields.get(36, ())))))
            callers |= dict.fromkeys(row.called, (body[5][-1], row))
        for row, operands in reads:
            row.operands.extend(by_id[i] for i in operands)
            for operand in row.operands:
                operand.users.append(row)
        bodies[body[5][-1]] = [row for row, _ in reads]

    def used(row: _Instruction, depth: int = 8) -> str:
        """The name of the nearest user that has one."""
        for user in row.users if depth else ():
            inside = [user]
            if user.opcode == "fusion":
                places = {i for i, operand in enumerate(user.operands) if operand is row}
                parameters = (r for r in bodies[user.called[0]] if r.opcode == "parameter" and r.parameter in places)
                inside = [r for parameter in parameters for r in parameter.users] or inside
            for one in inside:
                if found := one.op_name or used(one, depth - 1):
                    return found
        return ""

    def product(row: _Instruction, fusion: _Instruction | None) -> str:
        """The name of a product, which a fusion may hold."""
        if row.op_name:
            return row.op_name
        after = used(row) if row.users or fusion is None else used(fusion)
        operands = [
            fusion.operands[x.parameter] if fusion is not None and x.opcode == "parameter" else x for x in row.operands
        ]
        if after.endswith("/dot_general"):
            return after
        moved = [x.op_name for x in operands if len(x.users) == 1 and x.op_name.split("/")[-1] in _MOVES]
        *outer, _ = scope_of(after).path or ("",)
        beside = [name for name in moved if scope_of(name).path and list(scope_of(name).path[:-1]) == outer]
        return after if not beside or scope_of(after) in map(scope_of, moved) else beside[0]

    def around(computation: int) -> str:
        while computation in callers:
            computation, caller = callers[computation]
            if caller.op_name:
                return caller.op_name
        return ""

    products = ("dot", "convolution")
    ops: dict[str, Op] = {}
    for computation, rows in bodies.items():
        for row in rows:
            name = ""
            if row.opcode == "fusion":
                name = next((product(x, row) for x in bodies[row.called[0]] if x.opcode in products), "")
            elif row.opcode in products:
                caller = callers[computation][1] if computation in callers else None
                name = product(row, caller if caller is not None and caller.opcode == "fusion" else None)
            ops[row.name] = Op(row.opcode, scope_of(name or row.op_name or used(row) or around(computation)))
    return ops


class _Event(NamedTuple):
    """What the file says once about all events of one name in a plane."""

    display: str
    stats: dict[str, Any]  # text, bytes and integers


def _metadata(data: bytes) -> dict[str, dict[str, _Event]]:
    """By plane and event name, what ProfileData leaves out."""
    # tsl/profiler/protobuf/xplane.proto: XSpace.planes = 1; XPlane.name = 2, .event_metadata = 4, .stat_metadata = 5;
    # XEventMetadata.name = 2, .display_name = 4, .stats = 5; XStat.metadata_id = 1, .uint64_value = 3,
    # .int64_value = 4, .str_value = 5, .bytes_value = 6, .ref_value = 7; a map's entry: key = 1, value = 2.
    planes: dict[str, dict[str, _Event]] = {}
    for plane in map(_fields, _fields(memoryview(data)).get(1, ())):
        entries = [_fields(entry) for entry in plane.get(5, ())]
        names = {entry[1][-1] if 1 in entry else 0: _text(_fields(entry[2][-1]), 2) for entry in entries}
        events = planes.setdefault(_text(plane, 2), {})
        for entry in map(_fields, plane.get(4, ())):
            event = _fields(entry[2][-1])
            stats: dict[str, Any] = {}
            for stat in map(_fields, event.get(5, ())):
                key = names.get(stat[1][-1], "")
                if 5 in stat:
                    stats[key] = _text(stat, 5)
                elif 7 in stat:
                    stats[key] = names.get(stat[7][-1], "")
                elif found := next((stat[n][-1] for n in (3, 4, 6) if n in stat), None):
                    stats[key] = found
            events[_text(event, 2)] = _Event(_text(event, 4), stats)
    return planes


# ---- the timeline


class _Raw(NamedTuple):
    """An event of a device, before it is known to which execution it belongs."""

    name: str
    op: str  # name of the instruction
    start: float
    end: float
    own: float  # nanoseconds without what ran inside it on its line
    stats: dict[str, Any]


def _nested(events: list[_Raw]) -> list[_Raw]:
    """The events of one line by start, each without the time of those inside it."""
    events = sorted(events, key=lambda e: (e.start, -e.end))
    own = [e.end - e.start for e in events]
    open_: list[int] = []
    for i, event in enumerate(events):
        while open_ and events[open_[-1]].end <= event.start:
            open_.pop()
        if open_:
            own[open_[-1]] -= event.end - event.start
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
    """What an instruction's name says of its opcode."""
    return re.sub(r"[._\d]+$", "", name)


def read(data: bytes) -> Trace:
    """The trace of a serialised XSpace, what a file `*.xplane.pb` holds.

    Raises ValueError for data that is no trace.
    """
    try:
        metadata, profile = _metadata(data), ProfileData.from_serialized_xspace(data)
    except (IndexError, KeyError, RuntimeError) as error:
        raise ValueError("the trace is cut off or no protocol buffer; record it again") from error
    programs: dict[int, tuple[str, dict[str, Op]]] = {}
    for name, event in metadata.get("/host:metadata", {}).items():
        if proto := event.stats.get("Hlo Proto"):
            name, number = _program(name)
            programs[number] = name, program_ops(_fields(proto)[1][-1])  # HloProto.hlo_module = 1

    executions: list[Execution] = []
    unknown = 0.0
    for plane in profile.planes:
        if plane.name == "/host:CPU":
            executions += _cpu(plane, programs)
        elif re.fullmatch(r"/device:TPU:\d+", plane.name):
            executions += _tpu(plane, metadata.get(plane.name, {}), programs)
        elif re.fullmatch(r"/device:GPU:\d+", plane.name):
            found, rest = _gpu(plane, programs)
            executions += found
            unknown += rest
    return Trace(tuple(sorted(executions, key=lambda e: e.start)), unknown)


Programs = Mapping[int, tuple[str, dict[str, Op]]]  # by number: name and instructions


def _known(programs: Programs, number: int, name: str) -> Callable[[_Raw], Op]:
    """What is known of the ops of a program. One that was compiled twice may be stored under another number."""
    tables = [programs[number][1]] if number in programs else [ops for other, ops in programs.values() if other == name]

    def known(raw: _Raw) -> Op:
        found = next((ops[raw.op] for ops in tables if raw.op in ops), None)
        return found or Op(_opcode(raw.op), scope_of(str(raw.stats.get("name") or raw.stats.get("tf_op") or "")))

    return known


def _cpu(plane: Any, programs: Programs) -> Iterator[Execution]:
    runs: dict[tuple[int, int, int], list[_Raw]] = defaultdict(list)
    names: dict[int, str] = {}
    bounds: dict[tuple[int, int], float] = {}  # when an execution was complete, by device and run
    ends: dict[int, float] = {}
    for line in plane.lines:
        events = []
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_op" in stats:
                events.append(_Raw(event.name, stats["hlo_op"], event.start_ns, event.end_ns, 0.0, stats))
            elif event.name.startswith("end: "):
                ends[int(stats.get("_c", 0))] = event.start_ns
            elif "run_id" in stats:
                key = int(stats.get("device_ordinal", 0)), int(stats["run_id"])
                bounds[key] = max(bounds.get(key, 0.0), event.end_ns)
        for raw in _nested(events):
            program = int(raw.stats.get("program_id", 0))
            names[program] = raw.stats.get("hlo_module", "")
            run = int(raw.stats.get("run_id", 0))
            runs[program, run, int(raw.stats.get("device_ordinal", 0))].append(raw)
    for (program, run, device), raws in runs.items():
        known = _known(programs, program, names[program])
        starts = sorted(raw.start for raw in raws if known(raw).opcode not in CONTROL)
        whole = []
        for raw in raws:
            # Other threads may finish what this one began. The mark of the end comes after whatever that set off, so
            # the op is taken to last until the next one begins, if that is earlier.
            mark = ends.get(int(raw.stats.get("_p", 0)), raw.end)
            following = bisect.bisect_left(starts, raw.end)
            tail = min(mark, starts[following] if following < len(starts) else mark)
            longer = max(0.0, tail - raw.end)
            whole.append(raw._replace(end=raw.end + longer, own=raw.own + longer))
        start, end = min(raw.start for raw in raws), max(raw.end for raw in whole)
        end = max(end, bounds.get((device, run), end))
        yield _execution(names[program], f"/device:CPU:{device}", whole, known, start, end)


def _tpu(plane: Any, metadata: Mapping[str, _Event], programs: Programs) -> Iterator[Execution]:
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
        name, number = _program(module.name)
        known = _known(programs, number, name)
        yield _execution(name, plane.name, ops[first:last], known, module.start_ns, module.end_ns)


def _program(name: str) -> tuple[str, int]:
    """Name and number of a compiled program from what events call it, "jit_f(7)"."""
    found = re.fullmatch(r"(.*)\((-?\d+)\)", name)
    return (found[1], int(found[2])) if found else (name, 0)


def _instruction(name: str, metadata: Mapping[str, _Event]) -> str:
    """An op's name: events of a TPU bear the instruction's whole text."""
    if name in metadata and metadata[name].display:
        return metadata[name].display
    return name.split(" = ")[0].removeprefix("%")


def _gpu(plane: Any, programs: Programs) -> tuple[list[Execution], float]:
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
        # Kernels do not say which run they belong to, but each run begins with the same op, outside of any loop.
        first = raws[0].op, raws[0].name
        begins = [i for i, raw in enumerate(raws) if (raw.op, raw.name) == first]
        for i, j in zip(begins, [*begins[1:], len(raws)]):
            end = max(raw.end for raw in raws[i:j])
            known = _known(programs, program, names[program])
            found.append(_execution(names[program], plane.name, raws[i:j], known, raws[i].start, end))
    return found, unknown


def find(folder: Path) -> Path:
    """The newest trace in a folder or below it. Raises ValueError where there is none."""
    files = sorted(
        [*folder.glob("*.xplane.pb"), *folder.glob("**/plugins/profile/*/*.xplane.pb")],
        key=lambda path: path.stat().st_mtime,
    )
    if not files:
        raise ValueError(f"{folder} holds no trace (plugins/profile/*/*.xplane.pb)")
    return files[-1]


# ---- sums over repetitions


@dataclass(frozen=True)
class Spread:
    """A median over repetitions and the quartiles around it."""

    median: float
    low: float  # first quartile
    high: float  # third quartile

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        return cls(float(middle), float(low), float(high))


@dataclass(frozen=True)
class Part:
    """What one kernel or one scope costs in one execution: medians over the executions."""

    name: str
    phase: Phase
    seconds: float  # summed over its calls
    calls: float
    scope: str


def kernels(executions: Sequence[Execution]) -> list[Part]:
    """The kernels, most expensive first."""
    return _parts(executions, lambda kernel: (kernel.name, kernel.scope.phase, str(kernel.scope)))


def scopes(executions: Sequence[Execution], rename: Callable[[Scope], str] = str) -> list[Part]:
    """The scopes, most expensive first; `rename` may join several into one."""
    return _parts(executions, lambda kernel: (rename(kernel.scope), kernel.scope.phase, rename(kernel.scope)))


def _parts(executions: Sequence[Execution], key: Callable[[Kernel], tuple[str, Phase, str]]) -> list[Part]:
    seconds: dict[Any, list[float]] = {}
    calls: dict[Any, list[int]] = {}
    for i, execution in enumerate(executions):
        for kernel in execution.kernels:
            at = key(kernel)
            seconds.setdefault(at, [0.0] * len(executions))[i] += kernel.seconds
            calls.setdefault(at, [0] * len(executions))[i] += 1
    parts = [
        Part(name, phase, float(np.median(s)), float(np.median(calls[name, phase, scope])), scope)
        for (name, phase, scope), s in seconds.items()
    ]
    return sorted(parts, key=lambda part: -part.seconds)
