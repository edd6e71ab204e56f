"""Refusals and defaults."""

from __future__ import annotations

import pytest

from longattn.bench import compare
from longattn.mask import Full
from longattn.ops import dispatch
from tests.bench.compare.tiny import problem


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contestants": ("xla", "jax_n")}, "unknown contestant 'jax_n'.*jax_nn"),
        ({"contestants": ()}, "--with must name at least one"),
        ({"contestants": ("xla", "xla")}, "must name each contestant once"),
        ({"case": "attention"}, "unknown case 'attention'.*attention_forward"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"T": 0}, "T=0 must be at least 1"),
        ({"K": 3}, "K=3 must divide H=8"),
        ({"kind": "scalar"}, "kind='scalar' must be left out of attention_forward"),
        ({"case": "linear_forwards"}, "unknown case 'linear_forwards'.*linear_forward"),
        ({"case": "linear_forward", "contestants": ("xla", "jax_nn")}, "unknown contestant 'jax_nn'.*attention"),
        ({"case": "linear_forward", "contestants": ()}, "they are pallas_tpu, xla, reference, attention"),
        ({"case": "linear_forward", "mask": Full()}, r"mask=Full\(\) must be Causal\(\) in linear_forward"),
        ({"case": "linear_forward", "kind": "matrix"}, "unknown kind 'matrix'.*scalar"),
    ],
)
def test_wrong_arguments(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        compare.CompareOptions(**{"case": "attention_forward", **changes})


def test_what_stands_for_none() -> None:
    options = compare.CompareOptions("linear_forward").resolved()
    assert options.names == ("pallas_tpu", "xla", "attention")
    assert (options.dtype, options.kind) == ("float32", "scalar")
    options = compare.CompareOptions("attention_forward").resolved()
    assert options.names == tuple(name for name in compare.CONTESTANTS if name != "reference")
    assert options.kind is None


def test_the_dtype_is_the_devices_own(monkeypatch) -> None:
    assert problem().dtype == "float32"
    monkeypatch.setattr(dispatch, "target", lambda: dispatch.Target("tpu", "TPU v5 lite"))
    assert problem().dtype == "bfloat16"
    assert problem(dtype="float16").dtype == "float16"
