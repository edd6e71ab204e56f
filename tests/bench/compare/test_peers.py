"""Rivals refuse what they cannot do, and compute attention."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from longattn.aot.kernels import cases
from longattn.bench import attention, compare
from longattn.mask import Causal, Full, Window
from tests.bench.compare.tiny import problem
from tests.slow import but_few


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("jax_flash", {"K": 1}, "K=1 must be H=2"),
        ("splash", {"K": 1}, "K=1 must be H=2"),
        ("splash", {"T": 100}, "blocks are multiples of 128"),
        ("jax_flash", {"T": 128}, "has at least two"),
        ("jax_flash", {"mask": Window(5)}, "knows Causal"),
        ("cudnn", {}, "dtype is float32"),
        ("tokamax", {}, "pip install tokamax"),
    ],
)
def test_reasons_of_rivals(name, changes, reason, monkeypatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match=reason):
        compare.CONTESTANTS[name].build(problem(**changes))


@pytest.mark.parametrize("name", ["jax_flash", "splash"])
@pytest.mark.parametrize("mask", but_few([Causal(), Full()]), ids=str)
def test_tpu_rivals_compute_attention(name, mask) -> None:
    """Under the interpreter of TPU kernels: layouts and scale are right."""
    o = problem(mask=mask)
    q, k, v, _ = (jnp.asarray(x) for x in attention.inputs(o, 256).values())
    with pltpu.force_tpu_interpret_mode():
        out = jax.jit(compare.CONTESTANTS[name].build(o))(q, k, v)
    expected = compare.CONTESTANTS["reference"].build(o)(q, k, v)
    assert attention.relative_error([np.asarray(out)], [np.asarray(expected)]) < 1e-2  # its products are bfloat16


def test_static_cases_exist() -> None:
    contestants = [*compare.CONTESTANTS.values(), *compare.LINEAR.values()]
    assert {c.case for c in contestants} >= {"longattn", "longattn_linear", "jax_splash"}
    for rival in contestants:
        assert rival.case is None or {rival.case, f"{rival.case}_backward"} <= set(cases.CASES)
