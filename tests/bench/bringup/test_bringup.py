"""Whole bring-ups on the CPU, at small sizes; kernels that are wrong, refuse, crash or never return."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from longattn import cli
from longattn.aot import train_step
from longattn.bench import compare
from longattn.bench.bringup import BringupOptions, memory, numerics, report, run, show, timing
from longattn.cost import hardware
from longattn.ops import dispatch
from longattn.ops.attention import api, xla
from longattn.train import kernel_check as reports

ROOT = Path(__file__).parents[3]
SMALL = {"T": 64, "timed_T": 128, "rounds": 1}
FEW = ("empty rows", "linear, head decay, packed documents", "linear state alone, whole chunks")


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def quiet() -> Console:
    return Console(quiet=True)


def changed(name: str, monkeypatch: pytest.MonkeyPatch, **changes) -> None:
    """A back end in the table that is xla's but for `changes`."""
    monkeypatch.setitem(api.BACK_ENDS, name, types.SimpleNamespace(**{**vars(xla), **changes}))


def one_report(folder: Path) -> dict:
    (path,) = folder.glob("*.json")
    assert not list(folder.glob("*.part"))
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("whole") / "reports"
    return run(BringupOptions(cases=FEW, out=str(folder), **SMALL), quiet()), folder


@pytest.mark.slow
def test_every_part_on_a_cpu(whole) -> None:
    document, folder = whole
    assert document == one_report(folder)
    assert (document["version"], document["kind"], document["generation"]) == (2, "bringup", "cpu")
    assert [document[part]["status"] for part in ("numerics", "memory", "timing")] == ["done"] * 3
    assert {(row["case"], row["back_end"]) for row in document["numerics"]["rows"]} >= {(case, "xla") for case in FEW}
    assert "float64" in document["numerics"]["against"]
    (refused,) = {row["reason"] for row in document["numerics"]["rows"] if row["back_end"] == "pallas_tpu"}
    assert "the kernels are for TPUs, the target is 'cpu'" in refused
    assert document["verdict"] == "incomplete"  # of the cases
    (finding,) = document["findings"]
    assert finding == f"numerics: {len(FEW)} of {document['numerics']['of']} cases were tried"
    (row,) = document["memory"]["rows"]
    assert row["compiled_bytes"] > 0
    assert "outcome" not in row
    assert (row["predicted_bytes"], row["measured_bytes"]) == (None, None)
    assert "this is cpu" in row["predicted_reason"] and "no account" in row["measured_reason"]
    timed = {(row["what"], row["contestant"]): row for row in document["timing"]["rows"]}
    for what in ("forward", "forward_backward"):
        assert timed[what, "xla"]["seconds"] > 0
        assert timed[what, "xla"]["clock"] == "device"
        assert timed[what, "splash"]["reason"] == "it runs on tpu, this is cpu"
    assert "this is cpu" in document["timing"]["note"]
    assert "jax" in document["environment"]["versions"] and "commit" in document["environment"]
    assert document["options"] == {"parts": ["numerics", "memory", "timing"], "cases": list(FEW), "seconds": 540,
                                   **SMALL}  # fmt: skip


@pytest.mark.slow
def test_the_page_needs_nothing_else(whole) -> None:
    document, folder = whole
    (page,) = folder.glob("*.html")
    text = page.read_text()
    assert not re.search(r"<(script|link|img|iframe)\b|\bsrc=|@import|url\(", text)
    for piece in ("Kernels on cpu: incomplete", *FEW, "its compiler here", "jax_nn", "it runs on tpu, this is cpu"):
        assert piece in text, piece
    assert document["environment"]["versions"]["jaxlib"] in text


@pytest.mark.slow
def test_the_tables_say_all(whole) -> None:
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    show.tables(console, whole[0], whole[1] / "x.json")
    text = console.export_text()
    for piece in ("empty rows", "passed: ", "forward + backward", "cpu: incomplete", "x.html"):
        assert piece in text, piece


def test_a_reason_of_many_cases_is_short() -> None:
    rows = [{"case": f"case {i}", "back_end": "a", "reason": "it refuses"} for i in range(20)]
    assert show.notes({"numerics": {"rows": rows}}, "numerics") == ["a: it refuses (case 0; case 1; case 2; 17 more)"]


