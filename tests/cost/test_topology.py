"""Names of machines."""

import pytest

from longattn.aot import compilers
from longattn.cost.topology import parse
from tests.compilers import needs_libtpu
from tests.slow import but_few


@pytest.mark.parametrize(
    ("name", "devices", "gib"),
    [("v5e:16x16", 256, 15.75), ("v5p:8x8x8", 512, 95.73), ("v6e:4x4", 16, 31.24), ("tpu7x:2x2x1", 8, 94.74)],
)
def test_tpus_by_name(name, devices, gib):
    where = parse(name)
    assert (where.name, where.size, where.is_gpu) == (name, devices, False)
    assert where.hbm_bytes == int(gib * 2**30)


def test_gpus_by_name():
    assert (parse("h100:8").name, parse("h100:8").size, parse("h100:8").dims) == ("h100:8", 8, (1, 8))
    assert (parse("h100:4x8").name, parse("h100:4x8").size) == ("h100:4x8", 32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5ee:2x2", "did you mean 'v5e'"),
        ("v5e", "2 dimensions, such as v5e:2x2"),
        ("v5e:4", "2 dimensions, such as v5e:2x2"),
        ("v5p:4x4", "3 dimensions, such as v5p:2x2x1"),
        ("v5e:0x4", "2 dimensions"),
        ("v6e:16x32", "at most 16x16 chips, v6e:16x16"),
        ("h100:16", "at most 8 GPUs, such as h100:2x8"),
        ("t4:1", "a chip that can be compiled for"),
    ],
)
def test_wrong_names_say_the_remedy(name, message):
    with pytest.raises(ValueError, match=message):
        parse(name)


def test_smaller_machines_halve_their_longest_axis():
    assert [t.name for t in parse("v5e:4x8").smaller()] == [
        "v5e:1x1", "v5e:1x2", "v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8",
    ]  # fmt: skip
    assert [t.name for t in parse("v5p:4x4x4").smaller()] == [
        "v5p:1x1x1", "v5p:2x1x1", "v5p:2x2x1", "v5p:2x2x2", "v5p:4x2x2", "v5p:4x4x2", "v5p:4x4x4",
    ]  # fmt: skip
    assert [t.name for t in parse("h100:2x8").smaller()] == ["h100:1", "h100:2", "h100:4", "h100:8", "h100:2x8"]
    assert [t.name for t in parse("h100:3x6").smaller()] == ["h100:1", "h100:3", "h100:6", "h100:3x6"]


@needs_libtpu
@pytest.mark.parametrize("name", but_few(["v5p:4x4x2", "v5e:4x4", "v6e:2x4", "tpu7x:2x2x2"]))
def test_libtpu_knows_the_sizes(name):
    from longattn.aot import compilers

    where = parse(name)
    answer = compilers.call("tests.cost.test_topology:described", {"name": name}, compilers.environment_of(where), 120)
    assert answer == {"devices": where.size, "usable": pytest.approx(where.hbm_bytes / 2**30, abs=0.011)}


def described(request):
    """In a child: how many devices there are, and how much memory libtpu lets a program have (GiB)."""
    import re

    import jax

    devices = compilers.devices_of(parse(request["name"]))
    x = jax.ShapeDtypeStruct((2**20, 2**18), "float32", sharding=jax.sharding.SingleDeviceSharding(devices[0]))
    try:
        jax.jit(lambda x: x + 1).trace(x).lower().compile()
    except jax.errors.JaxRuntimeError as error:
        return {"devices": len(devices), "usable": float(re.search(r"available HBM \(([\d.]+)G\)", str(error))[1])}
    raise AssertionError("a terabyte fits")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("v5p-128", "v5p:4x4x4"),
        ("v5p-8", "v5p:2x2x1"),
        ("v5litepod-16", "v5e:4x4"),
        ("v6e-256", "v6e:16x16"),
        ("v6e-32", "v6e:4x8"),
    ],
)
def test_a_clouds_name_is_said_as_a_topology(name, meant):
    with pytest.raises(ValueError, match=f"this one is {meant}"):
        parse(name)
