"""Attention over a mesh: which mesh, what all_gather sends, and what is refused."""

from __future__ import annotations

import contextlib
import functools
import re
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import longattn
from longattn import config, parallel
from longattn.config.mesh import LayoutName
from longattn.cost.sequence.problem import Problem, Way, check
from longattn.parallel.attention import strategy_on
from longattn.train.step import context_of

D = 5


def test_the_current_mesh_and_an_abstract_one():
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((4, 24, heads, D)).astype(np.float32) for name, heads in zip("qkv", (6, 3, 3))}
    expected = longattn.attention(**arrays)
    mesh = parallel.make_mesh(2, 1, 1, 4)
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(parallel.attention(**arrays), expected, rtol=1e-5, atol=1e-6)
    abstract = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Auto,) * 4)
    attend = functools.partial(parallel.attention, mesh=abstract)
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    assert jax.eval_shape(attend, **shapes).shape == expected.shape
    placed = jax.device_put(arrays, NamedSharding(mesh, P("data", "seq")))
    np.testing.assert_allclose(jax.jit(attend)(**placed), expected, rtol=1e-5, atol=1e-6)


def equations(jaxpr):
    """All equations, those of inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_what_the_devices_send():
    """(P - 1) / P of k and of v reach every device, forward and again backward, and as much of dk and dv leaves it."""
    devices, (T, K), mesh = 4, (64, 2), parallel.make_mesh(2, 1, 1, 4)
    x = jax.ShapeDtypeStruct((2, T, 4, 16), jnp.bfloat16, sharding=NamedSharding(mesh, P("data", "seq")))
    k = jax.ShapeDtypeStruct((2, T, K, 16), jnp.bfloat16, sharding=x.sharding)

    def loss(q, k, v):
        return jnp.sum(parallel.attention(q, k, v, mesh=mesh, strategy="all_gather").astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(x, k, k)
    sent = {"all_gather": [], "reduce_scatter": []}
    for e in equations(traced.jaxpr.jaxpr):
        if e.primitive.name in sent:
            whole = (e.outvars if e.primitive.name == "all_gather" else e.invars)[0].aval
            sent[e.primitive.name].append((whole.size * (devices - 1) // devices, whole.dtype.name))
    elements = T * K * 16 * (devices - 1) // devices  # of k or of v, of the one sequence that a device holds
    assert sent["all_gather"] == [(elements, "bfloat16")] * 4  # k and v, forward and again backward
    assert sent["reduce_scatter"] == [(elements, "float32")] * 2  # dk and dv

    text = traced.lower().compile().as_text()
    found = re.findall(
        r" = .*?\b(all-gather|reduce-scatter|all-reduce|all-to-all|collective-permute)(?:-start)?\(", text
    )
    assert {name: found.count(name) for name in set(found)} == {"all-gather": 4, "reduce-scatter": 2}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strategy": "sing"}, ValueError, "did you mean 'ring'"),
        ({"axis": "seqs"}, ValueError, "must be an axis of the mesh; did you mean 'seq'"),
        ({"axis": "data"}, ValueError, "must be different axes"),
        ({"mesh": None}, ValueError, r"jax\.set_mesh"),
        ({"mask": None}, ValueError, "Full"),
        ({"T": 26}, ValueError, "T=26 must be a multiple of 4 for the contiguous layout.*pad it to 28"),
        ({"T": 28, "layout": parallel.SequenceLayout("zigzag")}, ValueError, "T=28 must be a multiple of 8.*to 32"),
        ({"layout": "zigzag"}, ValueError, r"must be a SequenceLayout, such as SequenceLayout\('zigzag'\)"),
        ({"strategy": "usp"}, ValueError, "must be two axes of the mesh for strategy='usp'"),
        ({"axis": ("data", "seq")}, ValueError, "must be one axis of the mesh for strategy='ring'"),
        ({"B": 3}, ValueError, "B=3 must be a multiple of 2"),
        ({"mesh": (1, 1, 2, 4)}, NotImplementedError, "K=3 key/value heads do not divide over the 2 devices"),
        ({"implementation": "xlb"}, ValueError, "did you mean 'xla'"),
    ],
)
def test_refusals(change, error, message):
    change = dict(change)
    rows, T = change.pop("B", 4), change.pop("T", 24)
    options = {"mesh": (2, 1, 1, 4), **change}
    if options["mesh"]:
        options["mesh"] = parallel.make_mesh(*options["mesh"])
    q, k = (jax.ShapeDtypeStruct((rows, T, heads, D), jnp.float32) for heads in (6, 3))
    with pytest.raises(error, match=message):
        jax.eval_shape(functools.partial(parallel.attention, **options), q, k, k)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ({"strategy": "sing"}, r"Mesh\.strategy='sing' must be a strategy of attention; did you mean 'ring'"),
        ({"ring": 2, "seq": 2}, r"Mesh\.ring=2 with strategy='ring': usp, and no other, has shards"),
        ({"seq": 4, "strategy": "usp"}, r"Mesh\.ring=1 with strategy='usp'.*strategy='ulysses'"),
        (
            {"seq": 4, "strategy": "balanced", "layout": "zigzag"},
            r"Mesh\.layout='zigzag' with strategy='balanced'.*set layout='contiguous'",
        ),
    ],
)
def test_meshes_of_configs_are_refused(mesh, message):
    with pytest.raises(ValueError, match=message):
        strategy_on(config.Mesh(**mesh))
    with pytest.raises(ValueError, match=message):
        context_of(config.Config(mesh=config.Mesh(**mesh)))


@pytest.mark.parametrize("strategy", parallel.STRATEGIES.values(), ids=lambda strategy: strategy.name)
def test_the_layouts_of_a_strategy_are_those_that_it_serves(strategy):
    for layout in typing.get_args(LayoutName):
        ring = 2 if strategy.axes == 2 else 1
        way = Way(strategy.name, layout, (2, 2) if ring == 2 else (4,))
        served = layout in strategy.layouts
        with contextlib.nullcontext() if served else pytest.raises(NotImplementedError, match=layout):
            check(Problem(T=16, H=4, K=4, D=4), way)
        with contextlib.nullcontext() if served else pytest.raises(ValueError, match=layout):
            assert strategy_on(config.Mesh(seq=4 // ring, ring=ring, strategy=strategy.name, layout=layout)) is strategy


def test_axes_must_be_auto():
    x = jnp.ones((1, 8, 1, 4))
    explicit = jax.make_mesh((8,), ("seq",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="Explicit and must be Auto; make it with Auto axes"):
        parallel.attention(x, x, x, mesh=explicit)
    mesh = jax.make_mesh((8,), ("seq",), axis_types=(AxisType.Auto,))
    inside = jax.shard_map(parallel.attention, mesh=mesh, in_specs=P(None, "seq"), out_specs=P(None, "seq"))
    with pytest.raises(ValueError, match=r"call longattn\.attention inside a shard_map"):
        inside(x, x, x)
