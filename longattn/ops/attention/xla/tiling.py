"""How q, k and v are cut into tiles, and put together again.

The outer loop walks over groups of sequences and key/value heads. A tile of logits has the axes [B K S R]: the B
sequences and K heads of one group, S = block_k keys, and R = G * block_q rows, one for each query of the G query heads
that share a key/value head. In this package's einsum strings B, K, S and R are these sizes of a tile.

Tiles are transposed, keys before queries: reductions over keys then run along vectors, the statistics of a row are
contiguous, and every product has one of the two forms (NN, NT) that CPU libraries run fastest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

from longattn import shapes
from longattn.mask import Mask
from longattn.ops import dispatch
from longattn.ops.attention.contract import Options, Visibility
from longattn.shapes import Shaped


@dataclass(frozen=True)
class Tuning:
    """Tile sizes. They change the result by rounding only."""

    block_q: int = 256  # queries of a tile
    block_k: int = 256  # keys of a tile
    heads: int | None = None  # key/value heads computed at once, a divisor of K; None is all

    def __post_init__(self) -> None:
        if self.block_q < 1 or self.block_k < 1 or (self.heads is not None and self.heads < 1):
            raise ValueError(f"{self} must have sizes of at least 1")


def default_tuning(B: int, T: int, S: int, K: int, G: int) -> Tuning:
    """Returns tiles of 256 x 256 over as many heads as keep B sequences' logits to 2**19; 512 x 512 for few heads.

    With fewer logits a step spends its time waking threads. With more it waits for memory, and a larger tile computes
    more of what the mask hides.
    """
    few = max(B, 1) * K * G <= 2 and min(T, S) >= 2048
    block_q, block_k = (max(min(512 if few else 256, x), 1) for x in (T, S))
    fit = max(2**19 // (max(B, 1) * G * block_q * block_k), 1)
    return Tuning(block_q, block_k, max(h for h in range(1, K + 1) if K % h == 0 and h <= fit))


class Layout(NamedTuple):
    """The plan of a call: static sizes and dtypes."""

    batch_groups: int  # groups of sequences
    head_groups: int  # groups of heads
    B: int  # sequences in a group
    T: int
    S: int
    K: int  # key/value heads in a group
    G: int
    D: int
    V: int
    Jq: int  # tiles along the queries
    Jk: int  # tiles along the keys
    block_q: int
    block_k: int
    operand: DTypeLike  # dtype of the products' operands
    dtype: DTypeLike  # dtype of statistics and accumulators

    @property
    def tile(self) -> tuple[int, ...]:
        """Shape of a tile of logits with its rows split into heads and queries."""
        return self.B, self.K, self.block_k, self.G, self.block_q


def make_layout(q: Shaped, k: Shaped, v: Shaped, options: Options) -> Layout:
    """Returns the layout of a call, from shapes and dtypes alone."""
    (B, T, H, D), (S, K), V = q.shape, k.shape[1:3], v.shape[3]
    # Short sequences share a tile, so that no step of the loop is too small. Long ones do not: each visits only the
    # tiles that its own segments show.
    fit = 2**17 // max(H * T * S, 1) if max(T, S) <= 256 else 1
    together = max(b for b in range(1, max(B, 1) + 1) if max(B, 1) % b == 0 and (b == 1 or b <= fit))
    tuning = options.tuning or default_tuning(together, T, S, K, H // K)
    block_q, block_k, heads = tuning.block_q, tuning.block_k, tuning.heads or K
    if K % heads:
        raise ValueError(f"{tuning}: heads must divide the {K=} key/value heads")
    dtype = shapes.statistics_dtype(q.dtype)
    # A CPU widens half-precision operands anyway, so there P keeps its precision too.
    operand = dtype if dispatch.target().platform == "cpu" else q.dtype
    J = -(-T // block_q), -(-S // block_k)
    return Layout(B // together, K // heads, together, T, S, heads, H // K, D, V, *J, block_q, block_k, operand, dtype)


# ---- arrays to tiles and back


def _tiles(x: Array, n: Layout, block: int, value: float = 0.0, edge: bool = False) -> Array:
    """[B T ...] -> [batch_groups J B block ...], padded with `value`, or with the last row where `edge`."""
    B, T = x.shape[:2]
    J = -(-T // block)
    pad = [(0, 0), (0, J * block - T)] + [(0, 0)] * (x.ndim - 2)
    if J * block > T:
        x = jnp.pad(x, pad, mode="edge") if edge else jnp.pad(x, pad, constant_values=value)
    together = min(n.B, B)
    return x.reshape(B // together, together, J, block, *x.shape[2:]).swapaxes(1, 2)


def _group(x: Array, n: Layout) -> Array:
    """[batch_groups J B (head_groups K) ...] -> [groups J B K ...], groups = (batch_groups head_groups)."""
    x = jnp.moveaxis(x.reshape(*x.shape[:3], n.head_groups, n.K, *x.shape[4:]), 3, 1)
    return x.reshape(-1, *x.shape[2:])


def _ungroup(x: Array, n: Layout) -> Array:
    """Inverts `_group`."""
    x = jnp.moveaxis(x.reshape(n.batch_groups, n.head_groups, *x.shape[1:]), 1, 3)
    return x.reshape(*x.shape[:3], n.head_groups * n.K, *x.shape[5:])


def query_tiles(x: Array, n: Layout, value: float = 0.0) -> Array:
    """[B T H ...] -> [groups Jq B K R ...], padded with `value`."""
    x = _tiles(x, n, n.block_q, value)
    x = x.reshape(*x.shape[:4], n.head_groups * n.K, n.G, *x.shape[5:])
    x = jnp.moveaxis(x, 3, 5)
    return _group(x.reshape(*x.shape[:4], n.G * n.block_q, *x.shape[6:]), n)


def queries_of(x: Array, n: Layout) -> Array:
    """[groups Jq B K R ...] -> [B T H ...]."""
    x = _ungroup(x, n)
    x = x.reshape(*x.shape[:4], n.G, n.block_q, *x.shape[5:])
    x = jnp.moveaxis(x, (2, 5), (1, 3))  # batch_groups B Jq block_q K G ...
    return x.reshape(n.batch_groups * n.B, n.Jq * n.block_q, n.head_groups * n.K * n.G, *x.shape[6:])[:, : n.T]


def key_tiles(x: Array, n: Layout) -> Array:
    """[B S K ...] -> [groups Jk B K block_k ...], padded with zeros."""
    return _group(jnp.moveaxis(_tiles(x, n, n.block_k), 3, 4), n)


def keys_of(x: Array, n: Layout) -> Array:
    """[groups Jk B K block_k D] -> [B S K D]."""
    x = jnp.moveaxis(_ungroup(x, n), (2, 4), (1, 3))  # batch_groups B Jk block_k K D
    return x.reshape(n.batch_groups * n.B, n.Jk * n.block_k, n.head_groups * n.K, x.shape[-1])[:, : n.S]


def at(x: Array, g: Array, j: Array) -> Array:
    """Returns tile j of group g of [groups J ...], or of the only group."""
    g = g if x.shape[0] > 1 else jnp.zeros_like(g)
    return lax.dynamic_slice(x, (g, j) + (jnp.zeros_like(g),) * (x.ndim - 2), (1, 1, *x.shape[2:]))[0, 0]


def add_at(x: Array, tile: Array, g: Array, j: Array) -> Array:
    """Returns x with x[g, j] += tile, in place inside a loop."""
    starts = (g, j) + (jnp.zeros_like(j),) * tile.ndim
    return lax.dynamic_update_slice(x, (at(x, g, j) + tile)[None, None], starts)


def filled(shape: tuple[int, ...], dtype: DTypeLike, like: Array, value: float = 0.0) -> Array:
    """Returns the first value of a loop carry, varying over the mesh axes that `like` varies over."""
    x = jnp.full(shape, value, dtype)
    axes = tuple(jax.typeof(like).manual_axis_type.varying)
    return lax.pcast(x, axes, to="varying") if axes else x


# ---- positions, segments and bias


class Side(NamedTuple):
    """Visibility and bias in tiles; positions and segments are [batch_groups|1 J B|1 block]."""

    mask: Mask
    q_positions: Array
    k_positions: Array
    q_segments: Array | None
    k_segments: Array | None
    bias: Array | None  # [#B #H #(Jq block_q) #(Jk block_k)]

    def mask_of(self, g: Array, n: Layout) -> Mask:
        """Returns the mask of group g: its leaves begin with the axis B, and with H where there is a second one."""

        def leaf(x: Array) -> Array:
            if n.batch_groups > 1 and x.shape[0] > 1:
                x = lax.dynamic_slice_in_dim(x, g // n.head_groups * n.B, n.B)
            if x.ndim > 1 and x.shape[1] > 1:
                x = lax.dynamic_slice_in_dim(x, g % n.head_groups * (n.K * n.G), n.K * n.G, axis=1)
            return x

        return jax.tree.map(leaf, self.mask)

    def bias_slice(self, g: Array, i: Array, j: Array, n: Layout) -> tuple[tuple[Array, ...], tuple[int, ...]]:
        """Returns starts and sizes of tile (i, j) in the bias."""
        assert self.bias is not None  # callers slice only a bias that is there
        firsts = (g // n.head_groups * n.B, g % n.head_groups * (n.K * n.G), i * n.block_q, j * n.block_k)
        sizes = (n.B, n.K * n.G, n.block_q, n.block_k)
        many = [size > 1 for size in self.bias.shape]
        starts = tuple(x if m else jnp.zeros_like(g) for x, m in zip(firsts, many))
        return starts, tuple(x if m else 1 for x, m in zip(sizes, many))


def make_side(bias: Array | None, visibility: Visibility, n: Layout) -> Side:
    """Returns visibility and bias cut into tiles; the bias is only padded."""

    def ids(x: Array | None, block: int) -> Array | None:
        return None if x is None else _tiles(x, n, block, edge=True)

    if bias is not None:
        T, S = n.Jq * n.block_q - n.T, n.Jk * n.block_k - n.S
        pads = [(0, 0), (0, 0), (0, T if bias.shape[2] > 1 else 0), (0, S if bias.shape[3] > 1 else 0)]
        bias = jnp.pad(bias, pads)
    return Side(
        visibility.rule,
        ids(visibility.q_positions, n.block_q),
        ids(visibility.k_positions, n.block_k),
        ids(visibility.q_segments, n.block_q),
        ids(visibility.k_segments, n.block_k),
        bias,
    )


# ---- the outer loop


def loop_index(n: Layout) -> tuple[Array, Array]:
    """Returns (group, tile of queries) of every step of the outer loop."""
    steps = jnp.arange(n.batch_groups * n.head_groups * n.Jq, dtype=jnp.int32)
    return steps // n.Jq, steps % n.Jq


def unstacked(x: Array, n: Layout) -> Array:
    """[(groups Jq) ...], as the outer loop stacked its results, -> [groups Jq ...]."""
    return x.reshape(-1, n.Jq, *x.shape[1:])
