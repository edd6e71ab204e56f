"""Attention over a mesh against NumPy in float64: asymmetric meshes, every gradient, and what the devices send."""

from __future__ import annotations

import functools
import re
import typing
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import longattn
from longattn import config, parallel
from longattn import mask as m
from tests.ops import oracle

B, D, V = 4, 5, 7
_rng = np.random.default_rng(0)
PREFIX = _rng.integers(0, 20, B).astype(np.int32)
BLOCKS = _rng.random((B, 4, 6, 6)) < 0.5


@dataclass(frozen=True)
class Case:
    mesh: tuple[int, int, int, int]  # data, fsdp, tensor, seq
    mask: str = "causal"
    lengths: tuple[int, int] = (24, 24)  # T, S
    heads: tuple[int, int] = (6, 3)  # H, K
    ids: bool = False  # packed documents with restarting positions
    sinks: bool = False  # with a soft cap
    bias: tuple[int, ...] | None = None  # 1 for each axis of [B H T S] along which it is broadcast
    dtype: str = "float32"
    implementation: str | None = None

    def __str__(self) -> str:
        fields = (*self.mesh, self.mask, *self.lengths, *self.heads, "ids" if self.ids else "", self.dtype)
        return "-".join(str(x) for x in fields if x != "")


MASKS = {  # windows and documents cross the boundaries between devices
    "causal": (m.Causal(), lambda q, k: k <= q),
    "window": (m.Window(9, 3), lambda q, k: (q - k <= 9) & (k - q <= 3)),
    "prefix": (m.Causal() | m.Prefix(PREFIX), lambda q, k: (k <= q) | (k < PREFIX[:, None, None, None])),
    "blocks": (
        m.BlockSparse(4, BLOCKS),
        lambda q, k: BLOCKS[np.arange(B)[:, None, None, None], np.arange(4)[:, None, None], q // 4, k // 4],
    ),
    "distant": (m.Causal() & ~m.Window(11), lambda q, k: q - k > 11),  # some rows see nothing
}

CASES = [
    Case((2, 1, 1, 4)),
    Case((1, 2, 2, 2), mask="window", heads=(4, 2), ids=True, sinks=True, dtype="bfloat16"),
    Case((1, 1, 1, 3), mask="prefix", lengths=(12, 21), heads=(3, 1), sinks=True),
    Case((2, 1, 2, 2), mask="blocks", heads=(4, 2), bias=(B, 4, 24, 24)),
    Case((2, 1, 1, 4), mask="distant", ids=True, heads=(4, 1), bias=(4, 1, 24), dtype="bfloat16"),
    Case((1, 1, 1, 8), mask="window", ids=True, dtype="float64"),
    Case((2, 1, 3, 1), ids=True, implementation="reference"),
]


def mesh_of(case: Case) -> jax.sharding.Mesh:
    return parallel.make_mesh(*case.mesh, devices=jax.devices()[: int(np.prod(case.mesh))])


def inputs(case: Case) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], np.ndarray]:
    """(differentiable arrays, the other keyword arguments, cotangents, visible [B H T S]) of a case, in NumPy."""
    rng = np.random.default_rng(7)
    (T, S), (H, K), dtype = case.lengths, case.heads, jnp.dtype(case.dtype)
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)
    arrays = {"q": normal(B, T, H, D), "k": normal(B, S, K, D), "v": normal(B, S, K, V)}
    cotangents = {"out": normal(B, T, H, V), "lse": rng.standard_normal((B, T, H))}
    mask, rule = MASKS[case.mask]
    options: dict[str, Any] = {"mask": mask, "implementation": case.implementation}
    if case.sinks:
        options |= {"softcap": 1.5, "scale": 0.7}
        arrays["sinks"] = rng.standard_normal(H).astype(np.float32)
    if case.bias is not None:
        arrays["bias"] = normal(*case.bias)
    q_pos, k_pos = np.arange(T)[None].repeat(B, 0), np.arange(S)[None].repeat(B, 0)
    visible = np.ones((B, H, T, S), bool)
    if case.ids:
        starts = rng.random((B, T)) < 0.15
        starts[:, 0] = True
        documents = np.cumsum(starts, 1).astype(np.int32)
        q_pos = k_pos = (q_pos - np.maximum.accumulate(np.where(starts, q_pos, 0), 1)).astype(np.int32)
        options |= {"segment_ids": documents, "positions": q_pos}
        visible &= documents[:, None, :, None] == documents[:, None, None, :]
    visible &= rule(q_pos[:, None, :, None], k_pos[:, None, None, :])
    return arrays, options, cotangents, visible


