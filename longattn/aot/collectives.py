"""Reads the collectives of a compiled program: their kind, bytes and groups of devices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from longattn.aot.hlo import Computation, Instruction, Program, size
from longattn.cost.collective import Collective

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip


def collective(program: Program, computation: Computation, instruction: Instruction) -> Collective | None:
    """Returns the collective that an instruction is, starts or wraps, or None."""
    if (kind := _kind(instruction)) is not None:
        return _collective(computation, instruction, kind)
    inner = program.called(instruction)
    if inner is None:
        return None
    found = next((c for i in inner.instructions if (c := collective(program, inner, i)) is not None), None)
    if found is not None and found.kind == "all-reduce" and "all-reduce-scatter" in inner.name:
        # Each device keeps its shard of the sum, so the messages are those of a reduce-scatter.
        return replace(found, kind="reduce-scatter", bytes=found.bytes // 2)
    return found


def missing(program: Program, walked: Iterable[Computation]) -> list[str]:
    """Returns the names of a program's collectives that `collective` finds in no instruction of `walked`.

    Instructions of one channel are one collective: XLA repeats it in each fusion that it runs beside.
    """
    found = {_channel(i) for one in walked for outer in one.instructions if (i := _innermost(program, outer))}
    every = (i for one in program.computations.values() for i in one.instructions if _kind(i) is not None)
    return sorted(i.name for i in every if _channel(i) not in found)


def _kind(instruction: Instruction) -> str | None:
    """Returns the kind of the collective that an instruction itself is or starts, or None."""
    kind = instruction.opcode.removesuffix("-start")
    return kind if kind in KINDS else None


def _innermost(program: Program, instruction: Instruction) -> Instruction | None:
    """Returns the instruction that `collective` reads: the first collective inside all wrappers."""
    if _kind(instruction) is not None:
        return instruction
    inner = program.called(instruction)
    return None if inner is None else next((f for i in inner.instructions if (f := _innermost(program, i))), None)


def _channel(instruction: Instruction) -> str:
    return instruction.attribute("channel_id") or instruction.name


def _collective(computation: Computation, instruction: Instruction, kind: str) -> Collective:
    group, axes, pairs = _group(instruction.attributes)
    operands, devices = sum(size(t) for t in computation.operands(instruction)), max(1, len(group))
    share = {
        "all-gather": devices - 1,
        "all-reduce": 2 * (devices - 1) / devices,
        "reduce-scatter": (devices - 1) / devices,
        "all-to-all": (devices - 1) / devices,
        "ragged-all-to-all": (devices - 1) / devices,
        "collective-permute": 1,
        "collective-broadcast": 1,
    }[kind]
    return Collective(kind, round(operands * share), group, axes, instruction.scope, pairs)


def _group(text: str) -> tuple[tuple[int, ...], str, tuple[tuple[int, int], ...]]:
    """Returns, from a collective's attributes, the first group's devices, the mesh's axes if named, and the pairs.

    Raises ValueError for an unknown form.
    """
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:,? ?device_ids=\(([\d, ]*)\))?\s*\{([^}]*)\}", text):
        return *_of_mesh(*named.groups()), ()
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source, order = ([int(n) for n in (part or "").split(",") if n] for part in counted.groups())
        places = np.arange(math.prod(source)).reshape(source)
        return tuple((places.transpose(order) if order else places).reshape(shape)[0].tolist()), "", ()
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", text):
        return tuple(int(n) for n in listed[1].split(",") if n), "", ()
    if listed := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", text):
        pairs = tuple((int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", listed[1]))
        receivers, ring = dict(pairs), [pairs[0][0]] if pairs else []
        while ring and receivers.get(ring[-1], ring[0]) not in ring:
            ring.append(receivers[ring[-1]])
        return tuple(sorted(ring)), "", pairs
    raise ValueError(f"{text[:80]!r}: this form of a collective's groups is not known")


def _of_mesh(axes: str, ids: str | None, used: str) -> tuple[tuple[int, ...], str]:
    """Returns the first group of e.g. "'fsdp'=2,'seq'=4", None, "'seq'": all devices along the used axes.

    The arguments are the axes, device ids or None, and the used axes. A used axis may be a factor of an axis:
    'a':(2)4 is the second factor of 'a' = 2 * 4 * rest.
    """
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used)
    shape: list[int] = []
    taken: list[bool] = []
    for name, whole in sizes.items():
        done = 1
        for _, before, part in sorted((p for p in parts if p[0] == name), key=lambda p: int(p[1] or 1)):
            skipped, width = int(before or 1) // done, int(part or whole)
            shape += [skipped, width]
            taken += [False, True]
            done *= skipped * width
        shape.append(whole // done)
        taken.append(False)
    places = np.arange(math.prod(shape)) if ids is None else np.array([int(n) for n in ids.split(",")])
    group = places.reshape(shape)[tuple(slice(None) if t else 0 for t in taken)].reshape(-1)
    names = ",".join(dict.fromkeys(name for name, _, _ in parts))
    return tuple(sorted(group.tolist())), "" if re.search(r"axis_\d", names) else names
