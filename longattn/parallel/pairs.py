"""Queries of one device and keys of another: what a mask shows of such a pair, known before anything runs.

A layout and a mask without arrays tell for each pair of devices (i, j) which of i's queries see which of j's keys. The
pair may show nothing, all of a rectangle, the same as in one sequence in order, or what only the positions tell.
Strategies neither compute nor send for pairs without a visible key. Where all keys are visible the mask is dropped.

Positions that are given rise by one per token within a segment. Masks of q - k then show what they show of the layout's
own positions; of other masks nothing is known beforehand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from longattn.mask import EMPTY, FULL, And, Causal, Fn, Full, Mask, Not, Or, Window
from longattn.ops import dispatch
from longattn.ops import partial as partials
from longattn.ops.attention import attend_partial, backward_partial
from longattn.ops.attention.contract import Visibility
from longattn.ops.partial import Partial
from longattn.parallel.strategy import Call
from longattn.shapes import statistics_dtype


@dataclass(frozen=True)
class Case:
    """The part of a pair that is computed: queries [q0, q1) against keys [k0, k1) of the devices' shards."""

    q: tuple[int, int] = (0, 0)
    k: tuple[int, int] = (0, 0)
    mask: Mask | None = None  # of indices into the shards; None: the call's mask, of positions

    @property
    def empty(self) -> bool:
        """Whether there is nothing to compute."""
        return self.q[0] == self.q[1]


@dataclass(frozen=True, eq=False)
class Pairs:
    """The distinct cases of P devices, and `table[i, j]`, the index of the case of i's queries and j's keys."""

    cases: tuple[Case, ...]
    table: np.ndarray  # int32 [P P]

    @property
    def needed(self) -> np.ndarray:
        """bool [P P], True where there is something to compute."""
        return ~np.array([case.empty for case in self.cases])[self.table]


def _unknown(q_pos: object, k_pos: object) -> NoReturn:
    raise NotImplementedError  # the Fn mask around this is asked for its kind alone, never for single pairs


def _known(mask: Mask, in_order: bool) -> Mask:
    """The mask, with `_unknown` in place of the rules that depend on arrays or on positions that are given."""
    match mask:
        case And(a, b) | Or(a, b):
            return type(mask)(_known(a, in_order), _known(b, in_order))
        case Not(a):
            return Not(_known(a, in_order))
    return mask if mask.is_relative or (in_order and not jax.tree.leaves(mask)) else Fn(_unknown)


def pairs(mask: Mask, call: Call, T: int, S: int) -> Pairs:
    """The case of every pair of devices, for T queries and S keys in all."""
    return _pairs(_known(mask, call.in_order), call, T, S)


