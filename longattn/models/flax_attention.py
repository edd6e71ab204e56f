"""`longattn.attention` in the place of Flax's own attention function."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from longattn.mask import Full, Mask
from longattn.ops.attention import attention


def attention_fn(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S H D"],
    value: Float[Array, "*B S H V"],
    bias: Float[Array, "..."] | None = None,
    mask: Mask | None = None,
    *,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = True,
    deterministic: bool = True,
    dtype: Any = None,
    precision: Any = None,
    force_fp32_for_softmax: bool = False,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    module: nn.Module | None = None,
    segment_ids: Any = None,
    positions: Any = None,
    softcap: float | None = None,
    implementation: str | tuple[str, ...] | None = None,
) -> Float[Array, "*B T H V"]:
    """`longattn.attention` in the place of `flax.linen.dot_product_attention`.

        attend = nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=longattn.models.attention_fn)
        y = attend(x, mask=Causal() & Window(512))

    Flax hands the call's `mask` through, so it is a longattn mask here; None attends to everything, as in Flax. Bind
    the arguments that Flax does not know (segment_ids, positions, softcap, implementation) with `functools.partial`.
    The softmax is always in float32, with full float32 products of float32 inputs: no less than `precision` and
    `force_fp32_for_softmax` ask for.

    Raises:
        ValueError: for a dense mask array.
        NotImplementedError: for dropout of the weights, sowing them, or replaced einsums.
    """
    del dropout_rng, broadcast_dropout, precision, force_fp32_for_softmax
    if mask is not None and not isinstance(mask, Mask):
        raise ValueError(
            f"mask is a {type(mask).__name__} but must be a longattn mask, such as mask=Causal() & Window(9): a dense "
            "array costs the memory that this attention saves. For packing and padding bind segment_ids: "
            "functools.partial(attention_fn, segment_ids=...)"
        )
    if dropout_rate > 0 and not deterministic:
        raise NotImplementedError(
            f"{dropout_rate=}: attention weights are never stored, so they cannot be dropped; use dropout_rate=0"
        )
    if module is not None:
        raise NotImplementedError("sow_weights=True: attention weights are never stored, so they cannot be sown")
    if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
        raise NotImplementedError(
            "qk_attn_weights_einsum_cls and attn_weights_value_einsum_cls have no place in blockwise attention"
        )
    dtype = dtype or jnp.result_type(query, key, value)
    *batch, T, H, _ = query.shape
    q, k, v = (a.astype(dtype).reshape(-1, *a.shape[-3:]) for a in (query, key, value))
    if bias is not None and len(batch) != 1:
        S = key.shape[-3]
        bias = jnp.broadcast_to(bias, (*batch, H, T, S)).reshape(-1, H, T, S)
    out = attention(
        q, k, v, mask=Full() if mask is None else mask, bias=bias, segment_ids=segment_ids, positions=positions,
        softcap=softcap, implementation=implementation,
    )  # fmt: skip
    return out.reshape(*batch, T, H, -1)
