"""The static description that a chunk is compiled for, and the arrays of its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from jax.typing import DTypeLike

Leaf = Any  # an array, a Pallas reference to one, or an `Operand`


@dataclass(frozen=True)
class Statics:
    """Static arguments of one chunk."""

    C: int
    decay: str  # "none", "scalar", "vector"
    delta: bool
    dtype: DTypeLike  # of the factors of products
    scale: float


class Tokens(NamedTuple):
    """One value per array of tokens. Which one the context says: a chunk's array, a ref, a gradient or an `Operand`.

    The shapes are those of a chunk's arrays, float32. Where q, k or v has fewer heads, neighbouring heads share one.
    """

    q: Leaf  # [Hq C D]; None where no output is wanted
    k: Leaf  # [Hk C D]
    v: Leaf  # [Hv C V]
    log_decay: Leaf  # [H 1 C], [H C D] or None
    beta: Leaf  # [H 1 C] or None