@pytest.mark.slow
def test_a_wrong_kernel_is_reported_and_the_rest_goes_on(monkeypatch, tmp_path, capsys) -> None:
    def wrong(*call):
        out, lse = xla.attend(*call)
        return (out * 1.1).astype(out.dtype), lse

    def refuse(*_):
        raise NotImplementedError("it is Tuesday")

    changed("wrong", monkeypatch, attend=wrong)
    changed("choosy", monkeypatch, check=refuse)
    arguments = ["--parts", "numerics", "--cases", *FEW[:2], "--out", str(tmp_path / "o"), "--T", "64", "--json"]
    assert cli.main(["bringup", *arguments]) == 1
    document = json.loads(capsys.readouterr().out)
    assert document == one_report(tmp_path / "o")
    rows = {(row["case"], row["back_end"]): row for row in document["numerics"]["rows"]}
    for case in FEW[:2]:
        assert rows[case, "xla"]["outcome"] == "passed"
        if case.startswith("linear"):  # its back ends are others
            assert {name for of, name in rows if of == case} == {"pallas_tpu", "xla"}
            continue
        assert rows[case, "wrong"]["outcome"] == "failed"
        assert not rows[case, "wrong"]["results"]["out"]["agrees"]
        assert rows[case, "choosy"]["outcome"] == "refused"
        assert "it is Tuesday" in rows[case, "choosy"]["reason"]
    assert document["verdict"] == "failed"
    assert any(f.startswith("numerics: wrong, empty rows: ") for f in document["findings"])
    assert reports.report("cpu", "xla") is None


INTERPRETED = """
import sys
from jax.experimental.pallas import tpu as pltpu
from longattn.bench.bringup import BringupOptions, run

with pltpu.force_tpu_interpret_mode():
    cases = ("causal, float32", "linear, packed documents", "linear state alone, whole chunks")
    run(BringupOptions(parts=("numerics",), cases=cases, out=sys.argv[1], T=64))
"""


