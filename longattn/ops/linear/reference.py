"""The recurrence of linear attention, one token after the other, as the papers write it.

    S_t = Diag(exp(log_decay_t)) S_{t-1};  with beta: S_t -= beta_t k_t (k_t^T S_t);  S_t += (beta_t or 1) k_t v_t^T
    o_t = scale * S_t^T q_t

Linear attention (arXiv:2006.16236), RetNet (arXiv:2307.08621), Mamba-2 (arXiv:2405.21060) and GLA (arXiv:2312.06635);
with beta DeltaNet (arXiv:2406.06484), Gated DeltaNet (arXiv:2412.06464) and KDA (arXiv:2510.26692).
It is slow, and reverse mode keeps a state per token. Tests, jvp and second derivatives ask for it by name.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from longattn.ops.linear.contract import Arrays, Options, Out, State

# q, k, v, log_decay, beta of one token, and whether it starts a segment
_Token = tuple[Array, Array, Array, Array | None, Array | None, Array | None]


def check(x: Arrays, options: Options) -> None:
    """Accepts every valid call."""


def attend(x: Arrays, options: Options, plan: None = None) -> tuple[Out, State]:
    """Returns out [B T H V] and the state after the last token [B H D V]."""
    dot = lambda y, S: jnp.einsum("BHD,BHDV->BHV", y, S, precision=lax.Precision.HIGHEST)
    assert x.q is not None  # only `fold` is called without
    dtype = jnp.float64 if x.k.dtype == jnp.float64 else jnp.float32
    q, k, v = (jnp.repeat(y.astype(dtype), x.H // y.shape[2], axis=2) for y in (x.q, x.k, x.v))
    starts = None if (ids := x.segment_ids) is None else jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
    S = x.initial_state
    if S is None:
        S = jnp.zeros((q.shape[0], x.H, q.shape[3], v.shape[3]), dtype)
        S = lax.pcast(S, tuple(jax.typeof(q).manual_axis_type.varying), to="varying")

    def step(S: Array, token: _Token) -> tuple[Array, Array]:
        q, k, v, log_decay, beta, starts = token
        if starts is not None:
            S = jnp.where(starts[:, None, None, None], 0.0, S)
        if log_decay is not None:
            S = jnp.exp(log_decay).reshape(*S.shape[:2], -1, 1) * S
        if beta is not None:
            v = beta[..., None] * (v - dot(k, S))
        S = S + k[..., :, None] * v[..., None, :]
        return S, options.scale * dot(q, S)

    S, out = lax.scan(step, S, jax.tree.map(lambda y: y.swapaxes(0, 1), (q, k, v, x.log_decay, x.beta, starts)))
    return out.swapaxes(0, 1).astype(options.out_dtype), S


def fold(x: Arrays, options: Options, plan: None = None) -> State:
    """Returns the state after the last token; zeros are written into its columns after V."""
    assert x.initial_state is not None  # the contract of `fold`
    v = jnp.pad(x.v, [(0, 0)] * 3 + [(0, x.initial_state.shape[3] - x.v.shape[3])])
    q = jnp.repeat(x.k, x.H // x.k.shape[2], axis=2)  # its values do not matter
    return attend(x._replace(q=q, v=v), options)[1]


def pull(x: Arrays, do: Out, dfinal_state: State, options: Options, plan: None = None) -> State:
    """Returns the gradient of the state before the first token, which does not depend on that state."""
    _, transpose = jax.vjp(lambda S: attend(x._replace(initial_state=S), options), dfinal_state)
    return transpose((do, dfinal_state))[0]
