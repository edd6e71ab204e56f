"""The TPU compiler schedules attention between the start and the end of the strategies' transfers."""

import pytest

from longattn.aot import overlap
from longattn.cost import topology
from tests.compilers import needs_libtpu

# Kernels over eight devices, forward + backward under remat="attention", none twice. Ring: the own pair, [backward the
# first hop,] the loop, the last hop, two of each but the own for zigzag. Balanced: the own pair and four steps.
KERNELS = {
    ("ring", "zigzag"): 5 + 7,
    ("balanced", "contiguous"): 5 + 5,
    ("all_gather", "contiguous"): 1 + 1,
}


def compiled(strategy: str, layout: str) -> dict:
    found = overlap.compiled(topology.parse("v5p:2x2x2"), strategy, layout, 65_536, 8, 4, 128)
    assert found["kernels"] == KERNELS[strategy, layout]
    return found


@needs_libtpu
@pytest.mark.slow
def test_every_hop_is_beside_attention():
    """Exceptions are the gradients' way home, with nothing left to compute, and the first backward hop, beside sums."""
    rows = compiled("ring", "zigzag")["collectives"]
    assert rows and all(row["kind"] == "collective-permute" and row["asynchronous"] for row in rows)
    assert {row["axes"] for row in rows} == {"seq"}
    alone = {row["scope"].removesuffix("/ppermute"): row["runs"] - row["beside_attention"] for row in rows}
    assert {scope: n for scope, n in alone.items() if n} == {"backward ring/hop": 2, "backward ring/home": 2}  # k and v


@needs_libtpu
@pytest.mark.slow
def test_balanced_waits_for_little():
    """In the forward pass only the last step's results overlap with nothing; devices wait a sixth of the time."""
    rows = compiled("balanced", "contiguous")["collectives"]
    assert rows and all(row["kind"] == "collective-permute" and row["asynchronous"] for row in rows)
    alone = {row["scope"]: row["runs"] - row["beside_attention"] for row in rows if "backward" not in row["scope"]}
    assert {scope: n for scope, n in alone.items() if n} == {"balanced/results/ppermute": 2}  # out and lse
    total = lambda key: sum(row[key] for row in rows)
    assert total("beside_attention") >= 2 / 3 * total("runs") and total("exposed_seconds") < total("seconds") / 6


@needs_libtpu
@pytest.mark.slow
def test_what_is_exchanged_at_once_hides_behind_nothing():
    rows = compiled("all_gather", "contiguous")["collectives"]
    assert rows and not any(row["asynchronous"] for row in rows)
