"""jax's `splash_attention` for TPUs, from `jax.experimental.pallas.ops.tpu`; its backward pass in one kernel or in two.

The grid leaves out blocks that the mask hides, down to the length of the longest row, except when the backward pass is
one kernel. Segment ids are compared at every step and hide no block.
"""

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
from longattn.mask import Causal, Full, Window


def _attend(shape: Shape, fused: bool = True, backward: bool = False) -> Callable[..., Any]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    if shape.bS == shape.T:
        raise NotImplementedError(f"bS={shape.bS} must be less than T={shape.T}: of one block the branches fall away")
    mask = static_mask(masks, shape, "jax_splash")
    of_dq = {} if fused else {"block_q_dq": shape.bT, "block_kv_dq": shape.bS}
    sizes = splash.BlockSizes(
        block_q=shape.bT, block_kv=shape.bS, block_kv_compute=shape.compute,
        block_q_dkv=shape.bT, block_kv_dkv=shape.bS, block_kv_dkv_compute=shape.compute, use_fused_bwd_kernel=fused,
        k_layout=splash.QKVLayout.HEAD_DIM_MINOR if backward else splash.QKVLayout.SEQ_MINOR, **of_dq,
    )  # fmt: skip
    make = lambda: splash.make_splash_mha(
        masks.MultiHeadMask([mask] * shape.H), block_sizes=sizes, head_shards=1, q_seq_shards=1
    )
    return bound(make, splash, shape)


def static_mask(masks: Any, shape: Shape, case: str) -> Any:
    """Returns the shape's mask as a class of `masks`, jax's module or tokamax's, which grew from it.

    Raises NotImplementedError for a mask that the case does not build.
    """
    edge = (shape.T, shape.T)
    if shape.mask == Causal():
        return masks.CausalMask(edge)
    if shape.mask == Full():
        return masks.FullMask(edge)
    if isinstance(shape.mask, Window):
        return masks.LocalMask(edge, (shape.mask.left, shape.mask.right), 0)
    raise NotImplementedError(f"{case} is built for Causal(), Full() and Window(n), mask is {shape.mask}")


def bound(make: Callable[[], Any], splash: Any, shape: Shape) -> Callable[..., Any]:
    """Returns the kernel of `make` as a function of q, k and v, with the mask's metadata and the ids as constants."""
    with jax.default_device(jax.devices("cpu")[0]):  # the metadata are arrays
        kernel = make()
    kernel = jax.tree.map(np.asarray, kernel)  # so that they are on no device
    ids = splash.SegmentIds(shape.segment_ids(), shape.segment_ids()) if shape.documents else None
    return lambda q, k, v: kernel(q, k, v, ids)


def numbers(shape: Shape, rows: str) -> dict[str, float]:
    """Returns the bytes per token of positions, which the mask is computed from, and of segment ids.

    Those along rows are broadcast over the lanes, those along columns over the sublanes.
    """
    query, key = (LANES, SUBLANES) if rows == "query" else (SUBLANES, LANES)
    per_query = (shape.mask != Full()) + bool(shape.documents)
    return {"query_ids": per_query * query * F32, "key_ids": bool(shape.documents) * key * F32}


def _forward(shape: Shape) -> tuple[Kernel, ...]:
    return (_by_query(shape, "splash_mha_fwd", "DV", query=row(shape.D) + row(shape.values)),)


def _by_query(shape: Shape, name: str, products: str, query: float) -> Kernel:
    visible = shape.visible()
    rows, n = shape.blocks[0] * shape.H, int(visible.sum()) * shape.H
    return Kernel(
        name,
        rows * int(visible.sum(1).max()),
        (Branch("first of a row", rows), Branch("visible block", n), Branch("last of a row", rows)),
        flops(shape, products),
        moved(shape, walk(visible, shape.H, "hqk"), query=query, key=row(shape.D) + row(shape.values),
              **numbers(shape, "query")),
    )  # fmt: skip


def _by_key(shape: Shape, products: str, width: int, every_step: float) -> Kernel:
    """Returns the kernel of dk and dv, with `width` steps per row. Even a hidden step writes `every_step` bytes."""
    visible = shape.visible()
    rows, steps = shape.blocks[1] * shape.key_heads, shape.blocks[1] * shape.H * width
    token, statistic = row(shape.D) + row(shape.values), SUBLANES * F32
    return Kernel(
        "splash_mha_dkv",
        steps,
        (
            Branch("first of a row", rows),
            Branch("visible block", int(visible.sum()) * shape.H),
            Branch("last of a row", rows),
        ),
        flops(shape, products),
        moved(shape, walk(visible, shape.H, "khq"), query=token + 2 * statistic, key=2 * token, **numbers(shape, "key"))
        + steps * every_step,
        after_bytes=steps * every_step,
    )


def _fused(shape: Shape) -> tuple[Kernel, ...]:
    # It writes a partial dq per key block, which XLA sums, so no step can be skipped.
    return (_by_key(shape, "DVVDD", shape.blocks[0], shape.bT * row(shape.D)),)


def _unfused(shape: Shape) -> tuple[Kernel, ...]:
    query = 2 * row(shape.D) + row(shape.values) + 2 * F32  # q, dq, do; lse, di
    widest = int(shape.visible().sum(0).max())
    return (_by_query(shape, "splash_mha_dq", "DVD", query), _by_key(shape, "DVVD", widest, 0))


def _blocks(shape: Shape) -> list[Shape]:
    return sizes(shape, edges(shape), edges(shape), (256, 512, 1024))


def backward_blocks(shape: Shape) -> list[Shape]:
    return sizes(shape, edges(shape), edges(shape), (None, 512))


def _backward(fused: bool) -> Callable[[Shape], tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]]:
    return lambda s: (gradients(_attend(s, fused, backward=True)), [*inputs(s), cotangent(s)])


FORWARD = Case("jax splash, forward", lambda s: (_attend(s), inputs(s)), _forward, _blocks)
FUSED = Case("jax splash, dq, dk, dv in one kernel", _backward(True), _fused, backward_blocks)
UNFUSED = Case("jax splash, dq and dk, dv in two kernels", _backward(False), _unfused, backward_blocks)
