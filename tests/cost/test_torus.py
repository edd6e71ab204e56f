"""Links of a slice: small cases whose times can be added up by hand."""

import itertools

import pytest

from longattn.aot import collectives, compilers, hlo
from longattn.cost import topology
from longattn.cost.collective import Collective
from longattn.cost.torus import Torus, ways
from tests.compilers import needs_libtpu

LINK, CHIP = 10.0, 60.0  # bytes/s


def slice_of(*sizes: int, rings: bool = True, each: int = 1) -> Torus:
    """Chips with `each` devices, numbered with the last axis the fastest."""
    chips = [place for place in itertools.product(*map(range, sizes)) for _ in range(each)]
    return Torus(sizes, (rings,) * len(sizes), LINK, CHIP, tuple(chips))


def seconds(torus: Torus, *collectives: Collective) -> float:
    """Of all at once, each link after the other."""
    times = torus.times(collectives)
    return float(sum(times[c] for c in collectives).max())


def permute(pairs, bytes=20):
    pairs = tuple(pairs)
    return Collective("collective-permute", bytes, tuple(sorted({i for p in pairs for i in p})), "", "", pairs)


def group(kind, devices, array=80):
    """Every device of the group has an array (all-gather: a shard) of these bytes."""
    n = len(devices)
    share = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-broadcast": 1}.get(kind, (n - 1) / n)
    return Collective(kind, round(array * share), tuple(devices), "", "")


def rows(shift, n=4, lines=4):
    """Along the last axis of lines x n chips, every device to the one `shift` further, around."""
    return [(line * n + i, line * n + (i + shift) % n) for line in range(lines) for i in range(n)]


def test_the_shortest_way_along_an_axis():
    assert ways(0, 3, 4) == [(-1, [3])] and ways(0, 3, 4, ring=False) == [(1, [1, 2, 3])]
    assert ways(3, 1, 4) == [(1, [0, 1]), (-1, [2, 1])] and ways(3, 1, 4, ring=False) == [(-1, [2, 1])]
    assert [entered for _, entered in ways(2, 2, 4)] == [[]] == [e for _, e in ways(2, 2, 4, ring=False)]


@pytest.mark.parametrize(
    ("pairs", "rings", "expected"),
    [
        (rows(1), True, 2),  # every link one way carries one message of 20 bytes
        (rows(1), False, 2),  # the last one's goes back over the three links of the other way
        (rows(-1), True, 2),
        (rows(2), True, 2),  # a half each way: of two messages each link carries a half
        (rows(2), False, 4),  # the middle link carries two whole ones, each way
        (rows(3), True, 2),  # as back by one
        ([(line * 4 + i, line * 4 + 3 - i) for line in range(4) for i in range(4)], False, 4),  # mirrored: the middle
        ([(line * 4 + i, line * 4 + 3 - i) for line in range(4) for i in range(4)], True, 2),  # over the wrap, too
        ([(i, i * 4) for i in range(4)], False, 2),  # a row becomes a column: rows last, where they are apart
        ([(i, (i + 1) % 16) for i in range(16)], True, 2),  # row by row: to the next, around and down at the end
        ([(i, i) for i in range(16)], True, 0),
        ([], True, 0),
    ],
)
def test_a_permute_takes_what_its_busiest_link_takes(pairs, rings, expected):
    assert seconds(slice_of(4, 4, rings=rings), permute(pairs)) == pytest.approx(expected)


def test_permutes_the_same_way_share_links_and_others_do_not():
    torus, down = slice_of(4, 4), [(i, (i + 4) % 16) for i in range(16)]
    assert seconds(torus, permute(rows(1)), permute(rows(1))) == pytest.approx(4)
    assert seconds(torus, permute(rows(1)), permute(rows(-1))) == pytest.approx(2)
    assert seconds(torus, permute(rows(1)), permute(down)) == pytest.approx(2)
    assert seconds(torus, permute([(0, 1)]), permute([(4, 5)])) == pytest.approx(2)
    assert seconds(torus, permute([(0, 1)]), permute([(0, 1), (4, 5)])) == pytest.approx(4)


ROW, ALL = range(4, 8), range(16)


@pytest.mark.parametrize(
    ("kind", "devices", "rings", "expected"),
    [
        ("all-gather", ROW, True, 12),  # 240 bytes over the two links of the axis
        ("all-gather", ROW, False, 24),  # over one, at the ends
        ("all-gather", range(1, 16, 4), False, 24),
        ("all-gather", ALL, True, 30),  # 1200 bytes over four links
        ("all-gather", ALL, False, 60),  # over two, in the corners
        ("all-gather", (4, 5), True, 8),  # neighbours have one link between them
        ("all-gather", (4, 5, 8, 9), True, 12),  # and of a square each has two
        ("reduce-scatter", ROW, True, 3),  # 60 bytes
        ("reduce-scatter", ROW, False, 6),
        ("all-reduce", ROW, True, 6),  # 120
        ("all-reduce", ROW, False, 8),  # the ends send and receive the array once, over one link
        ("all-to-all", ROW, True, 4),  # 20 bytes a message: an eighth of the 16 pairs crosses each link
        ("all-to-all", ROW, False, 8),  # and in the middle four of them
        ("all-to-all", ALL, True, 4),  # 5 bytes a message: each link carries 8 of them
        ("all-to-all", ALL, False, 8),
        ("collective-broadcast", ROW, True, 4),
    ],
)
def test_a_group_has_the_links_of_its_own_axes(kind, devices, rings, expected):
    assert seconds(slice_of(4, 4, rings=rings), group(kind, devices)) == pytest.approx(expected)


