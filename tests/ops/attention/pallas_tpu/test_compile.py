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
from longattn import mask as m
from longattn.aot import compilers
from longattn.cost import hardware
from longattn.ops.attention.pallas_tpu import Blocks, Tuning
from tests.compilers import needs_libtpu
from tests.ops import oracle

pytestmark = needs_libtpu

MASKS = {
    "full": m.Full(), "causal": m.Causal(), "window": m.Window(300, 40), "distant": m.Causal() & ~m.Window(700),
    "chunked": m.Causal() & m.Chunked(384), "dilated": m.Dilated(40, 5), "prefix": m.Causal() | m.Prefix(100),
    "prefixes": m.Causal() | m.Prefix(np.array([50, 900], np.int32)), "global": m.Window(200) | m.Global(16),
}  # fmt: skip
CHIPS = ["v5e", "v5p", "v6e", "tpu7x"]
SIZES = [(64, 64), (80, 80), (96, 96), (128, 128), (192, 192), (256, 256), (192, 128), (64, 128), (5, 7)]  # D, V
DOMAINS: dict[str, list[Any]] = {
    "mask": ["causal", "dilated", "prefixes", "global"],
    "dtype": ["bfloat16", "float32"],
    "ids": ["none", "segments", "positions", "both"],
    "heads": [(2, 2), (4, 2), (4, 1)],
    "lengths": [(2048, 2048), (1023, 1537), (1, 4096), (2049, 100)],  # T, S
    "softcap": [None, 30.0],
    "bias": ["", "BHTS", "1H1S", "B1T1"],  # which of its axes are whole
}
# Every value, in blocks of few tiles, for a compiler's time grows with the tiles; then every size in the blocks chosen
# for it, which are what fast memory has to hold.
GRID = [
    row | {"chip": CHIPS[i % len(CHIPS)], "sizes": SIZES[i % len(SIZES)], "small": True}
    for i, row in enumerate(oracle.covering(oracle.pairwise(DOMAINS)))
]
SMALL = Tuning(Blocks(128, 256, 128, 128), Blocks(128, 128, 128, 128))
OWN = [
    {"chip": CHIPS[i % 4], "sizes": sizes, "dtype": "bfloat16", "mask": list(MASKS)[i], "ids": "segments"}
    | {"heads": (4, 2), "lengths": (2048, 2048), "softcap": None}
    for i, sizes in enumerate(SIZES)
    if sizes not in ((80, 80), (96, 96), (64, 128))  # as others that lanes are filled up to
]


