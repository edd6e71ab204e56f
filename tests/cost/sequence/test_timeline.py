"""Time lines: by hand where that can be done, and the trends of DistFlashAttn's figure 4."""

import numpy as np
import pytest

from longattn.cost import flops, topology
from longattn.cost.pairs import visible_pairs
from longattn.cost.sequence.problem import Problem, Way, ways
from longattn.cost.sequence.timeline import Machine, machine, seconds, simulate
from longattn.cost.sequence.traffic import Message, everyone, traffic
from longattn.mask import Causal, Full, Window

FAST = Machine(flops=1e15, link=1e30, torus=True, network=1e30, node=1024, latency=0.0)
SLOW = Machine(flops=1e30, link=1e9, torus=False, network=1e30, node=1024, latency=0.0)
P = 8
LAYER = Problem(T=4096, H=32, K=8, D=128)


@pytest.mark.parametrize("way", ways(P, 8), ids=str)
def test_with_free_messages_devices_wait_for_the_slowest(way):
    for found, work in zip(simulate(LAYER, way, FAST), (1.0, 2.5), strict=True):
        whole = flops.attention_flops(visible_pairs(Causal(), LAYER.T), 32, 128).forward * work / 1e15 / P
        assert found.compute == pytest.approx(whole) and found.exposed == pytest.approx(0, abs=1e-12)
        assert found.total == pytest.approx(found.compute + found.imbalance)
    if (way.strategy, way.layout) == ("ring", "contiguous"):  # the last device is never idle
        assert found.total == pytest.approx(whole * (2 * P - 1) / P, rel=1e-2)
    if way.strategy == "balanced":
        assert found.total == pytest.approx(whole * (P + 1) / P, rel=1e-2)


@pytest.mark.parametrize("way", ways(P, 8), ids=str)
def test_with_free_products_it_takes_what_the_busiest_chain_of_messages_takes(way):
    for found, sent in zip(simulate(LAYER, way, SLOW), traffic(LAYER, way), strict=True):
        assert found.total == pytest.approx(found.exposed)
        if way.strategy == "ring":
            chain = sum(m.bytes for m in sent.messages) / 1e9
            assert found.total == pytest.approx(chain)
        elif way.strategy in ("all_gather", "ulysses"):
            assert found.total == pytest.approx(sent.most / 1e9)
        else:
            assert sent.most / 1e9 <= found.total * (1 + 1e-9)


def test_a_ring_hides_its_hops_behind_equal_work():
    way, kv = Way("ring", "zigzag", (P,)), LAYER.T / P * 8 * 256 * 2
    hop = flops.attention_flops(visible_pairs(Causal(), LAYER.T) / P**2, 32, 128).forward / 1e12
    at = lambda link: simulate(LAYER, way, Machine(1e12, link, True, 1e30, 1024, 0.0))[0]
    assert at(kv / hop * 1.05).exposed == pytest.approx(0, abs=1e-9)
    slow = at(kv / hop / 3)  # a hop takes three pairs' time: of each two are seen
    assert slow.exposed == pytest.approx(7 * 2 * hop, rel=0.01)
    off = simulate(LAYER, way, Machine(1e12, kv / hop, True, 1e30, 1024, 0.0), overlap=False)[0]
    assert off.exposed == pytest.approx(7 * hop, rel=0.01)


def test_messages_on_links_and_through_switches():
    torus, switch = Machine(1, 10.0, True, 1, 1, 0.5), Machine(1, 10.0, False, 2.0, 2, 0.5)
    shift = lambda t: [Message("hop", "collective-permute", tuple((i, (i + t) % 8) for i in range(8)), 20.0)]
    assert seconds(shift(1), (8,), torus) == 0.5 + 2
    assert seconds(shift(3), (8,), torus) == 3 * 0.5 + 3 * 2  # every link carries three messages
    assert seconds(shift(6), (8,), torus) == 2 * 0.5 + 2 * 2  # the shorter way
    assert seconds(shift(4), (8,), torus) == 4 * 0.5 + 2 * 2  # half each way
    exchange = [Message("exchange", "all-to-all", everyone([range(8)]), 1.0)]
    assert seconds(exchange, (8,), torus) == 4 * 0.5 + 8**2 / 8 / 10.0  # the bisection: P^2 / 8 for each link
    gather = [Message("gather", "all-gather", everyone([range(8)]), 1.0)]
    assert seconds(gather, (8,), torus) == 4 * 0.5 + 7 / 2 / 10.0
    assert seconds(shift(1), (8,), switch) == 0.5 + 20 / 2  # every second message leaves its node of two
    assert seconds(exchange, (8,), switch) == 0.5 + 6 / 2
    assert seconds(gather, (8,), switch) == 0.5 + 6 / 2 / 2
    assert seconds([], (8,), torus) == 0


