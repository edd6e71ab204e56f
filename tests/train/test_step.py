"""The update and the evaluation step on a model small enough to check by hand."""

from __future__ import annotations

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longattn.config import ByteLM, Config, Mesh, Model, Optimiser, Run
from longattn.models.transformer import Transformer
from longattn.train.compilation import program_bytes
from longattn.train.data import Batch
from longattn.train.loss import labels_and_weights
from longattn.train.step import (
    State,
    batch_shapes,
    batch_sharding,
    context_of,
    decays,
    eval_step,
    init_state,
    learning_rate,
    state_shapes,
    train_step,
)
from tests.slow import but_few

CONFIG = Config(
    model=Model(N=2, E=16, F=24, H=2, K=1, D=8, W=257, dtype="float32"),
    data=ByteLM(T=11, B=4),
    optimiser=Optimiser(lr=1e-2, warmup=3, loss_chunk=7, clip=0.5),
    run=Run(steps=10),
)


def with_(config: Config, **changes) -> Config:
    return dataclasses.replace(config, optimiser=dataclasses.replace(config.optimiser, **changes))


def batch(seed: int = 0) -> Batch:
    """Two documents a row, the second one of uneven weight, and a padded tail."""
    rng = np.random.default_rng(seed)
    B, T = CONFIG.data.B, CONFIG.data.T
    segments = np.array([[1] * 4 + [2] * 5 + [0] * 2] * B, np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 3, 4, 0, 1]] * B, np.int32)
    weights = rng.uniform(0, 1, (B, T)).astype(np.float32) * (segments > 0)
    weights[0] = 0  # a micro-batch with little weight
    return Batch(rng.integers(0, 257, (B, T)).astype(np.int32), positions, segments, weights)


@functools.cache
def fresh() -> State:
    return init_state(CONFIG, 0)


def copy(state: State) -> State:
    return jax.tree.map(jnp.copy, state)  # the step donates what it is given


def test_loss_is_the_global_token_mean() -> None:
    b = Batch(*map(jnp.asarray, batch()))
    labels, weights = labels_and_weights(*b)
    logits, _ = Transformer(CONFIG.model).apply({"params": fresh().params}, b.tokens, b.positions, b.segment_ids)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], -1)[..., 0]
    expected = float((nll * weights).sum() / weights.sum())
    _, metrics = train_step(CONFIG)(copy(fresh()), b)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)
    assert float(metrics["weight_sum"]) == pytest.approx(float(weights.sum()), rel=1e-6)

    sums = eval_step(CONFIG)(fresh().params, b)
    assert float(sums["nll_sum"]) == pytest.approx(float((nll * weights).sum()), rel=1e-5)
    hits = (jnp.argmax(logits, -1) == labels) * weights
    assert float(sums["correct_sum"]) == pytest.approx(float(hits.sum()), abs=1e-6)
    for p in range(5):
        at = b.positions == p
        np.testing.assert_allclose(sums["nll_by_position"][p], (nll * weights * at).sum(), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(sums["weight_by_position"][p], (weights * at).sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pieces", but_few([2, 4]))
def test_accumulation_changes_nothing_but_rounding(pieces: int) -> None:
    # A mean of the micro-batches' means would differ: their weights do.
    whole, m = train_step(CONFIG)(copy(fresh()), batch())
    split, n = train_step(with_(CONFIG, accumulate=pieces))(copy(fresh()), batch())
    for key in m:
        np.testing.assert_allclose(m[key], n[key], rtol=1e-5)
    # After one step Adam's update is the sign of the gradient, so compare the first moments.
    for a, b in zip(jax.tree.leaves(whole.opt_state), jax.tree.leaves(split.opt_state), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-8)


def test_a_batch_without_weight_changes_no_parameter_by_gradient() -> None:
    b = batch()._replace(weights=np.zeros_like(batch().weights))
    state, metrics = train_step(with_(CONFIG, weight_decay=0.0))(copy(fresh()), b)
    assert float(metrics["loss"]) == 0
    jax.tree.map(np.testing.assert_array_equal, state.params, fresh().params)


def test_clipping_bounds_the_first_moment() -> None:
    _, metrics = train_step(CONFIG)(copy(fresh()), batch())
    assert float(metrics["grad_norm"]) > CONFIG.optimiser.clip  # else this tests nothing
    state, _ = train_step(with_(CONFIG, clip=0.01))(copy(fresh()), batch())
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    norm = jnp.sqrt(sum(jnp.sum(m**2) for m in jax.tree.leaves(adam.mu)))
    assert float(norm) == pytest.approx(0.01 * (1 - CONFIG.optimiser.b1), rel=1e-4)


def test_decay_is_on_matrices_only() -> None:
    flat = jax.tree_util.tree_flatten_with_path(decays(fresh().params, CONFIG.model))[0]
    marks = {jax.tree_util.keystr(path, simple=True, separator="/"): mark for path, mark in flat}
    assert marks["embedding"]
    assert all(mark != path.endswith("scale") for path, mark in marks.items()), marks
    assert not all(marks.values())


def test_learning_rate() -> None:
    c = Optimiser(lr=2.0, warmup=4, final=0.1)
    rates = [float(learning_rate(c, 20)(jnp.int32(i))) for i in range(20)]
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    assert rates[-1] == pytest.approx(0.2)
    assert np.all(np.diff(rates[3:]) <= 0)
    assert np.isfinite([float(learning_rate(Optimiser(warmup=0), 1)(jnp.int32(0)))]).all()


@pytest.mark.slow
def test_float32_state_under_bfloat16_compute() -> None:
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, dtype="bfloat16"))
    state, metrics = train_step(config)(init_state(config, 0), batch())
    assert {a.dtype.name for a in jax.tree.leaves(state.params)} == {"float32"}
    assert {a.dtype.name for a in jax.tree.leaves(metrics)} == {"float32"}
    assert int(state.step) == 1


