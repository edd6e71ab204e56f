"""XLA's compiled programs, read: what each instruction computes, moves and sends, and how often it runs.

The text of a compiled program (`compiled.as_text()`) is the compiler's schedule: within a computation instructions run
in the order in which they stand. What is counted here is counted with its loops, which XLA's own cost analysis is not:
a loop whose bound is a constant counts as often as it runs, one whose bound is data (blockwise attention's) is named.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longattn.cost.collective import Collective

KINDS = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
    "collective-broadcast",
)  # fmt: skip

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"(\w+)\[([\d,<= ]*)\](\{[^{}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")
_HEAD = re.compile(r"^(ENTRY )?%?(\S+) \(.*-> .*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([^\s=]+) = ")
_OPERAND = re.compile(r"%([^\s,()#]+)(?:#(\d+))?")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclass(frozen=True)
class Array:
    """Shape, dtype and place of one array."""

    dtype: str
    shape: tuple[int, ...]
    space: int  # memory: 0 is the device's own (HBM), others lie on the chip or the host

    @property
    def bytes(self) -> int:
        """Without the padding of its tiles."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            bits = int(re.sub(r"^[a-z]+", "", self.dtype.split("e")[0] if "e" in self.dtype else self.dtype) or 8)
        return math.prod(self.shape) * bits // 8


Type = Any  # an Array, or a tuple of types


def leaves(kind: Type) -> Iterator[Array]:
    """The arrays of a type, in order."""
    if isinstance(kind, Array):
        yield kind
    else:
        for inner in kind:
            yield from leaves(inner)


def size(kind: Type, *, space: int | None = None) -> int:
    """Bytes of all arrays of a type; `space`: of those that lie there."""
    return sum(a.bytes for a in leaves(kind) if space is None or a.space == space)


@dataclass(frozen=True, eq=False)
class Instruction:
    """One line of a computation."""

    name: str
    type: Type
    opcode: str
    operands: tuple[tuple[str, int | None], ...]  # names, and the element where one of a tuple's is meant
    literal: str  # what stands between the parentheses: a constant's value, a parameter's number
    attributes: str  # the rest of the line
    root: bool

    def attribute(self, name: str) -> str | None:
        """The computation or the word that an attribute names."""
        found = re.search(rf"\b{name}=%?([^\s,{{}}]+)", self.attributes)
        return found[1] if found else None

    @property
    def scope(self) -> str:
        """The names of jax's scopes in which it was traced, with slashes."""
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
        """The type of an instruction's i-th operand."""
        name, element = instruction.operands[i]
        kind = self.by_name[name].type
        return kind if element is None else kind[element]

    def operands(self, instruction: Instruction) -> tuple[Type, ...]:
        return tuple(self.operand(instruction, i) for i in range(len(instruction.operands)))


@dataclass(frozen=True, eq=False)
class Program:
    """A module: computations by name, and where it begins."""

    computations: Mapping[str, Computation]
    entry: Computation

    def called(self, instruction: Instruction) -> Computation | None:
        """What a fusion or an asynchronous wrapper calls."""
        name = instruction.attribute("calls")
        return None if name is None else self.computations[name]

    def branches(self, instruction: Instruction) -> list[Computation]:
        """What a conditional chooses from."""
        listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = listed[1].replace("%", "").split(", ") if listed else []
        names += [n for key in ("true_computation", "false_computation") if (n := instruction.attribute(key))]
        return [self.computations[name] for name in names]


