"""The static description that a kernel is compiled for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from longattn.mask import Mask
from longattn.ops.attention.pallas_tpu.blocks import Pattern

LOG2E = math.log2(math.e)
LANES, SUBLANES = 128, 8  # of a register


def unit(scale: float, softcap: float | None) -> float:
    """Returns the unit of logits and lse inside the kernels: raw q k, or tanh(.) under a soft cap.

    The scale is applied to differences only. So the largest probability is exactly 1 in both passes, however a product
    is rounded.
    """
    return scale if softcap is None else softcap


@dataclass(frozen=True)
class Call:
    """The static arguments of a kernel. B is not among them: vmap makes it larger after a call is planned."""

    H: int
    K: int
    T: int
    S: int
    D: int
    V: int
    block_q: int
    block_k: int
    tile_q: int
    tile_k: int
    scale: float
    softcap: float | None
    numbers: tuple[str, ...]  # which of "positions", "segments" the kernel reads
    patterns: tuple[Pattern, ...] | None  # how blocks can be cut, [queries][keys]; None: lists name a block's tiles
    mask: Any  # the mask's treedef; in a kernel its leaves are numbers, one per sequence, or per tile for a BlockSparse
    sparse: int | None  # index of the BlockSparse's leaf, if the mask has one
    bias: bool  # whether the kernel adds a bias to the logits
    share: float  # estimated share of the blocks that hold a visible pair
    vmem_bytes: int  # limit on the kernel's fast memory

    @property
    def strips(self) -> int:
        """Tiles of queries in a block."""
        return self.block_q // self.tile_q

    @property
    def parts(self) -> int:
        """Tiles of keys in a block."""
        return self.block_k // self.tile_k

    @property
    def mask_numbers(self) -> int:
        """How many numbers per sequence the mask reads."""
        return self.mask.num_leaves - (self.sparse is not None)

    def mask_of(self, numbers: Sequence[Any], sparse: Any) -> Mask:
        """Returns the mask of a tile, from the sequence's numbers and whether its BlockSparse shows the tile."""
        leaves = list(numbers)
        if self.sparse is not None:
            leaves.insert(self.sparse, sparse)
        return jax.tree.unflatten(self.mask, leaves)

    def bias_ring(self, ring: int, bias: Array | None) -> tuple[tuple[int, ...], Any]:
        """Returns shape and dtype of a ring of so many blocks of the bias; of something small without a bias."""
        if bias is None:
            return (1, SUBLANES, LANES), jnp.float32
        return (ring, min(bias.shape[2], self.block_q), self.block_k), bias.dtype

    def cost(self, B: int, products: int, itemsize: int) -> pl.CostEstimate:
        """Returns the work of a kernel with so many D + V products: XLA schedules other operations beside it."""
        pairs = B * self.H * self.T * self.S * self.share
        queries, keys = B * self.H * self.T, B * self.H * self.rows_q * self.S * self.share
        return pl.CostEstimate(
            flops=int(products * pairs * (self.D + self.V)),
            transcendentals=int(pairs),
            bytes_accessed=int((self.D + self.V) * itemsize * (queries + keys)),
        )

    @property
    def unit(self) -> float:
        return unit(self.scale, self.softcap)

    @property
    def rows_q(self) -> int:
        """How many blocks the queries fill."""
        return -(-self.T // self.block_q)

    @property
    def rows_k(self) -> int:
        """How many blocks the keys fill."""
        return -(-self.S // self.block_k)
