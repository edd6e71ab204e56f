"""Counts what one instruction of a compiled program computes and moves, and how often a loop runs.

XLA's own cost analysis counts a loop's body once. `trips` says how often it runs, if its bound is a constant.
"""

from __future__ import annotations

import functools
import math
import re

from longattn.aot.hlo import Computation, Instruction, Program, leaves, size


def trips(program: Program, computation: Computation, loop: Instruction) -> int | None:
    """Returns how often a while loop of `computation` runs, or None unless bound, start and step are constants."""
    if known := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    condition, body = (program.computations[loop.required(name)] for name in ("condition", "body"))
    test = condition.root
    operands = list(test.operands)
    if test.opcode == "fusion":  # it wraps the comparison
        inner = program.inside(test)
        outer = dict(zip((i.name for i in _parameters(inner)), test.operands))
        test = inner.root
        operands = [outer.get(name, (name, element)) for name, element in test.operands]
    if test.opcode != "compare" or test.attribute("direction") not in ("LT", "LE"):
        return None
    counter, limit = (_element(condition, operand) for operand in operands)
    bound = _constant(condition, operands[1]) if limit is None else _initial(computation, loop, limit)
    if limit is not None and _element(body, _source(body, body.root, limit)) != limit:
        return None  # the loop changes its bound
    start = None if counter is None else _initial(computation, loop, counter)
    step = None if counter is None else _step(body, counter)
    if bound is None or start is None or not step:
        return None
    return max(0, -(-(bound - start + (test.attribute("direction") == "LE")) // step))


_COPIES = ("copy", "bitcast", "copy-done", "copy-start")


def _initial(computation: Computation, loop: Instruction, element: int) -> int | None:
    """Returns the constant that an element of the loop's tuple starts from."""
    carried = computation.by_name[loop.operands[0][0]]
    return _constant(computation, _source(computation, carried, element))


def _step(body: Computation, element: int) -> int | None:
    """Returns the constant that the body adds to an element."""
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
    """Returns which element of the computation's tuple an operand is, or None."""
    name, element = operand
    instruction = computation.by_name[name]
    if instruction.opcode == "parameter":
        return element
    if instruction.opcode == "get-tuple-element":
        return int(instruction.required("index"))
    return _element(computation, instruction.operands[0]) if instruction.opcode in ("copy", "bitcast") else None


def _source(computation: Computation, carried: Instruction, element: int) -> tuple[str, int | None]:
    """Returns the operand that an element of a tuple comes from."""
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
    """Returns the FLOPs of matrix products in one run of an instruction, fusions included; a loop counts 0."""
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
    if instruction.opcode in ("fusion", "fusion-start"):
        inner = program.inside(instruction)
        return sum(flops(program, inner, i) for i in inner.instructions)
    return 0.0


def _convolution(computation: Computation, instruction: Instruction) -> float:
    """Returns the FLOPs of a convolution, which products become on TPUs: batch dimensions are windows of one."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"{instruction.name} has no dim_labels: this form of program is not known")
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    lhs, rhs = computation.operand(instruction, 0), computation.operand(instruction, 1)
    out, spatial = instruction.type, [c for c in labels[1] if c.isdigit()]

    def field(name: str, default: int) -> list[int]:
        return [int(x) for x in fields[name].split("x")] if name in fields else [default] * len(spatial)

    kernel, stride = field("size", 1), field("stride", 1)
    dilated, spread = field("lhs_dilate", 1), field("rhs_dilate", 1)
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
    """Counts the pairs (output, element of the window) that read the input and not padding."""
    last = (inputs - 1) * dilated
    total = 0
    for k in range(kernel):
        shift = k * spread - low
        positions = range(shift, shift + outputs * stride, stride)
        total += sum(1 for p in positions if 0 <= p <= last and p % dilated == 0)
    return total


_MOVES_NOTHING = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "copy-done",
    "after-all", "partition-id", "replica-id", "iota", "opt-barrier", "add-dependency",
}  # fmt: skip


_HOST = 5  # XLA's memory space for the host


def host_bytes(computation: Computation, instruction: Instruction) -> int:
    """Returns the bytes between device and host memory in one run of an instruction; a loop counts 0."""
    opcode = instruction.opcode
    if opcode in _MOVES_NOTHING or opcode.endswith("-done") or "AllocateBuffer" in instruction.attributes:
        return 0
    arrays = [a for kind in (*computation.operands(instruction), instruction.type) for a in leaves(kind)]
    if not any(a.space == _HOST for a in arrays):
        return 0
    return max(
        (a.bytes for a in arrays if a.space != _HOST), default=0
    )  # the host's array may be larger: only a slice moves


def hbm_bytes(program: Program, computation: Computation, instruction: Instruction) -> int:
    """Returns the bytes between HBM and the chip in one run of an instruction; a loop counts 0.

    A sliced operand counts as the slice, a result that is updated in place as the update.
    """
    opcode = instruction.opcode
    if opcode in _MOVES_NOTHING or opcode.endswith(("-update", "-done")) or "AllocateBuffer" in instruction.attributes:
        return 0
    if opcode in ("async-start", "call-start", "call"):
        wrapped = program.inside(instruction)
        return sum(hbm_bytes(program, wrapped, i) for i in wrapped.instructions)
    if moved := host_bytes(computation, instruction):
        return moved
    operands = computation.operands(instruction)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return (size(instruction.type) if size(operands[0], space=0) else 0) + size(instruction.type, space=0)
    if opcode == "dynamic-update-slice":
        return size(operands[1], space=0) + (size(operands[1]) if size(instruction.type, space=0) else 0)
    if opcode == "copy-start":
        return size(operands[0], space=0) + sum(a.bytes for a in leaves(instruction.type[0]) if a.space == 0)
    inner = program.called(instruction) if opcode in ("fusion", "fusion-start") else None
    if inner is None:
        return sum(size(kind, space=0) for kind in operands) + size(instruction.type, space=0)
    parameters = _parameters(inner)
    read = sum(
        min(size(kind, space=0), _read(program, inner, parameter))
        for kind, parameter in zip(operands, parameters, strict=True)
    )
    return read + _written(inner)


def _read(program: Program, computation: Computation, parameter: Instruction) -> int:
    """Returns the bytes that a fusion reads of its parameter."""
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
            inner = program.inside(user)
            inside = zip(_parameters(inner), user.operands, strict=True)
            total += sum(_read(program, inner, p) for p, (name, _) in inside if name == parameter.name)
        else:
            return size(parameter.type)
    return min(total, size(parameter.type))


def _written(computation: Computation) -> int:
    """Returns the bytes that a fusion writes to HBM."""

    def one(instruction: Instruction) -> int:
        if instruction.opcode == "tuple":
            return sum(one(computation.by_name[name]) for name, _ in instruction.operands)
        if instruction.opcode == "dynamic-update-slice":
            return size(computation.operand(instruction, 1)) if size(instruction.type, space=0) else 0
        if instruction.opcode == "bitcast":
            return one(computation.by_name[instruction.operands[0][0]])
        return size(instruction.type, space=0)

    return one(computation.root)
