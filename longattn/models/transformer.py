"""A decoder-only transformer: pre-norm residual blocks of (mixer, SwiGLU), one mixer per layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray, UInt32

from longattn import config as configs
from longattn.models.context import Context
from longattn.models.layers import RMSNorm, SwiGLU, fan_in, no_state
from longattn.models.mixers import layout_of, module_of
from longattn.parallel import SequenceLayout

_policies = jax.checkpoint_policies
_KEPT = ("attention_out", "attention_lse", "linear_state")
_attention = _policies.save_only_these_names(*_KEPT)

# What a block keeps for the backward pass besides its input; the rest is recomputed there. "none", not here, keeps all.
REMAT = {
    "full": _policies.nothing_saveable,
    "attention": _attention,  # out and lse of attention, out and states of scans: their forward does not run twice
    "offload": _policies.save_and_offload_only_these_names(  # the same and the block's input, in the host's memory
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input", *_KEPT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable, _attention
    ),  # and all projections
}


Ids = dict[str, tuple[Int32[Array, "B T"] | None, Int32[Array, "B T"] | None]]
"""Positions and segment ids in each layout that a layer needs, by its name."""


class Block(nn.Module):
    """One residual block: x += mixer(norm(x)); x += mlp(norm(x))."""

    mixer: configs.Mixer
    model: configs.Model
    context: Context | None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T E"], positions: Int32[Array, "B T"] | None, segment_ids: Int32[Array, "B T"] | None
    ) -> Float[Array, "B T E"]:
        x = checkpoint_name(x, "block_input")
        mixer = module_of(self.mixer)(self.mixer, self.model, self.context, name="mixer")
        y, _ = mixer(RMSNorm(self.model.norm_eps, name="mixer_norm")(x), positions, segment_ids, None)
        context = self.context or Context()
        x = context.spread(x + y)
        mlp = SwiGLU(self.model, self.context, name="mlp")
        return context.spread(x + mlp(RMSNorm(self.model.norm_eps, name="mlp_norm")(x)))


class Period(nn.Module):
    """The blocks of one period of the mixers: the body of the scan over layers."""

    mixers: tuple[configs.Mixer, ...]
    model: configs.Model
    context: Context | None

    @nn.compact
    def __call__(self, x: Any, ids: Ids) -> tuple[Any, None]:
        context = self.context or Context()
        blocks = [
            _block(self.model, mixer, self.context, in_scan=True, name=f"layer_{i}")
            for i, mixer in enumerate(self.mixers)
        ]
        first = layout_of(self.mixers[0], context.layout)
        x, lies = _through(blocks, x, first, ids, context)
        return context.convert(x, lies, first), None


def _block(
    model: configs.Model, mixer: configs.Mixer, context: Context | None, *, in_scan: bool, name: str | None = None
) -> Block:
    """Returns a block under the model's remat policy, for tokens in its mixer's layout."""
    if context is not None:
        context = context.lying(layout_of(mixer, context.layout))
    if model.remat == "none":
        return Block(mixer, model, context, name=name)
    # In a scan the recomputation cannot be merged with the forward pass; outside, XLA must be kept from it.
    return nn.remat(Block, policy=REMAT[model.remat], prevent_cse=not in_scan)(mixer, model, context, name=name)


def _through(
    blocks: Sequence[Block], x: Array, lies: SequenceLayout, ids: Ids, context: Context
) -> tuple[Array, SequenceLayout]:
    """Returns the activations after some blocks, and their layout: that of the last mixer."""
    for block in blocks:
        needed = layout_of(block.mixer, context.layout)
        x, lies = block(context.convert(x, lies, needed), *ids[needed.name]), needed
    return x, lies


def _ids(model: configs.Model, context: Context, positions: Array | None, segment_ids: Array | None) -> Ids:
    """Returns the ids in every layout that the layers need: the context's, or contiguous."""
    ids = positions, segment_ids
    layouts = {layout_of(mixer, context.layout) for mixer in model.layers}
    return {layout.name: ids if layout == context.layout else context.restore(ids) for layout in layouts}


