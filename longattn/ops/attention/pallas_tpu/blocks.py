"""Which blocks a kernel visits: lists made at run time from the mask's interval kinds and the segments' bounds.

A kernel iterates over rows: blocks of queries in the forward pass, of keys in the backward pass. Each row has a list of
the blocks on the other side that hold a visible pair; blocks that need a mask come first. A list is W words of the
array int32 [B|1 H|1 J W]:

    the end of each class of blocks in the list, one word per class
    the first block of the next row's list, or -1
    the kernel's own numbers
    the blocks, class by class; the bit above `INDEX` marks the first row that visits a block, if the kernel needs that
    for each block its tiles that hold a visible pair, if they are known only at run time

The last class holds the blocks that need no mask. If the geometry is known at compile time, each `Pattern` (the way a
block is cut into hidden, cut and whole tiles) is a class, and the kernel has a body per pattern that skips the hidden
tiles. Otherwise there is one class of cut blocks, and the list counts and names each block's cut tiles and whole tiles.
A word names `GROUP` tiles, as many as are computed at once. The bit above `NUMBER` is set where a `BlockSparse` shows
the tile; its blocks never cut one.

The kernel fetches one row at a time, so a list for any sequence length fits the scalar memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Int8

from longattn.mask import EMPTY, FULL, PARTIAL, BlockSparse, Mask
from longattn.ops.attention.contract import Visibility

Pattern = tuple[tuple[int, ...], ...]  # kinds of a block's tiles [queries][keys]
INDEX = 2**30 - 1  # the bits of a block's index
GROUP = 4  # tiles to a word, eight bits each
NUMBER = 2**7 - 1  # the bits of a tile's number in its block
_MOST_PATTERNS = 4


def _bounds(x: Array, tile: int, tiles: int, in_order: bool) -> tuple[Any, Any]:
    """Returns the least and the greatest value of [B|1 T] in each tile, [B|1 tiles].

    Beyond the end the last value is repeated; positions that are `in_order` go on.
    """
    if in_order:
        first = np.arange(tiles, dtype=np.int32)[None] * tile
        return first, first + (tile - 1)
    x = jnp.pad(x, ((0, 0), (0, tiles * tile - x.shape[1])), mode="edge").reshape(x.shape[0], tiles, tile)
    return x.min(-1), x.max(-1)


def _inside(length: int, tile: int, first: np.ndarray) -> np.ndarray:
    """Returns the kinds of tiles that begin at `first` if everything within `length` were visible."""
    return np.where(first + tile <= length, FULL, np.where(first < length, PARTIAL, EMPTY)).astype(np.int8)


def kinds(
    visibility: Visibility, tile_q: int, tile_k: int, Jq: int, Jk: int, S: int, in_order: bool
) -> Int8[Array, "..."]:
    """Returns EMPTY, PARTIAL or FULL for each tile [B|1 H|1 Jq Jk]; the tile in which the keys end is not FULL.

    The end of the queries does not matter: results beyond it are thrown away.

    Args:
      in_order: positions are arange(T) and arange(S).
    """
    rows = [x[:, None, :, None] for x in _bounds(visibility.q_positions, tile_q, Jq, in_order)]
    columns = [x[:, None, None, :] for x in _bounds(visibility.k_positions, tile_k, Jk, in_order)]
    kind = jnp.asarray(visibility.mask.kind(*rows, *columns))
    if visibility.q_segments is not None:
        q_lo, q_hi = (x[:, None, :, None] for x in _bounds(visibility.q_segments, tile_q, Jq, False))
        k_lo, k_hi = (x[:, None, None, :] for x in _bounds(visibility.k_segments, tile_k, Jk, False))
        same = (q_lo == q_hi) & (k_lo == k_hi) & (q_lo == k_lo)
        other = (q_hi < k_lo) | (k_hi < q_lo)
        kind = jnp.minimum(kind, jnp.where(other, EMPTY, jnp.where(same, FULL, PARTIAL)).astype(kind.dtype))
    return jnp.minimum(kind, _inside(S, tile_k, np.arange(Jk) * tile_k)[None, None, None])


@functools.lru_cache(256)
def patterns(
    mask: Mask, block_q: int, block_k: int, tile_q: int, tile_k: int, T: int, S: int
) -> tuple[Pattern, ...] | None:
    """Returns the patterns of the cut blocks at positions arange(T), arange(S); None if too many to compile."""

    def kind(q_first: np.ndarray, q_size: int, k_first: np.ndarray, k_size: int) -> np.ndarray:
        found = mask.kind(q_first, q_first + (q_size - 1), k_first, k_first + (k_size - 1))
        return np.minimum(np.asarray(found), _inside(S, k_size, k_first))

    columns = np.arange(0, S, block_k, dtype=np.int32)
    found: dict[Pattern, None] = {}
    # One row at a time, to bound the memory for a long sequence.
    for row in np.arange(0, T, block_q, dtype=np.int32)[:, None]:
        cut = columns[kind(row, block_q, columns, block_k) == PARTIAL]
        q = row + np.arange(0, block_q, tile_q, dtype=np.int32)[None, :, None]
        k = cut[:, None, None] + np.arange(0, block_k, tile_k, dtype=np.int32)
        for tiles in kind(q, tile_q, k, tile_k):
            if tiles.any() and not (tiles == FULL).all():
                found[tuple(map(tuple, tiles.tolist()))] = None
        if len(found) > _MOST_PATTERNS:
            return None
    return tuple(found)


@functools.lru_cache(256)
def share(mask: Mask, block_q: int, block_k: int, T: int, S: int) -> float:
    """Returns the share of blocks that hold a visible pair at positions arange(T), arange(S)."""
    columns = np.arange(0, S, block_k, dtype=np.int32)
    rows = np.arange(0, T, block_q, dtype=np.int32)
    shown = [np.asarray(mask.kind(i, i + (block_q - 1), columns, columns + (block_k - 1))) != EMPTY for i in rows]
    return float(np.mean(shown))


def lists(
    kind: Int8[Array, "..."],
    outer: int,
    inner: int,
    classes: tuple[Pattern, ...] | None,
    own: Sequence[Array | int],
    mark_first: bool = False,
    shown: Bool[Array, "..."] | None = None,
) -> Int[Array, "..."]:
    """Returns the lists of a kernel whose rows are `outer` tiles high and whose blocks are `inner` tiles wide.

    Args:
      kind: kinds of the tiles [B|1 H|1 Jo*outer Ji*inner], rows first.
      classes: the patterns [outer][inner] of cut blocks, or None for one class of all cut blocks.
      own: the kernel's own numbers, each broadcastable to [B H Jo].
      mark_first: whether to mark first visits.
      shown: whether a `BlockSparse` shows each tile, if tiles are listed and the mask has one.

    Returns:
      int32 [B|1 H|1 Jo W].
    """
    rows, columns = kind.shape[2:]
    Jo, Ji = rows // outer, columns // inner
    by_block = lambda x: jnp.moveaxis(x.reshape(*x.shape[:2], Jo, outer, Ji, inner), 4, 3)  # [B H Jo Ji outer inner]
    tiles = by_block(kind)
    empty, full = (tiles == EMPTY).all((-1, -2)), (tiles == FULL).all((-1, -2))
    count = 1 if classes is None else len(classes)
    rank = jnp.where(empty, count + 1, jnp.where(full, count, 0))
    for i, pattern in enumerate(classes or ()):
        like = tiles == np.array(pattern, np.int8).reshape(1, 1, 1, 1, outer, inner)
        rank = jnp.where(like.all((-1, -2)), i, rank)
    order = jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)
    if mark_first:
        visits = (~empty).astype(jnp.int32)
        earlier = jnp.cumsum(visits, axis=2) - visits > 0
        order = order + jnp.where(jnp.take_along_axis(earlier, order, axis=-1), 0, INDEX + 1)
    ends = [(rank <= i).sum(-1, dtype=jnp.int32) for i in range(count + 1)]
    first = jnp.where(ends[-1] > 0, order[..., 0], -1)
    following = jnp.concatenate([first[..., 1:], jnp.full_like(first[..., :1], -1)], -1)
    header = jnp.broadcast_arrays(*ends, following, *(jnp.asarray(x, jnp.int32) for x in own))
    order = jnp.broadcast_to(order, (*header[0].shape, Ji))
    end = jnp.full((*order.shape[:-1], 1), -1, jnp.int32)  # read, but not used, behind a list of all blocks
    words = [jnp.stack(header, -1), order, end]
    if classes is None:
        of_block = lambda x: by_block(x).reshape(*x.shape[:2], Jo, Ji, -1)
        listed = _tiles(of_block(kind), None if shown is None else of_block(shown))
        listed = jnp.take_along_axis(listed, (order & INDEX)[..., None], axis=3)
        words.append(listed.reshape(*order.shape[:-1], -1))
    return jnp.concatenate(words, -1)


def _tiles(kind: Int8[Array, "... tiles"], shown: Bool[Array, "... tiles"] | None) -> Int[Array, "... words"]:
    """Returns the words that name a block's tiles: the count of cut tiles plus 2^16 times that of whole ones, the cut
    tiles, and in further words the whole tiles.
    """
    cut, whole = (kind == PARTIAL).astype(jnp.int32), (kind == FULL).astype(jnp.int32)
    counts = cut.sum(-1, keepdims=True), whole.sum(-1, keepdims=True)
    place = jnp.where(whole == 1, -(-counts[0] // GROUP) * GROUP + whole.cumsum(-1), cut.cumsum(-1)) - 1
    number = lax.broadcasted_iota(jnp.int32, kind.shape, kind.ndim - 1)
    if shown is not None:
        number = number + jnp.where(shown, NUMBER + 1, 0)
    entry = jnp.where(cut + whole == 1, number << (8 * (place % GROUP)), 0)
    words = [jnp.where(place // GROUP == i, entry, 0).sum(-1) for i in range(_groups(kind.shape[-1]))]
    return jnp.concatenate([counts[0] + (counts[1] << 16), jnp.stack(words, -1)], -1)


def _groups(tiles: int) -> int:
    """Returns the most words that the tiles of a block fill."""
    return -(-tiles // GROUP) + 1


def walk(
    visibility: Visibility,
    cut: tuple[Pattern, ...] | None,
    block: tuple[int, int],
    tile: tuple[int, int],
    T: int,
    S: int,
    in_order: bool,
    own: Sequence[Array | int],
    by_key: bool,
) -> tuple[Int[Array, "..."], Bool[Array, "..."]]:
    """Returns the lists of a kernel whose rows are blocks of queries or, `by_key`, of keys with first visits marked.

    Args:
      cut: the result of `patterns`.
      block, tile: (queries, keys).
      in_order, own: as for `kinds` and `lists`.

    Returns:
      The lists, int32 [B|1 H|1 J W], and which blocks of queries hold a visible pair, bool [B|1 H|1 Jq].
    """
    strips, parts = block[0] // tile[0], block[1] // tile[1]
    Jq, Jk = -(-T // block[0]), -(-S // block[1])
    kind = kinds(visibility, *tile, Jq * strips, Jk * parts, S, in_order)
    shown = None
    if (sparse := block_sparse(visibility.mask)) is not None:
        shown = kinds(Visibility(sparse, *visibility[1:3]), *tile, Jq * strips, Jk * parts, S, in_order) != EMPTY
    visited = (kind != EMPTY).reshape(*kind.shape[:2], Jq, -1).any(-1)
    if not by_key:
        return lists(kind, strips, parts, cut, own, shown=shown), visited
    turned = None if cut is None else tuple(tuple(zip(*pattern)) for pattern in cut)
    kind, shown = kind.swapaxes(2, 3), None if shown is None else shown.swapaxes(2, 3)
    return lists(kind, parts, strips, turned, own, mark_first=True, shown=shown), visited


def block_sparse(mask: Mask) -> BlockSparse | None:
    """Returns the first BlockSparse within a mask, if there is one."""
    is_sparse = lambda x: isinstance(x, BlockSparse)
    return next(filter(is_sparse, jax.tree.leaves(mask, is_leaf=is_sparse)), None)


def whole(strips: int, parts: int) -> Pattern:
    """Returns the pattern of a block that needs no mask."""
    return ((FULL,) * parts,) * strips


def bodies(cut: tuple[Pattern, ...] | None, strips: int, parts: int) -> list[Pattern | None]:
    """Returns the pattern of each class of blocks, the whole one last; None stands for cut blocks with listed tiles."""
    return [*((None,) if cut is None else cut), whole(strips, parts)]


class Row:
    """One row of what `lists` wrote, as a kernel reads it."""

    def __init__(self, read: Callable[[Any], Any], classes: int, own: int, blocks: int, tiles: int) -> None:
        """Reads the row's header.

        Args:
          read: returns word i of the row.
          classes: how many classes of blocks there are.
          own: how many numbers of the kernel's own there are.
          blocks: how many blocks the other side has.
          tiles: how many tiles a block has.
        """
        self.ends = [read(i) for i in range(classes)]
        self.seen = self.ends[-1]  # blocks in the list
        self.following = read(classes)  # the next row's first block, or -1
        self.own = [read(classes + 1 + i) for i in range(own)]
        self._read, self._first = read, classes + 1 + own
        self._tiles, self._words = self._first + blocks + 1, 1 + _groups(tiles)

    def block(self, step: Any) -> Any:
        """Returns the block that is visited at this step."""
        return self._read(self._first + step)

    def groups(self, step: Any) -> list[tuple[Any, Callable[[Any], list[Any]]]]:
        """Returns (count, group) of a block's listed cut tiles, and the same of its whole ones.

        group(i) returns the i-th group of tiles; a tile is (its number, 1 if a `BlockSparse` shows it).
        """
        first = self._tiles + step * self._words
        counts = self._read(first)
        cut, whole = counts & 0xFFFF, counts >> 16

        def group(i: Any) -> list[Any]:
            word = self._read(first + 1 + i)
            return [((word >> 8 * j) & NUMBER, (word >> 8 * j + 7) & 1) for j in range(GROUP)]

        return [(cut, group), (whole, lambda i: group((cut + GROUP - 1) // GROUP + i))]

    def steps(self, i: int) -> tuple[Any, Any]:
        """Returns where class i begins and ends in the list."""
        return (self.ends[i - 1] if i else 0), self.ends[i]
