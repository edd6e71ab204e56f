"""Cross-entropy of next tokens, computed in chunks so that the logits [B T W] never exist at once.

    nll_t = lse(w x_t) - (w x_t)[label_t],    loss = sum_t weight_t (nll_t + z_loss * lse(w x_t)^2)

The forward rule computes dx [B T E] and dw [W E] while a chunk's logits exist, and keeps them as residuals; the
backward rule multiplies them by the scalar cotangent. This takes three matrix products per chunk, where recomputing the
logits takes four, and costs the W E floats of dw. The z-loss is PaLM's, arXiv:2204.02311 section 5.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


def labels_and_weights(
    tokens: Int32[Array, "B T"],
    positions: Int32[Array, "#B T"] | None,
    segment_ids: Int32[Array, "#B T"] | None,
    weights: Float[Array, "B T"],
) -> tuple[Int32[Array, "B T"], Float[Array, "B T"]]:
    """Returns the label of each token and the weight of its loss.

    The label of token t is token t + 1, with weight `weights[t + 1]`, where token t + 1 has the same segment id and the
    next position. Elsewhere, and at the last token, label and weight are 0.
    """
    follows = jnp.ones((1, tokens.shape[1] - 1), bool)
    if positions is not None:
        follows &= positions[:, 1:] == positions[:, :-1] + 1
    if segment_ids is not None:
        follows = follows & (segment_ids[:, 1:] == segment_ids[:, :-1])
    last = ((0, 0), (0, 1))
    labels = jnp.pad(jnp.where(follows, tokens[:, 1:], 0), last)
    return labels, jnp.pad(jnp.where(follows, weights[:, 1:], 0), last)


def cross_entropy(
    x: Float[Array, "B T E"],
    w: Float[Array, "W e"],
    labels: Int32[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    chunk: int,
    z_loss: float = 0.0,
    sliced: tuple[str, ...] = (),
) -> tuple[Float32[Array, ""], dict[str, Float32[Array, "..."]]]:
    """Returns the loss summed over all tokens; the caller divides by the weights' sum over the whole batch.

    Args:
        x: inputs of the output head; the products take its dtype and accumulate in float32.
        w: the output head. Its gradient is summed over the chunks in float32.
        labels: int32 in [0, W). Where the weight is 0 it may be any number, such as -100; elsewhere the loss is NaN.
        weights: 0 for tokens that predict nothing.
        chunk: tokens whose logits exist at once. A piece takes `chunk // B` positions (at least one) of all B rows, so
            that rows stay on their devices.
        z_loss: weight of the squared log-partition.
        sliced: manual mesh axes over which w is sliced along E. w is gathered in x's dtype; its gradient is
            reduce-scattered in float32 by the forward rule. So the loss's cotangent must be the same on all devices,
            as it is where their losses are summed.

    Returns:
        The loss (nats), and a dict without gradient: nll_sum (weighted), weight_sum and nll [B T] (not weighted).
    """
    devices = jax.lax.axis_size(sliced) if sliced else 1
    if x.ndim != 3 or w.ndim != 2 or x.shape[-1] != w.shape[-1] * devices:
        raise ValueError(f"{x.shape=} and {w.shape=} must be [B T E] and [W E / {devices}] with the same E")
    if labels.shape != x.shape[:2] or weights.shape != x.shape[:2]:
        raise ValueError(f"{labels.shape=} and {weights.shape=} must be {x.shape[:2]}, the [B T] of x")
    if chunk < 1:
        raise ValueError(f"{chunk=} must be at least 1")
    piece = max(1, min(chunk // x.shape[0], x.shape[1]))
    weights = weights.astype(jnp.float32)
    W = w.shape[0]
    # An index below 0 would be read from the end, and one beyond the end is NaN, even times a weight of 0.
    labels = jnp.where(weights == 0, jnp.clip(labels, 0, W - 1), jnp.where(labels < 0, W, labels))
    # In a shard_map w may be replicated where x varies: cast to varying here, its gradient is summed over the devices.
    varying = frozenset.union(*(jax.typeof(a).manual_axis_type.varying for a in (x, w, labels, weights)))
    args = []
    for a in (x, w, labels, weights):
        missing = tuple(varying - jax.typeof(a).manual_axis_type.varying)
        args.append(jax.lax.pcast(a, missing, to="varying") if missing else a)
    loss, nll = _loss(piece, float(z_loss), sliced, *args)
    nll = jax.lax.stop_gradient(nll)
    return loss, {"nll_sum": jnp.sum(weights * nll), "weight_sum": jnp.sum(weights), "nll": nll}


def gathered(w: Float[Array, "W e"], sliced: tuple[str, ...]) -> Float[Array, "W E"]:
    """Gathers a head that is sliced along E over manual mesh axes."""
    with jax.named_scope("gather"):
        return jax.lax.all_gather(w, sliced, axis=1, tiled=True) if sliced else w


def _piece(x: Array, w: Array, labels: Array, weights: Array, z_loss: float, grad: bool) -> tuple[Any, ...]:
    """Returns nll and lse [B t] of x [B t E]; with `grad` also dx [B t E] and dw [W E]."""
    logits = jnp.einsum("BTE,WE->BTW", x, w, preferred_element_type=jnp.float32)
    top = jax.lax.stop_gradient(jnp.max(logits, -1, keepdims=True))
    shifted = jnp.exp(logits - top)
    total = jnp.sum(shifted, -1)
    lse = top[..., 0] + jnp.log(total)
    nll = lse - jnp.take_along_axis(logits, labels[..., None], -1)[..., 0]
    if not grad:
        return nll, lse
    scale = weights * (1 + 2 * z_loss * lse) / total
    hit = jax.lax.broadcasted_iota(labels.dtype, logits.shape, 2) == labels[..., None]
    dlogits = (shifted * scale[..., None] - jnp.where(hit, weights[..., None], 0)).astype(x.dtype)
    dx = jnp.einsum("BTW,WE->BTE", dlogits, w)
    dw = jnp.einsum("BTW,BTE->WE", dlogits, x, preferred_element_type=jnp.float32)
    return nll, lse, dx, dw


def _pieces(
    piece: int, z_loss: float, sliced: tuple[str, ...], x: Array, w: Array, labels: Array, weights: Array, grad: bool
) -> tuple[Any, ...]:
    """Runs `_piece` over the whole sequence: nll, lse, and with `grad` dx and dw (float32)."""
    T = x.shape[1]
    whole = T // piece
    cast = gathered(w.astype(x.dtype), sliced)
    # Outputs are carried, not stacked, and dx overwrites x: stacking would make transposed copies of [B T E].
    carry: dict[str, Array] = {"nll": jnp.zeros_like(weights), "lse": jnp.zeros_like(weights)}
    if grad:
        carry |= {"dx": x, "dw": jnp.zeros_like(cast, jnp.float32)}

    def step(carry: dict[str, Array], start: Any, size: int) -> dict[str, Array]:
        cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        nll, lse, *grads = _piece(cut(carry["dx"] if grad else x), cast, cut(labels), cut(weights), z_loss, grad)
        new = {"nll": put(carry["nll"], nll), "lse": put(carry["lse"], lse)}
        if grad:
            new |= {"dx": put(carry["dx"], grads[0]), "dw": carry["dw"] + grads[1]}
        return new

    if whole == 1:
        carry = step(carry, 0, piece)
    else:
        carry, _ = jax.lax.scan(
            lambda c, j: (step(c, j * piece, piece), None), carry, jnp.arange(whole, dtype=jnp.int32)
        )
    if T % piece:
        carry = step(carry, whole * piece, T % piece)
    if grad and sliced:
        with jax.named_scope("scatter"):
            carry["dw"] = jax.lax.psum_scatter(carry["dw"], sliced, scatter_dimension=1, tiled=True)
    return tuple(carry[name] for name in ("nll", "lse", "dx", "dw") if name in carry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _loss(
    piece: int, z_loss: float, sliced: tuple[str, ...], x: Array, w: Array, labels: Array, weights: Array
) -> tuple[Array, Array]:
    nll, lse = _pieces(piece, z_loss, sliced, x, w, labels, weights, grad=False)
    return jnp.sum(weights * (nll + z_loss * lse**2)), nll


def _loss_forward(
    piece: int, z_loss: float, sliced: tuple[str, ...], x: Array, w: Array, labels: Array, weights: Array
) -> tuple[Any, Any]:
    nll, lse, dx, dw = _pieces(piece, z_loss, sliced, x, w, labels, weights, grad=True)
    per_token = nll + z_loss * lse**2
    # Residuals must be arrays: an empty one carries w's dtype.
    return (jnp.sum(weights * per_token), nll), (dx, dw, per_token, jnp.zeros_like(w, shape=(0,)))


def _loss_backward(
    piece: int, z_loss: float, sliced: tuple[str, ...], residuals: Any, cotangents: tuple[Array, Array]
) -> tuple[Any, ...]:
    del piece, z_loss, sliced
    dx, dw, per_token, like_w = residuals
    scalar, _ = cotangents  # the nll carries no gradient
    return (dx * scalar.astype(dx.dtype)), (dw * scalar).astype(like_w.dtype), None, per_token * scalar


_loss.defvjp(_loss_forward, _loss_backward)
