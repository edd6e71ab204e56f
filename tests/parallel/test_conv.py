"""The short convolution of sharded sequences against NumPy: every gradient, documents, tails, and what is refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from longattn import parallel
from tests.ops import oracle
from tests.ops.contract.test_linear import equations
from tests.ops.test_conv import normal, short

B, E = 2, 6
# Documents that continue across a boundary, end there, and begin with the last token of a device.
IDS = np.array([[3] * 7 + [1] * 2 + [3] * 3, [7] * 4 + [5] * 4 + [7] * 4], np.int32)


def mesh_of(*sizes):
    return parallel.make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])


def results(mesh, x, w, b, ids, tail, dy, dtail, activation):
    def f(x, w, b, ids, tail, dy, dtail):
        call = functools.partial(parallel.short_convolution, mesh=mesh, activation=activation)
        (y, new), pull = jax.vjp(lambda x, w, b, tail: call(x, w, b, segment_ids=ids, tail=tail), x, w, b, tail)
        dx, dw, db, dold = pull((dy, dtail))
        return {"y": y, "tail": new, "dx": dx, "dw": dw, "db": db, "dtail": dold}

    return jax.jit(f)(x, w, b, ids, tail, dy, dtail)


@pytest.mark.parametrize(
    ("mesh", "C", "packed", "dtype"),
    [
        ((2, 1, 1, 4), 4, True, "float64"),  # parts of 3 tokens: no longer than the taps reach
        ((1, 1, 2, 3), 3, True, "float32"),
        ((1, 2, 1, 2), 4, True, "bfloat16"),
        ((1, 1, 3, 2), 5, False, "float32"),
        ((1, 1, 1, 6), 1, True, "float32"),
    ],
)
def test_equals_the_sum_of_its_taps(mesh, C, packed, dtype):
    T, dtype, mesh = 12, jnp.dtype(dtype), mesh_of(*mesh)
    shapes = ((B, T, E), (E, C), (E,), (B, C - 1, E), (B, T, E), (B, C - 1, E))
    given = [x.astype(dtype) for x in normal(0, *shapes)]
    ids, activation = IDS if packed else None, None if dtype == "bfloat16" else "silu"
    with jax.enable_x64(dtype == "float64"):
        got = results(mesh, *given[:3], ids, *given[3:], activation)
    assert got["y"].sharding.is_equivalent_to(NamedSharding(mesh, P(("data", "fsdp"), "seq", "tensor")), 3)
    assert all(x.dtype == dtype for x in got.values())
    x, w, b, tail, dy, dtail = (np.asarray(x, np.float64) for x in given)
    truth = short(x, w, b, ids, tail, dy, dtail, activation)
    rounded = lambda x: np.asarray(x).astype(dtype).astype(np.float64)
    plain = short(x, w, b, ids, tail, dy, dtail, activation, r=rounded)
    oracle.assert_accurate(got, truth, plain, np.float64 if dtype == "float64" else np.float32)


def test_what_the_devices_send():
    """Devices send the last C - 1 inputs forward, their gradient backward, and ids."""
    mesh = mesh_of(2, 1, 1, 4)

    def loss(x, w, ids):
        return jnp.sum(parallel.short_convolution(x, w, segment_ids=ids, mesh=mesh)[0].astype(jnp.float32))

    for T in (16, 64):
        x, w, ids = jnp.ones((2, T, E), jnp.bfloat16), jnp.ones((E, 4)), jnp.zeros((2, T), jnp.int32)
        found = equations(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, w, ids).jaxpr)
        sent = [e.invars[0].aval for e in found if e.primitive.name == "ppermute"]
        assert [(x.shape, x.dtype.name) for x in sent] == [
            ((1, 3, E), "bfloat16"), ((1,), "int32"), ((1, 3, E), "bfloat16"),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("mesh", "T", "change", "error", "message"),
    [
        ((1, 1, 1, 4), 10, {}, ValueError, "T=10 must be a multiple of 4, the devices on 'seq'; pad it to 12"),
        ((1, 1, 1, 4), 8, {}, NotImplementedError, "T=8 tokens are 2 on each of 4 devices.*at least 12 tokens"),
        ((1, 1, 4, 2), 8, {}, NotImplementedError, "E=6 channels do not divide over the 4.*head_axis=None"),
        ((4, 1, 1, 2), 8, {}, ValueError, "B=2 must be a multiple of 4"),
        ((1, 1, 1, 2), 8, {"weight": np.ones((5, 4), np.float32)}, ValueError, "weight.shape"),
    ],
)
def test_refusals(mesh, T, change, error, message):
    call = {"x": jnp.ones((B, T, E)), "weight": jnp.ones((E, 4)), **change}
    with pytest.raises(error, match=message):
        parallel.short_convolution(**call, mesh=mesh_of(*mesh))


def test_of_nothing_and_with_all_channels_on_each_device():
    tail = normal(1, (B, 3, E))[0].astype(np.float32)
    mesh, w = mesh_of(1, 1, 4, 2), jnp.ones((E, 4))
    y, new = parallel.short_convolution(jnp.ones((B, 0, E)), w, tail=tail, mesh=mesh, head_axis=None)
    assert y.shape == (B, 0, E)
    np.testing.assert_array_equal(new, tail)
