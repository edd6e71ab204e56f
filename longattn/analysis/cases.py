"""Named Pallas kernels for `longattn profile`: the function, its shapes, and how often each of its branches runs.

The executions follow from the mask's geometry: a kernel walks over a grid of (query block, key block) steps, and asks
at each whether the block is visible. They are declared here, from the kernel's source, and not read off the compiled
program; `analysis/static.py` refuses a kernel whose compiled form disagrees with what is declared.

Peers: jax's `flash_attention` (arXiv:2205.14135) and `splash_attention`, both of `jax.experimental.pallas.ops.tpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from longattn.analysis import cost
from longattn.mask import EMPTY, Causal, Full, Mask, Window

_BF16, _F32 = 2, 4  # bytes
_LANES = 128  # per-row statistics are stored broadcast over a register's lanes


@dataclass(frozen=True)
class Shape:
    """What a case is built for. Everything is bfloat16; queries and keys have equal lengths and heads."""

    T: int = 8192  # queries, and keys; `matmul`: the edge of its square matrices
    H: int = 8  # heads (not read by `matmul`)
    D: int = 128  # head size (not read by `matmul`)
    mask: Mask = Causal()  # an expression such as "Window(4095)" (not read by `matmul`)
    bT: int = 1024  # block of queries; `matmul`: of rows and of columns
    bS: int = 1024  # block of keys; `matmul`: of the summed dimension
    bC: int | None = None  # keys of one product within a block; None: bS (not read by `matmul`)

    def __post_init__(self) -> None:
        for name in ("T", "H", "D", "bT", "bS"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("bT", "bS"):
            if self.T % getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} must divide T={self.T}")
        if self.compute < 1 or self.bS % self.compute:
            raise ValueError(f"bC={self.bC} must divide bS={self.bS}")

    @property
    def compute(self) -> int:
        """Keys of one product."""
        return self.bS if self.bC is None else self.bC

    @property
    def blocks(self) -> tuple[int, int]:
        """(Jq, Jk), blocks of queries and of keys."""
        return self.T // self.bT, self.T // self.bS

    def visible(self) -> np.ndarray:
        """bool [Jq Jk]: the blocks that hold a visible pair."""
        Jq, Jk = self.blocks
        q, k = np.arange(Jq, dtype=np.int32)[:, None] * self.bT, np.arange(Jk, dtype=np.int32)[None] * self.bS
        return np.asarray(self.mask.kind(q, q + self.bT - 1, k, k + self.bS - 1)) != EMPTY


@dataclass(frozen=True)
class Branch:
    """One `pl.when` of a kernel's source: how often it runs in one call of the kernel, over all cores."""

    what: str
    runs: int


@dataclass(frozen=True)
class Kernel:
    """One `pallas_call` of a case, summed over its whole grid and all cores."""

    name: str  # how its name in the compiled program begins
    steps: int  # of the grid, those included whose block is skipped
    branches: tuple[Branch, ...]  # every one that the source has, in its order
    flops: float  # that the visible pairs need; only matrix products count
    hbm_bytes: float  # between device memory and VMEM: a block is moved when its index changes


@dataclass(frozen=True)
class Case:
    """A function of bfloat16 arrays and the kernels to account for."""

    about: str
    build: Callable[[Shape], tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]]
    kernels: Callable[[Shape], tuple[Kernel, ...]]


# ---- a plain product: what the method is checked on


