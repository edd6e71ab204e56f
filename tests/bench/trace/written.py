"""Traces as the profiler writes them, small enough to count by hand."""

from __future__ import annotations

from jax.profiler import ProfileData


def field(number: int, value: int | bytes | str) -> bytes:
    """One field of a protocol buffer."""

    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def instruction(
    number: int, name: str, opcode: str, op_name: str = "", reads=(), calls=(), parameter: int | None = None
) -> bytes:
    named = field(7, field(2, op_name)) if op_name else b""
    place = b"" if parameter is None else field(9, parameter)
    edges = b"".join(field(36, i) for i in reads) + b"".join(field(38, c) for c in calls)
    return field(2, field(1, name) + field(2, opcode) + named + place + field(35, number) + edges)


def module(**computations: list[bytes]) -> bytes:
    """A HloModuleProto; computations are numbered in their order, from 1."""
    bodies = (field(1, name) + b"".join(rows) + field(5, i) for i, (name, rows) in enumerate(computations.items(), 1))
    return field(1, "jit_f") + b"".join(field(3, body) for body in bodies)


def quoted(data: bytes) -> str:
    return '"' + "".join(f"\\{byte:03o}" for byte in data) + '"'


def plane(name: str, lines: dict[str, list[str]], stats=(), metadata: str = "") -> str:
    """A plane in text form. An event is "NAME START END key=value ...", in microseconds; ~ in a name is a space."""
    names = list(dict.fromkeys(event.split()[0] for events in lines.values() for event in events))
    text = ""
    for number, (line, events) in enumerate(lines.items()):
        text += f'lines {{ id: {number} name: "{line.replace("~", " ")}" timestamp_ns: 0\n'
        for event in events:
            what, start, end, *rest = event.split()
            text += f"events {{ metadata_id: {names.index(what) + 1} offset_ps: {round(float(start) * 1e6)} "
            text += f"duration_ps: {round((float(end) - float(start)) * 1e6)} "
            for pair in rest:
                key, value = pair.split("=")
                kind = f"int64_value: {value}" if value.lstrip("-").isdigit() else f'str_value: "{value}"'
                text += f"stats {{ metadata_id: {list(stats).index(key) + 1} {kind} }} "
            text += "}\n"
        text += "}\n"
    if not metadata:
        metadata = "".join(
            f'event_metadata {{ key: {i} value {{ id: {i} name: "{n.replace("~", " ")}" }} }}\n'
            for i, n in enumerate(names, 1)
        )
    declared = "".join(
        f'stat_metadata {{ key: {i} value {{ id: {i} name: "{s}" }} }}\n' for i, s in enumerate(stats, 1)
    )
    return f'planes {{ name: "{name}"\n{text}{metadata}{declared}}}\n'


def programs(proto: bytes, name: str = "jit_f(7)") -> str:
    """The plane that holds compiled programs."""
    stat = f"stats {{ metadata_id: 1 bytes_value: {quoted(field(1, proto))} }}"
    event = f'event_metadata {{ key: 1 value {{ id: 1 name: "{name}" {stat} }} }}\n'
    return plane("/host:metadata", {}, ("Hlo Proto",), event)


def space(*planes: str) -> bytes:
    return ProfileData.text_proto_to_serialized_xspace("".join(planes))


CPU_STATS = ("hlo_op", "hlo_module", "program_id", "run_id", "device_ordinal", "_p", "_c")


def cpu(name: str, start: float, end: float, run: int = 1, device: int = 0, p: int = 0) -> str:
    stats = f"hlo_module=jit_f program_id=7 run_id={run} device_ordinal={device}"
    return f"{name} {start} {end} hlo_op={name} {stats}" + (f" _p={p}" if p else "")


LOOP = module(
    body=[instruction(1, "dot.1", "dot", "jit(f)/logits/dot_general")],
    main=[
        instruction(2, "while.1", "while", "jit(f)/while", (), (1,)),
        instruction(3, "exp.1", "exponential", "jit(f)/transpose(jvp(softmax))/exp"),
    ],
)


def cpu_space() -> bytes:
    """Two runs: a loop on one thread whose body ran on another, and an op that other threads finished."""
    lines = {
        "tf_XLAEigen/1": [cpu("while.1", 10, 60), cpu("exp.1", 60, 62, p=5), "wait 62 75 run_id=1 device_ordinal=0"],
        "tf_XLAEigen/2": [
            cpu("dot.1", 20, 30),
            cpu("dot.1", 40, 55),
            "end:~exp.1 72 72 _c=5",
            cpu("exp.1", 100, 110, run=2),
        ],
        "python": ["PjitFunction(f) 0 5"],
    }
    return space(programs(LOOP), plane("/host:CPU", lines, CPU_STATS))
