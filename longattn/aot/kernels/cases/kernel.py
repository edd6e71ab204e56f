"""How often the parts of a kernel run, and what it moves: declared from its source, checked against what is compiled.

Attention kernels walk over a grid of (head, query block, key block) steps. Which steps run, and when a block must be
fetched or stored, follows from the order of the walk and from the mask's geometry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from longattn.aot.kernels.cases.shape import Shape
from longattn.mask import Window

BF16, F32 = 2, 4  # bytes
LANES = 128  # per-row statistics are stored broadcast over a register's lanes, or over its 8 sublanes
SUBLANES = 8


@dataclass(frozen=True)
class Branch:
    """One `pl.when` of a kernel's source that is compiled to a jump, or a body of products that a list leads to."""

    what: str
    runs: float  # in one call of the kernel, over all cores; with `data` how often it is asked: the most it can run
    data: str = ""  # of a branch that depends on the data: the name of the function under its `pl.when`
    asides: tuple[
        tuple[float, ...], ...
    ] = ()  # of a body: how often its branches without products run, if so many jump
    alternative: str = ""  # of branches with such a name only those of one name run
    loop: float = 0.0  # of one of several bodies in the loop that a list leads to: how often the loop's own runs


@dataclass(frozen=True)
class Kernel:
    """One `pallas_call` of a case, summed over its whole grid and all cores."""

    name: str  # how its name in the compiled program begins
    steps: int  # of the grid, those included whose block is skipped
    branches: tuple[Branch, ...]  # every one that the source has, in its order
    flops: float  # that the visible pairs need; only matrix products count
    hbm_bytes: float  # between device memory and VMEM: a block is moved when its index changes
    after_bytes: float = 0.0  # that XLA moves after it to sum what the kernel leaves in shares
    dynamic: bool = False  # the grid's length is a value at run time, which the compiled program cannot confirm
    loops: tuple[
        int, ...
    ] = ()  # of a kernel that walks by itself: how often the body of each loop runs, from outside in
    lists: bool = False  # a step of the grid walks over a list: `branches` are its regions with products of their own


@dataclass(frozen=True)
class Case:
    """A function of bfloat16 arrays and the kernels to account for."""

    about: str
    build: Callable[[Shape], tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]]
    kernels: Callable[[Shape], tuple[Kernel, ...]]
    blocks: Callable[[Shape], list[Shape]]  # block sizes worth trying for such a shape, legal ones alone
    module: str = ""  # of a peer: what must be importable, from the extra `peers`


def row(size: int) -> int:
    """Bytes of one row [size] of a bfloat16 array as a TPU stores it: filled up to whole registers of 128 lanes."""
    return -(-size // LANES) * LANES * BF16


# ---- arrays


def queries(shape: Shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((shape.H, shape.T, shape.D), jnp.bfloat16)


def inputs(shape: Shape) -> list[jax.ShapeDtypeStruct]:
    """q [H T D], k [K T D], v [K T V]."""
    key, value = ((shape.key_heads, shape.T, size) for size in (shape.D, shape.values))
    return [queries(shape), jax.ShapeDtypeStruct(key, jnp.bfloat16), jax.ShapeDtypeStruct(value, jnp.bfloat16)]


def cotangent(shape: Shape) -> jax.ShapeDtypeStruct:
    """do [H T V]."""
    return jax.ShapeDtypeStruct((shape.H, shape.T, shape.values), jnp.bfloat16)


def gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q, k, v, do: jax.vjp(attend, q, k, v)[1](do)


# ---- the walk


@dataclass(frozen=True)
class Walk:
    """The steps of a kernel in their order, int [n] each: which head, block of queries and block of keys."""

    head: np.ndarray
    query: np.ndarray
    key: np.ndarray

    def changes(self, *indices: np.ndarray) -> int:
        """How often a block is moved whose index along the steps is this tuple."""
        index = np.stack(indices)
        return 1 + int(np.any(np.diff(index, axis=1) != 0, axis=0).sum()) if index.shape[1] else 0

    def __len__(self) -> int:
        return len(self.head)


def walk(run: np.ndarray, heads: int, order: str) -> Walk:
    """The steps at which `run` (bool [Jq Jk]) holds, for each head; `order` names the loops from outside to inside."""
    steps = np.broadcast_to(run, (heads, *run.shape))
    axes = ["hqk".index(axis) for axis in order]
    found = dict(zip(order, np.nonzero(steps.transpose(axes))))
    return Walk(found["h"], found["q"], found["k"])


def moved(shape: Shape, steps: Walk, **bytes_per_token: float) -> float:
    """Bytes that go between device memory and VMEM along the steps.

    Keyword arguments: bytes per token of what is indexed by `query` (head, query block), `key` (key head, key block),
    `query_ids` (query block) and `key_ids` (key block).
    """
    group = shape.H // shape.key_heads
    index: dict[str, tuple[int, tuple[np.ndarray, ...]]] = {
        "query": (shape.bT, (steps.head, steps.query)),
        "key": (shape.bS, (steps.head // group, steps.key)),
        "query_ids": (shape.bT, (steps.query,)),
        "key_ids": (shape.bS, (steps.key,)),
    }
    return float(sum(n * index[name][0] * steps.changes(*index[name][1]) for name, n in bytes_per_token.items()))


def flops(shape: Shape, products: str) -> float:
    """FLOPs of the visible pairs in products along (or onto) these head sizes: q k^T is a D, p v a V."""
    sizes = {"D": shape.D, "V": shape.values}
    return 2.0 * shape.pairs() * shape.H * sum(sizes[size] for size in products)


def edges(shape: Shape) -> tuple[int, ...]:
    """Blocks worth trying along the sequence. Small ones lose to a step's own cost, unless they skip or T is short."""
    small = shape.documents or isinstance(shape.mask, Window) or shape.T < 4096 or shape.T % 1024
    return (512, 1024, 2048) if small else (1024, 2048)


def sizes(
    shape: Shape, bT: Sequence[int], bS: Sequence[int], bC: Sequence[int | None] = (None,), bR: int | None = None
) -> list[Shape]:
    """`shape` with every combination of these block sizes that divides it; a bC that does not divide bS is left out."""
    return [
        replace(shape, bT=t, bS=s, bC=c, bR=bR)
        for t in bT
        for s in bS
        for c in bC
        if shape.T % t == shape.T % s == 0 and (c is None or (s % c == 0 and c < s)) and (bR is None or t % bR == 0)
    ]
