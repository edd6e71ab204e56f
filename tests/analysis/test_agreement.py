"""The tolerance and its yardstick: what is allowed is derived, and what is wrong is found."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longattn.analysis import agreement
from longattn.analysis.agreement import PartsProblem, Problem
from longattn.mask import Causal, Window
from longattn.ops.attention import api, xla
from tests.ops import oracle

PROBLEM = Problem(
    T=45, H=4, K=2, D=8, V=6, B=2, mask=Causal() & Window(20), documents=4, softcap=1.5, sinks=True, bias=(4, 1, 45)
)


@functools.cache
def solved(problem: Problem) -> tuple:
    """(drawn, truth, plain) of a problem."""
    drawn = agreement.draws(problem)
    with jax.enable_x64(True):
        truth = agreement.truth(problem, "reference", drawn, np.float64)
    return drawn, truth, agreement.plain(problem, drawn)


def tried(problem: Problem, name: str) -> dict:
    return agreement.tried(problem, name, *solved(problem))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_yardstick_is_that_of_a_textbook(dtype) -> None:
    """NumPy's plain implementation, of which nothing is shared, makes errors of the same size."""
    problem = dataclasses.replace(PROBLEM, dtype=dtype)
    drawn, truth, plain = solved(problem)
    assert len(drawn) == 16  # of 4 sinks
    results = [textbook(problem, d, dtype) for d in drawn]
    assert set(plain) == {"out", "lse", "dq", "dk", "dv", "dsinks", "dbias"}
    for name in plain:
        theirs, exact = (np.stack([r[i][name] for r in results]) for i in (0, 1))
        np.testing.assert_allclose(truth[name], exact, rtol=1e-9, atol=1e-9)
        size = np.linalg.norm(exact)
        ours, other = (np.linalg.norm(np.asarray(x).astype(np.float64) - exact) / size for x in (plain[name], theirs))
        floor = 1e-6 if dtype == "float32" else 0
        assert ours < 2 * other + floor and other < 2 * ours + floor, (name, ours, other)


def textbook(problem: Problem, drawn: agreement.Drawn, dtype: str) -> tuple[dict, dict]:
    """NumPy's (plain implementation, truth)."""
    ids, positions = drawn.ids["segment_ids"], drawn.ids["positions"]
    assert [len(set(row)) for row in ids] == [4, 4]
    assert all((positions[ids == i] == 0).any() for i in range(4))
    visible = np.asarray(problem.mask(positions[:, None, :, None], positions[:, None, None, :]))
    visible = visible & (ids[:, None, :, None] == ids[:, None, None, :])
    return tuple(
        oracle.attention(
            **drawn.arrays, visible=visible, scale=8**-0.5, softcap=1.5, do=drawn.cotangents["out"],
            dlse=drawn.cotangents["lse"], dtype=d,
        )
        for d in (jnp.dtype(dtype), np.float64)
    )  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_right_back_end_passes(dtype) -> None:
    problem = dataclasses.replace(PROBLEM, dtype=dtype)
    row = tried(problem, "xla")
    assert row["outcome"] == "passed", row
    assert set(row["results"]) == {"out", "lse", "dq", "dk", "dv", "dsinks", "dbias"}
    assert all(r["error"] <= r["allowed"] and r["allowed"] >= 2 * r["plain"] for r in row["results"].values())
    assert max(row["results"], key=lambda n: row["results"][n]["error"] / row["results"][n]["allowed"]) == row["worst"]


def back_end(monkeypatch: pytest.MonkeyPatch, **changes) -> str:
    """A back end that is xla's but for `changes`, in the table under a name of its own."""
    name = f"changed_{len(_made)}"  # jitted functions remember by name
    _made.append(name)
    module = types.SimpleNamespace(**{**vars(xla), **changes})
    monkeypatch.setitem(api.BACK_ENDS, name, module)
    return name


_made: list[str] = []


def test_what_is_wrong_fails(monkeypatch) -> None:
    def scaled(q, k, v, extras, spec):
        out, lse = xla.attend(q, k, v, extras, spec)
        return (out * 1.001).astype(out.dtype), lse

    def noughts(q, k, v, extras, spec):
        out, lse = xla.attend(q, k, v, extras, spec)
        return out.at[0, 0, 0, 0].set(jnp.nan), lse

    problem = dataclasses.replace(PROBLEM, sinks=False)
    row = tried(problem, back_end(monkeypatch, attend=scaled))
    assert row["outcome"] == "failed"
    assert "relative error 1.0e-03" in row["reason"]
    row = tried(problem, back_end(monkeypatch, attend=noughts))
    assert row["outcome"] == "failed"
    assert row["reason"] == "out: 1 of 2160 numbers are NaN or inf"
    assert row["results"]["out"]["error"] is None  # JSON has no NaN


def test_one_wrong_gradient_fails(monkeypatch) -> None:
    @jax.custom_vjp
    def heavier(x):
        return x

    heavier.defvjp(lambda x: (x, None), lambda _, g: (g * 1.001,))
    wrong = lambda q, k, v, extras, spec: xla.attend(q, heavier(k), v, extras, spec)
    row = tried(PROBLEM, back_end(monkeypatch, attend=wrong))
    assert row["outcome"] == "failed"
    assert [name for name, r in row["results"].items() if not r["agrees"]] == ["dk"]
    assert row["reason"].startswith("dk: relative error 1.0e-03 of ")