@pytest.mark.parametrize("backward", [0, 1])
def test_trends_of_distflashattn_figure_4(backward):
    """Its overhead of messages fell from 105% to 44% where they overlap at 128K, and to 8% and 1% at longer ones.

    16 A100s with a 100 Gbit/s adapter each, multi-head attention, at the published peak: the numbers differ, for no
    kernel reaches it, but overlap helps at every length, and overheads fall with it, overlapped ones faster.
    """
    two_nodes = Machine(312e12, 300e9, False, 12.5e9, 8)
    way = Way("balanced", "contiguous", (16,))
    overheads = np.array(
        [
            [simulate(Problem(T=T, H=32, K=32, D=128), way, two_nodes, overlap=o)[backward].overhead
             for o in (False, True)]
            for T in (2**17, 2**18, 2**19, 2**20)
        ]
    )  # fmt: skip
    plain, overlapped = overheads.T
    assert (overlapped < plain).all()
    assert (np.diff(plain) < 0).all() and (np.diff(overlapped) < 0).all()
    assert (np.diff(overlapped / plain) < 1e-6).all()  # in the end what the last step gives back is left of both
    assert (plain[1:] / plain[:-1] < 0.51).all()  # pairs grow with the square
    assert plain[-1] > 0.4 and overlapped[-1] < 0.04  # hidden at last


def test_what_decides():
    """Causal: zigzag over contiguous, balanced behind it on a switch. Windows: near keys must be near."""
    best = lambda problem, where, of: min(of, key=lambda w: sum(p.total for p in simulate(problem, w, where)))
    long = Problem(T=2**17, H=32, K=8, D=128)
    h100 = machine(topology.parse("h100:8"))
    assert best(long, h100, ways(8, 8)).layout in ("zigzag", "striped")
    total = lambda way: sum(p.total for p in simulate(long, way, h100))
    assert total(Way("ring", "zigzag", (8,))) < total(Way("balanced", "contiguous", (8,)))
    assert total(Way("balanced", "contiguous", (8,))) < total(Way("ring", "contiguous", (8,)))
    local = Problem(T=2**17, H=32, K=8, D=128, mask=Causal() & Window(1024))
    assert best(local, h100, ways(8, 8)).layout != "striped"
    two_nodes = machine(topology.parse("h100:2x8"))
    assert best(long, two_nodes, ways(16, 8)).strategy == "usp"  # heads within a node, few hops between
    full = Problem(T=2**17, H=32, K=8, D=128, mask=Full())
    assert simulate(full, Way("ring", "contiguous", (8,)), h100)[0].imbalance == pytest.approx(0, abs=1e-12)


def test_machines():
    v5e = machine(topology.parse("v5e:4x4"), efficiency=0.5)
    assert (v5e.flops, v5e.link, v5e.torus) == (197e12 / 2, 400e9 / 2 / 4, True)
    assert machine(topology.parse("tpu7x:4x4x4")).link == 1200e9 / 2 / 6 / 2
    h100 = machine(topology.parse("h100:2x8"))
    assert (h100.link, h100.torus, h100.network, h100.node) == (450e9, False, 50e9, 8)
    with pytest.raises(ValueError, match=r"efficiency=1.5 must lie in \(0, 1\]"):
        machine(topology.parse("v5e:4x4"), efficiency=1.5)
    with pytest.raises(ValueError, match="must not be negative"):
        machine(topology.parse("v5e:4x4"), latency=-1.0)
