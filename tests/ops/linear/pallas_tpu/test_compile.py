"""The kernels compile for every TPU there is a compiler for, forward and backward. Nothing runs here.

Each case is compiled in a process of its own: a compiler that aborts is a failed test with its last words.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import longattn
from longattn.aot import compilers
from longattn.cost import hardware
from tests.compilers import needs_libtpu
from tests.ops import oracle

pytestmark = needs_libtpu

CHIPS = ["v5e", "v5p", "v6e", "tpu7x"]
DOMAINS: dict[str, list[Any]] = {
    "kind": ["none", "scalar", "vector", "none_delta", "scalar_delta", "vector_delta"],
    "sizes": [(64, 64), (128, 128), (192, 128), (5, 7)],  # D, V
    "dtype": ["bfloat16", "float32"],
    "heads": [(4, 4, 4), (1, 1, 4), (3, 3, 6)],  # of q, k, v
    "length": [2048, 1000, 1],
    "beside": ["nothing", "segments", "state", "both"],
}
GRID = [row | {"chip": CHIPS[i % len(CHIPS)]} for i, row in enumerate(oracle.covering(oracle.pairwise(DOMAINS)))]
GRID += [
    next(case for case in GRID if case["dtype"] == "bfloat16") | {"sizes": size} for size in ((64, 128), (256, 256))
]


def lowered(request: dict[str, Any], implementation: str | None = "pallas_tpu") -> jax.stages.Lowered:
    """Forward and gradients of a case for one device of a chip."""
    (Hq, Hk, Hv), (D, V), T, B = request["heads"], request["sizes"], request["length"], request.get("B", 2)
    H, kind = max(Hq, Hk, Hv), request["kind"]
    topology = topologies.get_topology_desc(hardware.TENSOR_CORES[request["chip"]].topology, platform="tpu")
    mesh = Mesh(np.array(topology.devices[:1]), ("device",))
    where = NamedSharding(mesh, PartitionSpec())
    shaped = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)
    arrays = {
        name: shaped(request["dtype"], B, T, heads, size)
        for name, heads, size in (("q", Hq, D), ("k", Hk, D), ("v", Hv, V))
    }
    if not kind.startswith("none"):
        arrays["log_decay"] = shaped("float32", B, T, H, *([D] if kind.startswith("vector") else []))
    if kind.endswith("delta"):
        arrays["beta"] = shaped("float32", B, T, H)
    if request["beside"] in ("state", "both"):
        arrays["initial_state"] = shaped("float32", B, H, D, V)
    ids = shaped("int32", B, T) if request["beside"] in ("segments", "both") else None

    def f(arrays, ids):
        attend = lambda arrays: longattn.linear_attention(**arrays, segment_ids=ids, implementation=implementation)
        results, pull = jax.vjp(attend, arrays)
        return results, pull(results)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(f).trace(arrays, ids).lower()


def compile_here(request: dict[str, Any]) -> dict[str, Any]:
    """The names of the kernels in the compiled program."""
    text = lowered(request).compile().as_text()
    return {"kernels": [name for name in ("forward", "backward") if f"longattn_linear_{name}" in text]}


def compiles(case: dict[str, Any]) -> None:
    answer = compilers.call(f"{__name__}:compile_here", case, compilers.tpu_environment(), 600)
    assert answer == {"kernels": ["forward", "backward"]}


def _name(case: dict[str, Any]) -> str:
    return "-".join(map(str, case.values())).replace(" ", "")


@pytest.mark.parametrize("case", GRID[:1], ids=_name)
def test_compiles(case):
    compiles(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID[1:], ids=_name)
def test_the_rest_compiles(case):
    compiles(case)


@pytest.mark.slow
def test_a_million_tokens_of_packed_documents_compile():
    compiles(
        {"chip": "v6e", "kind": "vector_delta", "sizes": (128, 128), "dtype": "bfloat16", "heads": (2, 2, 2), "B": 1}
        | {"length": 2**20, "beside": "both"}
    )


# ---- the default back end, and meshes

CASE = {"chip": "v5e", "kind": "scalar_delta", "sizes": (128, 128), "dtype": "bfloat16", "heads": (4, 4, 4)} | {
    "length": 1024, "beside": "nothing"
}  # fmt: skip


def default_here(request: dict[str, Any]) -> dict[str, Any]:
    """Whether the default back end is the kernels, for a TPU and for this host."""
    for_tpu = lowered(request, implementation=None).as_text()
    q = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.bfloat16)
    here = jax.jit(longattn.linear_attention).lower(q, q, q).as_text()
    return {"tpu": "tpu_custom_call" in for_tpu, "cpu": "tpu_custom_call" in here}


@pytest.mark.slow
def test_the_default_is_chosen_for_the_target_and_not_for_this_host():
    assert compilers.call(f"{__name__}:default_here", CASE, compilers.tpu_environment(), 300) == {
        "tpu": True,
        "cpu": False,
    }


def over_mesh_here(_: dict[str, Any]) -> dict[str, Any]:
    """Gated DeltaNet and gradients of inputs sharded over batch and heads on four chips: compiled, or the error."""
    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    mesh = Mesh(np.array(topology.devices).reshape(2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("data", None, "model")
    shaped = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    x, number = shaped(jnp.bfloat16, 4, 1024, 4, 128), shaped(jnp.float32, 4, 1024, 4)

    def f(q, k, v, log_decay, beta):
        attend = lambda q, k, v, g, b: longattn.linear_attention(q, k, v, log_decay=g, beta=b)[0]
        out, pull = jax.vjp(attend, q, k, v, log_decay, beta)
        return out, pull(out)

    f = jax.shard_map(f, mesh=mesh, in_specs=(spec,) * 5, out_specs=(spec, (spec,) * 5), check_vma=True)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(f).trace(x, x, x, number, number).lower().compile().as_text()
    return {"kernels": "longattn_linear_backward" in text, "collectives": "all-gather" in text}


@pytest.mark.slow
def test_shard_map_over_batch_and_heads_compiles():
    answer = compilers.call(f"{__name__}:over_mesh_here", {}, compilers.tpu_environment(), 300)
    assert answer == {"kernels": True, "collectives": False}