def lowered(request: dict[str, Any], implementation: str | None = "pallas_tpu") -> jax.stages.Lowered:
    """Forward and gradients of a case for one device of a chip."""
    (T, S), (H, K), (D, V) = request["lengths"], request["heads"], request["sizes"]
    B = request.get("B", 2)
    topology = topologies.get_topology_desc(hardware.TENSOR_CORES[request["chip"]].topology, platform="tpu")
    mesh = Mesh(np.array(topology.devices[:1]), ("device",))
    where = NamedSharding(mesh, PartitionSpec())
    shaped = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=where)
    arrays = [shaped(request["dtype"], *shape) for shape in ((B, T, H, D), (B, S, K, D), (B, S, K, V))]
    ids = shaped("int32", B, T), shaped("int32", B, S)
    bias, visible = None, None
    if axes := request.get("bias"):
        bias = shaped(request["dtype"], *({"B": B, "H": H, "T": T, "S": S}.get(axis, 1) for axis in axes))
    if request["mask"] == "blocks":
        visible = shaped("bool", 1, H, -(-T // 384), -(-S // 384))

    def f(q, k, v, bias, ids, visible):
        names = {"segments": ["segment_ids"], "positions": ["positions"], "both": ["segment_ids", "positions"]}
        mask = MASKS[request["mask"]] if visible is None else m.Causal() & m.BlockSparse(384, visible)
        attend = lambda q, k, v, bias: longattn.attention_with_lse(
            q, k, v, mask=mask, softcap=request["softcap"], implementation=implementation, bias=bias,
            tuning=SMALL if request.get("small") else None,
            **dict.fromkeys(names.get(request["ids"], []), ids),
        )  # fmt: skip
        (out, lse), pull = jax.vjp(attend, q, k, v, bias)
        return out, lse, pull((out, lse))

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(f).trace(*arrays, bias, ids, visible).lower()


def compile_here(request: dict[str, Any]) -> dict[str, Any]:
    """The names of the kernels in the compiled program."""
    text = lowered(request).compile().as_text()
    return {"kernels": [name for name in ("forward", "backward") if f"longattn_attention_{name}" in text]}


def compiles(case: dict[str, Any]) -> None:
    answer = compilers.call(f"{__name__}:compile_here", case, compilers.tpu_environment(), 600)
    assert answer == {"kernels": ["forward", "backward"]}


def _name(case: dict[str, Any]) -> str:
    return "-".join(map(str, case.values())).replace(" ", "")


@pytest.mark.parametrize("case", GRID[:1], ids=_name)
def test_compiles(case):
    compiles(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID[1:] + OWN, ids=_name)
def test_the_rest_compiles(case):
    compiles(case)


@pytest.mark.slow
def test_a_million_tokens_of_packed_documents_compile():
    compiles(
        {"chip": "v5e", "sizes": (128, 128), "dtype": "bfloat16", "mask": "causal", "ids": "segments", "B": 1}
        | {"heads": (8, 2), "lengths": (2**20, 2**20), "softcap": None}
    )


@pytest.mark.slow
def test_blocks_of_each_head_compile():
    compiles(
        {"chip": "v6e", "sizes": (128, 128), "dtype": "bfloat16", "mask": "blocks", "ids": "segments", "B": 1}
        | {"heads": (4, 2), "lengths": (2048, 2048), "softcap": None}
    )


# ---- the default back end, and meshes

CASE = {"chip": "v5e", "sizes": (128, 128), "dtype": "bfloat16", "mask": "causal", "ids": "none"} | {
    "heads": (4, 2), "lengths": (1024, 1024), "softcap": None
}  # fmt: skip


def default_here(request: dict[str, Any]) -> dict[str, Any]:
    """Whether the default back end is the kernels, for a TPU and for this host."""
    for_tpu = lowered(request, implementation=None).as_text()
    q = jax.ShapeDtypeStruct((1, 64, 2, 16), jnp.bfloat16)
    here = jax.jit(longattn.attention).lower(q, q, q).as_text()
    return {"tpu": "tpu_custom_call" in for_tpu, "cpu": "tpu_custom_call" in here}


def test_the_default_is_chosen_for_the_target_and_not_for_this_host():
    assert compilers.call(f"{__name__}:default_here", CASE, compilers.tpu_environment(), 300) == {
        "tpu": True,
        "cpu": False,
    }


def over_mesh_here(request: dict[str, Any]) -> dict[str, Any]:
    """Attention and gradients of sharded inputs on four chips: compiled, or the error."""
    topology = topologies.get_topology_desc("v5e:2x2", platform="tpu")
    mesh = Mesh(np.array(topology.devices).reshape(2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("data", None, "model")
    x = jax.ShapeDtypeStruct((4, 1024, 4, 128), jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    def f(q, k, v):
        (out, lse), pull = jax.vjp(longattn.attention_with_lse, q, k, v)
        return out, pull((out, lse))

    if request["shard_map"]:
        f = jax.shard_map(f, mesh=mesh, in_specs=(spec,) * 3, out_specs=(spec, (spec,) * 3), check_vma=True)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        text = jax.jit(f).trace(x, x, x).lower().compile().as_text()
    return {"kernels": "longattn_attention_backward" in text, "collectives": "all-gather" in text}


@pytest.mark.slow
def test_shard_map_over_batch_and_heads_compiles():
    answer = compilers.call(f"{__name__}:over_mesh_here", {"shard_map": True}, compilers.tpu_environment(), 300)
    assert answer == {"kernels": True, "collectives": False}


@pytest.mark.slow
def test_sharded_inputs_without_shard_map_are_an_error():
    """GSPMD cannot cut a kernel: it says so, and computes nothing wrong."""
    answer = compilers.call(f"{__name__}:over_mesh_here", {"shard_map": False}, compilers.tpu_environment(), 300)
    assert "Mosaic kernels cannot be automatically partitioned" in answer["reason"]
