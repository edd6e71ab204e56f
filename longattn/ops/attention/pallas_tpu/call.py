"""The static side of a kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

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
    patterns: tuple[Pattern, ...] | None  # ways in which blocks are cut, [queries][keys]; None: by any numbers
    vmem_bytes: int  # that the kernel may use

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