@pytest.mark.slow
def test_kernels_that_accept_the_device_are_tried(tmp_path) -> None:
    """In interpret mode a CPU is a TPU to them. A process of its own, as a user's is."""
    done = subprocess.run([sys.executable, "-c", INTERPRETED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = one_report(tmp_path)["numerics"]["rows"]
    assert [(row["op"], row["back_end"], row["outcome"]) for row in rows] == [
        (op, name, "passed")
        for op in ("attention", "linear attention", "linear attention in parts")
        for name in ("pallas_tpu", "xla")
    ]


@pytest.mark.slow
def test_a_report_that_passed_is_kept_where_training_looks(monkeypatch, tmp_path) -> None:
    everything = {name: p for name, p in numerics.problems(64).items() if name in FEW[:2]}
    monkeypatch.setattr(numerics, "problems", lambda T: everything)
    document = run(BringupOptions(parts=("numerics",), out=str(tmp_path / "elsewhere"), **SMALL), quiet())
    assert (document["verdict"], document["findings"]) == ("passed", [])
    assert document["memory"] == {"status": "not run", "rows": []}
    found = reports.report("cpu", "xla")
    assert found is not None and found.parent == reports.folders()[1]
    assert json.loads(found.read_text()) == document
    assert reports.report("cpu", "pallas_tpu") is None  # it refused
    assert reports.report("cpu", "xla", "linear attention") == found
    assert reports.report("v5e", "xla") is None


def test_a_part_that_raises_is_in_the_report(monkeypatch, tmp_path) -> None:
    def broken(*_):
        raise RuntimeError("the device\nis gone")

    monkeypatch.setattr("longattn.numerics.plain", broken)
    monkeypatch.setattr(memory, "_measured", lambda config: {"measured_bytes": None})
    document = run(BringupOptions(parts=("numerics", "memory"), out=str(tmp_path / "o"), **SMALL), quiet())
    assert document["numerics"]["status"] == "failed"
    assert document["numerics"]["reason"] == "the truth of 'causal': RuntimeError: the device is gone"
    assert document["memory"]["status"] == "done"
    assert document["verdict"] == "failed"


def test_no_time_is_a_reason_not_a_failure(tmp_path, capsys) -> None:
    arguments = ["bringup", "--parts", "numerics", "timing", "--seconds", "1e-6", "--out", str(tmp_path / "o")]
    assert cli.main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    rows = document["numerics"]["rows"] + document["timing"]["rows"]
    assert {row["outcome"] for row in rows} == {"not run"}
    assert {row["reason"] for row in rows} == {"the time for this part was over"}
    assert document["verdict"] == "incomplete"


STUCK = """
import sys, time, types
from longattn.bench.bringup import BringupOptions, report, run
from longattn.ops.attention import api, xla

def stuck(q, *rest):
    if q.shape[1] > {short}:
        time.sleep(600)
    return xla.attend(q, *rest)

api.BACK_ENDS["stuck"] = types.SimpleNamespace(**{{**vars(xla), "attend": stuck}})
report.GRACE = {grace}
run(BringupOptions(parts=("numerics",), cases=("causal", "longer"), seconds={seconds}, out=sys.argv[1], T=64))
"""


def stuck(folder: Path, **settings) -> subprocess.Popen:
    """A bring-up of which a kernel never returns from the second case."""
    code = STUCK.format(**{"short": 64, "grace": 30, "seconds": 300, **settings})
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_leaves_what_it_has(tmp_path) -> None:
    child = stuck(tmp_path)
    try:
        end = time.monotonic() + 120
        rows: list[dict] = []
        while len(rows) < 5 and time.monotonic() < end and child.poll() is None:
            time.sleep(0.1)
            for path in tmp_path.glob("*.json"):
                rows = json.loads(path.read_text())["numerics"]["rows"]  # whole at any moment
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    document = one_report(tmp_path)
    rows = [row for row in document["numerics"]["rows"] if row["back_end"] != "pallas_tpu"]
    assert [(row["case"], row["back_end"], row["outcome"]) for row in rows] == [
        ("causal", "xla", "passed"), ("causal", "stuck", "passed"), ("longer", "xla", "passed"),
    ]  # fmt: skip
    assert (document["numerics"]["status"], document["verdict"]) == ("running", "incomplete")
    assert list(tmp_path.glob("*.html"))


@pytest.mark.slow
def test_a_kernel_that_never_returns_ends_the_run_and_is_named(tmp_path) -> None:
    child = stuck(tmp_path, short=0, seconds=12, grace=0.5)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 1
    document = one_report(tmp_path)
    assert (document["numerics"]["status"], document["verdict"]) == ("failed", "failed")
    assert re.fullmatch(r"stuck at 'causal' has not returned after \d+ s", document["numerics"]["reason"])
    assert "longattn: numerics: stuck at 'causal' has not returned" in said


def test_without_a_profiler_the_host_keeps_time(monkeypatch) -> None:
    def no_profiler(options):
        raise RuntimeError("CUPTI is\nnot there")

    monkeypatch.setattr(compare, "measure", no_profiler)
    options = compare.CompareOptions("attention_forward", ("xla", "splash"), T=128, H=2, D=8, rounds=2)
    ours, splash = timing._rows(options)
    assert (ours["outcome"], ours["clock"]) == ("timed", "host")
    assert ours["seconds"] > 0
    assert ours["clock_note"] == "RuntimeError: CUPTI is not there"
    assert (splash["outcome"], splash["reason"]) == ("refused", "it runs on tpu, this is cpu")


def test_what_a_trace_does_not_show_is_timed_by_the_host() -> None:
    options = compare.CompareOptions("attention_forward", ("xla",), T=128, H=2, D=8)
    row = {"contestant": "xla", "error": 1e-7, "host_seconds": [3e-3, 1e-3, 2e-3], "reason": "the trace shows nothing"}
    made = timing._row(row, options)
    assert (made["outcome"], made["seconds"], made["clock"]) == ("timed", 2e-3, "host")
    assert made["clock_note"] == "the trace shows nothing" and "reason" not in made


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        ({"contestant": "xla", "reason": "it needs 9.0 GiB, 8.0 GiB are free"}, "refused"),
        ({"contestant": "xla", "reason": "JaxRuntimeError: INTERNAL: Mosaic failed"}, "failed"),
        ({"contestant": "xla", "error": 0.3, "reason": "it disagrees with reference in float32"}, "failed"),
        ({"contestant": "splash", "error": 0.3, "reason": "it disagrees with reference in float32"}, "refused"),
    ],
)
def test_ours_must_be_right_a_rival_need_not(row, outcome) -> None:
    options = compare.CompareOptions("attention_forward", ("xla",), T=128, H=2, D=8)
    assert timing._row(row, options)["outcome"] == outcome


