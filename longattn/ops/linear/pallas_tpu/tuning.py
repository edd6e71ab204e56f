"""Block sizes: what a caller may set, and the choice for a chip and a shape.

Chunks of 128 tokens were the cheapest of every kind, on matrix units of either size. Static cycles of the forward pass
per 128 tokens and head (`longattn profile kernel longattn_linear --kind ...`; B1 H8 T8192 D128, bfloat16):

    chip, tokens of a chunk   scalar   scalar, delta   vector   vector, delta
    v5e, 64                      560            1463      789            1781
    v5e, 128                     412            1222      697            1605
    v6e, 128                     259             856      506            1142
    v6e, 256                     313            1173      602            1527

Eight heads in one program hide the most latency. With four, Gated DeltaNet takes 1543 cycles of a v5p core instead of
1188, which pays only where it gives the second core its work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike

from longattn.ops import dispatch
from longattn.ops.linear.pallas_tpu.products import SUBLANES

LANES = 128
SPAN = 512  # tokens, at least those of a chunk: one state per span is kept for the backward pass
_MiB = 2**20
_CHUNKS = (16, 32, 64, 128, 256)
HEADS = 8  # of one program: independent chains of products in flight
_CAPACITY = 56 * _MiB  # for a kernel, of the 64 that every core has; the rest is left to XLA
_WORK = {2: 16, 4: 60}  # by bytes of q: arrays of a chunk that the compiler keeps per head, as seen and rounded up
_SPARE = 8 * _MiB  # for spilled registers and constants


@dataclass(frozen=True)
class Tuning:
    """Block sizes of all kernels; None chooses. They change the result by rounding only."""

    chunk: int | None = None  # tokens
    heads: int | None = None  # of one program, at most. None chooses so that all cores of a device have equal work

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk not in _CHUNKS:
            raise ValueError(f"{self.chunk=} must be one of {', '.join(map(str, _CHUNKS))}")
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"{self.heads=} must be at least 1")


@dataclass(frozen=True)
class Problem:
    """Shapes, dtype and kind of a call."""

    B: int
    H: int
    Hq: int
    Hk: int
    Hv: int
    T: int
    D: int
    V: int
    decay: str  # "none", "scalar", "vector"
    delta: bool
    dtype: DTypeLike  # of q, k, v and their gradients


class Blocks(NamedTuple):
    """Sizes that the kernels are compiled for."""

    C: int  # tokens of a chunk
    M: int  # chunks of a span
    block_H: int  # heads of a program
    vmem_bytes: int  # that a kernel may use


def heads_of(H: int, heads: tuple[int, ...], most: int) -> list[int]:
    """Returns how many heads a program may take, most first: it reads whole heads of q, k and v, or shares one.

    Args:
      heads: numbers of heads of q, k and v.
      most: the largest answer.
    """
    fits = lambda h, n: h % (H // n) == 0 or (H // n) % h == 0
    return [h for h in range(min(most, H), 0, -1) if H % h == 0 and all(fits(h, n) for n in heads)]


def _padded(*shape: int, itemsize: int = 4) -> int:
    """Bytes of an array in whole registers."""
    *lead, rows, columns = shape
    tile = SUBLANES * 4 // itemsize if rows > 1 else 1
    return math.prod(lead) * -(-rows // tile) * tile * -(-columns // LANES) * LANES * itemsize


def vmem_bytes(p: Problem, block_H: int, C: int, M: int) -> int:
    """Returns the bytes of VMEM to allow any of the kernels. Pallas holds what it prefetches twice."""
    T, itemsize = M * C, jnp.dtype(p.dtype).itemsize
    tokens = block_H * (_padded(T, p.D, itemsize=itemsize) + _padded(T, p.V, itemsize=itemsize))
    decays = {"none": 0, "scalar": block_H * M * _padded(1, C), "vector": block_H * _padded(T, p.D)}
    state, pairs = block_H * _padded(p.D, p.V), block_H * _padded(C, C)
    given = 4 * tokens + 2 * decays[p.decay] + 2 * p.delta * decays["scalar"] + 3 * state
    kept = (M + 1) * state + p.delta * M * pairs
    work = _WORK[itemsize] * block_H * (_padded(C, max(p.D, p.V)) + _padded(C, C))
    return 2 * given + kept + work + _SPARE


def _cores() -> int:
    """TensorCores of one device of the target; a grid spreads over them."""
    return pltpu.get_tpu_info().num_cores if dispatch.target().platform == "tpu" else 1


def choose(p: Problem, tuning: Tuning | None = None) -> Blocks:
    """Returns the block sizes for a call. Raises NotImplementedError if nothing fits."""
    tuning = tuning or Tuning()
    C = tuning.chunk or LANES
    unit = max(C, LANES)
    M = min(SPAN, -(-p.T // unit) * unit) // C
    fitting = [
        h for h in heads_of(p.H, (p.Hq, p.Hk, p.Hv), tuning.heads or HEADS) if vmem_bytes(p, h, C, M) <= _CAPACITY
    ]
    if fitting:
        cores = _cores() if tuning.heads is None else 1
        block_H = next((h for h in fitting if p.B * p.H // h % cores == 0), fitting[0])
        return Blocks(C, M, block_H, vmem_bytes(p, block_H, C, M))
    raise NotImplementedError(f"heads of D={p.D} and V={p.V} do not fit the {_CAPACITY // _MiB} MiB of fast memory")
