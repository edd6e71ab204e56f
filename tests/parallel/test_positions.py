"""Positions that break a ring's rule are refused: with a window they gave results that were wrong by 0.84."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longattn import attention, parallel
from longattn import mask as m
from longattn.parallel import SequenceLayout

T, P = 16, 4
RESTART = np.concatenate([np.arange(6), np.arange(10)]).astype(np.int32)[None]
SEGMENTS = np.repeat(np.array([1, 2], np.int32), (6, 10))[None]
PADDED = np.where(np.arange(T) < 12, RESTART, 0).astype(np.int32), np.where(np.arange(T) < 12, SEGMENTS, 0)


def call(strategy: str = "ring", layout: str = "contiguous", mask: m.Mask = m.Window(3), **given):
    """Attention of one head over four devices, its arrays in the layout's order."""
    layout = SequenceLayout(layout)
    mesh = parallel.make_mesh(seq=P, devices=jax.devices()[:P])
    x = jax.random.normal(jax.random.key(0), (1, T, 1, 4))
    moved = {name: layout.permute(jnp.asarray(value), P) for name, value in given.items()}
    x = layout.permute(x, P)
    return parallel.attention(x, x, x, mesh=mesh, strategy=strategy, layout=layout, mask=mask, **moved)


@pytest.mark.parametrize(
    ("strategy", "layout"), [("ring", "contiguous"), ("ring", "zigzag"), ("balanced", "contiguous")]
)
@pytest.mark.parametrize("mask", [m.Causal(), m.Causal() & m.Window(3) | m.Prefix(2)], ids=str)
def test_positions_that_restart_without_segments_are_refused(strategy, layout, mask):
    with pytest.raises(ValueError, match=r"positions=5 and 0 of tokens 5 and 6 \(row 0\) .* pass segment_ids"):
        call(strategy, layout, mask, positions=RESTART)


def test_a_gap_within_a_segment_is_refused():
    with pytest.raises(ValueError, match=r"tokens 11 and 12 \(row 0, segment 2\)"):
        call(positions=np.where(np.arange(T) < 12, RESTART, RESTART + 1).astype(np.int32), segment_ids=SEGMENTS)


def test_what_follows_the_rule_or_needs_none_is_served():
    x = jax.random.normal(jax.random.key(0), (1, T, 1, 4))
    for strategy, given in (
        ("ring", {"positions": RESTART, "segment_ids": SEGMENTS}),
        ("all_gather", {"positions": RESTART}),
    ):
        want = attention(x, x, x, mask=m.Window(3), **given)
        np.testing.assert_allclose(call(strategy, **given), want, rtol=1e-5, atol=1e-6)
    call(positions=PADDED[0], segment_ids=PADDED[1])  # as ByteLM pads


def test_traced_positions_are_checked_on_demand(monkeypatch, caplog):
    """Under jit nothing is known before the program runs."""
    assert "debug_callback" not in str(jax.make_jaxpr(lambda x: call(positions=x))(RESTART))
    monkeypatch.setenv("LONGATTN_DEBUG", "1")
    jax.block_until_ready(jax.jit(lambda x: call(positions=x))(RESTART))
    jax.effects_barrier()
    assert "positions=5 and 0 of tokens 5 and 6" in caplog.text
