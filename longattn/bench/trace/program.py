"""The instructions of a compiled program, as a trace stores them, with the scope of each."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

from longattn.bench.trace.protobuf import fields, integers, text
from longattn.bench.trace.scope import Scope, scope_of


class Op(NamedTuple):
    """An instruction of a compiled program."""

    opcode: str
    scope: Scope


@dataclass(frozen=True, eq=False)
class Stored:
    """A program as a trace stores it. A trace holds every program of its process, most of which it never ran."""

    name: str
    module: memoryview  # a serialised HloModuleProto

    @functools.cached_property
    def ops(self) -> dict[str, Op]:
        """Instructions by name, read on first use."""
        return program_ops(self.module)


@dataclass(eq=False)
class _Instruction:
    name: str
    opcode: str
    op_name: str  # "" for an instruction that XLA made
    parameter: int  # a parameter's number
    called: tuple[int, ...]  # computations
    operands: list[_Instruction]
    users: list[_Instruction]


# Operations that only move their operand.
_MOVES = frozenset({"copy", "dynamic_slice", "reshape", "slice", "squeeze", "transpose"})


_PRODUCTS = ("dot", "convolution")


def program_ops(module: bytes | memoryview) -> dict[str, Op]:
    """Returns the instructions of a serialised HloModuleProto by name.

    A fusion with a matrix product gets the scope of its first one: the product takes the time, while XLA names the
    fusion after its last operation. An instruction without a name was made by XLA, on a CPU even products with several
    batch axes. It gets the scope of its nearest user. An unnamed product gets the scope of an operand's slice or copy
    that was made for it alone, if the same scope surrounds both. The last resort is the scope of the instruction in
    whose body it stands.
    """
    program = _program(module)
    return {
        row.name: Op(row.opcode, scope_of(program.op_name(row, computation)))
        for computation, rows in program.bodies.items()
        for row in rows
    }


@dataclass(frozen=True)
class _Program:
    """The instructions of every computation, and the (computation, instruction) that calls it."""

    bodies: dict[int, list[_Instruction]]
    callers: dict[int, tuple[int, _Instruction]]

    def op_name(self, row: _Instruction, computation: int) -> str:
        """Returns the name that tells an instruction's scope."""
        name = ""
        if row.opcode == "fusion":
            name = next((self.product(x, row) for x in self.bodies[row.called[0]] if x.opcode in _PRODUCTS), "")
        elif row.opcode in _PRODUCTS:
            caller = self.callers[computation][1] if computation in self.callers else None
            name = self.product(row, caller if caller is not None and caller.opcode == "fusion" else None)
        return name or row.op_name or self.used(row) or self.around(computation)

    def used(self, row: _Instruction, depth: int = 8) -> str:
        """Returns the name of the nearest user that has one."""
        for user in row.users if depth else ():
            inside = [user]
            if user.opcode == "fusion":
                places = {i for i, operand in enumerate(user.operands) if operand is row}
                body = self.bodies[user.called[0]]
                parameters = (r for r in body if r.opcode == "parameter" and r.parameter in places)
                inside = [r for parameter in parameters for r in parameter.users] or inside
            for one in inside:
                if found := one.op_name or self.used(one, depth - 1):
                    return found
        return ""

    def product(self, row: _Instruction, fusion: _Instruction | None) -> str:
        """Returns the name of a product, which may stand in a fusion."""
        if row.op_name:
            return row.op_name
        after = self.used(row) if row.users or fusion is None else self.used(fusion)
        operands = [
            fusion.operands[x.parameter] if fusion is not None and x.opcode == "parameter" else x for x in row.operands
        ]
        if after.endswith("/dot_general"):
            return after
        moved = [x.op_name for x in operands if len(x.users) == 1 and x.op_name.split("/")[-1] in _MOVES]
        *outer, _ = scope_of(after).path or ("",)
        beside = [name for name in moved if scope_of(name).path and list(scope_of(name).path[:-1]) == outer]
        return after if not beside or scope_of(after) in map(scope_of, moved) else beside[0]

    def around(self, computation: int) -> str:
        """Returns the name of the nearest caller that has one."""
        while computation in self.callers:
            computation, caller = self.callers[computation]
            if caller.op_name:
                return caller.op_name
        return ""


def _program(module: bytes | memoryview) -> _Program:
    """Returns a serialised HloModuleProto's instructions, linked to their operands, users and callers."""
    # xla/service/hlo.proto: HloModuleProto.computations = 3; HloComputationProto.instructions = 2, .id = 5;
    # HloInstructionProto.name = 1, .opcode = 2, .metadata = 7 (op_name = 2), .parameter_number = 9, .id = 35,
    # .operand_ids = 36, .called_computation_ids = 38.
    bodies: dict[int, list[_Instruction]] = {}
    callers: dict[int, tuple[int, _Instruction]] = {}
    for body in map(fields, fields(memoryview(module))[3]):
        by_id: dict[int, _Instruction] = {}
        reads: list[tuple[_Instruction, list[int]]] = []
        for entry in map(fields, body.get(2, ())):
            op_name = text(fields(entry[7][-1]), 2) if 7 in entry else ""
            row = _Instruction(
                text(entry, 1), text(entry, 2), op_name if "/" in op_name else "", entry.get(9, (0,))[-1],
                tuple(integers(entry.get(38, ()))), [], [],
            )  # fmt: skip
            by_id[entry[35][-1]] = row
            reads.append((row, list(integers(entry.get(36, ())))))
            callers |= dict.fromkeys(row.called, (body[5][-1], row))
        for row, operands in reads:
            row.operands.extend(by_id[i] for i in operands)
            for operand in row.operands:
                operand.users.append(row)
        bodies[body[5][-1]] = [row for row, _ in reads]
    return _Program(bodies, callers)
