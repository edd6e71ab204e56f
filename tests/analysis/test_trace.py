"""Traces of CPU, TPU and GPU form, small enough to count by hand, and one that is recorded here."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from longattn.analysis import trace
from longattn.analysis.trace import Kernel, Scope, scope_of

# ---- writing what the profiler writes


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


# ---- scopes


@pytest.mark.parametrize(
    ("op_name", "path", "phase"),
    [
        ("jit(f)/logits/dot_general", "logits", "forward"),
        ("jit(f)/jvp(Model)/while/body/eval_jaxpr/layer_0/mlp/BTE,EF->BTF/dot_general", "Model/layer_0/mlp", "forward"),
        ("jit(f)/transpose(jvp(Model))/while/body/layer_0/layer_0/checkpoint/mlp/mul", "Model/layer_0/mlp", "backward"),
        ("jit(f)/transpose(jvp(Model))/checkpoint/rematted_computation/mlp/exp", "Model/mlp", "recompute"),
        ("jit(f)/attention/xla/backward/dq/add", "attention/xla/dq", "backward"),
        ("jit(f)/vmap(jvp(a))/b/cond/branch_1_fun/jit(silu)/exp", "a/b", "forward"),
        ("jit(f)/shard_map/all_gather/gather/all_gather", "all_gather/gather", "forward"),
        ("jit(f)/loss/mul;jit(f)/optimiser/add", "loss", "forward"),
        ("jit(f)/jvp(vmap(BTNH,BSNH->BNTS))/dot_general:", "BTNH,BSNH->BNTS", "forward"),
        ("jit(f)/transpose(jvp(Model))/(embedding/add:jvp(Model)/mlp/dot)", "Model", "backward"),
        ("jit(f)/(transpose(jvp(loss))/psum:jvp(loss)/add)", "loss", "backward"),
        ("jit(f)/jvp()/mul", "", "forward"),
        ("", "", "forward"),
    ],
)
def test_scopes_are_what_the_source_says(op_name: str, path: str, phase: str) -> None:
    scope = scope_of(op_name)
    assert ("/".join(scope.path), scope.phase) == (path, phase)
    assert str(scope) == (path or "(no scope)")


def test_a_fusion_has_the_scope_of_its_product() -> None:
    ops = trace.program_ops(
        module(
            fused=[
                instruction(1, "p", "parameter", parameter=0),
                instruction(2, "d", "dot", "jit(f)/logits/dot_general", (1, 1)),
                instruction(3, "e", "exponential", "jit(f)/softmax/exp", (2,)),
            ],
            main=[
                instruction(4, "q", "parameter", "q", parameter=0),
                instruction(5, "fusion", "fusion", "jit(f)/softmax/exp", (4,), (1,)),
            ],
        )
    )
    assert ops["fusion"] == trace.Op("fusion", Scope(("logits",), "forward"))
    assert ops["e"].scope.path == ("softmax",)


def test_what_xla_made_has_the_scope_of_its_user_or_of_its_loop() -> None:
    ops = trace.program_ops(
        module(
            body=[
                instruction(1, "p", "parameter", parameter=0),
                instruction(2, "copy", "copy", "", (1,)),
                instruction(3, "add", "add", "jit(f)/values/add", (2,)),
                instruction(4, "lost", "copy", "", (3,)),
            ],
            main=[instruction(5, "while", "while", "jit(f)/attention/while", (), (1,))],
        )
    )
    assert ops["copy"].scope.path == ("values",)
    assert ops["lost"].scope.path == ("attention",)
    assert ops["while"].opcode == "while"


def nameless_product(slice_name: str, after: str) -> trace.Op:
    """keys -> slice (read by the product alone) -> nameless product in a fusion of its own -> user."""
    return trace.program_ops(
        module(
            fused=[
                instruction(1, "a", "parameter", parameter=0),
                instruction(2, "b", "parameter", parameter=1),
                instruction(3, "d", "dot", "", (1, 2)),
            ],
            main=[
                instruction(4, "q", "parameter", "q", parameter=0),
                instruction(5, "slice", "dynamic-slice", slice_name, (4,)),
                instruction(6, "product", "fusion", "", (5, 4), (1,)),
                instruction(7, "user", "multiply", after, (6, 4)),
            ],
        )
    )["product"]


def test_a_nameless_product_has_the_scope_of_its_own_slice_or_of_its_user() -> None:
    scope = lambda *names: "/".join(nameless_product(*names).scope.path)
    assert scope("jit(f)/logits/dynamic_slice", "jit(f)/softmax/mul") == "logits"
    assert scope("jit(f)/logits/dynamic_slice", "jit(f)/dp/dot_general") == "dp"  # a reshape of its result
    assert scope("jit(f)/other/gather/all_gather", "jit(f)/logits/add") == "logits"  # it comes from elsewhere
    assert scope("jit(f)/softmax/exp", "jit(f)/values/add") == "values"
    assert scope("", "jit(f)/values/add") == "values"


def test_products_of_a_compiled_program_are_found() -> None:
    """The field numbers are those of this jaxlib."""

    def f(q: jax.Array, k: jax.Array) -> jax.Array:
        with jax.named_scope("logits"):
            s = jnp.einsum("btd,bsd->bts", q, k)
        with jax.named_scope("softmax"):
            p = jax.nn.softmax(s)
        with jax.named_scope("values"):
            return jnp.einsum("bts,bsd->btd", p, k)

    x = jax.ShapeDtypeStruct((2, 64, 8), jnp.float32)
    compiled = jax.jit(f).lower(x, x).compile()
    ops = trace.program_ops(compiled.runtime_executable().hlo_modules()[0].as_serialized_hlo_module_proto())
    products = sorted("/".join(op.scope.path) for op in ops.values() if op.opcode == "dot")
    assert products == ["logits", "values"]
    assert all(name in compiled.as_text() for name in ops)


# ---- the timeline

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


def test_cpu() -> None:
    first, second = trace.read(cpu_space()).executions
    assert (first.program, first.device) == ("jit_f", "/device:CPU:0")
    logits, softmax = Scope(("logits",), "forward"), Scope(("softmax",), "backward")
    # The loop is no kernel; exp.1 was begun from 60 to 62 and lasted until its mark at 72, for nothing began before.
    assert first.kernels == (
        Kernel("dot.1", logits, 20e3, 30e3, pytest.approx(10e-6)),
        Kernel("dot.1", logits, 40e3, 55e3, pytest.approx(15e-6)),
        Kernel("exp.1", softmax, 60e3, 72e3, pytest.approx(12e-6)),
    )
    assert first.seconds == pytest.approx(65e-6)  # from the loop's begin to the end of waiting
    assert first.busy == pytest.approx(37e-6)
    assert second.seconds == second.busy == pytest.approx(10e-6)


def test_cpu_an_unfinished_op_ends_where_the_next_begins() -> None:
    lines = {"a": [cpu("dot.1", 0, 2, p=5)], "b": [cpu("exp.1", 8, 20), "end:~dot.1 30 30 _c=5"]}
    (run,) = trace.read(space(programs(LOOP), plane("/host:CPU", lines, CPU_STATS))).executions
    assert [(k.name, k.start, k.end) for k in run.kernels] == [("dot.1", 0, 8e3), ("exp.1", 8e3, 20e3)]


def test_cpu_devices_and_programs_are_apart() -> None:
    lines = {"a": [cpu("dot.1", 0, 10), cpu("dot.1", 5, 25, device=3)]}
    runs = trace.read(space(plane("/host:CPU", lines, CPU_STATS))).executions  # no program is known here
    assert [(r.device, r.seconds) for r in runs] == [
        ("/device:CPU:0", pytest.approx(10e-6)),
        ("/device:CPU:3", pytest.approx(20e-6)),
    ]
    assert runs[0].kernels[0].scope == Scope((), "forward")


def test_a_program_is_found_by_its_name_under_another_number() -> None:
    data = space(programs(LOOP, "jit_f(9)"), plane("/host:CPU", {"a": [cpu("dot.1", 0, 10)]}, CPU_STATS))
    (run,) = trace.read(data).executions
    assert run.kernels[0].scope.path == ("logits",)


def tpu_space() -> bytes:
    """Two executions of one program; a loop holds its body on the same line. The names are in the events' metadata."""
    text = "%fusion.1 = bf16[8]{0} fusion(bf16[8]{0} %p), kind=kOutput, calls=%c"
    metadata = ""
    for number, (name, display, op) in enumerate(
        [("jit_f(123)", "", ""), ("%while.2 = (s32[]) while(%t)", "while.2", "jit(f)/while"),
         (text, "fusion.1", "jit(f)/transpose(jvp(attention))/dot_general:"), ("%copy.3 = copy(%x)", "", "")], 1
    ):  # fmt: skip
        stat = f'stats {{ metadata_id: 1 str_value: "{op}" }}' if op else ""
        shown = f'display_name: "{display}"' if display else ""
        metadata += f'event_metadata {{ key: {number} value {{ id: {number} name: "{name}" {shown} {stat} }} }}\n'
    lines = {
        "XLA Modules": ["m 0 100", "m 200 260"],
        "XLA Ops": ["w 10 90", "f 20 50", "f 50 80", "c 90 95", "f 200 250"],
        "Steps": ["m 0 100"],
    }
    return space(plane("/device:TPU:0", lines, ("tf_op",), metadata))


