"""One row of the forward kernel: its references by name, its list, its copies and its products."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.lax import Precision
from jaxtyping import Array

from longattn.ops.attention.pallas_tpu import blocks, tiles
from longattn.ops.attention.pallas_tpu.call import Call
from longattn.ops.attention.pallas_tpu.fetch import Fetch, after

Ref = Any  # a Pallas reference to memory: jax has no public type
SLOT, FETCHED, LATE_SLOT, LATE, BAD = range(5)  # words of `Refs.state`
SENT, HERE = 1, 2  # values of FETCHED: the next step's block is being fetched, has arrived; 0: neither
CHUNKS = 2  # chunks of keys in a block: P of one is stored while P of the other is multiplied


@dataclass(frozen=True)
class Refs:
    """The kernel's references, by name."""

    walk: Ref  # SMEM: this row's list
    q: Ref  # [block_q D]
    k: Ref  # in device memory [B K S D]
    v: Ref
    out: Ref  # [block_q V]
    lse: Ref  # [1 block_q]
    k_ring: Ref  # [RING block_k D]: blocks of keys
    v_ring: Ref
    number_ring: Ref  # their positions and segments
    bias_ring: Ref
    p: Ref  # [CHUNKS strips chunk tile_q]: P of two chunks
    late: Ref  # [tile_k tile_q]: P of the last tile of a group, not yet multiplied by v
    acc: Ref  # [strips V tile_q]: O^T
    m: Ref  # [strips SUBLANES tile_q]
    l: Ref  # sums of P, one per sublane
    rest: Ref  # sums of what rounding added to P
    state: Ref  # SMEM int32 [5]: what outlives a row
    semaphores: Ref
    q_numbers: Ref = None  # positions and segments of the queries
    k_numbers: Ref = None
    bias: Ref = None


@dataclass(frozen=True)
class Row:
    """One row of blocks of queries of one head: its place, its list, its copies and its products."""

    n: Call
    refs: Refs
    b: Array
    h: Array
    kv: Array  # the key/value head
    row: Array
    listed: blocks.Row
    c: float  # P = 2^(c (S - m))
    precision: Precision | None  # of the products

    @property
    def chunk(self) -> int:
        """Keys in a chunk."""
        return self.n.block_k // CHUNKS

    @property
    def bounded(self) -> Array:
        """1 if every logit of the row is bounded."""
        return self.listed.own[0]

    @property
    def cut(self) -> Array:
        """Blocks in the list that the mask cuts; they come first."""
        return self.listed.ends[-2] if len(self.listed.ends) > 1 else jnp.int32(0)

    # ---- copies

    def fetch(self, row: Array) -> Fetch:
        """Returns the copies of one block of keys, for this row of queries or the next one."""
        n, refs, b, kv = self.n, self.refs, self.b, self.kv
        rows = [(refs.k.at[b, kv], refs.k_ring), (refs.v.at[b, kv], refs.v_ring)]
        lanes = [(refs.k_numbers.at[b], refs.number_ring)] if n.numbers else []
        bias_of = functools.partial(tiles.bias_block, n, refs.bias, b, self.h, row)
        others = [(bias_of, refs.bias_ring)] if n.bias else []
        return Fetch(refs.k.shape[2], n.block_k, rows, lanes, refs.semaphores, others)

    def arrive(self, step: Array | int, slot: Array) -> None:
        """Waits for this step's block, and starts fetching the next step's or the next row's first."""
        listed, state, row = self.listed, self.refs.state, self.row
        more = step + 1 < listed.seen
        following = jnp.where(more, listed.block(step + 1), listed.following)

        @pl.when(state[FETCHED] == 0)
        def _fetch() -> None:
            self.fetch(row).start(listed.block(step), slot)

        @pl.when(following >= 0)
        def _next() -> None:
            self.fetch(jnp.where(more, row, row + 1)).start(following, after(slot))

        here = state[FETCHED] == HERE
        state[FETCHED] = jnp.where(following >= 0, SENT, 0)
        pl.when(~here)(lambda: self.fetch(row).wait(listed.block(step), slot))

    # ---- products

    def logits(self, slot: Array, first: Array | int, strip: Array | int) -> Array:
        """Returns S^T [tile_k tile_q] of the keys from `first` on, in the call's unit."""
        n, refs = self.n, self.refs
        q = refs.q[pl.ds(tiles.multiple(strip, n.tile_q), n.tile_q), :]
        s = tiles.dot(refs.k_ring[slot, pl.ds(first, n.tile_k), :], q, "NT", self.precision)
        if n.softcap is not None:
            s = jnp.tanh(s * (n.scale / n.softcap))
        return s + tiles.bias(n, refs.bias_ring, slot, strip, first) if n.bias else s

    def add_values(self, slot: Array, first: Array | int, strip: Array | int, p: Array) -> None:
        """Adds V^T P^T of the keys from `first` on to O^T."""
        keys = pl.ds(first, p.shape[0])
        self.refs.acc[strip] += tiles.dot(self.refs.v_ring[slot, keys, :], p, "TN", self.precision)

    def visible(self, slot: Array, j: Array, first: Array | int, strip: Array | int, sparse: Array | None) -> Array:
        """Returns the visible pairs, bool [tile_k tile_q]; `sparse` says whether a BlockSparse shows the tile."""
        n, refs = self.n, self.refs
        return tiles.visible(
            n.mask_of(self.listed.own[1:], sparse), n.numbers, refs.q_numbers,
            refs.number_ring.at[slot] if n.numbers else None, self.row * n.block_q + strip * n.tile_q,
            j * n.block_k + first, tiles.multiple(strip, n.tile_q), first, n.tile_q, n.tile_k,
            n.S if n.S % n.block_k else None,
        )  # fmt: skip

    def place(self, tile: Array) -> tuple[Array, Array]:
        """Returns strip and first key of a listed tile."""
        return tile // self.n.parts, tiles.multiple(tile % self.n.parts, self.n.tile_k)
