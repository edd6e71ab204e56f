"""One layout holds for a whole training step: data, labels, positions, layers and loss. Conversions are counted."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longattn.config import ByteLM, Config, GatedDeltaNet, Mesh, Model, Optimiser, RetNet, Run, Softmax
from longattn.mask import Causal, Window
from longattn.models import Context, Transformer, init_params
from longattn.parallel import SequenceLayout, make_mesh
from longattn.train import data
from longattn.train.loss import labels_and_weights
from longattn.train.step import (
    State,
    _labels,
    batch_sharding,
    context_of,
    eval_step,
    init_state,
    state_shapes,
    train_step,
)

LAYOUTS = ("contiguous", "zigzag", "striped")
B1 = 0.9
CONFIG = Config(
    model=Model(
        N=1, E=16, F=24, H=4, K=2, D=8, dtype="float32", mlp_chunk=5,  # pieces that do not divide a shard
        mixers=(Softmax(mask=Causal() & Window(20), sinks=True),),
    ),
    data=ByteLM(T=32, B=4),
    optimiser=Optimiser(lr=1e-2, loss_chunk=14, clip=0, b1=B1),
    run=Run(steps=10),
)  # fmt: skip


def packed(B: int, T: int, seed: int = 0) -> data.Batch:
    """Documents of many lengths, most across the border of a shard, uneven weights, and a padded tail."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(B):
        edges = np.sort(rng.choice(np.arange(1, T - 2), 4, replace=False))
        ids = np.searchsorted(edges, np.arange(T), side="right") + 1
        ids[-2:] = 0
        starts = np.flatnonzero(np.diff(ids, prepend=-1))
        rows.append((ids, np.arange(T) - starts[np.searchsorted(starts, np.arange(T), side="right") - 1]))
    ids, positions = (np.stack(x).astype(np.int32) for x in zip(*rows))
    weights = (rng.uniform(0.1, 1, (B, T)) * (ids > 0)).astype(np.float32)
    return data.Batch(rng.integers(0, 257, (B, T)).astype(np.int32), positions, ids, weights)


HYBRID = dataclasses.replace(CONFIG.model, N=2, mixers=(*CONFIG.model.mixers, GatedDeltaNet(V=6)))


@functools.cache
def fresh(model: Model) -> State:
    return init_state(dataclasses.replace(CONFIG, model=model), 0)


