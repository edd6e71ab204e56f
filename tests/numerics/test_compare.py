"""The tolerance is derived, and finds what is wrong."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longattn import numerics
from longattn.mask import Window
from longattn.numerics import Problem
from longattn.ops.attention import xla
from tests.numerics.solving import PROBLEM, back_end, tried


def test_what_is_wrong_fails(monkeypatch) -> None:
    def scaled(*call):
        out, lse = xla.attend(*call)
        return (out * 1.001).astype(out.dtype), lse

    def noughts(*call):
        out, lse = xla.attend(*call)
        return out.at[0, 0, 0, 0].set(jnp.nan), lse

    problem = dataclasses.replace(PROBLEM, sinks=False)
    row = tried(problem, back_end(monkeypatch, PROBLEM, attend=scaled))
    assert row["outcome"] == "failed"
    assert "relative error 1.0e-03" in row["reason"]
    row = tried(problem, back_end(monkeypatch, PROBLEM, attend=noughts))
    assert row["outcome"] == "failed"
    assert row["reason"] == "out: 1 of 2160 numbers are NaN or inf"
    assert row["results"]["out"]["error"] is None  # JSON has no NaN


def test_one_wrong_gradient_fails(monkeypatch) -> None:
    @jax.custom_vjp
    def heavier(x):
        return x

    heavier.defvjp(lambda x: (x, None), lambda _, g: (g * 1.001,))
    wrong = lambda q, k, *rest: xla.attend(q, heavier(k), *rest)
    row = tried(PROBLEM, back_end(monkeypatch, PROBLEM, attend=wrong))
    assert row["outcome"] == "failed"
    assert [name for name, r in row["results"].items() if not r["agrees"]] == ["dk"]
    assert row["reason"].startswith("dk: relative error 1.0e-03 of ")


@pytest.mark.slow
def test_empty_rows_must_be_minus_infinity(monkeypatch) -> None:
    def clamped(*call):
        out, lse = xla.attend(*call)
        return out, jnp.maximum(lse, -1e30)

    problem = Problem(T=40, S=10, H=2, D=8, mask=Window(5))
    assert tried(problem, "xla")["outcome"] == "passed"
    row = tried(problem, back_end(monkeypatch, PROBLEM, attend=clamped))
    assert row["reason"] == "lse: it is not -inf where no key is visible"


def test_refusals_and_crashes_are_told_apart(monkeypatch) -> None:
    def refuse(*_):
        raise NotImplementedError("no such chip")

    def crash(*_):
        raise RuntimeError("Mosaic failed\n  to compile")

    row = tried(PROBLEM, back_end(monkeypatch, PROBLEM, check=refuse))
    assert row["outcome"] == "refused"
    assert row["reason"].endswith("no such chip")

    def later(*arguments):  # the trace of `check` is fine, the compiler is not
        jax.debug.callback(crash)
        return xla.attend(*arguments)

    row = tried(PROBLEM, back_end(monkeypatch, PROBLEM, attend=later))
    assert row["outcome"] == "failed"
    assert row["reason"].startswith("JaxRuntimeError: INTERNAL")
    row = tried(PROBLEM, back_end(monkeypatch, PROBLEM, attend=crash))
    assert (row["outcome"], row["reason"]) == ("failed", "RuntimeError: Mosaic failed to compile")


@pytest.mark.slow
def test_results_must_be_reproducible(monkeypatch) -> None:
    """A race on a device would look like this."""
    calls = iter(range(100))

    def racing(*call):
        out, lse = xla.attend(*call)
        late = jax.pure_callback(lambda: np.float32(next(calls) * 1e-7), jax.ShapeDtypeStruct((), jnp.float32))
        return out * (1 + late), lse

    problem = Problem(T=40, H=2, D=8)
    row = tried(problem, back_end(monkeypatch, PROBLEM, attend=racing))
    assert (row["outcome"], row["reason"]) == ("failed", f"{row['worst']}: two calls with equal arguments differ")


def test_shapes_are_compared() -> None:
    x = np.ones((2, 3), np.float32)
    found = numerics.deviations({"out": x[:1]}, {"out": x}, {"out": x}, np.float32)
    assert not found["out"].agrees
    assert str(found["out"]) == "its shape is (1, 3), not (2, 3)"
