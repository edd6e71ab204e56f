"""The functions of the back end: they lay arrays out as the kernels need them, and define the gradient.

XLA moves heads before tokens (it may fuse that into the operation before), computes delta, and makes the lists of
blocks. All of that is linear in the sequence length, except for the lists: they hold one number per pair of blocks.

A bias is read in blocks, padded to whole ones. A bias with one number per query, for all keys, is added to lse outside
of the kernels. The gradient of a bias comes from the XLA back end.

jvp and second derivatives are not supported; the reference has them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool

from longattn.ops import dispatch
from longattn.ops.attention import finite, xla
from longattn.ops.attention.contract import Bias, Options, Visibility
from longattn.ops.attention.pallas_tpu import blocks
from longattn.ops.attention.pallas_tpu.backward import NO_KEY, backward
from longattn.ops.attention.pallas_tpu.call import LOG2E, Call, unit
from longattn.ops.attention.pallas_tpu.forward import forward
from longattn.ops.attention.pallas_tpu.plan import Plan, bias_dtype, make_plan
from longattn.shapes import Key, Out, Query, Shaped, Statistic, Value

BOUND = 80.0  # 2^80 times a sum of values, and 2^-80 times a value, stay far from float32's limits
_ROWS = 16  # rows of bfloat16 in a register: copies begin and end at multiples of it


def check(q: Shaped, k: Shaped, v: Shaped, bias: Shaped, visibility: Visibility, options: Options) -> Plan | None:
    """Returns the plan of the call. Raises NotImplementedError with the reason where the kernels cannot serve it."""
    return make_plan(q, k, v, bias, visibility, options)


# ---- arrays as the kernels read them


def _heads_first(x: Array) -> Array:
    """[B T H ...] -> [B H T ...], padded to whole registers: a part of one cannot be copied."""
    x = x.swapaxes(1, 2)
    short = -x.shape[2] % _ROWS
    return jnp.pad(x, ((0, 0), (0, 0), (0, short), (0, 0))) if short else x


def _numbers(n: Call, B: int, visibility: Visibility, side: str, length: int | None) -> Array | None:
    """Returns the positions and segments that a kernel reads, int32 [B numbers T], padded up to `length`."""
    if not n.numbers:
        return None
    rows = [getattr(visibility, f"{side}_{name}") for name in n.numbers]
    rows = [jnp.broadcast_to(x, (B, x.shape[1])) for x in rows]
    x = jnp.stack(rows, 1)
    return x if length is None else jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2])), mode="edge")


def _whole_blocks(n: Call, bias: Array | None) -> Array | None:
    """Returns the bias that a kernel adds to the logits, padded to whole blocks, if there is one."""
    if bias is None or not n.bias:
        return None
    x = bias.astype(bias_dtype(bias))
    rows = n.rows_q * n.block_q - x.shape[2] if x.shape[2] > 1 else 0
    return jnp.pad(x, ((0, 0), (0, 0), (0, rows), (0, n.rows_k * n.block_k - x.shape[3])))


def _per_query(n: Call, bias: Array | None) -> Array | None:
    """Returns a bias that has one number for all keys of a query, in the call's unit: [B|1 T|1 H|1]."""
    if bias is None or n.bias:
        return None
    return bias[..., 0].swapaxes(1, 2).astype(jnp.float32) * (1 / n.unit)


def _walk(n: Call, visibility: Visibility, options: Options, own: Sequence[Array], by_key: bool) -> tuple[Array, Array]:
    """Returns the lists of blocks, and which blocks of queries hold a visible pair."""
    per_sequence = [x[:, None, None] for x in jax.tree.leaves(visibility.mask) if x.ndim == 1]  # [B 1 1]
    with jax.named_scope("order"):
        return blocks.walk(
            visibility, n.patterns, (n.block_q, n.block_k), (n.tile_q, n.tile_k), n.T, n.S, options.in_order,
            [*own, *per_sequence], by_key,
        )  # fmt: skip


