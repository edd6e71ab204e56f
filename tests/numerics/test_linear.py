"""Linear attention's problems: a NumPy recurrence confirms the yardstick, and wrong back ends are found."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longattn.numerics import LinearProblem, StateProblem
from longattn.ops.linear import xla
from tests.numerics.solving import back_end, solved, tried
from tests.ops import linear_oracle
from tests.slow import but_few

PROBLEM = LinearProblem(
    T=61, H=4, D=16, V=9, B=2, heads=(1, 2, 4), decay="scalar", delta=True, state=True, documents=3, scale=0.7
)
RESULTS = {"out", "final_state", "dq", "dk", "dv", "dlog_decay", "dbeta", "dinitial_state"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("decay", "delta"), but_few([("scalar", True), ("vector", True), ("none", False)]))
def test_the_yardstick_is_that_of_a_textbook(dtype, decay, delta) -> None:
    """An independent recurrence in NumPy makes errors of the same size."""
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


@pytest.mark.slow
def test_a_wrong_state_and_a_wrong_gradient_fail(monkeypatch) -> None:
    @jax.custom_vjp
    def heavier(x):
        return x

    heavier.defvjp(lambda x: (x, None), lambda _, g: (g * 1.001,))

    def faulty(x, *rest):
        out, state = xla.attend(x._replace(log_decay=heavier(x.log_decay)), *rest)
        return out, state * 1.001

    for name, wrong in (
        ("xla", []),
        (back_end(monkeypatch, PROBLEM, attend=faulty), {"final_state", "dlog_decay"}),
    ):
        row = tried(PROBLEM, name)
        assert row["outcome"] == ("failed" if wrong else "passed"), row
        assert set(row["results"]) == RESULTS
        assert {n for n, r in row["results"].items() if not r["agrees"]} >= set(wrong)
        assert row["results"]["out"]["agrees"]


STATE = StateProblem(T=61, H=4, D=16, V=9, B=2, heads=(1, 2, 4), documents=3, rate=0.05)


@pytest.mark.parametrize(
    ("decay", "delta", "dtype"), but_few([("scalar", False, "float32"), ("vector", True, "bfloat16")])
)
def test_states_alone_are_a_textbooks(decay, delta, dtype) -> None:
    """NumPy's recurrence is the truth: the yardstick is close to it, and the blockwise form within the tolerance."""
    problem = dataclasses.replace(STATE, dtype=dtype, decay=decay, delta=delta)
    (drawn,), truth, plain = solved(problem)
    given = dict(drawn.arrays)
    do, dS = given.pop("dout"), given.pop("dfinal_state")
    textbook = functools.partial(linear_oracle.linear_attention, **drawn.ids, do=do, dS=dS)
    exact = textbook(**given)
    expected = {name: exact[name] for name in ("final_state", "dinitial_state")}
    if delta:
        identity = np.broadcast_to(np.eye(16), (2, 4, 16, 16))
        one = given | {"v": np.zeros((2, 61, 4, 16)), "initial_state": identity}
        expected["transition"] = textbook(**(one | {"dS": identity, "do": one["v"]}))["final_state"]
        assert not expected["transition"][0].any() and expected["transition"][1].any()  # the last is one document
    assert set(truth) == set(plain) == set(expected)
    for name, x in expected.items():
        np.testing.assert_allclose(truth[name][0], x, rtol=1e-9, atol=1e-9)
        assert np.linalg.norm(plain[name][0] - x) < (1e-6 if dtype == "float32" else 1e-2) * np.linalg.norm(x)
    row = tried(problem, "xla")
    assert row["outcome"] == "passed", row


@pytest.mark.slow
def test_a_wrong_fold_and_a_wrong_pull_fail(monkeypatch) -> None:
    def no_columns(x, *rest):
        return xla.fold(x, *rest).at[..., x.v.shape[3] :].multiply(1.001)

    def refuse(x, options):
        if x.initial_state.shape[3] > STATE.V:
            raise NotImplementedError("too wide")

    problem = dataclasses.replace(STATE, decay="scalar", delta=True)
    for changes, wrong in (
        ({"fold": no_columns, "pull": lambda *x: xla.pull(*x) * 1.001}, {"transition", "dinitial_state"}),
        ({"fold": lambda *x: xla.fold(*x) * 1.001}, {"transition", "final_state"}),
    ):
        row = tried(problem, back_end(monkeypatch, problem, **changes))
        assert row["outcome"] == "failed"
        assert {name for name, r in row["results"].items() if not r["agrees"]} == wrong
    row = tried(problem, back_end(monkeypatch, problem, check=refuse))
    assert row["outcome"] == "refused" and row["reason"].endswith("too wide")


def test_a_fold_starts_from_a_state() -> None:
    with pytest.raises(ValueError, match="state=False must be True"):
        dataclasses.replace(STATE, state=False)
