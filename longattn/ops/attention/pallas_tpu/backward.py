"""The backward kernel: dq, dk and dv in one pass over the visible blocks, in transposed tiles S^T.

    S = q k^T;  P = 2^(c (S - lse));  dP = do v^T;  dS = P (dP - delta);  delta = rowsum(do out) - dlse
    dv = P^T do;  dk = scale dS^T q;  dq = scale dS k

Algorithm 2 of arXiv:2307.08691 in its loop order (keys outside). A tile gives dv^T = do^T P, dk^T = q^T dS and
dq^T = k^T dS^T. The tile is the stationary operand of each: on matrix units of 256 x 256 a product then takes half the
cycles at D = V = 128. The program computes a tile's products between the outputs of the tile before and its own
softmax; the compiler needs that order to keep the units busy.

dk and dv of a row stay in fast memory. dq is summed in device memory, float32 [D T]: each visit of a block reads its
sum and writes it back. Visits have a fixed order, so the sum is bitwise reproducible. The copies overlap computation.
`_Sums` makes them wait where a block of queries is visited again before its last write has landed.
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
from jax.typing import DTypeLike
from jaxtyping import Array

from longattn.mask import EMPTY, PARTIAL
from longattn.ops.attention.pallas_tpu import blocks, tiles
from longattn.ops.attention.pallas_tpu.call import LOG2E, Call
from longattn.ops.attention.pallas_tpu.fetch import RING, Fetch, after, before

NO_KEY = 1e30  # stands for the lse of a query that sees no key: P is 0
_SLOT, _FETCHED, _READING, _LAST, _WRITING = range(5)  # words of `_Refs.state`; from _WRITING on one flag per buffer


Ref = Any  # a Pallas reference to memory: jax has no public type


@dataclass(frozen=True)
class _Sums:
    """The copies of blocks of dq: at most one into, and one out of, each buffer of the ring."""

    hbm: Ref  # [B H D T] float32
    ring: Ref  # [RING D block]
    state: Ref
    semaphores: Ref  # DMA [2 RING]: reads, writes

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
        """Waits until the write from this buffer has landed."""

        @pl.when(self.state[_WRITING + slot] == 1)
        def _wait() -> None:
            zero = jnp.int32(0)  # a wait reads only the size of a copy, and all blocks have one size
            pltpu.make_async_copy(self.ring.at[slot], self._at((zero, zero, zero)), self.semaphores.at[1, slot]).wait()
            self.state[_WRITING + slot] = 0


@dataclass(frozen=True)
class _Refs:
    """The kernel's references, by name."""

    walk: Ref  # SMEM [1|group W]: this row's list, one for all heads of the group or one for each
    k: Ref  # [block_k D]
    v: Ref  # [block_k V]
    q: Ref  # in device memory [B H T D]
    do: Ref
    stats: Ref  # lse and delta
    dq: Ref  # in device memory [B H D T] float32: sums
    dk: Ref  # [block_k D]
    dv: Ref
    q_ring: Ref  # [RING block_q D]: blocks of queries
    do_ring: Ref
    stats_ring: Ref
    number_ring: Ref  # their positions and segments
    bias_ring: Ref
    dq_ring: Ref
    dk_acc: Ref  # [D block_k]
    dv_acc: Ref
    state: Ref  # SMEM int32: what outlives a visit
    semaphores: Ref
    dq_semaphores: Ref
    k_numbers: Ref = None  # positions and segments of the keys
    q_numbers: Ref = None
    bias: Ref = None


class _Tile(NamedTuple):
    """The place of a tile in its block."""

    strip: Array | int
    queries: Any  # pl.Slice
    keys: Any
    masked: bool
    sparse: Array | None  # whether a BlockSparse shows it


