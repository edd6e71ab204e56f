"""The forward kernel: O^T = V^T P^T of transposed tiles S^T = K q^T, keys along sublanes.

    S = q k^T;  P = 2^(c (S - m));  c = scale log2 e
    l += rowsum P;  O += P v
    out = O / l;  lse = m + log2(l) / c

Algorithm 1 of arXiv:2307.08691. In transposed tiles the statistics of a row lie along lanes, so no reduction crosses
lanes. P is then the stationary operand of the second product, whose other side is only V rows high: on matrix units of
256 x 256 that takes half the cycles at V = 128.

m need not be the maximum: P and its sums are floating-point numbers, as exact at 2^80 as at 1. A row of blocks is
computed by one of three bodies:

    bounded    |q| |k| bounds every logit (the caller finds out): m is 0.
    unbounded  m is the maximum over the first tile of keys, hidden ones included.
    online     the online softmax, right for any data. It runs where an unbounded row's sum of P came out too large or
               too small, and computes that row again.

In the first two nothing waits for a maximum and nothing is rescaled: P of one tile is multiplied by v while S of the
next one is computed, across blocks. The largest P of a row is then not exactly 1, and in half precision rounding P
changes the result by up to 2^-9. For rows that see few keys this error is divided out: tiles that the mask cuts also
sum what rounding added to P.

The kernel iterates over a row's list (`blocks`) itself. It fetches the next block's keys and values, or those of the
next row's first block, while it computes one. In a block that the mask cuts, each tile is skipped, computed whole or
masked, by its own kind.
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
from jax.typing import DTypeLike
from jaxtyping import Array

from longattn.mask import EMPTY, PARTIAL
from longattn.ops.attention.pallas_tpu import blocks, tiles
from longattn.ops.attention.pallas_tpu.call import LOG2E, SUBLANES, Call
from longattn.ops.attention.pallas_tpu.fetch import RING, after
from longattn.ops.attention.pallas_tpu.row import (
    BAD,
    CHUNKS,
    FETCHED,
    HERE,
    LATE,
    LATE_SLOT,
    SENT,
    SLOT,
    Refs,
    Row,
)

NEVER = -1e30  # below every logit; finite, so that differences are
SAFE = 100.0  # a sum of P beyond 2^-SAFE or 2^SAFE may have lost keys


def _groups(x: Array) -> Array:
    """[keys queries] -> [keys/8 8 queries]: registers stacked, so that reductions over the first axis are additions."""
    return x.reshape(x.shape[0] // SUBLANES, SUBLANES, x.shape[1])


# ---- m is known: bounded and unbounded rows


def _probabilities(
    x: Row, shifted: bool, slot: Array, j: Array, first: Array | int, strip: Array | int, masked: bool,
    sparse: Array | None = None,
) -> Array:  # fmt: skip
    """Returns P of a tile, rounded, and adds it to the sums; `shifted` says that m is not 0."""
    refs, s = x.refs, x.logits(slot, first, strip)
    if shifted:
        s = (_groups(s) - refs.m[strip][None]).reshape(s.shape)
    p = jnp.exp2(x.c * s)
    if masked:
        p = jnp.where(x.visible(slot, j, first, strip, sparse), p, 0.0)
    rounded = p.astype(refs.p.dtype)
    total = _groups(p).sum(0)
    refs.l[strip] += total
    if masked and p.dtype != rounded.dtype:
        refs.rest[strip] += _groups(rounded.astype(p.dtype)).sum(0) - total
    return rounded


def _block(
    x: Row, shifted: bool, pattern: blocks.Pattern, slot: Array, j: Array, before: Array | None, flush: bool
) -> None:
    """Computes a block whose pattern is known: P of each chunk of keys, and P v of the chunk before it.

    Args:
      before: the slot of the block before, whose last chunk is still to be multiplied by v; None if there is none.
      flush: whether to multiply this block's last chunk too, because no block follows that would.
    """
    refs, size = x.refs, x.n.tile_k
    parts = x.chunk // size

    def used(chunk: int, strip: int) -> list[int]:
        """Returns the parts of a chunk from the first to the last that are not hidden."""
        seen = [part for part in range(parts) if pattern[strip][chunk * parts + part] != EMPTY]
        return list(range(seen[0], seen[-1] + 1)) if seen else []

    def probabilities(chunk: int, strip: int) -> None:
        for part in used(chunk, strip):
            kind, keys = pattern[strip][chunk * parts + part], slice(part * size, (part + 1) * size)
            if kind == EMPTY:
                refs.p[chunk % 2, strip, keys] = jnp.zeros((size, x.n.tile_q), refs.p.dtype)
            else:
                first = chunk * x.chunk + part * size
                refs.p[chunk % 2, strip, keys] = _probabilities(x, shifted, slot, j, first, strip, kind == PARTIAL)

    def multiply(chunk: int, strip: int) -> None:
        if seen := used(chunk, strip):
            keys = slice(seen[0] * size, (seen[-1] + 1) * size)
            x.add_values(slot, chunk * x.chunk + keys.start, strip, refs.p[chunk % 2, strip, keys])

    for chunk in range(CHUNKS):
        for strip in range(x.n.strips):
            probabilities(chunk, strip)
            if chunk:
                multiply(chunk - 1, strip)
            elif before is not None:
                _multiply_last_chunk(x, before, strip)
    if flush:
        for strip in range(x.n.strips):
            multiply(CHUNKS - 1, strip)


def _multiply_last_chunk(x: Row, slot: Array, strip: int) -> None:
    x.add_values(slot, (CHUNKS - 1) * x.chunk, strip, x.refs.p[1, strip])


def _block_alone(x: Row, shifted: bool, pattern: blocks.Pattern, step: Array, slot: Array) -> Array:
    """Computes a block, and returns the slot after it."""
    x.arrive(step, slot)
    _block(x, shifted, pattern, slot, x.listed.block(step), None, True)
    return after(slot)


def _block_of_tiles(x: Row, shifted: bool, step: Array, slot: Array) -> Array:
    """Computes a block whose tiles are listed: P of each, and P v of the tile before it, even of another block."""
    refs, size = x.refs, x.n.tile_k
    x.arrive(step, slot)

    def group(found: list[tuple[Array, Array]], masked: bool) -> None:
        for i, (tile, sparse) in enumerate(found):
            j, (strip, first) = x.listed.block(step), x.place(tile)
            p = _probabilities(x, shifted, slot, j, first, strip, masked, sparse)
            if i == 0:
                _multiply_late(x)
            else:
                strip, first = x.place(found[i - 1][0])
                x.add_values(slot, first, strip, refs.p[(i - 1) % 2, 0, :size])
            if i + 1 < len(found):
                refs.p[i % 2, 0, :size] = p
            else:
                refs.late[...] = p
        refs.state[LATE_SLOT], refs.state[LATE] = slot, found[-1][0]

    tiles.by_groups(x.listed.groups(step), x.n.strips * x.n.parts, group)
    return after(slot)


def _multiply_late(x: Row) -> None:
    strip, first = x.place(x.refs.state[LATE])
    x.add_values(x.refs.state[LATE_SLOT], first, strip, x.refs.late[...])


def _cut_blocks(x: Row, shifted: bool, start: Array) -> Array:
    """Computes the blocks of a row that the mask cuts, and returns the slot after them."""
    if x.n.patterns is None:
        (_, group), _ = x.listed.groups(0)
        # The first product is of P = 0, with the first tile's values.
        x.refs.state[LATE_SLOT], x.refs.state[LATE] = start, group(0)[0][0]
        x.refs.late[...] = jnp.zeros_like(x.refs.late)
        slot = lax.fori_loop(0, x.cut, functools.partial(_block_of_tiles, x, shifted), start)
        pl.when(x.cut > 0)(lambda: _multiply_late(x))
        return slot
    slot = start
    for i, pattern in enumerate(x.n.patterns):
        slot = lax.fori_loop(*x.listed.steps(i), functools.partial(_block_alone, x, shifted, pattern), slot)
    return slot


def _bounded(x: Row, whole: blocks.Pattern, start: Array) -> None:
    """Computes a row with m = 0; whole blocks leave the product of their last chunk to the next one."""
    slot, state = _cut_blocks(x, False, start), x.refs.state

    def following(step: Array, slots: tuple[Array, Array]) -> tuple[Array, Array]:
        slot, before = slots
        x.arrive(step, slot)
        _block(x, False, whole, slot, x.listed.block(step), before, False)
        return after(slot), slot

    @pl.when(x.cut < x.listed.seen)
    def _whole() -> None:
        x.arrive(x.cut, slot)
        _block(x, False, whole, slot, x.listed.block(x.cut), None, False)
        state[SLOT], before = lax.fori_loop(x.cut + 1, x.listed.seen, following, (after(slot), slot))
        for strip in range(x.n.strips):
            _multiply_last_chunk(x, before, strip)

    @pl.when(x.cut == x.listed.seen)
    def _none() -> None:
        state[SLOT] = slot


def _unbounded(x: Row, whole: blocks.Pattern, start: Array) -> None:
    """Computes a row with m from its first tile of keys, and finds out whether the sums of P are safe."""
    n, refs, state = x.n, x.refs, x.refs.state
    pl.when(state[FETCHED] == 0)(lambda: x.fetch(x.row).start(x.listed.block(0), start))
    x.fetch(x.row).wait(x.listed.block(0), start)
    state[FETCHED] = HERE
    for strip in range(x.n.strips):
        m = _groups(x.logits(start, 0, strip)).max(0).max(0, keepdims=True)
        refs.m[strip] = jnp.broadcast_to(m, refs.m.shape[1:])
    slot = _cut_blocks(x, True, start)
    slot = lax.fori_loop(x.cut, x.listed.seen, functools.partial(_block_alone, x, True, whole), slot)
    state[SLOT] = slot
    index = x.row * n.block_q + lax.broadcasted_iota(jnp.int32, (1, n.tile_q), 1)
    good = jnp.ones((1, n.tile_q), jnp.bool_)
    for strip in range(x.n.strips):
        total = refs.l[strip].sum(0, keepdims=True)
        good &= (index + strip * n.tile_q >= n.T) | ((total > 2.0**-SAFE) & (total < 2.0**SAFE))
    state[BAD] = 1 - jnp.min(good.astype(jnp.int32))


# ---- m is the maximum so far: rows whose sums of P came out too large or too small


def _online_tiles(x: Row, slot: Array, j: Array, found: list[tuple[Any, Any, bool, Any]]) -> None:
    """Computes tiles of block j: (strip, first key, whether it is cut, whether a BlockSparse shows it)."""
    refs = x.refs
    following = x.logits(slot, found[0][1], found[0][0])
    for i, (strip, first, masked, sparse) in enumerate(found):
        s = following
        if i + 1 < len(found):
            following = x.logits(slot, found[i + 1][1], found[i + 1][0])
        if masked:
            s = jnp.where(x.visible(slot, j, first, strip, sparse), s, NEVER)
        old = refs.m[strip]
        new = jnp.maximum(old, _groups(s).max(0).max(0, keepdims=True))
        # Until a key is seen, new is NEVER and P of hidden keys is 1. The decay 2^(c (NEVER - new)) = 0 then drops it.
        decay, p = jnp.exp2(x.c * (old - new)), jnp.exp2(x.c * (_groups(s) - new[None]))
        refs.m[strip], refs.l[strip] = new, refs.l[strip] * decay + p.sum(0)
        v, p = refs.v_ring[slot, pl.ds(first, x.n.tile_k), :], p.reshape(s.shape).astype(refs.v_ring.dtype)
        refs.acc[strip] = refs.acc[strip] * decay[:1] + tiles.dot(v, p, "TN", x.precision)


def _online_block(x: Row, pattern: blocks.Pattern | None, step: Array, slot: Array) -> Array:
    """Computes a block, and returns the slot after it."""
    x.arrive(step, slot)
    j = x.listed.block
    if pattern is None:
        group = lambda found, masked: _online_tiles(x, slot, j(step), [(*x.place(t), masked, s) for t, s in found])
        tiles.by_groups(x.listed.groups(step), x.n.strips * x.n.parts, group)
    else:
        places = itertools.product(range(x.n.parts), range(x.n.strips))  # neighbours do not depend on each other
        kinds = [(strip, part * x.n.tile_k, pattern[strip][part]) for part, strip in places]
        found = [(strip, first, kind == PARTIAL, None) for strip, first, kind in kinds if kind != EMPTY]
        _online_tiles(x, slot, j(step), found)
    return after(slot)


def _online(x: Row, bodies: list[blocks.Pattern | None]) -> None:
    """Computes the row again from its first block."""
    state = x.refs.state
    _begin(x.refs, NEVER)
    slot = state[SLOT]
    # The next row's first block is on its way into this slot. It is fetched again later.
    pl.when(state[FETCHED] == SENT)(lambda: x.fetch(x.row).wait(x.listed.following, slot))
    state[FETCHED] = 0
    for i, pattern in enumerate(bodies):
        slot = lax.fori_loop(*x.listed.steps(i), functools.partial(_online_block, x, pattern), slot)
    state[SLOT] = slot


# ---- the row


def _begin(refs: Refs, m: float) -> None:
    refs.acc[...], refs.m[...] = jnp.zeros_like(refs.acc), jnp.full_like(refs.m, m)
    refs.l[...], refs.rest[...] = jnp.zeros_like(refs.l), jnp.zeros_like(refs.rest)


def _finish(x: Row) -> None:
    """Writes out and lse."""
    refs, size = x.refs, x.n.tile_q
    for strip in range(x.n.strips):
        total, rest = (ref[strip].sum(0, keepdims=True) for ref in (refs.l, refs.rest))
        m = refs.m[strip, :1]
        # A maximum may ignore NaN, which the sum does not.
        empty = (total == 0.0) | ((m == NEVER) & (total == total))
        total = jnp.where(empty, 1.0, total)
        columns = slice(strip * size, (strip + 1) * size)
        refs.out[columns] = jnp.where(empty, 0.0, refs.acc[strip] * (1.0 / (total + rest))).T.astype(refs.out.dtype)
        refs.lse[:, columns] = jnp.where(empty, -jnp.inf, m + jnp.log2(total) * (1 / x.c))


def _kernel(n: Call, refs: Refs) -> None:
    head, row = pl.program_id(0), pl.program_id(1)
    strips, parts, state = n.strips, n.parts, refs.state
    bodies, whole = blocks.bodies(n.patterns, strips, parts), blocks.whole(strips, parts)
    b, h = head // n.H, head % n.H
    kv = h // (n.H // n.K)
    listed = blocks.Row(lambda i: refs.walk[0, i], len(bodies), 1 + n.mask_numbers, n.rows_k, strips * parts)
    precision = lax.Precision.HIGHEST if refs.q.dtype == jnp.float32 else None
    x = Row(n, refs, b, h, kv, row, listed, n.unit * LOG2E, precision)

    @pl.when(row == 0)
    def _start() -> None:
        state[SLOT] = 0
        state[FETCHED] = 0

    _begin(refs, 0.0)
    start, state[BAD] = state[SLOT], 0

    @pl.when(x.bounded == 1)
    def of_bounded() -> None:
        _bounded(x, whole, start)

    @pl.when((x.bounded == 0) & (listed.seen > 0))
    def of_unbounded() -> None:
        _unbounded(x, whole, start)

    @pl.when(state[BAD] == 1)
    def of_others() -> None:
        _online(x, bodies)

    _finish(x)


def _scratch(n: Call, dtype: DTypeLike, bias: Array | None) -> dict[str, Any]:
    """Returns the kernel's own memory, for operands of this dtype."""
    statistics = pltpu.VMEM((n.strips, SUBLANES, n.tile_q), jnp.float32)
    return {
        "k_ring": pltpu.VMEM((RING, n.block_k, n.D), dtype),
        "v_ring": pltpu.VMEM((RING, n.block_k, n.V), dtype),
        "number_ring": pltpu.VMEM((RING, max(len(n.numbers), 1), n.block_k), jnp.int32),
        "bias_ring": pltpu.VMEM(*n.bias_ring(RING, bias)),
        "p": pltpu.VMEM((CHUNKS, n.strips, n.block_k // CHUNKS, n.tile_q), dtype),
        "late": pltpu.VMEM((n.tile_k, n.tile_q), dtype),
        "acc": pltpu.VMEM((n.strips, n.V, n.tile_q), jnp.float32),
        "m": statistics,
        "l": statistics,
        "rest": statistics,
        "state": pltpu.SMEM((5,), jnp.int32),
        "semaphores": pltpu.SemaphoreType.DMA((4, RING)),
    }


def forward(
    n: Call, out_dtype: DTypeLike, walk: Array, q: Array, k: Array, v: Array, q_numbers: Array | None,
    k_numbers: Array | None, bias: Array | None,
) -> tuple[Array, Array]:  # fmt: skip
    """Returns out [B H T V] and lse float32 [B H T] in n.unit.

    Args:
      walk: int32 [B|1 H|1 rows W], from `blocks.lists`; its own numbers are whether the row's logits are bounded, and
        the mask's numbers.
      q, k, v: [B H T D], [B K S D], [B K S V].
      q_numbers, k_numbers: int32 [B numbers T], [B numbers columns*block_k], if the kernel reads any.
      bias: [B|1 H|1 rows*block_q|1 columns*block_k], or None.
    """
    B, (Bw, Hw, rows, W) = q.shape[0], walk.shape
    shape = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)  # explicit: XLA might place it elsewhere, and copies could not overlap

    def by_row(*block: int | None, last: bool = False) -> pl.BlockSpec:
        """BlockSpec for this head and row of an array [B H ...]; the row is the last axis or the one before it."""
        return pl.BlockSpec((None, None, *block), lambda h, i: (h // n.H, h % n.H, *((0, i) if last else (i, 0))))

    walk_spec = pl.BlockSpec(
        (None, None, 1, W),
        lambda h, i: (h // n.H if Bw > 1 else 0, (h % n.H if Hw > 1 else 0) * rows + i, 0, 0),
        memory_space=pltpu.SMEM,
    )
    inputs = {
        "walk": (walk_spec, walk.reshape(Bw, Hw * rows, 1, W)),
        "q": (by_row(n.block_q, n.D), q),
        "k": (hbm, k),
        "v": (hbm, v),
    }
    if n.numbers:
        number_spec = pl.BlockSpec((None, len(n.numbers), n.block_q), lambda h, i: (h // n.H, 0, i))
        inputs |= {"q_numbers": (number_spec, q_numbers), "k_numbers": (hbm, k_numbers)}
    if n.bias:
        inputs["bias"] = hbm, bias
    outputs = {
        "out": (by_row(n.block_q, n.V), shape((B, n.H, n.T, n.V), out_dtype)),
        "lse": (by_row(1, n.block_q, last=True), shape((B, n.H, 1, n.T), jnp.float32)),
    }
    scratch = _scratch(n, q.dtype, bias)
    names = (*inputs, *outputs, *scratch)
    out, lse = pl.pallas_call(
        lambda *refs: _kernel(n, Refs(**dict(zip(names, refs, strict=True)))),
        name="longattn_attention_forward",
        grid=(B * n.H, rows),
        in_specs=[spec for spec, _ in inputs.values()],
        out_specs=[spec for spec, _ in outputs.values()],
        out_shape=[x for _, x in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=n.vmem_bytes
        ),
        cost_estimate=n.cost(B, 2, q.dtype.itemsize),
    )(*(x for _, x in inputs.values()))
    return out, lse[:, :, 0]
