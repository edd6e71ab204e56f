"""flywheel-tpu's forward kernel (flywheel_tpu.pallas.flash_fwd), which has loops of its own over the blocks.

Rows keep the maximum of their first block; if a sum overflows, a guard computes the block again. For blocks that the
mask cuts, the kernel has a copy of its body per distance from the diagonal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from longattn.aot.kernels.cases.kernel import Branch, Case, Kernel, edges, flops, inputs, moved, row, sizes, walk
from longattn.aot.kernels.cases.shape import Shape
from longattn.mask import FULL, PARTIAL, Causal, Full, Window

_COMPUTE = 256  # queries and keys of one product, if the shape names none


def _attend(shape: Shape) -> Callable[..., Any]:
    from flywheel_tpu.pallas import block_sizes, flash_fwd

    if not isinstance(shape.mask, Causal | Full | Window):
        raise NotImplementedError(f"flywheel is built for Causal(), Full() and Window(n), mask is {shape.mask}")
    if shape.documents:
        raise NotImplementedError("flywheel's other kernel, for packed documents, is not described here")
    kernel = flash_fwd.make_flash_attn_mha(
        shape.H, shape.T, shape.T,
        causal=shape.mask == Causal(),
        window=(shape.mask.left, shape.mask.right) if isinstance(shape.mask, Window) else None,
        block_sizes=block_sizes.BlockSizes(
            block_q=shape.bT, block_kv=shape.bS, block_kv_compute=shape.bC or _COMPUTE,
            block_q_compute=shape.bR or _COMPUTE,
        ),
        num_kv_heads=shape.key_heads,
        q_scale=math.log2(math.e) * shape.D**-0.5,
    )  # fmt: skip
    return lambda q, k, v: kernel(q, k, v)


def _kernels(shape: Shape) -> tuple[Kernel, ...]:
    kinds = shape.kinds()
    run = shape.visible()
    n, rows, token = int(run.sum()) * shape.H, shape.blocks[0] * shape.H, row(shape.D) + row(shape.values)
    computed = [b for what, runs in _copies(shape, kinds) for b in (Branch(what, runs), Branch("guard", runs, _GUARD))]
    if shape.mask == Full():  # one copy, at every step
        computed = computed[1:]
    return (
        Kernel(
            "flash_attn_mha_static_t1_guarded_fwd",
            n,
            (Branch("first of a row", rows), *computed, Branch("last of a row", rows)),
            flops(shape, "DV"),
            moved(shape, walk(run, shape.H, "hqk"), query=token, key=token),
            loops=(shape.H, rows, n),
        ),
    )


_GUARD = "_recover"  # name of the function under its `pl.when`


def _copies(shape: Shape, kinds: np.ndarray) -> list[tuple[str, int]]:
    """Returns the copies of the body in order, and how often each runs."""
    whole = [("whole block", int((kinds == FULL).sum()) * shape.H)]
    if shape.mask == Full():
        return whole
    cut = kinds == PARTIAL
    if shape.bT % shape.bS:
        return [*whole, ("block that the mask cuts", int(cut.sum()) * shape.H)]
    # Distances at which the mask cuts some block of an endless sequence.
    reach = shape.mask.left + shape.bS if isinstance(shape.mask, Window) else 0
    ahead = max(shape.mask.right, 0) if isinstance(shape.mask, Window) else 0
    offsets = np.arange(-(reach // shape.bS + 1), (shape.bT + ahead) // shape.bS + 1, dtype=np.int32) * shape.bS
    kind = np.asarray(shape.mask.kind(0, shape.bT - 1, offsets, offsets + shape.bS - 1))
    i, j = np.nonzero(cut)
    here = j * shape.bS - i * shape.bT
    return [
        *whole,
        *((f"block cut at {offset}", int((here == offset).sum()) * shape.H) for offset in offsets[kind == PARTIAL]),
    ]


def _blocks(shape: Shape) -> list[Shape]:
    tried = sizes(shape, edges(shape), edges(shape), (_COMPUTE,), _COMPUTE)
    return [s for s in tried if s.bT % s.bS == 0]  # else it masks every product of a cut block


FORWARD = Case("flywheel-tpu, forward", lambda s: (_attend(s), inputs(s)), _kernels, _blocks, "flywheel_tpu")
