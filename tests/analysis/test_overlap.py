"""What the compiler for TPUs puts between the beginning and the end of the strategies' transfers."""

import pytest

from longattn.analysis import overlap
from longattn.analysis.plan import topology
from tests.analysis.compilers import needs_libtpu

LAST = {"ring": "home", "balanced": "gradients"}  # gradients' way home: nothing of attention is left to do meanwhile
# Forward and backward under remat="attention", none twice: the own pair, backward the first hop, the loop, the last; of
# zigzag two of each but the own. Balanced over four devices: the own pair and two steps.
KERNELS = {
    ("ring", "contiguous"): 3 + 4, ("ring", "zigzag"): 5 + 7, ("balanced", "contiguous"): 3 + 3,
    ("all_gather", "contiguous"): 1 + 1, ("ulysses", "contiguous"): 1 + 1,
}  # fmt: skip


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "layout"), [("ring", "contiguous"), ("ring", "zigzag"), ("balanced", "contiguous")]
)
def test_every_transfer_but_the_last_is_beside_attention(strategy, layout):
    found = overlap.compiled(topology.parse("v5p:2x2x1"), strategy, layout, 32_768, 2, 1, 128)
    rows = found["collectives"]
    assert rows and all(row["kind"] == "collective-permute" and row["asynchronous"] for row in rows)
    alone = {row["scope"]: row["runs"] - row["beside_attention"] for row in rows}
    last = {scope: n for scope, n in alone.items() if n}
    assert len(last) == 1 and LAST[strategy] in next(iter(last))
    assert sum(last.values()) == 2  # of keys and of values
    assert found["kernels"] == KERNELS[strategy, layout]


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["all_gather", "ulysses"])
def test_what_is_exchanged_at_once_hides_behind_nothing(strategy):
    found = overlap.compiled(topology.parse("v5p:2x2x1"), strategy, "contiguous", 32_768, 4, 4, 128)
    assert found["collectives"] and not any(row["asynchronous"] for row in found["collectives"])
    assert found["kernels"] == KERNELS[strategy, "contiguous"]
