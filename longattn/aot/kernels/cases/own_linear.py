"""Our linear-attention kernels for TPUs (`longattn.ops.linear.pallas_tpu`), of each kind.

A shape's `kind` names the decay, and whether there is a delta rule. bC is the tokens of a chunk and bR the heads of a
program; other block sizes are ignored. Nothing is masked: a document's first token costs as much as any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from longattn.aot.kernels.cases.kernel import F32, Branch, Case, Kernel, row
from longattn.aot.kernels.cases.shape import Shape
from longattn.ops.linear import linear_attention
from longattn.ops.linear.pallas_tpu import Tuning
from longattn.ops.linear.pallas_tpu.tuning import HEADS, Problem, choose

_BF16 = 2  # bytes


def _tuning(shape: Shape) -> Tuning:
    try:
        return Tuning(shape.bC, shape.bR or HEADS)
    except ValueError as error:
        raise NotImplementedError(str(error)) from error


def _decay(shape: Shape) -> str:
    return shape.kind.removesuffix("_delta")


def _delta(shape: Shape) -> bool:
    return shape.kind.endswith("_delta")


def _inputs(shape: Shape) -> dict[str, jax.ShapeDtypeStruct]:
    array = lambda dtype, *axes: jax.ShapeDtypeStruct((1, shape.T, *axes), dtype)
    found = {
        "q": array(jnp.bfloat16, shape.key_heads, shape.D),
        "k": array(jnp.bfloat16, shape.key_heads, shape.D),
        "v": array(jnp.bfloat16, shape.H, shape.values),
    }
    if _decay(shape) != "none":
        found["log_decay"] = array(jnp.float32, shape.H, *([shape.D] if _decay(shape) == "vector" else []))
    if _delta(shape):
        found["beta"] = array(jnp.float32, shape.H)
    return found


def _attend(shape: Shape) -> Callable[..., Any]:
    names, tuning = tuple(_inputs(shape)), _tuning(shape)
    ids = jnp.asarray(shape.segment_ids())[None] if shape.documents else None
    return lambda *arrays: linear_attention(
        **dict(zip(names, arrays)), segment_ids=ids, implementation="pallas_tpu", tuning=tuning
    )


def _gradients(shape: Shape) -> Callable[..., Any]:
    """Returns the gradients of all inputs from the cotangents of both results."""
    n = len(_inputs(shape))
    return lambda *arrays: jax.vjp(_attend(shape), *arrays[:n])[1](tuple(arrays[n:]))


def _cotangents(shape: Shape) -> list[jax.ShapeDtypeStruct]:
    return [
        jax.ShapeDtypeStruct((1, shape.T, shape.H, shape.values), jnp.bfloat16),
        jax.ShapeDtypeStruct((1, shape.H, shape.D, shape.values), jnp.float32),
    ]


def _kernel(shape: Shape, backward: bool) -> tuple[Kernel, ...]:
    heads, kind = (shape.H, shape.key_heads, shape.key_heads, shape.H), (_decay(shape), _delta(shape))
    problem = Problem(1, *heads, shape.T, shape.D, shape.values, *kind, jnp.dtype(jnp.bfloat16))
    chunk, span, block_H, _ = choose(problem, _tuning(shape))
    groups, spans = shape.H // block_H, -(-shape.T // (chunk * span))
    number = row(chunk) // _BF16 * F32 / chunk  # bytes per token; chunks are padded to whole registers
    decay = {"none": 0, "scalar": number, "vector": row(shape.D) // _BF16 * F32}[_decay(shape)]
    own = shape.H * (decay + number * _delta(shape))  # log_decay and beta
    tokens = 2 * shape.key_heads * row(shape.D) + shape.H * row(shape.values)
    out = shape.H * row(shape.values)
    states = shape.H * shape.D * row(shape.values) // _BF16 * F32
    ids = bool(shape.documents) * number * groups
    token = ids + (2 * (tokens + own) + out if backward else tokens + own + out)
    per_token = 4 + 2 * _delta(shape)  # FLOPs per element of the state: the recurrence reads and updates it
    steps = groups * spans
    again = span if _delta(shape) else span - 1  # chunks of a span whose states the backward kernel recomputes
    bodies = [Branch("states", steps * again)] if backward and again else []
    bodies.append(Branch("gradients of a chunk" if backward else "chunk", steps * span))
    return (
        Kernel(
            f"longattn_linear_{'backward' if backward else 'forward'}",
            steps,
            tuple(bodies),
            float(shape.T * shape.H * per_token * shape.D * shape.values * (2 if backward else 1)),
            float(shape.T * token + states * ((spans + 2) if backward else 1)),
            lists=True,
        ),
    )


def _blocks(shape: Shape) -> list[Shape]:
    """Returns chunks and heads worth trying."""
    return [
        replace(shape, bC=chunk, bR=heads)
        for chunk in (128, 64, 256)
        for heads in (8, 4, 2)
        if shape.H % heads == 0 and shape.bT % heads == 0 and shape.bS % chunk == 0
    ]


FORWARD = Case(
    "longattn, linear attention forward",
    lambda s: (_attend(s), list(_inputs(s).values())),
    functools.partial(_kernel, backward=False),
    _blocks,
)
BACKWARD = Case(
    "longattn, all gradients of linear attention in one kernel",
    lambda s: (_gradients(s), [*_inputs(s).values(), *_cotangents(s)]),
    functools.partial(_kernel, backward=True),
    _blocks,
)
