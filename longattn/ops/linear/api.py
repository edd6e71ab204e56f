"""Linear attention and its relatives: the public functions. They validate and choose a back end.

S_t = Diag(exp(log_decay_t)) S_{t-1};  with beta: S_t -= beta_t k_t (k_t^T S_t);  S_t += (beta_t or 1) k_t v_t^T
o_t = scale * S_t^T q_t
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.lax import Precision
from jaxtyping import Array, Float

from longattn import shapes
from longattn.ops import dispatch
from longattn.ops.linear import pallas_tpu, reference, xla
from longattn.ops.linear.contract import Beta, Decay, Ids, Key, Options, Out, Query, State, Value

BACK_ENDS = {"pallas_tpu": pallas_tpu, "xla": xla, "reference": reference}  # best first
DEFAULT = tuple(name for name in BACK_ENDS if name != "reference")  # never a serial loop over tokens unasked


def state_bytes(B: int, H: int, D: int, V: int) -> int:
    """Bytes of the float32 state [B H D V], whatever the length of the context."""
    return 4 * B * H * D * V


def _heads(q: Any, k: Any, v: Any, axes: tuple[str, str, str]) -> tuple[Array, Array, Array, int]:
    """q, k, v as arrays, and H. Raises ValueError unless their shapes and dtypes go together."""
    for name, x, letters in zip("qkv", (q, k, v), axes):
        shapes.check_rank(name, x, letters)
        shapes.check_dtype(name, x, shapes.FLOATS)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{q.dtype=}, {k.dtype=} and {v.dtype=} must be one dtype; cast them with .astype")
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    lead, (Hq, D), Hk, (Hv, V) = q.shape[:-2], q.shape[-2:], k.shape[-2], v.shape[-2:]
    shapes.check_shape("k", k, (*lead, Hk, D), axes[1])
    shapes.check_shape("v", v, (*lead, Hv, V), axes[2])
    H = max(Hq, Hk, Hv)
    if 0 in (Hq, Hk, Hv) or H % Hq or H % Hk or H % Hv:
        raise ValueError(f"{Hq=}, {Hk=} and {Hv=} heads of q, k and v must be positive and divide the largest, {H}")
    if 0 in (D, V):
        raise ValueError(f"head sizes {D=} of q and k and {V=} of v must be positive")
    return q, k, v, H


def _statistic(name: str, x: Any, expected: dict[str, tuple[int, ...]], dtype: Any) -> Array | None:
    """`x` in the statistics' dtype. Raises ValueError unless it is None or has one of the shapes {axes: sizes}."""
    if x is None:
        return None
    shapes.check_dtype(name, x, ("float32", "float64"))  # in half precision exp(-0.001) would be 1
    if tuple(x.shape) not in expected.values():
        rule = " or ".join(f"{sizes}, that is [{axes}]" for axes, sizes in expected.items())
        raise ValueError(f"{name}.shape={tuple(x.shape)} must be {rule}")
    return jnp.asarray(x).astype(dtype)


def validate(
    q: Any,
    k: Any,
    v: Any,
    *,
    log_decay: Any,
    beta: Any,
    initial_state: Any,
    segment_ids: Any,
    scale: float,
    implementation: str | Sequence[str] | None,
    tuning: Any,
) -> tuple[tuple[Array | None, ...], Options, tuple[str, ...]]:
    """Raises every ValueError of a call, from shapes and dtypes alone.

    Returns the arrays q, k, v, log_decay, beta, initial_state, segment_ids, the options and the candidate back ends.
    """
    q, k, v, H = _heads(q, k, v, ("B T Hq D", "B T Hk D", "B T Hv V"))
    (B, T), D, V = q.shape[:2], q.shape[3], v.shape[3]
    dtype = shapes.statistics_dtype(q.dtype)
    decays = {"H": (H,), "B T H": (B, T, H), "B T H D": (B, T, H, D)}
    log_decay = _statistic("log_decay", log_decay, decays, dtype)
    beta = _statistic("beta", beta, {"B T H": (B, T, H)}, dtype)
    initial_state = _statistic("initial_state", initial_state, {"B H D V": (B, H, D, V)}, dtype)
    if segment_ids is not None:
        shapes.check_shape("segment_ids", segment_ids, (B, T), "B T")
        shapes.check_dtype("segment_ids", segment_ids, ("int32",))
        segment_ids = jnp.asarray(segment_ids)
    names = dispatch.candidates(implementation, tuple(BACK_ENDS), DEFAULT)
    dispatch.check_tuning(tuning, implementation, names, BACK_ENDS)
    options = Options(shapes.check_positive("scale", scale), q.dtype.name, tuning)
    return (q, k, v, log_decay, beta, initial_state, segment_ids), options, names


def prepared(arrays: tuple[Array | None, ...]) -> tuple[Array | None, ...]:
    """The arrays as a back end takes them: a decay [H] is given to every token."""
    q, k, v, log_decay, *rest = dispatch.vary_together(arrays)
    if log_decay is not None and log_decay.ndim == 1:
        log_decay = jnp.broadcast_to(log_decay[None, None], (*q.shape[:2], *log_decay.shape))
    return q, k, v, log_decay, *rest


def check_fold(back_end: Any, shaped: tuple[Any, ...], columns: int, options: Options) -> None:
    """Raises NotImplementedError with the reason where the back end folds no state of so many columns.

    Args:
      shaped: the arrays as of `prepared`, in shapes and dtypes, with an initial state.
    """
    q, k, v, log_decay, beta, S, ids = shaped
    v, S = (jax.ShapeDtypeStruct((*x.shape[:3], columns), x.dtype) for x in (v, S))
    back_end.check(q, k, v, log_decay, beta, S, ids, options)


