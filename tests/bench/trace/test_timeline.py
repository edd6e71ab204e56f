"""When a device is busy."""

from __future__ import annotations

import pytest

from longattn.bench import trace


def execution(*spans: tuple[float, float]) -> trace.Execution:
    kernels = tuple(trace.Kernel("k", trace.Scope((), "forward"), a, b, (b - a) * 1e-9) for a, b in spans)
    return trace.Execution("jit_f", "/device:CPU:0", spans[0][0], max(b for _, b in spans), kernels)


def test_what_runs_at_once_is_counted_once_and_within_the_span_alone() -> None:
    runs = execution((0, 10), (5, 20), (30, 40)), execution((35, 60), (70, 80)), execution((95, 120))
    assert runs[0].busy == pytest.approx(30e-9)
    assert trace.busy(runs, 0, 100) == pytest.approx((20 + 30 + 10 + 5) * 1e-9)
    assert trace.busy(runs, 8, 36) == pytest.approx((12 + 6) * 1e-9)
    assert trace.busy(runs, 200, 300) == 0
