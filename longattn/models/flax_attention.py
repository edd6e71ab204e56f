"""`longattn.attention` for Flax's own multi-head attention modules, Linen and NNX."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from longattn.mask import Causal, Full, Mask
from longattn.ops.attention import attention


def attention_fn(
    query: Float[Array, "*B T H D"],
    key: Float[Array, "*B S K D"],
    value: Float[Array, "*B S K V"],
    bias: Float[Array, "..."] | None = None,
    mask: Mask | None = None,
    *,
    is_causal: bool = False,
    input_positions: Any = None,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    broadcast_dropout: bool = True,
    deterministic: bool = True,
    dtype: Any = None,
    precision: Any = None,
    force_fp32_for_softmax: bool = False,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    module: Any = None,
    segment_ids: Any = None,
    positions: Any = None,
    softcap: float | None = None,
    implementation: str | tuple[str, ...] | None = None,
) -> Float[Array, "*B T H V"]:
    """Computes `longattn.attention` in the place of Flax's `dot_product_attention`, of Linen or NNX.

        attend = nn.MultiHeadDotProductAttention(num_heads=8, attention_fn=longattn.models.attention_fn)
        y = attend(x, mask=Causal() & Window(512))

        attend = nnx.MultiHeadAttention(8, 512, decode=False, attention_fn=longattn.models.attention_fn, rngs=rngs)
        y = attend(x, is_causal=True)

    Flax passes the `mask` of its call on unchanged, so it is a longattn mask here; None shows everything, as in Flax.
    Bind the arguments that Flax does not know (segment_ids, positions, softcap, implementation) with
    `functools.partial`. The softmax is in float32 and float32 inputs are multiplied in full float32, so `precision` and
    `force_fp32_for_softmax` never ask for more.

    Args:
        is_causal: applies `Causal() & mask`. NNX passes it.
        input_positions: positions of the tokens [*B T], for queries and keys. NNX passes them where they are given.

    Raises:
        ValueError: if the mask is a dense array, or positions are given twice.
        NotImplementedError: for dropout of the weights, sowing them, or replaced einsums.
    """
    del dropout_rng, broadcast_dropout, precision, force_fp32_for_softmax
    if mask is not None and not isinstance(mask, Mask):
        raise ValueError(
            f"mask is a {type(mask).__name__} but must be a longattn mask, such as mask=Causal() & Window(9): a dense "
            "array costs the memory that this attention saves. For packing and padding bind segment_ids: "
            "functools.partial(attention_fn, segment_ids=...). Flax's decode=True makes a dense mask of its cache, so "
            "it is not supported"
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
    if input_positions is not None:
        if positions is not None:
            raise ValueError("positions are bound and input_positions are given: they must come from one place")
        positions = jnp.broadcast_to(input_positions, (*batch, T)).reshape(-1, T).astype(jnp.int32)
    if is_causal:
        mask = Causal() if mask is None else Causal() & mask
    out = attention(
        q, k, v, mask=Full() if mask is None else mask, bias=bias, segment_ids=segment_ids, positions=positions,
        softcap=softcap, implementation=implementation,
    )  # fmt: skip
    return out.reshape(*batch, T, H, -1)
