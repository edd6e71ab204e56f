"""Named Pallas kernels for `longattn profile kernel --target gpu`: the function, its shapes, its blocks.

Peers: jax's `attention_mgpu` (`jax.experimental.pallas.ops.gpu`), after FlashAttention-3 (arXiv:2407.08608), and
tokamax's attention on Mosaic GPU (github.com/openxla/tokamax).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from longattn.mask import Causal, Full, Mask, Window


@dataclass(frozen=True)
class Shape:
    """The shape of a case. Queries and keys have equal lengths and heads."""

    T: int = 8192  # queries and keys; `matmul`: the edge of its square matrices
    H: int = 8  # heads (`matmul` ignores it)
    D: int = 128  # head size (`matmul` ignores it)
    mask: Mask = Causal()  # an expression such as "Full()" (`matmul` ignores it)
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
    """The complete tuning of a case."""

    bT: int
    bS: int
    stages: int


@dataclass(frozen=True)
class Case:
    """A function that holds Pallas kernels.

    `build` takes the shape, the blocks, the arrays' dtype and the instruction set ("sm_90a"), and returns the function
    and its arguments' shapes. It raises NotImplementedError for what the kernel cannot do.
    """

    about: str
    build: Callable[[Shape, Blocks | None, Any, str], tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]]
    blocks: Blocks | None  # None: the library chooses, and does not report them
    dtype: str = "bfloat16"

    def blocks_of(self, shape: Shape) -> Blocks | None:
        """Returns the case's blocks, replaced where `shape` names others."""
        named = {n: size for n in ("bT", "bS", "stages") if (size := getattr(shape, n)) is not None}
        if self.blocks is None and named:
            raise NotImplementedError(f"the case chooses its blocks itself, and takes no {', '.join(named)}")
        return self.blocks and replace(self.blocks, **named)


# ---- a plain product, to check the method. One warpgroup computes one tile in one loop, so that instructions can be
# counted by hand: at T=4096 the compilers unroll nothing (on sm_80 they do unroll 8 steps).

_SUMMED = 64  # elements of the summed dimension per step: 128 bytes, the widest swizzle
_TILED = (plgpu.TilingTransform((8, _SUMMED)), plgpu.SwizzleTransform(128))


