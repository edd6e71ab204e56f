"""Copies of blocks of a sequence from device memory into a ring of buffers, while other blocks are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

Ref = Any  # a Pallas reference to memory: jax has no public type
RING = 3  # buffers: one is computed, one is being filled, and one of the block before is still read


def after(slot: Array) -> Array:
    """Returns the next slot of the ring."""
    return jnp.where(slot == RING - 1, 0, slot + 1)


def before(slot: Array) -> Array:
    """Returns the slot of the ring before this one."""
    return jnp.where(slot == 0, RING - 1, slot - 1)


@dataclass(frozen=True)
class Fetch:
    """The copies of one block of tokens from several arrays.

    Tokens lie along the rows of some arrays and along the lanes of others. The last block may end early; its rows are
    then padded with zeros, because device memory beyond an array may hold NaN.
    """

    length: int  # tokens of the sequence; if it ends within a block, a multiple of the rows of a register
    block: int  # tokens of a block
    rows: Sequence[tuple[Ref, Ref]]  # (an array's ref [length size], its ring [RING block size])
    lanes: Sequence[tuple[Ref, Ref]]  # (an array's ref [n blocks*block], its ring [RING n block])
    semaphores: Ref  # DMA [arrays RING]
    others: Sequence[tuple[Callable[[Array], Ref], Ref]] = ()  # (block j -> the part of an array to copy, its ring)

    def _each(self, j: Array, slot: Array, do: Callable[[Any], None]) -> None:
        def copy(tokens: int) -> None:
            first = pl.multiple_of(j * self.block, self.block)
            pairs = [(hbm.at[pl.ds(first, tokens)], ring.at[slot, pl.ds(0, tokens)]) for hbm, ring in self.rows]
            pairs += [(hbm.at[:, pl.ds(first, self.block)], ring.at[slot]) for hbm, ring in self.lanes]
            pairs += [(source(j), ring.at[slot]) for source, ring in self.others]
            for i, (source, target) in enumerate(pairs):
                do(pltpu.make_async_copy(source, target, self.semaphores.at[i, slot]))

        if not (tail := self.length % self.block):
            copy(self.block)
            return
        last = self.length // self.block
        pl.when(j < last)(lambda: copy(self.block))
        pl.when(j == last)(lambda: copy(tail))

    def start(self, j: Array, slot: Array) -> None:
        """Starts the copies of block j."""
        self._each(j, slot, lambda copy: copy.start())

    def wait(self, j: Array, slot: Array) -> None:
        """Waits for the copies of block j."""
        self._each(j, slot, lambda copy: copy.wait())
        if tail := self.length % self.block:

            @pl.when(j == self.length // self.block)
            def _fill() -> None:
                for _, ring in self.rows:
                    ring[slot, tail:] = jnp.zeros((self.block - tail, ring.shape[-1]), ring.dtype)
