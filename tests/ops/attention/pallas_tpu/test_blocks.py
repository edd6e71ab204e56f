"""The lists of blocks, made from intervals, against every pair of positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longattn import mask as m
from longattn.mask import EMPTY, FULL, PARTIAL
from longattn.ops.attention.contract import Visibility
from longattn.ops.attention.pallas_tpu import blocks

B, T, S = 2, 45, 53  # odd, and no multiples of what follows
BLOCK_Q, BLOCK_K, TILE_Q, TILE_K = 16, 12, 8, 4  # kernels want larger ones, the lists do not
STRIPS, PARTS = BLOCK_Q // TILE_Q, BLOCK_K // TILE_K
ROWS, COLUMNS = -(-T // BLOCK_Q), -(-S // BLOCK_K)


def odd(q, k):
    return (q + k) % 2 == 1


MASKS = [
    m.Full(),
    m.Causal(),
    m.Window(9, 3),
    m.Window(20, -7),
    m.Chunked(11),
    m.Causal() & m.Chunked(16),
    m.Prefix(17),
    m.Causal() | m.Prefix(np.array([5, 40], np.int32)),
    m.Window(7) | m.Global(3),
    m.Dilated(4, 3),
    m.Causal() & ~m.Window(11),
    m.Fn(odd) & m.Causal(),
    m.Window(0, -0) & m.Global(0),  # nothing
]


def visibility(mask: m.Mask, ids: str) -> Visibility:
    rng = np.random.default_rng(3)
    positions = [np.arange(n, dtype=np.int32)[None] for n in (T, S)]
    segments: list[np.ndarray | None] = [None, None]
    if "positions" in ids:
        positions = [rng.permuted(np.tile(x, (B, 1)), axis=1) for x in positions]
    if "unsorted" in ids:
        segments = [rng.integers(-2, 2, (B, n)).astype(np.int32) for n in (T, S)]
    elif "packed" in ids:
        segments = [np.sort(rng.integers(0, 4, (B, n)).astype(np.int32), 1) for n in (T, S)]
    return Visibility(mask, *map(jnp.asarray, positions), *(None if x is None else jnp.asarray(x) for x in segments))


def dense(given: Visibility) -> np.ndarray:
    """Visible pairs [B T S]."""
    q, k = (np.asarray(x) for x in (given.q_positions, given.k_positions))
    seen = np.asarray(given.mask(q[:, None, :, None], k[:, None, None, :]))
    if given.q_segments is not None:
        seen = seen & np.asarray(given.q_segments[:, None, :, None] == given.k_segments[:, None, None, :])
    return np.broadcast_to(seen, (B, 1, T, S))[:, 0]


def tiled(x: np.ndarray, tile_q: int, tile_k: int, shape: tuple[int, int]) -> np.ndarray:
    """[B T S] -> [B rows columns pairs], with what lies beyond the ends False for keys, and as the last query is."""
    x = np.pad(x, ((0, 0), (0, shape[0] * tile_q - T), (0, 0)), mode="edge")
    x = np.pad(x, ((0, 0), (0, 0), (0, shape[1] * tile_k - S)))
    x = x.reshape(B, shape[0], tile_q, shape[1], tile_k).swapaxes(2, 3)
    return x.reshape(B, *shape, tile_q * tile_k)


IDS = ["none", "packed", "unsorted", "positions", "positions unsorted"]
every_mask = pytest.mark.parametrize("mask", MASKS, ids=str)


@every_mask
@pytest.mark.parametrize("ids", IDS)
def test_kinds_are_never_wrong(mask, ids):
    given, shape = visibility(mask, ids), (ROWS * STRIPS, COLUMNS * PARTS)
    kind = blocks.kinds(given, TILE_Q, TILE_K, *shape, S, "positions" not in ids)
    kind = np.broadcast_to(kind, (B, 1, *shape))[:, 0]
    seen = tiled(dense(given), TILE_Q, TILE_K, shape)
    assert not seen[kind == EMPTY].any()
    assert seen[kind == FULL].all()
    if ids == "none":  # and neither are tiles for nothing, where intervals tell all
        single = not isinstance(mask, m.And | m.Or | m.Not)
        inside = np.s_[:, : T // TILE_Q, : S // TILE_K]
        assert not single or (kind[inside][seen[inside].all(-1)] == FULL).all()
        assert not single or (kind[inside][~seen[inside].any(-1)] == EMPTY).all()


@every_mask
@pytest.mark.parametrize("ids", IDS)
@pytest.mark.parametrize("side", ["queries", "keys"])
def test_lists(mask, ids, side):
    """Every block with a visible pair stands in its row's list once, in the class that tells how it is cut."""
    given, in_order = visibility(mask, ids), "positions" not in ids
    patterns = None
    if ids == "none" and not jax.tree.leaves(mask):
        patterns = blocks.patterns(mask, BLOCK_Q, BLOCK_K, TILE_Q, TILE_K, T, S)
    kind = blocks.kinds(given, TILE_Q, TILE_K, ROWS * STRIPS, COLUMNS * PARTS, S, in_order)
    outer, inner, rows, columns = STRIPS, PARTS, ROWS, COLUMNS
    if side == "keys":
        kind, outer, inner, rows, columns = kind.swapaxes(2, 3), inner, outer, columns, rows
        patterns = patterns and tuple(tuple(zip(*pattern)) for pattern in patterns)
    own = jnp.arange(rows, dtype=jnp.int32)[None, None] + 100
    walk = np.asarray(blocks.lists(kind, outer, inner, patterns, [own, 7], mark_first=side == "keys"))
    tiles = np.asarray(kind).reshape(*kind.shape[:2], rows, outer, columns, inner).swapaxes(3, 4)
    walk, tiles = (np.broadcast_to(x, (B, *x.shape[1:]))[:, 0] for x in (walk, tiles))
    seen = tiled(dense(given), BLOCK_Q, BLOCK_K, (ROWS, COLUMNS)).any(-1)
    seen = seen.swapaxes(1, 2) if side == "keys" else seen
    classes = 1 if patterns is None else len(patterns)
    words = 0 if patterns is not None else columns * (1 + -(-outer * inner // blocks.GROUP) + 1)
    assert walk.shape[-1] == classes + 1 + 1 + 2 + columns + 1 + words
    for b in range(B):
        visited: set[int] = set()
        firsts = []
        for j in range(rows):
            ends, (following, mine, seven), entries = np.split(walk[b, j], [classes + 1, classes + 4])
            count = ends[-1]
            listed = entries[:count] & blocks.INDEX
            firsts.append(entries[0] if count else -1)
            assert (mine, seven) == (100 + j, 7)
            assert len(set(listed)) == count and set(np.flatnonzero(seen[b, j])) <= set(listed)
            if side == "keys":
                assert [i not in visited for i in listed] == list(entries[:count] > blocks.INDEX)
                visited |= set(listed)
            else:
                assert (entries[:count] == listed).all()
            for c, (low, high) in enumerate(zip([0, *ends], ends)):
                for i in listed[low:high]:
                    cut = tiles[b, j, i]
                    if c == classes:
                        assert (cut == FULL).all()
                    elif patterns is None:
                        assert not (cut == FULL).all() and not (cut == EMPTY).all()
                        row = blocks.Row(walk[b, j].__getitem__, classes + 1, 2, columns, outer * inner)
                        step = low + list(listed[low:high]).index(i)
                        for kind, (n, group) in zip((PARTIAL, FULL), row.groups(step), strict=True):
                            told = [t for g in range(-(-n // blocks.GROUP)) for t, _ in group(g)][:n]
                            assert told == list(np.flatnonzero(cut == kind))
                    else:
                        np.testing.assert_array_equal(cut, patterns[c])
            assert j == 0 or walk[b, j - 1, classes + 1] == firsts[j]
        assert following == -1


def test_lists_tell_what_a_block_sparse_mask_shows_of_each_tile():
    """Of each head, also where another part of the mask cuts the tile."""
    visible = np.random.default_rng(0).random((1, 3, 8, 8)) < 0.5
    given = visibility(m.BlockSparse(8, visible) | m.Window(3), "none")
    walk, _ = blocks.walk(given, None, (16, 16), (8, 4), T, S, True, [], by_key=False)
    rows, columns, tiles = 3, 4, 8
    assert walk.shape[:3] == (1, 3, rows)
    for h in range(3):
        for j in range(rows):
            row = blocks.Row(np.asarray(walk)[0, h, j].__getitem__, 2, 0, columns, tiles)
            for step in range(*row.steps(0)):
                for n, group in row.groups(step):
                    for t, shown in [x for g in range(-(-n // blocks.GROUP)) for x in group(g)][:n]:
                        assert shown == visible[0, h, 2 * j + t // 4, (16 * row.block(step) + t % 4 * 4) // 8]


@pytest.mark.parametrize("mask", [mask for mask in MASKS if not jax.tree.leaves(mask)], ids=str)
def test_patterns_are_all_that_occur(mask):
    """Of masks without arrays, whose geometry is known at compile time."""
    found = blocks.patterns(mask, BLOCK_Q, BLOCK_K, TILE_Q, TILE_K, T, S)
    kind = blocks.kinds(visibility(mask, "none"), TILE_Q, TILE_K, ROWS * STRIPS, COLUMNS * PARTS, S, True)
    tiles = np.asarray(kind).reshape(ROWS, STRIPS, COLUMNS, PARTS).swapaxes(1, 2).reshape(-1, STRIPS, PARTS)
    cut = {tuple(map(tuple, x.tolist())) for x in tiles if (x != FULL).any() and (x != EMPTY).any()}
    if found is None:
        assert len(cut) > blocks._MOST_PATTERNS
    else:
        assert set(found) == cut and len(found) == len(cut) <= blocks._MOST_PATTERNS


def test_patterns_of_common_masks_are_few():
    """At a million tokens, in no time and no memory: a causal kernel has one body for the diagonal."""
    long = 2**20
    assert blocks.patterns(m.Full(), 1024, 1024, 256, 256, long, long) == ()
    (diagonal,) = blocks.patterns(m.Causal(), 1024, 1024, 256, 256, long, long)
    assert diagonal == tuple(tuple((EMPTY, PARTIAL, FULL)[(k < q) + (k <= q)] for k in range(4)) for q in range(4))
    assert len(blocks.patterns(m.Window(4096), 1024, 1024, 256, 256, long, long)) == 2
    assert blocks.patterns(m.Full(), 1024, 1024, 256, 256, 300, 300) == (((FULL, PARTIAL, EMPTY, EMPTY),) * 4,)
