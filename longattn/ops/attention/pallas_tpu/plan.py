"""The plan of a call: what its two kernels are compiled for, and what is refused.

Refused, each with the reason: float16 and float64; a mask with several BlockSparse, with blocks that are no multiple of
128, or at given positions; heads whose blocks do not fit fast memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np

from longattn.ops import dispatch
from longattn.ops.attention.contract import Options, Visibility
from longattn.ops.attention.pallas_tpu import blocks
from longattn.ops.attention.pallas_tpu.call import LANES, Call
from longattn.ops.attention.pallas_tpu.tuning import Blocks, Pass, Tuning, choose, limit
from longattn.shapes import Shaped


@dataclass(frozen=True)
class Plan:
    forward: Call
    backward: Call


def bias_dtype(bias: Shaped) -> np.dtype:
    """Returns the dtype in which the kernels read a bias: float32 for one row of it, which is small."""
    return jnp.dtype(jnp.bfloat16 if bias.dtype == jnp.bfloat16 and bias.shape[2] > 1 else jnp.float32)


def make_plan(q: Shaped, k: Shaped, v: Shaped, bias: Shaped, visibility: Visibility, options: Options) -> Plan | None:
    """Returns the plan of a call, or None where an array is empty and no kernel runs.

    Raises:
      NotImplementedError: with the reason, where the kernels cannot serve the call.
    """
    dispatch.require_tpu(q.dtype)
    mask = visibility.mask
    if visibility.read:
        raise NotImplementedError("a function of the mask reads a traced array, which a kernel cannot")
    if sum(leaf.ndim == 4 for leaf in jax.tree.leaves(mask)) > 1:
        raise NotImplementedError(f"the mask {mask} has more than one BlockSparse")
    if (sparse := blocks.block_sparse(mask)) is not None:
        if sparse.block_size % LANES:
            raise NotImplementedError(f"BlockSparse.block_size={sparse.block_size} is no multiple of {LANES}")
        if not options.in_order:
            raise NotImplementedError("a BlockSparse is read at positions in order, not at given ones")
    if not min(*q.shape, *k.shape, *v.shape):
        return None
    arguments = q, k, v, bias, visibility, options
    return Plan(_call("forward", *arguments), _call("backward", *arguments))


def _call(which: Pass, q: Shaped, k: Shaped, v: Shaped, bias: Shaped, visibility: Visibility, options: Options) -> Call:
    (T, H, D), (S, K), V = q.shape[1:], k.shape[1:3], v.shape[3]
    mask, leaves = visibility.mask, jax.tree.leaves(visibility.mask)
    numbers = (() if options.in_order else ("positions",)) + (() if visibility.q_segments is None else ("segments",))
    has_bias = bias is not None and bias.shape[3] > 1  # otherwise it is added to lse
    bias_bytes = bias_dtype(bias).itemsize if has_bias and bias.shape[2] > 1 else 0
    sizes = getattr(options.tuning or Tuning(), which)
    sizes = sizes or choose(which, mask, numbers, T, S, D, V, q.dtype.itemsize, bias_bytes)
    if (sparse := blocks.block_sparse(mask)) is not None:
        sizes = _within_blocks(sizes, sparse.block_size)
    patterns = None
    if not numbers and not leaves:
        patterns = blocks.patterns(mask, sizes.block_q, sizes.block_k, sizes.tile_q, sizes.tile_k, T, S)
    if patterns is None and sizes.tiles > blocks.NUMBER + 1:
        raise NotImplementedError(
            f"{sizes} has {sizes.tiles} tiles to a block, of which a list can name {blocks.NUMBER + 1}"
        )
    share = 1.0 if not options.in_order or leaves else blocks.share(mask, sizes.block_q, sizes.block_k, T, S)
    return Call(
        H, K, T, S, D, V, sizes.block_q, sizes.block_k, sizes.tile_q, sizes.tile_k, options.scale, options.softcap,
        numbers, patterns, jax.tree.structure(mask), next((i for i, leaf in enumerate(leaves) if leaf.ndim == 4), None),
        has_bias, share, limit(which, sizes, D, V, q.dtype.itemsize, len(numbers), bias_bytes),
    )  # fmt: skip


def _within_blocks(sizes: Blocks, block_size: int) -> Blocks:
    """Returns the sizes with tiles that divide a BlockSparse's blocks, so that such a mask never cuts a tile."""
    return replace(sizes, tile_q=math.gcd(sizes.tile_q, block_size), tile_k=math.gcd(sizes.tile_k, block_size))