@dataclass(frozen=True)
class _Row:
    """One row of blocks of keys of one key/value head: its place, its lists and its copies."""

    n: Call
    refs: _Refs
    b: Array
    kv: Array
    row: Array
    bodies: list[blocks.Pattern | None]
    first_list: blocks.Row  # of the group's first head
    sums: _Sums

    @property
    def group(self) -> int:
        """Query heads that read this key/value head."""
        return self.n.H // self.n.K

    @property
    def precision(self) -> lax.Precision | None:
        return lax.Precision.HIGHEST if self.refs.k.dtype == jnp.float32 else None

    def head(self, h: Array) -> Array:
        """Returns the query head that is head h of the group."""
        return self.kv * self.group + h

    def list_of(self, h: Array | int) -> blocks.Row:
        """Returns the list of head h of the group."""
        walk = self.refs.walk
        return self.first_list if walk.shape[0] == 1 else _list(self.n, walk, h, self.bodies)

    def fetch(self, h: Array, row: Array) -> Fetch:
        """Returns the copies of one block of queries of head h, for this row of keys or the next one."""
        n, refs, b, head = self.n, self.refs, self.b, self.head(h)
        rows = [(refs.q.at[b, head], refs.q_ring), (refs.do.at[b, head], refs.do_ring)]
        lanes = [(refs.stats.at[b, head], refs.stats_ring)]
        lanes += [(refs.q_numbers.at[b], refs.number_ring)] if n.numbers else []
        bias_of = lambda i: tiles.bias_block(n, refs.bias, b, head, i, row)
        others = [(bias_of, refs.bias_ring)] if n.bias else []
        return Fetch(refs.q.shape[2], n.block_q, rows, lanes, refs.semaphores, others)


def _list(n: Call, walk: Ref, h: Array | int, bodies: list[blocks.Pattern | None]) -> blocks.Row:
    tiles_of_block = n.strips * n.parts
    return blocks.Row(lambda i: walk[h, i], len(bodies), n.mask_numbers, n.rows_q, tiles_of_block)


# ---- one block of queries


