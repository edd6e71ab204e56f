"""Named Pallas kernels for `longattn profile --static gpu`: the function, its shapes, and its kernels by name.

Peers: jax's `attention_mgpu` (`jax.experimental.pallas.ops.gpu`), after FlashAttention-3 (arXiv:2407.08608).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longattn.mask import Causal, Full, Mask


@dataclass(frozen=True)
class Shape:
    """What a case is built for. Queries and keys have equal lengths and heads."""

    T: int = 8192  # queries, and keys; `matmul`: the edge of its square matrices
    H: int = 8  # heads (not read by `matmul`)
    D: int = 128  # head size (not read by `matmul`)
    mask: Mask = Causal()  # an expression such as "Full()" (not read by `matmul`)
    bT: int | None = None  # block of queries of one warpgroup; `matmul`: of rows; None: the case's own
    bS: int | None = None  # block of keys; `matmul`: of columns; None: the case's own
    stages: int | None = None  # blocks of keys (`matmul`: of the summed dimension) in flight; None: the case's own

    def __post_init__(self) -> None:
        for name in ("T", "H", "D"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("bT", "bS"):
            size = getattr(self, name)
            if size is not None and (size < 64 or size % 64 or self.T % size):
                raise ValueError(f"{name}={size} must be a multiple of 64 that divides T={self.T}")
        if self.stages is not None and self.stages < 2:
            raise ValueError(f"stages={self.stages} must be at least 2: one is computed while the next is fetched")


@dataclass(frozen=True)
class Blocks:
    """The tuning of a case, complete."""

    bT: int
    bS: int
    stages: int

    def of(self, shape: Shape) -> Blocks:
        """These, save where `shape` names others."""
        return Blocks(*(getattr(shape, n) or getattr(self, n) for n in ("bT", "bS", "stages")))


@dataclass(frozen=True)
class Case:
    """A function and the Pallas kernels that it holds.

    `build` takes the shape, the blocks and the arrays' dtype, and gives the function and its arguments' shapes. It
    raises NotImplementedError for what the kernel cannot do.
    """

    about: str
    build: Callable[[Shape, Blocks, Any], tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]]
    kernels: tuple[str, ...]  # what its Pallas kernels are, in the order of their lowering
    blocks: Blocks
    dtype: str = "bfloat16"


# ---- a plain product: what the method is checked on

_SUMMED = 64  # of the summed dimension in one step: 128 bytes, the widest swizzle
_ROWS, _DEPTH = 64, 16  # of one wgmma instruction of 16-bit numbers (PTX ISA, "wgmma.mma_async")


def _matmul(shape: Shape, blocks: Blocks, dtype: Any) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    """A product by one warpgroup, with nothing in it that the compiler could unroll or repeat."""
    if shape.T % blocks.bT or shape.T % blocks.bS or _SUMMED * blocks.stages > shape.T:
        raise ValueError(f"{blocks} must divide T={shape.T}, which must be at least {_SUMMED} times the stages")
    steps = shape.T // _SUMMED
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

    def matmul(
        a_ref,  # [T T]
        b_ref,  # [T T]
        out_ref,  # [T T]
        a_block,  # [stages bT 64], shared memory
        b_block,  # [stages 64 bS], shared memory
        out_block,  # [bT bS], shared memory
        filled,  # [stages], barriers
    ):
        rows = pl.ds(lax.axis_index("row") * blocks.bT, blocks.bT)
        columns = pl.ds(lax.axis_index("column") * blocks.bS, blocks.bS)

        def fetch(step, slot):
            summed = pl.ds(step * _SUMMED, _SUMMED)
            plgpu.copy_gmem_to_smem(a_ref.at[rows, summed], a_block.at[slot], filled.at[slot])
            plgpu.copy_gmem_to_smem(b_ref.at[summed, columns], b_block.at[slot], filled.at[slot])

        for slot in range(blocks.stages):
            fetch(slot, slot)

        def add_up(sum_ref):
            @pl.loop(0, steps)
            def _(step):
                slot = lax.rem(step, jnp.int32(blocks.stages))
                plgpu.barrier_wait(filled.at[slot])
                plgpu.wgmma(sum_ref, a_block.at[slot], b_block.at[slot])
                plgpu.wgmma_wait(0)  # the slot is read until then

                @pl.when(step + blocks.stages < steps)
                def _():
                    fetch(step + blocks.stages, slot)

            return sum_ref[...]

        out_block[...] = pl.run_scoped(add_up, plgpu.ACC((blocks.bT, blocks.bS), jnp.float32)).astype(dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_block, out_ref.at[rows, columns])
        plgpu.wait_smem_to_gmem(0)

    square = jax.ShapeDtypeStruct((shape.T, shape.T), dtype)
    call = plgpu.kernel(
        matmul,
        out_type=square,
        scratch_types={
            "a_block": plgpu.SMEM((blocks.stages, blocks.bT, _SUMMED), dtype, transforms=tiled),
            "b_block": plgpu.SMEM((blocks.stages, _SUMMED, blocks.bS), dtype, transforms=tiled),
            "out_block": plgpu.SMEM((blocks.bT, blocks.bS), dtype, transforms=tiled),
            "filled": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
        },
        grid=(shape.T // blocks.bT, shape.T // blocks.bS),
        grid_names=("row", "column"),
    )
    return call, [square, square]


# ---- attention


def _arrays(shape: Shape, n: int, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((1, shape.T, shape.H, shape.D), dtype)] * n


def _gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q, k, v, do: jax.vjp(attend, q, k, v)[1](do)


def _jax_mgpu(shape: Shape, blocks: Blocks) -> Callable[..., Any]:
    from jax.experimental.pallas.ops.gpu import attention_mgpu as mgpu

    if shape.mask not in (Causal(), Full()):
        raise NotImplementedError(f"jax_mgpu knows Causal() and Full() only, mask is {shape.mask}")
    config = mgpu.TuningConfig(
        block_q=blocks.bT, block_kv=blocks.bS, max_concurrent_steps=blocks.stages, causal=shape.mask == Causal(),
        block_q_dq=blocks.bT, block_kv_dq=blocks.bS, block_q_dkv=blocks.bT, block_kv_dkv=blocks.bS,
    )  # fmt: skip
    return lambda q, k, v: mgpu.attention(q, k, v, config)


CASES: dict[str, Case] = {
    "matmul": Case(
        "a plain product by one warpgroup, whose instructions can be counted by hand (sm_90a)",
        _matmul,
        ("matmul",),
        Blocks(128, 128, 4),
    ),
    "jax_mgpu": Case(
        "jax's FlashAttention-3 on Mosaic GPU (float16 only, sm_90a)",
        lambda shape, blocks, dtype: (_jax_mgpu(shape, blocks), _arrays(shape, 3, dtype)),
        ("forward",),
        Blocks(64, 128, 2),
        "float16",
    ),
    "jax_mgpu_backward": Case(
        "its forward with statistics and its backward (float16, Full() only)",
        lambda shape, blocks, dtype: (_gradients(_jax_mgpu(shape, blocks)), _arrays(shape, 4, dtype)),
        ("forward with lse", "dk and dv", "dq"),
        Blocks(64, 64, 2),
        "float16",
    ),
}
