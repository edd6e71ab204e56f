"""One optimiser step and one evaluation step as pure, jitted functions of (state, batch).

AdamW (arXiv:1711.05101) with decoupled decay on matrices only, linear warm-up and cosine decay (arXiv:1608.03983),
clipping by global norm (arXiv:1211.5063). Parameters, moments and gradients are float32 whatever `Model.dtype` is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from longattn.config import Config, Optimiser
from longattn.models.transformer import Transformer, head, init_params
from longattn.train.data import Batch
from longattn.train.loss import cross_entropy, labels_and_weights

Params = dict[str, Any]
Metrics = dict[str, Float[Array, ""]]


class State(NamedTuple):
    """What training carries from step to step, and what a checkpoint holds."""

    params: Params  # float32
    opt_state: optax.OptState
    step: Int[Array, ""]  # int32, updates done so far; also the index of the next batch


def learning_rate(config: Optimiser, steps: int) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """The learning rate of the update that follows `count` updates; the last of `steps` gets `final * lr`.

    The first update is given `lr / warmup`, not 0, which would waste it.
    """

    def schedule(count: Int[Array, ""]) -> Float[Array, ""]:
        count = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((count + 1 - config.warmup) / max(1, steps - config.warmup), 0, 1)
        cosine = config.final + (1 - config.final) * 0.5 * (1 + jnp.cos(math.pi * progress))
        return config.lr * jnp.minimum((count + 1) / max(1, config.warmup), cosine)

    return schedule


def decays(params: Params) -> Params:
    """Which parameters weight decay shrinks: a tree of bools, True for matrices.

    Scanned layers stack their parameters along a leading axis, so a gain is a vector by its name, not by its rank.
    """

    def matrix(path: tuple[Any, ...], leaf: Array) -> bool:
        return leaf.ndim >= 2 and path[-1].key not in ("scale", "bias", "sinks")

    return jax.tree_util.tree_map_with_path(matrix, params)


def optimiser(config: Config) -> optax.GradientTransformation:
    """Clipping, AdamW and the learning-rate schedule of a config."""
    c = config.optimiser
    adamw = optax.adamw(learning_rate(c, config.run.steps), c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(c.clip), adamw) if c.clip else adamw


@functools.partial(jax.jit, static_argnums=0)
def init_state(config: Config, seed: int | Int[Array, ""]) -> State:
    """A fresh state: parameters drawn from `seed`, zero moments, step 0."""
    params = init_params(config.model, jax.random.key(seed))
    return State(params, optimiser(config).init(params), jnp.zeros((), jnp.int32))


def _hidden(params: Params, batch: Batch, config: Config) -> Float[Array, "B T E"]:
    x, _ = Transformer(config.model).apply(
        {"params": params}, batch.tokens, batch.positions, batch.segment_ids, method="hidden"
    )
    return x


def _sum_loss(params: Params, batch: Batch, config: Config) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Summed loss (nats, not a mean) of one micro-batch, and its parts."""
    labels, weights = labels_and_weights(*batch)
    c = config.optimiser
    return cross_entropy(
        _hidden(params, batch, config),
        head(params, config.model),
        labels,
        weights,
        chunk=c.loss_chunk,
        z_loss=c.z_loss,
    )


