"""Checks of a call's arrays, from shapes and dtypes alone. They raise ValueError and name the value and the rule."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from longattn import shapes
from longattn.ops.linear.contract import Arrays
from longattn.shapes import Given


def _heads(q: Given, k: Given, v: Given, axes: tuple[str, str, str]) -> tuple[Array, Array, Array, int]:
    """Returns q, k, v as arrays, and H. Raises ValueError unless their shapes and dtypes go together."""
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


# A transposed state is only found where D and V differ: the axes are named, so that one knows which are meant.
_STATE = ": D are the key's channels, V the value's; swap the last two axes of a state that has V first, as Mamba's do"


def _statistic(
    name: str, x: Given, expected: dict[str, tuple[int, ...]], dtype: DTypeLike, note: str = ""
) -> Array | None:
    """Returns `x` in `dtype`. Raises ValueError unless it is None or has one of the shapes {axes: sizes}."""
    if x is None:
        return None
    shapes.check_dtype(name, x, ("float32", "float64"))  # in half precision exp(-0.001) would be 1
    if tuple(x.shape) not in expected.values():
        rule = " or ".join(f"{sizes}, that is [{axes}]" for axes, sizes in expected.items())
        raise ValueError(f"{name}.shape={tuple(x.shape)} must be {rule}{note}")
    return jnp.asarray(x).astype(dtype)


def check_tokens(
    q: Given, k: Given, v: Given, log_decay: Given, beta: Given, initial_state: Given, segment_ids: Given
) -> Arrays:
    """Returns the arrays of a call of `linear_attention`."""
    q, k, v, H = _heads(q, k, v, ("B T Hq D", "B T Hk D", "B T Hv V"))
    (B, T), D, V = q.shape[:2], q.shape[3], v.shape[3]
    dtype = shapes.statistics_dtype(q.dtype)
    decays = {"H": (H,), "B T H": (B, T, H), "B T H D": (B, T, H, D)}
    log_decay = _statistic("log_decay", log_decay, decays, dtype)
    beta = _statistic("beta", beta, {"B T H": (B, T, H)}, dtype)
    initial_state = _statistic("initial_state", initial_state, {"B H D V": (B, H, D, V)}, dtype, _STATE)
    if segment_ids is not None:
        shapes.check_shape("segment_ids", segment_ids, (B, T), "B T")
        shapes.check_dtype("segment_ids", segment_ids, ("int32",))
        segment_ids = jnp.asarray(segment_ids)
    return Arrays(q, k, v, log_decay, beta, initial_state, segment_ids)


def check_step(q: Given, k: Given, v: Given, state: Given, log_decay: Given, beta: Given) -> tuple[Array | None, ...]:
    """Returns the arrays of a call of `linear_step`."""
    q, k, v, H = _heads(q, k, v, ("B Hq D", "B Hk D", "B Hv V"))
    B, D, V, dtype = q.shape[0], q.shape[2], v.shape[2], shapes.statistics_dtype(q.dtype)
    if state is None:
        raise ValueError(f"state=None must be an array [B H D V]; start from jnp.zeros({(B, H, D, V)}, jnp.float32)")
    state = _statistic("state", state, {"B H D V": (B, H, D, V)}, dtype, _STATE)
    log_decay = _statistic("log_decay", log_decay, {"H": (H,), "B H": (B, H), "B H D": (B, H, D)}, dtype)
    beta = _statistic("beta", beta, {"B H": (B, H)}, dtype)
    return q, k, v, state, log_decay, beta
