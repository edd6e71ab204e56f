"""What devices send each other: the formulas equal the bytes of compiled programs, device by device."""

from collections.abc import Iterator

import numpy as np
import pytest

from longattn.aot.messages import measured
from longattn.cost.sequence import traffic
from longattn.cost.sequence.problem import Problem, Way, ways
from longattn.cost.sequence.traffic import units
from longattn.mask import Causal, Window
from tests.slow import but_few

GQA8 = {"H": 16, "K": 2, "D": 4, "V": 6}  # eight query heads to a key/value head
# Of every strategy: GQA, D != V, ids, odd P, heads filled in or sent twice, a window, hops both ways.
CASES = [
    (Way("ring", "contiguous", (4,)), Problem(T=32, B=2, ids=True, **GQA8)),
    (Way("ring", "contiguous", (5,)), Problem(T=40, H=2, K=1, D=4, mask=Window(9, 12))),
    (Way("balanced", "contiguous", (4,)), Problem(T=32, B=2, **GQA8)),
    (Way("all_gather", "zigzag", (2,)), Problem(T=32, B=2, ids=True, **GQA8)),
    (Way("ulysses", "contiguous", (3,)), Problem(T=24, B=2, **GQA8)),
    (Way("usp", "zigzag", (2, 2)), Problem(T=32, B=2, H=4, K=1, D=4)),
]


def grid() -> Iterator[tuple[Way, Problem]]:
    """Yields every strategy and layout on three and on eight devices, with alternating kinds of heads."""
    for i, P in enumerate((3, 8)):  # those above have 2, 4 and 5
        for kind, heads in enumerate((GQA8, {"H": P, "K": P, "D": 4})):
            for j, way in enumerate(ways(P, heads["K"])):
                if (i + j + kind) % 2 == 0:
                    yield way, Problem(T=8 * P, B=2, **heads)


def check(way: Way, problem: Problem) -> None:
    """float16: half the bytes of the statistics, and sent as it is."""
    problem = Problem(**(vars(problem) | {"dtype": "float16"}))
    for formula, found in zip(traffic.traffic(problem, way), measured(problem, way), strict=True):
        assert set(found) == {scope for scope in formula.scopes if formula.received(scope).any()}
        for scope in found:
            np.testing.assert_array_equal(found[scope], formula.received(scope), err_msg=scope)


@pytest.mark.parametrize(("way", "problem"), but_few(CASES, 3), ids=lambda x: str(x) if isinstance(x, Way) else "")
def test_formulas_are_the_bytes_of_the_programs(way, problem):
    check(way, problem)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "problem"), list(grid()), ids=lambda x: str(x) if isinstance(x, Way) else f"K{x.K}")
def test_formulas_are_the_bytes_of_the_programs_on_3_and_8_devices(way, problem):
    check(way, problem)


@pytest.mark.parametrize("P", [2, 3, 4, 8, 64])
@pytest.mark.parametrize("group", [1, 8])
def test_the_usual_figures_and_what_they_leave_out(P, group):
    """In T H D elements of one size: what is summed in float32 counts twice that of the usual table."""
    T, H, D = 16 * P, 8 * P, 4
    problem = Problem(T=T, H=H, K=H // group, D=D)
    elements = lambda sent: sent.received().max() / (T * H * D * 2)
    kv = 2 * (P - 1) / P / group
    forward, backward = map(elements, traffic.traffic(problem, Way("ring", "zigzag", (P,))))
    assert (forward, backward) == pytest.approx((kv, kv + 2 * kv))
    assert units("ring", P, group) == pytest.approx((kv, kv + kv))
    forward, backward = map(elements, traffic.traffic(problem, Way("all_gather", "zigzag", (P,))))
    assert (forward, backward) == pytest.approx((kv, kv + 2 * kv))

    mean = lambda sent: sent.received().mean() / (T * H * D * 2)
    sent = traffic.traffic(problem, Way("balanced", "contiguous", (P,)))
    help_ = sum(range(1, (P + 1) // 2))  # pairs of devices that help; the others, of P (P - 1) / 2, get keys
    keys = P * (P - 1) // 2 - help_
    statistics = 2 / D  # float32, of an element of two bytes
    forward = keys / P / P * 2 / group + help_ / P / P * (1 + 2 + statistics)
    backward = keys / P / P * (2 + 4) / group + help_ / P / P * (2 + 2 * statistics + 2)
    assert (mean(sent[0]), mean(sent[1])) == pytest.approx((forward, backward))
    if P % 2:  # half of the pairs each; in elements of one size, without lse, that is the usual figure
        each = (P - 1) / 4 / P
        assert units("balanced", P, group) == pytest.approx((each * (2 / group + 2), 2 * each * (2 / group + 2)))

    if H // group % P == 0:
        forward, backward = map(elements, traffic.traffic(problem, Way("ulysses", "contiguous", (P,))))
        usual = units("ulysses", P, group)
        lse = (P - 1) / P / P * 2 / D
        assert (forward, backward) == pytest.approx((usual[0] + lse, usual[1] + 2 * lse))


def test_a_window_elides_hops():
    P, T = 8, 128
    of = lambda mask, layout="contiguous": traffic.traffic(
        Problem(T=T, H=8, K=8, D=4, mask=mask), Way("ring", layout, (P,))
    )[0].most  # fmt: skip
    assert of(Causal() & Window(15)) == of(Causal()) / 7
    assert of(Causal() & Window(15), "striped") == of(Causal())
    assert units("usp", 4) is None
