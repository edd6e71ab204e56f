"""Counts, in compiled programs, what a step over a mesh runs and sends twice under a remat policy; and offload."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter

import jax
import numpy as np
import pytest

from longattn import parallel
from longattn.aot import collectives, hlo
from longattn.config import ByteLM, Config, Mesh, Model
from longattn.train.data import Batch
from longattn.train.step import _sum_loss, batch_sharding, context_of, state_shapes

MODEL = Model(N=2, E=16, F=24, H=4, K=4, D=8, dtype="float32", remat="attention")
MESHES = {strategy: {"strategy": strategy, "seq": 4} for strategy in parallel.STRATEGIES} | {
    "usp": {"strategy": "usp", "ring": 2, "seq": 2}
}


@functools.cache
def gradient(config: Config):
    """Compiles the loss and gradient over the config's mesh; returns the program and the shapes of its arguments."""
    context = context_of(config, jax.devices()[: config.mesh.size])
    sharding, shape = batch_sharding(config, context), (config.data.B, config.data.T)
    ids = jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
    batch = Batch(ids, ids, ids, jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding))
    f = jax.jit(jax.value_and_grad(lambda params, batch: _sum_loss(params, batch, config, context)[0]))
    params = state_shapes(config, context).params
    return f.lower(params, batch).compile(), params, batch


@pytest.mark.slow
@pytest.mark.parametrize("strategy", parallel.STRATEGIES)
def test_what_a_layer_s_recomputation_sends_and_runs(strategy):
    """Attention runs and sends nothing twice. Only ulysses exchanges q, k and v again, because it keeps out alone.

    As the policy says, the rest of the layer gathers its matrices and runs its projections again.
    """
    compiled, _, _ = gradient(Config(model=MODEL, data=ByteLM(T=32, B=1), mesh=Mesh(**MESHES[strategy])))
    program = hlo.parse(compiled.as_text())
    again, once = Counter(), Counter()
    for computation in program.computations.values():
        for i in computation.instructions:
            if f"/{strategy}/" in i.scope and (
                i.opcode == "while" or i.opcode.removesuffix("-start") in collectives.KINDS
            ):
                (again if "rematted" in i.scope else once)[i.opcode] += 1
    assert once["while"] >= 2  # loops over tiles of queries, forward and backward: the scopes' names are found
    exchanged = sum(n for opcode, n in again.items() if opcode.startswith("all-to-all"))
    assert exchanged == (3 if parallel.STRATEGIES[strategy].exchanges_heads else 0)
    assert sum(again.values()) == exchanged


@pytest.mark.slow
def test_offload_changes_nothing_over_a_mesh():
    """On a CPU, whose memory is the host's, nothing moves: the program is the same."""
    rng, found, values = np.random.default_rng(0), [], None
    tokens = rng.integers(0, 257, (1, 32)).astype(np.int32)
    ids = Batch(tokens, np.arange(32, dtype=np.int32)[None], np.ones_like(tokens), np.ones((1, 32), np.float32))
    for remat in ("attention", "offload"):
        model = dataclasses.replace(MODEL, remat=remat)
        compiled, params, batch = gradient(Config(model=model, data=ByteLM(T=32, B=1), mesh=Mesh(**MESHES["ring"])))
        if values is None:
            draw = lambda x: jax.device_put(rng.standard_normal(x.shape).astype(np.float32) / 4, x.sharding)
            values = jax.tree.map(draw, params)
        shards = Batch(*(jax.device_put(x, b.sharding) for x, b in zip(ids, batch)))
        found.append(jax.device_get(compiled(values, shards)))
    assert found[0][0] > 0
    jax.tree.map(np.testing.assert_array_equal, *found)
