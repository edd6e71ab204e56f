"""One optimiser step and one evaluation step as pure, jitted functions of (state, batch).

AdamW (arXiv:1711.05101) with decoupled decay on matrices only, linear warm-up and cosine decay (arXiv:1608.03983),
clipping by global norm (arXiv:1211.5063). Parameters, moments and gradients are float32 whatever `Model.dtype` is.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from longattn.config import Config, Model, Optimiser
from longattn.models.context import Context
from longattn.models.mixers import layout_of, module_of
from longattn.models.sharding import shardings
from longattn.models.transformer import Transformer, head, init_params
from longattn.ops import dispatch
from longattn.parallel import SequenceLayout
from longattn.parallel import mesh as meshes
from longattn.parallel.attention import strategy_on
from longattn.parallel.layout import names_of
from longattn.train.data import Batch, Source, Spread
from longattn.train.loss import cross_entropy, gathered, labels_and_weights

Params = dict[str, Any]
Metrics = dict[str, Float[Array, ""]]


class State(NamedTuple):
    """The values that training carries from step to step and that a checkpoint holds."""

    params: Params  # float32 arrays
    opt_state: optax.OptState
    step: Int[Array, ""]  # int32, updates done so far; also the index of the next batch


def learning_rate(config: Optimiser, steps: int) -> Callable[[Int[Array, ""]], Float[Array, ""]]:
    """The learning rate of the update that follows `count` updates; the last of `steps` gets `final * lr`.

    The first update gets `lr / warmup`: a rate of 0 would waste it.
    """

    def schedule(count: Int[Array, ""]) -> Float[Array, ""]:
        count = jnp.asarray(count, jnp.float32)
        progress = jnp.clip((count + 1 - config.warmup) / max(1, steps - config.warmup), 0, 1)
        cosine = config.final + (1 - config.final) * 0.5 * (1 + jnp.cos(math.pi * progress))
        return config.lr * jnp.minimum((count + 1) / max(1, config.warmup), cosine)

    return schedule


def decays(params: Params, model: Model) -> Params:
    """Which parameters weight decay shrinks, a tree of bools: all but the gains of norms and what mixers exempt.

    Names decide, not ranks: scanned layers stack their parameters along a leading axis.
    """

    def shrinks(path: tuple[Any, ...], leaf: Array) -> bool:
        names = [entry.key for entry in path]
        if "mixer" not in names:
            return names[-1] != "scale"
        at = names.index("mixer")
        mixer = model.layers[int(names[at - 1].removeprefix("layer_"))]
        return "/".join(names[at + 1 :]) not in module_of(mixer).decay_free(mixer, model)

    return jax.tree_util.tree_map_with_path(shrinks, params)


def optimiser(config: Config) -> optax.GradientTransformation:
    """Clipping, AdamW and the learning-rate schedule of a config."""
    c = config.optimiser
    mask = functools.partial(decays, model=config.model)
    adamw = optax.adamw(learning_rate(c, config.run.steps), c.b1, c.b2, c.eps, weight_decay=c.weight_decay, mask=mask)
    return optax.chain(optax.clip_by_global_norm(c.clip), adamw) if c.clip else adamw


def context_of(config: Config, devices: Sequence[Any] | None = None) -> Context | None:
    """The context of a config's training; None, for one device, where every axis of the mesh is 1.

    Where all layers need their tokens in order, the layout is contiguous whatever the config says.

    Args:
      config: the config whose mesh is made.
      devices: as for `longattn.parallel.make_mesh`.

    Raises ValueError where the number of devices is not the mesh's, or the strategy does not go with the mesh.
    """
    c, processes = config.mesh, jax.process_count()
    strategy_on(c)
    if c.size == 1 and processes == 1:
        return None
    if c.size > jax.device_count() and devices is None and jax.default_backend() == "cpu" and c.size % processes == 0:
        whose = "each of the processes" if processes > 1 else "the CPU"
        raise ValueError(
            f"the mesh needs {c.size} devices and there are {jax.device_count()}: JAX_NUM_CPU_DEVICES="
            f"{c.size // processes} in the environment lets {whose} pass for as many, or change --mesh.*"
        )
    layouts = {layout_of(mixer, SequenceLayout(c.layout)) for mixer in config.model.layers}
    return Context(
        mesh=meshes.make_mesh(**c.sizes, devices=devices),
        axis=("ring", "seq") if c.ring > 1 else "seq",
        strategy=c.strategy,
        layout=SequenceLayout(c.layout) if SequenceLayout(c.layout) in layouts else SequenceLayout(),
    )


def _spread(context: Context | None) -> TypeGuard[Context]:
    """Whether training runs on a mesh."""
    return context is not None and context.mesh is not None


def init_state(config: Config, seed: int | Int[Array, ""], context: Context | None = None) -> State:
    """A fresh state, sharded if the context has a mesh: parameters drawn from `seed`, zero moments, step 0."""
    return _init(config, context)(seed)


@functools.lru_cache
def _init(config: Config, context: Context | None) -> Callable[[Any], State]:
    def init(seed: int | Int[Array, ""]) -> State:
        params = init_params(config.model, jax.random.key(seed))
        return State(params, optimiser(config).init(params), jnp.zeros((), jnp.int32))

    if not _spread(context):
        return jax.jit(init)
    return jax.jit(init, out_shardings=shardings(context.mesh, jax.eval_shape(init, 0), config.model))


def state_shapes(config: Config, context: Context | None = None) -> State:
    """The state's shapes and dtypes, and its shardings if the context has a mesh."""
    shapes = jax.eval_shape(lambda: _init(config, None)(0))
    if not _spread(context):
        return shapes
    lies = shardings(context.mesh, shapes, config.model)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, lies)


