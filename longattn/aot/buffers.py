"""Reads from XLA's dump which buffers a program holds in device memory at its peak.

With `xla_dump_to`, XLA writes how much memory a program needs and which values are alive when, whether it fits or not.
A parameter is named by its path in the state, a temporary by the scope it was traced in.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from longattn.aot.hlo import Array, Computation, Instruction, Program, Type
from longattn.cost.collective import BUFFER_KINDS

_TOTAL = re.compile(r"^Total bytes(?: used)?: (\d+)", re.MULTILINE)
_ALLOCATION = re.compile(r"^allocation (\d+): size \d+(?:, color (\d+))?")
_VALUE = re.compile(r"^ value: <\d+ (\S+)(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\)")
_RANGE = re.compile(r"^ +(\S+):(\d+)-(\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Buffer:
    """A value that is alive at the peak."""

    name: str  # a path in the state, or the scope that computed it
    kind: str  # one of BUFFER_KINDS
    type: str  # such as bf16[8,4096]
    bytes: int


def account(folder: Path, program: Program, weights: Iterable[tuple[int, ...]]) -> tuple[int, list[Buffer]]:
    """Returns the bytes of device memory that a program needs, and the buffers alive at its peak, largest first.

    The buffers sum up to less than the need, because there are gaps between them.

    Args:
      folder: XLA's dump.
      program: the compiled program.
      weights: shapes of parameters, whole and as sharded.

    Raises:
      ValueError: XLA's report has an unknown form.
    """
    total = _TOTAL.search(read(folder, "-memory-usage-report.txt"))
    values = _values(read(folder, "-buffer-assignment.txt"))
    ranges = _RANGE.findall(read(folder, "-live-range.txt").partition("BufferLiveRange:")[2])
    if total is None or not values or not ranges:
        raise ValueError("XLA's account of the program's memory is not of a known form")
    spans = [(values[n], n, int(start), int(end)) for name, start, end in ranges if (n := _plain(name)) in values]
    at = _peak(spans)
    known = {_squeezed(shape) for shape in weights}
    by_name = {i.name: (c, i) for c in program.computations.values() for i in c.instructions}
    found: dict[tuple[int, int], Buffer] = {}
    for value, name, start, end in spans:
        instruction, _, element = name.removesuffix("}").partition("{")
        # One value at a time occupies a place, but under several names: the largest is the value.
        if start <= at <= end and instruction in by_name and value.bytes > getattr(found.get(value.place), "bytes", 0):
            found[value.place] = _buffer(*by_name[instruction], element, value.bytes, known)
    return int(total[1]), sorted(found.values(), key=lambda b: -b.bytes)


def _peak(spans: list[tuple[_Value, str, int, int]]) -> int:
    """Returns the step of the schedule at which the places in use are largest in total."""
    changes: list[tuple[int, int, tuple[int, int], int]] = []
    for value, _, start, end in spans:
        changes += [(start, 1, value.place, value.bytes), (end + 1, 0, value.place, value.bytes)]
    used: dict[tuple[int, int], list[int]] = {}
    total = best = at = 0
    for step, begins, place, size in sorted(changes):
        held = used.setdefault(place, [])
        before = max(held, default=0)
        if begins:
            held.append(size)
        else:
            held.remove(size)
        total += max(held, default=0) - before
        if total > best:
            best, at = total, step
    return at


def read(folder: Path, ending: str) -> str:
    """Reads one file of XLA's dump: ".txt" is the compiled program, whether it fits or not.

    Raises ValueError if there is no such file.
    """
    found = sorted(folder.glob(f"*after_optimizations{ending}"), key=lambda path: path.stat().st_size)
    if not found:
        raise ValueError(f"XLA wrote no {ending.removeprefix('-')}: this version is not known")
    return found[-1].read_text()  # the largest is the program's: jax compiles small ones beside it


@dataclass(frozen=True)
class _Value:
    """Place and size of a value."""

    place: tuple[int, int]  # allocation, offset
    bytes: int


def _values(text: str) -> dict[str, _Value]:
    """Returns the values in device memory by name."""
    values: dict[str, _Value] = {}
    allocation, color = 0, 0
    for line in text.splitlines():
        if head := _ALLOCATION.match(line):
            allocation, color = int(head[1]), int(head[2] or 0)
        elif color == 0 and (value := _VALUE.match(line)):
            values[_plain(value[1])] = _Value((allocation, int(value[3])), int(value[2]))
    return values


def _plain(name: str) -> str:
    return name.removesuffix("{}")


def _squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    """Returns a shape's sizes sorted and without ones, since compilers transpose and reshape."""
    return tuple(sorted(n for n in shape if n > 1))


def _buffer(
    computation: Computation, instruction: Instruction, element: str, size: int, weights: set[tuple[int, ...]]
) -> Buffer:
    kind: Type = instruction.type
    for i in element.split(","):
        if i and not isinstance(kind, Array):
            kind = kind[int(i)]
    scope = _scope(computation, instruction)
    array = kind if isinstance(kind, Array) else None
    shown = f"{array.dtype}[{','.join(map(str, array.shape))}]" if array else "tuple"
    return Buffer(short(scope) or instruction.name, _kind(instruction, scope, array, weights), shown, size)


def _scope(computation: Computation, instruction: Instruction, depth: int = 3) -> str:
    """Returns an instruction's scope, or that of its first user: instructions inserted by the compiler have none."""
    if instruction.scope or depth == 0:
        return instruction.scope
    users = (i for i in computation.instructions if any(name == instruction.name for name, _ in i.operands))
    return next((scope for user in users if (scope := _scope(computation, user, depth - 1))), "")


def _kind(instruction: Instruction, scope: str, array: Array | None, weights: set[tuple[int, ...]]) -> str:
    if instruction.opcode == "parameter" and scope.startswith(("state", "batch")):
        return "batch" if scope.startswith("batch") else "parameters" if "params" in scope[:13] else "moments"
    if array is not None and len(_squeezed(array.shape)) > 1 and _squeezed(array.shape) in weights:
        copied = array.dtype != "f32" or scope.startswith("state")
        return "gathered or cast parameters" if copied else "gradients"
    if "transpose(" in scope or "rematted" in scope:
        return "backward pass"
    return "forward pass" if "jvp(" in scope else "other"


def short(scope: str) -> str:
    """Removes the names of jax's transformations from a scope."""
    parts = [part for part in scope.split(";")[0].replace("\\'", "'").split("/") if part not in _NOISE]
    path = "/".join(part for part in parts if not part.startswith(("jvp(", "transpose(", "jit(")))
    if "transpose(" in scope:
        return f"backward {path}".rstrip()
    return path or ("forward" if "jvp(" in scope else "")


_NOISE = {"while", "body", "eval_jaxpr", "checkpoint", "rematted_computation", "layers", "shard_map", "closed_call"}


def by_kind(buffers: Iterable[Buffer]) -> Mapping[str, int]:
    """Returns bytes by kind, in the order of BUFFER_KINDS."""
    buffers = list(buffers)
    return {kind: sum(b.bytes for b in buffers if b.kind == kind) for kind in BUFFER_KINDS}
