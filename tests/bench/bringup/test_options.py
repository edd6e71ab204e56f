"""Refusals, the cases, where a report goes."""

from __future__ import annotations

import itertools
import types
from pathlib import Path

import pytest

from longattn import numerics
from longattn.bench.bringup import BringupOptions
from longattn.mask import Causal, Full, Window
from longattn.numerics import LinearProblem, PartsProblem, StateProblem, cases
from longattn.train.kernel_check import CHECKOUT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ()}, "parts='' must name some of numerics, memory, timing"),
        ({"parts": ("memory", "memory")}, "each once"),
        ({"cases": ("causl",)}, "unknown case 'causl'; did you mean 'causal'?"),
        ({"seconds": 0.0}, "seconds=0 must be positive"),
        ({"T": 63}, "T=63 must be at least 64"),
        ({"timed_T": 0}, "timed_T=0 must be at least 1"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
    ],
)
def test_wrong_arguments(changes, message) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as caught:
        BringupOptions(**changes)
    assert "\n" not in str(caught.value)


def test_sizes_suit_the_device() -> None:
    options = BringupOptions()
    assert (options.length, options.timed_length, options.calls) == (128, 256, 3)
    assert BringupOptions(T=100).length == 100


def test_where_a_report_goes(monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    assert BringupOptions().folder == Path("bringup")
    assert BringupOptions(out="here").folder == Path("here")
    monkeypatch.chdir(CHECKOUT)
    assert BringupOptions().folder == Path("experiments/bringup")


def checked(back_ends) -> types.SimpleNamespace:
    """Returns a back end that refuses what xla refuses, and traces as the reference does, in less time."""

    def check(*call):
        back_ends["xla"].check(*call)
        return back_ends["reference"].check(*call)

    return types.SimpleNamespace(**{**vars(back_ends["reference"]), "check": check})


@pytest.mark.slow
def test_the_cases_cover_the_contract(monkeypatch) -> None:
    """Each thing in both precisions where a kernel would have two paths, and every case is a valid call."""
    problems = cases.problems(64)
    for case, problem in problems.items():
        monkeypatch.setitem(problem.api.BACK_ENDS, "checked", checked(problem.api.BACK_ENDS))
        numerics.check(problem, "checked")  # raises for what is no valid call, or is refused
        assert ("float32" in case) == (problem.dtype == "float32"), case
    states = [p for p in problems.values() if isinstance(p, StateProblem)]
    assert len({(p.decay, p.delta) for p in states}) == len(states) == 6
    for delta in (False, True):
        assert {(p.dtype, p.T % 2) for p in states if p.delta == delta} == {("bfloat16", 0), ("float32", 1)}
    assert all(p.documents and p.B > 1 and p.rate * p.T < 8 for p in states)
    parts = [p for p in problems.values() if isinstance(p, PartsProblem)]
    assert {p.dtype for p in parts} == {"float32", "bfloat16"}
    assert any(p.documents and p.heads < p.H and p.T % 2 for p in parts)
    problems = {name: p for name, p in problems.items() if p not in (*states, *parts)}
    linear = {name: p for name, p in problems.items() if isinstance(p, LinearProblem)}
    for dtype in ("float32", "bfloat16"):
        own = [p for p in linear.values() if p.dtype == dtype]
        assert len({(p.decay, p.delta) for p in own}) == len(own) == 6
        for what in ("documents", "state", "heads", "V"):
            assert any(getattr(p, what) for p in own), (what, dtype)
        assert any(p.T % 32 for p in own)
    problems = {name: p for name, p in problems.items() if name not in linear}
    has = {
        "causal": lambda p: p.mask == Causal(),
        "full": lambda p: p.mask == Full(),
        "window": lambda p: isinstance(p.mask, Window) or "Window" in str(p.mask),
        "packed": lambda p: p.documents > 1,
        "grouped": lambda p: p.heads < p.H,
        "odd": lambda p: p.T % 2 == 1,
        "soft cap": lambda p: p.softcap is not None,
        "sinks": lambda p: p.sinks,
        "bias": lambda p: p.bias is not None,
        "empty rows": lambda p: p.keys < p.T and isinstance(p.mask, Window),
        "rising": lambda p: p.rise > 1,
        "64": lambda p: p.D == 64,
        "128": lambda p: p.D == 128,
    }
    for (what, rule), dtype in itertools.product(has.items(), ("float32", "bfloat16")):
        if (what, dtype) not in (("full", "float32"), ("empty rows", "float32")):
            assert any(rule(p) and p.dtype == dtype for p in problems.values()), (what, dtype)
    assert any(p.B > 1 and p.prefix for p in problems.values())
    assert any(p.keys > p.T for p in problems.values())
    assert any(p.D == 256 for p in problems.values())
    assert any(p.values != p.D for p in problems.values())
    assert any(p.scale and p.scale * p.D**0.5 > 88 for p in problems.values())  # beyond float32's exp