def test_tpu() -> None:
    first, second = trace.read(tpu_space()).executions
    backward = Scope(("attention",), "backward")
    assert (first.program, first.device, first.start, first.end) == ("jit_f", "/device:TPU:0", 0, 100e3)
    assert [(k.name, k.scope, k.start, k.end) for k in first.kernels] == [
        ("fusion.1", backward, 20e3, 50e3),
        ("fusion.1", backward, 50e3, 80e3),
        ("copy.3", Scope((), "forward"), 90e3, 95e3),
    ]
    assert first.busy == pytest.approx(65e-6)
    assert (second.seconds, second.busy) == (pytest.approx(60e-6), pytest.approx(50e-6))


def test_tpu_takes_scopes_from_the_stored_program() -> None:
    """So that a fusion counts for its product there too."""
    proto = module(
        fused=[
            instruction(1, "d", "dot", "jit(f)/logits/dot_general"),
            instruction(2, "e", "exponential", "jit(f)/softmax/exp", (1,)),
        ],
        main=[instruction(3, "fusion.1", "fusion", "jit(f)/softmax/exp", (), (1,))],
    )
    stored = ProfileData.text_proto_to_serialized_xspace(programs(proto, "jit_f(123)"))
    first, _ = trace.read(stored + tpu_space()).executions
    assert [str(k.scope) for k in first.kernels] == ["logits", "logits", "(no scope)"]


