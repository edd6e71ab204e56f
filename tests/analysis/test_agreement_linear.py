"""Linear attention's problems: the yardstick is a textbook's, and what is wrong is found."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longattn.analysis import agreement
from longattn.analysis.agreement_linear import LinearProblem
from longattn.ops.linear import api, xla
from tests.ops import linear_oracle

PROBLEM = LinearProblem(
    T=61, H=4, D=16, V=9, B=2, heads=(1, 2, 4), decay="scalar", delta=True, state=True, documents=3, scale=0.7
)
RESULTS = {"out", "final_state", "dq", "dk", "dv", "dlog_decay", "dbeta", "dinitial_state"}


@functools.cache
def solved(problem: LinearProblem) -> tuple:
    """(drawn, truth, plain) of a problem."""
    drawn = agreement.draws(problem)
    with jax.enable_x64(True):
        truth = agreement.truth(problem, "reference", drawn, np.float64)
    return drawn, truth, agreement.plain(problem, drawn)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("decay", "delta"), [("scalar", True), ("vector", True), ("vector", False), ("none", False)])
def test_the_yardstick_is_that_of_a_textbook(dtype, decay, delta) -> None:
    """NumPy's recurrence, of which nothing is shared, makes errors of the same size."""
    problem = dataclasses.replace(PROBLEM, dtype=dtype, decay=decay, delta=delta)
    (drawn,), truth, plain = solved(problem)
    assert len(set(drawn.ids["segment_ids"][0])) == 3
    half = jnp.dtype(dtype) if dtype == "bfloat16" else None
    theirs, exact = (
        linear_oracle.linear_attention(
            **drawn.arrays, **drawn.ids, scale=0.7, do=drawn.cotangents["out"], dS=drawn.cotangents["final_state"],
            dtype=work, factors=factors,
        )
        for work, factors in ((jnp.dtype(dtype), half), (np.float64, None))
    )  # fmt: skip
    assert set(plain) == set(theirs) == RESULTS - {"dlog_decay" * (decay == "none"), "dbeta" * (not delta)}
    for name, x in exact.items():
        np.testing.assert_allclose(truth[name][0], x, rtol=1e-9, atol=1e-9)
        both = (np.asarray(results).astype(np.float64) for results in (plain[name][0], theirs[name]))
        ours, other = (np.linalg.norm(result - x) / np.linalg.norm(x) for result in both)
        floor = 1e-6 if dtype == "float32" or other < 1e-6 else 0  # a state of exact products errs as float32 does
        assert ours < 2 * other + floor and other < 2 * ours + floor, (name, ours, other)


def back_end(monkeypatch: pytest.MonkeyPatch, name: str, attend) -> str:
    """xla's but for `attend`, in the table under a name of its own: jitted functions remember by name."""
    monkeypatch.setitem(api.BACK_ENDS, name, types.SimpleNamespace(**{**vars(xla), "attend": attend}))
    return name


def test_a_wrong_state_and_a_wrong_gradient_fail(monkeypatch) -> None:
    @jax.custom_vjp
    def heavier(x):
        return x

    heavier.defvjp(lambda x: (x, None), lambda _, g: (g * 1.001,))

    def forgetful(q, k, v, log_decay, beta, *rest):
        out, state = xla.attend(q, k, v, log_decay, beta, *rest)
        return out, state * 1.001

    def steep(q, k, v, log_decay, *rest):
        return xla.attend(q, k, v, heavier(log_decay), *rest)

    for name, wrong in (
        ("xla", []),
        (back_end(monkeypatch, "forgetful", forgetful), {"final_state"}),
        (back_end(monkeypatch, "steep", steep), {"dlog_decay"}),
    ):
        row = agreement.tried(PROBLEM, name, *solved(PROBLEM))
        assert row["outcome"] == ("failed" if wrong else "passed"), row
        assert set(row["results"]) == RESULTS
        assert {n for n, r in row["results"].items() if not r["agrees"]} >= set(wrong)
        assert row["results"]["out"]["agrees"]
