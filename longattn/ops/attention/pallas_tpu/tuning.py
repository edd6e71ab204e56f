"""Block sizes: what a caller may set, and the choice per chip and shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jax.experimental.pallas import tpu as pltpu

from longattn.ops import dispatch
from longattn.ops.attention.spec import Extras

LANES = 128
_MiB = 2**20


@dataclass(frozen=True)
class Blocks:
    """Sizes of one kernel. A block is what is fetched at once, a tile what one product makes."""

    block_q: int  # queries of a block
    block_k: int  # keys of a block
    tile_q: int  # queries of a tile
    tile_k: int  # keys of a tile

    def __post_init__(self) -> None:
        for axis in "qk":
            block, tile = getattr(self, f"block_{axis}"), getattr(self, f"tile_{axis}")
            if tile < LANES or tile % LANES or block % tile:
                raise ValueError(
                    f"{self}: tile_{axis} must be a multiple of {LANES}, and block_{axis} a multiple of tile_{axis}"
                )


@dataclass(frozen=True)
class Tuning:
    """Block sizes of the two kernels. They change the result by rounding only."""

    forward: Blocks = Blocks(2048, 1024, 512, 256)
    backward: Blocks = Blocks(1024, 1024, 256, 256)

    def __post_init__(self) -> None:
        if self.forward.block_k // self.forward.tile_k % 2:
            raise ValueError(f"{self.forward}: block_k must be an even multiple of tile_k in the forward kernel")


def choose(given: Tuning | None, q: Any, k: Any, v: Any, extras: Extras) -> tuple[Tuning, int]:
    """The block sizes for a call [B T H D], and the bytes of fast memory that a kernel may use."""
    return given or Tuning(), 64 * _MiB
