"""Linear attention and its relatives: the public functions. They validate and choose a back end.

S_t = Diag(exp(log_decay_t)) S_{t-1};  with beta: S_t -= beta_t k_t (k_t^T S_t);  S_t += (beta_t or 1) k_t v_t^T
o_t = scale * S_t^T q_t
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float

from longattn import shapes
from longattn.ops import dispatch
from longattn.ops.explicit import on_explicit_axes
from longattn.ops.linear import pallas_tpu, reference, xla
from longattn.ops.linear.contract import Arrays, Beta, Decay, Ids, Key, Options, Out, Query, State, Value
from longattn.ops.linear.validation import check_step, check_tokens
from longattn.shapes import Given

BACK_ENDS = {"pallas_tpu": pallas_tpu, "xla": xla, "reference": reference}  # best first
Tuning = pallas_tpu.Tuning | xla.Tuning  # block sizes of one of them
DEFAULT = tuple(name for name in BACK_ENDS if name != "reference")  # never a serial loop over tokens unasked


def state_bytes(B: int, H: int, D: int, V: int) -> int:
    """Returns the bytes of the float32 state [B H D V], which do not depend on the length of the context."""
    return 4 * B * H * D * V


def validate(
    q: Given,
    k: Given,
    v: Given,
    *,
    log_decay: Given,
    beta: Given,
    initial_state: Given,
    segment_ids: Given,
    scale: float,
    implementation: str | Sequence[str] | None,
    tuning: Given,
) -> tuple[Arrays, Options, tuple[str, ...]]:
    """Raises every ValueError of a call, and returns its arrays, its options and the names of candidate back ends."""
    x = check_tokens(q, k, v, log_decay, beta, initial_state, segment_ids)
    names = dispatch.candidates(implementation, tuple(BACK_ENDS), DEFAULT)
    dispatch.check_tuning(tuning, implementation, names, BACK_ENDS)
    return x, Options(shapes.check_positive("scale", scale), x.k.dtype.name, tuning), names


@jax.custom_jvp
def _finite(log_decay: Array) -> Array:
    """Returns -inf as a number whose exp is 0 too, and whose sums are finite: differences of them are no NaN."""
    return jnp.maximum(log_decay, -1e30)


@_finite.defjvp
def _finite_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # The identity: a back end's gradient there is 0 already, and nothing needs to be kept for it.
    return _finite(*primals), tangents[0]


def prepare(x: Arrays) -> Arrays:
    """Returns the arrays as a back end takes them: a decay is finite, and one of [H] is repeated for every token."""
    x = dispatch.vary_together(x)
    if x.log_decay is None:
        return x
    log_decay = _finite(x.log_decay)
    if log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay[None, None], (*x.k.shape[:2], *log_decay.shape))
    return x._replace(log_decay=log_decay)


def check_fold(back_end: dispatch.BackEnd, x: Arrays, X: int, options: Options) -> Any:
    """Returns the back end's plan to fold a state [B H D X], or raises NotImplementedError with the reason.

    Args:
      x: shapes and dtypes of prepared arrays, with an initial state.
    """
    assert x.initial_state is not None  # the callers give one
    S = jax.ShapeDtypeStruct((*x.initial_state.shape[:3], X), x.initial_state.dtype)
    return back_end.check(x._replace(q=None, initial_state=S), options)


@functools.partial(jax.jit, static_argnames=("options", "name", "plan"))
def _linear_attention(x: Arrays, *, options: Options, name: str, plan: Hashable) -> tuple[Out, State]:
    with jax.named_scope("linear_attention"), jax.named_scope(name):
        return BACK_ENDS[name].attend(prepare(x), options, plan)


@functools.partial(jax.jit, static_argnames="options")
def _no_tokens(x: Arrays, *, options: Options) -> tuple[Out, State]:
    x = dispatch.vary_together(x)
    (B, T, _, D), V = x.k.shape, x.v.shape[3]
    out = jnp.zeros((B, T, x.H, V), options.out_dtype)
    S = jnp.zeros((B, x.H, D, V), shapes.statistics_dtype(x.k.dtype))
    out, S = (jax.lax.pcast(y, tuple(jax.typeof(x.k).manual_axis_type.varying), to="varying") for y in (out, S))
    return out, S if x.initial_state is None else x.initial_state


@on_explicit_axes(
    {
        "q": "BTHD", "k": "BTHD", "v": "BTHV", "log_decay": ("H", "BTH", "BTHD"), "beta": "BTH",
        "initial_state": "BHDV", "segment_ids": "BT",
    },
    main=("q", "k", "v"), along="BH", results=("BTHV", "BHDV"),
)  # fmt: skip
def linear_attention(
    q: Query,
    k: Key,
    v: Value,
    *,
    log_decay: Float[Array, "H"] | Decay | None = None,
    beta: Beta | None = None,
    initial_state: State | None = None,
    segment_ids: Ids | None = None,
    scale: float = 1.0,
    implementation: str | Sequence[str] | None = None,
    tuning: Tuning | None = None,
) -> tuple[Out, State]:
    """Causal attention through a state of fixed size, in time O(T). The arguments choose the model.

    | log_decay   | without beta                                      | with beta, the delta rule           |
    |-------------|---------------------------------------------------|-------------------------------------|
    | None        | linear attention, arXiv:2006.16236                | DeltaNet, arXiv:2406.06484          |
    | [H]         | RetNet, arXiv:2307.08621                          | Gated DeltaNet with fixed gates     |
    | [B T H]     | Mamba-2, arXiv:2405.21060                         | Gated DeltaNet, arXiv:2412.06464    |
    | [B T H D]   | GLA, arXiv:2312.06635                             | Kimi Delta Attention, 2510.26692    |

    Args:
      q: queries. Any T, D, V. H is the largest of Hq, Hk, Hv, and each divides it: head h reads q's head
        h // (H // Hq), likewise k and v, without a copy per head. Mamba-2 has Hq = Hk = 1.
      k: keys, of q's dtype: bfloat16, float16, float32 or float64. The delta rule is stable where beta |k|^2 <= 2.
      v: values, of q's dtype.
      log_decay: float32, <= 0. The state's channels are multiplied by exp(log_decay) before a token is written; -inf
        empties them. Above 0 the state grows without bound and results overflow: nothing checks or clips it.
      beta: float32. A token erases the share beta of what its key reads from the state, then writes beta v.
      initial_state: float32 [B H D V], the state before the first token; None is zero. The channels of keys come first.
        A state that has those of values first, such as Mamba's [P N], must be transposed: where D = V its shape is the
        same, and nothing can tell.
      segment_ids: int32. A token whose id differs from the one before starts from a zero state.
      scale: factor of the output, a Python float. The default is 1. FLA's functions have D**-0.5, and so have published
        layers of RetNet, GLA, DeltaNet, Gated DeltaNet and KDA.
      implementation: None (the best that accepts), a name, or an ordered sequence of names from `BACK_ENDS`.
      tuning: block sizes for exactly one named implementation; they change the result by rounding only.

    Returns:
      out [B T H V] in q's dtype, and the state [B H D V] after the last token, float32. Both are differentiable in
      every array. With float64 inputs, decays, betas and states are float64. What is not finite in a token makes
      results NaN for the head, from the token on to the end of its segment; other segments, heads and earlier tokens
      are as ever.

    Raises:
      ValueError: for invalid arguments, before any compute.
      NotImplementedError: with the reasons, if no back end asked for serves the call.
    """
    x, options, names = validate(
        q, k, v, log_decay=log_decay, beta=beta, initial_state=initial_state, segment_ids=segment_ids, scale=scale,
        implementation=implementation, tuning=tuning,
    )  # fmt: skip
    if 0 in x.k.shape[:2]:
        return tuple(_no_tokens(x, options=options))
    name, plan = dispatch.choose(names, BACK_ENDS, lambda back_end: back_end.check(jax.eval_shape(prepare, x), options))
    return tuple(_linear_attention(x, options=options, name=name, plan=plan))


@functools.partial(jax.jit, static_argnames="scale")
def _linear_step(
    q: Array, k: Array, v: Array, S: Array, log_decay: Array | None, beta: Array | None, *, scale: float
) -> tuple[Array, Array]:
    q, k, v, S, log_decay, beta = dispatch.vary_together((q, k, v, S, log_decay, beta))
    dot = functools.partial(jnp.einsum, "BHD,BHDV->BHV", precision=Precision.HIGHEST)
    with jax.named_scope("linear_step"):
        dtype = q.dtype
        q, k, v = (jnp.repeat(x.astype(S.dtype), S.shape[1] // x.shape[1], axis=1) for x in (q, k, v))
        if log_decay is not None:
            axes = {1: (0, 2, 3), 2: (2, 3), 3: (3,)}[log_decay.ndim]
            S = jnp.exp(jnp.expand_dims(log_decay, axes)) * S
        if beta is not None:
            v = beta[..., None] * (v - dot(k, S))
        S = S + k[..., None] * v[..., None, :]
        return (scale * dot(q, S)).astype(dtype), S


@on_explicit_axes(
    {"q": "BHD", "k": "BHD", "v": "BHV", "state": "BHDV", "log_decay": ("H", "BH", "BHD"), "beta": "BH"},
    main=("q", "k", "v", "state"), along="BH", results=("BHV", "BHDV"),
)  # fmt: skip
def linear_step(
    q: Float[Array, "B Hq D"],
    k: Float[Array, "B Hk D"],
    v: Float[Array, "B Hv V"],
    state: State,
    *,
    log_decay: Float[Array, "H"] | Float[Array, "B H"] | Float[Array, "B H D"] | None = None,
    beta: Float[Array, "B H"] | None = None,
    scale: float = 1.0,
) -> tuple[Float[Array, "B H V"], State]:
    """Decodes one token of `linear_attention`: returns its output and the next state.

    Args:
      state: the state before the token, a `final_state` or zeros; float32, or float64 for float64 inputs. The channels
        of keys come before those of values, also where D = V and nothing can tell.
      q, k, v and the rest: as for `linear_attention`, without the axis T.

    Returns:
      out [B H V] in q's dtype, and the state after the token.

    Raises:
      ValueError: for invalid arguments, before any compute.
    """
    q, k, v, state, log_decay, beta = check_step(q, k, v, state, log_decay, beta)
    scale = shapes.check_positive("scale", scale)
    return tuple(_linear_step(q, k, v, state, log_decay, beta, scale=scale))
