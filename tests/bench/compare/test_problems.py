"""What problems cost, by hand; what is drawn."""

from __future__ import annotations

import numpy as np
import pytest

from longattn.aot.kernels import cases
from longattn.bench import attention
from longattn.bench.compare.problems import Attention, Linear
from longattn.cost import flops
from longattn.cost.pairs import visible_pairs
from longattn.mask import Causal
from tests.bench.compare.tiny import linear, problem


def test_least_bytes_by_hand() -> None:
    o = problem(B=3, H=4, K=2, dtype="bfloat16")
    q, kv = 2 * 3 * 256 * 4 * 128, 2 * 3 * 256 * 2 * 128
    assert isinstance(o, Attention)
    assert o.least_bytes("forward") == 2 * q + 2 * kv
    assert o.least_bytes("forward_backward") == 6 * q + 6 * kv


@pytest.mark.parametrize(
    ("kind", "decays"), [("none", 0), ("scalar", 1), ("vector", 16), ("none_delta", 1), ("vector_delta", 17)]
)
def test_least_bytes_of_linear_attention_by_hand(kind, decays) -> None:
    o = linear(B=3, H=4, K=2, kind=kind, dtype="bfloat16")
    inputs, out = 2 * 3 * 40 * 16 * (2 + 2 + 4) + 4 * 3 * 40 * 4 * decays, 2 * 3 * 40 * 16 * 4
    assert o.least_bytes("forward") == inputs + out
    assert o.least_bytes("forward_backward") == inputs + out + 2 * inputs + out
    assert o.numbers() == (inputs - 4 * 3 * 40 * 4 * decays + out) // 2 + 3 * 40 * 4 * decays


@pytest.mark.parametrize("kind", cases.shape.KINDS)
def test_flops_are_those_of_the_kernels_case(kind) -> None:
    """What `longattn profile` declares of the forward and the backward kernel, which computes the forward pass once."""
    o = linear(T=256, H=4, K=2, kind=kind)
    (forward,), (backward,) = (cases.CASES[f"longattn_linear{d}"].kernels(o.shape()) for d in ("", "_backward"))
    assert o.flops("forward") == forward.flops
    assert o.flops("forward_backward") == forward.flops + backward.flops
    exact = problem(T=256)
    assert exact.flops("forward") == flops.attention_flops(visible_pairs(Causal(), 256), 2, 128).forward


def test_what_is_drawn() -> None:
    o = linear(kind="vector_delta", H=4, K=2, dtype="bfloat16")
    drawn = o.drawn()
    assert list(drawn) == ["q", "k", "v", "log_decay", "beta", "do"]
    assert {name: x.dtype.name for name, x in drawn.items()} == {
        **dict.fromkeys(("q", "k", "v", "do"), "bfloat16"), "log_decay": "float32", "beta": "float32",
    }  # fmt: skip
    assert (drawn["log_decay"] < 0).all()
    for name, x in attention.inputs(problem(), 256).items():
        np.testing.assert_array_equal(problem().drawn()[name], x)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "scalr"}, "unknown kind 'scalr'; did you mean 'scalar'"),
        ({"K": 3}, "K=3 must divide H=2"),
        ({"D": 0}, "D=0 must be at least 1"),
    ],
)
def test_wrong_sizes_of_linear_attention(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        Linear(**{"T": 40, "B": 1, "H": 2, "K": None, "D": 16, "dtype": "float32", "kind": "scalar", **changes})
