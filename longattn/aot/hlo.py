"""Parses XLA's compiled programs.

The text of a compiled program (`compiled.as_text()`) is the compiler's schedule: the instructions of a computation run
in the order in which they are written.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,<= ]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEAD = re.compile(r"^(ENTRY )?%?(\S+) \(.*-> .*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = ")
_OPERAND = re.compile(r"%([^\s,()#]+)(?:#(\d+))?")
_END = re.compile(r"^\}(, execution_thread=\"[^\"]*\")?$")  # attributes over several lines may begin a line with } too
_COMMENT = re.compile(r"/\*.*?\*/")
# Opcodes that run another computation once, and the attribute that names it. libtpu moves collectives of a tpu7x to its
# sparse cores as call-start, which some of its dumps write as an async-start whose computation is one call. XLA for
# GPUs writes small sums as fusion-start.
_WRAPPERS = {
    "fusion": "calls", "fusion-start": "calls", "async-start": "calls", "call": "to_apply", "call-start": "to_apply",
}  # fmt: skip


@dataclass(frozen=True)
class Array:
    """Shape, dtype and place of one array."""

    dtype: str
    shape: tuple[int, ...]
    space: int  # memory space: 0 is HBM, others are on the chip or the host

    @property
    def bytes(self) -> int:
        """Bytes without the padding of tiles."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(re.sub(r"^[a-z]+", "", self.dtype.split("e")[0] if "e" in self.dtype else self.dtype) or 8)
        return math.prod(self.shape) * bits // 8


Type = Any  # an Array, or a tuple of types


def leaves(kind: Type) -> Iterator[Array]:
    """Yields the arrays of a type in order."""
    if isinstance(kind, Array):
        yield kind
    else:
        for inner in kind:
            yield from leaves(inner)


def size(kind: Type, *, space: int | None = None) -> int:
    """Returns the bytes of all arrays of a type, or of those in one memory space."""
    return sum(a.bytes for a in leaves(kind) if space is None or a.space == space)


@dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation."""

    name: str
    type: Type
    opcode: str
    operands: tuple[tuple[str, int | None], ...]  # (name, element of its tuple or None)
    literal: str  # text between the parentheses: a constant's value, a parameter's number
    attributes: str  # the rest of the line
    root: bool

    def attribute(self, name: str) -> str | None:
        """Returns the word that an attribute is set to, such as a computation's name."""
        found = re.search(rf"\b{name}=%?([^\s,{{}}]+)", self.attributes)
        return found[1] if found else None

    def required(self, name: str) -> str:
        """Returns an attribute that every instruction of this opcode has. Raises ValueError if it is missing."""
        if (found := self.attribute(name)) is None:
            raise ValueError(f"{self.name} has no {name}: this form of program is not known")
        return found

    @property
    def scope(self) -> str:
        """The jax scopes in which it was traced, joined by slashes."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True, eq=False)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @property
    def root(self) -> Instruction:
        return next(i for i in self.instructions if i.root)

    def operand(self, instruction: Instruction, i: int) -> Type:
        """Returns the type of an instruction's i-th operand."""
        name, element = instruction.operands[i]
        kind = self.by_name[name].type
        return kind if element is None else kind[element]

    def operands(self, instruction: Instruction) -> tuple[Type, ...]:
        return tuple(self.operand(instruction, i) for i in range(len(instruction.operands)))


@dataclass(frozen=True, eq=False)
class Program:
    """A module: computations by name, and the entry."""

    computations: Mapping[str, Computation]
    entry: Computation

    def called(self, instruction: Instruction) -> Computation | None:
        """Returns the computation inside a fusion, a call or an asynchronous wrapper, or None."""
        return self.inside(instruction) if instruction.opcode in _WRAPPERS else None

    def inside(self, instruction: Instruction) -> Computation:
        """Returns the computation inside an instruction that must have one, such as a fusion."""
        return self.computations[instruction.required(_WRAPPERS.get(instruction.opcode, "calls"))]

    def branches(self, instruction: Instruction) -> list[Computation]:
        """Returns the branches of a conditional."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = listed[1].replace("%", "").split(", ") if listed else []
        names += [n for key in ("true_computation", "false_computation") if (n := instruction.attribute(key))]
        return [self.computations[name] for name in names]


def parse(text: str) -> Program:
    """Parses the text of a compiled module. Raises ValueError if it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry = name = None
    lines: list[Instruction] = []
    for line in _joined(text):
        if name is None:
            if head := _HEAD.match(line):
                name, lines = head[2], []
                entry = name if head[1] else entry
        elif _END.match(line):
            computations[name] = Computation(name, tuple(lines))
            name = None
        elif found := _NAME.match(line):
            lines.append(_instruction(found[2], line[found.end() :], bool(found[1])))
    if entry is None:
        raise ValueError("the text is no compiled program: it has no entry computation")
    return Program(computations, computations[entry])


def _joined(text: str) -> Iterator[str]:
    """Yields lines, with instructions joined whose attributes contain line breaks."""
    line = ""
    for part in text.splitlines():
        begins = _NAME.match(part) or _END.match(part) or part.startswith(("%", "ENTRY"))
        if line and not begins and not _END.match(line):
            line += " " + part
            continue
        if line:
            yield line
        line = part
    if line:
        yield line


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    kind, at = _type(rest, 0)
    opened = rest.index("(", at)
    closed = _closing(rest, opened)
    literal = _COMMENT.sub("", rest[opened + 1 : closed])
    opcode = rest[at:opened].strip()
    operands = () if opcode in ("constant", "parameter") else _OPERAND.findall(literal)
    return Instruction(
        name, kind, opcode, tuple((n, int(e) if e else None) for n, e in operands), literal, rest[closed + 1 :], root
    )


def _type(text: str, at: int) -> tuple[Type, int]:
    """Parses the type at `at`; returns it and its end."""
    if text[at] != "(":
        found = _ARRAY.match(text, at)
        if found is None:
            raise ValueError(f"{text[at : at + 40]!r} is no type of a compiled program: this form is not known")
        dims = tuple(int(d.strip("<= ")) for d in found[2].split(",") if d)
        space = _SPACE.search(found[3] or "")
        return Array(found[1], dims, int(space[1]) if space else 0), found.end()
    inner: list[Type] = []
    at += 1
    while text[at] != ")":
        skipped = re.compile(r"(?:,|\s|/\*.*?\*/)*").match(text, at)
        at = skipped.end() if skipped else at
        if text[at] == ")":
            break
        kind, at = _type(text, at)
        inner.append(kind)
    return tuple(inner), at + 1


def _closing(text: str, opened: int) -> int:
    """Returns the position of the parenthesis that closes the one at `opened`."""
    depth = 0
    for at in range(opened, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"{text[opened : opened + 40]!r} is not closed: this form of program is not known")