def batch_sharding(config: Config, context: Context) -> NamedSharding:
    """The sharding of each array of a batch on the context's mesh."""
    return meshes.sharding(context.mesh, context.tokens, (config.data.B, config.data.T), "the batch")


def on_mesh(source: Source, config: Config, context: Context) -> Spread:
    """A source of the config's data whose batches are sharded over the context's mesh, in its layout."""
    shape = config.data.B, config.data.T
    return Spread(source, shape, batch_sharding(config, context), context.layout, context.shards)


def _hidden(params: Params, batch: Batch, config: Config, context: Context | None) -> Float[Array, "B T E"]:
    x, _ = Transformer(config.model, context).apply(
        {"params": params}, batch.tokens, batch.positions, batch.segment_ids, method="hidden"
    )
    return x


def _labels(context: Context | None, batch: Batch) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """`labels_and_weights` of a batch in the context's layout: a label is the next token of the sequence."""
    context = context or Context()
    with jax.named_scope("labels"):
        return context.permute(labels_and_weights(*context.restore(batch)))


def _token_sums(context: Context | None, f: Callable[..., Any], x: Array, w: Array, *rest: Array) -> Any:
    """Sums over all tokens that f(sliced, x [B T E], w, *rest [B T]) gives, on a mesh first per device.

    The loss walks over the sequence in chunks. In a shard_map each device walks over its own shard; outside, each chunk
    would lie on one device while the others wait. In the shard_map the head is sliced along E over the axes `sliced`.
    """
    if not _spread(context):
        return f((), x, w, *rest)
    tokens = meshes.fit(context.tokens, context.mesh)
    slices = meshes.fit(P(None, meshes.SLICED), context.mesh)
    axes = (*tokens[0], *names_of(tokens[1]))

    @functools.partial(
        jax.shard_map,
        mesh=context.mesh,
        in_specs=(tokens, slices, *(tokens for _ in rest)),
        out_specs=P(),
        check_vma=True,
    )
    def local(*arrays: Array) -> Any:
        return jax.lax.psum(f(slices[1], *dispatch.vary_together(arrays)), axes)

    return local(x, w, *rest)