def test_empty_rows_must_be_minus_infinity(monkeypatch) -> None:
    def clamped(q, k, v, extras, spec):
        out, lse = xla.attend(q, k, v, extras, spec)
        return out, jnp.maximum(lse, -1e30)

    problem = Problem(T=40, S=10, H=2, D=8, mask=Window(5))
    assert tried(problem, "xla")["outcome"] == "passed"
    row = tried(problem, back_end(monkeypatch, attend=clamped))
    assert row["reason"] == "lse: it is not -inf where no key is visible"


def test_refusals_and_crashes_are_told_apart(monkeypatch) -> None:
    def refuse(*_):
        raise NotImplementedError("no such chip")

    def crash(*_):
        raise RuntimeError("Mosaic failed\n  to compile")

    row = tried(PROBLEM, back_end(monkeypatch, check=refuse))
    assert row["outcome"] == "refused"
    assert row["reason"].endswith("no such chip")

    def later(*arguments):  # the trace of `check` is fine, the compiler is not
        jax.debug.callback(crash)
        return xla.attend(*arguments)

    row = tried(PROBLEM, back_end(monkeypatch, attend=later))
    assert row["outcome"] == "failed"
    assert row["reason"].startswith("JaxRuntimeError: INTERNAL")
    row = tried(PROBLEM, back_end(monkeypatch, attend=crash))
    assert (row["outcome"], row["reason"]) == ("failed", "RuntimeError: Mosaic failed to compile")


def test_results_must_be_reproducible(monkeypatch) -> None:
    """As a race would show on a device."""
    calls = iter(range(100))

    def racing(q, k, v, extras, spec):
        out, lse = xla.attend(q, k, v, extras, spec)
        late = jax.pure_callback(lambda: np.float32(next(calls) * 1e-7), jax.ShapeDtypeStruct((), jnp.float32))
        return out * (1 + late), lse

    problem = Problem(T=40, H=2, D=8)
    row = tried(problem, back_end(monkeypatch, attend=racing))
    assert (row["outcome"], row["reason"]) == ("failed", f"{row['worst']}: two calls with equal arguments differ")


def test_shapes_are_compared() -> None:
    x = np.ones((2, 3), np.float32)
    found = agreement.deviations({"out": x[:1]}, {"out": x}, {"out": x}, np.float32)
    assert not found["out"].agrees
    assert str(found["out"]) == "its shape is (1, 3), not (2, 3)"


def test_prefixes_are_of_each_sequence() -> None:
    problem = Problem(T=40, H=2, D=8, B=3, prefix=30)
    assert len(set(agreement.draw(problem).ids["prefix"].tolist())) == 3
    assert tried(problem, "xla")["outcome"] == "passed"


def test_logits_can_rise() -> None:
    drawn = agreement.draw(Problem(T=64, H=2, D=8, rise=100.0))
    first, last = (np.std(drawn.arrays["k"][:, part]) for part in (slice(0, 1), slice(-1, None)))
    assert 50 < last / first < 200


PARTS = PartsProblem(T=45, H=4, K=2, D=8, V=6, B=2, mask=Causal() & Window(20), documents=4)


def test_keys_in_parts_are_attention_to_all() -> None:
    """The truth is that of all keys at once, and what is computed of the parts agrees with it."""
    whole = Problem(**{f.name: getattr(PARTS, f.name) for f in dataclasses.fields(PARTS)})
    for name, x in solved(whole)[1].items():
        np.testing.assert_array_equal(solved(PARTS)[1][name], x)
    row = tried(PARTS, "xla")
    assert row["outcome"] == "passed", row
    assert set(row["results"]) == {"out", "lse", "dq", "dk", "dv"}


def test_queries_and_keys_in_parts_may_be_of_two_lengths() -> None:
    assert tried(PartsProblem(T=40, S=60, H=2, D=8, prefix=30, dtype="bfloat16"), "xla")["outcome"] == "passed"


def test_wrong_partials_fail(monkeypatch) -> None:
    def light(q, k, v, extras, spec):
        out, lse = xla.attend(q, k, v, extras, spec)
        return out, lse + 1e-3 * (extras.k_positions[0, 0] > 0)  # the second part weighs more

    def steep(*arguments):
        dq, dk, dv = xla.backward_partial(*arguments)
        return dq, dk, dv * 1.001

    row = tried(PARTS, back_end(monkeypatch, attend=light))
    assert {"out", "lse"} <= {name for name, r in row["results"].items() if not r["agrees"]}
    row = tried(PARTS, back_end(monkeypatch, backward_partial=steep))
    assert [name for name, r in row["results"].items() if not r["agrees"]] == ["dv"]


def test_parts_have_gradients_of_q_k_and_v_alone() -> None:
    with pytest.raises(ValueError, match="must be off"):
        dataclasses.replace(PARTS, sinks=True)