@functools.lru_cache(maxsize=256)
def _pairs(mask: Mask, call: Call, T: int, S: int) -> Pairs:
    layout, P = call.layout, call.P
    q, k = (np.array([layout.runs(i, n, P) for i in range(P)], np.int32) for n in (T, S))  # [P pieces (first, last)]
    q, k = q[:, None, :, None], k[None, :, None, :]
    kinds = mask.kind(q[..., 0], q[..., 1], k[..., 0], k[..., 1])  # [P P pieces pieces]
    cases: dict[Case, int] = {}
    known: dict[tuple[bytes, int], int] = {}  # from what a case depends on to its index
    table = np.zeros((P, P), np.int32)
    for i, j in np.ndindex(P, P):
        key = kinds[i, j].tobytes(), np.sign(i - j)
        if key not in known:
            case = _case(mask, layout.name, i, j, kinds[i, j], T // P, S // P)
            known[key] = cases.setdefault(case, len(cases))
        table[i, j] = known[key]
    return Pairs(tuple(cases), table)


def _case(mask: Mask, layout: str, i: int, j: int, kinds: np.ndarray, t: int, s: int) -> Case:
    """The case of device i's t queries and j's s keys, from the kinds of their pieces."""
    rows, columns = (np.flatnonzero((kinds != EMPTY).any(axis)) for axis in (1, 0))
    if not rows.size:
        return Case()
    rectangle = kinds[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    q_slice, k_slice = (
        (int(at[0]) * (n // pieces), int(at[-1] + 1) * (n // pieces))
        for at, n, pieces in zip((rows, columns), (t, s), kinds.shape)
    )
    if (rectangle == FULL).all():
        return Case(q_slice, k_slice, Full())
    whole = (0, t), (0, s)
    if t == s and mask == Causal() and (i == j or layout == "striped"):  # every device's tokens are in order
        return Case(*whole, Causal() if j <= i else Window(t, -1))
    if t == s and i == j and layout == "contiguous" and mask.is_relative:
        return Case(*whole, mask)
    return Case(q_slice, k_slice)


# ---- computing a pair, of devices that are known when it runs


@dataclass(frozen=True, eq=False)
class Local:
    """Computes any pair of a call; every device has the ids and positions of all."""

    call: Call
    visibility: Visibility
    pairs: Pairs
    T: int
    S: int

    def options(self, case: Case, i: Array, j: Array, B: int) -> dict[str, Any]:
        """The keyword arguments of `attend_partial` for the case of device i's queries and device j's keys."""
        call, visibility, P = self.call, self.visibility, self.call.P

        def shard(x: Array, device: Array, length: int, within: tuple[int, int]) -> Array:
            mine = lax.dynamic_slice_in_dim(x, device * (length // P), length // P, 1)
            return jnp.broadcast_to(mine[:, slice(*within)], (B, within[1] - within[0]))

        sides = ("q", i, self.T, case.q), ("k", j, self.S, case.k)
        positions = None
        if case.mask is None and call.in_order and P > 1:
            rows = [call.layout.local_positions(device, n, P)[None, slice(*at)] for _, device, n, at in sides]
            positions = tuple(jnp.broadcast_to(x, (B, x.shape[1])) for x in rows)
        elif case.mask is None and not call.in_order:
            positions = tuple(shard(getattr(visibility, f"{side}_positions"), *rest) for side, *rest in sides)
        segments = None
        if visibility.q_segments is not None:
            segments = tuple(shard(getattr(visibility, f"{side}_segments"), *rest) for side, *rest in sides)
        return call.options(visibility.mask if case.mask is None else case.mask, positions, segments)

    def _switch[R](self, which: np.ndarray, i: Array, j: Array, branch: Callable[..., R], *arrays: Any) -> R:
        """`branch(case, *arrays)` for the case of the pair (i, j), which is one of those that `which` [P P] names."""
        used = sorted(set(self.pairs.table[which].tolist()))
        branches = [functools.partial(branch, self.pairs.cases[n]) for n in used]
        if len(used) == 1:
            return branches[0](*arrays)
        place = np.zeros(len(self.pairs.cases), np.int32)
        place[used] = np.arange(len(used))
        return lax.switch(jnp.asarray(place[self.pairs.table])[i, j], branches, *arrays)

    def attend(
        self, which: np.ndarray, i: Array, j: Array, q: Array, kv: tuple[Array, Array], so_far: Partial | None
    ) -> Partial:
        """`so_far`, a partial of i's queries, merged with their attention over j's keys."""

        def branch(case: Case, q: Array, k: Array, v: Array, so_far: Partial | None) -> Partial:
            if case.empty:
                return self._nothing(q, v) if so_far is None else so_far
            rows = slice(*case.q)
            options = self.options(case, i, j, q.shape[0])
            with jax.named_scope("pair"):
                new = attend_partial(q[:, rows], *(x[:, slice(*case.k)] for x in (k, v)), **options)
                if case.q == (0, q.shape[1]):
                    return new if so_far is None else partials.merge(so_far, new)
                so_far = self._nothing(q, v) if so_far is None else so_far
                merged = partials.merge(Partial(*(x[:, rows] for x in so_far)), new)
                return Partial(*(x.at[:, rows].set(part) for x, part in zip(so_far, merged)))

        return self._switch(which, i, j, branch, q, *kv, so_far)

    def _nothing(self, q: Array, v: Array) -> Partial:
        """The partial of these queries over no keys."""
        dtype, shape = statistics_dtype(q.dtype), (*q.shape[:3], v.shape[3])
        empty = Partial(jnp.zeros(shape, dtype), jnp.full(shape[:3], -jnp.inf, dtype))
        return dispatch.vary_together((empty, q))[0]

    def backward(
        self, which: np.ndarray, i: Array, j: Array, q: Array, kv: tuple[Array, Array], *statistics: Array
    ) -> tuple[Array, Array, Array]:
        """dq, dk, dv in float32 of i's queries and j's keys; `statistics` are out, lse, do, dlse of these queries."""

        def branch(case: Case, q: Array, k: Array, v: Array, *statistics: Array) -> tuple[Array, Array, Array]:
            rows, columns = slice(*case.q), slice(*case.k)
            dtype = statistics_dtype(q.dtype)
            zeros = dispatch.vary_together((*(jnp.zeros(x.shape, dtype) for x in (q, k, v)), q))[:3]
            if case.empty:
                return zeros
            options = self.options(case, i, j, q.shape[0])
            with jax.named_scope("pair"):
                found = backward_partial(
                    q[:, rows], k[:, columns], v[:, columns], *(x[:, rows] for x in statistics), **options
                )
                return tuple(
                    x if x.shape == zero.shape else zero.at[:, at].set(x)
                    for x, zero, at in zip(found, zeros, (rows, columns, columns))
                )

        return self._switch(which, i, j, branch, q, *kv, *statistics)


def local(q: Array, k: Array, visibility: Visibility, call: Call) -> Local:
    """The `Local` of a call, from a device's shards of q and k."""
    T, S = (x.shape[1] * call.P for x in (q, k))
    return Local(call, visibility, pairs(visibility.mask, call, T, S), T, S)


def at_distance(P: int, distances: Iterable[int]) -> np.ndarray:
    """bool [P P], True for the pairs (i, j) with i - j mod P in `distances`."""
    i = np.arange(P)
    return np.isin((i[:, None] - i[None, :]) % P, list(distances))