def _sum_loss(
    params: Params, batch: Batch, config: Config, context: Context | None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The summed loss and the summed negative log-likelihood, in nats, of one micro-batch."""

    def sums(
        sliced: tuple[str, ...], x: Array, w: Array, labels: Array, weights: Array
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        c = config.optimiser
        total, aux = cross_entropy(x, w, labels, weights, chunk=c.loss_chunk, z_loss=c.z_loss, sliced=sliced)
        return total, aux["nll_sum"]

    x = _hidden(params, batch, config, context)
    with jax.named_scope("loss"):
        return _token_sums(context, sums, x, head(params, config.model), *_labels(context, batch))


def _train_step(config: Config, context: Context | None, state: State, batch: Batch) -> tuple[State, Metrics]:
    pieces = config.optimiser.accumulate
    # The mean is over all weighted tokens of the step; a mean of the micro-batches' means would weigh them unequally.
    with jax.named_scope("loss"):
        weight_sum = _labels(context, batch)[1].sum()
        scale = 1 / jnp.maximum(weight_sum, 1)

    def sums(params: Params, piece: Batch) -> tuple[Params, Float[Array, " 2"]]:
        def loss(p: Params) -> tuple[Float[Array, ""], Float[Array, ""]]:
            total, nll = _sum_loss(p, piece, config, context)
            return total * scale, nll * scale

        (total, nll), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return grads, jnp.stack([total, nll])

    if pieces == 1:
        grads, totals = sums(state.params, batch)
    else:
        split = jax.tree.map(lambda a: a.reshape(pieces, -1, *a.shape[1:]), batch)
        if _spread(context):  # spread each micro-batch's rows over all devices
            spec = P(None, *context.tokens)
            split = jax.tree.map(lambda a: meshes.place(a, context.mesh, spec, "the micro-batches"), split)

        def add(carry: Any, piece: Batch) -> tuple[Any, None]:
            new = sums(state.params, piece)
            with jax.named_scope("accumulate"):
                return jax.tree.map(jnp.add, carry, new), None

        zeros = jax.tree.map(jnp.zeros_like, state.params), jnp.zeros(2)
        (grads, totals), _ = jax.lax.scan(add, zeros, split)

    with jax.named_scope("optimiser"):
        updates, opt_state = optimiser(config).update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    with jax.named_scope("metrics"):
        metrics = {
            "loss": totals[0],  # nats per weighted token, z-loss included
            "nll": totals[1],  # nats per weighted token
            "grad_norm": optax.tree.norm(grads),  # before clipping
            "weight_sum": weight_sum,
            "lr": learning_rate(config.optimiser, config.run.steps)(state.step),
        }
    return State(params, opt_state, state.step + 1), metrics


@jax.jit
def all_finite(state: State) -> Bool[Array, ""]:
    """Whether every parameter and every moment of the optimiser is finite."""
    floats = [x for x in jax.tree.leaves((state.params, state.opt_state)) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.stack([jnp.isfinite(x).all() for x in floats]).all()


@functools.lru_cache
def train_step(config: Config, context: Context | None = None) -> Callable[[State, Batch], tuple[State, Metrics]]:
    """The jitted update (State, Batch) -> (State, metrics); the given state is donated.

    Metrics are float32 scalars: loss and nll in nats per weighted token, grad_norm before clipping, weight_sum, lr.
    On a mesh the state has the shardings of `state_shapes`, before and after, and the batch that of `batch_sharding`.
    """
    step = functools.partial(_train_step, config, context)
    if not _spread(context):
        return jax.jit(step, donate_argnums=0)
    lies = jax.tree.map(lambda x: x.sharding, state_shapes(config, context))
    inputs, outputs = (lies, batch_sharding(config, context)), (lies, NamedSharding(context.mesh, P()))
    return jax.jit(step, donate_argnums=0, in_shardings=inputs, out_shardings=outputs)


def _eval_step(config: Config, context: Context | None, params: Params, batch: Batch) -> dict[str, Array]:
    labels, weights = _labels(context, batch)
    sums = functools.partial(_eval_sums, config.optimiser.loss_chunk, batch.tokens.shape[1])
    x = _hidden(params, batch, config, context)
    with jax.named_scope("loss"):
        return _token_sums(context, sums, x, head(params, config.model), labels, weights, batch.positions)


def _eval_sums(
    chunk: int,
    length: int,
    sliced: tuple[str, ...],
    x: Array,
    w: Array,
    labels: Array,
    weights: Array,
    positions: Array,
) -> dict[str, Array]:
    """The sums of `eval_step` over these tokens of sequences of `length` tokens."""
    w = gathered(w.astype(x.dtype), sliced)
    _, aux = cross_entropy(x, w, labels, weights, chunk=chunk)

    B, T = labels.shape
    chunk = min(chunk, B * T)  # the number of tokens whose logits exist at once
    short = -B * T % chunk

    def hits(pair: tuple[Float[Array, "C E"], Int[Array, " C"]]) -> Float[Array, " C"]:
        x, label = pair
        logits = jnp.einsum("CE,WE->CW", x, w, preferred_element_type=jnp.float32)
        return (jnp.argmax(logits, axis=-1) == label).astype(jnp.float32)

    pieces = (
        jnp.pad(x.reshape(B * T, -1), ((0, short), (0, 0))).reshape(-1, chunk, x.shape[-1]),
        jnp.pad(labels.reshape(-1), (0, short)).reshape(-1, chunk),
    )
    correct = jax.lax.map(hits, pieces).reshape(-1)[: B * T]

    seen = jnp.clip(positions, 0, length - 1).reshape(-1)  # a prediction at position p has read p + 1 tokens
    zeros = jnp.zeros(length, jnp.float32)
    return {
        "nll_sum": aux["nll_sum"],
        "weight_sum": aux["weight_sum"],
        "correct_sum": jnp.sum(correct * weights.reshape(-1)),
        "nll_by_position": zeros.at[seen].add((aux["nll"] * weights).reshape(-1)),
        "weight_by_position": zeros.at[seen].add(weights.reshape(-1)),
    }


@functools.lru_cache
def eval_step(config: Config, context: Context | None = None) -> Callable[[Params, Batch], dict[str, Array]]:
    """The jitted evaluation (params, Batch) -> float32 sums over weighted tokens.

    nll_sum, weight_sum, correct_sum (argmax hits) are scalars; nll_by_position and weight_by_position `[T]` are indexed
    by the position of the last token read: entry p holds predictions from p + 1 tokens of context.
    """
    step = functools.partial(_eval_step, config, context)
    if not _spread(context):
        return jax.jit(step)
    lies = jax.tree.map(lambda x: x.sharding, state_shapes(config, context).params)
    return jax.jit(step, in_shardings=(lies, batch_sharding(config, context)))


def batch_shapes(config: Config) -> Batch:
    """The shapes and dtypes of one step's batch, for compiling without data."""
    shape = (config.data.B, config.data.T)
    ids = jax.ShapeDtypeStruct(shape, np.dtype(np.int32))
    return Batch(ids, ids, ids, jax.ShapeDtypeStruct(shape, np.dtype(np.float32)))
