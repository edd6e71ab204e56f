"""Blockwise exact attention in plain XLA, on any device: what a back end exports, and the rule of its gradient.

jvp and second derivatives are not supported; the reference has them.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from longattn.ops import dispatch
from longattn.ops.attention.contract import Bias, Options, Visibility
from longattn.ops.attention.xla.backward import backward
from longattn.ops.attention.xla.forward import forward
from longattn.ops.attention.xla.tiling import Layout, make_layout
from longattn.shapes import Key, Out, Query, Shaped, Statistic, Value


def check(q: Shaped, k: Shaped, v: Shaped, bias: Shaped, visibility: Visibility, options: Options) -> Layout:
    """Returns the layout of tiles; accepts every valid call."""
    return make_layout(q, k, v, options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, options: Options, plan: Layout
) -> tuple[Array, Array]:
    return forward(q, k, v, bias, visibility, options, plan)


def _attend_forward(
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, options: Options, plan: Layout
) -> Any:
    out, lse = forward(q, k, v, bias, visibility, options, plan)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse), (q, k, v, bias, visibility, out, lse)


def _attend_backward(options: Options, plan: Layout, residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    q, k, v, bias, *_ = residuals
    grads = dispatch.once(functools.partial(backward, options=options, n=plan), *residuals, *cotangents)
    return *(None if x is None else g.astype(x.dtype) for x, g in zip((q, k, v, bias), grads, strict=True)), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
    q: Query, k: Key, v: Value, bias: Bias | None, visibility: Visibility, options: Options, plan: Layout
) -> tuple[Out, Statistic]:
    """Returns out [B T H V] in options.out_dtype and lse [B T H]; zeros and -inf where no key is visible."""
    return _attend(q, k, v, bias, visibility, options, plan)


def backward_partial(
    q: Query, k: Key, v: Value, bias: Bias | None, visibility: Visibility, out: Out, lse: Statistic, do: Out,
    dlse: Statistic, options: Options, plan: Layout,
) -> tuple[Query, Key, Value]:  # fmt: skip
    """Returns dq, dk, dv from these keys, given the global out and lse."""
    return backward(q, k, v, bias, visibility, out, lse, do, dlse, options, plan)[:3]


def backward_bias(
    q: Query, k: Key, v: Value, bias: Bias, visibility: Visibility, out: Out, lse: Statistic, do: Out, dlse: Statistic,
    options: Options,
) -> Float[Array, "#B #H #T #S"]:  # fmt: skip
    """Returns the gradient of the bias, given out and lse, for back ends that lack it."""
    return backward(q, k, v, bias, visibility, out, lse, do, dlse, options, make_layout(q, k, v, options))[3]
