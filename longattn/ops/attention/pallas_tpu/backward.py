"""The backward kernel: dq, dk and dv in one walk over the visible blocks, in tiles S^T that stand transposed.

    S = q k^T;  P = 2^(c (S - lse));  dP = do v^T;  dS = P (dP - delta);  delta = rowsum(do out) - dlse
    dv = P^T do;  dk = scale dS^T q;  dq = scale dS k

Algorithm 2 of arXiv:2307.08691 in its loop order (keys outside). Of a tile, the gradients come as dv^T = do^T P,
dk^T = q^T dS and dq^T = k^T dS^T, whose stationary operand is the tile: on matrix units of 256 x 256 each takes half
the cycles at D = V = 128. In the program's order the products of one tile stand between the outputs of the tile before
and its own softmax, which the compiler needs to keep the units busy.

dk and dv of a row stay in fast memory. dq is summed in device memory, float32 [D T], read and written back at each
visit, in the order of the walk: one order, so the sum is the same bit for bit every time. The copies overlap the
computation. `_Sums` keeps them apart where a block of queries returns before its last write has landed.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from longattn.mask import EMPTY, PARTIAL
from longattn.ops.attention.pallas_tpu import blocks, tiles
from longattn.ops.attention.pallas_tpu.call import LOG2E, Call
from longattn.ops.attention.pallas_tpu.fetch import RING, Fetch, after, before

NO_KEY = 1e30  # stands for the lse of a query that sees no key, for which P is 0
_SLOT, _FETCHED, _READING, _LAST, _WRITING = range(5)  # of the state; from _WRITING on one flag per buffer


@dataclass(frozen=True)
class _Sums:
    """The blocks of dq that are on their way. At most one copy into, and one out of, each buffer of the ring."""

    hbm: Any  # [B H D T] float32
    ring: Any  # [RING D block]
    state: Any
    semaphores: Any  # DMA [2 RING]: reads, writes

    def _at(self, place: tuple[Array, Array, Array]) -> Any:
        b, h, i = place
        size = self.ring.shape[-1]
        return self.hbm.at[b, h, :, pl.ds(pl.multiple_of(i * size, size), size)]

    def read(self, place: tuple[Array, Array, Array], slot: Array) -> Any:
        return pltpu.make_async_copy(self._at(place), self.ring.at[slot], self.semaphores.at[0, slot])

    def write(self, place: tuple[Array, Array, Array], slot: Array) -> None:
        pltpu.make_async_copy(self.ring.at[slot], self._at(place), self.semaphores.at[1, slot]).start()
        self.state[_WRITING + slot] = 1

    def settle(self, slot: Array) -> None:
        """Waits until what was written from this buffer has landed."""

        @pl.when(self.state[_WRITING + slot] == 1)
        def _wait() -> None:
            zero = jnp.int32(0)  # all blocks are of one size, which is all that a wait reads
            pltpu.make_async_copy(self.ring.at[slot], self._at((zero, zero, zero)), self.semaphores.at[1, slot]).wait()
            self.state[_WRITING + slot] = 0


class _Tile(NamedTuple):
    """Where a tile stands in its block."""

    strip: Any
    queries: Any  # pl.Slice
    keys: Any
    masked: bool
    sparse: Any  # what a BlockSparse says of it


def _kernel(n: Call, walk: Any, k_ref: Any, v_ref: Any, q_hbm: Any, do_hbm: Any, stats_hbm: Any, *rest: Any) -> None:
    refs = list(rest)
    k_numbers, q_numbers = (refs.pop(0), refs.pop(0)) if n.numbers else (None, None)
    bias_hbm = refs.pop(0) if n.bias else None
    dq_hbm, dk_ref, dv_ref, *refs = refs
    q_ring, do_ring, stats_ring, number_ring, bias_ring, dq_ring, dk_acc, dv_acc, state, sems, dq_sems = refs
    head, row = pl.program_id(0), pl.program_id(1)
    b, kv, group = head // n.K, head % n.K, n.H // n.K
    c, tq, tk = n.unit * LOG2E, n.tile_q, n.tile_k
    precision = lax.Precision.HIGHEST if k_ref.dtype == jnp.float32 else None
    strips, parts = n.block_q // tq, n.block_k // tk
    bodies = blocks.bodies(n.patterns, strips, parts)

    def list_of(h: Array | int) -> blocks.Row:
        if walk.shape[0] == 1:
            return first_list  # it serves all heads of the group
        return blocks.Row(lambda i: walk[h, i], len(bodies), n.mask_numbers, n.rows_q, strips * parts)

    first_list = blocks.Row(lambda i: walk[0, i], len(bodies), n.mask_numbers, n.rows_q, strips * parts)
    sums = _Sums(dq_hbm, dq_ring, state, dq_sems)

    def fetch(h: Array, row: Array = row) -> Fetch:
        """Of query head h of this key head's group, as this row of keys, or the next one, meets it."""
        h = kv * group + h
        rows = [(q_hbm.at[b, h], q_ring), (do_hbm.at[b, h], do_ring)]
        lanes = [(stats_hbm.at[b, h], stats_ring)] + ([(q_numbers.at[b], number_ring)] if n.numbers else [])
        block_of = lambda i: tiles.bias_block(n, bias_hbm, b, h, i, row)
        return Fetch(q_hbm.shape[2], n.block_q, rows, lanes, sems, [(block_of, bias_ring)] if n.bias else [])

    # ---- one block

    def block(pattern: blocks.Pattern | None, slot: Array, i: Array, groups: Any) -> None:
        q, do, stats, dq = q_ring.at[slot], do_ring.at[slot], stats_ring.at[slot], dq_ring.at[slot]

        def products(tile: _Tile) -> tuple[Array, Array]:
            return (
                tiles.dot(k_ref[tile.keys], q[tile.queries], "NT", precision),
                tiles.dot(v_ref[tile.keys], do[tile.queries], "NT", precision),
            )

        def softmax(tile: _Tile, s: Array, dp: Array) -> tuple[Array, Array]:
            slope = None
            if n.softcap is not None:
                s = jnp.tanh(s * (n.scale / n.softcap))
                slope = 1 - s * s
            if n.bias:
                s = s + tiles.bias(n, bias_ring, slot, tile.strip, tile.keys.start)
            p = jnp.exp2(c * (s - stats[:1, tile.queries]))
            ds = p * (dp - stats[1:2, tile.queries])
            if slope is not None:
                ds = ds * slope
            if tile.masked:
                visible = tiles.visible(
                    n.mask_of(first_list.own, tile.sparse), n.numbers,
                    number_ring.at[slot] if n.numbers else None, k_numbers,
                    i * n.block_q + tile.queries.start, row * n.block_k + tile.keys.start, tile.queries.start,
                    tile.keys.start, tq, tk, n.S if n.S % n.block_k else None,
                )  # fmt: skip
                p, ds = jnp.where(visible, p, 0.0), jnp.where(visible, ds, 0.0)
            return p.astype(q.dtype), ds.astype(q.dtype)

        def outputs(tile: _Tile, p: Array, ds: Array) -> None:
            k = k_ref[tile.keys]
            if n.S % n.block_k and tile.masked:  # beyond the keys there may be NaN
                index = row * n.block_k + tile.keys.start + lax.broadcasted_iota(jnp.int32, k.shape, 0)
                k = jnp.where(index < n.S, k, jnp.zeros_like(k))
            dv_acc[:, tile.keys] += tiles.dot(do[tile.queries], p, "TT", precision)
            dk_acc[:, tile.keys] += tiles.dot(q[tile.queries], ds, "TT", precision)
            dq[:, tile.queries] += tiles.dot(k, ds, "TN", precision)

        def several(used: list[_Tile]) -> None:
            now, last = products(used[0]), None
            for t, tile in enumerate(used):
                following = products(used[t + 1]) if t + 1 < len(used) else None
                if last is not None:
                    outputs(used[t - 1], *last)
                last, now = softmax(tile, *now), following
            outputs(used[-1], *last)

        def at(strip: Array | int, part: Array | int, masked: bool, sparse: Array | None = None) -> _Tile:
            return _Tile(
                strip, pl.ds(tiles.multiple(strip, tq), tq), pl.ds(tiles.multiple(part, tk), tk), masked, sparse
            )

        if pattern is None:
            group = lambda found, masked: several([at(t % strips, t // strips, masked, sparse) for t, sparse in found])
            tiles.by_groups(groups, strips * parts, group)
        else:
            places = itertools.product(range(strips), range(parts))
            kinds = [(strip, part, pattern[strip][part]) for strip, part in places]
            several([at(strip, part, kind == PARTIAL) for strip, part, kind in kinds if kind != EMPTY])

    # ---- one visit: a block of queries of one head of the group

    def visit(pattern: blocks.Pattern | None, h: Array, step: Array, _: Any) -> None:
        slot, listed = state[_SLOT], list_of(h)
        entry = listed.block(step)
        i, first = entry & blocks.INDEX, entry > blocks.INDEX
        here = (b, kv * group + h, i)
        more, other = step + 1 < listed.seen, h + 1 < group
        after_list = first_list.following
        if group > 1:  # the next head's list, which may be empty if it is not this one
            of_other = list_of(jnp.where(other, h + 1, 0))
            begins = of_other.block(0) if of_other is listed else jnp.where(of_other.seen > 0, of_other.block(0), -1)
            after_list = jnp.where(other, begins, after_list)
        next_entry = jnp.where(more, listed.block(step + 1), after_list)
        next_h, next_i = jnp.where(more, h, jnp.where(other, h + 1, 0)), next_entry & blocks.INDEX
        reading, next_reading = state[_READING], (next_entry >= 0) & (next_entry <= blocks.INDEX)

        @pl.when(state[_FETCHED] == 0)
        def _fetch() -> None:
            fetch(h).start(i, slot)

        sums.settle(after(slot))

        # The next block's sum can be read once it is written: not yet if that is this block or waits in the ring.
        same = (next_h == h) & (next_i == i)
        pl.when(next_reading & (next_h * n.rows_q + next_i == state[_LAST]))(lambda: sums.settle(before(slot)))

        @pl.when(next_entry >= 0)
        def _next() -> None:
            fetch(next_h, jnp.where(more | other, row, row + 1)).start(next_i, after(slot))

        ahead = next_reading & ~same
        pl.when(ahead)(lambda: sums.read((b, kv * group + next_h, next_i), after(slot)).start())
        fetch(h).wait(i, slot)

        @pl.when(first)
        def _zero() -> None:
            dq_ring[slot] = jnp.zeros(dq_ring.shape[1:], jnp.float32)

        @pl.when(~first)
        def _arrive() -> None:
            @pl.when(reading == 0)
            def _read() -> None:
                sums.settle(before(slot))
                sums.read(here, slot).start()

            sums.read(here, slot).wait()

        state[_FETCHED], state[_READING] = (next_entry >= 0).astype(jnp.int32), ahead.astype(jnp.int32)
        state[_LAST], state[_SLOT] = h * n.rows_q + i, after(slot)
        block(pattern, slot, i, listed.groups(step) if pattern is None else None)
        sums.write(here, slot)

    # ---- the row

    @pl.when(row == 0)
    def _start() -> None:
        for i in range(_WRITING + RING):
            state[i] = 0
        state[_LAST] = -1

    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)

    def of_head(h: Array, _: Any) -> None:
        for i, pattern in enumerate(bodies):
            lax.fori_loop(*list_of(h).steps(i), functools.partial(visit, pattern, h), None)

    lax.fori_loop(0, group, of_head, None)
    dk_ref[...] = (dk_acc[...] * n.scale).T.astype(dk_ref.dtype)
    dv_ref[...] = dv_acc[...].T.astype(dv_ref.dtype)

    @pl.when(row == pl.num_programs(1) - 1)
    def _land() -> None:
        for slot in range(RING):
            sums.settle(jnp.int32(slot))


def backward(
    n: Call, out_dtype: Any, walk: Array, q: Array, k: Array, v: Array, do: Array, stats: Array,
    k_numbers: Array | None, q_numbers: Array | None, bias: Array | None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """dq / scale [B H D rows*block_q] in float32, dk [B K S D] and dv [B K S V] in out_dtype.

    Blocks of queries that the walk never visits are left as they were found: the caller knows which.

    Args:
      walk: int32 [B|1 H|1 columns W], of `blocks.lists` with keys as rows and first visits marked; its own numbers are
        the mask's.
      q, k, v, do: [B H T D], [B K S D], [B K S V], [B H T V].
      stats: float32 [B H 2 rows*block_q], lse in n.unit (NO_KEY where there is none, and beyond the queries), delta.
      k_numbers, q_numbers: int32 [B numbers S], [B numbers rows*block_q], where the kernel reads any.
      bias: [B|1 H|1 rows*block_q|1 columns*block_k], where there is one.
    """
    B, (Bw, Hw, columns, W) = q.shape[0], walk.shape
    heads = max(Hw // n.K, 1)  # whose lists a row has
    T = n.rows_q * n.block_q
    shape = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)  # where copies overlap; XLA might put it elsewhere
    by_row = lambda size: pl.BlockSpec((None, None, n.block_k, size), lambda h, j: (h // n.K, h % n.K, j, 0))
    numbers = [] if k_numbers is None else [k_numbers, q_numbers]
    number_specs = [pl.BlockSpec((None, len(n.numbers), n.block_k), lambda h, j: (h // n.K, 0, j)), hbm]
    added, added_specs = ([], []) if bias is None else ([bias], [hbm])
    walk = walk.reshape(Bw, Hw // heads, heads, columns, W).swapaxes(2, 3)
    walk_spec = pl.BlockSpec(
        (None, None, None, heads, W),
        lambda h, j: (h // n.K if Bw > 1 else 0, h % n.K if Hw > 1 else 0, j, 0, 0),
        memory_space=pltpu.SMEM,
    )
    return pl.pallas_call(
        functools.partial(_kernel, n),
        name="longattn_attention_backward",
        grid=(B * n.K, columns),
        in_specs=[walk_spec, by_row(n.D), by_row(n.V), hbm, hbm, hbm, *(number_specs if numbers else []), *added_specs],
        out_specs=[hbm, by_row(n.D), by_row(n.V)],
        out_shape=[
            shape((B, n.H, n.D, T), jnp.float32),
            shape((B, n.K, n.S, n.D), out_dtype),
            shape((B, n.K, n.S, n.V), out_dtype),
        ],
        scratch_shapes=[
            pltpu.VMEM((RING, n.block_q, n.D), q.dtype),
            pltpu.VMEM((RING, n.block_q, n.V), do.dtype),
            pltpu.VMEM((RING, 2, n.block_q), jnp.float32),
            pltpu.VMEM((RING, max(len(n.numbers), 1), n.block_q), jnp.int32),
            pltpu.VMEM(*n.bias_ring(RING, bias)),
            pltpu.VMEM((RING, n.D, n.block_q), jnp.float32),
            pltpu.VMEM((n.D, n.block_k), jnp.float32),
            pltpu.VMEM((n.V, n.block_k), jnp.float32),
            pltpu.SMEM((_WRITING + RING,), jnp.int32),
            pltpu.SemaphoreType.DMA((5, RING)),
            pltpu.SemaphoreType.DMA((2, RING)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=n.vmem_bytes
        ),
        cost_estimate=n.cost(B, 5, q.dtype.itemsize),
    )(walk, k, v, q, do, stats, *numbers, *added)
