"""The mesh: sizes, slices, and how parameters, moments and tokens lie on it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from longattn.config import Model, Softmax
from longattn.models.sharding import rules
from longattn.parallel import make_mesh
from longattn.parallel import mesh as meshes

RULES = rules(Model(N=1, mixers=(Softmax(qk_norm=True, sinks=True),)))


def test_sizes_and_types():
    mesh = make_mesh(2, 1, 2, 2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "tensor": 2, "seq": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh(seq=3, devices=jax.devices()[:3]).size == 3
    assert dict(make_mesh(seq=2, ring=4).shape) == {"data": 1, "fsdp": 1, "tensor": 1, "ring": 4, "seq": 2}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"seq": 3}, r"seq=3 = 3 must be the number of devices, 8: change the sizes, or pass 3 of them as devices"),
        ({"data": 4, "seq": 4}, r"= 16 must be the number of devices, 8: change the sizes$"),
        ({"seq": 0}, "seq=0 must be an integer of at least 1"),
    ],
)
def test_wrong_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


@dataclass(frozen=True)
class Device:
    """As much of a device as its arrangement reads."""

    id: int
    slice_index: int
    platform: str = "fake"
    device_kind: str = "fake"
    process_index: int = 0


def arranged(data: int, fsdp: int, tensor: int, seq: int, slices: int) -> np.ndarray:
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor, "seq": seq}
    n = data * fsdp * tensor * seq
    return meshes._arranged(sizes, [Device(i, i % slices) for i in range(n)])


def test_slices_are_crossed_by_data_or_fsdp_alone():
    slice_of = np.vectorize(lambda device: device.slice_index)
    np.testing.assert_array_equal(slice_of(arranged(4, 1, 2, 2, slices=2))[:, 0, 0, 0], [0, 0, 1, 1])
    assert (np.ptp(slice_of(arranged(4, 1, 2, 2, slices=2)), axis=(1, 2, 3)) == 0).all()
    np.testing.assert_array_equal(slice_of(arranged(1, 3, 1, 2, slices=3))[0, :, 0, 0], [0, 1, 2])
    with pytest.raises(ValueError, match=r"data=3 must be a multiple of 2, the slices"):
        arranged(3, 2, 1, 1, slices=2)
    with pytest.raises(ValueError, match=r"fsdp=1 must be a multiple of 2"):
        arranged(1, 1, 1, 8, slices=2)


def test_hosts_of_gpus_are_crossed_by_the_earliest_axes_that_have_to():
    """XLA counts each host as a slice and numbers its devices one after the other."""
    devices = [Device(i, i // 4, platform="gpu", process_index=i // 4) for i in range(8)]
    process = np.vectorize(lambda device: device.process_index)
    rng = np.random.default_rng(0)
    for data, seq, want in (
        (1, 8, [[0] * 4 + [1] * 4]),
        (2, 4, [[0] * 4, [1] * 4]),
        (4, 2, [[0] * 2] * 2 + [[1] * 2] * 2),
    ):
        sizes = dict(zip(meshes.AXES, (data, 1, 1, seq)))
        found = meshes._arranged(sizes, [devices[i] for i in rng.permutation(8)])
        np.testing.assert_array_equal(process(found)[:, 0, 0, :], want)


def tree(E: int = 8) -> dict:
    """Parameters by their paths, one layer alone and two stacked, as models name them."""
    f = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
    layer = {"mixer": {"q": f(E, 4, 6), "sinks": f(4), "q_norm": {"scale": f(6)}}, "mlp": {"down": f(10, E)}}
    stacked = jax.tree.map(lambda x: f(2, *x.shape), layer)
    return {"embedding": f(257, E), "norm": {"scale": f(E)}, "layer_0": layer, "layers": {"layer_0": stacked}}


def test_rules_hold_for_stacked_layers_and_for_moments():
    mesh = make_mesh(1, 2, 2, 2)
    state = {"params": tree(), "opt_state": ({"mu": tree(), "count": jax.ShapeDtypeStruct((), np.int32)},)}
    specs = jax.tree.map(lambda s: s.spec, meshes.shardings(mesh, state, RULES))
    p = specs["params"]
    assert p["embedding"] == P(None, ("fsdp", "seq"))
    assert p["norm"]["scale"] == P()
    q = P(("fsdp", "seq"), "tensor", None)
    assert p["layer_0"]["mixer"] == {"q": q, "sinks": P("tensor"), "q_norm": {"scale": P()}}
    assert p["layers"]["layer_0"]["mixer"]["q"] == P(None, ("fsdp", "seq"), "tensor", None)
    assert p["layers"]["layer_0"]["mlp"]["down"] == P(None, "tensor", ("fsdp", "seq"))
    assert specs["opt_state"][0] == {"mu": p, "count": P()}


def test_axes_that_the_mesh_lacks_are_left_out():
    assert meshes.shardings(make_mesh(seq=2, ring=4), tree(), RULES)["embedding"].spec == P(
        None, ("fsdp", "ring", "seq")
    )
    mesh = AbstractMesh((2, 4), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
    assert meshes.fit(P(("data", "fsdp"), "seq", "tensor"), mesh) == P(("data",), "seq", None)
    assert meshes.shardings(mesh, tree(), RULES)["embedding"].spec == P(None, ("seq",))


def test_what_does_not_divide_or_has_no_rule_is_refused():
    mesh = make_mesh(1, 4, 1, 2)
    with pytest.raises(ValueError, match=r"axis 1 of embedding, of shape \[257, 6\], must be a multiple of 8"):
        meshes.shardings(mesh, tree(E=6), RULES)
    with pytest.raises(ValueError, match=r"layer_0/mixer/other, of shape \[8\], is matched by no sharding rule"):
        meshes.shardings(mesh, {"layer_0": {"mixer": {"other": jax.ShapeDtypeStruct((8,), np.float32)}}}, RULES)
