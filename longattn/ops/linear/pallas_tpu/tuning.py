"""Sizes: what a caller may set, and the choice for a chip and a shape.

Chunks of 128 tokens were the cheapest of every kind, on matrix units of either size. Static cycles of the forward pass
per 128 tokens and head (`longattn profile kernel longattn_linear --kind ...`; B1 H8 T8192 D128, bfloat16):

    chip, tokens of a chunk   scalar   scalar, delta   vector   vector, delta
    v5e, 64                      560            1463      789            1781
    v5e, 128                     412            1222      697            1605
    v6e, 128                     259             856      506            1142
    v6e, 256                     313            1173      602            1527

Eight heads hide the most: with four, Gated DeltaNet takes 1543 cycles of a v5p core instead of 1188, which pays only
where it is what gives the second core its work.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from jax.experimental.pallas import tpu as pltpu

from longattn.ops import dispatch
from longattn.ops.linear.pallas_tpu.chunk import SUBLANES

LANES = 128
SPAN = 512  # tokens, at least those of a chunk: one state of so many is kept for the backward pass
_MiB = 2**20
_CHUNKS = (16, 32, 64, 128, 256)
HEADS = 8  # chains of products in flight
_CAPACITY = 56 * _MiB  # for a kernel, of the 64 that a core has at least; the rest is left to XLA
_WORK = {2: 16, 4: 60}  # arrays of a chunk that the compiler keeps of a head at once, by bytes of q: seen, rounded up
_SPARE = 8 * _MiB  # for what the compiler keeps besides: registers that it spills, constants


@dataclass(frozen=True)
class Tuning:
    """Sizes of both kernels; None chooses. They change the result by rounding only."""

    chunk: int | None = None  # tokens
    heads: int | None = None  # of one program, at most; chosen, all cores of a device have as many programs

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk not in _CHUNKS:
            raise ValueError(f"{self.chunk=} must be one of {', '.join(map(str, _CHUNKS))}")
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"{self.heads=} must be at least 1")


def heads_of(H: int, heads: tuple[int, ...], most: int) -> list[int]:
    """How many heads a program may take, most first: they share whole heads of q, k and v, or parts of one."""
    fits = lambda h, n: h % (H // n) == 0 or (H // n) % h == 0
    return [h for h in range(min(most, H), 0, -1) if H % h == 0 and all(fits(h, n) for n in heads)]


def _padded(*shape: int, itemsize: int = 4) -> int:
    """Bytes of an array in whole registers."""
    *lead, rows, columns = shape
    tile = SUBLANES * 4 // itemsize if rows > 1 else 1
    return math.prod(lead) * -(-rows // tile) * tile * -(-columns // LANES) * LANES * itemsize


def fast_memory(
    block_h: int, chunk: int, rows: int, D: int, V: int, itemsize: int, decay: str, delta: bool
) -> int:  # fmt: skip
    """Bytes of fast memory to allow either kernel; what Pallas fetches by itself is held twice."""
    tokens = block_h * (_padded(rows, D, itemsize=itemsize) + _padded(rows, V, itemsize=itemsize))
    decays = {"none": 0, "scalar": block_h * rows // chunk * _padded(1, chunk), "vector": block_h * _padded(rows, D)}
    state, pairs = block_h * _padded(D, V), block_h * _padded(chunk, chunk)
    given = 4 * tokens + 2 * decays[decay] + 2 * delta * decays["scalar"] + 3 * state
    kept = (rows // chunk + 1) * state + delta * (rows // chunk) * pairs
    work = _WORK[itemsize] * block_h * (_padded(chunk, max(D, V)) + _padded(chunk, chunk))
    return 2 * given + kept + work + _SPARE


def _cores() -> int:
    """Of one device of the target; a grid spreads over them."""
    return pltpu.get_tpu_info().num_cores if dispatch.target().platform == "tpu" else 1


def choose(
    tuning: Tuning | None, B: int, H: int, heads: tuple[int, ...], T: int, D: int, V: int, itemsize: int, decay: str,
    delta: bool,
) -> tuple[int, int, int, int]:  # fmt: skip
    """(chunk, chunks of a span, heads of a program, bytes of fast memory).

    Raises:
      NotImplementedError: if nothing fits.
    """
    tuning = tuning or Tuning()
    chunk = tuning.chunk or LANES
    unit = max(chunk, LANES)
    rows = min(SPAN, -(-T // unit) * unit)
    size = lambda block_h: fast_memory(block_h, chunk, rows, D, V, itemsize, decay, delta)
    fitting = [h for h in heads_of(H, heads, tuning.heads or HEADS) if size(h) <= _CAPACITY]
    if fitting:
        cores = _cores() if tuning.heads is None else 1
        block_h = next((h for h in fitting if B * H // h % cores == 0), fitting[0])
        return chunk, rows // chunk, block_h, size(block_h)
    raise NotImplementedError(f"heads of {D=} and {V=} do not fit the {_CAPACITY // _MiB} MiB of fast memory")
