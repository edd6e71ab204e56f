"""Exact numbers of (query, key) pairs that a mask shows, counted without a T x S array."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import jax
import numpy as np
from jaxtyping import Array

from longattn.mask import FULL, PARTIAL, Mask

_LEAF = 16  # below this edge a block's pairs are counted one by one


_PIECE = 4096  # blocks looked at together: bounds the memory of the count


@functools.lru_cache(maxsize=65_536)
def _pairs_by_distance(mask: Mask, T: int, S: int, first: int = 0, step: int = 1) -> int:
    """Sum over the distances q - k that the mask shows of the pairs at that distance: O(T + S).

    Queries are `step` apart, so are keys, and the first query is `first` after the first key.
    """
    d = np.arange(1 - S, T, dtype=np.int64)
    at_distance = np.minimum(T, S + d) - np.maximum(0, d)
    distance = first + step * d
    return int(at_distance[mask(distance, np.zeros_like(distance))].sum())


def _pairs_in(mask: Mask, blocks: np.ndarray) -> np.ndarray:
    """Visible pairs in blocks [J 4] of inclusive bounds (q_lo, q_hi, k_lo, k_hi), halving those that are PARTIAL.

    Returns int64 [1 1], or [B H] for a mask with array leaves (1 where it does not vary).
    """
    q_lo, q_hi, k_lo, k_hi = (blocks[:, i : i + 1] for i in range(4))
    kind = _per_head(mask.kind(q_lo, q_hi, k_lo, k_hi))  # [B H J 1]
    split = (kind == PARTIAL).any((0, 1, 3))
    area = ((q_hi - q_lo + 1).astype(np.int64) * (k_hi - k_lo + 1))[None, None]
    total = np.where((kind == FULL) & ~split[None, None, :, None], area, 0).sum((2, 3))
    rest = blocks[split]
    tiny = np.maximum(rest[:, 1] - rest[:, 0], rest[:, 3] - rest[:, 2]) < _LEAF
    if tiny.any():
        total = total + _pairs_one_by_one(mask, rest[tiny])
    rest = rest[~tiny]
    q_mid, k_mid = (rest[:, 0] + rest[:, 1]) // 2, (rest[:, 2] + rest[:, 3]) // 2
    quarters = np.concatenate(
        [
            np.stack([q_lo, q_hi, k_lo, k_hi], 1)
            for q_lo, q_hi in ((rest[:, 0], q_mid), (q_mid + 1, rest[:, 1]))
            for k_lo, k_hi in ((rest[:, 2], k_mid), (k_mid + 1, rest[:, 3]))
        ]
    )
    quarters = quarters[(quarters[:, 0] <= quarters[:, 1]) & (quarters[:, 2] <= quarters[:, 3])]
    for start in range(0, len(quarters), _PIECE):
        total = total + _pairs_in(mask, quarters[start : start + _PIECE])
    return total


def _pairs_one_by_one(mask: Mask, blocks: np.ndarray) -> np.ndarray:
    """Visible pairs in blocks of at most _LEAF x _LEAF, as `_pairs_in`."""
    i, j = (x.reshape(1, -1).astype(np.int32) for x in np.indices((_LEAF, _LEAF)))
    q, k = blocks[:, 0:1] + i, blocks[:, 2:3] + j  # [J _LEAF**2]
    inside = (q <= blocks[:, 1:2]) & (k <= blocks[:, 3:4])
    return (_per_head(mask(q, k)) & inside[None, None]).sum((2, 3))


def _per_head(x: Array | np.ndarray) -> np.ndarray:
    """A mask's answer as [B H . .]; it has rank 2 unless the mask holds arrays."""
    x = np.asarray(x)
    return x if x.ndim == 4 else x[None, None]


@functools.lru_cache(maxsize=4096)
def _pairs(mask: Mask, T: int, S: int) -> int:
    if mask.is_relative:
        return _pairs_by_distance(mask, T, S)
    return int(_pairs_in(mask, np.array([[0, T - 1, 0, S - 1]], np.int32))[0, 0])


def visible_pairs(mask: Mask, T: int, S: int | None = None, documents: Iterable[int] | None = None) -> int | float:
    """The exact number of (query, key) pairs that one head of one sequence computes, without a T x S array.

    Masks of q - k are summed over the distances, in O(T + S); others by halving blocks that `mask.kind` calls
    PARTIAL, in O(T) for masks with an edge, O(T S) for `Fn`.

    Args:
      mask: at positions arange(T), arange(S). With array leaves the result is the mean over their sequences and heads.
      T: queries.
      S: keys; None is T.
      documents: lengths of the packed documents, with positions that restart in each; their sum is at most T, and the
        rest is padding that nobody attends to. Not together with another S.

    Raises:
      ValueError: for lengths that do not fit.
    """
    S = T if S is None else S
    if T < 0 or S < 0:
        raise ValueError(f"{T=} and {S=} must not be negative")
    if documents is not None:
        lengths = [int(n) for n in documents]
        if S != T:
            raise ValueError(f"{S=} must be {T=} with documents: they are packed for queries and keys alike")
        if min(lengths, default=0) < 0 or sum(lengths) > T:
            raise ValueError(f"documents of {sum(lengths)} tokens must fit into {T=}")
        return sum(visible_pairs(mask, n) for n in lengths)
    if T == 0 or S == 0:
        return 0
    if not jax.tree.leaves(mask):
        return _pairs(mask, T, S)
    mask = jax.tree.map(np.asarray, mask)
    return float(_pairs_in(mask, np.array([[0, T - 1, 0, S - 1]], np.int32)).mean())


def pairs_between(mask: Mask, queries: range, keys: range) -> int:
    """The exact number of visible pairs of queries and keys, at positions that are one step apart in both.

    Raises:
      NotImplementedError: for other masks than rules of q - k where positions are not adjacent and there are more than
        2**28 pairs, which would be counted one by one.
      ValueError: for masks with array leaves, and ranges of different steps.
    """
    if jax.tree.leaves(mask):
        raise ValueError(f"{mask=} must have no array leaves: it differs between sequences")
    if queries.step != keys.step:
        raise ValueError(f"{queries=} and {keys=} must have one step")
    if not len(queries) or not len(keys):
        return 0
    if mask.is_relative:
        return _pairs_by_distance(mask, len(queries), len(keys), queries[0] - keys[0], queries.step)
    if queries.step == 1:
        return int(_pairs_in(mask, np.array([[queries[0], queries[-1], keys[0], keys[-1]]], np.int32))[0, 0])
    if len(queries) * len(keys) > 2**28:
        raise NotImplementedError(f"{mask} is no rule of q - k: its pairs at every {queries.step}th position are many")
    k = np.array(keys, np.int32)
    return sum(int(np.asarray(mask(np.full_like(k, q), k)).sum()) for q in queries)


@functools.lru_cache(maxsize=256)
def pairs_by_part(mask: Mask, T: int, parts: int) -> tuple[int, ...]:
    """The exact number of visible pairs of each of `parts` equal, contiguous parts of the queries with all keys.

    Raises:
      ValueError: where `parts` does not divide T.
    """
    if parts < 1 or T % parts:
        raise ValueError(f"{parts=} must divide {T=}")
    t = T // parts
    blocks = [np.array([[i * t, i * t + t - 1, 0, T - 1]], np.int32) for i in range(parts)]
    return tuple(int(_pairs_in(mask, block)[0, 0]) for block in blocks)
