"""The comparison on tiny shapes; its refusals; its sums on rows small enough to count by hand."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import pytest

from longattn.aot.kernels import cases, tpu
from longattn.bench import attention, compare, timing, trace
from longattn.bench.compare import measurement, roofline
from longattn.cost import hardware
from longattn.cost.flops import attention_flops, linear_flops
from longattn.cost.pairs import visible_pairs
from longattn.mask import Causal
from tests.bench.compare.tiny import SHARED, TINY, quiet

RAN = {
    "contestant", "about", "error", "samples", "device_seconds", "host_seconds", "idle", "ratio", "two_speeds", "flops",
    "flops_per_second", "share_of_peak_flops", "bytes", "bytes_per_second", "share_of_bandwidth", "roofline", "bound",
    "static_seconds", "static_ratio", "static_note", "kernels", "scopes",
}  # fmt: skip


def test_every_contestant_has_a_row(document) -> None:
    rows = {row["contestant"]: row for row in document["rows"]}
    assert list(rows) == ["xla", "reference", "jax_nn", "splash", "cudnn"]
    assert rows["splash"]["reason"] == "it runs on tpu, this is cpu"
    assert rows["cudnn"]["reason"] == "it runs on gpu, this is cpu"
    for name in ("xla", "reference", "jax_nn"):
        row = rows[name]
        assert set(row) == RAN
        assert row["error"] <= attention.AGREE["float32"]
        assert len(row["samples"]) == len(row["host_seconds"]) == TINY["rounds"]
        assert all(0 < device < host for device, host in zip(row["samples"], row["host_seconds"]))
        assert 0 <= row["idle"] < 1
        s = row["device_seconds"]
        assert min(row["samples"]) <= s["low"] <= s["median"] <= s["high"] <= max(row["samples"])
        assert row["flops_per_second"] == pytest.approx(row["flops"] / s["median"])
        assert row["share_of_peak_flops"] == pytest.approx(row["roofline"])  # no bandwidth of a CPU is known
        assert (row["share_of_bandwidth"], row["static_ratio"], row["bound"]) == (None, None, None)
    assert rows["xla"]["ratio"]["value"] == 1
    medians = [rows[n]["device_seconds"]["median"] for n in ("jax_nn", "xla")]
    assert rows["jax_nn"]["ratio"]["value"] == pytest.approx(medians[0] / medians[1])


def test_scopes_of_both_passes_are_known(document) -> None:
    xla, reference, *_ = document["rows"]
    for row, backward in ((xla, {"dq", "dk", "dv"}), (reference, {"logits", "softmax"})):
        found = {(p["name"], p["phase"]) for p in row["scopes"]}
        assert {("logits", "forward"), ("softmax", "forward"), ("values", "forward")} <= found
        assert {(name, "backward") for name in backward} <= found


@pytest.mark.slow
def test_what_is_left_behind(document) -> None:
    folder = pathlib.Path(document["trace"])
    assert trace.read(trace.find(folder.parents[2]).read_bytes()).of("jit_compare_xla")
    assert (folder / "compare.png").stat().st_size > 10_000
    assert document["plot"] == str(folder / "compare.png")
    lines = [json.loads(line) for line in (folder.parents[2] / measurement.FILE).read_text().splitlines()]
    assert [line["contestant"] for line in lines] == list(document["options"]["contestants"])
    for line in lines:
        assert set(line) >= SHARED
        assert {"jax", "jaxlib", "numpy"} <= set(line["environment"]["versions"])
        assert "commit" in line["environment"]
    assert compare.opening(document["trace"]).endswith(f"xprof --port 8791 {folder.parents[2]}")


@pytest.mark.slow
def test_linear_attention_and_its_yardstick(tmp_path) -> None:
    options = compare.CompareOptions(
        "linear_forward_backward", ("xla", "attention", "pallas_tpu"), kind="none", out=str(tmp_path), **TINY
    )
    document = compare.run(options, quiet())
    assert (document["options"]["kind"], document["options"]["dtype"]) == ("none", "float32")
    xla, exact, refused = document["rows"]
    assert set(xla) == set(exact) == RAN
    assert "the kernels are for TPUs" in refused["reason"]
    assert xla["flops"] == 3 * linear_flops(300, 4 * 8 * 8)
    assert exact["flops"] == 3 * attention_flops(visible_pairs(Causal(), 300), 4, 8).forward
    found = {(p["name"], p["phase"]) for p in xla["scopes"]}
    assert {("pairs", "forward"), ("states/write", "backward"), ("out", "backward")} <= found
    assert any(d["contestant"] == "attention" and d["scope"] == "values" for d in document["differences"])


def test_differences_are_to_the_first_and_sorted(document) -> None:
    found = document["differences"]
    assert {d["contestant"] for d in found} == {"reference", "jax_nn"}
    sizes = [abs(d["difference"]) for d in found]
    assert sizes == sorted(sizes, reverse=True)

    part = lambda name, seconds: {"name": name, "phase": "forward", "seconds": seconds}
    rows = [
        {"contestant": "refused", "reason": ""},
        {"contestant": "a", "scopes": [part("logits", 3.0), part("softmax", 1.0)]},
        {"contestant": "b", "scopes": [part("logits", 1.0), part("values", 1.5)]},
    ]
    assert [(d["contestant"], d["scope"], d["difference"]) for d in measurement.differences(rows)] == [
        ("b", "logits", -2.0), ("b", "values", 1.5), ("b", "softmax", -1.0),
    ]  # fmt: skip


def test_calls_that_the_trace_does_not_show_are_a_reason(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(trace, "read", lambda data: trace.Trace((), 2e-3))
    monkeypatch.setattr(timing, "SETTLED", 0.0)  # a busy machine repeats no call
    options = compare.CompareOptions("attention_forward", contestants=("xla",), out=str(tmp_path), **TINY)
    document = compare.run(options, quiet())
    assert document["rows"][0]["reason"].startswith("the trace shows 0 executions of 4 calls; 2 ms of kernels name no")
    assert document["plot"] is None
    assert len((tmp_path / measurement.FILE).read_text().splitlines()) == 1


def test_beyond_memory_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(attention, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match="T=300 is too long for this machine"):
        compare.run(compare.CompareOptions("attention_forward", out=str(tmp_path), **TINY), quiet())


def executions(*seconds: float) -> list[trace.Execution]:
    """Runs of which half is busy."""
    kernel = lambda s: trace.Kernel("k", trace.Scope(("attention", "xla", "logits"), "forward"), 0.0, s * 5e8, s / 2)
    return [trace.Execution("jit_f", "/device:TPU:0", 0.0, s * 1e9, (kernel(s),)) for s in seconds]


def test_a_row_on_a_chip(monkeypatch) -> None:
    """A v5e that does not exist takes 1, 2 and 3 ms; its static schedule says 1 ms."""
    chip = hardware.CHIPS["v5e"]
    device = hardware.Device("TPU v5 lite", "tpu", 1, chip, chip.peak_bf16_flops, False)
    asked = []

    def profile(case: str, name: str, shape: object) -> dict:
        asked.append((case, name))
        return {"cycles": 1e-3 * hardware.tpu_clock("v5e") / 2}

    monkeypatch.setattr(tpu, "profile", profile)
    options = compare.CompareOptions(
        "attention_forward_backward", contestants=("splash",), T=2048, H=8, D=128, dtype="bfloat16"
    )
    row = measurement._row("splash", options, executions(1e-3, 2e-3, 3e-3), device)
    flops = 3 * attention_flops(visible_pairs(Causal(), 2048), 8, 128).forward
    assert row["device_seconds"] == {"median": 2e-3, "low": 1.5e-3, "high": 2.5e-3}
    assert row["idle"] == pytest.approx(0.5)
    assert row["flops_per_second"] == pytest.approx(flops / 2e-3)
    assert row["share_of_peak_flops"] == pytest.approx(flops / 2e-3 / 197e12)
    assert row["share_of_bandwidth"] == pytest.approx(12 * 2048 * 8 * 128 * 2 / 2e-3 / 819e9)
    assert row["bound"] == "compute"
    assert row["roofline"] == pytest.approx(row["share_of_peak_flops"])
    assert asked == [("jax_splash", "v5e"), ("jax_splash_backward", "v5e")]
    assert row["static_ratio"] == pytest.approx(2.0)
    assert row["scopes"][0]["name"] == "logits"

    short = dataclasses.replace(options, case="attention_forward", T=256)  # 64 FLOPs a byte; the chip's are 241
    row = measurement._row("splash", short, executions(1e-3), device)
    assert row["bound"] == "memory"
    assert row["roofline"] == pytest.approx(row["share_of_bandwidth"])

    wide = dataclasses.replace(options, dtype="float32")
    assert "known for bfloat16" in measurement._row("splash", wide, executions(1e-3), device)["static_note"]
    monkeypatch.setattr(tpu, "profile", lambda *_: {"reason": "the compiler ended"})
    row = measurement._row("splash", options, executions(1e-3), device)
    assert (row["static_ratio"], row["static_note"]) == (None, "the compiler ended")


def test_static_cycles_of_linear_attention(monkeypatch) -> None:
    chip = hardware.CHIPS["v5e"]
    device = hardware.Device("TPU v5 lite", "tpu", 1, chip, chip.peak_bf16_flops, False)
    asked = []

    def profile(case: str, name: str, shape: cases.Shape) -> dict:
        asked.append((case, shape.kind, shape.T, shape.key_heads))
        return {"cycles": 10.0}

    monkeypatch.setattr(tpu, "profile", profile)
    options = compare.CompareOptions("linear_forward_backward", T=1000, K=2, kind="vector_delta", dtype="bfloat16")
    seconds, note = roofline.static_seconds("pallas_tpu", options, device)
    assert (seconds, note) == (pytest.approx(20 / hardware.tpu_clock("v5e")), "")
    assert asked == [(f"longattn_linear{d}", "vector_delta", 1000, 2) for d in ("", "_backward")]
    assert roofline.static_seconds("attention", options, device) == (None, "")


def test_a_kernel_whose_case_is_not_there_says_so(monkeypatch) -> None:
    chip = hardware.CHIPS["v5e"]
    device = hardware.Device("TPU v5 lite", "tpu", 1, chip, chip.peak_bf16_flops, False)
    monkeypatch.setattr(roofline, "CASES", {})
    options = compare.CompareOptions("attention_forward", contestants=("pallas_tpu",), T=2048, D=128, dtype="bfloat16")
    assert roofline.static_seconds("pallas_tpu", options, device) == (None, "there is no case longattn")