def _bounded(n: Call, q: Array, k: Array, bias: Array | None) -> Bool[Array, "B H rows"]:
    """Returns whether no logit in a row of blocks can leave [-BOUND, BOUND] in base 2, by Cauchy-Schwarz.

    A bias of -inf hides a key, which needs no bound. q and k are [B H T D].
    """
    length = lambda x: jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(-1))
    queries = jnp.pad(length(q), ((0, 0), (0, 0), (0, n.rows_q * n.block_q - q.shape[2])))
    queries = queries.reshape(q.shape[0], n.H, n.rows_q, n.block_q).max(-1)
    keys = jnp.repeat(length(k).max(-1), n.H // n.K, axis=1)
    most = queries * keys[..., None] * n.scale
    most = most if n.softcap is None else jnp.minimum(most, n.softcap)
    if bias is not None:
        size = jnp.abs(bias.astype(jnp.float32))
        size = jnp.where(bias == -jnp.inf, 0.0, size).max(-1)
        most = most + (size.reshape(*size.shape[:2], n.rows_q, -1).max(-1) if size.shape[2] > 1 else size)
    return most * LOG2E <= BOUND


# ---- the two passes; lse is in the call's unit


def _forward(
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, options: Options, n: Call | None
) -> tuple[Array, Array]:
    (B, T, H, _), V = q.shape, v.shape[3]
    if n is None:
        zero = 0.0 * jnp.sum(q, dtype=jnp.float32)  # varies over the mesh axes that q varies over
        out = jnp.broadcast_to(zero, (B, T, H, V)).astype(options.out_dtype)
        return out, jnp.broadcast_to(zero - jnp.inf, (B, T, H))
    q, k, v = (_heads_first(x) for x in (q, *finite.keys_and_values(k, v)))
    added = _whole_blocks(n, bias)
    walk, _ = _walk(n, visibility, options, [_bounded(n, q, k, added)], by_key=False)
    q_numbers, k_numbers = (
        _numbers(n, B, visibility, side, length) for side, length in (("q", None), ("k", n.rows_k * n.block_k))
    )
    arrays = walk, q, k, v, q_numbers, k_numbers, added
    out, lse = forward(n, options.out_dtype, *dispatch.vary_together(arrays))
    out, lse = out.swapaxes(1, 2), lse.swapaxes(1, 2)
    if (per_query := _per_query(n, bias)) is not None:
        lse = lse + per_query
        out = jnp.where((lse == -jnp.inf)[..., None], jnp.zeros_like(out), out)
    return out, lse


def _backward(
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, out: Array, lse: Array, do: Array,
    dlse: Array, options: Options, n: Call | None, out_dtype: DTypeLike,
) -> tuple[Array, Array, Array]:  # fmt: skip
    if n is None:
        return tuple(jnp.zeros_like(x, out_dtype) for x in (q, k, v))
    B, T, length = q.shape[0], n.T, n.rows_q * n.block_q
    q, k, v, do, delta, lse = finite.factors(q, k, v, out, lse, do, dlse, jnp.float32)
    per_query = _per_query(n, bias)
    lse = jnp.where(lse == -jnp.inf, NO_KEY, lse if per_query is None else lse - per_query)
    fill = lambda x, value: jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, length - T)), constant_values=value)
    stats = jnp.stack([fill(lse, NO_KEY), fill(delta, 0.0)], 2)
    q, k, v, do = (_heads_first(x) for x in (q, k, v, do.astype(q.dtype)))
    walk, visited = _walk(n, visibility, options, [], by_key=True)
    k_numbers, q_numbers = (_numbers(n, B, visibility, side, x) for side, x in (("k", None), ("q", length)))
    arrays = walk, q, k, v, do, stats, k_numbers, q_numbers, _whole_blocks(n, bias)
    dq, dk, dv = backward(n, out_dtype, *dispatch.vary_together(arrays))
    dq = jnp.where(jnp.repeat(visited, n.block_q, -1)[:, :, None, :T], dq[..., :T] * n.scale, 0.0)
    return dq.transpose(0, 3, 1, 2).astype(out_dtype), dk.swapaxes(1, 2), dv.swapaxes(1, 2)


# ---- the rule of the gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, options: Options, plan: Plan | None
) -> tuple[Array, Array]:
    return _attend_forward(q, k, v, bias, visibility, options, plan)[0]


def _attend_forward(
    q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, options: Options, plan: Plan | None
) -> Any:
    kernel = functools.partial(_forward, options=options, n=None if plan is None else plan.forward)
    out, lse = dispatch.fold_vmap(kernel, q, k, v, bias, visibility, shared=(3, 4))
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return (out, lse * unit(options.scale, options.softcap)), (q, k, v, bias, visibility, out, lse)


def _attend_backward(options: Options, plan: Plan | None, residuals: Any, cotangents: tuple[Array, Array]) -> Any:
    def gradients(
        q: Array, k: Array, v: Array, bias: Array | None, visibility: Visibility, out: Array, lse: Array, do: Array,
        dlse: Array,
    ) -> Any:  # fmt: skip
        kernel = functools.partial(
            _backward, options=options, n=None if plan is None else plan.backward, out_dtype=q.dtype
        )
        found = dispatch.fold_vmap(kernel, q, k, v, bias, visibility, out, lse, do, dlse, shared=(3, 4))
        if bias is None:
            return *found, None
        natural = lse * unit(options.scale, options.softcap)
        dbias = xla.backward_bias(q, k, v, bias, visibility, out, natural, do, dlse, replace(options, tuning=None))
        return *found, dbias.astype(bias.dtype)

    return *dispatch.once(gradients, *residuals, *cotangents), None


_attend.defvjp(_attend_forward, _attend_backward)


def attend(
    q: Query, k: Key, v: Value, bias: Bias | None, visibility: Visibility, options: Options, plan: Plan | None
) -> tuple[Out, Statistic]:
    """Returns out [B T H V] in options.out_dtype and lse [B T H]; zeros and -inf where no key is visible."""
    return _attend(q, k, v, bias, visibility, options, plan)


def backward_partial(
    q: Query, k: Key, v: Value, bias: Bias | None, visibility: Visibility, out: Out, lse: Statistic, do: Out,
    dlse: Statistic, options: Options, plan: Plan | None,
) -> tuple[Query, Key, Value]:  # fmt: skip
    """Returns dq, dk, dv from these keys in float32, given the global out and lse."""
    kernel = functools.partial(
        _backward, options=options, n=None if plan is None else plan.backward, out_dtype=jnp.float32
    )
    lse = lse / unit(options.scale, options.softcap)
    return dispatch.fold_vmap(kernel, q, k, v, bias, visibility, out, lse, do, dlse, shared=(3, 4))