def test_it_learns_a_batch_by_heart() -> None:
    state, b, losses = copy(fresh()), batch(), []
    step = train_step(with_(CONFIG, lr=1e-2, warmup=1, weight_decay=0.0))
    for _ in range(10):
        state, metrics = step(state, b)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5, losses


def test_batch_shapes_are_those_of_a_batch() -> None:
    for shape, array in zip(batch_shapes(CONFIG), batch(), strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)


# Pieces that do not divide a shard of the sequence, and an eps that keeps Adam's update smooth where gradients are only
# rounding.
SPREAD = Config(
    model=Model(N=2, E=16, F=24, H=4, K=2, D=8, dtype="float32", mlp_chunk=5),
    data=ByteLM(T=24, B=4),
    optimiser=Optimiser(lr=1e-2, warmup=2, loss_chunk=14, eps=1e-3),
    run=Run(steps=10),
)


def trained(config: Config) -> tuple[State, list[dict[str, float]], dict[str, np.ndarray]]:
    """Returns the state after three steps, the metrics of each, and an evaluation."""
    rng = np.random.default_rng(3)
    shape = config.data.B, config.data.T
    segments = np.sort(rng.integers(1, 4, shape), 1).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    b = Batch(rng.integers(0, 257, shape).astype(np.int32), positions, segments, np.ones(shape, np.float32))
    context = context_of(config)
    state, metrics = init_state(config, 0, context), []
    for _ in range(3):
        state, m = train_step(config, context)(state, b)
        metrics.append({name: float(x) for name, x in m.items()})
    return state, metrics, jax.device_get(eval_step(config, context)(state.params, b))


@pytest.mark.slow
def test_training_on_a_mesh_is_that_on_one_device() -> None:
    """Sums have other orders, with sqrt(n) roundings for n terms: B T in a gradient's products, E in a logit's."""
    config = with_(dataclasses.replace(SPREAD, mesh=Mesh(fsdp=2, tensor=2, seq=2)), accumulate=2)
    state, metrics, sums = trained(config)
    one, expected, expected_sums = trained(SPREAD)
    rtol = np.finfo(np.float32).eps * np.sqrt(SPREAD.data.B * SPREAD.data.T * SPREAD.model.E)
    for got, want in zip(metrics, expected, strict=True):
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=rtol, err_msg=name)
    for name, want in expected_sums.items():
        np.testing.assert_allclose(sums[name], want, rtol=4 * rtol, atol=1e-5, err_msg=name)
    moments = [jax.tree.leaves(s.opt_state) for s in (state, one)]
    for got, want in zip(*moments, strict=True):
        assert np.linalg.norm(got - want) <= 10 * rtol * np.linalg.norm(want)  # errors of a gradient's factors multiply
    lies = jax.tree.map(lambda x: x.sharding, state_shapes(config, context_of(config)))
    assert all(x.sharding.is_equivalent_to(s, x.ndim) for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(lies)))


@pytest.mark.slow
def test_activations_stay_where_they_are() -> None:
    """Devices gather parameters, ids, weights, and attention's keys and values, but never [B T E] or a part of it.

    They exchange the slices of the embedding's rows, once each way.
    """
    mesh = Mesh(fsdp=2, tensor=2, seq=2, strategy="all_gather", layout="zigzag")
    config = dataclasses.replace(SPREAD, mesh=mesh)
    context = context_of(config)
    shapes = state_shapes(config, context)
    assert shapes.params["layers"]["layer_0"]["mlp"]["up"].sharding.spec == jax.P(None, ("fsdp", "seq"), "tensor")
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(config, context)), batch_shapes(config)
    )
    text = train_step(config, context).lower(shapes, batch).compile().as_text()
    assert len(re.findall(r" all-to-all(?:-start)?\(", text)) == 2
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather(?:-start)?\(", text)
    sizes = [[int(n) for n in dims.split(",")] for dims in gathered]
    c, D = config.model, config.model.D
    keys = [2, config.data.T, c.K // 2, D]  # of two rows, and half of the heads
    assert keys in sizes
    parameters = {c.E, c.F // 2, c.H // 2, c.K // 2, D, c.W, c.N}
    assert all(set(size) <= parameters for size in sizes if size not in (keys, keys[:2])), sizes


def test_a_mesh_of_another_number_of_devices_is_refused() -> None:
    with pytest.raises(ValueError, match=r"seq=4 = 4 must be the number of devices, 8"):
        context_of(dataclasses.replace(SPREAD, mesh=Mesh(seq=4)))
    assert context_of(SPREAD) is None


@pytest.mark.parametrize(("platform", "needed"), [("tpu", 70), ("cpu", 40 + 50 + 30 - 20), ("gpu", 100)])
def test_a_program_on_a_tpu_needs_its_peak(monkeypatch, platform: str, needed: int) -> None:
    """XLA for TPUs counts on-chip memory among temporaries, so a step that fits was once refused."""
    analysis = SimpleNamespace(
        argument_size_in_bytes=40, temp_size_in_bytes=50, output_size_in_bytes=30, alias_size_in_bytes=20,
        peak_memory_in_bytes=70,
    )  # fmt: skip
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(platform=platform)])
    assert program_bytes(analysis) == needed
