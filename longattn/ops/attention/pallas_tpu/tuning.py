"""Block sizes: what a caller may set, and what is chosen for a chip and a shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import jax
import numpy as np
from jax.experimental.pallas import tpu as pltpu

from longattn.mask import EMPTY, FULL, Mask
from longattn.ops import dispatch
from longattn.ops.attention.pallas_tpu.call import LANES, SUBLANES
from longattn.ops.attention.pallas_tpu.fetch import RING
from longattn.ops.attention.pallas_tpu.tuned import TUNED

_MiB = 2**20
_SPARE = 8 * _MiB  # for the compiler's own buffers: spilled registers, constants
_F32_AREA = 512 * 512  # a float32 product is six to twelve bfloat16 products, and the program as many times as long
Pass = Literal["forward", "backward"]
PASSES: tuple[Pass, ...] = ("forward", "backward")


@dataclass(frozen=True)
class Blocks:
    """Block sizes of one kernel. A block is fetched at once; a tile is the result of one product."""

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

    @property
    def tiles(self) -> int:
        """How many tiles a block has."""
        return self.block_q // self.tile_q * (self.block_k // self.tile_k)


@dataclass(frozen=True)
class Tuning:
    """Block sizes of the two kernels; None chooses. They change the result by rounding only."""

    forward: Blocks | None = None
    backward: Blocks | None = None

    def __post_init__(self) -> None:
        if self.forward is not None and self.forward.block_k // self.forward.tile_k % 2:
            raise ValueError(f"{self.forward}: block_k must be an even multiple of tile_k in the forward kernel")


def _up(n: int, unit: int) -> int:
    """Returns n rounded up to a multiple of unit."""
    return -(-n // unit) * unit


def _padded(rows: int, columns: int, itemsize: int) -> int:
    """Returns the bytes of an array [rows columns] in whole registers."""
    return _up(rows, SUBLANES * 4 // itemsize) * _up(columns, LANES) * itemsize


def fast_memory(which: Pass, blocks: Blocks, D: int, V: int, itemsize: int, numbers: int, bias: int = 0) -> int:
    """Returns the bytes of fast memory that a kernel takes; Pallas holds the blocks that it fetches twice.

    Args:
      numbers: how many of positions and segments the kernel reads.
      bias: bytes of bias per logit.
    """
    bq, bk = blocks.block_q, blocks.block_k
    queries, keys = (
        (_padded(bq, D, itemsize), _padded(bq, V, itemsize)),
        (_padded(bk, D, itemsize), _padded(bk, V, itemsize)),
    )
    ids = _padded(max(numbers, 1), bq, 4) * 2 + _padded(max(numbers, 1), bk, 4) * RING
    ids += RING * bq * bk * bias
    if which == "forward":
        strips = bq // blocks.tile_q
        probabilities = bk * bq * itemsize + blocks.tile_k * blocks.tile_q * itemsize
        statistics = 3 * strips * _padded(SUBLANES, blocks.tile_q, 4)
        out = strips * _padded(V, blocks.tile_q, 4)
        return 2 * sum(queries) + RING * sum(keys) + ids + probabilities + statistics + out + 2 * _padded(1, bq, 4)
    sums = RING * _padded(D, bq, 4) + _padded(D, bk, 4) + _padded(V, bk, 4)
    gradients = 2 * (_padded(bk, D, 4) + _padded(bk, V, 4))
    return RING * sum(queries) + 2 * sum(keys) + ids + sums + gradients + RING * _padded(2, bq, 4)


def limit(which: Pass, blocks: Blocks, D: int, V: int, itemsize: int, numbers: int, bias: int = 0) -> int:
    """Returns the limit on a kernel's fast memory, in bytes: a larger one than it needs costs cycles."""
    return fast_memory(which, blocks, D, V, itemsize, numbers, bias) + _SPARE


def _key(chip: str, which: Pass, kind: str, D: int, tokens: int) -> str:
    head = next((size for size in (64, 128) if size >= D), 256)
    return f"{chip} {which} {kind} D{head} {'8k' if tokens <= 16384 else '32k'}"


