"""A plain product, to check the method."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from longattn.aot.kernels.cases.kernel import BF16, Branch, Case, Kernel, sizes
from longattn.aot.kernels.cases.shape import Shape

_VMEM = 48 * 2**20  # limit of the kernel; libtpu's default is 16 MiB


def _kernel(
    a_ref,  # [bT bS]
    b_ref,  # [bS bT]
    out_ref,  # [bT bT]
    sum_ref,  # [bT bT] float32, scratch
):
    @pl.when(pl.program_id(2) == 0)
    def first():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += jnp.dot(a_ref[...], b_ref[...], preferred_element_type=jnp.float32)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def last():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _build(shape: Shape) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    square = jax.ShapeDtypeStruct((shape.T, shape.T), jnp.bfloat16)
    J, Js = shape.blocks
    (kernel,) = _kernels(shape)
    call = pl.pallas_call(
        _kernel,
        grid=(J, J, Js),
        in_specs=[
            pl.BlockSpec((shape.bT, shape.bS), lambda i, j, s: (i, s)),
            pl.BlockSpec((shape.bS, shape.bT), lambda i, j, s: (s, j)),
        ],
        out_specs=pl.BlockSpec((shape.bT, shape.bT), lambda i, j, s: (i, j)),
        out_shape=square,
        scratch_shapes=[pltpu.VMEM((shape.bT, shape.bT), jnp.float32)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=_VMEM
        ),
        cost_estimate=pl.CostEstimate(flops=int(kernel.flops), bytes_accessed=int(kernel.hbm_bytes), transcendentals=0),
        name="matmul",
    )
    return call, [square, square]


def _kernels(shape: Shape) -> tuple[Kernel, ...]:
    J, Js = shape.blocks
    block = shape.bT * shape.bS * BF16
    # With a single block along s, the left operand stays while j moves.
    moved = J * J * Js * block + (J if Js == 1 else J * J * Js) * block + shape.T**2 * BF16
    branches = (Branch("first", J * J), Branch("last", J * J))
    return (Kernel("matmul", J * J * Js, branches, 2.0 * shape.T**3, float(moved)),)


CASE = Case(
    "[T T] x [T T], a plain kernel",
    _build,
    _kernels,
    lambda shape: sizes(shape, (512, 1024, 2048), (512, 1024, 2048)),
)
