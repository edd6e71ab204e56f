"""The arguments of exact attention: what a caller may give, checked from shapes and dtypes alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from longattn import shapes
from longattn.mask import Mask, opened
from longattn.ops import dispatch
from longattn.ops.attention.back_ends import BACK_ENDS, DEFAULT
from longattn.ops.attention.contract import Options, Visibility
from longattn.shapes import Given, KeyIds, QueryIds

Ids = QueryIds | tuple[QueryIds, KeyIds]


class Arguments(NamedTuple):
    """A valid call, as a back end takes it."""

    q: Array
    k: Array
    v: Array
    bias: Array | None
    visibility: Visibility
    sinks: Array | None
    options: Options
    names: tuple[str, ...]  # the back ends to try, in order


def _pair(name: str, given: Given, q: Given, k: Given) -> tuple[Array, Array]:
    """Returns ids of the queries [B T] and of the keys [B S] from one array or a pair."""
    B, T, S = q.shape[0], q.shape[1], k.shape[1]
    if not isinstance(given, tuple | list):
        if T != S:
            raise ValueError(f"{name} must be a pair (for queries [B T], for keys [B S]) as {T=} differs from {S=}")
        given = (given, given)
    if len(given) != 2:
        raise ValueError(f"{name} must be one array or a pair (for queries, for keys), not {len(given)} of them")
    for role, ids, length in zip(("queries", "keys"), given, (T, S), strict=True):
        shapes.check_shape(f"{name} of the {role}", ids, (B, length), f"B {'T' if role == 'queries' else 'S'}")
        shapes.check_dtype(f"{name} of the {role}", ids, ("int32",))
    return jnp.asarray(given[0]), jnp.asarray(given[1])


def _operands(q: Given, k: Given, v: Given) -> tuple[Array, Array, Array]:
    """Returns q, k and v as arrays; raises ValueError unless their shapes and dtypes fit each other."""
    for name, x, axes in (("q", q, "B T H D"), ("k", k, "B S K D"), ("v", v, "B S K V")):
        shapes.check_rank(name, x, axes)
        shapes.check_dtype(name, x, shapes.FLOATS)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{q.dtype=}, {k.dtype=} and {v.dtype=} must be one dtype; cast them with .astype")
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    (B, _, H, D), (S, K) = q.shape, k.shape[1:3]
    shapes.check_shape("k", k, (B, S, K, D), "B S K D")
    shapes.check_shape("v", v, (B, S, K, v.shape[3]), "B S K V")
    if K == 0 or H % K or D == 0 or v.shape[3] == 0:
        raise ValueError(
            f"{H=} query heads must be a multiple of {K=} key/value heads, and {D=} and V={v.shape[3]} positive"
        )
    return q, k, v


def _visibility(q: Array, k: Array, mask: Given, segment_ids: Given, positions: Given) -> Visibility:
    """Returns who sees whom; raises ValueError unless the mask is one and its arrays fit q and k."""
    if not isinstance(mask, Mask):
        remedy = "Full() attends to every key" if mask is None else "BlockSparse takes a pattern, `bias` an array"
        raise ValueError(f"mask={mask!r:.80} must be a longattn.mask.Mask; {remedy}")
    (B, T, H), S = q.shape[:3], k.shape[1]
    arange = jnp.arange(T, dtype=jnp.int32)[None], jnp.arange(S, dtype=jnp.int32)[None]
    q_positions, k_positions = arange if positions is None else _pair("positions", positions, q, k)
    q_segments, k_segments = (None, None) if segment_ids is None else _pair("segment_ids", segment_ids, q, k)
    if jax.tree.leaves(mask):
        visible = jax.eval_shape(mask, q_positions[:, None, :, None], k_positions[:, None, None, :])
        shapes.check_broadcast(f"mask={mask}: its pattern", visible, (B, H, T, S), "B H T S")
    mask, read = opened(mask)
    return Visibility(mask, q_positions, k_positions, q_segments, k_segments, read)


def validate(
    q: Given,
    k: Given,
    v: Given,
    *,
    mask: Mask,
    segment_ids: Given,
    positions: Given,
    scale: float | None,
    softcap: float | None,
    sinks: Given,
    bias: Given,
    implementation: str | Sequence[str] | None,
    tuning: Given,
    rounded: bool,
) -> Arguments:
    """Returns the arguments of a call in their final form. Raises every ValueError of a call.

    Args:
      rounded: whether the back end's `out` has q's dtype; otherwise it has the statistics' dtype.
    """
    q, k, v = _operands(q, k, v)
    visibility = _visibility(q, k, mask, segment_ids, positions)
    names = dispatch.candidates(implementation, tuple(BACK_ENDS), DEFAULT)
    dispatch.check_tuning(tuning, implementation, names, BACK_ENDS)
    (B, T, H, D), S = q.shape, k.shape[1]
    if bias is not None:
        shapes.check_dtype("bias", bias, shapes.FLOATS)
        shapes.check_broadcast("bias", bias, (B, H, T, S), "B H T S")
        bias = jnp.reshape(jnp.asarray(bias), (1,) * (4 - len(bias.shape)) + tuple(bias.shape))
    options = Options(
        scale=D**-0.5 if scale is None else shapes.check_positive("scale", scale),
        softcap=None if softcap is None else shapes.check_positive("softcap", softcap),
        out_dtype=(q.dtype if rounded else shapes.statistics_dtype(q.dtype)).name,
        in_order=positions is None,
        tuning=tuning,
    )
    if sinks is not None:
        shapes.check_shape("sinks", sinks, (H,), "H")
        shapes.check_dtype("sinks", sinks, shapes.FLOATS)
        sinks = jnp.asarray(sinks)
    return Arguments(q, k, v, bias, visibility, sinks, options, names)
