"""Sums over the executions of a program."""

from __future__ import annotations

import pytest

from longattn.bench import trace
from tests.bench.trace.written import cpu_space


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
