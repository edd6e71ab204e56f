"""Collectives as libtpu compiles them for whole slices."""

import pytest

from longattn.aot import compilers, hlo, schedule, train_step
from longattn.cost.topology import parse
from tests.compilers import needs_libtpu

ROWS, COLUMNS = 8192, 1024


def gathers(request):
    """In a child: an array gathered over all devices and over those along the sequence, as compiled."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from longattn import parallel

    where = parse(request["name"])
    mesh = parallel.make_mesh(fsdp=where.size // 16, seq=16, devices=compilers.devices_of(where))
    array = lambda *axes: jax.ShapeDtypeStruct((ROWS, COLUMNS), jnp.bfloat16, sharding=NamedSharding(mesh, P(axes)))
    whole = jax.jit(lambda *arrays: [jnp.sin(x) for x in arrays], out_shardings=NamedSharding(mesh, P()))
    compiled = whole.trace(array("fsdp", "seq"), array("seq")).lower().compile()
    program = hlo.parse(compiled.as_text())
    totals = schedule.walk(program, train_step.published_rates(where, mesh))
    found = [[what.kind, what.axes, what.bytes, runs] for (what, _), runs in totals.collectives.items()]
    return {"collectives": sorted(found), "missing": totals.missing, "exposed": totals.exposed}


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5p:4x4x4", "tpu7x:4x4x4"])
def test_slices_of_cubes_gather_over_their_rings(name):
    """A slice compiled as a mesh sums padded arrays instead, at twice the bytes. A tpu7x's sparse cores gather."""
    where = parse(name)
    answer = compilers.call("tests.aot.test_collectives:gathers", {"name": name}, compilers.environment_of(where), 240)
    received = lambda n: ROWS * COLUMNS * 2 * (n - 1) // n
    assert answer["collectives"] == [
        ["all-gather", "fsdp,seq", received(where.size), 1],
        ["all-gather", "seq", received(16), 1],
    ]
    assert answer["missing"] == [] and answer["exposed"] > 0
