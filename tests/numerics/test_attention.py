"""Attention's problems: a NumPy implementation confirms the yardstick; keys in shards equal attention to all."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from longattn import numerics
from longattn.mask import Causal, Window
from longattn.numerics import PartsProblem, Problem
from longattn.ops.attention import xla
from tests.numerics.solving import PROBLEM, back_end, solved, tried
from tests.ops import oracle


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_yardstick_is_that_of_a_textbook(dtype) -> None:
    """An independent plain implementation in NumPy makes errors of the same size."""
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


def textbook(problem: Problem, drawn: numerics.Drawn, dtype: str) -> tuple[dict, dict]:
    """Returns (plain implementation, truth) by NumPy."""
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


def test_prefixes_are_of_each_sequence() -> None:
    problem = Problem(T=40, H=2, D=8, B=3, prefix=30)
    assert len(set(numerics.draw(problem).ids["prefix"].tolist())) == 3
    assert tried(problem, "xla")["outcome"] == "passed"


def test_logits_can_rise() -> None:
    drawn = numerics.draw(Problem(T=64, H=2, D=8, rise=100.0))
    first, last = (np.std(drawn.arrays["k"][:, part]) for part in (slice(0, 1), slice(-1, None)))
    assert 50 < last / first < 200


PARTS = PartsProblem(T=45, H=4, K=2, D=8, V=6, B=2, mask=Causal() & Window(20), documents=4)


@pytest.mark.slow
def test_keys_in_parts_are_attention_to_all() -> None:
    """The truth attends to all keys at once, and the merged shards agree with it."""
    whole = Problem(**{f.name: getattr(PARTS, f.name) for f in dataclasses.fields(PARTS)})
    for name, x in solved(whole)[1].items():
        np.testing.assert_array_equal(solved(PARTS)[1][name], x)
    row = tried(PARTS, "xla")
    assert row["outcome"] == "passed", row
    assert set(row["results"]) == {"out", "lse", "dq", "dk", "dv"}


@pytest.mark.slow
def test_queries_and_keys_in_parts_may_be_of_two_lengths() -> None:
    assert tried(PartsProblem(T=40, S=60, H=2, D=8, prefix=30, dtype="bfloat16"), "xla")["outcome"] == "passed"


@pytest.mark.slow
def test_wrong_partials_fail(monkeypatch) -> None:
    def light(q, k, v, bias, visibility, *rest):
        out, lse = xla.attend(q, k, v, bias, visibility, *rest)
        return out, lse + 1e-3 * (visibility.k_positions[0, 0] > 0)  # the second shard weighs more

    def steep(*arguments):
        dq, dk, dv = xla.backward_partial(*arguments)
        return dq, dk, dv * 1.001

    row = tried(PARTS, back_end(monkeypatch, PARTS, attend=light))
    assert {"out", "lse"} <= {name for name, r in row["results"].items() if not r["agrees"]}
    row = tried(PARTS, back_end(monkeypatch, PARTS, backward_partial=steep))
    assert [name for name, r in row["results"].items() if not r["agrees"]] == ["dv"]


def test_parts_have_gradients_of_q_k_and_v_alone() -> None:
    with pytest.raises(ValueError, match="must be off"):
        dataclasses.replace(PARTS, sinks=True)