def test_gpu() -> None:
    """Two streams; each run of the program begins with the same kernel; kernels of no program are counted apart."""
    stats = ("hlo_op", "hlo_module", "program_id", "correlation_id")
    known = lambda op: f"hlo_op={op} hlo_module=jit_f program_id=7"
    lines = {
        "Stream~#13(Compute)": [
            f"gemm 0 10 {known('dot.1')}", f"exp_kernel 12 20 {known('exp.1')}",
            f"gemm 100 110 {known('dot.1')}", "graph 130 135",
        ],
        "Stream~#14(Memcpy)": [f"copy 5 15 {known('lost')}", f"exp_kernel 108 121 {known('exp.1')}"],
        "Launch~Stats": [f"gemm 0 99 {known('dot.1')}"],
    }  # fmt: skip
    text = plane("/device:GPU:0", lines, stats)
    text = text.replace("#13(Compute)", "#13(Compute)").replace("~", " ")
    read = trace.read(space(programs(LOOP), text))
    first, second = read.executions
    assert [(k.name, str(k.scope), k.scope.phase) for k in first.kernels] == [
        ("gemm", "logits", "forward"),
        ("copy", "(no scope)", "forward"),
        ("exp_kernel", "softmax", "backward"),
    ]
    assert (first.seconds, first.busy) == (pytest.approx(20e-6), pytest.approx(20e-6))
    assert (second.seconds, second.busy) == (pytest.approx(21e-6), pytest.approx(21e-6))
    assert read.unknown_seconds == pytest.approx(5e-6)


# ---- sums


def test_sums_over_repetitions() -> None:
    runs = trace.read(cpu_space()).of("jit_f")
    parts = {(p.name, p.phase): p for p in trace.kernels(runs)}
    assert parts["dot.1", "forward"].seconds == pytest.approx(12.5e-6)  # the median of 25 and 0
    assert parts["exp.1", "backward"].seconds == pytest.approx(11e-6)
    assert (parts["dot.1", "forward"].calls, parts["dot.1", "forward"].scope) == (1, "logits")
    joined = trace.scopes(runs, lambda scope: "all")
    assert [(p.name, p.phase) for p in joined] == [("all", "forward"), ("all", "backward")]
    assert trace.read(cpu_space()).busiest() == "jit_f"
    assert trace.read(cpu_space()).of("jit_g") == ()


def test_spread_is_quartiles() -> None:
    assert trace.Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == trace.Spread(3.0, 2.0, 4.0)


# ---- what is no trace


def test_what_is_no_trace_says_so(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="holds no trace"):
        trace.find(tmp_path)
    with pytest.raises(ValueError, match="cut off|no protocol buffer"):
        trace.read(cpu_space()[:-7])
    with pytest.raises(ValueError, match="no protocol buffer"):
        trace.read(b"\x0f\x0f")
    with pytest.raises(ValueError, match="no execution of a compiled program"):
        trace.read(b"").busiest()


# ---- one that is recorded here


def test_a_recorded_trace(tmp_path: pathlib.Path) -> None:
    def f(x: jax.Array) -> jax.Array:
        with jax.named_scope("product"):
            return x @ x

    x = jnp.ones((256, 256))
    compiled = jax.jit(f).lower(x).compile()
    compiled(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(3):
            compiled(x).block_until_ready()
    runs = trace.read(trace.find(tmp_path).read_bytes()).of("jit_f")
    assert len(runs) == 3
    for run in runs:
        assert {str(k.scope) for k in run.kernels} == {"product"}
        assert 0 < run.busy <= run.seconds
