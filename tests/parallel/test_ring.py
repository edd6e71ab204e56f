"""What the ring sends, how far, and how large its program is."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from longattn import mask as m
from longattn import parallel
from longattn.parallel import SequenceLayout
from longattn.parallel.ring import Route, routes
from tests.parallel.test_attention import equations
from tests.slow import but_few

P, T = 8, 64  # shards of 8 tokens


def gradients(mask: m.Mask, layout: str = "contiguous", devices: int = P):
    """All equations of attention and its gradients."""
    mesh = parallel.make_mesh(seq=devices, devices=jax.devices()[:devices])
    x = jax.ShapeDtypeStruct((1, T, 1, 4), jnp.float32)
    attend = functools.partial(parallel.attention, mesh=mesh, mask=mask, layout=SequenceLayout(layout))
    loss = lambda q, k, v: jnp.sum(attend(q, k, v))
    return list(equations(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(x, x, x).jaxpr))


@pytest.mark.parametrize(
    ("mask", "layout", "forward"),
    [
        (m.Window(8), "contiguous", [7]),  # one hop onwards; the last device's keys are nobody's
        (m.Window(9), "contiguous", [7, 7]),  # of the second hop, the loop's edges are the first's
        (m.Window(3, 3), "contiguous", [7, 7]),  # one each way
        (m.Causal(), "contiguous", [7, 7]),  # the first hop, and those of the loop
        (m.Causal() & ~m.Window(7), "contiguous", [7, 7]),
        (m.Window(4), "zigzag", [7, 7]),  # the second half shards look to the other side
        (m.Causal(), "zigzag", [8, 8]),
        (m.Causal(), "striped", [8, 8]),
        (m.Full(), "contiguous", [8, 8]),
        (m.Window(0), "contiguous", []),
    ],
)
def test_keys_go_as_far_as_they_are_needed(mask, layout, forward):
    """Edges of every ppermute of keys, in the forward pass."""
    mesh = parallel.make_mesh(seq=P)
    x = jax.ShapeDtypeStruct((1, T, 1, 4), jnp.float32)
    attend = functools.partial(parallel.attention, mesh=mesh, mask=mask, layout=SequenceLayout(layout))
    found = [e for e in equations(jax.make_jaxpr(attend)(x, x, x).jaxpr) if e.primitive.name == "ppermute"]
    assert [len(e.params["perm"]) for e in found] == [n for n in forward for _ in "kv"]


def test_the_shortest_routes():
    i = np.arange(P)
    distance = (i[:, None] - i[None, :]) % P
    of = lambda *distances: routes(np.isin(distance, distances))
    assert of(0) == []
    assert of(0, 1, 2) == [Route(1, 2)]
    assert of(0, 7) == [Route(-1, 1)]
    assert of(1, 2, 6, 7) == [Route(1, 2), Route(-1, 2)]
    assert of(*range(P)) == [Route(1, P - 1)]


@pytest.mark.parametrize("layout", but_few(["zigzag", "contiguous", "striped"]))
def test_the_program_does_not_grow_with_the_ring(layout):
    sizes = [len(gradients(m.Causal(), layout, devices)) for devices in (4, 8)]
    assert sizes[0] == sizes[1]


SENDS = ("ppermute", "all_to_all", "all_gather", "reduce_scatter")


@pytest.mark.parametrize("strategy", parallel.STRATEGIES)
def test_nothing_runs_or_is_sent_twice_under_remat_by_name(strategy):
    """But the exchange of q, k and v by ulysses, whose results are not kept."""
    two = parallel.STRATEGIES[strategy].axes == 2
    names, shape = (("ring", "seq"), (2, 2)) if two else (("seq",), (4,))
    mesh = jax.make_mesh(shape, names, devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * len(names))
    x = jnp.ones((1, 16, 4, 4))

    def loss(x):
        return jnp.sum(parallel.attention(jnp.sin(x), x, x, mesh=mesh, axis=names, strategy=strategy))

    policy = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    counts = []
    for f in (loss, jax.checkpoint(loss, policy=policy)):
        found = [e.primitive.name for e in equations(jax.make_jaxpr(jax.grad(f))(x).jaxpr)]
        counts.append({name: found.count(name) for name in (*SENDS, "scan", "while", "exp")})
    again = {"all_to_all": 3} if parallel.STRATEGIES[strategy].exchanges_heads else {}
    assert counts[1] == {name: n + again.get(name, 0) for name, n in counts[0].items()}
