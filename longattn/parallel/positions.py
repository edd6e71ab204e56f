"""The rule for positions that are given to a strategy which skips keys: they rise by one per token within a segment.

A ring knows at trace time which keys a mask of q - k hides, from the tokens' places. Where positions break the rule the
result would be wrong, and nothing would say so. Arrays that are concrete are checked in every call. Traced ones are
checked where the environment has LONGATTN_DEBUG=1: when the program runs, an error is logged. It is not raised, because
a device that stops leaves the others waiting for it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from longattn.mask import And, Full, Mask, Not, Or
from longattn.ops.attention.contract import Visibility
from longattn.parallel.strategy import Call, Strategy

DEBUG = "LONGATTN_DEBUG"


def check(visibility: Visibility, call: Call, strategy: Strategy) -> None:
    """Raises ValueError if positions that were given break the rule, and the strategy relies on it for this mask."""
    if call.in_order or call.P == 1 or not strategy.skips or not _reads_distance(visibility.mask):
        return
    arrays = tuple(visibility)[1:5]
    check_values = functools.partial(_check, call=call, name=strategy.name)
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            jax.debug.callback(functools.partial(_log, check_values), *arrays)
    elif all(not isinstance(x, jax.Array) or x.is_fully_addressable for x in arrays):
        check_values(*arrays)


def _log(check_values: Callable[..., None], *arrays: Any) -> None:
    try:
        check_values(*arrays)
    except ValueError as error:
        logging.getLogger("longattn").error(str(error))


def _reads_distance(mask: Mask) -> bool:
    """Returns whether a mask hides keys by q - k."""
    match mask:
        case And(a, b) | Or(a, b):
            return _reads_distance(a) or _reads_distance(b)
        case Not(a):
            return _reads_distance(a)
    return mask.is_relative and not isinstance(mask, Full)


def _check(q_positions: Any, k_positions: Any, q_segments: Any, k_segments: Any, *, call: Call, name: str) -> None:
    sides = []
    for positions, segments in ((q_positions, q_segments), (k_positions, k_segments)):
        positions = np.asarray(positions, np.int64)
        ids = np.zeros_like(positions) if segments is None else np.asarray(segments)
        place = np.broadcast_to(call.layout.positions(positions.shape[1], call.shards), positions.shape)
        sides.append((positions, place, np.broadcast_to(ids, positions.shape)))
    rows = max(len(positions) for positions, _, _ in sides)
    for row in range(rows):
        p, place, ids = (np.concatenate([x[min(row, len(x) - 1)] for x in xs]) for xs in zip(*sides))
        _check_row(row, p, place, ids, q_segments is not None, name)


def _check_row(row: int, p: np.ndarray, place: np.ndarray, ids: np.ndarray, segmented: bool, name: str) -> None:
    order = np.lexsort((place, ids))
    p, place, ids = p[order], place[order], ids[order]
    broken = (ids[1:] == ids[:-1]) & (p[1:] - p[:-1] != place[1:] - place[:-1])
    if segmented and broken.any():  # a segment whose positions are all equal is padding
        first = np.flatnonzero(np.append(True, ids[1:] != ids[:-1]))
        padding = np.minimum.reduceat(p, first) == np.maximum.reduceat(p, first)
        broken &= ~np.repeat(padding, np.diff(first, append=len(ids)))[1:]
    if broken.any():
        at = int(np.argmax(broken))
        where = f"row {row}" + (f", segment {ids[at]}" if segmented else "")
        raise ValueError(
            f"positions={p[at]} and {p[at + 1]} of tokens {place[at]} and {place[at + 1]} ({where}) must differ as the "
            f"tokens' places do: strategy={name!r} skips the keys that the mask hides by this rule; where positions "
            "restart pass segment_ids that change, or use strategy='all_gather'"
        )