def _matmul_kernel(
    a_ref,  # [bT bS]
    b_ref,  # [bS bT]
    out_ref,  # [bT bT]
    sum_ref,  # [bT bT] float32, scratch
):
    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _matmul(shape: Shape) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    square = jax.ShapeDtypeStruct((shape.T, shape.T), jnp.bfloat16)
    J, Js = shape.blocks
    call = pl.pallas_call(
        _matmul_kernel,
        grid=(J, J, Js),
        in_specs=[
            pl.BlockSpec((shape.bT, shape.bS), lambda i, j, s: (i, s)),
            pl.BlockSpec((shape.bS, shape.bT), lambda i, j, s: (s, j)),
        ],
        out_specs=pl.BlockSpec((shape.bT, shape.bT), lambda i, j, s: (i, j)),
        out_shape=square,
        scratch_shapes=[pltpu.VMEM((shape.bT, shape.bT), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        name="matmul",
    )
    return call, [square, square]


def _matmul_kernels(shape: Shape) -> tuple[Kernel, ...]:
    J, Js = shape.blocks
    block = shape.bT * shape.bS * _BF16
    # With a single block along s, the left operand stays while j moves.
    moved = J * J * Js * block + (J if Js == 1 else J * J * Js) * block + shape.T**2 * _BF16
    return (
        Kernel("matmul", J * J * Js, (Branch("first", J * J), Branch("last", J * J)), 2.0 * shape.T**3, float(moved)),
    )


# ---- attention


def _arrays(shape: Shape, n: int, batch: tuple[int, ...] = ()) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct((*batch, shape.H, shape.T, shape.D), jnp.bfloat16)] * n


def _gradients(attend: Callable[..., Any]) -> Callable[..., Any]:
    return lambda q, k, v, do: jax.vjp(attend, q, k, v)[1](do)


def _changes(indices: np.ndarray) -> int:
    """How often a block is moved whose index takes these values along the grid."""
    return 1 + int(np.count_nonzero(np.diff(indices))) if len(indices) else 0


def _attention_kernel(
    shape: Shape,
    name: str,
    *,
    rows: Literal["queries", "keys"],  # what stands still while the kernel walks over the others
    products: int,  # of a visible pair: q k^T and p v are two
    still: int,  # bytes per token of what stands still, arguments and results
    streamed: int,  # bytes per token of what passes by
    compact: bool,  # the grid holds no more steps per row than the longest row needs
    skips: bool = True,  # whether the source asks if a block is visible
    every_step: int = 0,  # bytes that leave at every step, visible or not
) -> Kernel:
    visible = shape.visible() if rows == "queries" else shape.visible().T
    bytes_still, bytes_streamed = (
        (shape.bT * still, shape.bS * streamed) if rows == "queries" else (shape.bS * still, shape.bT * streamed)
    )
    J, width = len(visible), int(visible.sum(1).max()) if compact else visible.shape[1]
    walk = np.concatenate([np.flatnonzero(row) for row in visible])  # the blocks that pass by, in order
    steps, run = J * width * shape.H, int(visible.sum()) * shape.H
    run_when = (Branch("visible block", run),) if skips else ()
    # Each head begins with a block of its own, whatever the one before ended with; the fused kernel changes heads
    # before it goes on to the next row.
    passing = int(visible.sum()) if every_step else _changes(walk)
    moved = shape.H * (J * bytes_still + passing * bytes_streamed) + steps * every_step
    pairs = cost.visible_pairs(shape.mask, shape.T)
    return Kernel(
        name,
        steps,
        (Branch("first of a row", J * shape.H), *run_when, Branch("last of a row", J * shape.H)),
        2.0 * products * pairs * shape.H * shape.D,
        float(moved),
    )


def _flash(shape: Shape) -> Callable[..., Any]:
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    if shape.mask not in (Causal(), Full()):
        raise NotImplementedError(f"jax_flash knows Causal() and Full() only, mask is {shape.mask}")
    bT, bS, bC = shape.bT, shape.bS, shape.compute
    if bS == shape.T:
        raise NotImplementedError(f"bS={bS} must be less than T={shape.T}: jax_flash has another kernel for one block")
    sizes = flash.BlockSizes(
        block_q=bT, block_k_major=bS, block_k=bC, block_b=1,
        block_q_major_dkv=bT, block_k_major_dkv=bS, block_k_dkv=bC, block_q_dkv=bT,
        block_k_major_dq=bS, block_k_dq=bC, block_q_dq=bT,
    )  # fmt: skip
    return lambda q, k, v: flash.flash_attention(
        q, k, v, causal=shape.mask == Causal(), sm_scale=shape.D**-0.5, block_sizes=sizes
    )


def _flash_forward(shape: Shape) -> tuple[Kernel, ...]:
    token = shape.D * _BF16
    return (
        _attention_kernel(
            shape, "flash_attention", rows="queries", products=2, still=2 * token, streamed=2 * token,
            compact=False, skips=shape.mask == Causal(),
        ),
    )  # fmt: skip


def _flash_backward(shape: Shape) -> tuple[Kernel, ...]:
    token, statistic = shape.D * _BF16, _LANES * _F32
    causal = shape.mask == Causal()
    return (
        _attention_kernel(  # q, do, dq; row sum, row maximum, di
            shape, "flash_mha_bwd_dq", rows="queries", products=3, still=3 * token + 3 * statistic,
            streamed=2 * token, compact=False, skips=causal,
        ),
        _attention_kernel(  # k, v, dk, dv; by pass q, do and the statistics
            shape, "flash_mha_bwd_dkv", rows="keys", products=4, still=4 * token,
            streamed=2 * token + 3 * statistic, compact=False, skips=causal,
        ),
    )  # fmt: skip


def _splash(shape: Shape) -> Callable[..., Any]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    edge = (shape.T, shape.T)
    if shape.mask == Causal():
        mask = masks.CausalMask(edge)
    elif shape.mask == Full():
        mask = masks.FullMask(edge)
    elif isinstance(shape.mask, Window):
        mask = masks.LocalMask(edge, (shape.mask.left, shape.mask.right), 0)
    else:
        raise NotImplementedError(f"jax_splash is built for Causal(), Full() and Window(n), mask is {shape.mask}")
    sizes = splash.BlockSizes(
        block_q=shape.bT, block_kv=shape.bS, block_kv_compute=shape.compute,
        block_q_dkv=shape.bT, block_kv_dkv=shape.bS, block_kv_dkv_compute=shape.compute, use_fused_bwd_kernel=True,
    )  # fmt: skip
    with jax.default_device(jax.devices("cpu")[0]):  # the mask's metadata are arrays
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * shape.H), block_sizes=sizes, head_shards=1, q_seq_shards=1
        )
    kernel = jax.tree.map(np.asarray, kernel)  # constants of the program, on no device
    return lambda q, k, v: kernel(q, k, v)