@functools.partial(jax.jit, static_argnames=("options", "name"))
def _linear_attention(arrays, *, options, name):
    with jax.named_scope("linear_attention"), jax.named_scope(name):
        return BACK_ENDS[name].attend(*prepared(arrays), options)


@functools.partial(jax.jit, static_argnames="options")
def _nothing(arrays, *, options):
    q, k, v, _, _, state, _ = dispatch.vary_together(arrays)
    H, dtype = max(x.shape[2] for x in (q, k, v)), shapes.statistics_dtype(q.dtype)
    out = jnp.zeros((*q.shape[:2], H, v.shape[3]), options.out_dtype)
    zeros = jnp.zeros((q.shape[0], H, q.shape[3], v.shape[3]), dtype)
    out, zeros = (jax.lax.pcast(x, tuple(jax.typeof(q).manual_axis_type.varying), to="varying") for x in (out, zeros))
    return out, zeros if state is None else state


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
    tuning: Any = None,
) -> tuple[Out, State]:
    """Attention through a state of fixed size; its arguments are the model. Time is O(T), causal by construction.

    | log_decay   | without beta                                      | with beta, the delta rule           |
    |-------------|---------------------------------------------------|-------------------------------------|
    | None        | linear attention, arXiv:2006.16236                | DeltaNet, arXiv:2406.06484          |
    | [H]         | RetNet, arXiv:2307.08621                          | Gated DeltaNet with fixed gates     |
    | [B T H]     | Mamba-2, arXiv:2405.21060                         | Gated DeltaNet, arXiv:2412.06464    |
    | [B T H D]   | GLA, arXiv:2312.06635                             | Kimi Delta Attention, 2510.26692    |

    Args:
      q: queries. Any T, D, V. H is the largest of Hq, Hk, Hv, each of which divides it: head h reads q's head
        h // (H // Hq), and so for k and v, without a copy per head. Mamba-2 has Hq = Hk = 1.
      k: keys, of q's dtype: bfloat16, float16, float32 or float64. The delta rule is stable where beta |k|^2 <= 2.
      v: values, of q's dtype.
      log_decay: float32, finite and <= 0: the state's channels are multiplied by exp(log_decay) before a token is
        written. Above 0 the state grows without bound and results overflow: nothing checks or clips it.
      beta: float32; a token first takes beta of what its key reads out of the state, then writes beta of its value.
      initial_state: float32, what the first segment starts from; None is zero.
      segment_ids: int32. A token whose id differs from the one before starts from a zero state.
      scale: of the output, a Python float.
      implementation: None (the best that accepts), a name, or an ordered sequence of names from `BACK_ENDS`.
      tuning: block sizes of exactly one named implementation; they change the result by rounding only.

    Returns:
      out [B T H V] in q's dtype, and the state after the last token, float32. Both are differentiable, in every array.
      float64 inputs have float64 decays, betas and states.

    Raises:
      ValueError: for invalid arguments, before any compute.
      NotImplementedError: with the reasons, if no back end asked for serves the call.
    """
    arrays, options, names = validate(
        q, k, v, log_decay=log_decay, beta=beta, initial_state=initial_state, segment_ids=segment_ids, scale=scale,
        implementation=implementation, tuning=tuning,
    )  # fmt: skip
    if 0 in arrays[0].shape[:2]:
        return tuple(_nothing(arrays, options=options))
    name, _ = dispatch.choose(
        names, BACK_ENDS, lambda back_end: back_end.check(*jax.eval_shape(prepared, arrays), options)
    )
    return tuple(_linear_attention(arrays, options=options, name=name))


@functools.partial(jax.jit, static_argnames="scale")
def _linear_step(q, k, v, S, log_decay, beta, *, scale):
    q, k, v, S, log_decay, beta = dispatch.vary_together((q, k, v, S, log_decay, beta))
    read = functools.partial(jnp.einsum, "BHD,BHDV->BHV", precision=Precision.HIGHEST)
    with jax.named_scope("linear_step"):
        dtype = q.dtype
        q, k, v = (jnp.repeat(x.astype(S.dtype), S.shape[1] // x.shape[1], axis=1) for x in (q, k, v))
        if log_decay is not None:
            axes = {1: (0, 2, 3), 2: (2, 3), 3: (3,)}[log_decay.ndim]
            S = jnp.exp(jnp.expand_dims(log_decay, axes)) * S
        if beta is not None:
            v = beta[..., None] * (v - read(k, S))
        S = S + k[..., None] * v[..., None, :]
        return (scale * read(q, S)).astype(dtype), S


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
    """One token of `linear_attention`, for decoding: its output and the next state, from the state before it.

    Args:
      state: float32 (float64 for float64 inputs), a `final_state` or zeros.
      q, k, v and the rest: as for `linear_attention`, without the axis T.

    Returns:
      out [B H V] in q's dtype, and the state after the token.

    Raises:
      ValueError: for invalid arguments, before any compute.
    """
    q, k, v, H = _heads(q, k, v, ("B Hq D", "B Hk D", "B Hv V"))
    B, D, V, dtype = q.shape[0], q.shape[2], v.shape[2], shapes.statistics_dtype(q.dtype)
    if state is None:
        raise ValueError(f"state=None must be an array [B H D V]; start from jnp.zeros({(B, H, D, V)}, jnp.float32)")
    state = _statistic("state", state, {"B H D V": (B, H, D, V)}, dtype)
    log_decay = _statistic("log_decay", log_decay, {"H": (H,), "B H": (B, H), "B H D": (B, H, D)}, dtype)
    beta = _statistic("beta", beta, {"B H": (B, H)}, dtype)
    scale = shapes.check_positive("scale", scale)
    return tuple(_linear_step(q, k, v, state, log_decay, beta, scale=scale))
