"""The recurrence of linear attention, one token after the other, as the papers write it.

    S_t = Diag(exp(log_decay_t)) S_{t-1};  with beta: S_t -= beta_t k_t (k_t^T S_t);  S_t += (beta_t or 1) k_t v_t^T
    o_t = scale * S_t^T q_t

Linear attention (arXiv:2006.16236), RetNet (arXiv:2307.08621), Mamba-2 (arXiv:2405.21060) and GLA (arXiv:2312.06635);
with beta DeltaNet (arXiv:2406.06484), Gated DeltaNet (arXiv:2412.06464) and KDA (arXiv:2510.26692).

Slow, and reverse mode keeps a state per token, so it is only ever used by name: to test the other back ends, for jvp
and for second derivatives.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.lax import Precision

from longattn.ops.linear.contract import Beta, Decay, Ids, Key, Options, Out, Query, State, Value, WideState


def check(*call: object) -> None:
    """Accepts every valid call."""


def attend(
    q: Query, k: Key, v: Value, log_decay: Decay | None, beta: Beta | None, initial_state: State | None,
    segment_ids: Ids | None, options: Options,
) -> tuple[Out, State]:  # fmt: skip
    """out [B T H V] and the state after the last token [B H D V]."""
    dtype = jnp.float64 if q.dtype == jnp.float64 else jnp.float32
    H = max(x.shape[2] for x in (q, k, v))
    q, k, v = (jnp.repeat(x.astype(dtype), H // x.shape[2], axis=2) for x in (q, k, v))
    S = initial_state
    if S is None:
        S = jnp.zeros((q.shape[0], H, q.shape[3], v.shape[3]), dtype)
        S = lax.pcast(S, tuple(jax.typeof(q).manual_axis_type.varying), to="varying")
    if log_decay is not None and log_decay.ndim == 3:
        log_decay = log_decay[..., None]
    starts = None if segment_ids is None else jnp.diff(segment_ids, axis=1, prepend=segment_ids[:, :1]) != 0

    def step(S, token):
        q, k, v, log_decay, beta, starts = token
        if starts is not None:
            S = jnp.where(starts[:, None, None, None], 0.0, S)
        if log_decay is not None:
            S = jnp.exp(log_decay)[..., None] * S
        if beta is not None:
            v = beta[..., None] * (v - jnp.einsum("BHD,BHDV->BHV", k, S, precision=Precision.HIGHEST))
        S = S + k[..., :, None] * v[..., None, :]
        return S, options.scale * jnp.einsum("BHD,BHDV->BHV", q, S, precision=Precision.HIGHEST)

    tokens = jax.tree.map(lambda x: x.swapaxes(0, 1), (q, k, v, log_decay, beta, starts))
    S, out = lax.scan(step, S, tokens)
    return out.swapaxes(0, 1).astype(options.out_dtype), S


def fold(
    k: Key, v: Value, log_decay: Decay | None, beta: Beta | None, initial_state: WideState, segment_ids: Ids | None,
    options: Options,
) -> WideState:  # fmt: skip
    """The state after the last token; into columns of it beyond v's zeros are written."""
    q = jnp.repeat(k, initial_state.shape[1] // k.shape[2], axis=2)  # any will do
    v = jnp.pad(v, [(0, 0)] * 3 + [(0, initial_state.shape[3] - v.shape[3])])
    return attend(q, k, v, log_decay, beta, initial_state, segment_ids, options)[1]


def pull(
    q: Query, k: Key, v: Value, log_decay: Decay | None, beta: Beta | None, segment_ids: Ids | None, do: Out,
    dfinal_state: State, options: Options,
) -> State:  # fmt: skip
    """The gradient of the state before the first token, which is the same whatever that is."""
    _, pull = jax.vjp(lambda S: attend(q, k, v, log_decay, beta, S, segment_ids, options), dfinal_state)
    return pull((do, dfinal_state))[0]