def _splash_forward(shape: Shape) -> tuple[Kernel, ...]:
    token = shape.D * _BF16
    numbers = 0 if shape.mask == Full() else _LANES * _F32  # query positions, int32: the mask is computed from them
    return (
        _attention_kernel(
            shape, "splash_mha_fwd", rows="queries", products=2, still=2 * token + numbers, streamed=2 * token,
            compact=True,
        ),
    )  # fmt: skip


def _splash_backward(shape: Shape) -> tuple[Kernel, ...]:
    token, statistic = shape.D * _BF16, 8 * _F32  # one row of statistics is stored as eight
    return (
        _attention_kernel(  # the fused kernel writes a share of dq per key block, to be summed by XLA
            shape, "splash_mha_dkv", rows="keys", products=5, still=4 * token, streamed=2 * token + 2 * statistic,
            compact=True, every_step=shape.bT * token,
        ),
    )  # fmt: skip


CASES: dict[str, Case] = {
    "matmul": Case("[T T] x [T T], a plain kernel of this project's", _matmul, _matmul_kernels),
    "jax_flash": Case("jax flash, forward", lambda s: (_flash(s), _arrays(s, 3, (1,))), _flash_forward),
    "jax_flash_backward": Case(
        "jax flash, dq and dk, dv", lambda s: (_gradients(_flash(s)), _arrays(s, 4, (1,))), _flash_backward
    ),
    "jax_splash": Case("jax splash, forward", lambda s: (_splash(s), _arrays(s, 3)), _splash_forward),
    "jax_splash_backward": Case(
        "jax splash, dq, dk, dv in one kernel", lambda s: (_gradients(_splash(s)), _arrays(s, 4)), _splash_backward
    ),
}