def test_bytes_do_not_depend_on_where_the_axis_lies():
    """In three dimensions, too, an all-gather along the middle axis has two links."""
    torus = slice_of(2, 4, 3)
    assert seconds(torus, group("all-gather", range(1, 12, 3))) == pytest.approx(12)
    assert seconds(torus, group("all-gather", range(24))) == pytest.approx(23 * 80 / 60)


def test_what_gathers_and_what_permutes_meet_where_they_use_the_same_links():
    """A gather over both links of the axis, 240 bytes, and a hop of 20 over one: 130 each."""
    torus, gather, scatter = slice_of(4, 4), group("all-gather", ROW), group("reduce-scatter", ROW)
    assert seconds(torus, gather, permute(rows(1))) == pytest.approx(13)
    assert seconds(torus, gather, permute([(i, (i + 4) % 16) for i in range(16)])) == pytest.approx(12)
    assert seconds(torus, gather, gather) == pytest.approx(24)
    assert seconds(torus, gather, group("all-gather", ALL)) == pytest.approx(30 + 6)  # half of its links are in use
    assert seconds(torus, gather, scatter) == pytest.approx(12 + 3)
    line = slice_of(4, 4, rings=False)  # what the end of a line sends does not meet what it receives
    assert seconds(line, gather, scatter) == pytest.approx(24)
    assert seconds(line, scatter, scatter) == pytest.approx(12)


def test_devices_of_a_chip_share_its_links():
    """Chips of two devices in a ring: 0 1 | 2 3 | 4 5 | 6 7."""
    torus = slice_of(4, each=2)
    assert seconds(torus, permute([(0, 1), (1, 0)])) == pytest.approx(20 / CHIP)
    assert seconds(torus, permute([(i, (i + 1) % 8) for i in range(8)])) == pytest.approx(2)
    assert seconds(torus, permute([(i, (i + 2) % 8) for i in range(8)])) == pytest.approx(4)
    assert seconds(torus, group("all-gather", range(8))) == pytest.approx(6 * 80 / 20)  # both read what comes in
    assert seconds(torus, group("all-gather", range(0, 8, 2))) == pytest.approx(2 * 3 * 80 / 20)  # the other four, too
    assert seconds(torus, group("all-gather", (2, 3))) == pytest.approx(80 / CHIP)
    # 10 bytes a message, 4 messages from chip to chip, of which the links of a ring of four carry two pairs'.
    assert seconds(torus, group("all-to-all", range(8))) == pytest.approx(8)


def test_nothing_sent_takes_no_links():
    assert slice_of(4, 4).times([]) == {}
    hop = permute(rows(1))
    assert len(slice_of(4, 4).times([hop, hop])) == 1


@pytest.mark.parametrize(
    ("name", "rings"),
    [
        ("v5e:16x16", (True, True)),
        ("v5e:8x16", (False, True)),
        ("v6e:4x4", (False, False)),
        ("v5p:4x4x4", (True, True, True)),
        ("v5p:4x8x8", (True, True, True)),
        ("v5p:2x4x4", (False, False, False)),
        ("tpu7x:2x2x1", (False, False, False)),
    ],
)
def test_which_axes_are_rings(name, rings):
    assert topology.parse(name).rings == rings


def test_one_link_of_each_chip():
    assert [topology.parse(name).one_link / 1e9 for name in ("v5e:2x2", "v6e:2x2", "v5p:2x2x1", "tpu7x:2x2x1")] == [
        50, 100, 100, 100,
    ]  # fmt: skip
    assert topology.parse("h100:8").one_link == topology.parse("h100:8").link_bandwidth
    assert topology.parse("h100:8").torus([]) is None


@needs_libtpu
@pytest.mark.parametrize("name", ["v5e:4x4", "tpu7x:2x2x1"])
def test_programs_number_devices_as_the_mesh_does(name):
    """A ring over the whole slice: neighbours in the mesh are neighbours in the machine, whatever their ids are."""
    from longattn.aot import compilers

    where = topology.parse(name)
    answer = compilers.call("tests.cost.test_torus:ring", {"name": name}, compilers.environment_of(where), 120)
    assert answer["ids"] != sorted(answer["ids"]) and sorted(answer["ids"]) == list(range(where.size))
    assert answer["pairs"] == [[i, (i + 1) % where.size] for i in range(where.size)]
    chips = where.size // where.chip.devices
    assert answer["links"] == chips and answer["links_by_id"] > chips  # the ids' order is another
    assert answer["seconds"] == pytest.approx(2**20 / where.one_link)


def ring(request):
    """In a child: a ring's hop as compiled, its time, and over how many links it goes, also if ids were meant."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from longattn import parallel

    where = topology.parse(request["name"])
    mesh = parallel.make_mesh(seq=where.size, devices=compilers.devices_of(where))
    hop = lambda x: jax.lax.ppermute(x, "seq", [(i, (i + 1) % where.size) for i in range(where.size)])
    shift = jax.jit(jax.shard_map(hop, mesh=mesh, in_specs=P("seq"), out_specs=P("seq")))
    x = jax.ShapeDtypeStruct((where.size * 2**18,), jnp.float32, sharding=NamedSharding(mesh, P("seq")))
    program = hlo.parse(shift.trace(x).lower().compile().as_text())
    found = (collectives.collective(program, program.entry, i) for i in program.entry.instructions)
    what = next(c for c in found if c is not None)
    devices = list(mesh.devices.flat)

    def links(order):
        places = where.torus(order).places
        steps = (ways(*ends) for a, b in what.pairs for ends in zip(places[a], places[b], where.dims, where.rings))
        return sum(len(found[0][1]) for found in steps)

    return {
        "ids": [d.id for d in devices],
        "pairs": what.pairs,
        "seconds": float(where.torus(devices).times([what])[what].max()),
        "links": links(devices),
        "links_by_id": links(sorted(devices, key=lambda d: d.id)),
    }
