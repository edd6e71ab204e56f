"""The instructions of a compiled program, as a trace stores them, with the scope of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from longattn.bench.trace.protobuf import fields, integers, text
from longattn.bench.trace.scope import Scope, scope_of


class Op(NamedTuple):
    """An instruction of a compiled program."""

    opcode: str
    scope: Scope


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


def program_ops(module: bytes | memoryview) -> dict[str, Op]:
    """Return the instructions of a serialised HloModuleProto by name.

    A fusion with a matrix product gets the scope of its first one: the product takes the time, while XLA names the
    fusion after its last operation. An instruction without a name was made by XLA, on a CPU even products with several
    batch axes. It gets the scope of its nearest user. An unnamed product gets the scope of an operand's slice or copy
    that was made for it alone, if the same scope surrounds both. The last resort is the scope of the instruction in
    whose body it stands.
    """
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

    def used(row: _Instruction, depth: int = 8) -> str:
        """Return the name of the nearest user that has one."""
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
        """Return the name of a product, which may stand in a fusion."""
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
