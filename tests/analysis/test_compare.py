"""The comparison on tiny shapes; its refusals; its sums on rows small enough to count by hand."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from rich.console import Console

from longattn.analysis import bench, cases, compare, cost, hardware, trace
from longattn.analysis.static import tpu
from longattn.mask import Causal, Full, Window

TINY = {"T": 300, "H": 4, "D": 8, "rounds": 3}
SHARED = {"version", "kind", "options", "environment", "load", "checked_against", "peak", "trace"}
RAN = {
    "contestant", "about", "error", "samples", "device_seconds", "host_seconds", "idle", "ratio", "flops",
    "flops_per_second", "share_of_peak_flops", "bytes", "bytes_per_second", "share_of_bandwidth", "roofline", "bound",
    "static_seconds", "static_ratio", "static_note", "kernels", "scopes",
}  # fmt: skip


def quiet() -> Console:
    return Console(quiet=True)


@pytest.fixture(scope="module")
def document(tmp_path_factory) -> dict:
    options = compare.CompareOptions(
        "attention_forward_backward", contestants=("xla", "reference", "jax_nn", "splash", "cudnn"),
        out=str(tmp_path_factory.mktemp("compare")), K=2, **TINY,
    )  # fmt: skip
    return compare.run(options, quiet())


def test_every_contestant_has_a_row(document) -> None:
    rows = {row["contestant"]: row for row in document["rows"]}
    assert list(rows) == ["xla", "reference", "jax_nn", "splash", "cudnn"]
    assert rows["splash"]["reason"] == "it runs on tpu, this is cpu"
    assert rows["cudnn"]["reason"] == "it runs on gpu, this is cpu"
    for name in ("xla", "reference", "jax_nn"):
        row = rows[name]
        assert set(row) == RAN
        assert row["error"] <= bench.AGREE["float32"]
        assert len(row["samples"]) == len(row["host_seconds"]) == TINY["rounds"]
        assert all(0 < device < host for device, host in zip(row["samples"], row["host_seconds"]))
        assert 0 <= row["idle"] < 1
        s = row["device_seconds"]
        assert min(row["samples"]) <= s["low"] <= s["median"] <= s["high"] <= max(row["samples"])
        assert row["flops_per_second"] == pytest.approx(row["flops"] / s["median"])
        assert row["share_of_peak_flops"] == pytest.approx(row["roofline"])  # no bandwidth of a CPU is known
        assert (row["share_of_bandwidth"], row["static_ratio"], row["bound"]) == (None, None, "compute")
    assert rows["xla"]["ratio"]["value"] == 1
    medians = [rows[n]["device_seconds"]["median"] for n in ("jax_nn", "xla")]
    assert rows["jax_nn"]["ratio"]["value"] == pytest.approx(medians[0] / medians[1])


def test_scopes_of_both_passes_are_known(document) -> None:
    xla, reference, *_ = document["rows"]
    for row, backward in ((xla, {"dq", "dk", "dv"}), (reference, {"logits", "softmax"})):
        found = {(p["name"], p["phase"]) for p in row["scopes"]}
        assert {("logits", "forward"), ("softmax", "forward"), ("values", "forward")} <= found
        assert {(name, "backward") for name in backward} <= found


def test_what_is_left_behind(document) -> None:
    folder = pathlib.Path(document["trace"])
    assert trace.read(trace.find(folder.parents[2]).read_bytes()).of("jit_compare_xla")
    assert (folder / "compare.png").stat().st_size > 10_000
    assert document["plot"] == str(folder / "compare.png")
    lines = [json.loads(line) for line in (folder.parents[2] / compare.FILE).read_text().splitlines()]
    assert [line["contestant"] for line in lines] == list(document["options"]["contestants"])
    for line in lines:
        assert set(line) >= SHARED
        assert {"jax", "jaxlib", "numpy"} <= set(line["environment"]["versions"])
        assert "commit" in line["environment"]
    assert compare.opening(document["trace"]).endswith(f"xprof --port 8791 {folder.parents[2]}")


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
    assert [(d["contestant"], d["scope"], d["difference"]) for d in compare.differences(rows)] == [
        ("b", "logits", -2.0), ("b", "values", 1.5), ("b", "softmax", -1.0),
    ]  # fmt: skip


def test_json_is_one_document(capsys, tmp_path) -> None:
    options = compare.CompareOptions("attention_forward", contestants=("xla",), json=True, out=str(tmp_path), **TINY)
    document = compare.run(options)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(document))
    assert set(document) == SHARED | {"rows", "differences", "plot"}
    assert (document["version"], document["kind"], document["differences"]) == (1, "compare", [])


def test_the_tables_say_all(document) -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    compare._print(console, document)
    text = console.export_text()
    for piece in ("xla: top kernels", "Largest differences to xla", "splash: it runs on tpu", "xprof", "quartiles"):
        assert piece in text, piece


# ---- refusals


def test_nothing_to_time_leaves_nothing_behind(tmp_path, capsys) -> None:
    out = tmp_path / "out"
    options = compare.CompareOptions("attention_forward", contestants=("splash", "cudnn"), out=str(out), **TINY)
    document = compare.run(options)
    assert document["trace"] is None
    assert all("reason" in row for row in document["rows"])
    assert not out.exists()
    assert "Nothing could be timed here." in capsys.readouterr().out


def test_who_disagrees_is_not_timed(monkeypatch, tmp_path) -> None:
    wrong = compare.Contestant("wrong", lambda o: bench.jax_nn(Full()))
    monkeypatch.setitem(compare.CONTESTANTS, "wrong", wrong)
    options = compare.CompareOptions("attention_forward", contestants=("wrong", "xla"), out=str(tmp_path), **TINY)
    first, second = compare.run(options, quiet())["rows"]
    assert first["reason"].startswith("it disagrees with reference in float32: relative error")
    assert "samples" not in first
    assert second["ratio"]["value"] == 1  # the first that ran


def test_calls_that_the_trace_does_not_show_are_a_reason(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(trace, "read", lambda data: trace.Trace((), 2e-3))
    options = compare.CompareOptions("attention_forward", contestants=("xla",), out=str(tmp_path), **TINY)
    document = compare.run(options, quiet())
    assert document["rows"][0]["reason"].startswith("the trace shows 0 executions of 4 calls; 2 ms of kernels name no")
    assert document["plot"] is None
    assert len((tmp_path / compare.FILE).read_text().splitlines()) == 1


def test_a_rival_that_fails_is_a_row_and_ours_is_an_error(monkeypatch, tmp_path) -> None:
    def fails(_: bench.AttentionOptions) -> bench.Attend:
        raise TypeError("no such argument\nsecond line")

    monkeypatch.setitem(compare.CONTESTANTS, "rival", compare.Contestant("rival", fails))
    options = compare.CompareOptions("attention_forward", contestants=("rival", "xla"), out=str(tmp_path), **TINY)
    first, second = compare.run(options, quiet())["rows"]
    assert first["reason"] == "TypeError: no such argument second line"
    assert "samples" in second
    monkeypatch.setitem(compare.CONTESTANTS, "xla", compare.Contestant("ours", fails))
    with pytest.raises(TypeError, match="no such argument"):
        compare.run(dataclasses.replace(options, contestants=("xla",)), quiet())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contestants": ("xla", "jax_n")}, "unknown contestant 'jax_n'.*jax_nn"),
        ({"contestants": ()}, "--with must name at least one"),
        ({"contestants": ("xla", "xla")}, "must name each contestant once"),
        ({"case": "attention"}, "unknown case 'attention'.*attention_forward"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"T": 0}, "T=0 must be at least 1"),
        ({"K": 3}, "K=3 must divide H=8"),
    ],
)
def test_wrong_arguments(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        compare.CompareOptions(**{"case": "attention_forward", **changes})


def test_beyond_memory_is_refused(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(compare, "available_memory", lambda: 1000)
    with pytest.raises(ValueError, match="T=300 is too long for this machine"):
        compare.run(compare.CompareOptions("attention_forward", out=str(tmp_path), **TINY), quiet())


def problem(**changes) -> bench.AttentionOptions:
    return compare.CompareOptions("attention_forward", **{"T": 256, "H": 2, "D": 128, **changes}).problem


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("jax_flash", {"K": 1}, "K=1 must be H=2"),
        ("splash", {"K": 1}, "K=1 must be H=2"),
        ("splash", {"T": 100}, "blocks are multiples of 128"),
        ("jax_flash", {"T": 128}, "has at least two"),
        ("jax_flash", {"mask": Window(5)}, "knows Causal"),
        ("cudnn", {}, "dtype is float32"),
        ("tokamax", {}, "pip install tokamax"),
    ],
)
def test_reasons_of_rivals(name, changes, reason, monkeypatch) -> None:
    monkeypatch.setattr(compare.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=reason):
        compare.CONTESTANTS[name].build(problem(**changes))


@pytest.mark.parametrize("name", ["jax_flash", "splash"])
@pytest.mark.parametrize("mask", [Causal(), Full()], ids=str)
def test_tpu_rivals_compute_attention(name, mask) -> None:
    """Under the interpreter of TPU kernels: layouts and scale are right."""
    o = problem(mask=mask)
    q, k, v, _ = (jnp.asarray(x) for x in bench.inputs(o, 256).values())
    with pltpu.force_tpu_interpret_mode():
        out = jax.jit(compare.CONTESTANTS[name].build(o))(q, k, v)
    expected = compare.CONTESTANTS["reference"].build(o)(q, k, v)
    assert bench.relative_error([np.asarray(out)], [np.asarray(expected)]) < 1e-2  # its products are bfloat16


# ---- the roofline


def test_static_cases_exist() -> None:
    for rival in compare.RIVALS.values():
        assert rival.case is None or {rival.case, f"{rival.case}_backward"} <= set(cases.CASES)


def test_the_dtype_is_the_devices_own(monkeypatch) -> None:
    assert problem().dtype == "float32"
    monkeypatch.setattr(compare.dispatch, "target", lambda: compare.dispatch.Target("tpu", "TPU v5 lite"))
    assert problem().dtype == "bfloat16"
    assert problem(dtype="float16").dtype == "float16"


def test_minimal_bytes_by_hand() -> None:
    o = problem(B=3, H=4, K=2, dtype="bfloat16")
    q, kv = 2 * 3 * 256 * 4 * 128, 2 * 3 * 256 * 2 * 128
    assert compare.minimal_bytes(o, 256, "forward") == 2 * q + 2 * kv
    assert compare.minimal_bytes(o, 256, "forward_backward") == 6 * q + 6 * kv


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
    row = compare._row("splash", options, executions(1e-3, 2e-3, 3e-3), device)
    flops = 3 * cost.attention_flops(cost.visible_pairs(Causal(), 2048), 8, 128).forward
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

    wide = dataclasses.replace(options, dtype="float32")
    assert "known for bfloat16" in compare._row("splash", wide, executions(1e-3), device)["static_note"]
    monkeypatch.setattr(tpu, "profile", lambda *_: {"reason": "the compiler ended"})
    row = compare._row("splash", options, executions(1e-3), device)
    assert (row["static_ratio"], row["static_note"]) == (None, "the compiler ended")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0, "0"), (3.21e-8, "32.1 ns"), (1.5e-6, "1.5 us"), (0.0123456, "12.3 ms"), (2.0, "2 s"), (1234.5, "1234 s")],
)
def test_seconds_have_three_digits(seconds, text) -> None:
    assert compare.seconds_text(seconds) == text