def parse(text: str) -> Program:
    """The program of a compiled module's text.

    Raises:
      ValueError: for a text that holds no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = name = None
    lines: list[Instruction] = []
    for line in _joined(text):
        if name is None:
            if head := _HEAD.match(line):
                name, lines = head[2], []
                entry = name if head[1] else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, tuple(lines))
            name = None
        elif found := _NAME.match(line):
            lines.append(_instruction(found[2], line[found.end() :], bool(found[1])))
    if entry is None:
        raise ValueError("the text is no compiled program: it has no entry computation")
    return Program(computations, computations[entry])


def _joined(text: str) -> Iterator[str]:
    """Lines, where an instruction whose attributes hold line breaks is one."""
    line = ""
    for part in text.splitlines():
        if line and not (_NAME.match(part) or part.startswith(("}", "%", "ENTRY"))):
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
    """The type that begins there, and where it ends."""
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
        at = skipped.end()
        if text[at] == ")":
            break
        kind, at = _type(text, at)
        inner.append(kind)
    return tuple(inner), at + 1


def _closing(text: str, opened: int) -> int:
    """Where the parenthesis that opens there is closed."""
    depth = 0
    for at in range(opened, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"{text[opened : opened + 40]!r} is not closed: this form of program is not known")


# ---- what an instruction costs


def trips(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """How often a while loop of `computation` runs, where its bound, start and step are constants; else None."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition, body = (program.computations[loop.attribute(name)] for name in ("condition", "body"))
    test = condition.root
    operands = list(test.operands)
    if test.opcode == "fusion":  # the comparison alone, wrapped
        inner = program.called(test)
        outer = dict(zip((i.name for i in _parameters(inner)), test.operands))
        test = inner.root
        operands = [outer.get(name, (name, element)) for name, element in test.operands]
    if test.opcode != "compare" or test.attribute("direction") not in ("LT", "LE"):
        return None
    counter, limit = (_element(condition, operand) for operand in operands)
    bound = _constant(condition, operands[1]) if limit is None else _initial(computation, loop, limit)
    if limit is not None and _element(body, _source(body, body.root, limit)) != limit:
        return None  # the bound changes while the loop runs
    start = None if counter is None else _initial(computation, loop, counter)
    step = None if counter is None else _step(body, counter)
    if bound is None or start is None or not step:
        return None
    return max(0, -(-(bound - start + (test.attribute("direction") == "LE")) // step))


_COPIES = ("copy", "bitcast", "copy-done", "copy-start")


def _initial(computation: Computation, loop: Instruction, element: int) -> int | None:
    """The constant that an element of the loop's tuple starts from."""
    carried = computation.by_name[loop.operands[0][0]]
    return _constant(computation, _source(computation, carried, element))


def _step(body: Computation, element: int) -> int | None:
    """The constant that the body adds to an element."""
    added = body.by_name[_source(body, body.root, element)[0]]
    while added.opcode in _COPIES:
        added = body.by_name[added.operands[0][0]]
    if added.opcode != "add":
        return None
    for counter, other in (added.operands, added.operands[::-1]):
        if _element(body, counter) == element:
            return _constant(body, other)
    return None


def _parameters(computation: Computation) -> list[Instruction]:
    found = [i for i in computation.instructions if i.opcode == "parameter"]
    return sorted(found, key=lambda i: int(i.literal))


def _element(computation: Computation, operand: tuple[str, int | None]) -> int | None:
    """Which element of the computation's tuple an operand is; None where it is none."""
    name, element = operand
    instruction = computation.by_name[name]
    if instruction.opcode == "parameter":
        return element
    if instruction.opcode == "get-tuple-element":
        return int(instruction.attribute("index"))
    return _element(computation, instruction.operands[0]) if instruction.opcode in ("copy", "bitcast") else None


def _source(computation: Computation, carried: Instruction, element: int) -> tuple[str, int | None]:
    """Where the element of a tuple comes from."""
    return carried.operands[element] if carried.opcode == "tuple" else (carried.name, element)


def _constant(computation: Computation, operand: tuple[str, int | None]) -> int | None:
    name, element = operand
    instruction = computation.by_name[name]
    if instruction.opcode == "constant" and element is None and re.fullmatch(r"-?\d+", instruction.literal):
        return int(instruction.literal)
    if instruction.opcode in _COPIES:
        return _constant(computation, instruction.operands[0])
    return None


def flops(program: Program, computation: Computation, instruction: Instruction) -> float:
    """FLOPs of the matrix products in one run of an instruction, of all it calls; a loop counts 0 here."""
    if instruction.opcode == "dot":
        lhs = computation.operand(instruction, 0)
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        summed = math.prod(lhs.shape[int(d)] for d in contracted[1].split(",") if d) if contracted else 1
        return 2.0 * math.prod(instruction.type.shape) * summed
    if instruction.opcode == "convolution":
        return _convolution(computation, instruction)
    if instruction.opcode == "custom-call":
        stated = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
        return float(stated[1]) if stated else 0.0
    if instruction.opcode == "fusion":
        inner = program.called(instruction)
        return sum(flops(program, inner, i) for i in inner.instructions)
    return 0.0


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """A TPU's products: dimensions of a batch are written as windows that see a single position each."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    lhs, rhs = computation.operand(instruction, 0), computation.operand(instruction, 1)
    out, spatial = instruction.type, [c for c in labels[1] if c.isdigit()]

    def of(name: str, default: int) -> list[int]:
        return [int(x) for x in fields[name].split("x")] if name in fields else [default] * len(spatial)

    kernel, stride, dilated, spread = of("size", 1), of("stride", 1), of("lhs_dilate", 1), of("rhs_dilate", 1)
    pads = fields["pad"].split("x") if "pad" in fields else ["0_0"] * len(spatial)
    products = out.shape[labels[3].index("b")] * out.shape[labels[3].index("f")] * rhs.shape[labels[2].index("i")]
    for c in spatial:
        d = int(c)
        low = int(pads[d].split("_")[0])
        inputs, outputs = lhs.shape[labels[1].index(c)], out.shape[labels[3].index(c)]
        products *= _seen(inputs, outputs, kernel[d], stride[d], low, dilated[d], spread[d])
    return 2.0 * products


@functools.lru_cache(maxsize=4096)
def _seen(inputs: int, outputs: int, kernel: int, stride: int, low: int, dilated: int, spread: int) -> int:
    """Pairs (output, element of the window) that meet an element of the input and not padding."""
    last = (inputs - 1) * dilated
    total = 0
    for k in range(kernel):
        shift = k * spread - low
        positions = range(shift, shift + outputs * stride, stride)
        total += sum(1 for p in positions if 0 <= p <= last and p % dilated == 0)
    return total


_MOVES_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "copy-done",
    "after-all", "partition-id", "replica-id", "iota", "opt-barrier", "add-dependency",
}  # fmt: skip


_HOST = 5  # the memory space of the host, seen from a device


def host_bytes(computation: Computation, instruction: Instruction) -> int:
    """Bytes between device and host memory in one run of an instruction of a schedule; a loop counts 0 here."""
    opcode = instruction.opcode
    if opcode in _MOVES_NOTHING or opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
        return 0
    arrays = [a for kind in (*computation.operands(instruction), instruction.type) for a in leaves(kind)]
    if not any(a.space == _HOST for a in arrays):
        return 0
    return max((a.bytes for a in arrays if a.space != _HOST), default=0)  # of a larger array on the host, a slice


def hbm_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Bytes between device memory and the chip in one run of an instruction of a schedule; a loop counts 0 here.

    An operand of which only a slice is read counts as the slice, a result that is updated in place as the update.
    """
    opcode = instruction.opcode
    if opcode in _MOVES_NOTHING or opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
        return 0
    if opcode == "async-start":
        inner = program.called(instruction)
        return sum(hbm_bytes(program, inner, i) for i in inner.instructions)
    if moved := host_bytes(computation, instruction):
        return moved
    operands = computation.operands(instruction)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return (size(instruction.type) if size(operands[0], space=0) else 0) + size(instruction.type, space=0)
    if opcode == "dynamic-update-slice":
        return size(operands[1], space=0) + (size(operands[1]) if size(instruction.type, space=0) else 0)
    if opcode == "copy-start":
        return size(operands[0], space=0) + sum(a.bytes for a in leaves(instruction.type[0]) if a.space == 0)
    inner = program.called(instruction) if opcode == "fusion" else None
    if inner is None:
        return sum(size(kind, space=0) for kind in operands) + size(instruction.type, space=0)
    parameters = _parameters(inner)
    read = sum(
        min(size(kind, space=0), _read(program, inner, parameter))
        for kind, parameter in zip(operands, parameters, strict=True)
    )
    return read + _written(inner)


def _read(program: Program, computation: Computation, parameter: Instruction) -> int:
    """Bytes of a fusion's parameter that it reads."""
    users = [i for i in computation.instructions if any(name == parameter.name for name, _ in i.operands)]
    total = 0
    for user in users:
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0][0] == parameter.name:
            total += size(user.type)
        elif user.opcode == "dynamic-update-slice" and user.operands[0][0] == parameter.name:
            pass  # updated in place
        elif user.opcode == "bitcast":
            total += _read(program, computation, user)
        elif user.opcode == "fusion":
            inner = program.called(user)
            inside = zip(_parameters(inner), user.operands, strict=True)
            total += sum(_read(program, inner, p) for p, (name, _) in inside if name == parameter.name)
        else:
            return size(parameter.type)
    return min(total, size(parameter.type))


def _written(computation: Computation) -> int:
    """Bytes that a fusion writes to device memory."""

    def one(instruction: Instruction) -> int:
        if instruction.opcode == "tuple":
            return sum(one(computation.by_name[name]) for name, _ in instruction.operands)
        if instruction.opcode == "dynamic-update-slice":
            return size(computation.operand(instruction, 1)) if size(instruction.type, space=0) else 0
        if instruction.opcode == "bitcast":
            return one(computation.by_name[instruction.operands[0][0]])
        return size(instruction.type, space=0)

    return one(computation.root)


# ---- what devices send each other


def collective(program: Program, computation: Computation, instruction: Instruction) -> Collective | None:
    """The collective that an instruction is, starts or wraps; None where it is none."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        return _collective(computation, instruction, kind)
    inner = program.called(instruction) if instruction.opcode in ("fusion", "async-start") else None
    if inner is None:
        return None
    found = next((c for i in inner.instructions if (c := collective(program, inner, i)) is not None), None)
    if found is not None and found.kind == "all-reduce" and "all-reduce-scatter" in inner.name:
        # Of the sum each device keeps its part: what is sent is what a reduce-scatter sends.
        return replace(found, kind="reduce-scatter", bytes=found.bytes // 2)
    return found


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
    """(devices of the first group, the mesh's axes where they are named, pairs) of a collective's attributes.

    Raises:
      ValueError: for a form that is not known.
    """
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:,? ?device_ids=\(([\d, ]*)\))?\s*\{([^}]*)\}", text):
        return *_of_mesh(*named.groups()), ()
    if counted := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, source, order = ([int(n) for n in part.split(",")] if part else None for part in counted.groups())
        places = np.arange(math.prod(source)).reshape(source)
        return tuple((places if order is None else places.transpose(order)).reshape(shape)[0].tolist()), "", ()
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
    """The first group of "'fsdp'=2,'seq'=4", device ids or None, "'seq'": all devices along the axes that are used.

    A used axis may be a part: 'a':(2)4 is the second factor of 'a' = 2 * 4 * rest.
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
