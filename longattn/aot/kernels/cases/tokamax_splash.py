"""tokamax's `splash_attention` for TPUs (tokamax._src.ops.experimental), forward and fused backward.

Its forward grid has the visible blocks, its backward grid all blocks; at run time, segment ids remove more. Blocks that
the mask does not cut are computed without it. The settings are the cheapest of those compared: its own instruction
scheduler, and keys [K D T] in the forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from longattn.aot.kernels.cases.jax_splash import backward_blocks, bound, numbers, static_mask
from longattn.aot.kernels.cases.kernel import (
    F32,
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
from longattn.mask import FULL, Full


def _attend(shape: Shape, backward: bool = False) -> Callable[..., Any]:
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_kernel as splash
    from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask as masks

    mask = static_mask(masks, shape, "tokamax_splash")
    config = splash.SplashConfig(
        block_q=shape.bT, block_kv=shape.bS, block_kv_compute=shape.compute,
        block_q_dkv=shape.bT, block_kv_dkv=shape.bS, block_kv_dkv_compute=shape.compute,
        k_layout=splash.QKVLayout.HEAD_DIM_MINOR if backward else splash.QKVLayout.SEQ_MINOR,
        use_experimental_scheduler=True,
    )  # fmt: skip
    return bound(lambda: splash.make_splash_mha_single_device(mask, config=config), splash, shape)


def _run(shape: Shape) -> tuple[np.ndarray, tuple[Branch, ...]]:
    """Returns the blocks that are computed, bool [Jq Jk], and the branches that compute them."""
    run = shape.visible() & shape.share_a_document()
    whole = int((run & (shape.kinds() == FULL)).sum()) * shape.H
    cut = int(run.sum()) * shape.H - whole
    if shape.mask == Full() and not shape.documents:  # the mask is never looked up
        return run, ()
    return run, (Branch("whole block", whole), Branch("block that the mask cuts", cut))


def _forward(shape: Shape) -> tuple[Kernel, ...]:
    run, blocks = _run(shape)
    rows, token = shape.blocks[0] * shape.H, row(shape.D) + row(shape.values)
    return (
        Kernel(
            "splash_mha_fwd",
            int(run.sum()) * shape.H,
            (Branch("first of a row", rows), *blocks, Branch("last of a row", rows)),
            flops(shape, "DV"),
            moved(shape, walk(run, shape.H, "hqk"), query=token, key=token, **numbers(shape, "query")),
            dynamic=True,
        ),
    )


def _backward(shape: Shape) -> tuple[Kernel, ...]:
    run, blocks = _run(shape)
    (Jq, Jk), n = shape.blocks, int(run.sum()) * shape.H
    token, statistic = row(shape.D) + row(shape.values), SUBLANES * F32
    dq = shape.bT * row(shape.D)  # in bfloat16
    if not shape.documents:  # each step writes a partial dq for XLA to sum, in float32 if there are many
        rows, steps = Jk * shape.key_heads, Jk * Jq * shape.H
        every_step = steps * dq * (2 if Jk > 4 else 1)
        order = "khq"
    elif shape.key_heads == shape.H:  # dq is read and written at every step
        rows, steps, every_step = Jk * shape.H, n, n * dq * 2
        order = "hkq"
    else:
        raise NotImplementedError("tokamax_splash_backward with fewer key heads and documents has branches of its own")
    return (
        Kernel(
            "splash_mha_dkv",
            steps,
            # With at most two blocks of queries it writes its results at every step, without a branch.
            (
                Branch("first of a row", rows),
                *blocks,
                *([Branch("last of a row", rows)] if shape.documents or Jq > 2 else []),
            ),
            flops(shape, "DVVDD"),
            moved(shape, walk(run, shape.H, order), query=token + 2 * statistic, key=2 * token, **numbers(shape, "key"))
            + every_step,
            after_bytes=0.0 if shape.documents else every_step,
            dynamic=bool(shape.documents),
        ),
    )


def _blocks(shape: Shape) -> list[Shape]:
    return sizes(shape, edges(shape), edges(shape), (256, 512))


FORWARD = Case("tokamax splash, forward", lambda s: (_attend(s), inputs(s)), _forward, _blocks, "tokamax")
BACKWARD = Case(
    "tokamax splash, dq, dk, dv in one kernel",
    lambda s: (gradients(_attend(s, backward=True)), [*inputs(s), cotangent(s)]),
    _backward,
    backward_blocks,
    "tokamax",
)
