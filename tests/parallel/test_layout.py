"""Orders of a sequence on devices: permuted and back, positions, and from one order to another over a mesh."""

from __future__ import annotations

import itertools
import typing

import jax
import numpy as np
import pytest

from longattn.config.mesh import LayoutName
from longattn.parallel import SequenceLayout, make_mesh
from longattn.parallel.layout import convert
from tests.slow import but_few

LAYOUTS = [SequenceLayout(name) for name in typing.get_args(LayoutName)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("P", [1, 2, 3, 8])
def test_one_value_says_where_every_token_lies(layout, P):
    T = 6 * P
    x = np.random.default_rng(0).normal(size=(2, T, 3))
    np.testing.assert_array_equal(layout.restore(layout.permute(x, P), P), x)
    positions = layout.positions(T, P)
    np.testing.assert_array_equal(layout.permute(x, P), x[:, positions])
    for device, own in enumerate(positions.reshape(P, -1)):
        np.testing.assert_array_equal(layout.local_positions(device, T, P), own)
        assert (np.diff(own) > 0).all()
        runs = layout.runs(device, T, P)
        assert runs == [(piece[0], piece[-1]) for piece in own.reshape(len(runs), -1)]


def test_what_each_layout_is():
    of = lambda name: SequenceLayout(name).positions(8, 2).reshape(2, 4).tolist()
    assert of("contiguous") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert of("zigzag") == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert of("striped") == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_wrong_lengths_and_names():
    with pytest.raises(ValueError, match="T=12 must be a multiple of 8 for the zigzag layout.* pad it to 16"):
        SequenceLayout("zigzag").permute(np.zeros((1, 12)), 4)
    with pytest.raises(ValueError, match="did you mean 'zigzag'"):
        SequenceLayout("zigzak")


@pytest.mark.parametrize(("ring", "P"), but_few([(2, 2), (1, 3), (1, 4), (2, 4)], 2))
def test_converted_over_a_mesh(ring, P):
    """One axis of P devices, or a ring of shards of P devices each."""
    mesh = make_mesh(ring=ring, seq=P, devices=jax.devices()[: ring * P])
    axis, shards = (("ring", "seq"), ring) if ring > 1 else ("seq", P)
    T = 2 * (ring * P) ** 2
    x = np.random.default_rng(0).normal(size=(2, T, 3)).astype(np.float32)
    for source, target in itertools.permutations(LAYOUTS[:2] if ring > 1 else LAYOUTS, 2):
        found = convert(source.permute(x, shards), source, target, mesh=mesh, axis=axis)
        np.testing.assert_array_equal(found, target.permute(x, shards))


def test_what_is_no_piece_of_the_sequence_is_not_converted():
    mesh = make_mesh(ring=2, seq=3, devices=jax.devices()[:6])
    with pytest.raises(NotImplementedError, match="2 shards of 3 devices each, is not converted from zigzag"):
        convert(np.zeros((1, 24)), LAYOUTS[1], LAYOUTS[0], mesh=mesh, axis=("ring", "seq"))