def _train_step(config: Config, state: State, batch: Batch) -> tuple[State, Metrics]:
    pieces = config.optimiser.accumulate
    # The mean is over all weighted tokens of the step; a mean of the micro-batches' means would weigh them unequally.
    weight_sum = labels_and_weights(*batch)[1].sum()
    scale = 1 / jnp.maximum(weight_sum, 1)

    def sums(params: Params, piece: Batch) -> tuple[Params, Float[Array, " 2"]]:
        def loss(p: Params) -> tuple[Float[Array, ""], Float[Array, ""]]:
            total, aux = _sum_loss(p, piece, config)
            return total * scale, aux["nll_sum"] * scale

        (total, nll), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, jnp.stack([total, nll])

    if pieces == 1:
        grads, totals = sums(state.params, batch)
    else:
        split = jax.tree.map(lambda a: a.reshape(pieces, -1, *a.shape[1:]), batch)

        def add(carry: Any, piece: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, sums(state.params, piece)), None

        zeros = jax.tree.map(jnp.zeros_like, state.params), jnp.zeros(2)
        (grads, totals), _ = jax.lax.scan(add, zeros, split)

    updates, opt_state = optimiser(config).update(grads, state.opt_state, state.params)
    metrics = {
        "loss": totals[0],  # nats per weighted token, z-loss included
        "nll": totals[1],  # nats per weighted token
        "grad_norm": optax.global_norm(grads),  # before clipping
        "weight_sum": weight_sum,
        "lr": learning_rate(config.optimiser, config.run.steps)(state.step),
    }
    return State(optax.apply_updates(state.params, updates), opt_state, state.step + 1), metrics


@functools.lru_cache
def train_step(config: Config) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The jitted update (State, Batch) -> (State, metrics); the given state is donated.

    Metrics are float32 scalars: loss and nll in nats per weighted token, grad_norm before clipping, weight_sum, lr.
    """
    return jax.jit(functools.partial(_train_step, config), donate_argnums=0)


def _eval_step(config: Config, params: Params, batch: Batch) -> dict[str, Array]:
    labels, weights = labels_and_weights(*batch)
    x, w = _hidden(params, batch, config), head(params, config.model)
    _, aux = cross_entropy(x, w, labels, weights, chunk=config.optimiser.loss_chunk)

    B, T = batch.tokens.shape
    chunk = min(config.optimiser.loss_chunk, B * T)  # logits of this many tokens exist at once, here too
    short = -B * T % chunk

    def hits(pair: tuple[Float[Array, "C E"], Int[Array, " C"]]) -> Float[Array, " C"]:
        x, label = pair
        logits = jnp.einsum("CE,WE->CW", x, w.astype(x.dtype), preferred_element_type=jnp.float32)
        return (jnp.argmax(logits, axis=-1) == label).astype(jnp.float32)

    pieces = (
        jnp.pad(x.reshape(B * T, -1), ((0, short), (0, 0))).reshape(-1, chunk, x.shape[-1]),
        jnp.pad(labels.reshape(-1), (0, short)).reshape(-1, chunk),
    )
    correct = jax.lax.map(hits, pieces).reshape(-1)[: B * T]

    seen = jnp.clip(batch.positions, 0, T - 1).reshape(-1)  # a prediction at position p has read p + 1 tokens
    zeros = jnp.zeros(T, jnp.float32)
    return {
        "nll_sum": aux["nll_sum"],
        "weight_sum": aux["weight_sum"],
        "correct_sum": jnp.sum(correct * weights.reshape(-1)),
        "nll_by_position": zeros.at[seen].add((aux["nll"] * weights).reshape(-1)),
        "weight_by_position": zeros.at[seen].add(weights.reshape(-1)),
    }


@functools.lru_cache
def eval_step(config: Config) -> Callable[[Params, Batch], dict[str, Array]]:
    """The jitted evaluation (params, Batch) -> float32 sums over weighted tokens.

    nll_sum, weight_sum, correct_sum (argmax hits) are scalars; nll_by_position and weight_by_position `[T]` are indexed
    by the position of the last token read, so entry p speaks of predictions from p + 1 tokens of context.
    """
    return jax.jit(functools.partial(_eval_step, config))


def batch_shapes(config: Config) -> Batch:
    """The shapes and dtypes of one step's batch, to compile for without data."""
    shape = (config.data.B, config.data.T)
    ids = jax.ShapeDtypeStruct(shape, np.dtype(np.int32))
    return Batch(ids, ids, ids, jax.ShapeDtypeStruct(shape, np.dtype(np.float32)))