def test_cycles_on_a_chip(monkeypatch) -> None:
    """A v5e that is not here takes 2 ms for what its compiler schedules for 1 ms."""
    options = compare.CompareOptions("attention_forward", ("xla",), T=128, H=2, D=8)
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("tpu", "TPU v5 lite"))
    row = {
        "contestant": "splash", "samples": [2e-3], "device_seconds": {"median": 2e-3, "low": 2e-3, "high": 2e-3},
        "static_seconds": 1e-3, "static_ratio": 2.0, "static_note": "",
    }  # fmt: skip
    made = timing._row(row, options)
    clock = hardware.tpu_clock("v5e")
    assert (made["static_cycles"], made["measured_cycles"]) == (1e-3 * clock, 2e-3 * clock)
    rows = {"timing": {"rows": [{"what": "forward", **made}]}}
    assert show.timing(rows)[0][-3:] == ("1.503 M", "3.006 M", "2.00")


@pytest.mark.parametrize("kind", ["TPU v5 lite", "NVIDIA H100 80GB HBM3", "Tesla T4"])
def test_plan_is_asked_for_one_device_of_this_chip(monkeypatch, kind) -> None:
    asked = []
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("tpu", kind))
    monkeypatch.setattr(train_step, "facts", lambda config, where, *_: asked.append(where.name) or {"hbm_bytes": 200})
    predicted = memory._predicted(memory._SMALL, 10.0)
    if kind == "Tesla T4":
        assert "this is Tesla T4" in predicted["predicted_reason"] and not asked
    else:
        assert predicted == {"predicted_bytes": 200, "predicted_reason": None}
        assert asked == ["v5e:2x2" if "TPU" in kind else "h100:1"]


@pytest.mark.slow
def test_the_peak_of_a_step_and_a_loss_that_is_no_number(monkeypatch) -> None:
    peaks = iter([{"peak_bytes_in_use": 10, "bytes_in_use": 5}, {"peak_bytes_in_use": 300, "bytes_in_use": 5}])
    monkeypatch.setattr(memory, "_stats", lambda: next(peaks))
    step = memory.steps.train_step(memory._SMALL)

    def poisoned(state, batch):
        state, metrics = step(state, batch)
        return state, {**metrics, "loss": metrics["loss"] * np.nan}

    monkeypatch.setattr(memory.steps, "train_step", lambda config: jax.jit(poisoned))
    made = memory._measured(memory._SMALL)
    assert (made["measured_bytes"], made["held_before_bytes"], made["measured_reason"]) == (300, 5, None)
    assert (made["outcome"], made["reason"]) == ("failed", "the loss of the step is nan")


@pytest.mark.slow
def test_a_peak_that_is_not_the_steps_own_is_no_reading(monkeypatch) -> None:
    monkeypatch.setattr(memory, "_stats", lambda: {"peak_bytes_in_use": 10, "bytes_in_use": 5})
    made = memory._measured(memory._SMALL)
    assert made["measured_bytes"] is None
    assert made["measured_reason"] == "what ran before held more: 10 bytes"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seconds", "-1"), "seconds=-1 must be positive"),
        (("--parts", "numeric"), "numeric"),
        (("--cases", "causl"), "unknown case 'causl'; did you mean 'causal'?"),
    ],
)
def test_bad_options_are_one_line(capsys, arguments, message) -> None:
    assert cli.main(["bringup", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_the_verdict() -> None:
    parts = ("numerics", "timing")
    good = {"case": "a", "back_end": "xla", "outcome": "passed"}
    done = {"numerics": {"status": "done", "of": 1, "rows": [good]}, "timing": {"status": "not run", "rows": []}}
    assert report.verdict(done, parts) == ("passed", [])
    cut = {**done, "numerics": {"status": "running", "of": 1, "rows": [good]}}
    assert report.verdict(cut, parts)[0] == "incomplete"
    slow = {"contestant": "xla", "what": "forward", "outcome": "failed", "reason": "it disagrees"}
    wrong = {**done, "timing": {"status": "done", "rows": [slow]}}
    assert report.verdict(wrong, parts) == ("failed", ["timing: xla, forward: it disagrees"])
