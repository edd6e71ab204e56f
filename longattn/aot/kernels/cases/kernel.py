"""Declares how often the parts of a kernel run, and the bytes it moves.

Attention kernels walk over a grid of (head, query block, key block) steps. Which steps run, and when a block is fetched
or stored, follows from the order of the walk and the mask's geometry.
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
LANES = 128  # per-row statistics are broadcast over a register's lanes, or over its 8 sublanes
SUBLANES = 8


@dataclass(frozen=True)
class Branch:
    """A `pl.when` of a kernel's source that compiles to a jump, or a body of products that a list leads to."""

    what: str
    runs: float  # in one call of the kernel, over all cores; with `data`, how often the condition is asked
    data: str = ""  # name of the function under a data-dependent `pl.when`
    asides: tuple[tuple[float, ...], ...] = ()  # runs of a body's branches without products, for each number of jumps
    alternative: str = ""  # of the branches with such a name, only those of one name run
    loop: float = 0.0  # runs of the loop around several bodies that a list leads to


@dataclass(frozen=True)
class Kernel:
    """One `pallas_call` of a case, summed over its whole grid and all cores."""

    name: str  # prefix of its name in the compiled program
    steps: int  # steps of the grid, with those that skip their block
    branches: tuple[Branch, ...]  # all branches of the source, in order
    flops: float  # matrix products of the visible pairs
    hbm_bytes: float  # between HBM and VMEM: a block moves when its index changes
    after_bytes: float = 0.0  # bytes that XLA moves afterwards to sum the kernel's partial results
    dynamic: bool = False  # the grid's length is known at run time only, so the compiled program cannot confirm it
    loops: tuple[int, ...] = ()  # for a kernel with loops of its own: runs of each loop's body, outermost first
    lists: bool = False  # a step of the grid walks over a list: `branches` are its regions with products


@dataclass(frozen=True)
class Case:
    """A function of bfloat16 arrays and the kernels to account for."""

    about: str
    build: Callable[[Shape], tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]]
    kernels: Callable[[Shape], tuple[Kernel, ...]]
    blocks: Callable[[Shape], list[Shape]]  # the shape with each legal block size that is worth trying
    module: str = ""  # a peer's package, from the extra `peers`


def row(size: int) -> int:
    """Returns the bytes of a bfloat16 row [size] on a TPU, which pads it to whole registers of 128 lanes."""
    return -(-size // LANES) * LANES * BF16


# ---- arrays


def queries(shape: Shape) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((shape.H, shape.T, shape.D), jnp.bfloat16)


def inputs(shape: Shape) -> list[jax.ShapeDtypeStruct]:
    """Returns the shapes of q [H T D], k [K T D] and v [K T V]."""
    key, value = ((shape.key_heads, shape.T, size) for size in (shape.D, shape.values))
    return [queries(shape), jax.ShapeDtypeStruct(key, jnp.bfloat16), jax.ShapeDtypeStruct(value, jnp.bfloat16)]


def cotangent(shape: Shape) -> jax.ShapeDtypeStruct:
    """Returns the shape of do [H T V]."""
    return jax.ShapeDtypeStruct((shape.H, shape.T, shape.values), jnp.bfloat16)


def gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q, k, v, do: jax.vjp(attend, q, k, v)[1](do)


# ---- the walk


@dataclass(frozen=True)
class Walk:
    """The steps of a kernel in order: head, block of queries and block of keys, int [n] each."""

    head: np.ndarray
    query: np.ndarray
    key: np.ndarray

    def changes(self, *indices: np.ndarray) -> int:
        """Returns how often a block moves whose index is this tuple."""
        index = np.stack(indices)
        return 1 + int(np.any(np.diff(index, axis=1) != 0, axis=0).sum()) if index.shape[1] else 0

    def __len__(self) -> int:
        return len(self.head)


def walk(run: np.ndarray, heads: int, order: str) -> Walk:
    """Returns the steps where `run` (bool [Jq Jk]) holds, for each head; `order` names the loops, outermost first."""
    steps = np.broadcast_to(run, (heads, *run.shape))
    axes = ["hqk".index(axis) for axis in order]
    found = dict(zip(order, np.nonzero(steps.transpose(axes))))
    return Walk(found["h"], found["q"], found["k"])


def moved(shape: Shape, steps: Walk, **bytes_per_token: float) -> float:
    """Returns the bytes that move between HBM and VMEM along the steps.

    The keyword arguments are the bytes per token of arrays indexed by `query` (head, query block), `key` (key head, key
    block), `query_ids` (query block) and `key_ids` (key block).
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
    """Returns the FLOPs of the visible pairs. `products` has a letter per product: D for q k^T, V for p v."""
    sizes = {"D": shape.D, "V": shape.values}
    return 2.0 * shape.pairs() * shape.H * sum(sizes[size] for size in products)


def edges(shape: Shape) -> tuple[int, ...]:
    """Returns block sizes worth trying. Small ones pay for a step's overhead only if they skip more, or T is short."""
    small = shape.documents or isinstance(shape.mask, Window) or shape.T < 4096 or shape.T % 1024
    return (512, 1024, 2048) if small else (1024, 2048)


def sizes(
    shape: Shape, bT: Sequence[int], bS: Sequence[int], bC: Sequence[int | None] = (None,), bR: int | None = None
) -> list[Shape]:
    """Returns `shape` with every combination of these block sizes that divides it."""
    return [
        replace(shape, bT=t, bS=s, bC=c, bR=bR)
        for t in bT
        for s in bS
        for c in bC
        if shape.T % t == shape.T % s == 0 and (c is None or (s % c == 0 and c < s)) and (bR is None or t % bR == 0)
    ]