def period(model: configs.Model) -> int:
    """Returns the layers per step of the scan: the shortest period that divides N, or N where nothing is scanned."""
    layers = model.layers
    if not model.scan:
        return model.N
    return next(p for p in range(1, model.N + 1) if model.N % p == 0 and layers == layers[:p] * (model.N // p))


class Transformer(nn.Module):
    """Maps tokens to logits. The only collection is `params`; it holds float32 arrays:

    embedding [W E]; norm/scale [E]; head [W E] where not tied; and per layer mixer_norm/scale, mixer/{q [E H D],
    k, v [E K D], out [H D E], ...}, mlp_norm/scale, mlp/{gate, up [E F], down [F E]}: under layer_i, or where layers
    are scanned under layers/layer_i with a leading axis of N / period.
    """

    config: configs.Model
    context: Context | None = None

    def setup(self) -> None:
        c = self.config
        unit = fan_in(1, 0)  # rows of length 1
        self.embedding = self.param("embedding", unit, (c.W, c.E), jnp.float32)
        if not c.tie:
            self.head = self.param("head", unit, (c.W, c.E), jnp.float32)
        self.norm = RMSNorm(c.norm_eps)
        p = period(c)
        if p == c.N:
            self.layer = [_block(c, mixer, self.context, in_scan=False) for mixer in c.layers]
        else:
            scan = nn.scan(
                Period, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=c.N // p
            )
            self.layers = scan(c.layers[:p], c, self.context)

    def hidden(
        self,
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        state: None = None,
    ) -> tuple[Float[Array, "B T E"], None]:
        """Returns the normed input of the head, in the compute dtype. The default is arange(T) and one segment.

        All arrays are in the context's layout. Activations are converted between layers that need another one, ids
        once for all layers.
        """
        no_state(state)
        # Tokens enter with RMS 1 (section 3.4 of arXiv:1706.03762), so that the blocks' outputs do not drown them, and
        # leave through rows of length 1. (Where tied, a token's own logit starts high: the loss starts above ln W.)
        context = self.context or Context()
        with jax.named_scope("embedding"):
            x = context.spread(context.rows(self.embedding, tokens, self.config.E**0.5, self.config.dtype))
        ids = _ids(self.config, context, positions, segment_ids)
        if period(self.config) == self.config.N:
            x, lies = _through(self.layer, x, context.layout, ids, context)
        else:
            lies = layout_of(self.config.layers[0], context.layout)
            x, _ = self.layers(context.convert(x, context.layout, lies), ids)
        return self.norm(context.convert(x, lies, context.layout)), None

    def __call__(
        self,
        tokens: Int32[Array, "B T"],
        positions: Int32[Array, "B T"] | None = None,
        segment_ids: Int32[Array, "B T"] | None = None,
        state: None = None,
    ) -> tuple[Float32[Array, "B T W"], None]:
        """Returns the logits of each next token. Training uses `hidden` and a chunked loss instead."""
        x, state = self.hidden(tokens, positions, segment_ids, state)
        with jax.named_scope("head"):
            w = (self.embedding if self.config.tie else self.head).astype(x.dtype)
            return jnp.einsum("BTE,WE->BTW", x, w, preferred_element_type=jnp.float32), state


def head(params: dict[str, Any], config: configs.Model) -> Float32[Array, "W E"]:
    """Returns the output head's weights: the embedding where it is tied."""
    return params["embedding" if config.tie else "head"]


def init_params(config: configs.Model, key: PRNGKeyArray | UInt32[Array, "2"]) -> dict[str, Any]:
    """Returns fresh parameters, a nested dict of float32 arrays."""
    tokens = jnp.zeros(
        (1, 1), jnp.int32
    )  # parameters depend on no length, and of one token the reference costs nothing
    return jax.jit(lambda key: Transformer(config, Context("reference")).init(key, tokens)["params"])(key)