def _kind(mask: Mask, numbers: tuple[str, ...], T: int, S: int) -> str:
    """Returns the class of a mask: "numbers" (known at run time), "full", "narrow" (few keys per query) or "cut"."""
    if numbers or jax.tree.leaves(mask):
        return "numbers"
    keys = np.arange(0, S, LANES, dtype=np.int32)
    last = np.int32(T - 1)
    row = np.asarray(mask.kind(last, last, keys, np.minimum(keys + (LANES - 1), S - 1)))
    whole = mask.kind(np.int32(0), last, np.int32(0), np.int32(S - 1)) == FULL
    return "full" if whole else "narrow" if (row != EMPTY).mean() <= 0.25 else "cut"


def _chip() -> str:
    """Returns the TPU generation of the target; for interpreted kernels, the one with the least fast memory."""
    if dispatch.target().platform != "tpu":
        return "v5p"
    version = pltpu.get_tpu_info().chip_version.value
    return "tpu7x" if version in ("7", "7x") else version


def _capacity() -> int:
    """Returns the bytes of a core's fast memory that a kernel may take; the rest is left to XLA."""
    capacity = pltpu.get_tpu_info().vmem_capacity_bytes if dispatch.target().platform == "tpu" else 64 * _MiB
    return capacity * 7 // 8


def _fitted(block: int, tile: int, step: int, tokens: int) -> tuple[int, int]:
    """Returns (block, tile) no larger than the sequence needs: equal blocks, the last one not mostly empty."""
    while tile > LANES and _up(tokens, step * tile) >= 2 * tokens:
        tile = tile // 2 // LANES * LANES
    unit = step * tile
    equal = -(-tokens // -(-tokens // block))
    return min(_up(equal, unit), max(block // unit, 1) * unit), tile


def choose(
    which: Pass, mask: Mask, numbers: tuple[str, ...], T: int, S: int, D: int, V: int, itemsize: int, bias: int = 0
) -> Blocks:
    """Returns the block sizes for a chip and a shape: the sweep's nearest entry, fitted to sequence and memory.

    Raises:
      NotImplementedError: if none fit.
    """
    chip, kind = _chip(), _kind(mask, numbers, T, S)
    wide = chip in ("v6e", "tpu7x", "8i", "8t")
    chips = (chip, "v6e" if wide else "v5e")  # every generation has the matrix units of one of these
    found = next(TUNED[key] for c in chips if (key := _key(c, which, kind, max(D, V), max(T, S))) in TUNED)
    blocks = Blocks(*found)
    block_q, tile_q = _fitted(blocks.block_q, blocks.tile_q, 1, T)
    block_k, tile_k = _fitted(blocks.block_k, blocks.tile_k, 2 if which == "forward" else 1, S)
    blocks = Blocks(block_q, block_k, tile_q, tile_k)
    area = _F32_AREA if itemsize == 4 else blocks.block_q * blocks.block_k
    while (
        limit(which, blocks, D, V, itemsize, len(numbers), bias) > _capacity() or blocks.block_q * blocks.block_k > area
    ):
        smaller = _smaller(blocks, 2 if which == "forward" else 1)
        if smaller == blocks:
            raise NotImplementedError(f"heads of {D=} and {V=} do not fit the {_capacity() // _MiB} MiB of fast memory")
        blocks = smaller
    return blocks


def _smaller(blocks: Blocks, step: int) -> Blocks:
    """Returns sizes about half as large, along the longer side that can be halved."""
    for axis in sorted("qk", key=lambda axis: -getattr(blocks, f"block_{axis}")):
        block, tile = getattr(blocks, f"block_{axis}"), getattr(blocks, f"tile_{axis}")
        unit = (step if axis == "k" else 1) * tile
        if block >= 2 * unit:
            return replace(blocks, **{f"block_{axis}": block // 2 // unit * unit})
        if tile > LANES:
            half = tile // 2 // LANES * LANES
            return replace(blocks, **{f"tile_{axis}": half, f"block_{axis}": (step if axis == "k" else 1) * half})
    return blocks
