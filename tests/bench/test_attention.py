"""The timing functions on known answers, and the benchmark on tiny shapes, against a fake PyTorch and the real one."""

import json
import math
import os
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from longattn.bench import attention, timing
from longattn.bench.timing import Seconds, cores, fit_exponent, interleave, ratio, temp_bytes, turns, two_speeds
from longattn.cost import flops
from longattn.mask import Causal, Chunked, Window

TINY = {"T": (16, 32), "B": 1, "H": 2, "D": 8, "repeats": 3, "window": 4}

# ---- timing


def test_interleave_takes_turns_after_warming_up():
    calls = []
    fns = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleave(fns, 3, warm=2, pause=0)
    assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab"
    assert {name: len(s) for name, s in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_interleave_measures_the_call_or_takes_its_own_word():
    fns = {"sleeps": lambda: time.sleep(0.02), "says": lambda: Seconds(7.0), "jax": lambda: jnp.ones(3)}
    seconds = interleave(fns, 2, pause=0)
    assert all(0.02 <= s < 2 for s in seconds["sleeps"])
    assert seconds["says"] == [7.0, 7.0]


class Large:
    """A compiled program with a gigabyte of scratch."""

    temp_size_in_bytes = 2**30

    def __init__(self, calls):
        self.calls = calls

    def __call__(self):
        self.calls.append("L")

    def memory_analysis(self):
        return self


def test_what_allocates_gigabytes_comes_after_all_others():
    calls = []
    large = Large(calls)
    fns = {"large": large, "a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    assert list(interleave(fns, 2, pause=0)) == ["large", "a", "b"]
    assert "".join(calls) == "ab" + "ab" + "ba" + "L" * 3


def test_a_call_on_fewer_cores_than_usual_is_repeated(monkeypatch):
    uses = iter([2.0, 1.0, 1.0, 1.9, 2.0, 0.5, 0.5, 0.5, 0.5])  # CPU seconds per second, call by call
    clock, cpu = [0.0], [0.0]

    def work():
        clock[0] += 1
        cpu[0] += next(uses)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(timing.time, "process_time", lambda: cpu[0])
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    kept = turns({"a": work}, 3)["a"]
    # The first timed call is taken at its third try, the second at once; the third has one repetition left.
    assert [i for i, _ in kept] == [3, 4, 6]
    assert next(uses) == 0.5


def test_two_speeds():
    slow_and_fast = [1.0, 1.02, 0.99, 2.5, 2.6, 2.55]
    assert two_speeds(slow_and_fast)
    assert not two_speeds([1.0, 1.02, 0.99, 1.01, 1.0, 2.5])  # one outlier
    assert not two_speeds([1.0, 1.001, 1.0, 1.1, 1.101, 1.1])  # near enough to tell apart from others
    assert not two_speeds(np.linspace(1, 3, 7))
    rng = np.random.default_rng(0)
    assert sum(two_speeds(rng.lognormal(0, 0.2, 7)) for _ in range(200)) <= 10


def test_no_ratio_of_what_ran_at_two_speeds(capsys, monkeypatch):
    samples = {"longattn": [1.0, 1.01, 1.0, 1.02], "jax": [5.0, 5.1, 9.0, 9.1], "window": [0.5, 0.51, 0.5, 0.5]}
    monkeypatch.setattr(attention, "interleave", lambda fns, repeats: {name: samples[name] for name in fns})
    document, out = run(capsys, T=(16,), what=("forward",), against=("jax",))
    (row,) = document["rows"]
    assert row["two_speeds"] == ["jax"]
    assert row["ratio"].keys() == {"window"}
    assert row["ratio"]["window"]["value"] == pytest.approx(2.01)
    assert "jax at T=16 (forward) ran at two speeds, 5 s to 9.1 s: no ratio" in " ".join(out.split())


def test_ratio_is_of_medians_within_its_interval():
    r = ratio([2.0, 2.2, 2.1, 9.0, 2.0], [1.0, 1.1, 1.0, 1.0, 1.0])
    assert r.value == pytest.approx(2.1)
    assert r.low <= r.value <= r.high
    exact = ratio([3.0] * 5, [2.0] * 5)
    assert (exact.value, exact.low, exact.high) == (1.5, 1.5, 1.5)


def test_fit_exponent_recovers_power_laws():
    sizes = [1024, 2048, 4096, 8192]
    for e in (0.5, 1, 2):
        fit = fit_exponent(sizes, [3.0 * s**e for s in sizes])
        assert fit.value == pytest.approx(e)
        assert fit.high - fit.low < 1e-6
    rng = np.random.default_rng(0)
    fit = fit_exponent(sizes, [[s**2 * f for f in rng.uniform(0.9, 1.1, 15)] for s in sizes])
    assert fit.low < 2 < fit.high
    assert 0 < fit.high - fit.low < 0.3
    assert math.isnan(fit_exponent(sizes[:2], [1, 2]).low)


@pytest.mark.parametrize(("sizes", "values"), [([1], [1]), ([1, 2], [1, 0]), ([1, 2, 3], [1, 2])])
def test_fit_exponent_refuses_what_has_no_slope(sizes, values):
    with pytest.raises(ValueError, match="must be at least two"):
        fit_exponent(sizes, values)


def test_temp_bytes_counts_scratch_and_runs_nothing():
    T = 256
    x = jax.ShapeDtypeStruct((T, 4), jnp.float32)

    def f(x):
        return jax.nn.softmax(x @ x.T) @ x

    assert T * T * 4 <= temp_bytes(f, x) <= 4 * T * T * 4
    assert temp_bytes(jax.jit(f), x) == temp_bytes(f, x)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux can pin threads to cores")
def test_cores_pins_every_thread_and_lets_go():
    before = os.sched_getaffinity(0)
    with cores(1) as n:
        assert n == 1
        assert {len(os.sched_getaffinity(int(t))) for t in os.listdir("/proc/self/task")} == {1}
    assert os.sched_getaffinity(0) == before


# ---- the benchmark


def run(capsys, **options):
    console = Console(width=100)
    document = attention.attention(attention.AttentionOptions(**{**TINY, **options}), console)
    return document, capsys.readouterr().out


@pytest.mark.slow
def test_rows_hold_every_candidate_with_errors_ratios_and_memory(capsys):
    document, out = run(capsys, against=("jax", "reference"), what=("forward_backward",), K=1)
    assert [(r["T"], r["what"]) for r in document["rows"]] == [(T, "forward_backward") for T in (16, 32)]
    for row in document["rows"]:
        assert set(row["seconds"]) == {"longattn", "jax", "reference", "window"}
        assert all(len(s) == 3 and min(s) > 0 for s in row["seconds"].values())
        assert set(row["error"]) == {"jax", "reference"}
        assert set(row["ratio"]) == {"jax", "reference", "window"}
        assert row["temp_bytes_at_2T"] > 0
        pairs = row["T"] * (row["T"] + 1) // 2
        once = flops.attention_flops(pairs, 2, 8)
        assert row["flops"]["longattn"] == once.forward + once.backward
        assert row["flops"]["window"] < row["flops"]["jax"] == row["flops"]["longattn"]
    assert set(document["exponents"]["forward_backward"]) == {"longattn", "jax", "reference", "window"}
    assert "reference" in out
    assert "window 4" in out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_agrees_within_its_roundings(capsys, dtype):
    document, _ = run(capsys, against=("reference",), T=(32,), what=("forward_backward",), window=0, dtype=dtype)
    assert document["rows"][0]["error"]["reference"] <= attention.AGREE[dtype]


def test_a_peer_that_refuses_is_left_out_with_its_reason(capsys, monkeypatch):
    def refuses(q, k, v):
        raise NotImplementedError("no such thing here")

    monkeypatch.setattr(attention, "jax_nn", lambda mask: refuses)
    document, out = run(capsys, against=("jax",), T=(16,), what=("forward",), window=0)
    assert document["rows"][0]["skipped"] == {"jax": "refuses: no such thing here"}
    assert "no such thing here" in out


def test_json_is_one_document_with_where_it_ran(capsys):
    document, out = run(capsys, against=("jax",), T=(16,), what=("forward",), window=0, json=True)
    read = json.loads(out)
    assert read["rows"] == document["rows"]
    assert [(r["T"], r["what"]) for r in read["rows"]] == [(16, "forward")]
    assert read["version"] == attention.VERSION
    assert read["options"]["mask"] == "Causal()"
    assert read["environment"]["versions"]["jax"] == jax.__version__
    assert {"commit", "device", "host"} <= set(read["environment"])


def test_disagreement_stops_before_timing(monkeypatch):
    wrong = attention.jax_nn(Window(1))
    monkeypatch.setattr(attention, "jax_nn", lambda mask: wrong)
    monkeypatch.setattr(attention, "interleave", lambda *a, **k: pytest.fail("timed a wrong result"))
    with pytest.raises(FloatingPointError, match="longattn and jax disagree at T=16"):
        attention.attention(attention.AttentionOptions(**TINY, against=("jax",)))


def test_what_does_not_fit_is_left_out_with_the_reason(capsys, monkeypatch):
    free = iter([2**40, 2**40, 10])  # for the inputs, when longattn asks, and when the reference does
    monkeypatch.setattr(attention, "available_memory", lambda: next(free))
    document, out = run(capsys, against=("reference",), T=(32,), what=("forward",), window=0)
    (row,) = document["rows"]
    assert set(row["seconds"]) == {"longattn"}
    assert "GiB are free" in row["skipped"]["reference"]
    assert "GiB are free" in " ".join(out.split())
    monkeypatch.setattr(attention, "available_memory", lambda: 10)
    with pytest.raises(ValueError, match="T=32 is too long for this machine"):
        attention.attention(attention.AttentionOptions(**{**TINY, "T": (32,)}, against=()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"T": ()}, "must each name at least one"),
        ({"T": (0,)}, "T=0 must be at least 1"),
        ({"H": 4, "K": 3}, "K=3 must divide H=4"),
        ({"window": -1}, "window=-1 must not be negative"),
        ({"repeats": 0}, "repeats=0 must be at least 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        attention.AttentionOptions(**options)


# ---- PyTorch, in another process

FAKE_WORKER = """
    import json, os, sys
    import numpy as np

    print(json.dumps({"ready": "fake"}), flush=True)
    for line in sys.stdin:
        a = json.loads(line)
        if a["command"] == "load":
            folder, options, answer = a["folder"], a, {}
            q, k, v, do = (np.load(os.path.join(folder, n + ".npy")) for n in ("q", "k", "v", "do"))
        elif a["command"] == "save":
            logits = np.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
            if options["causal"]:
                logits = np.where(np.tri(q.shape[1], dtype=bool), logits, -np.inf)
            if options["mask"]:
                logits = np.where(np.load(os.path.join(folder, "mask.npy")), logits, -np.inf)
            p = np.exp(logits - logits.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            np.save(os.path.join(folder, "out.npy"), np.einsum("bhts,bshd->bthd", p, v))
            answer = {}
        else:
            answer = BROKEN or {"seconds": 0.5}
        print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def fake(monkeypatch, tmp_path):
    def install(broken=None):
        path = tmp_path / "worker.py"
        path.write_text(textwrap.dedent(FAKE_WORKER).replace("BROKEN", repr(broken)))
        monkeypatch.setattr(attention, "WORKER", path)
        monkeypatch.setenv(attention.TORCH_PYTHON, sys.executable)

    return install


cpu_only = pytest.mark.skipif(jax.default_backend() != "cpu", reason="PyTorch is compared on the CPU only")


@pytest.mark.slow
@cpu_only
@pytest.mark.parametrize("mask", [Causal(), Causal() & Chunked(8)], ids=str)
def test_a_worker_times_itself_and_its_results_are_checked(capsys, fake, mask):
    fake()
    document, out = run(capsys, against=("torch",), what=("forward",), mask=mask, T=(16,), window=0)
    for row in document["rows"]:
        assert row["seconds"]["torch"] == [0.5] * 3
        assert row["error"]["torch"] < 1e-6
        assert row["ratio"]["torch"]["value"] == pytest.approx(0.5 / row["median"]["longattn"])
    assert document["torch"] == "fake"
    assert "torch" in out


@cpu_only
def test_a_failing_worker_is_an_error_with_its_reason(fake):
    fake(broken={"error": "RuntimeError: out of luck"})
    options = attention.AttentionOptions(**{**TINY, "what": ("forward",)}, against=("torch",))
    with pytest.raises(ValueError, match="PyTorch: RuntimeError: out of luck"):
        attention.attention(options)


@cpu_only
def test_no_interpreter_is_said_clearly(capsys, monkeypatch):
    monkeypatch.delenv(attention.TORCH_PYTHON, raising=False)
    with pytest.raises(ValueError, match="LONGATTN_TORCH_PYTHON is not set; make it the path"):
        attention.attention(attention.AttentionOptions(**TINY, against=("torch",)))
    document, out = run(capsys, T=(16,), what=("forward",))
    assert "torch" not in document["rows"][0]["seconds"]
    assert "LONGATTN_TORCH_PYTHON is not set" in " ".join(out.split())
    for python in ("/nowhere/python", sys.executable):
        monkeypatch.setenv(attention.TORCH_PYTHON, python)
        monkeypatch.setattr(attention, "WORKER", "/nowhere/worker.py")
        with pytest.raises(ValueError, match="must be a Python interpreter with PyTorch"):
            attention.attention(attention.AttentionOptions(**TINY, against=("torch",)))


@cpu_only
@pytest.mark.skipif(
    not os.environ.get(attention.TORCH_PYTHON), reason=f"{attention.TORCH_PYTHON} is not set: no PyTorch to run"
)
@pytest.mark.parametrize("mask", [Causal(), Causal() & Chunked(8)], ids=str)
def test_the_real_pytorch_agrees(capsys, mask):
    document, _ = run(capsys, against=("torch",), mask=mask, K=1)
    for row in document["rows"]:
        assert 0 < row["error"]["torch"] < 2e-6
        assert min(row["seconds"]["torch"]) > 0