def stepped(config: Config) -> tuple[dict[str, float], list[np.ndarray], Any]:
    """Takes one step; returns its metrics, its gradients, and a function that evaluates the same batch.

    On a mesh, the devices read the batch.
    """
    context, batch = context_of(config), packed(config.data.B, config.data.T)
    state = jax.tree.map(jnp.copy, fresh(config.model))
    if context is not None:
        state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, state_shapes(config, context)))
        source = SimpleNamespace(
            batch=lambda step, rows: data.Batch(*(x[rows] for x in batch)), num_batches=1, info={}, lengths={}
        )
        sharding, shape = batch_sharding(config, context), (config.data.B, config.data.T)
        batch = data.Spread(source, shape, sharding, context.layout, context.shards).batch(0)
    state, metrics = train_step(config, context)(state, batch)
    (adam,) = (s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    gradients = [np.asarray(m) / (1 - B1) for m in jax.tree.leaves(adam.mu)]
    evaluated = lambda: jax.device_get(eval_step(config, context)(state.params, batch))
    return {name: float(x) for name, x in metrics.items()}, gradients, evaluated


@functools.cache
def on_one_device(model: Model) -> tuple[dict[str, float], list[np.ndarray], Any]:
    return stepped(dataclasses.replace(CONFIG, model=model))


def agree(config: Config, *, evaluation: bool = False) -> None:
    """Compares a step on the mesh with one device: sums have other orders, with sqrt(n) roundings for n terms."""
    metrics, gradients, evaluated = stepped(config)
    expected, expected_gradients, expected_evaluated = on_one_device(config.model)
    rtol = np.finfo(np.float32).eps * np.sqrt(config.data.B * config.data.T * config.model.E)
    for name, want in expected.items():
        np.testing.assert_allclose(metrics[name], want, rtol=rtol, err_msg=name)
    for got, want in zip(gradients, expected_gradients, strict=True):
        assert np.linalg.norm(got - want) <= 10 * rtol * np.linalg.norm(want)  # errors of a gradient's factors multiply
    if evaluation:
        sums = evaluated()
        for name, want in expected_evaluated().items():
            np.testing.assert_allclose(sums[name], want, rtol=4 * rtol, atol=1e-5, err_msg=name)


ACCUMULATED = dataclasses.replace(CONFIG.optimiser, accumulate=2)
SPREAD = {
    "zigzag ring": dataclasses.replace(CONFIG, mesh=Mesh(seq=4, data=2, layout="zigzag")),
    "hybrid": dataclasses.replace(
        CONFIG, model=HYBRID, mesh=Mesh(seq=2, tensor=2, fsdp=2, layout="zigzag", strategy="all_gather")
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SPREAD)
def test_a_step_in_a_layout_is_that_of_one_device(name: str) -> None:
    agree(SPREAD[name])


@pytest.mark.slow
def test_an_evaluation_in_a_layout_is_that_of_one_device() -> None:
    """Scores by position agree too, also with micro-batches, which have rows of their own on all devices."""
    mesh = Mesh(seq=4, data=2, layout="striped", strategy="ulysses")
    agree(dataclasses.replace(CONFIG, mesh=mesh, optimiser=ACCUMULATED), evaluation=True)


# ---- labels


def context_in(layout: str, P: int) -> Context:
    return Context(mesh=make_mesh(seq=P, devices=jax.devices()[:P]), layout=SequenceLayout(layout))


@pytest.mark.parametrize("P", [2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_next_token_is_the_sequence_s_in_every_layout(layout: str, P: int) -> None:
    context, batch = context_in(layout, P), packed(2, 24)
    permuted = data.Batch(*(jnp.asarray(context.layout.permute(x, P)) for x in batch))
    got = jax.jit(functools.partial(_labels, context))(permuted)
    for x, want in zip(got, labels_and_weights(*map(jnp.asarray, batch)), strict=True):
        np.testing.assert_array_equal(context.layout.restore(np.asarray(x), P), want)


def test_labels_send_ids_alone() -> None:
    """The only messages are all-gathers of the four arrays of a batch: no activation is sent."""
    config = dataclasses.replace(CONFIG, mesh=Mesh(seq=4, data=2, layout="zigzag"))
    context = context_of(config)
    sharding = batch_sharding(config, context)
    shapes = [jax.ShapeDtypeStruct((4, 32), d, sharding=sharding) for d in (np.int32, np.int32, np.int32, np.float32)]
    text = jax.jit(functools.partial(_labels, context)).lower(data.Batch(*shapes)).compile().as_text()
    sent = re.findall(
        r"= (\S+) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text
    )
    assert Counter(kind for _, kind in sent) == {"all-gather": 4}, sent
    assert all(re.match(r"[sf]32\[2,32\]", shape) for shape, _ in sent), sent


# ---- layers that need their tokens in order


@dataclasses.dataclass(frozen=True)
class Short(Context):
    """Linear attention sends nothing here, which leaves the messages of conversions."""

    def linear_attention(self, q, k, v, **options):
        return v, None


def conversions(jaxpr, runs: int = 1) -> Counter:
    """Counts the conversions of a jaxpr by their kind. Each sends two halves under zigzag."""
    found: Counter = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "ppermute":
            found[re.search(r"\w+_to_\w+", str(equation.source_info.name_stack))[0]] += runs
        times = runs * equation.params.get("length", 1) if equation.primitive.name == "scan" else runs
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found += conversions(inner, times)
    return found


@pytest.mark.parametrize(
    ("pattern", "scan", "there", "back"),
    [
        ("SS", True, 0, 0),
        ("SR", True, 2, 2),  # in each of two periods
        ("RS", True, 1 + 2, 2 + 1),  # before and after the scan too
        ("RSSR", False, 2, 2),
        ("RR", True, 1, 1),
    ],
)
def test_activations_are_converted_once_for_each_change_of_the_layers_kind(monkeypatch, pattern, scan, there, back):
    mixers = tuple({"S": Softmax(), "R": RetNet()}[x] for x in pattern)
    model = dataclasses.replace(CONFIG.model, N=4, mixers=mixers, scan=scan, remat="attention", mlp_chunk=None)
    context = Short(mesh=make_mesh(seq=4, data=2), layout=SequenceLayout("zigzag"), strategy="all_gather")
    restored, restore = [], Context.restore
    monkeypatch.setattr(Context, "restore", lambda self, ids: restored.append(ids) or restore(self, ids))
    batch = data.Batch(*map(jnp.asarray, packed(4, 32)))

    def loss(params):
        apply = Transformer(model, context).apply
        return apply({"params": params}, batch.tokens, batch.positions, batch.segment_ids, method="hidden")[0].sum()

    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    forward = conversions(jax.make_jaxpr(loss)(shapes).jaxpr)
    assert forward == +Counter({"zigzag_to_contiguous": 2 * there, "contiguous_to_zigzag": 2 * back})
    assert len(restored) == (1 if there else 0)  # ids, for all layers at once
    both = conversions(jax.make_jaxpr(jax.grad(loss))(shapes).jaxpr)
    assert both.total() == 2 * forward.total()  # each runs once more backward; none is recomputed


def test_where_no_layer_wants_another_layout_nothing_is_converted() -> None:
    """The data of recurrent models are contiguous, whatever the mesh says."""
    mesh = Mesh(seq=4, data=2, layout="zigzag")
    layout = lambda *mixers: (
        context_of(
            dataclasses.replace(CONFIG, mesh=mesh, model=dataclasses.replace(CONFIG.model, N=2, mixers=mixers))
        ).layout
    )
    assert layout(RetNet()) == SequenceLayout("contiguous")
    assert layout(RetNet(), Softmax()) == SequenceLayout("zigzag")


def test_a_recurrence_refuses_tokens_out_of_order() -> None:
    context, x = context_in("zigzag", 4), jnp.zeros((1, 24, 2, 3))
    with pytest.raises(ValueError, match=r"layout='zigzag' must be contiguous"):
        context.linear_attention(x, x, x)
    with pytest.raises(ValueError, match=r"layout='zigzag' must be contiguous"):
        context.short_convolution(x, jnp.zeros((2, 3, 4)), None)


def test_what_cannot_be_converted_is_refused() -> None:
    model = dataclasses.replace(CONFIG.model, N=2, mixers=(Softmax(), RetNet()))
    tokens = jnp.zeros((2, 24), jnp.int32)
    shapes = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    run = lambda context: jax.eval_shape(lambda p: Transformer(model, context).apply({"params": p}, tokens), shapes)
    with pytest.raises(ValueError, match=r"T=24 must be a multiple of 16.* pad it to 32"):
        run(context_in("striped", 4))
    mesh = make_mesh(seq=2, ring=2, data=2)
    with pytest.raises(NotImplementedError, match=r"is not converted from striped to contiguous; choose the layout"):
        run(Context(mesh=mesh, axis=("ring", "seq"), strategy="usp", layout=SequenceLayout("striped")))