def with_gradients(attend, arrays, cotangents):
    """out, lse and the gradients of every array, as a dict."""
    (out, lse), pull = jax.vjp(lambda arrays: attend(**arrays), arrays)
    (gradients,) = pull((cotangents["out"].astype(out.dtype), cotangents["lse"].astype(lse.dtype)))
    return {"out": out, "lse": lse, **{f"d{name}": x for name, x in gradients.items()}}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case):
    arrays, options, cotangents, visible = inputs(case)
    mesh = mesh_of(case)
    attend = functools.partial(parallel.attention_with_lse, mesh=mesh, **options)
    with jax.enable_x64(case.dtype == "float64"):
        results = jax.jit(functools.partial(with_gradients, attend))(arrays, cotangents)
    assert results["out"].dtype == case.dtype
    assert all(results[f"d{name}"].dtype == x.dtype for name, x in arrays.items())
    assert results["out"].sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), "seq", "tensor")), 4)
    truth, plain = (
        oracle.attention(
            **arrays, visible=visible, scale=options.get("scale", D**-0.5), softcap=options.get("softcap"),
            do=cotangents["out"], dlse=cotangents["lse"], dtype=dtype,
        )
        for dtype in (np.float64, jnp.dtype(case.dtype))
    )  # fmt: skip
    oracle.assert_accurate(results, truth, plain, np.float64 if case.dtype == "float64" else np.float32)


def test_the_current_mesh_and_an_abstract_one():
    arrays, options, _, _ = inputs(CASES[0])
    expected = longattn.attention(**arrays, **options)
    mesh = mesh_of(CASES[0])
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(parallel.attention(**arrays, **options), expected, rtol=1e-5, atol=1e-6)
    abstract = AbstractMesh(mesh.axis_sizes, mesh.axis_names, axis_types=(AxisType.Auto,) * 4)
    attend = functools.partial(parallel.attention, mesh=abstract, **options)
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
        return jnp.sum(parallel.attention(q, k, v, mesh=mesh).astype(jnp.float32))

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


@pytest.mark.parametrize("policy", ["none", "attention"])
def test_attention_runs_forward_once_under_remat_by_name(policy):
    mesh = jax.make_mesh((8,), ("seq",), axis_types=(AxisType.Auto,))  # no axes for rows or heads
    x = jnp.ones((1, 16, 1, 4))

    def loss(x):
        return jnp.sum(parallel.attention(jnp.sin(x), x, x, mesh=mesh))

    if policy == "attention":
        names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
        loss = jax.checkpoint(loss, policy=names)
    found = [e.primitive.name for e in equations(jax.make_jaxpr(jax.grad(loss))(x).jaxpr)]
    assert found.count("all_gather") == 4
    assert found.count("scan") == 2  # over the tiles of queries: forward, backward


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"strategy": "sing"}, ValueError, "known: all_gather"),
        ({"axis": "seqs"}, ValueError, "must be an axis of the mesh; did you mean 'seq'"),
        ({"axis": "data"}, ValueError, "must be different axes"),
        ({"mesh": None}, ValueError, r"jax\.set_mesh"),
        ({"mask": None}, ValueError, "Full"),
        ({"T": 26}, ValueError, "T=26 must be a multiple of 4, the devices on 'seq'; pad it to 28"),
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


def test_a_config_knows_every_strategy():
    known = typing.get_args(typing.get_type_hints(config.Mesh)["strategy"])
    assert set(known) == set(parallel.STRATEGIES)


def test_axes_must_be_auto():
    x = jnp.ones((1, 8, 1, 4))
    explicit = jax.make_mesh((8,), ("seq",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match="Explicit and must be Auto; make it with Auto axes"):
        parallel.attention(x, x, x, mesh=explicit)
    mesh = jax.make_mesh((8,), ("seq",), axis_types=(AxisType.Auto,))
    inside = jax.shard_map(parallel.attention, mesh=mesh, in_specs=P(None, "seq"), out_specs=P(None, "seq"))
    with pytest.raises(ValueError, match=r"call longattn\.attention inside a shard_map"):
        inside(x, x, x)
