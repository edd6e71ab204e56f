"""Operations on one tile [keys queries] of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from longattn.mask import Mask
from longattn.ops.attention.pallas_tpu.blocks import GROUP
from longattn.ops.attention.pallas_tpu.call import LANES, Call

Ref = Any  # a Pallas reference to memory: jax has no public type
_FORMS = {"NT": ((1,), (1,)), "TN": ((0,), (0,)), "TT": ((0,), (1,))}


def dot(a: Array, b: Array, form: str, precision: lax.Precision | None) -> Array:
    """Returns the matrix product a b in float32; `form` says for each operand whether it is transposed ("T") or not."""
    return lax.dot_general(a, b, (_FORMS[form], ((), ())), precision=precision, preferred_element_type=jnp.float32)


def multiple(i: Array | int, size: int) -> Array | int:
    """Returns i * size, and tells the compiler that it is a multiple of size."""
    return i * size if isinstance(i, int) else pl.multiple_of(i * size, size)


def by_groups(listed: Any, tiles: int, compute: Callable[[list[Any], bool], None]) -> None:
    """Calls `compute(group of tiles, whether the mask cuts them)` for all groups that `blocks.Row.groups` listed.

    A program for one tile waits for its own products: it takes as long as two tiles in a program for four.

    Args:
      tiles: how many tiles a block has.
    """
    for masked, (count, group) in zip((True, False), listed):

        def some(i: Array, n: int, masked: bool = masked, group: Callable[[Any], list[Any]] = group) -> None:
            compute(group(i)[:n], masked)

        if tiles >= GROUP:
            lax.fori_loop(0, count // GROUP, lambda i, _, some=some: some(i, GROUP), None)
        for rest in range(1, min(GROUP, tiles + 1)):
            pl.when(count % GROUP == rest)(lambda some=some, last=count // GROUP, rest=rest: some(last, rest))


def _column(row: Array, queries: int) -> Array:
    """Returns a row [1 keys] of numbers as a tile [keys queries], the same in every lane."""
    parts = [jnp.broadcast_to(row[:, i : i + LANES], (LANES, LANES)).T for i in range(0, row.shape[1], LANES)]
    return jnp.tile(jnp.concatenate(parts), (1, queries // LANES))


def bias(n: Call, ring: Ref, slot: Array, strip: Array | int, first: Array | int) -> Array:
    """Returns the bias of a tile, float32 [keys queries] in n.unit, from the ring's block [queries|1 keys]."""
    keys = pl.ds(first, n.tile_k)
    if ring.shape[1] == 1:
        added = _column(ring[slot, :, keys], n.tile_q)
    else:
        added = ring[slot, pl.ds(multiple(strip, n.tile_q), n.tile_q), keys].astype(jnp.float32).T
    return added * (1 / n.unit)


def bias_block(n: Call, hbm: Ref, b: Array, h: Array, i: Array, j: Array) -> Ref:
    """Returns the block of head h's bias for block i of queries and block j of keys."""
    B, H, T, _ = hbm.shape
    queries = pl.ds(0, 1) if T == 1 else pl.ds(multiple(i, n.block_q), n.block_q)
    return hbm.at[b if B > 1 else 0, h if H > 1 else 0, queries, pl.ds(multiple(j, n.block_k), n.block_k)]


def visible(
    mask: Mask, numbers: tuple[str, ...], q_numbers: Ref, k_numbers: Ref, q_index: Any, k_index: Any,
    q_offset: Array | int, k_offset: Array | int, queries: int, keys: int, S: int | None,
) -> Array:  # fmt: skip
    """Returns the visible pairs of a tile, bool [keys queries].

    Args:
      numbers: names of the rows of q_numbers and k_numbers; without "positions" the index is the position.
      q_numbers, k_numbers: refs int32 [numbers block].
      q_index, k_index: indices of the tile's first query and key in their sequences.
      q_offset, k_offset: place of the tile in its block.
      S: number of keys if the tile may reach beyond them, else None.
    """
    shape = (keys, queries)
    index = k_index + lax.broadcasted_iota(jnp.int32, shape, 0)

    def pair(name: str) -> tuple[Array, Array]:
        i = numbers.index(name)
        q = q_numbers[i : i + 1, pl.ds(q_offset, queries)]
        k = k_numbers[i : i + 1, pl.ds(k_offset, keys)]
        return q, _column(k, queries)

    if "positions" in numbers:
        q_positions, k_positions = pair("positions")
    else:
        q_positions, k_positions = q_index + lax.broadcasted_iota(jnp.int32, (1, queries), 1), index
    seen = mask(q_positions, k_positions)
    if "segments" in numbers:
        q_segments, k_segments = pair("segments")
        seen = seen & (q_segments == k_segments)
    if S is not None:
        seen = seen & (index < S)
    return jnp.broadcast_to(seen, shape)
