"""Packed documents: work by the dense mask, balance by the layouts, rows shared out by work."""

import numpy as np
import pytest

from longattn.mask import Causal, Prefix, Window
from longattn.parallel.layout import SequenceLayout
from longattn.plan.sequence import packing
from longattn.tasks import bytelm


@pytest.mark.parametrize("mask", [Causal(), Causal() & Window(3), Window(2, 4)], ids=str)
def test_work_is_what_the_dense_mask_of_each_document_shows(mask):
    documents, T = [5, 1, 9, 3], 20
    expected = np.concatenate([np.asarray(mask.dense(n, n)).sum(1) for n in documents])
    np.testing.assert_array_equal(packing.row_work(documents, T, mask), [*expected, 0, 0])


def test_two_documents_in_a_row():
    """Zigzag balances documents of half the row and no others, striped all; by hand, in eighths of the row."""
    of = lambda documents: {
        name: packing.imbalance(packing.row_work(documents, 1024)[None], SequenceLayout(name), 4)[0]
        for name in ("contiguous", "zigzag", "striped")
    }
    halves, three_to_one = of([512, 512]), of([768, 256])
    assert halves == pytest.approx({"contiguous": 12 / 8, "zigzag": 1, "striped": 1}, abs=0.01)
    assert three_to_one == pytest.approx({"contiguous": 20 / 10, "zigzag": 16 / 10, "striped": 1}, abs=0.01)
    with pytest.raises(ValueError, match="must be a rule of q - k"):
        packing.row_work([4], 4, Prefix(2))


def test_rows_are_shared_out_by_work():
    rng = np.random.default_rng(0)
    for groups, each in ((1, 5), (4, 2), (3, 8), (8, 1)):
        work = rng.integers(1, 1000, groups * each)
        order = bytelm.share(work, groups)
        assert sorted(order) == list(range(groups * each))  # every row once
        before, after = (packing.over_groups(w[None], groups)[0] for w in (work, work[order]))
        assert after <= before + 1e-9
        np.testing.assert_array_equal(order, bytelm.share(work, groups))
    np.testing.assert_array_equal(np.sort(bytelm.share(np.array([5, 4, 3, 2]), 2).reshape(2, 2), 1), [[0, 3], [1, 2]])
    with pytest.raises(ValueError, match="groups=3 must divide 4 rows"):
        bytelm.share(np.ones(4, np.int64), 3)


@pytest.fixture
def glob(tmp_path):
    rng = np.random.default_rng(1)
    for i in range(120):
        (tmp_path / f"{i}.txt").write_bytes(b"x" * int(rng.integers(5, 400)))
    return f"{tmp_path}/*.txt"


def test_tables(glob):
    rows = packing.table([256], [2, 4], rows=16, glob=glob)
    assert [(r["P"], r["layout"]) for r in rows] == [
        (P, x) for P in (2, 4) for x in ("contiguous", "zigzag", "striped")
    ]
    assert all(1 <= r["mean"] <= r["worst"] <= r["P"] for r in rows)
    assert all(r["mean"] < 1.05 for r in rows if r["layout"] == "striped")
    (found,) = packing.groups_table([256], [2], [4], glob=glob)
    assert found["after"] < found["before"] and found["after"] < 1.1
