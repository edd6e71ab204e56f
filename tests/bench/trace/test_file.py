"""A trace that is recorded here, and what is none."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import pytest

from longattn.bench import trace
from tests.bench.trace.written import cpu_space


def test_what_is_no_trace_says_so(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="holds no trace"):
        trace.find(tmp_path)
    with pytest.raises(ValueError, match="cut off|no protocol buffer"):
        trace.read(cpu_space()[:-7])
    with pytest.raises(ValueError, match="no protocol buffer"):
        trace.read(b"\x0f\x0f")
    with pytest.raises(ValueError, match="no execution of a compiled program"):
        trace.read(b"").busiest()


def test_a_recorded_trace(tmp_path: pathlib.Path) -> None:
    def f(x: jax.Array) -> jax.Array:
        with jax.named_scope("product"):
            return x @ x

    x = jnp.ones((256, 256))
    compiled = jax.jit(f).lower(x).compile()
    compiled(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        for _ in range(3):
            compiled(x).block_until_ready()
    runs = trace.read(trace.find(tmp_path).read_bytes()).of("jit_f")
    assert len(runs) == 3
    for run in runs:
        assert {str(k.scope) for k in run.kernels} == {"product"}
        assert 0 < run.busy <= run.seconds
