"""Exact softmax attention: the public functions. They validate, choose a back end and add the sinks.

logits = softcap * tanh(scale * q k^T / softcap) + bias, over the keys that mask and segments show
lse    = log(sum_k exp(logits) + exp(sinks))
out    = sum_k exp(logits - lse) v
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from longattn import shapes
from longattn.mask import Causal, Mask
from longattn.ops import dispatch
from longattn.ops import partial as partials
from longattn.ops.attention.arguments import Arguments, Ids, validate
from longattn.ops.attention.back_ends import BACK_ENDS, DEFAULT, Tuning
from longattn.ops.attention.contract import Bias, Options, Visibility
from longattn.ops.explicit import on_explicit_axes
from longattn.ops.partial import Partial
from longattn.shapes import Key, Out, Query, Statistic, Value

__all__ = ["BACK_ENDS", "DEFAULT", "attend_partial", "attention", "attention_with_lse", "backward_partial"]


def _choose(call: Arguments) -> dict[str, Any]:
    """Returns the static arguments of the jitted functions: options, back end and its plan."""
    arrays = call.q, call.k, call.v, call.bias, call.visibility
    name, plan = dispatch.choose(call.names, BACK_ENDS, lambda back_end: back_end.check(*arrays, call.options))
    return {"options": call.options, "name": name, "plan": plan}


@functools.partial(jax.jit, static_argnames=("options", "name", "plan", "dtype"))
def _attention(
    q: Query, k: Key, v: Value, bias: Bias | None, visibility: Visibility, sinks: Float[Array, "H"] | None, *,
    options: Options, name: str, plan: Hashable, dtype: DTypeLike | None,
) -> Partial:  # fmt: skip
    q, k, v, bias, visibility, sinks = dispatch.vary_together((q, k, v, bias, visibility, sinks))
    with jax.named_scope("attention"):
        with jax.named_scope(name):
            out, lse = BACK_ENDS[name].attend(q, k, v, bias, visibility, options, plan)
        return partials.finish(Partial(out, lse), sinks, dtype)


@functools.partial(jax.jit, static_argnames=("options", "name", "plan"))
def _backward_partial(
    q: Query, k: Key, v: Value, bias: Bias | None, visibility: Visibility, out: Out, lse: Statistic, do: Out,
    dlse: Statistic, *, options: Options, name: str, plan: Hashable,
) -> tuple[Query, Key, Value]:  # fmt: skip
    arrays = dispatch.vary_together((q, k, v, bias, visibility, out, lse, do, dlse))
    with jax.named_scope("attention"), jax.named_scope(name), jax.named_scope("backward"):
        return BACK_ENDS[name].backward_partial(*arrays, options, plan)


@on_explicit_axes(
    {
        "q": "BTHD", "k": "BSHD", "v": "BSHV", "mask": "BH", "segment_ids": "BT", "positions": "BT", "sinks": "H",
        "bias": "BHTS",
    },
    main=("q", "k", "v"), along="BH", results=("BTHV", "BTH"),
)  # fmt: skip
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
    tuning: Tuning | None = None,
) -> tuple[Out, Statistic]:
    """Returns `attention` and its log-sum-exp: natural logarithm, in float32 (float64 for float64 inputs).

    Both are differentiable.
    """
    call = validate(
        q, k, v, mask=mask, segment_ids=segment_ids, positions=positions, scale=scale, softcap=softcap, sinks=sinks,
        bias=bias, implementation=implementation, tuning=tuning,
        rounded=sinks is None,  # sinks rescale out before it is rounded
    )  # fmt: skip
    arrays = call.q, call.k, call.v, call.bias, call.visibility, call.sinks
    return tuple(_attention(*arrays, **_choose(call), dtype=call.q.dtype.name))


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
    tuning: Tuning | None = None,
) -> Out:
    """Exact softmax attention.

    Args:
      q: queries. Any T, S, D, V; any H that K divides: query head h reads key/value head h // (H // K), so with H=4
        and K=2 heads 0 and 1 read 0, heads 2 and 3 read 1.
      k: keys, of q's dtype: bfloat16, float16, float32 or float64. float32 products are full float32 ones.
      v: values, of q's dtype.
      mask: which key positions a query position sees (`longattn.mask`). Its integers are static, its arrays are traced.
      segment_ids: int32 [B T], or a pair for queries and keys. Tokens attend only within equal ids, in any order.
      positions: int32 [B T], or a pair for queries and keys: what the mask reads. None is arange(T) and arange(S). They
        do not restart at segments by themselves.
      scale: a Python float that multiplies q k^T; None is D**-0.5.
      softcap: a Python float; logits become softcap * tanh(logits / softcap). arXiv:2408.00118
      sinks: one more logit per head in the denominator (and in lse). arXiv:2309.17453
      bias: added to the logits after the soft cap, broadcastable to [B H T S]; differentiable.
      implementation: None (the best that accepts), a name, or an ordered sequence of names from `BACK_ENDS`.
      tuning: block sizes for exactly one named implementation; they change the result by rounding only.

    Returns:
      [B T H V] in q's dtype. A row without a visible key is zero and sends zero gradients.

    Raises:
      ValueError: for invalid arguments, before any compute.
      NotImplementedError: if none of the candidate back ends serves the call, with each one's reason.
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
    tuning: Tuning | None = None,
) -> Partial:
    """Returns attention over these keys only, to be merged with that over others.

    The arguments are those of `attention`, without sinks: `partial.finish` adds them after the last merge.
    """
    call = validate(
        q, k, v, mask=mask, segment_ids=segment_ids, positions=positions, scale=scale, softcap=softcap, sinks=None,
        bias=bias, implementation=implementation, tuning=tuning, rounded=False,
    )  # fmt: skip
    return _attention(call.q, call.k, call.v, call.bias, call.visibility, None, **_choose(call), dtype=None)


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
    tuning: Tuning | None = None,
) -> tuple[Query, Key, Value]:
    """Returns these keys' share of the gradients, given the result over all keys.

    Summed over disjoint sets of keys, the shares are the gradients.

    Args:
      out: the global result, over all keys (with the sinks, if there are any).
      lse: the global log-sum-exp, of the same keys.
      do: cotangent of `out`.
      dlse: cotangent of `lse`.
      q, k, v and all other arguments: as for `attention`.

    Returns:
      dq [B T H D], dk [B S K D], dv [B S K V] in float32 (float64 for float64 inputs).
    """
    call = validate(
        q, k, v, mask=mask, segment_ids=segment_ids, positions=positions, scale=scale, softcap=softcap, sinks=None,
        bias=bias, implementation=implementation, tuning=tuning, rounded=False,
    )  # fmt: skip
    q, k, v = call.q, call.k, call.v
    for label, x in (("out", out), ("do", do)):
        shapes.check_shape(label, x, (*q.shape[:3], v.shape[3]), "B T H V")
    for label, x in (("lse", lse), ("dlse", dlse)):
        shapes.check_shape(label, x, q.shape[:3], "B T H")
    return _backward_partial(q, k, v, call.bias, call.visibility, out, lse, do, dlse, **_choose(call))
