"""Traces of CPU, TPU and GPU form, small enough to count by hand."""

from __future__ import annotations

import pytest
from jax.profiler import ProfileData

from longattn.bench import trace
from longattn.bench.trace import Kernel, Scope
from tests.bench.trace.written import CPU_STATS, LOOP, cpu, cpu_space, instruction, module, plane, programs, space


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


def test_cpu_marks_without_a_number_end_nothing() -> None:
    lines = {"a": [cpu("exp.1", 0, 2), "end:~other 30 30"]}
    (run,) = trace.read(space(programs(LOOP), plane("/host:CPU", lines, CPU_STATS))).executions
    assert [(k.start, k.end) for k in run.kernels] == [(0, 2e3)]


def test_what_the_host_does_for_an_op_is_no_execution() -> None:
    lines = {"a": ["launch 0 5 hlo_op=dot.1 hlo_module=jit_f program_id=7"]}
    assert trace.read(space(programs(LOOP), plane("/host:CPU", lines, CPU_STATS))).executions == ()


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


def test_an_op_that_outlasts_the_one_it_began_in_takes_what_they_share() -> None:
    lines = {"XLA~Modules": ["jit_f(7) 0 100"], "XLA~Ops": ["dot.1 0 50", "exp.1 40 80"]}
    text = plane("/device:TPU:0", lines).replace("~", " ")
    (run,) = trace.read(space(programs(LOOP), text)).executions
    assert [(k.name, k.seconds) for k in run.kernels] == [
        ("dot.1", pytest.approx(40e-6)),
        ("exp.1", pytest.approx(40e-6)),
    ]
    assert run.busy == pytest.approx(80e-6)


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
