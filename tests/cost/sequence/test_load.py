"""Schedules of the strategies: every visible pair once, and what share of the devices' time is idle."""

import numpy as np
import pytest

from longattn.cost.pairs import pairs_between, visible_pairs
from longattn.cost.sequence.load import ALL, load, visible
from longattn.cost.sequence.problem import Problem, Way, ways
from longattn.mask import BlockSparse, Causal, Chunked, Dilated, Full, Global, Prefix, Window
from longattn.parallel.layout import SequenceLayout

LAYOUTS = ("contiguous", "zigzag", "striped")
MASKS = (Causal(), Causal() & Window(9), Window(3, 5), Full(), Dilated(5, 3), Causal() | Prefix(7), ~Causal(),
         Causal() & Chunked(10), Window(2) | Global(3))  # fmt: skip


def causal(P: int, chunk: int = 4) -> Problem:
    return Problem(T=2 * P * chunk, H=64, K=64, D=8)


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_visible_pairs_are_those_of_the_dense_mask(mask, layout):
    T, P = 48, 4
    where = SequenceLayout(layout).positions(T, P).reshape(P, T // P)
    dense = np.asarray(mask.dense(T, T))
    expected = [[dense[np.ix_(where[i], where[j])].sum() for j in range(P)] for i in range(P)]
    np.testing.assert_array_equal(visible(mask, SequenceLayout(layout), T, P), expected)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_every_visible_pair_is_computed_once(mask):
    problem = Problem(T=48, H=8, K=2, D=8, mask=mask)
    served = 0
    for way in ways(4, 2):
        after = np.triu(visible(mask, SequenceLayout(way.layout), problem.T, 4), 1).any()
        if way.strategy == "balanced" and after:
            with pytest.raises(NotImplementedError, match="is for causal masks"):
                load(problem, way)
            continue
        found = load(problem, way)
        served += 1
        assert found.pairs.sum() == pytest.approx(visible_pairs(mask, problem.T))
        if way.strategy in ("ring", "balanced"):
            seen = visible(mask, SequenceLayout(way.layout), problem.T, 4)
            times = np.zeros((4, 4), int)
            np.add.at(times, (found.queries[~found.idle], found.keys[~found.idle]), 1)
            np.testing.assert_array_equal(times, seen > 0)
    assert served >= len(ways(4, 2)) - 1


@pytest.mark.parametrize("P", [*range(2, 18), 32, 64])
def test_idle_shares_of_causal_attention(P):
    """Slots, and time with diagonals of half cost, which in numbers of pairs are a little more than half."""
    chunk = 128  # so that the diagonals' pairs beyond half are few
    problem = Problem(T=2 * P * chunk, H=64, K=64, D=8)
    of = lambda strategy, layout="contiguous": load(problem, Way(strategy, layout, (P,)))
    contiguous, zigzag, striped, balanced = of("ring"), of("ring", "zigzag"), of("ring", "striped"), of("balanced")
    assert contiguous.idle_slots == pytest.approx((P - 1) / (2 * P))
    assert contiguous.idle_share == pytest.approx((P - 1) / (2 * P - 1), abs=4e-3)
    assert zigzag.idle_slots == zigzag.idle_share == striped.idle_slots == 0
    assert 0 < striped.idle_share < 1e-2
    assert balanced.idle_slots == pytest.approx(0 if P % 2 else 1 / (P + 2))
    assert balanced.idle_share == pytest.approx(0 if P % 2 else 1 / (P + 1), abs=4e-3)
    assert len(balanced.pairs) == P // 2 + 1 and len(contiguous.pairs) == P
    assert balanced.helps.sum() == sum(t for t in range(1, (P + 1) // 2))  # t of them at step t, but for 2 t = P
    assert not contiguous.helps.any()


def test_critical_paths_of_1024_tokens_on_8_devices():
    """Exact pairs where all wait for the slowest at each step."""
    problem = Problem(T=1024, H=8, K=8, D=8)
    found = {layout: load(problem, Way("ring", layout, (8,))).critical for layout in LAYOUTS}
    assert found == {"contiguous": 122_944, "striped": 66_048, "zigzag": 65_600}
    assert visible_pairs(Causal(), 1024) / 8 == found["zigzag"]
    assert load(problem, Way("all_gather", "contiguous", (8,))).critical == found["contiguous"]  # the last device's own


def test_squares_of_kernels():
    """Striped has half-masked squares on every step's diagonal, zigzag on the first step's alone."""
    P, chunk = 8, 1024
    of = lambda layout, block: (
        load(Problem(T=P * chunk, H=8, K=8, D=8, block=block), Way("ring", layout, (P,))).critical
    )
    for block in (64, 128, 256, 512):
        diagonal = chunk * (chunk + block) // 2
        assert of("contiguous", block) == diagonal + (P - 1) * chunk**2
        assert of("striped", block) == P * diagonal  # overhead 1 + block / chunk
        assert of("zigzag", block) == chunk**2 // 2 * (P - 1) + diagonal
    assert of("striped", chunk) == of("contiguous", chunk) == P * chunk**2  # no gain at all
    with pytest.raises(ValueError, match="block=1024 must divide 512"):
        of("zigzag", chunk)


def test_heads_filled_in_are_work_too():
    problem = Problem(T=60, H=33, K=33, D=8)  # of 33 heads on 16 devices a third is padding (arXiv:2310.03294)
    even = load(Problem(T=64, H=33, K=33, D=8), Way("ulysses", "contiguous", (16,)))
    assert even.pairs.sum() / visible_pairs(Causal(), 64) == pytest.approx(48 / 33)
    assert (even.keys == ALL).all() and even.idle_share == 0
    usp = load(problem, Way("usp", "contiguous", (3, 2)))
    assert usp.pairs.shape == (3, 6) and (usp.pairs[:, ::2] == usp.pairs[:, 1::2]).all()
    assert usp.pairs.sum() / visible_pairs(Causal(), 60) == pytest.approx(34 / 33)


def test_windows_leave_out_hops():
    problem = Problem(T=1024, H=8, K=8, D=8, mask=Causal() & Window(100))
    assert len(load(problem, Way("ring", "contiguous", (8,))).pairs) == 2
    assert len(load(problem, Way("ring", "striped", (8,))).pairs) == 8  # near keys lie on all devices
    both = Problem(T=1024, H=8, K=8, D=8, mask=Window(100, 200))
    assert len(load(both, Way("ring", "contiguous", (8,))).pairs) == 4  # one hop onwards, two back


def test_refusals():
    blocks = BlockSparse(4, np.ones((1, 1, 2, 2), bool))
    with pytest.raises(ValueError, match="no array leaves"):
        load(Problem(T=8, H=1, K=1, D=8, mask=blocks), Way("ring", "contiguous", (2,)))
    with pytest.raises(ValueError, match="T=10 must be a multiple of 8"):
        load(Problem(T=10, H=1, K=1, D=8), Way("ring", "zigzag", (4,)))
    with pytest.raises(ValueError, match="must be two for usp"):
        Way("usp", "contiguous", (4,))
    with pytest.raises(ValueError, match="did you mean 'ring'"):
        Way("rings", "contiguous", (4,))
    with pytest.raises(NotImplementedError, match="balances the contiguous layout"):
        load(causal(4), Way("balanced", "zigzag", (4,)))
    with pytest.raises(NotImplementedError, match="its pairs at every 2th position are many"):
        pairs_between(Prefix(3), range(0, 2**16, 2), range(1, 2**16, 2))
    with pytest.raises(ValueError, match="must have one step"):
        pairs_between(Causal(), range(4), range(0, 8, 2))