def _matmul(
    shape: Shape, blocks: Blocks | None, dtype: Any, arch: str
) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    assert blocks is not None  # the case has blocks
    for name in ("bT", "bS"):
        if shape.T % getattr(blocks, name):
            raise ValueError(f"{name}={getattr(blocks, name)} must divide T={shape.T}")
    if (least := _SUMMED * blocks.stages) > shape.T:
        raise ValueError(f"T={shape.T} must be at least {least}, {_SUMMED} for each of the stages")
    multiply, scratch = {"sm_80": _ampere, "sm_90a": _hopper, "sm_100a": _blackwell}[arch](blocks, dtype)

    def matmul(
        a_ref,  # [T T]
        b_ref,  # [T T]
        out_ref,  # [T T]
        a_block,  # [stages bT 64], shared memory
        b_block,  # [stages 64 bS], shared memory
        **scratch_refs,
    ):
        rows = pl.ds(lax.axis_index("row") * blocks.bT, blocks.bT)
        columns = pl.ds(lax.axis_index("column") * blocks.bS, blocks.bS)

        def fetch(step, slot, *barrier, **options):
            summed = pl.ds(step * _SUMMED, _SUMMED)
            plgpu.copy_gmem_to_smem(a_ref.at[rows, summed], a_block.at[slot], *barrier, **options)
            plgpu.copy_gmem_to_smem(b_ref.at[summed, columns], b_block.at[slot], *barrier, **options)

        multiply(shape.T // _SUMMED, fetch, a_block, b_block, out_ref.at[rows, columns], **scratch_refs)

    square = jax.ShapeDtypeStruct((shape.T, shape.T), dtype)
    call = plgpu.kernel(
        matmul,
        out_type=square,
        scratch_types={
            "a_block": plgpu.SMEM((blocks.stages, blocks.bT, _SUMMED), dtype, transforms=_TILED),
            "b_block": plgpu.SMEM((blocks.stages, _SUMMED, blocks.bS), dtype, transforms=_TILED),
            **scratch,
        },
        grid=(shape.T // blocks.bT, shape.T // blocks.bS),
        grid_names=("row", "column"),
    )
    return call, [square, square]


def _ampere(blocks: Blocks, dtype: Any) -> tuple[Callable[..., None], dict[str, Any]]:
    """Each thread copies; each warp multiplies from its registers."""
    layouts = plgpu.Layout

    def multiply(steps, fetch, a_block, b_block, out_ref):
        ahead = blocks.stages - 1

        def fetch_in_order(step, slot):
            fetch(step, slot, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)

        for slot in range(ahead):
            fetch_in_order(slot, slot)

        def add(step, sums):
            plgpu.wait_gmem_to_smem(2 * (ahead - 1))  # copies in flight, two for each step
            # The last steps fetch blocks that no step reads: a wait counts copies, so their number must not change.
            fetch_in_order(lax.rem(step + ahead, steps), lax.rem(step + ahead, blocks.stages))
            slot = lax.rem(step, blocks.stages)
            a = plgpu.load(a_block.at[slot], layout=layouts.MMA_LHS(dtype))
            b = plgpu.load(b_block.at[slot], layout=layouts.MMA_RHS(dtype))
            return plgpu.mma(sums, a, b)

        zeros = plgpu.layout_cast(jnp.zeros((blocks.bT, blocks.bS), jnp.float32), layouts.MMA_ACC(dtype))
        sums = lax.fori_loop(0, steps, add, zeros)
        plgpu.wait_gmem_to_smem(0)
        plgpu.store(out_ref, sums.astype(dtype), optimized=False)

    return multiply, {}


def _leave(block: Any, ref: Any) -> None:
    """Copies a block from shared memory to its place in `ref`."""
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(block, ref)
    plgpu.wait_smem_to_gmem(0)


def _hopper(blocks: Blocks, dtype: Any) -> tuple[Callable[..., None], dict[str, Any]]:
    """The copy engine copies; the warpgroup multiplies from shared memory into its registers."""

    def multiply(steps, fetch, a_block, b_block, out_ref, out_block, filled):
        for slot in range(blocks.stages):
            fetch(slot, slot, filled.at[slot])

        def add_up(sum_ref):
            @pl.loop(0, steps)
            def _(step):
                slot = lax.rem(step, jnp.int32(blocks.stages))
                plgpu.barrier_wait(filled.at[slot])
                plgpu.wgmma(sum_ref, a_block.at[slot], b_block.at[slot])
                plgpu.wgmma_wait(0)  # until then the slot is being read

                @pl.when(step + blocks.stages < steps)
                def _():
                    fetch(step + blocks.stages, slot, filled.at[slot])

            return sum_ref[...]

        out_block[...] = pl.run_scoped(add_up, plgpu.ACC((blocks.bT, blocks.bS), jnp.float32)).astype(dtype)
        _leave(out_block, out_ref)

    return multiply, {
        "out_block": plgpu.SMEM((blocks.bT, blocks.bS), dtype, transforms=_TILED),
        "filled": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
    }


def _blackwell(blocks: Blocks, dtype: Any) -> tuple[Callable[..., None], dict[str, Any]]:
    """The copy engine copies; the tensor core multiplies from shared memory into tensor memory."""

    def multiply(steps, fetch, a_block, b_block, out_ref, out_block, filled, used, sums):
        for slot in range(blocks.stages):
            fetch(slot, slot, filled.at[slot])

        @pl.loop(0, steps)
        def _(step):
            slot = lax.rem(step, jnp.int32(blocks.stages))
            plgpu.barrier_wait(filled.at[slot])
            plgpu.tcgen05_mma(sums, a_block.at[slot], b_block.at[slot], used, accumulate=step > 0)
            plgpu.barrier_wait(used)

            @pl.when(step + blocks.stages < steps)
            def _():
                fetch(step + blocks.stages, slot, filled.at[slot])

        out_block[...] = plgpu.async_load_tmem(sums).astype(dtype)
        plgpu.wait_load_tmem()
        _leave(out_block, out_ref)

    return multiply, {
        "out_block": plgpu.SMEM((blocks.bT, blocks.bS), dtype, transforms=_TILED),
        "filled": plgpu.Barrier(num_arrivals=2, num_barriers=blocks.stages),
        "used": plgpu.Barrier(num_arrivals=1, orders_tensor_core=True),
        "sums": plgpu.TMEM((blocks.bT, blocks.bS), jnp.float32),
    }


# ---- attention


def _arrays(shape: Shape, n: int, dtype: Any) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((1, shape.T, shape.H, shape.D), dtype)] * n


def _gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q, k, v, do: jax.vjp(attend, q, k, v)[1](do)


def _jax_mgpu(shape: Shape, blocks: Blocks | None) -> Callable[..., Any]:
    from jax.experimental.pallas.ops.gpu import attention_mgpu as mgpu

    if shape.mask not in (Causal(), Full()):
        raise NotImplementedError(f"jax_mgpu knows Causal() and Full() only, mask is {shape.mask}")
    assert blocks is not None  # both cases have blocks
    config = mgpu.TuningConfig(
        block_q=blocks.bT, block_kv=blocks.bS, max_concurrent_steps=blocks.stages, causal=shape.mask == Causal(),
        block_q_dq=blocks.bT, block_kv_dq=blocks.bS, block_q_dkv=blocks.bT, block_kv_dkv=blocks.bS,
    )  # fmt: skip
    return lambda q, k, v: mgpu.attention(q, k, v, config)


def _tokamax(shape: Shape) -> Callable[..., Any]:
    try:
        import tokamax
    except ModuleNotFoundError as error:
        raise ValueError(f'tokamax cannot be imported ({error}): pip install "longattn[peers]"') from error

    if shape.mask == Full():
        visible: dict[str, Any] = {}
    elif shape.mask == Causal():
        visible = {"is_causal": True}
    elif isinstance(shape.mask, Window):
        visible = {"local_window_size": (shape.mask.left, shape.mask.right)}
    else:
        raise NotImplementedError(f"tokamax is built for Causal(), Full() and Window(n), mask is {shape.mask}")
    return lambda q, k, v: tokamax.dot_product_attention(q, k, v, implementation="mosaic", **visible)


CASES: dict[str, Case] = {
    "matmul": Case(
        "a plain product by one warpgroup, whose instructions can be counted by hand",
        _matmul,
        Blocks(128, 128, 4),
    ),
    "jax_mgpu": Case(
        "jax's FlashAttention-3 on Mosaic GPU (float16 only, sm_90a)",
        lambda shape, blocks, dtype, arch: (_jax_mgpu(shape, blocks), _arrays(shape, 3, dtype)),
        Blocks(64, 128, 2),
        "float16",
    ),
    "jax_mgpu_backward": Case(
        "its forward with statistics and its backward (float16, Full() only)",
        lambda shape, blocks, dtype, arch: (_gradients(_jax_mgpu(shape, blocks)), _arrays(shape, 4, dtype)),
        Blocks(64, 64, 2),
        "float16",
    ),
    "tokamax": Case(
        "tokamax's forward on Mosaic GPU",
        lambda shape, blocks, dtype, arch: (_tokamax(shape), _arrays(shape, 3, dtype)),
        None,
    ),
    "tokamax_backward": Case(
        "its forward with statistics and its backward (not sm_80)",
        lambda shape, blocks, dtype, arch: (_gradients(_tokamax(shape)), _arrays(shape, 4, dtype)),
        None,
    ),
}
