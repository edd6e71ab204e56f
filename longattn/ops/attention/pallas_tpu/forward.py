"""The forward kernel: O^T = V^T P^T of tiles S^T = K q^T that stand transposed, keys along sublanes.

    S = q k^T;  P = 2^(c (S - m));  c = scale log2 e
    l += rowsum P;  O += P v
    out = O / l;  lse = m + log2(l) / c

Algorithm 1 of arXiv:2307.08691. Transposed, the statistics of a row lie along lanes, so that no reduction crosses them,
and P is the stationary operand of the second product, whose other side is only V rows high: on matrix units of 256 x
256 it takes half the cycles at V = 128.

m need not be the maximum: P and its sums are floating-point numbers, as exact at 2^80 as at 1. Where |q| |k| bounds
every logit of a row of blocks (found by the caller), m is 0, elsewhere the maximum over a first tile of keys, hidden
ones among them. So there is no maximum to wait for and nothing to rescale, and P of one tile is multiplied by v while S
of the next one is computed, across blocks. A row of blocks that has a sum of P too large or too small in the end is
computed once more, by the online softmax: right for any data.

With such an m the greatest P of a row is no exact 1: in half precision its rounding, 2^-9 at most, is that of the
result. Of a row that sees few keys it is divided out: the tiles that the mask cuts also sum what rounding added to P.

The kernel walks over a row's list (`blocks`) by itself: keys and values of the next block, or of the next row's first,
are on their way while one is computed. Of a block that the mask cuts, each tile is left out, computed whole or masked
by its own kind.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from longattn.mask import EMPTY, PARTIAL
from longattn.ops.attention.pallas_tpu import blocks, tiles
from longattn.ops.attention.pallas_tpu.call import LOG2E, SUBLANES, Call
from longattn.ops.attention.pallas_tpu.fetch import RING, Fetch, after

NEVER = -1e30  # below every logit; finite, so that differences are
SAFE = 100.0  # sums of P beyond 2^-SAFE or 2^SAFE may have lost keys, or be lost soon
_SLOT, _FETCHED, _LATE_SLOT, _LATE, _BAD = range(5)  # of the state
_SENT, _HERE = 1, 2  # where the block of the next step is


def _kernel(n: Call, walk: Any, q_ref: Any, k_hbm: Any, v_hbm: Any, *rest: Any) -> None:
    refs = list(rest)
    q_numbers, k_numbers = (refs.pop(0), refs.pop(0)) if n.numbers else (None, None)
    bias_hbm = refs.pop(0) if n.bias else None
    (
        o_ref,
        lse_ref,
        k_ring,
        v_ring,
        number_ring,
        bias_ring,
        p_ref,
        late_ref,
        acc_ref,
        m_ref,
        l_ref,
        rest_ref,
        state,
        sems,
    ) = refs
    head, row = pl.program_id(0), pl.program_id(1)
    b, kv = head // n.H, head % n.H // (n.H // n.K)
    c, tq, pk, strips = n.unit * LOG2E, n.tile_q, n.tile_k, n.block_q // n.tile_q
    row_of_tiles = n.block_k // pk
    chunks = 2  # of a block: what is known of one alternates between two buffers
    tk = n.block_k // chunks
    precision = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    *of_cut, of_whole = blocks.bodies(n.patterns, strips, row_of_tiles)
    listed = blocks.Row(lambda i: walk[0, i], len(of_cut) + 1, 1 + n.mask_numbers, n.rows_k, strips * row_of_tiles)
    bound, *of_mask = listed.own
    cut, seen, block = (listed.ends[-2] if of_cut else jnp.int32(0)), listed.seen, listed.block

    lanes = [(k_numbers.at[b], number_ring)] if n.numbers else []

    def fetch(row: Array) -> Fetch:
        """Of what this row, or the next one, meets."""
        rows = [(k_hbm.at[b, kv], k_ring), (v_hbm.at[b, kv], v_ring)]
        block_of = functools.partial(tiles.bias_block, n, bias_hbm, b, head % n.H, row)
        return Fetch(k_hbm.shape[2], n.block_k, rows, lanes, sems, [(block_of, bias_ring)] if n.bias else [])

    def arrive(step: Array | int, slot: Array) -> None:
        """Waits for the block of this step, and sends for the one after it."""
        more = step + 1 < seen
        following = jnp.where(more, block(step + 1), listed.following)

        @pl.when(state[_FETCHED] == 0)
        def _fetch() -> None:
            fetch(row).start(block(step), slot)

        @pl.when(following >= 0)
        def _next() -> None:
            fetch(jnp.where(more, row, row + 1)).start(following, after(slot))

        here = state[_FETCHED] == _HERE
        state[_FETCHED] = jnp.where(following >= 0, _SENT, 0)
        pl.when(~here)(lambda: fetch(row).wait(block(step), slot))

    # ---- products

    def logits(slot: Array, first: Array | int, strip: Array | int) -> Array:
        """S^T [tile_k tile_q], in the call's unit."""
        q = q_ref[pl.ds(tiles.multiple(strip, tq), tq), :]
        s = tiles.dot(k_ring[slot, pl.ds(first, pk), :], q, "NT", precision)
        if n.softcap is not None:
            s = jnp.tanh(s * (n.scale / n.softcap))
        return s + tiles.bias(n, bias_ring, slot, strip, first) if n.bias else s

    def weighted(slot: Array, first: int, keys: slice, p: Array) -> Array:
        """V^T P^T [V tile_q] of the keys counted from `first`."""
        return tiles.dot(v_ring[slot, first + keys.start : first + keys.stop, :], p, "TN", precision)

    def groups(x: Array) -> Array:
        """[keys queries] -> [keys/8 8 queries], registers above each other."""
        return x.reshape(x.shape[0] // SUBLANES, SUBLANES, x.shape[1])

    def shown(
        slot: Array, j: Array, first: Array | int, keys: int, strip: Array | int, sparse: Array | None = None
    ) -> Array:
        """Visible pairs, bool [keys tile_q], of keys from `first` on in block j, that a BlockSparse shows or not."""
        return tiles.visible(
            n.mask_of(of_mask, sparse), n.numbers, q_numbers, number_ring.at[slot] if n.numbers else None,
            row * n.block_q + strip * tq, j * n.block_k + first, tiles.multiple(strip, tq), first, tq, keys,
            n.S if n.S % n.block_k else None,
        )  # fmt: skip

    # ---- m is known

    def weights(
        shifted: bool, slot: Array, j: Array, first: Array | int, strip: Array | int, masked: bool,
        sparse: Array | None = None,
    ) -> Array:  # fmt: skip
        """P of a tile, summed and rounded."""
        s = logits(slot, first, strip)
        if shifted:
            s = (groups(s) - m_ref[strip][None]).reshape(pk, tq)
        p = jnp.exp2(c * s)
        if masked:
            p = jnp.where(shown(slot, j, first, pk, strip, sparse), p, 0.0)
        rounded = p.astype(p_ref.dtype)
        total = groups(p).sum(0)
        l_ref[strip] += total
        if masked and p.dtype != rounded.dtype:
            rest_ref[strip] += groups(rounded.astype(p.dtype)).sum(0) - total
        return rounded

    def straight(
        shifted: bool, pattern: blocks.Pattern, slot: Array, j: Array, before: Array | None, flush: bool
    ) -> None:
        """One block: P of each chunk of keys, and P v of the chunk before it.

        Args:
          shifted: whether m is not 0.
          before: the slot of the block whose last chunk's P is still to be multiplied by v, if there is one.
          flush: whether no block follows that would do so for this one.
        """
        parts = tk // pk

        def used(chunk: int, strip: int) -> list[int]:
            """The parts of a chunk from the first to the last that are not hidden."""
            seen = [part for part in range(parts) if pattern[strip][chunk * parts + part] != EMPTY]
            return list(range(seen[0], seen[-1] + 1)) if seen else []

        def probabilities(chunk: int, strip: int) -> None:
            for part in used(chunk, strip):
                kind, where = pattern[strip][chunk * parts + part], slice(part * pk, (part + 1) * pk)
                if kind == EMPTY:
                    p_ref[chunk % 2, strip, where] = jnp.zeros((pk, tq), p_ref.dtype)
                else:
                    first = chunk * tk + part * pk
                    p_ref[chunk % 2, strip, where] = weights(shifted, slot, j, first, strip, kind == PARTIAL)

        def multiply(chunk: int, strip: int) -> None:
            if seen := used(chunk, strip):
                keys = slice(seen[0] * pk, (seen[-1] + 1) * pk)
                acc_ref[strip] += weighted(slot, chunk * tk, keys, p_ref[chunk % 2, strip, keys])

        for chunk in range(chunks):
            for strip in range(strips):
                probabilities(chunk, strip)
                if chunk:
                    multiply(chunk - 1, strip)
                elif before is not None:
                    acc_ref[strip] += weighted(before, (chunks - 1) * tk, slice(0, tk), p_ref[1, strip])
        if flush:
            for strip in range(strips):
                multiply(chunks - 1, strip)

    def tiled(shifted: bool, step: Array, slot: Array) -> Array:
        """One block whose tiles are listed: P of each, and P v of the tile before it, be it one of another block."""
        arrive(step, slot)

        def group(found: list[tuple[Array, Array]], masked: bool) -> None:
            for i, (t, sparse) in enumerate(found):
                p = weights(shifted, slot, block(step), *place(t)[::-1], masked, sparse)
                if i == 0:
                    multiply_late()
                else:
                    multiply_tile(slot, found[i - 1][0], p_ref[(i - 1) % 2, 0, :pk])
                if i + 1 < len(found):
                    p_ref[i % 2, 0, :pk] = p
                else:
                    late_ref[...] = p
            state[_LATE_SLOT], state[_LATE] = slot, found[-1][0]

        tiles.by_groups(listed.groups(step), strips * row_of_tiles, group)
        return after(slot)

    def place(t: Array) -> tuple[Array, Array]:
        """Strip and first key of a tile."""
        return t // row_of_tiles, tiles.multiple(t % row_of_tiles, pk)

    def multiply_tile(slot: Array, t: Array, p: Array) -> None:
        strip, first = place(t)
        acc_ref[strip] += tiles.dot(v_ring[slot, pl.ds(first, pk), :], p, "TN", precision)

    def multiply_late() -> None:
        multiply_tile(state[_LATE_SLOT], state[_LATE], late_ref[...])

    # ---- rows whose sums came out too large or too small: online softmax

    def online(slot: Array, j: Array, found: list[tuple[Any, Any, bool, Any]]) -> None:
        """Some tiles of block j: strip, first key, whether it is cut, what a BlockSparse says."""
        following = logits(slot, found[0][1], found[0][0])
        for i, (strip, first, masked, sparse) in enumerate(found):
            s = following
            if i + 1 < len(found):
                following = logits(slot, found[i + 1][1], found[i + 1][0])
            if masked:
                s = jnp.where(shown(slot, j, first, pk, strip, sparse), s, NEVER)
            old = m_ref[strip]
            new = jnp.maximum(old, groups(s).max(0).max(0, keepdims=True))
            # Where no key was seen yet, 2^(NEVER - new) = 0 throws away later what is summed for none.
            decay, p = jnp.exp2(c * (old - new)), jnp.exp2(c * (groups(s) - new[None]))
            m_ref[strip], l_ref[strip] = new, l_ref[strip] * decay + p.sum(0)
            v, p = v_ring[slot, pl.ds(first, pk), :], p.reshape(pk, tq).astype(v_ring.dtype)
            acc_ref[strip] = acc_ref[strip] * decay[:1] + tiles.dot(v, p, "TN", precision)

    def block_online(pattern: blocks.Pattern | None, step: Array, slot: Array) -> Array:
        arrive(step, slot)
        if pattern is None:
            group = lambda found, masked: online(slot, block(step), [(*place(t), masked, x) for t, x in found])
            tiles.by_groups(listed.groups(step), strips * row_of_tiles, group)
        else:
            places = itertools.product(range(row_of_tiles), range(strips))  # what depends on each other stands apart
            kinds = [(strip, part * pk, pattern[strip][part]) for part, strip in places]
            found = [(strip, first, kind == PARTIAL, None) for strip, first, kind in kinds if kind != EMPTY]
            online(slot, block(step), found)
        return after(slot)

    # ---- the row

    @pl.when(row == 0)
    def _start() -> None:
        state[_SLOT] = 0
        state[_FETCHED] = 0

    def begin(m: float) -> None:
        acc_ref[...], m_ref[...] = jnp.zeros_like(acc_ref), jnp.full_like(m_ref, m)
        l_ref[...], rest_ref[...] = jnp.zeros_like(l_ref), jnp.zeros_like(rest_ref)

    def alone(shifted: bool, pattern: blocks.Pattern, step: Array, slot: Array) -> Array:
        arrive(step, slot)
        straight(shifted, pattern, slot, block(step), None, True)
        return after(slot)

    def following(step: Array, slots: tuple[Array, Array]) -> tuple[Array, Array]:
        slot, before = slots
        arrive(step, slot)
        straight(False, of_whole, slot, block(step), before, False)
        return after(slot), slot

    def cut_blocks(shifted: bool) -> Array:
        """The blocks of a row that are cut; returns the slot after them."""
        if n.patterns is None:
            (_, group), _ = listed.groups(0)
            state[_LATE_SLOT], state[_LATE] = start, group(0)[0][0]  # the first tile, of which P is 0, comes first
            late_ref[...] = jnp.zeros_like(late_ref)
            slot = lax.fori_loop(0, cut, functools.partial(tiled, shifted), start)
            pl.when(cut > 0)(multiply_late)
            return slot
        slot = start
        for i, pattern in enumerate(n.patterns):
            slot = lax.fori_loop(*listed.steps(i), functools.partial(alone, shifted, pattern), slot)
        return slot

    begin(0.0)
    start, state[_BAD] = state[_SLOT], 0

    @pl.when(bound == 1)
    def of_bounded() -> None:
        slot = cut_blocks(False)

        @pl.when(cut < seen)
        def _whole() -> None:
            arrive(cut, slot)
            straight(False, of_whole, slot, block(cut), None, False)
            state[_SLOT], before = lax.fori_loop(cut + 1, seen, following, (after(slot), slot))
            for strip in range(strips):
                acc_ref[strip] += weighted(before, (chunks - 1) * tk, slice(0, tk), p_ref[1, strip])

        @pl.when(cut == seen)
        def _none() -> None:
            state[_SLOT] = slot

    @pl.when((bound == 0) & (seen > 0))
    def of_unbounded() -> None:
        pl.when(state[_FETCHED] == 0)(lambda: fetch(row).start(block(0), start))
        fetch(row).wait(block(0), start)
        state[_FETCHED] = _HERE
        for strip in range(strips):
            m = groups(logits(start, 0, strip)).max(0).max(0, keepdims=True)
            m_ref[strip] = jnp.broadcast_to(m, m_ref.shape[1:])
        slot = cut_blocks(True)
        slot = lax.fori_loop(cut, seen, functools.partial(alone, True, of_whole), slot)
        state[_SLOT] = slot
        index = row * n.block_q + lax.broadcasted_iota(jnp.int32, (1, tq), 1)
        good = jnp.ones((1, tq), jnp.bool_)
        for strip in range(strips):
            total = l_ref[strip].sum(0, keepdims=True)
            good &= (index + strip * tq >= n.T) | ((total > 2.0**-SAFE) & (total < 2.0**SAFE))
        state[_BAD] = 1 - jnp.min(good.astype(jnp.int32))

    @pl.when(state[_BAD] == 1)
    def of_others() -> None:
        begin(NEVER)
        slot = state[_SLOT]
        pl.when(state[_FETCHED] == _SENT)(lambda: fetch(row).wait(listed.following, slot))  # it is sent for once more
        state[_FETCHED] = 0
        for i, pattern in enumerate([*of_cut, of_whole]):
            slot = lax.fori_loop(*listed.steps(i), functools.partial(block_online, pattern), slot)
        state[_SLOT] = slot

    for strip in range(strips):
        total, rest = (ref[strip].sum(0, keepdims=True) for ref in (l_ref, rest_ref))
        m = m_ref[strip, :1]
        empty = (total == 0.0) | (m == NEVER)
        total = jnp.where(empty, 1.0, total)
        columns = slice(strip * tq, (strip + 1) * tq)
        o_ref[columns] = jnp.where(empty, 0.0, acc_ref[strip] * (1.0 / (total + rest))).T.astype(o_ref.dtype)
        lse_ref[:, columns] = jnp.where(empty, -jnp.inf, m + jnp.log2(total) * (1 / c))


def forward(
    n: Call, out_dtype: Any, walk: Array, q: Array, k: Array, v: Array, q_numbers: Array | None,
    k_numbers: Array | None, bias: Array | None,
) -> tuple[Array, Array]:  # fmt: skip
    """out [B H T V] in out_dtype and lse float32 [B H T], in n.unit.

    Args:
      walk: int32 [B|1 H|1 rows W], of `blocks.lists`; its own numbers are whether the row's logits are bounded, and
        the mask's numbers.
      q, k, v: [B H T D], [B K S D], [B K S V].
      q_numbers, k_numbers: int32 [B numbers T], [B numbers columns*block_k], where the kernel reads any.
      bias: [B|1 H|1 rows*block_q|1 columns*block_k], where there is one.
    """
    B, (Bw, Hw, rows, W) = q.shape[0], walk.shape
    strips, chunk = n.block_q // n.tile_q, n.block_k // 2
    shape = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)  # where copies overlap; XLA might put it elsewhere

    def by_row(*block: int | None, last: bool = False) -> pl.BlockSpec:
        """Of an array [B H ... ] the part of this head and row; the row is the last axis or the one before it."""
        return pl.BlockSpec((None, None, *block), lambda h, i: (h // n.H, h % n.H, *((0, i) if last else (i, 0))))

    numbers = [] if q_numbers is None else [q_numbers, k_numbers]
    number_specs = [pl.BlockSpec((None, len(n.numbers), n.block_q), lambda h, i: (h // n.H, 0, i)), hbm]
    added, added_specs = ([], []) if bias is None else ([bias], [hbm])
    walk_spec = pl.BlockSpec(
        (None, None, 1, W),
        lambda h, i: (h // n.H if Bw > 1 else 0, (h % n.H if Hw > 1 else 0) * rows + i, 0, 0),
        memory_space=pltpu.SMEM,
    )
    statistics = pltpu.VMEM((strips, SUBLANES, n.tile_q), jnp.float32)
    out, lse = pl.pallas_call(
        functools.partial(_kernel, n),
        name="longattn_attention_forward",
        grid=(B * n.H, rows),
        in_specs=[walk_spec, by_row(n.block_q, n.D), hbm, hbm, *(number_specs if numbers else []), *added_specs],
        out_specs=[by_row(n.block_q, n.V), by_row(1, n.block_q, last=True)],
        out_shape=[shape((B, n.H, n.T, n.V), out_dtype), shape((B, n.H, 1, n.T), jnp.float32)],
        scratch_shapes=[
            pltpu.VMEM((RING, n.block_k, n.D), k.dtype),
            pltpu.VMEM((RING, n.block_k, n.V), v.dtype),
            pltpu.VMEM((RING, max(len(n.numbers), 1), n.block_k), jnp.int32),
            pltpu.VMEM(*n.bias_ring(RING, bias)),
            pltpu.VMEM((2, strips, chunk, n.tile_q), v.dtype),
            pltpu.VMEM((n.tile_k, n.tile_q), v.dtype),
            pltpu.VMEM((strips, n.V, n.tile_q), jnp.float32),
            statistics,
            statistics,
            statistics,
            pltpu.SMEM((5,), jnp.int32),
            pltpu.SemaphoreType.DMA((4, RING)),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=n.vmem_bytes
        ),
        cost_estimate=n.cost(B, 2, q.dtype.itemsize),
    )(walk.reshape(Bw, Hw * rows, 1, W), q, k, v, *numbers, *added)
    return out, lse[:, :, 0]