@dataclass(frozen=True)
class _Block:
    """A block of queries that has arrived, and what is computed of its tiles."""

    x: _Row
    slot: Array
    i: Array  # index of the block
    q: Ref
    do: Ref
    stats: Ref
    dq: Ref

    def products(self, tile: _Tile) -> tuple[Array, Array]:
        """Returns S^T and dP^T [tile_k tile_q]."""
        refs, precision = self.x.refs, self.x.precision
        return (
            tiles.dot(refs.k[tile.keys], self.q[tile.queries], "NT", precision),
            tiles.dot(refs.v[tile.keys], self.do[tile.queries], "NT", precision),
        )

    def softmax(self, tile: _Tile, s: Array, dp: Array) -> tuple[Array, Array]:
        """Returns P and dS, rounded to the operands' dtype."""
        n, refs = self.x.n, self.x.refs
        slope = None
        if n.softcap is not None:
            s = jnp.tanh(s * (n.scale / n.softcap))
            slope = 1 - s * s
        if n.bias:
            s = s + tiles.bias(n, refs.bias_ring, self.slot, tile.strip, tile.keys.start)
        p = jnp.exp2(n.unit * LOG2E * (s - self.stats[:1, tile.queries]))
        ds = p * (dp - self.stats[1:2, tile.queries])
        if slope is not None:
            ds = ds * slope
        if tile.masked:
            visible = self.visible(tile)
            p, ds = jnp.where(visible, p, 0.0), jnp.where(visible, ds, 0.0)
        return p.astype(self.q.dtype), ds.astype(self.q.dtype)

    def visible(self, tile: _Tile) -> Array:
        """Returns the visible pairs of a tile."""
        x, n, queries, keys = self.x, self.x.n, tile.queries, tile.keys
        return tiles.visible(
            n.mask_of(x.first_list.own, tile.sparse), n.numbers,
            x.refs.number_ring.at[self.slot] if n.numbers else None, x.refs.k_numbers,
            self.i * n.block_q + queries.start, x.row * n.block_k + keys.start, queries.start, keys.start,
            n.tile_q, n.tile_k, n.S if n.S % n.block_k else None,
        )  # fmt: skip

    def outputs(self, tile: _Tile, p: Array, ds: Array) -> None:
        """Adds a tile's share to dv, dk and dq."""
        x, n, refs = self.x, self.x.n, self.x.refs
        k = refs.k[tile.keys]
        if n.S % n.block_k and tile.masked:  # there may be NaN beyond the keys
            index = x.row * n.block_k + tile.keys.start + lax.broadcasted_iota(jnp.int32, k.shape, 0)
            k = jnp.where(index < n.S, k, jnp.zeros_like(k))
        refs.dv_acc[:, tile.keys] += tiles.dot(self.do[tile.queries], p, "TT", x.precision)
        refs.dk_acc[:, tile.keys] += tiles.dot(self.q[tile.queries], ds, "TT", x.precision)
        self.dq[:, tile.queries] += tiles.dot(k, ds, "TN", x.precision)

    def several(self, used: list[_Tile]) -> None:
        """Computes tiles, with one tile's products between the outputs of the tile before and its own softmax."""
        ahead, last = self.products(used[0]), None
        for t, tile in enumerate(used):
            now = ahead
            if t + 1 < len(used):
                ahead = self.products(used[t + 1])
            if last is not None:
                self.outputs(used[t - 1], *last)
            last = self.softmax(tile, *now)
        self.outputs(used[-1], *last)

    def tile(self, strip: Array | int, part: Array | int, masked: bool, sparse: Array | None = None) -> _Tile:
        tq, tk = self.x.n.tile_q, self.x.n.tile_k
        return _Tile(strip, pl.ds(tiles.multiple(strip, tq), tq), pl.ds(tiles.multiple(part, tk), tk), masked, sparse)

    def compute(self, pattern: blocks.Pattern | None, groups: Any) -> None:
        """Computes the tiles that show a pair, as the pattern or, without one, the list's groups of tiles say."""
        strips, parts = self.x.n.strips, self.x.n.parts
        if pattern is None:
            group = lambda found, masked: self.several(
                [self.tile(t % strips, t // strips, masked, sparse) for t, sparse in found]
            )
            tiles.by_groups(groups, strips * parts, group)
        else:
            places = itertools.product(range(strips), range(parts))
            kinds = [(strip, part, pattern[strip][part]) for strip, part in places]
            self.several([self.tile(strip, part, kind == PARTIAL) for strip, part, kind in kinds if kind != EMPTY])


# ---- one visit: a block of queries of one head of the group


class _Next(NamedTuple):
    """The visit after this one."""

    exists: Array
    h: Array
    i: Array
    row: Array
    reads: Array  # whether its block of dq holds a sum that must be read


def _next_visit(x: _Row, h: Array, step: Array, listed: blocks.Row) -> _Next:
    """Returns the next visit: of this list, of the next head's, or of the next row's."""
    more, other = step + 1 < listed.seen, h + 1 < x.group
    after_list = x.first_list.following
    if x.group > 1:  # the next head's list may be empty, if it is another one
        of_other = x.list_of(jnp.where(other, h + 1, 0))
        begins = of_other.block(0) if of_other is listed else jnp.where(of_other.seen > 0, of_other.block(0), -1)
        after_list = jnp.where(other, begins, after_list)
    entry = jnp.where(more, listed.block(step + 1), after_list)
    next_h = jnp.where(more, h, jnp.where(other, h + 1, 0))
    row = jnp.where(more | other, x.row, x.row + 1)
    return _Next(entry >= 0, next_h, entry & blocks.INDEX, row, (entry >= 0) & (entry <= blocks.INDEX))


def _arrive(x: _Row, h: Array, here: tuple[Array, Array, Array], slot: Array, first: Array, then: _Next) -> Array:
    """Waits for this visit's block and its sum of dq, and sends for the next visit's.

    Returns whether the next visit's sum is on its way.
    """
    state, sums, i = x.refs.state, x.sums, here[2]
    reading = state[_READING]

    @pl.when(state[_FETCHED] == 0)
    def _fetch() -> None:
        x.fetch(h, x.row).start(i, slot)

    sums.settle(after(slot))

    # The next block's sum can be read once it is written: not yet if that is this block or waits in the ring.
    same = (then.h == h) & (then.i == i)
    pl.when(then.reads & (then.h * x.n.rows_q + then.i == state[_LAST]))(lambda: sums.settle(before(slot)))

    @pl.when(then.exists)
    def _next() -> None:
        x.fetch(then.h, then.row).start(then.i, after(slot))

    ahead = then.reads & ~same
    pl.when(ahead)(lambda: sums.read((x.b, x.head(then.h), then.i), after(slot)).start())
    x.fetch(h, x.row).wait(i, slot)

    @pl.when(first)
    def _zero() -> None:
        x.refs.dq_ring[slot] = jnp.zeros(x.refs.dq_ring.shape[1:], jnp.float32)

    @pl.when(~first)
    def _arrive() -> None:
        @pl.when(reading == 0)
        def _read() -> None:
            sums.settle(before(slot))
            sums.read(here, slot).start()

        sums.read(here, slot).wait()

    return ahead


def _visit(x: _Row, pattern: blocks.Pattern | None, h: Array, step: Array, _: object) -> None:
    refs, state = x.refs, x.refs.state
    slot, listed = state[_SLOT], x.list_of(h)
    entry = listed.block(step)
    i, first = entry & blocks.INDEX, entry > blocks.INDEX
    here = x.b, x.head(h), i  # in dq
    then = _next_visit(x, h, step, listed)
    ahead = _arrive(x, h, here, slot, first, then)
    state[_FETCHED], state[_READING] = then.exists.astype(jnp.int32), ahead.astype(jnp.int32)
    state[_LAST], state[_SLOT] = h * x.n.rows_q + i, after(slot)
    rings = (ring.at[slot] for ring in (refs.q_ring, refs.do_ring, refs.stats_ring, refs.dq_ring))
    _Block(x, slot, i, *rings).compute(pattern, listed.groups(step) if pattern is None else None)
    x.sums.write(here, slot)


# ---- the row


def _kernel(n: Call, refs: _Refs) -> None:
    head, row = pl.program_id(0), pl.program_id(1)
    bodies = blocks.bodies(n.patterns, n.strips, n.parts)
    sums = _Sums(refs.dq, refs.dq_ring, refs.state, refs.dq_semaphores)
    x = _Row(n, refs, head // n.K, head % n.K, row, bodies, _list(n, refs.walk, 0, bodies), sums)

    @pl.when(row == 0)
    def _start() -> None:
        for i in range(_WRITING + RING):
            refs.state[i] = 0
        refs.state[_LAST] = -1

    refs.dk_acc[...] = jnp.zeros_like(refs.dk_acc)
    refs.dv_acc[...] = jnp.zeros_like(refs.dv_acc)

    def of_head(h: Array, _: object) -> None:
        for i, pattern in enumerate(bodies):
            lax.fori_loop(*x.list_of(h).steps(i), functools.partial(_visit, x, pattern, h), None)

    lax.fori_loop(0, x.group, of_head, None)
    refs.dk[...] = (refs.dk_acc[...] * n.scale).T.astype(refs.dk.dtype)
    refs.dv[...] = refs.dv_acc[...].T.astype(refs.dv.dtype)

    @pl.when(row == pl.num_programs(1) - 1)
    def _land() -> None:
        for slot in range(RING):
            sums.settle(jnp.int32(slot))


def _scratch(n: Call, dtype: DTypeLike, bias: Array | None) -> dict[str, Any]:
    """Returns the kernel's own memory, for operands of this dtype."""
    return {
        "q_ring": pltpu.VMEM((RING, n.block_q, n.D), dtype),
        "do_ring": pltpu.VMEM((RING, n.block_q, n.V), dtype),
        "stats_ring": pltpu.VMEM((RING, 2, n.block_q), jnp.float32),
        "number_ring": pltpu.VMEM((RING, max(len(n.numbers), 1), n.block_q), jnp.int32),
        "bias_ring": pltpu.VMEM(*n.bias_ring(RING, bias)),
        "dq_ring": pltpu.VMEM((RING, n.D, n.block_q), jnp.float32),
        "dk_acc": pltpu.VMEM((n.D, n.block_k), jnp.float32),
        "dv_acc": pltpu.VMEM((n.V, n.block_k), jnp.float32),
        "state": pltpu.SMEM((_WRITING + RING,), jnp.int32),
        "semaphores": pltpu.SemaphoreType.DMA((5, RING)),
        "dq_semaphores": pltpu.SemaphoreType.DMA((2, RING)),
    }


def backward(
    n: Call, out_dtype: DTypeLike, walk: Array, q: Array, k: Array, v: Array, do: Array, stats: Array,
    k_numbers: Array | None, q_numbers: Array | None, bias: Array | None,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Returns dq / scale [B H D rows*block_q] in float32, dk [B K S D] and dv [B K S V] in out_dtype.

    dq is undefined in blocks of queries that the walk never visits; the caller knows which.

    Args:
      walk: int32 [B|1 H|1 columns W], from `blocks.lists` with keys as rows and first visits marked; its own numbers
        are the mask's.
      q, k, v, do: [B H T D], [B K S D], [B K S V], [B H T V].
      stats: float32 [B H 2 rows*block_q], lse in n.unit (NO_KEY where no key is seen and beyond the queries) and delta.
      k_numbers, q_numbers: int32 [B numbers S], [B numbers rows*block_q], if the kernel reads any.
      bias: [B|1 H|1 rows*block_q|1 columns*block_k], or None.
    """
    B, (Bw, Hw, columns, W) = q.shape[0], walk.shape
    heads = max(Hw // n.K, 1)  # lists per row
    shape = functools.partial(jax.ShapeDtypeStruct, manual_axis_type=jax.typeof(q).manual_axis_type)
    hbm = pl.BlockSpec(memory_space=pltpu.HBM)  # explicit: XLA might place it elsewhere, and copies could not overlap
    by_row = lambda size: pl.BlockSpec((None, None, n.block_k, size), lambda h, j: (h // n.K, h % n.K, j, 0))
    walk_spec = pl.BlockSpec(
        (None, None, None, heads, W),
        lambda h, j: (h // n.K if Bw > 1 else 0, h % n.K if Hw > 1 else 0, j, 0, 0),
        memory_space=pltpu.SMEM,
    )
    inputs = {
        "walk": (walk_spec, walk.reshape(Bw, Hw // heads, heads, columns, W).swapaxes(2, 3)),
        "k": (by_row(n.D), k),
        "v": (by_row(n.V), v),
        "q": (hbm, q),
        "do": (hbm, do),
        "stats": (hbm, stats),
    }
    if n.numbers:
        number_spec = pl.BlockSpec((None, len(n.numbers), n.block_k), lambda h, j: (h // n.K, 0, j))
        inputs |= {"k_numbers": (number_spec, k_numbers), "q_numbers": (hbm, q_numbers)}
    if n.bias:
        inputs["bias"] = hbm, bias
    outputs = {
        "dq": (hbm, shape((B, n.H, n.D, n.rows_q * n.block_q), jnp.float32)),
        "dk": (by_row(n.D), shape((B, n.K, n.S, n.D), out_dtype)),
        "dv": (by_row(n.V), shape((B, n.K, n.S, n.V), out_dtype)),
    }
    scratch = _scratch(n, q.dtype, bias)
    names = (*inputs, *outputs, *scratch)
    return pl.pallas_call(
        lambda *refs: _kernel(n, _Refs(**dict(zip(names, refs, strict=True)))),
        name="longattn_attention_backward",
        grid=(B * n.K, columns),
        in_specs=[spec for spec, _ in inputs.values()],
        out_specs=[spec for spec, _ in outputs.values()],
        out_shape=[x for _, x in outputs.values()],
        scratch_shapes=list(scratch.values()),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=n.vmem_bytes
        ),
        cost_estimate=n.cost(B, 5, q.dtype.itemsize),
    )(*(x for _, x in inputs.values()))
