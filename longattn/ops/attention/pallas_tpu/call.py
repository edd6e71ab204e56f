"""The static side of a kernel."""

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
    """What the kernels count logits and lse in: q k, or its tanh where it is capped. They are scaled where a difference
    was taken, so that P of the greatest is 1 exactly in both passes, however a product is rounded.
    """
    return scale if softcap is None else softcap


@dataclass(frozen=True)
class Call:
    """What a kernel is compiled for."""

    B: int
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
    out_dtype: Any  # of out, or of dk and dv
    numbers: tuple[str, ...]  # which of "positions", "segments" the kernel reads
    patterns: tuple[Pattern, ...] | None  # ways in which blocks are cut, [queries][keys]; None: their tiles are listed
    mask: Any  # its tree, whose leaves are one number per sequence each, or what a BlockSparse says of a tile
    sparse: int | None  # which leaf that is, if the mask has one
    bias: bool  # whether the kernel adds something to the logits
    share: float  # of the blocks that hold a visible pair, as far as is known at compile time
    vmem_bytes: int  # that the kernel may use

    @property
    def mask_numbers(self) -> int:
        """Numbers per sequence that the mask reads."""
        return self.mask.num_leaves - (self.sparse is not None)

    def shows(self, numbers: Sequence[Any], sparse: Any) -> Mask:
        """The mask of a tile, of these numbers and what its BlockSparse says of the tile."""
        leaves = list(numbers)
        if self.sparse is not None:
            leaves.insert(self.sparse, sparse)
        return jax.tree.unflatten(self.mask, leaves)

    def bias_ring(self, ring: int, bias: Array | None) -> tuple[tuple[int, ...], Any]:
        """Shape and dtype of so many blocks of the bias, or of something small."""
        if bias is None:
            return (1, SUBLANES, LANES), jnp.float32
        return (ring, min(bias.shape[2], self.block_q), self.block_k), bias.dtype

    def cost(self, products: int, itemsize: int) -> pl.CostEstimate:
        """What XLA is told, so that it knows how much to do beside a kernel of so many D + V products."""
        pairs = self.B * self.H * self.T * self.S * self.share
        queries, keys = self.B * self.H * self.T, self.B * self.H * self.rows_q * self.S * self.share
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
        """Blocks of queries."""
        return -(-self.T // self.block_q)

    @property
    def rows_k(self) -> int:
        """Blocks of keys."""
        return -(-self.S // self.block_k)
