"""Exact softmax attention: the public functions. They validate, choose a back end, and add the sinks.

logits = softcap * tanh(scale * q k^T / softcap) + bias, over the keys that mask and segments show
lse    = log(sum_k exp(logits) + exp(sinks))
out    = sum_k exp(logits - lse) v
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from longattn import shapes
from longattn.mask import Causal, Mask
from longattn.ops import dispatch
from longattn.ops import partial as partials
from longattn.ops.attention import pallas_tpu, reference, xla
from longattn.ops.attention.contract import Options, Visibility
from longattn.ops.partial import Partial
from longattn.shapes import Key, KeyIds, Out, Query, QueryIds, Statistic, Value

Ids = QueryIds | tuple[QueryIds, KeyIds]

BACK_ENDS = {"pallas_tpu": pallas_tpu, "xla": xla, "reference": reference}  # best first
DEFAULT = ("pallas_tpu", "xla")  # never the reference: nothing silently becomes O(T S) in memory


def _pair(name: str, given: Any, q: Any, k: Any) -> tuple[Array, Array]:
    """Ids of queries [B T] and of keys [B S] from one array or a pair."""
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


def validate(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Mask,
    segment_ids: Any,
    positions: Any,
    scale: float | None,
    softcap: float | None,
    sinks: Any,
    bias: Any,
    implementation: str | Sequence[str] | None,
    tuning: Any,
    rounded: bool,
) -> tuple[Array, Array, Array, Array | None, Visibility, Options, tuple[str, ...]]:
    """Raises every ValueError of a call, from shapes and dtypes alone.

    Returns q, k, v, sinks as arrays, the other arguments as a back end takes them, and the candidate back ends.
    """
    for name, x, axes in (("q", q, "B T H D"), ("k", k, "B S K D"), ("v", v, "B S K V")):
        shapes.check_rank(name, x, axes)
        shapes.check_dtype(name, x, shapes.FLOATS)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{q.dtype=}, {k.dtype=} and {v.dtype=} must be one dtype; cast them with .astype")
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    (B, T, H, D), (S, K) = q.shape, k.shape[1:3]
    shapes.check_shape("k", k, (B, S, K, D), "B S K D")
    shapes.check_shape("v", v, (B, S, K, v.shape[3]), "B S K V")
    if K == 0 or H % K or D == 0:
        raise ValueError(f"{H=} query heads must be a multiple of {K=} key/value heads, and {D=} positive")
    if not isinstance(mask, Mask):
        remedy = "Full() attends to every key" if mask is None else "BlockSparse takes a pattern, `bias` an array"
        raise ValueError(f"mask={mask!r:.80} must be a longattn.mask.Mask; {remedy}")
    names = dispatch.candidates(implementation, tuple(BACK_ENDS), DEFAULT)
    dispatch.check_tuning(tuning, implementation, names, BACK_ENDS)
    if bias is not None:
        shapes.check_dtype("bias", bias, shapes.FLOATS)
        shapes.check_broadcast("bias", bias, (B, H, T, S), "B H T S")
        bias = jnp.reshape(jnp.asarray(bias), (1,) * (4 - len(bias.shape)) + tuple(bias.shape))
    arange = jnp.arange(T, dtype=jnp.int32)[None], jnp.arange(S, dtype=jnp.int32)[None]
    q_positions, k_positions = arange if positions is None else _pair("positions", positions, q, k)
    q_segments, k_segments = (None, None) if segment_ids is None else _pair("segment_ids", segment_ids, q, k)
    visibility = Visibility(mask, q_positions, k_positions, q_segments, k_segments, bias)
    if jax.tree.leaves(mask):
        visible = jax.eval_shape(mask, q_positions[:, None, :, None], k_positions[:, None, None, :])
        shapes.check_broadcast(f"mask={mask}: its pattern", visible, (B, H, T, S), "B H T S")
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
    return q, k, v, sinks, visibility, options, names


def _prepare(
    q: Any, k: Any, v: Any, sinks: Any = None, **arguments: Any
) -> tuple[Array, Array, Array, Array | None, Visibility, Options, str]:
    """`validate`, and the back end that serves the call."""
    q, k, v, sinks, visibility, options, names = validate(q, k, v, sinks=sinks, **arguments)
    name, _ = dispatch.choose(names, BACK_ENDS, lambda back_end: back_end.check(q, k, v, visibility, options))
    return q, k, v, sinks, visibility, options, name


@functools.partial(jax.jit, static_argnames=("options", "name", "dtype"))
def _attention(q, k, v, visibility, sinks, *, options, name, dtype):
    q, k, v, visibility, sinks = dispatch.vary_together((q, k, v, visibility, sinks))
    with jax.named_scope("attention"):
        with jax.named_scope(name):
            out, lse = BACK_ENDS[name].attend(q, k, v, visibility, options)
        return partials.finish(Partial(out, lse), sinks, dtype)


@functools.partial(jax.jit, static_argnames=("options", "name"))
def _backward_partial(q, k, v, visibility, out, lse, do, dlse, *, options, name):
    arrays = dispatch.vary_together((q, k, v, visibility, out, lse, do, dlse))
    with jax.named_scope("attention"), jax.named_scope(name), jax.named_scope("backward"):
        return BACK_ENDS[name].backward_partial(*arrays, options)


def attention_with_lse(
    q: Query,
    k: Key,
    v: Value,
    *,
    mask: Mask = Causal(),
    segment_ids: Ids | None = None,
    positions: Ids | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    bias: Float[Array, "..."] | None = None,
    implementation: str | Sequence[str] | None = None,
    tuning: Any = None,
) -> tuple[Out, Statistic]:
    """`attention`, and its log-sum-exp: natural logarithm, float32 (float64 for float64 inputs), differentiable."""
    q, k, v, sinks, visibility, options, name = _prepare(
        q, k, v, sinks, mask=mask, segment_ids=segment_ids, positions=positions, scale=scale, softcap=softcap,
        bias=bias, implementation=implementation, tuning=tuning,
        rounded=sinks is None,  # sinks rescale out before it is rounded
    )  # fmt: skip
    return tuple(_attention(q, k, v, visibility, sinks, options=options, name=name, dtype=q.dtype.name))


def attention(
    q: Query,
    k: Key,
    v: Value,
    *,
    mask: Mask = Causal(),
    segment_ids: Ids | None = None,
    positions: Ids | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
    bias: Float[Array, "..."] | None = None,
    implementation: str | Sequence[str] | None = None,
    tuning: Any = None,
) -> Out:
    """Exact softmax attention.

    Args:
      q: queries. Any T, S, D, V; any H that K divides: query head h reads key/value head h // (H // K), so with H=4
        and K=2 heads 0 and 1 read 0, heads 2 and 3 read 1.
      k: keys, of q's dtype: bfloat16, float16, float32 or float64. float32 products are full float32 ones.
      v: values, of q's dtype.
      mask: which key positions a query position sees (`longattn.mask`). Its integers are static, its arrays are traced.
      segment_ids: int32 [B T], or a pair for queries and keys. Tokens attend only within equal ids, in any order.
      positions: int32 [B T], or a pair for queries and keys, what the mask reads; None is arange(T) and arange(S). They
        do not restart at segments by themselves.
      scale: of the logits, a Python float; None is D**-0.5.
      softcap: a Python float; logits become softcap * tanh(logits / softcap). arXiv:2408.00118
      sinks: one more logit per head in the denominator (and in lse). arXiv:2309.17453
      bias: added to the logits after the soft cap, broadcastable to [B H T S]; differentiable.
      implementation: None (the best that accepts), a name, or an ordered sequence of names from `BACK_ENDS`.
      tuning: block sizes of exactly one named implementation; they change the result by rounding only.

    Returns:
      [B T H V] in q's dtype. A row without a visible key is zero and sends zero gradients.

    Raises:
      ValueError: for invalid arguments, before any compute.
      NotImplementedError: with the reasons, if no back end asked for serves the call.
    """
    return attention_with_lse(
        q, k, v, mask=mask, segment_ids=segment_ids, positions=positions, scale=scale, softcap=softcap, sinks=sinks,
        bias=bias, implementation=implementation, tuning=tuning,
    )[0]  # fmt: skip


def attend_partial(
    q: Query,
    k: Key,
    v: Value,
    *,
    mask: Mask = Causal(),
    segment_ids: Ids | None = None,
    positions: Ids | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Float[Array, "..."] | None = None,
    implementation: str | Sequence[str] | None = None,
    tuning: Any = None,
) -> Partial:
    """Attention over these keys only, to be merged with others. As `attention`; sinks come with `partial.finish`."""
    q, k, v, _, visibility, options, name = _prepare(
        q, k, v, mask=mask, segment_ids=segment_ids, positions=positions, scale=scale, softcap=softcap, bias=bias,
        implementation=implementation, tuning=tuning, rounded=False,
    )  # fmt: skip
    return _attention(q, k, v, visibility, None, options=options, name=name, dtype=None)


def backward_partial(
    q: Query,
    k: Key,
    v: Value,
    out: Out,
    lse: Statistic,
    do: Out,
    dlse: Statistic,
    *,
    mask: Mask = Causal(),
    segment_ids: Ids | None = None,
    positions: Ids | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Float[Array, "..."] | None = None,
    implementation: str | Sequence[str] | None = None,
    tuning: Any = None,
) -> tuple[Query, Key, Value]:
    """The gradients these keys contribute, given the result over all keys: sums over disjoint keys are the gradients.

    Args:
      out: the global result, over all keys (with the sinks, if there are any).
      lse: the global log-sum-exp, likewise.
      do: cotangent of `out`.
      dlse: cotangent of `lse`.
      q, k, v and the rest: as for `attention`.

    Returns:
      dq [B T H D], dk [B S K D], dv [B S K V] in float32 (float64 for float64 inputs).
    """
    q, k, v, _, visibility, options, name = _prepare(
        q, k, v, mask=mask, segment_ids=segment_ids, positions=positions, scale=scale, softcap=softcap, bias=bias,
        implementation=implementation, tuning=tuning, rounded=False,
    )  # fmt: skip
    for label, x in (("out", out), ("do", do)):
        shapes.check_shape(label, x, (*q.shape[:3], v.shape[3]), "B T H V")
    for label, x in (("lse", lse), ("dlse", dlse)):
        shapes.check_shape(label, x, q.shape[:3], "B T H")
    return _backward_partial(q, k, v, visibility, out, lse, do, dlse, options=options, name=name)
