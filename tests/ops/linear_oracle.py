"""Linear attention and its gradients in NumPy, token by token, by the chain rule: nothing is shared with the library.

In float64 it is the truth, in float32 a plain implementation of that precision. For half-precision inputs the
recurrence is in float32, and results of their dtype are rounded at the end. `factors` is for devices that multiply only
half-precision factors: each factor is rounded to that dtype, sums are not.
"""

from __future__ import annotations

import numpy as np


def linear_attention(
    q,
    k,
    v,
    *,
    log_decay=None,
    beta=None,
    initial_state=None,
    segment_ids=None,
    scale=1.0,
    do,
    dS,
    dtype=np.float64,
    factors=None,
):
    """Returns out, final_state and the gradients of every array given, for the cotangents do and dS, in float64."""
    work = np.float64 if dtype == np.float64 else np.float32
    given = {"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": beta, "initial_state": initial_state}
    half = ("q", "k", "v")

    def r(x):
        return x if factors is None else x.astype(factors).astype(x.dtype)

    def read(x, S):
        """x^T S: [B H D] and [B H D V] -> [B H V]."""
        return np.einsum("BHD,BHDV->BHV", r(x), r(S))

    def pull(x, S):
        """S x: [B H V] and [B H D V] -> [B H D]."""
        return np.einsum("BHV,BHDV->BHD", r(x), r(S))

    q, k, v, do, dS = (np.asarray(x).astype(work) for x in (q, k, v, do, dS))
    H = max(x.shape[2] for x in (q, k, v))
    q, k, v = (np.repeat(x, H // x.shape[2], axis=2) for x in (q, k, v))
    (B, T, _, D), V = q.shape, v.shape[3]
    S = np.zeros((B, H, D, V), work) if initial_state is None else np.asarray(initial_state).astype(work)
    a = np.zeros((B, T, H, 1), work)
    if log_decay is not None:
        a = np.asarray(log_decay).astype(work)
        a = np.broadcast_to(a, (B, T, H))[..., None] if a.ndim < 4 else a
    b = None if beta is None else np.asarray(beta).astype(work)[..., None]
    goes_on = np.ones((B, T), bool)
    if segment_ids is not None:
        goes_on[:, 1:] = segment_ids[:, 1:] == segment_ids[:, :-1]
    decay = (np.exp(a) * goes_on[..., None, None])[..., None]
    scale = work(scale)

    before, decayed, after, written, error = [], [], [], [], []
    out = np.zeros((B, T, H, V), work)
    for t in range(T):
        before.append(S)
        S = decay[:, t] * S
        decayed.append(S)
        error.append(v[:, t] - (0 if b is None else read(k[:, t], S)))
        written.append(error[t] if b is None else b[:, t] * error[t])
        S = S + r(k[:, t, :, :, None]) * r(written[t][:, :, None])
        after.append(S)
        out[:, t] = scale * read(q[:, t], S)
    final_state = S

    dq, dk, dv, da, db = (np.zeros_like(x) for x in (q, k, v, a, a[..., :1]))
    for t in reversed(range(T)):
        dq[:, t] = scale * pull(do[:, t], after[t])
        dS = dS + scale * r(q[:, t, :, :, None]) * r(do[:, t, :, None])
        dk[:, t] = pull(written[t], dS)
        dw = read(k[:, t], dS)
        if b is None:
            dv[:, t] = dw
        else:
            db[:, t] = (r(dw) * r(error[t])).sum(-1, keepdims=True)
            dv[:, t] = dw = b[:, t] * dw
            dk[:, t] -= pull(dw, decayed[t])
            dS = dS - r(k[:, t, :, :, None]) * r(dw[:, :, None])
        da[:, t] = (
            (r(dS) * r(decayed[t])).sum(-1).sum(-1, keepdims=True)
            if a.shape[-1] == 1
            else (r(dS) * r(decayed[t])).sum(-1)
        )
        dS = decay[:, t] * dS

    def heads(dx, x):
        return dx.reshape(B, T, x.shape[2], -1, dx.shape[3]).sum(3)

    gradients = {
        "q": heads(dq, given["q"]),
        "k": heads(dk, given["k"]),
        "v": heads(dv, given["v"]),
        "log_decay": da if np.ndim(log_decay) == 4 else da[..., 0],
        "beta": db[..., 0],
        "initial_state": dS,
    }
    if np.ndim(log_decay) == 1:
        gradients["log_decay"] = gradients["log_decay"].sum((0, 1))
    results = {"out": out.astype(dtype), "final_state": final_state}
    for name, x in given.items():
        if x is not None:
            results[f"d{name}"] = gradients[name].astype(dtype) if name in half else gradients[name]
    return {name: x.astype(np.float64) for name, x in results.items()}
