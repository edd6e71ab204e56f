"""jax's `flash_attention` for TPUs (arXiv:2205.14135), from `jax.experimental.pallas.ops.tpu`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from longattn.aot.kernels.cases.kernel import (
    F32,
    LANES,
    SUBLANES,
    Branch,
    Case,
    Kernel,
    cotangent,
    edges,
    flops,
    gradients,
    inputs,
    moved,
    row,
    sizes,
    walk,
)
from longattn.aot.kernels.cases.shape import Shape
from longattn.mask import Causal, Full


def _attend(shape: Shape) -> Callable[..., Any]:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    if shape.mask not in (Causal(), Full()):
        raise NotImplementedError(f"jax_flash knows Causal() and Full() only, mask is {shape.mask}")
    if shape.key_heads != shape.H:
        raise NotImplementedError(f"jax_flash wants as many key heads as heads, K={shape.K} of H={shape.H}")
    if shape.values != shape.D:
        raise NotImplementedError(f"jax_flash wants values as wide as keys, V={shape.V} and D={shape.D}")
    bT, bS, bC = shape.bT, shape.bS, shape.compute
    if bS == shape.T:
        raise NotImplementedError(f"bS={bS} must be less than T={shape.T}: jax_flash has another kernel for one block")
    sizes = flash.BlockSizes(
        block_q=bT, block_k_major=bS, block_k=bC, block_b=1,
        block_q_major_dkv=bT, block_k_major_dkv=bS, block_k_dkv=bC, block_q_dkv=bT,
        block_k_major_dq=bS, block_k_dq=bC, block_q_dq=bT,
    )  # fmt: skip
    ids = shape.segment_ids()[None] if shape.documents else None
    segments = None if ids is None else flash.SegmentIds(q=ids, kv=ids)
    return lambda q, k, v: flash.flash_attention(
        q, k, v, segment_ids=segments, causal=shape.mask == Causal(), sm_scale=shape.D**-0.5, block_sizes=sizes
    )


def _batched(arrays: list[jax.ShapeDtypeStruct]) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((1, *a.shape), a.dtype) for a in arrays]


def _branches(shape: Shape, rows: int) -> tuple[Branch, ...]:
    visible = (Branch("visible block", int(shape.visible().sum()) * shape.H),) if shape.mask == Causal() else ()
    return (Branch("first of a row", rows * shape.H), *visible, Branch("last of a row", rows * shape.H))


def _ids(shape: Shape) -> dict[str, float]:
    """Returns the bytes per token of segment ids: along rows broadcast over the lanes, along columns over sublanes."""
    return {"query_ids": LANES * F32, "key_ids": SUBLANES * F32} if shape.documents else {}


def _forward(shape: Shape) -> tuple[Kernel, ...]:
    Jq, Jk = shape.blocks
    token = row(shape.D)
    steps = walk(shape.visible(), shape.H, "hqk")
    return (
        Kernel(
            "flash_attention", Jq * Jk * shape.H, _branches(shape, Jq), flops(shape, "DV"),
            moved(shape, steps, query=2 * token, key=2 * token, **_ids(shape)),
        ),
    )  # fmt: skip


def _backward(shape: Shape) -> tuple[Kernel, ...]:
    Jq, Jk = shape.blocks
    token, statistic = row(shape.D), LANES * F32
    by_query, by_key = (walk(shape.visible(), shape.H, order) for order in ("hqk", "hkq"))
    n = Jq * Jk * shape.H
    # In the pass of dk and dv, the index maps of q, do and di give block 0 at hidden blocks; those of l and m do not.
    steps = walk(np.ones_like(shape.visible()), shape.H, "hkq")
    queried = np.where(shape.visible()[steps.query, steps.key], steps.query, 0)
    by_pass = steps.changes(steps.head, queried) * (2 * token + statistic) + len(steps) * 2 * statistic
    return (
        Kernel(  # q, do, dq; row sum, row maximum, di
            "flash_mha_bwd_dq", n, _branches(shape, Jq), flops(shape, "DVD"),
            moved(shape, by_query, query=3 * token + 3 * statistic, key=2 * token, **_ids(shape)),
        ),
        Kernel(  # q, do and the statistics; k, v, dk, dv
            "flash_mha_bwd_dkv", n, _branches(shape, Jk), flops(shape, "DVVD"),
            shape.bT * by_pass + moved(shape, by_key, key=4 * token, **_ids(shape)),
        ),
    )  # fmt: skip


def _blocks(shape: Shape) -> list[Shape]:
    tried = sizes(shape, edges(shape), edges(shape), (None, 512, 1024))
    return [s for s in tried if s.bS < s.T]


FORWARD = Case("jax flash, forward", lambda s: (_attend(s), _batched(inputs(s))), _forward, _blocks)
BACKWARD = Case(
    "jax flash, dq and dk, dv",
    lambda s: (gradients(_attend(s)), _batched([*inputs(s), cotangent(s)])),
    _backward,
    _blocks,
)
